"""Which delta a test of a sum just rejects, in closed form or by search: what `riskcal.bounds` makes upper bounds of.

On the unit interval: sums (k,) of n losses give the bounds (k,), at a level.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.pvalues.losses import TINY
from riskcal.pvalues.sums import binomial_cdf, rounded_up


def hoeffding(total: Floats, n: int, level: float) -> Floats:
    """The mean and a width that depends on n alone."""
    return np.minimum(total / n + math.sqrt(-math.log(level) / (2.0 * n)), 1.0)


def clopper_pearson(count: Floats, n: int, level: float) -> Floats:
    """The exact bound of a count of ones."""
    inside = np.minimum(count, n - 1)
    return np.where(count >= n, 1.0, special.betaincinv(inside + 1.0, n - inside, 1.0 - level))


def bentkus(total: Floats, n: int, level: float) -> Floats:
    """That of the sum rounded up, at a level smaller by e."""
    return clopper_pearson(rounded_up(total), n, level / math.e)


def hoeffding_bentkus(total: Floats, n: int, level: float) -> Floats:
    """The lower of Bentkus' bound and the relative-entropy Hoeffding bound, by bisection."""
    mean, needed = total / n, -math.log(level) / n
    low, high = mean.copy(), np.ones_like(mean)
    for _ in range(60):  # entropy rises from 0 at the mean
        middle = 0.5 * (low + high)
        entropy = special.rel_entr(mean, middle) + special.rel_entr(1.0 - mean, 1.0 - middle)
        low, high = (
            np.where(entropy < needed, middle, low),
            np.where(entropy < needed, high, middle),
        )
    return np.minimum(high, bentkus(total, n, level))


def convex_order(total: Floats, n: int, level: float) -> Floats:
    """Newton's method from above on the log p-value, which is concave and decreasing in delta, so that it stays above.

    With ``t`` the best integer at delta and G(t) = E max(0, t - B), log p = log G(t) - log(t - total), and the derivative
    of G(t) in delta is ``-n P(Bin(n - 1, delta) <= t - 1)``.
    """
    bound = np.minimum(bentkus(total, n, level), 1.0 - level * (n - total) / n)
    open_ = total < n
    for _ in range(60):
        s, delta = total[open_], bound[open_]
        if not s.size:
            break
        t = _best_integer(s, n, delta)
        area = _shortfall(t, n, delta)
        step = (
            area
            * (np.log(area / (t - s)) - math.log(level))
            / (n * binomial_cdf(t - 1.0, n - 1, delta))
        )
        bound[open_] = np.clip(delta + step, s / n, delta)
        open_[open_] = -step > 1e-14
    return bound


def _best_integer(total: Floats, n: int, delta: Floats) -> Floats:
    """The integer t > total that minimises E max(0, t - B) / (t - total), by bisection: the bound falls, then rises."""
    low, high = np.floor(total) + 1.0, np.full(total.size, float(n))
    while (low < high).any():
        middle = np.floor(0.5 * (low + high))
        # the bound rises from t to t + 1 where (t - total) P(B <= t) >= E max(0, t - B)
        rises = (middle - total) * binomial_cdf(middle, n, delta) >= _shortfall(middle, n, delta)
        low, high = np.where(rises, low, middle + 1.0), np.where(rises, middle, high)
    return low


def _shortfall(t: Floats, n: int, delta: Floats) -> Floats:
    """E max(0, t - B) for B ~ Bin(n, delta)."""
    return np.maximum(
        t * binomial_cdf(t - 1.0, n, delta) - n * delta * binomial_cdf(t - 2.0, n - 1, delta),
        TINY,
    )


def default_grid(n: int, lower: float, upper: float) -> NDArray[np.float64]:
    """Points whose spacing shrinks with the standard deviation that a mean there allows, or towards zero if it is inside."""
    m = math.ceil(64.0 * math.sqrt(n))
    if lower < 0.0 < upper:
        half = np.arange(1, m // 2) / (m // 2)
        return np.concatenate([lower * half**2, upper * half**2])
    return lower + (upper - lower) * np.sin(0.5 * math.pi * np.arange(1, m) / m) ** 2


def grid_points(grid: ArrayLike | None, n: int, low: float, high: float) -> Floats:
    """Where a bound may stand, from the highest down."""
    points = (
        default_grid(n, low, high) if grid is None else _validate.array(grid, "grid", ndim=(1,))
    )
    outside = (points <= low) | (points >= high)
    if outside.any():
        raise RiskcalError(
            f"grid: {points[outside][0]:g} at index {_validate.first(outside)} is not strictly between the losses' bounds "
            f"{low:g} and {high:g}."
        )
    return np.unique(points)[::-1]
