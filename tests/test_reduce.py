"""Sharded logs of tokens become runs file by file, the same as if all had been read at once."""

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import riskcal
from riskcal import RiskcalError, Runs, Traces, calibrate, replay_traces
from riskcal.records import reduce, reducing

GRID = (0.85, 0.45, 0.05)
REPLAY = partial(replay_traces, thresholds=GRID, exact=True)


def tokens(prompts: Any, seed: int = 0, **more: Any) -> pd.DataFrame:
    """Three to six tokens of each prompt, at three exits, in any order."""
    rng = np.random.default_rng(seed)
    rows = [(p, t) for p in prompts for t in range(rng.integers(3, 7))]
    frame = pd.DataFrame(rows, columns=["prompt", "position"])
    frame["confidence"] = list(rng.random((len(rows), 3)))
    agrees = rng.random((len(rows), 3)) < 0.9
    agrees[:, -1] = True
    frame["agrees"] = list(agrees)
    return frame.assign(**more).sample(frac=1, random_state=seed)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two files, one of them below a folder whose name says the tokens' class."""
    folder = tmp_path / "tokens"
    (folder / "group=b").mkdir(parents=True)
    tokens([f"p{i}" for i in range(20)], group="a").to_parquet(folder / "0.parquet")
    rest = tokens([f"p{i}" for i in range(20, 33)], seed=1)
    rest.to_json(folder / "group=b" / "1.jsonl", orient="records", lines=True)
    return folder


class Sending:
    """What a pool of processes asks for: that work, items and results can be sent."""

    def map(self, function: Any, items: Any) -> list[Any]:
        sent = [pickle.loads(pickle.dumps((function, item))) for item in items]
        return [pickle.loads(pickle.dumps(work(item))) for work, item in sent]


def test_the_runs_are_those_of_all_tokens_at_once_with_any_pool(log: Path, tmp_path: Path) -> None:
    whole = REPLAY(Traces.read(log))
    with ThreadPoolExecutor(2) as threads:
        for name, pool in (("none", None), ("threads", threads), ("processes", Sending())):
            out = reduce(log, tmp_path / "new" / name, REPLAY, pool=pool)
            assert Runs.read(out).digest() == whole.digest()
            assert len(list(out.iterdir())) == 2
    assert calibrate(Runs.read(out), delta=0.5).certified


def test_a_log_has_names_of_its_own(log: Path, tmp_path: Path) -> None:
    frame = tokens(range(9)).rename(columns={"prompt": "request"})
    frame["entropy"] = [1 - row for row in frame.pop("confidence")]
    frame.to_parquet(tmp_path / "log.parquet")
    names = {"prompt": "request", "confidence": ("entropy", "1 - x")}
    out = reduce(tmp_path / "log.parquet", tmp_path / "runs", REPLAY, columns=names)
    right = REPLAY(Traces.read(tmp_path / "log.parquet", columns=names))
    assert Runs.read(out).digest() == right.digest()


def test_a_prompt_in_two_files_is_refused_by_name(log: Path, tmp_path: Path) -> None:
    tokens(["q1", "p7", "p3"]).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError) as refused:
        reduce(log, tmp_path / "runs", REPLAY)
    for part in ("prompt: 'p3'", "0.parquet", "2.parquet", "2 prompts", "into one file"):
        assert part in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]  # nothing half done


def test_what_is_wrong_in_a_file_is_said_with_its_name(log: Path, tmp_path: Path) -> None:
    tokens(["q1", "q2"]).assign(position=0).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError, match=r"2\.parquet: position: 0 of prompt 'q1' stands twice"):
        reduce(log, tmp_path / "runs", REPLAY)
    tokens(["q1"]).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError, match=r"2\.parquet: traces: only 1 prompt"):
        reduce(log, tmp_path / "runs", REPLAY)
    with pytest.raises(RiskcalError, match="replay: gives a int"):
        reduce(log / "0.parquet", tmp_path / "runs", lambda traces: 7)  # type: ignore[arg-type, return-value]
    with pytest.raises(RiskcalError, match=r"out: .* exists already"):
        reduce(log, log, REPLAY)
    other = tokens(["q1", "q2"])
    other.assign(cost=[[1, 2, 3]] * len(other)).to_parquet(log / "2.parquet")
    with pytest.raises(RiskcalError, match=r"cost: the runs of .*2\.parquet have it, those of .*0"):
        reduce(log, tmp_path / "runs", REPLAY)
    for name in ("cluster", "text"):  # together they would be a table with gaps
        other.assign(**{name: other["prompt"]}).to_parquet(log / "2.parquet")
        told = rf"{name}: the runs of .*2\.parquet have it, those of .*0"
        with pytest.raises(RiskcalError, match=told):
            reduce(log, tmp_path / "runs", REPLAY)


