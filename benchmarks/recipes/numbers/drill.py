"""The incident that a service must survive, on the shipped model of numbers in words.

A policy is certified on notes, which say numbers of four digits. Then traffic turns to structured documents, JSON whose field
holds amounts of seven digits in words and must match a schema. Of a hundred letters as many as ever are the full model's, but
one wrong letter makes a document invalid: agreement stays flat while schema failures rise. What must happen: a calibration on the
product's own validator refuses the threshold, the monitor of its losses alarms within the delay that was foretold, the kill
switch returns to full depth with the next token, and no request is missing in the log.

The model writes the field and the service the document around it. Nothing is simulated: prompts, outputs, exits and losses are
the engine's.
"""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from recipes.numbers import data
from riskcal import ExitPolicy, RiskMonitor, Runs
from riskcal.serving import (
    Drift,
    EventLog,
    EventWatch,
    KillSwitch,
    Pattern,
    Shadow,
    alarm_delays,
    read_events,
)
from riskcal.serving.events import rotated
from riskcal_adapters import record
from riskcal_adapters.torch import Done, EarlyExitT5, Engine, Request
from riskcal_adapters.validators import Failure, JsonSchema, NewFailure

#: Tokens of an output at most.
LIMIT = 96
NOTE, DOCUMENT = 4, 7  # digits


def _name() -> str:
    """A regular expression of the English names of 1 to 9,999,999."""
    units, teens = (
        "|".join(map(data.english, numbers)) for numbers in (range(1, 10), range(10, 20))
    )
    tens = "|".join(map(data.english, range(20, 100, 10)))
    below = f"(?:(?:{tens})(?:-(?:{units}))?|{teens}|{units})"
    group = f"(?:(?:{units}) hundred(?: {below})?|{below})"
    return f"(?:(?:{units}) million(?: {group} thousand)?(?: {group})?|{group} thousand(?: {group})?|{group})"


SCHEMA = JsonSchema(
    {
        "type": "object",
        "properties": {"words": {"type": "string", "pattern": f"^{_name()}$"}},
        "required": ["words"],
        "additionalProperties": False,
    }
)


def valid(output: str) -> bool:
    """Whether the document that the service makes of an output matches the schema."""
    return SCHEMA(json.dumps({"words": output}))


def apart(early: str, full: str) -> float:
    """The share of letters that are not the full model's: edits over the longer one's."""
    return float(Levenshtein.normalized_distance(early, full))


def prompts(digits: int, count: int, *, seed: int) -> list[str]:
    """English numbers that no training saw."""
    rng = np.random.default_rng([seed, digits])
    found: dict[str, None] = {}
    while len(found) < count:
        number = int(rng.integers(10 ** (digits - 1), 10**digits))
        if data.part_of(number) != "train":
            found[f"en:{number}"] = None
    return list(found)


def recorded(
    decoder: EarlyExitT5, texts: Sequence[str], thresholds: Sequence[float], folder: Path
) -> Runs:
    """Runs whose dissimilarity is `apart`, and whose risk is that the document is invalid."""
    record(
        texts,
        lambda: decoder,
        thresholds,
        folder,
        dissimilarity=apart,
        risk=Failure(valid),
        max_new_tokens=LIMIT,
        batch_size=64,
        engine=True,
        progress=False,
    )
    return Runs.read(folder)


@dataclass(frozen=True)
class Day:
    """What became of a day of traffic.

    Attributes
    ----------
    done : list of Done
        In the order in which requests were asked.
    shift : int
        The first request of the other traffic.
    watch : EventWatch
    before : RiskMonitor
        As it stood when traffic shifted.
    alarm : int or None
        The request whose loss raised the alarm.
    pulled : int or None
        Requests that had been asked when the switch was pulled.
    log : Path
    """

    done: list[Done]
    shift: int
    watch: EventWatch
    before: RiskMonitor
    alarm: int | None
    pulled: int | None
    log: Path


