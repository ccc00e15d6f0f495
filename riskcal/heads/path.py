"""Which thresholds are tested: a path from cautious to bold, found on the pilot."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from riskcal._validate import Floats
from riskcal.heads.inputs import Bools, _Records
from riskcal.heads.loss import _loss

#: Thresholds per head that a path may use: this many quantiles of the pilot's confidences.
_LEVELS = 50


#: The steps of a path: how many standard errors the pilot's projection leaves each head, from cautious to bold.
_MARGINS = np.arange(4.0, -2.25, -0.25)


#: A surplus of agreement below this is none.
_ROUNDING = 1e-9


class _Goal(NamedTuple):
    agreement: float
    level: float
    max_tokens: int


class _Pilot(NamedTuple):
    """The pilot's tokens, prompt by prompt, and the thresholds that a path may use."""

    grids: list[Floats]  # K of them, descending
    # (K, N), the first threshold of the head's grid that the token reaches
    level: NDArray[np.uint8]
    agrees: Bools  # (K, N)
    start: NDArray[np.intp]  # (n_pilot + 1,), bounds of each prompt's tokens
    spared: Floats  # (K,), layers that an exit saves, as if the full model came as far behind the last head as heads are apart


class _Counts(NamedTuple):
    """Tokens of each calibration prompt that exit at each head, and how many of them do not agree: (n, K) each."""

    exits: NDArray[np.int64]
    errors: NDArray[np.int64]

    def losses(self, goal: _Goal) -> Floats:
        """Per prompt and head in [0, 1], with mean at most 1 - agreement exactly where the pooled agreement is reached."""
        return _loss(self.exits, self.errors, 1.0 - goal.agreement, goal.max_tokens)


def _lowest_feasible(confidence: NDArray[np.floating[Any]], agrees: Bools, target: float) -> float:
    known = ~np.isnan(confidence)
    if not known.any():
        return math.inf
    order = np.argsort(confidence[known], kind="stable")
    ascending = confidence[known][order].astype(np.float64)
    share = np.cumsum(agrees[known][order][::-1])[::-1] / np.arange(order.size, 0, -1)
    first_of_ties = np.r_[True, ascending[1:] != ascending[:-1]]
    feasible = np.flatnonzero(first_of_ties & (share >= target))
    return float(ascending[feasible[0]]) if feasible.size else math.inf


def _path(recorded: _Records, layers: NDArray[np.int64], goal: _Goal) -> Iterator[Floats]:
    """The threshold vectors that the pilot proposes, from cautious to bold; made as they are asked for.

    At each step every used head is projected to pass its test with the same margin, in standard errors of the projection,
    and among such thresholds those are taken that spare the pilot's tokens the most layers.
    """
    pilot = _pilot(recorded, layers)
    previous: Floats = np.full(len(layers), math.inf)
    used = np.zeros(len(layers), dtype=bool)
    for margin in _MARGINS.tolist():
        saving = partial(_saving, pilot, margin=margin, n=recorded.n, goal=goal)
        used = max(_climb(used, saving), _climb(np.ones_like(used), saving), key=saving)
        thresholds = _boldest(pilot, used, margin, recorded.n, goal)[1]
        if np.isfinite(thresholds).any() and not np.array_equal(thresholds, previous):
            yield thresholds
        previous = thresholds


def _pilot(recorded: _Records, layers: NDArray[np.int64]) -> _Pilot:
    rows = np.flatnonzero(recorded.prompt < recorded.n_pilot)
    rows = rows[np.argsort(recorded.prompt[rows], kind="stable")]
    grids: list[Floats] = []
    level = np.empty((len(layers), len(rows)), dtype=np.uint8)
    for k in range(len(layers)):
        column = recorded.confidence[rows, k].astype(np.float64)
        known = column[~np.isnan(column)]
        shares = np.arange(_LEVELS) / _LEVELS
        grids.append(
            np.unique(np.quantile(known, shares, method="lower"))[::-1]
            if known.size
            else np.empty(0)
        )
        level[k] = np.searchsorted(-grids[k], -column)  # NaN comes after all of them
    return _Pilot(
        grids=grids,
        level=level,
        agrees=np.ascontiguousarray(recorded.agrees[rows].T),
        start=np.searchsorted(recorded.prompt[rows], np.arange(recorded.n_pilot + 1)),
        spared=_spared(layers),
    )


def _spared(layers: NDArray[np.int64]) -> Floats:
    spacing = (layers[-1] - layers[0]) / (len(layers) - 1) if len(layers) > 1 else 1.0
    result: Floats = layers[-1] + spacing - layers
    return result


def _boldest(
    pilot: _Pilot, used: Bools, margin: float, n: int, goal: _Goal
) -> tuple[float, Floats]:
    """What the used heads save, each at the lowest threshold that is projected to pass on n prompts; and these thresholds."""
    from riskcal.heads import kernels
    from riskcal.pvalues import bettor_kernels

    chosen = np.full(used.size, -1)
    fixed = (
        goal.agreement,
        goal.max_tokens,
        n,
        -float(special.ndtri(goal.level)),
        -math.log(goal.level),
        bettor_kernels.CAP,
    )
    count = np.array([len(grid) for grid in pilot.grids])
    saving = kernels.head_levels(
        pilot.level, count, pilot.agrees, pilot.start, used, pilot.spared, *fixed, margin, chosen
    )
    thresholds = [
        grid[i] if i >= 0 else math.inf for grid, i in zip(pilot.grids, chosen, strict=True)
    ]
    return float(saving), np.array(thresholds)


def _saving(pilot: _Pilot, used: Bools, *, margin: float, n: int, goal: _Goal) -> float:
    return _boldest(pilot, used, margin, n, goal)[0]


def _climb(used: Bools, saving: Callable[[Bools], float]) -> Bools:
    """Local search over which heads to use: switch one on or off, or move one to its neighbour, while the saving grows."""
    one = np.eye(used.size, dtype=bool)
    best = saving(used)
    while True:
        moves = [used ^ head for head in one]
        moves += [
            used ^ one[k] ^ one[k + 1] for k in range(used.size - 1) if used[k] != used[k + 1]
        ]
        values = [saving(move) for move in moves]
        if max(values) <= best:
            return used
        best, used = max(values), moves[int(np.argmax(values))]


def _count(recorded: _Records, thresholds: Floats) -> _Counts:
    from riskcal.heads import kernels

    exits = np.zeros((len(recorded.ids), thresholds.size), dtype=np.int64)
    errors = np.zeros_like(exits)
    kernels.head_exits(
        recorded.confidence, recorded.agrees, recorded.prompt, thresholds, exits, errors
    )
    return _Counts(exits[recorded.n_pilot :], errors[recorded.n_pilot :])