def test_distances_stand_in_the_runs_where_every_file_has_them(tmp_path: Path) -> None:
    """Losses of the full model that are 0 in one file and not in the other: risks alone are left."""
    parts = []
    for place, last in enumerate((0.0, 0.25)):
        part = tokens([f"{place}{i}" for i in range(4)], seed=place).drop(columns="agrees")
        parts.append(part.assign(loss=[[1.0, 0.5, last]] * len(part)))
        parts[-1].to_parquet(tmp_path / f"{place}.parquet")
    out = reduce(f"{tmp_path}/*.parquet", tmp_path / "runs", REPLAY)
    whole = REPLAY(Traces.from_frame(pd.concat(parts, ignore_index=True)))
    assert Runs.read(out).digest() == whole.digest()


# Going on after a call that was cut off

RESUMED = """
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
import test_reduce
from riskcal.records import reduce
log, out, times, threads = sys.argv[1:]
with ThreadPoolExecutor(int(threads)) as pool:
    replay = partial(test_reduce.slow_replay, log=times)
    reduce(log, out, replay, pool=None if threads == "1" else pool)
"""


def slow_replay(traces: Traces, log: str) -> Runs:
    """A replay that takes its time, and leaves a line for each file that was reduced."""
    with Path(log).open("a") as file:
        file.write(f"{traces.prompt[0]}\n")
    time.sleep(0.2)
    return REPLAY(traces)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve files of tokens."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    for number in range(12):
        some = [f"p{number}-{i}" for i in range(4)]
        tokens(some, seed=number).to_parquet(folder / f"{number:02}.parquet")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def reduced(log: Path) -> int:
    """How many files have been reduced so far."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_killed_and_called_again_it_goes_on_and_ends_in_the_same_files(
    shards: Path, tmp_path: Path
) -> None:
    times, out = tmp_path / "times", tmp_path / "runs"
    command = [sys.executable, "-c", RESUMED, str(shards), str(out), str(times)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    for wanted in (3, 7):
        process = subprocess.Popen([*command, "1"], env=environment)
        while reduced(times) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    [waiting] = (tmp_path / ".runs.unfinished").iterdir()
    assert len(list((waiting / "made").iterdir())) >= 5
    (waiting / "runs" / ".07.parquet.0123.partial").write_bytes(b"half a file")
    subprocess.run([*command, "3"], env=environment, check=True)
    assert 12 <= reduced(times) <= 14  # two were lost at most, one to each kill
    assert contents(out) == contents(reduce(shards, tmp_path / "whole", REPLAY))
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", "runs", "whole", "times"}


class Cut(Exception):
    """Ends a reduction."""


def cut_off(shards: Path, out: Path, replay: Any, after: int) -> None:
    """A reduction that ends after so many files."""

    class Ending:
        def map(self, function: Any, items: Any) -> Any:
            for item in items[:after]:
                function(item)
            raise Cut

    with pytest.raises(Cut):
        reduce(shards, out, replay, pool=Ending())


def test_files_that_changed_or_were_damaged_are_reduced_anew(shards: Path, tmp_path: Path) -> None:
    times, out = tmp_path / "times", tmp_path / "runs"
    replay = partial(slow_replay, log=str(times))
    cut_off(shards, out, replay, 8)
    tokens([f"other-{i}" for i in range(4)], seed=99).to_parquet(shards / "02.parquet")
    [waiting] = (tmp_path / ".runs.unfinished").glob("*/runs")
    content = bytearray((waiting / "05.parquet").read_bytes())
    content[60] ^= 1
    (waiting / "05.parquet").write_bytes(content)
    (waiting / "06.parquet").unlink()
    (shards / "11.parquet").unlink()  # and one file fewer
    reduce(shards, out, replay)
    assert reduced(times) == 8 + 3 + 3
    assert contents(out) == contents(reduce(shards, tmp_path / "whole", REPLAY))


def test_what_was_made_otherwise_is_made_anew(shards: Path, tmp_path: Path) -> None:
    times, out = tmp_path / "times", tmp_path / "runs"
    cut_off(shards, out, partial(slow_replay, log=str(times)), 8)
    other = partial(replay_traces, thresholds=(0.7, 0.3), exact=True)
    reduce(shards, out, other)
    assert contents(out) == contents(reduce(shards, tmp_path / "whole", other))

    unknown = object()  # nothing tells whether it is another

    def bound_to_it(traces: Traces) -> Runs:
        assert unknown
        return slow_replay(traces, log=str(times))

    cut_off(shards, tmp_path / "unknown", bound_to_it, 8)
    before = reduced(times)
    reduce(shards, tmp_path / "unknown", bound_to_it)
    assert reduced(times) - before == 12


def test_a_file_is_mended_and_the_others_are_not_reduced_again(
    shards: Path, tmp_path: Path
) -> None:
    times, out = tmp_path / "times", tmp_path / "runs"
    replay = partial(slow_replay, log=str(times))
    right = (shards / "09.parquet").read_bytes()
    (shards / "09.parquet").write_bytes(right[:-50])
    with pytest.raises(RiskcalError, match=r"09\.parquet: not a readable parquet file"):
        reduce(shards, out, replay)
    assert not out.exists()
    (shards / "09.parquet").write_bytes(right)
    reduce(shards, out, replay)
    assert reduced(times) == 12
    assert contents(out) == contents(reduce(shards, tmp_path / "whole", replay))


def test_distances_left_out_for_one_file_come_back_where_it_changes(tmp_path: Path) -> None:
    """A call that was cut off while it made files alike: those that it had changed are made anew."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    parts = {}
    for place, last in enumerate((0.0, 0.25)):
        part = tokens([f"{place}{i}" for i in range(4)], seed=place).drop(columns="agrees")
        parts[place] = part.assign(loss=[[1.0, 0.5, last]] * len(part))
        parts[place].to_parquet(folder / f"{place}.parquet")
    write, calls = reducing._parquet.write, []

    def cut(table: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:  # after the runs of both files
            write(table, path)
            raise Cut
        write(table, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reducing._parquet, "write", cut)
        with pytest.raises(Cut):
            reduce(folder, tmp_path / "runs", REPLAY)
    parts[1].assign(loss=[[1.0, 0.5, 0.0]] * len(parts[1])).to_parquet(folder / "1.parquet")
    reduce(folder, tmp_path / "runs", REPLAY)
    whole = reduce(folder, tmp_path / "whole", REPLAY)
    assert contents(tmp_path / "runs") == contents(whole)
    assert "dissimilarity" in Runs.read(whole).values


# The same by other means


@pytest.mark.parametrize("library", ["duckdb", "polars"])
def test_recipes_of_the_documentation_give_the_same_runs(
    library: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "records.md").read_text(encoding="utf-8")
    found = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.S)
        if f"import {library}" in block
    ]
    assert len(found) == 1
    other = tokens([f"odd-{i}" for i in range(4)], seed=77)
    other["confidence"] = [np.where(row < 0.3, np.nan, row) for row in other["confidence"]]
    other.to_parquet(shards / "odd.parquet")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"riskcal": riskcal}
    exec(found[0], names)
    replay = partial(replay_traces, thresholds=(0.9, 0.8, 0.7), exact=True)
    right, runs = Runs.read(reduce(shards, tmp_path / "runs", replay)), names["runs"]
    assert runs.prompts.tolist() == right.prompts.tolist()
    assert runs.thresholds.tolist() == right.thresholds.tolist()
    assert 0 < right.values["dissimilarity"].mean() < 0.5
    for name in ("dissimilarity", "layers", "tokens"):
        np.testing.assert_allclose(runs.values[name], right.values[name], rtol=0, atol=1e-12)
        np.testing.assert_allclose(runs.full[name], right.full[name], rtol=0, atol=1e-12)
    assert (runs.source, runs.exact) == (right.source, right.exact)


