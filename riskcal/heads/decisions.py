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
#: Of a head's level, what is left to those after it if it fails at its first threshold.
_AFTER_NONE = 0.1
#: A step of so many expected tokens is a lump (equal confidences), and of the level what lumps may take from those after.
_LUMP, _AFTER_LUMP = 10.0, 0.9


class _Sequence(NamedTuple):
    """Thresholds that a head is walked down, and what is left of the level for the heads after it, by how it ends."""

    grid: Floats  # descending from the start
    surplus: int  # errors that one step may be expected to bring, at most
    settled: float  # left before a failure
    failed: Floats  # at which threshold it failed, the first (none passed) or another; with `settled` at most 1 together


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
    Where it is walked on and fails, which equal confidences make likely, the tokens below were looked at; those cases share
    a part of the next heads' level, each its own, as the pilot thinks them likely.
    """
    tolerated, n = 1.0 - goal.agreement, recorded.n
    rows = recorded.prompt < recorded.n_pilot
    pilot, tested = recorded.confidence[rows].astype(np.float64), recorded.confidence[~rows]
    tested, wrong = tested.astype(np.float64), ~recorded.agrees[~rows]
    heads = [_known(*columns) for columns in zip(pilot.T, ~recorded.agrees[rows].T, strict=True)]
    turns: list[_Turn] = []
    settled = np.full(len(heads), math.inf)
    in_pilot, waiting = np.ones(len(pilot), dtype=bool), np.ones(n, dtype=bool)
    left, budget = list(range(len(heads))), 1.0
    while left and budget > 0.0:
        used = _heads_to_use(heads, left, in_pilot, spared, n, tolerated, goal.level * budget)
        if not used:
            break
        k, share = used[0], budget / len(used)
        left = left[left.index(k) + 1 :]
        found = _prospect(heads[k], in_pilot, n, tolerated, goal.level * share)
        if found is None:
            continue
        sequence = _sequence(pilot[in_pilot, k], found.start, n / len(pilot))
        last, failed = _walk(
            tested[waiting, k],
            wrong[waiting, k],
            sequence,
            tolerated,
            goal.level * share,
            leaves=len(used) > 1,
        )
        threshold, passed = sequence.grid[last], failed != 0
        own = np.where(np.arange(len(heads)) == k, threshold, settled)
        exits = waiting & (tested[:, k] >= threshold)
        pvalue = _pvalues(np.sum(exits & wrong[:, k]), np.sum(exits), tolerated)
        turns.append(_Turn(own, min(float(pvalue) / share, 1.0), passed))
        if passed:
            settled = own
            waiting &= ~exits
            in_pilot &= ~(pilot[:, k] >= threshold)
        budget = (budget - share) * (
            sequence.settled if failed is None else float(sequence.failed[failed])
        )
    return turns


def _sequence(confidence: Floats, start: float, scale: float) -> _Sequence:
    """From the start to the pilot's lowest confidence; each of its tokens at the head stands for ``scale`` tested ones."""
    known = confidence[~np.isnan(confidence)]
    below = known[known < start]
    expected = len(below) * scale
    steps = int(np.clip(_PER_TOKEN * expected, 1, _STEPS))
    shares = np.linspace(len(below) / len(known), 0.0, steps + 1)
    between = np.unique(np.quantile(known, shares))[::-1]
    grid = np.r_[start, between[between < start]]
    tokens = scale * np.bincount(np.searchsorted(-grid, -below), minlength=len(grid))
    # of distinct confidences the pilot has one in a step, which stands for several of the tested ones
    lumps = np.where(tokens > max(_LUMP, 2.5 * scale), tokens, 0.0)
    in_lumps = _AFTER_LUMP * float(lumps.sum()) / max(expected, 1.0)
    failed = (1.0 - _AFTER_NONE) * in_lumps * lumps / max(float(lumps.sum()), 1.0)
    failed[0] = _AFTER_NONE
    surplus = 1 + int(expected / steps)
    return _Sequence(grid, surplus, (1.0 - _AFTER_NONE) * (1.0 - in_lumps), failed)


def _walk(
    confidence: Floats,
    wrong: Bools,
    sequence: _Sequence,
    tolerated: float,
    level: float,
    *,
    leaves: bool,
) -> tuple[int, int | None]:
    """Where in the grid the walk ends, and where it failed: None if it did not, but was left or came to the end.

    The last head is not left before it fails (``leaves``), as nothing comes after it.
    """
    grid = sequence.grid
    place = np.searchsorted(-grid, -confidence)  # NaN comes after all
    exits = np.bincount(place, minlength=len(grid) + 1).cumsum()[:-1]
    errors = np.bincount(place[wrong], minlength=len(grid) + 1).cumsum()[:-1]
    fails = _pvalues(errors, exits, tolerated) > level
    first = int(fails.argmax()) if fails.any() else None
    passed = len(grid) if first is None else first
    if leaves:
        more = errors[:passed] + sequence.surplus
        near = _pvalues(more, exits[:passed], tolerated) > level
        if near.any():
            return int(near.argmax()), None
    return max(passed - 1, 0), first


def _pvalues(errors: Any, exits: Any, tolerated: float) -> Floats:
    """Of at most so many errors, if each of the exits were one with probability ``tolerated``."""
    result: Floats = np.where(
        errors < exits,
        special.bdtr(np.minimum(errors, exits), np.maximum(exits, 1), tolerated),
        1.0,
    )
    return result
