"""P-values of losses of two values, of which sorting leaves nothing but their count: those of the count, exact in any order."""

import math
from typing import Any

import numpy as np
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats
from riskcal.calibration.problem import TestedRisk
from riskcal.pvalues import inversions


def two_values(losses: Floats) -> tuple[float, float] | None:
    """The two values that losses (n,) take, up to rounding; None if they are fewer or more."""
    low, high = float(losses.min()), float(losses.max())
    near = _validate.TOLERANCE * max(1.0, abs(low), abs(high))
    between = (losses > low + near) & (losses < high - near)
    return None if high - low <= 2 * near or between.any() else (low, high)


def of_count(losses: Floats, delta: float) -> float:
    """The exact p-value of losses (n,) of two values, which is that of their count; 0, no claim, for others.

    Sorted losses of two values say nothing beyond the count, and with one arrangement for each count betting is at the mercy
    of a few of them (a true size of .02 to .21 at a nominal .05). Never below this p-value it is right for any arrangement.
    """
    values = two_values(losses)
    if values is None:
        return 0.0
    count = (losses > 0.5 * (values[0] + values[1])).sum()
    return float(count_pvalue(count, len(losses), values, delta))


def of_counts(risk: TestedRisk) -> Floats:
    """`of_count` of each candidate (k,); no claim where a proxy makes rows of equal losses differ."""
    p = np.array([of_count(column, risk.delta) for column in risk.losses.T])
    if risk.pairs is not None:
        rows = risk.losses + math.sqrt(2.0) * risk.width * risk.pairs.proxies
        p[[two_values(column) is None for column in rows.T]] = 0.0
    return p


def bounds_of_counts(losses: Floats, epsilon: float) -> Floats:
    """The upper confidence bound (k,) that inverts `of_count`; -inf, no claim, for losses of other than two values."""
    found = np.full(losses.shape[1], -math.inf)
    for j, column in enumerate(losses.T):
        values = two_values(column)
        if values is not None:
            low, high = values
            count = (column > 0.5 * (low + high)).sum(keepdims=True)
            share = inversions.clopper_pearson(count, len(column), epsilon)
            found[j] = low + (high - low) * float(share[0])
    return found


def count_pvalue(count: Any, n: int, values: tuple[float, float], delta: float) -> Any:
    """Of so many of n losses at the upper of two values, that their mean is above delta."""
    low, high = values
    return special.bdtr(count, n, min(max((delta - low) / (high - low), 0.0), 1.0))
