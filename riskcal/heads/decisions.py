"""Heads of prompts of one token (classifiers, cascades of models), certified one after the other."""

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from riskcal._validate import Floats
from riskcal.heads.inputs import Bools, _Records
from riskcal.heads.path import _Goal
from riskcal.heads.prospects import _heads_to_use, _known, _prospect

#: Thresholds per expected token in a head's sequence, and in all: so many that hardly ever two errors come at one step.
_PER_TOKEN, _STEPS = 4, 200_000
#: Of a head's level, what is left to those after it if it fails at its first threshold, and the rest if it does not.
_AFTER_NONE = 0.1


class _Turn(NamedTuple):
    """A head's turn: the thresholds with its own (its last that passed, or the first that did not), and that one's p-value."""

    thresholds: Floats  # (K,), inf for those after it and those that were not certified
    pvalue: float  # over the head's share of epsilon: at most epsilon where it passed
    certified: bool


def _in_turn(recorded: _Records, spared: Floats, goal: _Goal) -> list[_Turn]:
    """The heads' turns; the last that is certified has the thresholds to deploy.

    A head is walked down a fine sequence of thresholds that the pilot fixed. It is left where one error more would fail, so
    that its threshold is settled without a look at any token below: these are as fresh to the next head as if they alone had
    been drawn, from the law of those that wait for it. Therefore its tests need not allow for where the first one ended.
    """
    tolerated, n = 1.0 - goal.agreement, recorded.n
    rows = recorded.prompt < recorded.n_pilot
    pilot, tested = recorded.confidence[rows].astype(np.float64), recorded.confidence[~rows]
    tested, wrong = tested.astype(np.float64), ~recorded.agrees[~rows]
    heads = [_known(*columns) for columns in zip(pilot.T, ~recorded.agrees[rows].T, strict=True)]
    used = _heads_to_use(heads, spared, n, tolerated, goal.level)
    turns: list[_Turn] = []
    settled = np.full(len(heads), math.inf)
    in_pilot, waiting = np.ones(len(pilot), dtype=bool), np.ones(n, dtype=bool)
    share = 1.0 / max(len(used), 1)
    for k in used:
        found = _prospect(heads[k], in_pilot, n, tolerated, goal.level * share)
        if found is None:
            break
        grid, surplus = _sequence(pilot[in_pilot, k], found.start, n / len(pilot))
        last, passed, overshot = _walk(
            tested[waiting, k],
            wrong[waiting, k],
            grid,
            tolerated,
            goal.level * share,
            surplus if k != used[-1] else None,
        )
        own = np.where(np.arange(len(heads)) == k, grid[last], settled)
        exits = waiting & (tested[:, k] >= grid[last])
        pvalue = _pvalues(np.sum(exits & wrong[:, k]), np.sum(exits), tolerated)
        turns.append(_Turn(own, min(float(pvalue) / share, 1.0), passed))
        if overshot:
            break
        if passed:
            settled = own
            waiting &= ~exits
            in_pilot &= ~(pilot[:, k] >= grid[last])
        share *= 1.0 - _AFTER_NONE if passed else _AFTER_NONE
    return turns


def _sequence(confidence: Floats, start: float, scale: float) -> tuple[Floats, int]:
    """Descending thresholds from the start to the pilot's lowest confidence, and how many errors one step may bring."""
    known = confidence[~np.isnan(confidence)]
    below = float(np.mean(known < start))
    expected = below * len(known) * scale
    steps = int(np.clip(_PER_TOKEN * expected, 1, _STEPS))
    between = np.unique(np.quantile(known, np.linspace(below, 0.0, steps + 1)))[::-1]
    return np.r_[start, between[between < start]], 1 + int(expected / steps)


def _walk(
    confidence: Floats,
    wrong: Bools,
    grid: Floats,
    tolerated: float,
    level: float,
    surplus: int | None,
) -> tuple[int, bool, bool]:
    """Where in the grid the walk ends, whether the head passed there, and whether a step below was looked at and failed.

    With a ``surplus`` the walk is left where so many errors more would fail.
    """
    place = np.searchsorted(-grid, -confidence)  # NaN comes after all
    exits = np.bincount(place, minlength=len(grid) + 1).cumsum()[:-1]
    errors = np.bincount(place[wrong], minlength=len(grid) + 1).cumsum()[:-1]
    fails = _pvalues(errors, exits, tolerated) > level
    first = int(fails.argmax()) if fails.any() else len(grid)
    if surplus is not None:
        near = _pvalues(errors[:first] + surplus, exits[:first], tolerated) > level
        if near.any():
            return int(near.argmax()), True, False
    return max(first - 1, 0), first > 0, 0 < first < len(grid) and surplus is not None


def _pvalues(errors: Any, exits: Any, tolerated: float) -> Floats:
    """Of at most so many errors, if each of the exits were one with probability ``tolerated``."""
    result: Floats = np.where(
        errors < exits,
        special.bdtr(np.minimum(errors, exits), np.maximum(exits, 1), tolerated),
        1.0,
    )
    return result
