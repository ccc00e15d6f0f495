"""Every reader of the core on damaged files: a result, or a RiskcalError; what any other library raises is a defect.

``python benchmarks/fuzz_readers.py --minutes 10 --json FILE`` takes a valid file of each kind, has hypothesis damage it (bytes,
lines, values, the fields of JSON), and reads it, reader after reader, a round with a seed of its own after the other until the
minutes are over. Ends with 1 where anything foreign was raised; the file then holds what was read.
"""

import argparse
import copy
import gzip
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import riskcal
from riskcal import AdaptiveCalibration, ExitPolicy, RiskcalError, RiskMonitor, Runs, Traces
from riskcal.cli import loss_log
from riskcal.heads import LearnedRisk, learn_risk
from riskcal.records import files, reduce
from riskcal.records.check import findings
from riskcal.records.formats import lm_eval, otel, reasoning, vllm
from riskcal.serving import Drift, EventLog, EventWatch, read_events

#: Files damaged for each reader in a round.
CASES = 50
ODD = '"" "x" "NaN" "\\u0000" "\\ud800" null true [] {} [[1]] {"a":{}} NaN Infinity -Infinity 1e999 -0.0 -1 2 0 1e-320'
ODD_VALUES: list[Any] = [
    *map(json.loads, ODD.split()),
    10**400,
    "9" * 5000,
    [0.5] * 3,
    "2026-01-01",
]
ODD_BYTES = [
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\r",
    b"\n",
    b",",
    b'"',
    b"[" * 3000,
    b"{",
    b"}",
    b"NaN",
    b"1e999",
    b"-1",
    b"null",
]


@dataclass(frozen=True)
class Reader:
    """Writes a valid file into a folder and says which it is; reads one."""

    write: Callable[[Path], Path]
    read: Callable[[Path], Any]


def runs() -> pd.DataFrame:
    """Twelve prompts at two thresholds, most columns there."""
    return pd.DataFrame(
        {
            "prompt": np.repeat([f"p{i}" for i in range(12)], 2),
            "threshold": np.tile([0.9, 0.5], 12),
            "dissimilarity": np.tile([0.0, 0.25, 0.0, 1.0], 6),
            "layers": np.tile([3.5, 2.0], 12),
            "seconds": 0.5,
            "group": np.repeat(["a", "b"], 12),
            "failed": False,
        }
    )


def traces() -> pd.DataFrame:
    """Six prompts of two tokens with three exits."""
    frame = pd.DataFrame(
        {"prompt": np.repeat([f"p{i}" for i in range(6)], 2), "position": [0, 1] * 6}
    )
    for number in (1, 2, 3):
        frame[f"confidence_{number}"] = np.linspace(0.2, 0.9, 12)[:: 1 if number % 2 else -1]
        frame[f"agrees_{number}"] = [True, number > 1] * 6
    return frame


def table(frame: Callable[[], pd.DataFrame], name: str, folder: Path) -> Path:
    path = folder / name
    if name.endswith(".json"):
        path.write_text(frame().to_json(orient="records"))
    else:
        files.write(frame(), path)
    return path


def lines(name: str, rows: Sequence[Any], folder: Path) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def text(name: str, content: Callable[[], str], folder: Path) -> Path:
    path = folder / name
    path.write_text(content())
    return path


def events(folder: Path) -> Path:
    log = EventLog(folder / "events.jsonl")
    for i in range(12):
        served = {
            "gen_ai.response.id": f"r{i}",
            "riskcal.task": "ab"[i % 2],
            "riskcal.prompt.tokens": 20 + i,
        }
        log.write("riskcal.request.served", served)
        log.write(
            "riskcal.shadow.evaluated", {"gen_ai.response.id": f"r{i}", "riskcal.loss": i % 3 / 4}
        )
    return log.path


def watch(folder: Path) -> Path:
    path = folder / "watch.json"
    log = events(folder)
    EventWatch(RiskMonitor(0.2), drift=Drift({"prompt length": range(10, 40)})).read(log).save(path)
    return path


