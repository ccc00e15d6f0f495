"""What a pilot promises of heads of one-token prompts: which are worth testing, from which threshold on."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from riskcal._validate import Floats
from riskcal.heads.inputs import Bools

#: Thresholds per head among which a start is looked for: so many quantiles of the pilot's confidences.
_LEVELS = 200
#: Where the log odds of an error may bend, in ranks about the middle, and how much that and the slope cost: with few tokens
#: a straight line is left.
_KNOTS, _BENT, _SLOPED = (-0.3, -0.1, 0.1, 0.3), 0.5, 0.05
#: Of the variance of a pilot's raw count of errors, what the fit leaves.
_LEFT_BY_FIT = 0.6


class _Known(NamedTuple):
    """The pilot's tokens at a head: a grid of descending thresholds, and the first that each token reaches (else its length)."""

    grid: Floats
    level: NDArray[np.intp]
    wrong: Bools


class _Prospect(NamedTuple):
    """Of one head on the tokens that wait for it."""

    start: float  # the threshold at which it is likeliest to pass
    mass: float  # tokens per prompt that it can be expected to take
    middle: float  # where it passes in half of all draws, or the start


def _known(confidence: Floats, wrong: Bools) -> _Known:
    given = confidence[~np.isnan(confidence)]
    if not given.size:
        return _Known(np.empty(0), np.zeros(len(confidence), dtype=np.intp), wrong)
    shares = np.arange(_LEVELS) / _LEVELS
    grid = np.unique(np.quantile(given, shares, method="lower"))[::-1]
    return _Known(grid, np.searchsorted(-grid, -confidence), wrong)  # NaN comes after all of them


def _prospect(
    known: _Known, waiting: Bools, n: int, tolerated: float, level: float
) -> _Prospect | None:
    """None where no threshold has a chance to pass at this level on n prompts."""
    size, n_pilot = len(known.grid), len(waiting)
    here = known.level[waiting]
    exits = np.bincount(here, minlength=size + 1)[:size].astype(np.float64)
    errors = np.bincount(here[known.wrong[waiting]], minlength=size + 1)[:size].astype(np.float64)
    if exits.sum() < 2:
        return None
    total, more = exits.cumsum(), n / n_pilot
    with np.errstate(invalid="ignore"):
        fitted: Floats = exits * _error_rate(exits, errors)
        share = np.clip(fitted.cumsum() / total, 1e-6, 1 - 1e-6)
        expected = more * total
        noise = np.sqrt(expected * share * (1.0 - share) * (1.0 + _LEFT_BY_FIT * more))
        needed = -special.ndtri(level) * np.sqrt(expected * tolerated * (1.0 - tolerated))
        passes = special.ndtr((expected * (tolerated - share) - needed) / noise)
    # so few exits that not even faultless ones would do
    passes[~(expected * math.log1p(-tolerated) < math.log(level))] = 0.0
    first = int(passes.argmax())
    if passes[first] <= 0.0:
        return None
    reached = np.minimum.accumulate(passes[first:])
    mass = total[first:] / n_pilot
    taken = mass[0] * reached[0] + float(np.diff(mass) @ reached[1:])
    middle = first + int(np.flatnonzero(reached >= min(0.5, reached[0]))[-1])
    return _Prospect(float(known.grid[first]), taken, float(known.grid[middle]))


def _error_rate(exits: Floats, errors: Floats) -> Floats:
    """Per level of confidence, by a penalised logistic regression on the rank: smoother than few errors are."""
    rank = (exits.cumsum() - 0.5 * exits) / exits.sum() - 0.5
    rank = -rank  # levels descend
    bends = [np.maximum(rank - knot, 0.0) for knot in _KNOTS]
    features = np.stack([np.ones_like(rank), rank, *bends], axis=1)
    penalty = np.array([1e-3, _SLOPED] + [_BENT] * len(bends))
    weights = np.zeros(len(penalty))
    weights[0] = special.logit((errors.sum() + 0.5) / (exits.sum() + 1.0))
    for _ in range(15):
        rate = special.expit(features @ weights)
        curved = exits * rate * (1.0 - rate) + 1e-9
        gradient = features.T @ (errors - exits * rate) - penalty * weights
        step = np.linalg.solve(
            (features * curved[:, None]).T @ features + np.diag(penalty), gradient
        )
        weights += np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-4:
            break
    result: Floats = special.expit(features @ weights)
    return result


def _heads_to_use(
    heads: list[_Known],
    among: list[int],
    waiting: Bools,
    spared: Floats,
    n: int,
    tolerated: float,
    level: float,
) -> list[int]:
    """Those that together can be expected to spare the most layers, the level shared evenly: dropped one by one from all."""

    def saving(used: list[int]) -> float:
        left, total = waiting, 0.0
        for k in used:
            found = _prospect(heads[k], left, n, tolerated, level / len(used))
            if found is not None:
                total += spared[k] * found.mass
                left = left & (heads[k].level > np.searchsorted(-heads[k].grid, -found.middle))
        return total

    used = among
    best = saving(used) if used else 0.0
    while len(used) > 1:
        fewer = [[k for k in used if k != dropped] for dropped in used]
        values = [saving(some) for some in fewer]
        if max(values) <= best and best > 0.0:
            break
        best, used = max(values), fewer[int(np.argmax(values))]
    return used if best > 0.0 else []
