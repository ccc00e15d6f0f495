"""`mean_interval`: what is known of a mean, however often one looks."""

import math
from typing import NamedTuple

from riskcal import _validate
from riskcal._validate import RiskcalError


class Interval(NamedTuple):
    """Where a mean is.

    Examples
    --------
    >>> interval = riskcal.serving.mean_interval(200, 10.0)
    >>> interval.low < 10 / 200 < interval.high
    True
    """

    low: float
    high: float


def mean_interval(
    n: int, total: float, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> Interval:
    """Where the mean of a stream of losses is, at all times at once: from their number and sum alone.

    Parameters
    ----------
    n : int
        Losses so far.
    total : float
        Their sum.
    epsilon : float
        Probability that the mean ever leaves the interval, at whatever look.
    lower, upper : float
        Bounds of a loss.

    Returns
    -------
    Interval
        ``(lower, upper)`` before the first loss.

    Notes
    -----
    Losses are scaled to [0, 1]. Of a mean m given the past, ``(p / m)^S ((1 - p) / (1 - m))^(n - S)`` with S the sum is a
    nonnegative supermartingale for every p in (0, 1): by convexity a loss has no larger exponential moment than a coin of mean m
    (Hoeffding 1963, Lemma 1). So is its average over p from Beta(1/2, 1/2), ``B(S + 1/2, n - S + 1/2) / B(1/2, 1/2) / (m^S
    (1 - m)^(n - S))``, and by Ville's inequality it ever reaches 1 / epsilon with probability at most epsilon (the beta-binomial
    mixture of Howard, Ramdas, McAuliffe and Sekhon, *Time-uniform, nonparametric, nonasymptotic confidence sequences*,
    2021). The interval holds the m at which it has not.

    Examples
    --------
    >>> low, high = riskcal.serving.mean_interval(200, 10.0)
    >>> round(low, 3), round(high, 3)
    (0.014, 0.121)
    """
    _validate.count(n, "n", least=0)
    level = _validate.level(epsilon, "epsilon")
    lower, upper = _validate.bounds(lower, upper)
    span = upper - lower
    if n == 0:
        return Interval(lower, upper)
    ones = (total - n * lower) / span
    if not -1e-9 * n <= ones <= n * (1 + 1e-9):
        raise RiskcalError(
            f"total: {total:g} cannot be the sum of {n} losses from {lower:g} to {upper:g}."
        )
    ones = min(max(ones, 0.0), float(n))
    most = _log_beta(ones, n - ones) - _log_beta(0.0, 0.0) + math.log(level)
    low = _edge(ones, n - ones, 0.0, most)
    high = _edge(ones, n - ones, 1.0, most)
    return Interval(lower + span * low, lower + span * high)


def _log_beta(ones: float, zeros: float) -> float:
    """Of B(ones + 1/2, zeros + 1/2)."""
    return math.lgamma(ones + 0.5) + math.lgamma(zeros + 0.5) - math.lgamma(ones + zeros + 1.0)


def _edge(ones: float, zeros: float, end: float, least: float) -> float:
    """The mean farthest towards ``end`` whose log likelihood is at least this, rounded outwards."""
    inside, outside = ones / (ones + zeros), end
    if _log_likelihood(ones, zeros, end) >= least:
        return end
    for _ in range(60):
        middle = (inside + outside) / 2
        if _log_likelihood(ones, zeros, middle) >= least:
            inside = middle
        else:
            outside = middle
    return outside


def _log_likelihood(ones: float, zeros: float, mean: float) -> float:
    """Of ones and zeros under a mean; those that there are none of are possible under any."""
    if (ones and not mean) or (zeros and mean == 1.0):
        return -math.inf
    said = ones * math.log(mean) if ones else 0.0
    return said + (zeros * math.log1p(-mean) if zeros else 0.0)