def watched(path: Path) -> str:
    """What was read has to serve as a state."""
    found = EventWatch.load(path)
    found.estimates()
    return found.follow(path.with_name("events.jsonl").read_bytes().splitlines()).verdict


def monitored() -> str:
    return RiskMonitor(0.2, sampling_rate=0.5).update([0.0, 0.25, 1.0, 0.0]).to_json()


def adapted() -> str:
    calibration = AdaptiveCalibration(range(20), [0.9, 0.5], delta=0.2)
    for _, prompt in zip(range(6), calibration, strict=False):
        calibration.update(prompt, [0.0, 0.1])
    return calibration.to_json()


def policy(folder: Path) -> Path:
    path = folder / "policy.json"
    riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1).policy().save(path)
    return path


def learned(folder: Path) -> Path:
    path = folder / "learned.json"
    learn_risk(riskcal.load_example("g2p-traces"), measure="softmax").save(path)
    return path


def sample(i: int) -> dict[str, Any]:
    return {
        "doc_id": i,
        "doc_hash": f"d{i}",
        "prompt_hash": f"p{i}",
        "filter": "none",
        "metrics": ["acc"],
        "acc": i % 2,
    }


def output(i: int) -> dict[str, Any]:
    choice = {"index": 0, "text": "yes", "token_ids": [7, 8], "finish_reason": "stop"}
    clock = {
        "first_scheduled_time": 1.0,
        "last_token_time": 2.5,
        "arrival_time": 0.5,
        "finished_time": 2.5,
    }
    return {
        "request_id": f"r{i}",
        "prompt": f"{i}?",
        "finished": True,
        "outputs": [choice],
        "metrics": clock,
    }


def question(i: int) -> dict[str, Any]:
    checks = [
        {
            "checkpoint_idx": k,
            "tokens_used": 100 * k + 1,
            "predicted_answer": str(k > i % 3),
            "confidence": 0.2 * k,
            "is_correct": k > 1,
        }
        for k in range(4)
    ]
    return {"question_id": f"q{i}", "checkpoints": checks}


def evaluation(i: int) -> dict[str, Any]:
    said = {
        "gen_ai.evaluation.name": "ok",
        "gen_ai.evaluation.score.value": 0.75,
        "gen_ai.response.id": f"r{i}",
    }
    return {"name": "gen_ai.evaluation.result", "attributes": said}


def exported(i: int) -> dict[str, Any]:
    said = [
        {"key": "gen_ai.evaluation.name", "value": {"stringValue": "ok"}},
        {"key": "gen_ai.evaluation.score.value", "value": {"doubleValue": 0.5}},
        {"key": "gen_ai.response.id", "value": {"stringValue": f"r{i}"}},
    ]
    record = {"eventName": "gen_ai.evaluation.result", "timeUnixNano": str(i), "attributes": said}
    return {"resourceLogs": [{"scopeLogs": [{"logRecords": [record]}]}]}


def losses(path: Path) -> None:
    with loss_log.opened(str(path)) as file:
        list(loss_log.entries(loss_log.first_line(file), file, "log", 1.0, None))


def both(path: Path, read: Callable[[dict[float, Path], Path], Any]) -> Any:
    """With the damaged file as one setting and a sound one as the full model."""
    return read({0.5: path}, path.with_name(f"full-{path.name}"))


def settings_of(name: str, row: Callable[[int], Any], folder: Path) -> Path:
    lines(f"full-{name}", [row(i) for i in range(8)], folder)
    return lines(name, [row(i) for i in range(8)], folder)


def harness(path: Path) -> Runs:
    own, full = path.parent / "0.5", path.parent / "full"
    for folder, source in ((own, path), (full, path.with_name(f"full-{path.name}"))):
        folder.mkdir(exist_ok=True)
        (folder / "samples_task.jsonl").write_bytes(source.read_bytes())
    return lm_eval.read({0.5: own}, full=full)


def vllm_of(settings: dict[float, Path], full: Path) -> Runs:
    return vllm.read(settings, full=full, distance=lambda a, b: float(a != b))


def reduced(path: Path) -> Path:
    with tempfile.TemporaryDirectory() as place:
        replay = partial(riskcal.replay_traces, thresholds=[0.95, 0.45], exact=True)
        return reduce(path, Path(place) / "out", replay)


