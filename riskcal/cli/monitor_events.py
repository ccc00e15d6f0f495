"""`riskcal monitor` over an event log: what its shadows lost, by task, and where tokens left."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from riskcal import _replacing
from riskcal._validate import RiskcalError
from riskcal.cli import loss_log
from riskcal.cli.standard_input import Arriving
from riskcal.monitor import RiskMonitor
from riskcal.policy.certificate import Certificate
from riskcal.serving.reader import parsed
from riskcal.serving.watch import EventWatch

#: Of a stream's time nine tenths are for its lines.
_BETWEEN_SAVES = 9
#: Lines that may all be damaged before it is no log of events.
_LOOKED_AT = 100


def is_event_log(log: str) -> bool:
    """Whether a file holds events, rather than losses, as far as its first lines say: some of them may be damaged."""
    try:
        with _replacing.a_path(log).open("rb") as file:
            return any(map(is_event, itertools.islice(file, _LOOKED_AT)))
    except OSError:
        return False


def begun(first: str, rest: Iterable[str]) -> tuple[str, bool]:
    """The first lines of a stream, and whether it holds events: no more of them are read than it takes to tell."""
    lines = [first]
    if not is_event(first) and not loss_log.may_begin(first):
        with suppress(KeyboardInterrupt):  # it was left, and what came says what it can
            for line in itertools.islice(rest, _LOOKED_AT - 1):
                lines.append(line)
                if is_event(line):
                    break
    return "".join(lines), is_event(lines[-1])


def is_event(line: str | bytes) -> bool:
    """Whether a line is an event, rather than a loss or a header."""
    event = parsed(line)
    return event is not None and "attributes" in event


def watch_events(
    log: str,
    fresh: EventWatch,
    state: Path | None,
    lines: Iterable[str | bytes] | None = None,
    arriving: Arriving | None = None,
) -> EventWatch:
    """Read what is new in a log, or ``lines`` until there is an alarm; leave the state, and print all that was seen.

    Of lines that are ``arriving`` the state is left, and what drifted told, before more are waited for.
    """
    watch = EventWatch.load(state) if state is not None and state.exists() else fresh
    refuse_other_options(state, watch.monitor, fresh.monitor)
    if (watch.drift is None) != (fresh.drift is None):
        had = "without" if watch.drift is None else "with"
        raise RiskcalError(f"{state}: was begun {had} --reference; go on so, or use another file.")
    begun, given = watch.drift, fresh.drift
    if begun is not None and given is not None and begun.reference != given.reference:
        raise RiskcalError(
            f"{state}: was begun with another --reference; give that one, or use another file."
        )
    if lines is None:
        watch.read(log)
    else:
        if arriving is not None:
            arriving.before_waiting = _Looks(log, state, watch)
        with suppress(KeyboardInterrupt):  # the usual end of a stream
            watch.follow(lines)
    if state is not None:
        watch.save(state)
    print(f"{log}: {watch.verdict}")
    if watch.drift is not None:
        print(f"drifted: {_said(watch.drift.verdict)}")
    for one in watch.estimates():
        low, high = one.interval
        known = f"{low:.4f} to {high:.4f} with 95% confidence at all times"
        what = "token disagreement" if one.kind == "class" else "mean loss"
        where = f", {one.kind} {_said(one.name)}" if one.name else ""
        print(
            f"task {_said(one.task)}{where}: {what} {one.mean:.4f} over {one.n} requests ({known})"
            + (_disagreement(watch, one.task) if one.kind == "task" else "")
        )
    for task, absent in sorted(watch.missing.items()):
        n, total = watch.losses.get(task, (0, 0.0))
        worst = (total + absent * watch.monitor.upper) / (n + absent)
        print(
            f"task {_said(task)}: {absent} requests ended without an output that could be compared; were each the worst, "
            f"mean loss {worst:.4f}"
        )
    for task, layers in sorted(watch.layers.items()):
        print(f"task {_said(task)}: tokens by exit layer {_listed(layers)}")
        for name, own in sorted(watch.strata.layers.get(task, {}).items()):
            print(f"task {_said(task)}, class {_said(name)}: tokens by exit layer {_listed(own)}")
    for task, (drafted, rejected) in sorted(watch.strata.drafts.items()):
        share = rejected / drafted if drafted else 0.0
        print(f"task {_said(task)}: {share:.4f} of {drafted} drafted tokens rejected")
    for name in ("weights", "temperatures"):
        if len(getattr(watch.strata, name)) > 1:
            print(f"{name} differ, by requests: {_listed(getattr(watch.strata, name))}")
    print(f"events: {_listed(watch.events)}")
    odd = Counter({name: count for name, count in watch.counts.items() if count})
    if odd:
        print(f"odd: {_listed(odd)}")
    return watch


def monitor_of(certificate: Certificate | None, delta: Any, **options: Any) -> RiskMonitor:
    """A monitor of what a certificate tolerates, or of ``delta`` in the place of that, within the certificate's bounds."""
    if delta is None and certificate is not None:
        delta = certificate.delta
    if delta is None or isinstance(delta, dict):
        raise RiskcalError(
            "delta: neither given nor certified for one risk; give --delta, or a --policy that is."
        )
    if certificate is not None:
        options |= {"lower": certificate.lower, "upper": certificate.upper}
    return RiskMonitor(delta, **options)


def refuse_other_options(state: Path | None, saved: RiskMonitor, fresh: RiskMonitor) -> None:
    """Refuse to go on with a monitor that was saved under other options."""
    for name, value in fresh.parameters.items():
        if saved.parameters[name] != value:
            raise RiskcalError(
                f"{state}: {name} is {saved.parameters[name]} there but {value} here; use the same options, or another file."
            )


class _Looks:
    """What is done with a stream while it goes on: to save takes at most a tenth of the time, however large the state is."""

    def __init__(self, log: str, state: Path | None, watch: EventWatch) -> None:
        self._log, self._state, self._watch = log, state, watch
        self._told = set(watch.drift.drifted) if watch.drift is not None else set()
        self._due = -math.inf

    def __call__(self) -> float | None:
        """Seconds until there is something left to do."""
        drift = self._watch.follow(()).drift
        for one in drift.drifted if drift is not None else ():
            if one not in self._told:
                self._told.add(one)
                # whoever reads it gets it now: it may be long until the stream ends
                print(f"{self._log}: drifted: {_said(str(one))}", flush=True)
        if self._state is None:
            return None
        began = time.monotonic()
        if began < self._due:
            return self._due - began
        self._watch.save(self._state)
        ended = time.monotonic()
        self._due = ended + _BETWEEN_SAVES * (ended - began)
        return None


def _disagreement(watch: EventWatch, task: str) -> str:
    n, total = watch.disagreements.get(task, (0, 0.0))
    return f", token disagreement {total / n:.4f}" if n else ""


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{_said(name)}: {count}" for name, count in sorted(counts.items()))


def _said(name: str) -> str:
    """A name that came with a request, on one line and in no other words than its own, whatever it holds."""
    return (name if name.isprintable() else repr(name)) or "(none)"