def lossless(traces: Traces, worst: bool) -> Runs:
    runs = REPLAY(traces)
    values = runs.values | {
        "dissimilarity": np.full_like(runs.values["dissimilarity"], float(worst))
    }
    return dataclasses.replace(runs, values=values)


WORST = False


def by_a_global(traces: Traces) -> Runs:
    return lossless(traces, WORST)


def mean(runs: Path) -> float:
    return float(Runs.read(runs).values["dissimilarity"].mean())


def test_what_a_function_does_and_reads_is_known(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fmt: off
    two = [(lambda t: lossless(t, False)), (lambda t: lossless(t, True))]
    # fmt: on
    cut_off(shards, tmp_path / "lambdas", two[0], 8)
    assert mean(reduce(shards, tmp_path / "lambdas", two[1])) == 1.0

    cut_off(shards, tmp_path / "globals", by_a_global, 8)
    monkeypatch.setattr(sys.modules[__name__], "WORST", True)
    assert mean(reduce(shards, tmp_path / "globals", by_a_global)) == 1.0


def test_calls_that_overlap_never_have_each_others_files(shards: Path, tmp_path: Path) -> None:
    """The lenient one goes on with files of its own while the other is under way."""
    out = tmp_path / "runs"

    class Overlapping:
        def map(self, function: Any, items: Any) -> Any:
            cut_off(shards, out, partial(lossless, worst=False), 5)
            return [function(item) for item in items]

    assert mean(reduce(shards, out, partial(lossless, worst=True), pool=Overlapping())) == 1.0
    assert not list(tmp_path.glob(".runs*"))
