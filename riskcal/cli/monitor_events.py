"""`riskcal monitor` over an event log: what its shadows lost, by task, and where tokens left."""

import json
from collections import Counter
from pathlib import Path

from riskcal._validate import RiskcalError
from riskcal.monitor import RiskMonitor
from riskcal.serving.watch import EventWatch


def is_event_log(log: str) -> bool:
    """Whether a file begins with an event, rather than with losses; a stream is one of losses."""
    try:
        with Path(log).open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and {"name", "attributes"} <= first.keys()


def watch_events(log: str, fresh: RiskMonitor, state: Path | None) -> EventWatch:
    """Read what is new in a log, leave the state, and print all that was seen."""
    watch = EventWatch.load(state) if state is not None and state.exists() else EventWatch(fresh)
    for name, value in fresh.parameters.items():
        if watch.monitor.parameters[name] != value:
            raise RiskcalError(
                f"{state}: {name} is {watch.monitor.parameters[name]} there but {value} here; use the same options, "
                "or another file."
            )
    watch.read(log)
    if state is not None:
        watch.save(state)
    print(f"{log}: {watch.verdict}")
    for task, (n, total) in sorted(watch.losses.items()):
        print(f"task {task or '(none)'}: mean loss {total / n:.4f} over {n} requests")
    for task, layers in sorted(watch.layers.items()):
        print(f"task {task or '(none)'}: tokens by exit layer {_listed(layers)}")
    odd = Counter({name: count for name, count in watch.counts.items() if count})
    if odd:
        print(f"odd: {_listed(odd)}")
    return watch


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