READERS: dict[str, Reader] = {
    **{
        f"runs{end}": Reader(partial(table, runs, f"runs{end}"), Runs.read)
        for end in (".csv", ".jsonl", ".json", ".parquet")
    },
    **{
        f"traces{end}": Reader(partial(table, traces, f"traces{end}"), Traces.read)
        for end in (".csv", ".jsonl", ".parquet")
    },
    "packed runs": Reader(partial(lines, "runs.jsonl.gz", runs().to_dict("records")), Runs.read),
    "check": Reader(partial(table, runs, "runs.csv"), lambda path: findings(files.read(path))),
    "reduce": Reader(partial(table, traces, "traces.jsonl"), reduced),
    "lm_eval": Reader(partial(settings_of, "samples.jsonl", sample), harness),
    "vllm": Reader(partial(settings_of, "vllm.jsonl", output), partial(both, read=vllm_of)),
    "reasoning": Reader(
        partial(lines, "log.jsonl", [question(i) for i in range(6)]), reasoning.read
    ),
    "otel": Reader(partial(lines, "otel.jsonl", [evaluation(i) for i in range(6)]), otel.read),
    "otel batches": Reader(
        partial(lines, "otel.jsonl", [exported(i) for i in range(6)]), otel.read
    ),
    "policy": Reader(policy, ExitPolicy.load),
    "learned risk": Reader(learned, LearnedRisk.load),
    "monitor's state": Reader(
        partial(text, "m.json", monitored), lambda path: RiskMonitor.from_json(path.read_bytes())
    ),
    "adaptive state": Reader(
        partial(text, "a.json", adapted),
        lambda path: AdaptiveCalibration.from_json(path.read_bytes()),
    ),
    "watch's state": Reader(watch, watched),
    "events": Reader(events, read_events),
    "watched events": Reader(events, lambda path: EventWatch(RiskMonitor(0.2)).read(path)),
    "losses.csv": Reader(
        partial(text, "l.csv", lambda: "loss,rate\n0.5,1\n0.25,0.5\n0,1\n"), losses
    ),
    "losses.jsonl": Reader(
        partial(lines, "l.jsonl", [{"loss": 0.5}, {"loss": 0, "rate": 0.5}, 0.25]), losses
    ),
}


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in JSON."""
    yield way
    if isinstance(value, dict | list):
        for name, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*way, name))


def with_another_value(draw: st.DrawFn, given: bytes) -> bytes:
    """JSON or a line of it with a value changed, left out, doubled or beside an unknown one."""
    content = given.decode()
    whole = content.startswith("{\n") or content.count("\n") < 2
    rows = [content] if whole else content.splitlines()
    number = draw(st.integers(0, len(rows) - 1))
    value = json.loads(rows[number])
    *way, last = draw(st.sampled_from([w for w in places(value) if w] or [("",)]))
    parent = value
    for name in way:
        parent = parent[name]
    odd = draw(st.sampled_from(ODD_VALUES))
    match draw(st.sampled_from(["put", "put", "drop", "add", "copy"])):
        case "drop" if isinstance(parent, dict | list):
            parent.pop(last)
        case "add" if isinstance(parent, dict):
            parent["unknown"] = odd
        case "copy" if isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        case _ if isinstance(parent, dict | list):
            parent[last] = odd
        case _:
            value = odd
    rows[number] = json.dumps(value)
    return "\n".join(rows).encode() + b"\n"


def with_other_lines(draw: st.DrawFn, given: bytes) -> bytes:
    """Lines doubled, left out, in another order, or with another cell."""
    rows = given.split(b"\n")
    a, b = (draw(st.integers(0, len(rows) - 1)) for _ in range(2))
    match draw(st.sampled_from(["double", "drop", "swap", "cell", "cell"])):
        case "double":
            rows.insert(b, rows[a])
        case "drop":
            rows.pop(a)
        case "swap":
            rows[a], rows[b] = rows[b], rows[a]
        case "cell":
            cells = rows[a].split(b",")
            odd = json.dumps(draw(st.sampled_from(ODD_VALUES))).encode()
            cells[draw(st.integers(0, len(cells) - 1))] = draw(
                st.sampled_from([odd, b"", odd.strip(b'"')])
            )
            rows[a] = b",".join(cells)
    return b"\n".join(rows)


def with_other_bytes(draw: st.DrawFn, given: bytes) -> bytes:
    """Bytes flipped, put in, cut out or doubled."""
    for _ in range(draw(st.integers(1, 4))):
        a, b = sorted(draw(st.integers(0, max(len(given), 1))) for _ in range(2))
        match draw(st.sampled_from(["flip", "put", "cut", "end", "double"])):
            case "flip":
                given = given[:a] + bytes([draw(st.integers(0, 255))]) + given[a + 1 :]
            case "put":
                put = draw(st.one_of(st.sampled_from(ODD_BYTES), st.binary(max_size=8)))
                given = given[:a] + put + given[a:]
            case "cut":
                given = given[:a] + given[b:]
            case "end":
                given = given[:a]
            case "double":
                given = given[:b] + given[a:]
    return given


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, unpack: bool) -> bytes:
    """A file in which something is not as it was."""
    given = gzip.decompress(whole) if unpack else whole
    ways = [with_other_bytes]
    if not given.startswith(b"PAR1"):
        ways += [with_other_lines] * 2
    if given.lstrip()[:1] in (b"[", b"{"):
        ways += [with_another_value] * 4
    changed = draw(st.sampled_from(ways))(draw, given)
    if draw(st.integers(0, 3)) == 0 and changed:
        changed = with_other_bytes(draw, changed)
    if unpack:
        changed = (
            gzip.compress(changed) if draw(st.integers(0, 3)) else with_other_bytes(draw, whole)
        )
    return changed


@dataclass
class Tried:
    """What a reader did."""

    counts: Counter[str] = field(default_factory=Counter)
    foreign: dict[str, str] = field(default_factory=dict)


def tried(reader: Reader, folder: Path, number: int, cases: int, found: Tried) -> None:
    """A round of one reader."""
    path = reader.write(folder)
    whole = path.read_bytes()

    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(damaged(whole, path.suffix == ".gz"))
    def one(content: bytes) -> None:
        path.write_bytes(content)
        found.counts["cases"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(path)
        except RiskcalError:
            found.counts["refused"] += 1
        except Exception as error:
            found.counts["foreign"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            if len(found.foreign) < 20:
                found.foreign.setdefault(name[:300], repr(content)[:2000])
        else:
            found.counts["read"] += 1

    one()


def fuzzed(names: Sequence[str], seconds: float, cases: int) -> dict[str, Tried]:
    """All readers, a round after the other, until the time is over; a round of each at least."""
    found = {name: Tried() for name in names}
    until, number = time.monotonic() + seconds, 0
    while number == 0 or time.monotonic() < until:
        for name in names:
            if number and time.monotonic() > until:
                break
            with tempfile.TemporaryDirectory() as folder:
                tried(READERS[name], Path(folder), number, cases, found[name])
        number += 1
    return found


def main() -> None:
    """Fuzz, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("readers", nargs="*", choices=[[], *READERS], help="default: all")
    asked = parser.parse_args()
    found = fuzzed(asked.readers or list(READERS), 60.0 * asked.minutes, CASES)
    for name, one in found.items():
        print(f"{name}: {', '.join(f'{n} {what}' for what, n in sorted(one.counts.items()))}")
    total = sum((one.counts for one in found.values()), Counter())
    foreign = {name: one.foreign for name, one in found.items() if one.foreign}
    print(
        f"{total['cases']} damaged files, {total['read']} read, {total['foreign']} foreign exceptions"
    )
    for name, messages in foreign.items():
        for message in messages:
            print(f"{name}: {message}")
    if asked.json:
        figures = {
            "minutes": asked.minutes,
            "total": dict(total),
            "readers": {name: dict(one.counts) for name, one in found.items()},
            "foreign": foreign,
        }
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(1 if foreign else 0)


if __name__ == "__main__":
    main()
