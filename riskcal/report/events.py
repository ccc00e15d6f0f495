"""What an event log says: the losses of shadowed requests by task, the monitor's verdict, and where tokens left."""

from typing import Any

import numpy as np
import pandas as pd

from riskcal.report import exits
from riskcal.report.html import Html, joined, table, tag
from riskcal.report.sections import Section
from riskcal.serving.watch import EventWatch


def of_events(watch: EventWatch) -> list[Section]:
    """Sections of a log that a watch has read."""
    monitor = watch.monitor
    verdict = watch.verdict[0].upper() + watch.verdict[1:]
    said = (
        f"{verdict}, at delta {monitor.delta:g} and epsilon {monitor.epsilon:g}."
        if watch.monitor.n
        else f"{verdict}: the log has no loss of a shadowed request that was not served at full depth."
    )
    how = (
        "The alarm is raised with probability at most epsilon, ever, as long as the expected loss of a request, given those "
        "before it, is at most delta; no look is too many. Losses that are missing count as the worst."
    )
    parts: list[Any] = [
        tag("p", said, class_="verdict" if monitor.alarm or not monitor.n else "verdict certified"),
        tag("p", how),
    ]
    parts += [_losses(watch)] if watch.losses else []
    odd = [(name, count) for name, count in watch.counts.items() if count]
    if odd:
        frame = pd.DataFrame(odd, columns=["what", "how many"])
        parts.append(table(frame, "What was odd in the log"))
    sections = [Section("monitor", "Monitor", joined(parts))]
    counts = _layers(watch)
    if counts:
        note = "Share of the served tokens that left at each layer, by task."
        sections.append(exits.histograms(counts, note))
    return sections


def _losses(watch: EventWatch) -> Html:
    rows = []
    for task, (n, total) in sorted(watch.losses.items()):
        low, high = watch.interval(task)
        rows.append(
            {
                "task": task or "(none)",
                "shadowed requests": n,
                "mean loss": total / n,
                "at least (95%)": low,
                "at most (95%)": high,
            }
        )
    return table(
        pd.DataFrame(rows),
        "Losses of shadowed requests, by task",
    )


def _layers(watch: EventWatch) -> dict[str, Any]:
    """Tokens by layer for each task; names of layers that are no numbers are left out."""
    found = {}
    for task, counter in sorted(watch.layers.items()):
        known = {int(layer): n for layer, n in counter.items() if layer.isdecimal() and int(layer)}
        if known and max(known) <= 1000:
            counts = np.zeros(max(known))
            counts[[layer - 1 for layer in known]] = list(known.values())
            found[task or "(none)"] = counts
    return found