def serve(
    decoder: EarlyExitT5,
    policy: ExitPolicy,
    notes: Sequence[str],
    documents: Sequence[str],
    folder: Path,
    *,
    delta: float,
    run_length: float,
    rate: float,
    reference: Path | None = None,
    in_flight: int = 16,
    look: int = 10,
    salt: str = "",
) -> Day:
    """Serve notes, then documents; look at the log every few requests, and pull the switch by its file at the alarm."""
    folder.mkdir(parents=True, exist_ok=True)
    log, off = EventLog(folder / "events.jsonl", max_bytes=100_000), folder / "early-exit.off"
    drift = None if reference is None else Drift.from_log(reference)
    watch = EventWatch(RiskMonitor(delta, average_run_length=run_length), drift=drift)
    before, pulled = RiskMonitor.from_json(watch.monitor.to_json()), None
    done: list[Done] = []
    waiting: deque[Future[Done]] = deque()
    with (
        Engine(
            decoder,
            policy,
            slots=4
            * in_flight,  # the others are for shadows, which would wait for the end where there is always a next request
            max_prompt=16,
            max_new_tokens=LIMIT,
            kill_switch=KillSwitch(path=off),
            shadow=Shadow(rate, salt=salt),
            events=log,
            loss=NewFailure(valid),
            classes={"hyphen or space": Pattern("[- ]")},
        ) as engine
    ):
        for i, text in enumerate([*notes, *documents]):
            if i == len(notes):
                before = RiskMonitor.from_json(watch.read(log.path).monitor.to_json())
            if len(waiting) == in_flight:
                done.append(waiting.popleft().result())
            task = "note" if i < len(notes) else "document"
            waiting.append(engine.submit(Request(text, id=str(i), task=task)))
            looks = i % look == look - 1 and log.path.exists()
            if looks and watch.read(log.path).monitor.alarm and pulled is None:
                # the engine may look at any time: the reason is there from the first
                reason = off.with_suffix(".new")
                reason.write_text(f"{watch.verdict}\n", encoding="utf-8")
                reason.replace(off)
                pulled = i + 1
        done += [future.result() for future in waiting]
    watch.read(log.path)
    at = watch.monitor.alarm_at
    shadowed = [name for name, _ in shadows(log.path)]
    alarm = None if at is None else int(shadowed[at - 1])
    return Day(done, len(notes), watch, before, alarm, pulled, log.path)


def events(log: Path) -> list[dict[str, object]]:
    """All of a log, rotated files first."""
    return [event for file in [*rotated(log), log] for event in read_events(file).events]


def shadows(log: Path) -> list[tuple[str, float]]:
    """Requests that fed the monitor, and their losses, in its order."""
    found = []
    for event in events(log):
        told = event["attributes"]
        assert isinstance(told, dict)
        if event["name"] == "riskcal.shadow.evaluated" and "riskcal.full_depth" not in told:
            found.append((told["gen_ai.response.id"], told["riskcal.loss"]))
    return found


def foretold(day: Day, losses: Iterable[float], rate: float, *, draws: int = 1000) -> np.ndarray:
    """Requests from the shift to the alarm, simulated with recorded losses of the other traffic."""
    return alarm_delays(day.before, list(losses), rate=rate, draws=draws)


def compared(decoder: EarlyExitT5, done: Sequence[Done], texts: Sequence[str]) -> np.ndarray:
    """Of requests (2, n): the share of letters that are the full model's, and whether the schema newly fails."""
    full: list[str] = []
    for start in range(0, len(texts), 64):
        ids = decoder.encode(list(texts[start : start + 64]))
        full += decoder.decode(decoder.generate(*ids, max_new_tokens=LIMIT).tokens)
    pairs = [(str(one.text), text) for one, text in zip(done, full, strict=True)]
    fails = NewFailure(valid)
    return np.array([[1.0 - apart(*pair), fails(*pair)] for pair in pairs]).T
