"""`riskcal monitor` over an event log: what its shadows lost, by task, and where tokens left."""

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from riskcal._validate import RiskcalError
from riskcal.monitor import RiskMonitor
from riskcal.serving.reader import parsed
from riskcal.serving.watch import EventWatch


def is_event_log(log: str) -> bool:
    """Whether a file begins with an event, rather than with losses."""
    try:
        with Path(log).open("rb") as file:
            return is_event(file.readline())
    except OSError:
        return False


def is_event(line: str | bytes) -> bool:
    """Whether a line is an event, rather than a loss or a header."""
    event = parsed(line)
    return event is not None and "attributes" in event


def watch_events(
    log: str, fresh: RiskMonitor, state: Path | None, lines: Iterable[str] | None = None
) -> EventWatch:
    """Read what is new in a log, or ``lines`` until there is an alarm; leave the state, and print all that was seen."""
    watch = EventWatch.load(state) if state is not None and state.exists() else EventWatch(fresh)
    for name, value in fresh.parameters.items():
        if watch.monitor.parameters[name] != value:
            raise RiskcalError(
                f"{state}: {name} is {watch.monitor.parameters[name]} there but {value} here; use the same options, "
                "or another file."
            )
    if lines is None:
        watch.read(log)
    else:
        with suppress(KeyboardInterrupt):  # the usual end of a stream
            watch.follow(lines)
    if state is not None:
        watch.save(state)
    print(f"{log}: {watch.verdict}")
    for task, (n, total) in sorted(watch.losses.items()):
        low, high = watch.interval(task)
        known = f"{low:.4f} to {high:.4f} with 95% confidence at all times"
        print(
            f"task {task or '(none)'}: mean loss {total / n:.4f} over {n} requests ({known})"
            + _disagreement(watch, task)
        )
    for task, layers in sorted(watch.layers.items()):
        print(f"task {task or '(none)'}: tokens by exit layer {_listed(layers)}")
    print(f"events: {_listed(watch.events)}")
    odd = Counter({name: count for name, count in watch.counts.items() if count})
    if odd:
        print(f"odd: {_listed(odd)}")
    return watch


def _disagreement(watch: EventWatch, task: str) -> str:
    n, total = watch.disagreements.get(task, (0, 0.0))
    return f", token disagreement {total / n:.4f}" if n else ""


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))
