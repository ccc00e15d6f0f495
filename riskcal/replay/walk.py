"""What was measured at the exit, summed over each prompt's rows: a part of the rows at a time, whatever their number."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from riskcal._validate import Floats
from riskcal.records import Traces
from riskcal.records.exits import Lengths
from riskcal.replay.rule import Rule
from riskcal.replay.stages import Stages

#: Rows times candidates that are held at once.
_AT_ONCE = 2**20


#: The name of the exits' numbers among sums; a cost may be called ``layers``.
EXITS = " exits"


class Exited(NamedTuple):
    """Some rows, by the candidate: where they exit, and where in flat arrays that is."""

    rows: slice
    flat: slice  # of all numbers per exit, those of these rows
    place: NDArray[np.int64]  # (rows, k), in that part
    exits: NDArray[np.int64]  # (rows, k), from 1


class Summed(NamedTuple):
    """Sums over each prompt's rows (prompts, k), by name, and which candidates (k,) meet a confidence exactly."""

    sums: Mapping[str, Floats]
    met: NDArray[np.bool_]


def summed(
    traces: Traces,
    rule: Rule | Stages,
    start: NDArray[np.intp],
    measured: Mapping[str, NDArray[Any]],
) -> Summed:
    """Sums of what is measured, each (N, L), flat (M,), or (L,) for all rows, and of the exits' numbers as `EXITS`.

    ``start`` (n + 1,) bounds each prompt's rows.
    """
    n, met = len(start) - 1, np.zeros(rule.k, dtype=bool)
    sums = {name: np.zeros((n, rule.k)) for name in (*measured, EXITS)}
    shape, lengths = traces.confidence.shape, traces.counts
    for part in _parts(traces, rule, lengths):
        first = int(np.searchsorted(start, part.rows.start, side="right")) - 1
        beyond = int(np.searchsorted(start, part.rows.stop, side="left"))
        within = np.maximum(start[first:beyond] - part.rows.start, 0)
        for name, values in measured.items():
            taken = (
                _flat(values, part.rows, part.flat)[part.place]
                if values.shape == shape
                else values[part.exits - 1]
            )
            sums[name][first:beyond] += np.add.reduceat(taken.astype(np.float64), within)
        sums[EXITS][first:beyond] += np.add.reduceat(part.exits.astype(np.float64), within)
        confidence = _flat(traces.confidence, part.rows, part.flat)[part.place]
        position = traces.position[part.rows]
        met |= rule.met(confidence, part.exits, lengths[part.rows], position)
    return Summed(sums, met)


def _parts(traces: Traces, rule: Rule | Stages, lengths: Lengths) -> Iterator[Exited]:
    """The rows in parts."""
    ends = np.r_[0, np.cumsum(lengths)]
    step = max(1, _AT_ONCE // rule.k)
    for first in range(0, len(lengths), step):
        rows = slice(first, min(first + step, len(lengths)))
        flat = slice(int(ends[rows.start]), int(ends[rows.stop]))
        begin = ends[rows] - flat.start
        confidence = np.ascontiguousarray(_flat(traces.confidence, rows, flat))
        exits = rule.exits(confidence, begin, lengths[rows], traces.position[rows])
        yield Exited(rows, flat, begin[:, None] + exits - 1, exits)


def _flat(values: NDArray[Any], rows: slice, flat: slice) -> NDArray[Any]:
    """The numbers of some rows, one row's after another's."""
    return values[flat] if values.ndim == 1 else values[rows].reshape(-1)
