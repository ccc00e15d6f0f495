"""What tests and bounds see of a matrix of losses, compiled. Imported in functions, as numba takes half a second to import."""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@njit(cache=True, fastmath={"nnan", "nsz"})
def column_summary(losses):  # type: ignore[no-untyped-def]
    """Sum of each column, and the smallest and largest value of all, in one pass over a C-ordered (n, k) matrix.

    Four rows at a time: the running sums and extremes would else be read and written as often as the matrix is.
    """
    n, k = losses.shape
    total, low, high = np.zeros(k), np.empty(k), np.empty(k)
    for j in range(k):
        low[j] = high[j] = losses[0, j]
    for i in range(0, n - 3, 4):
        for j in range(k):
            a, b, c, d = losses[i, j], losses[i + 1, j], losses[i + 2, j], losses[i + 3, j]
            total[j] += (a + b) + (c + d)
            low[j] = min(min(min(a, b), min(c, d)), low[j])
            high[j] = max(max(max(a, b), max(c, d)), high[j])
    for i in range(n - n % 4, n):
        for j in range(k):
            total[j] += losses[i, j]
            low[j] = min(losses[i, j], low[j])
            high[j] = max(losses[i, j], high[j])
    for j in range(1, k):  # a loop: numba takes a second to compile each of numpy's own min and max
        low[0], high[0] = min(low[j], low[0]), max(high[j], high[0])
    return total, low[0], high[0]


@njit(cache=True)
def column_squares(losses, mean):  # type: ignore[no-untyped-def]
    """Per column of C-ordered ``losses`` (n, k), the sum of squared differences from ``mean`` (k,)."""
    n, k = losses.shape
    squares = np.zeros(k)
    for i in range(n):
        for j in range(k):
            gap = losses[i, j] - mean[j]
            squares[j] += gap * gap
    return squares


def sample_deviation(losses: FloatArray, mean: FloatArray) -> FloatArray:
    """Standard deviation (n - 1 in the denominator) per column: no copy, and the same for a column alone or among others."""
    deviation: FloatArray = np.sqrt(column_squares(losses, mean) / (len(losses) - 1))
    return deviation


@njit(cache=True)
def binomial_shortfall(n, p, log_mode):  # type: ignore[no-untyped-def]
    """For B ~ Bin(n, p) and t = 1..n: P(B <= t) and E max(0, t - B). ``log_mode`` is the log probability of the mode."""
    mass = np.empty(n + 1)
    mode = min(int((n + 1) * p), n)
    mass[mode] = math.exp(log_mode)
    for j in range(mode, 0, -1):
        mass[j - 1] = mass[j] * (j * (1.0 - p)) / ((n - j + 1) * p)
    for j in range(mode, n):
        mass[j + 1] = mass[j] * ((n - j) * p) / ((j + 1) * (1.0 - p))
    upto, shortfall = np.empty(n), np.empty(n)
    below, area = mass[0], 0.0
    for t in range(1, n + 1):
        area += below
        below += mass[t]
        upto[t - 1], shortfall[t - 1] = min(below, 1.0), area
    return upto, shortfall


@njit(cache=True)
def predictable_plug_in(losses, delta, log_target):  # type: ignore[no-untyped-def]
    """Per column of ``losses`` (n, k) on the unit interval: largest log capital against ``delta``, smallest upper bound.

    The bets are those of the predictable plug-in empirical Bernstein process for n rows at ``exp(-log_target)``; they do
    not depend on delta, so one walk gives the capital and the bound.
    """
    n, k = losses.shape
    largest, bound = np.zeros(k), np.ones(k)
    total, square = np.full(k, 0.5), np.full(k, 0.25)
    weight, drift = np.zeros(k), np.zeros(k)
    for t in range(n):
        for j in range(k):
            gap = losses[t, j] - total[j] / (t + 1)
            bet = min(math.sqrt(2.0 * log_target * (t + 1) / (n * square[j])), 0.5)
            weight[j] += bet
            drift[j] += bet * losses[t, j] - gap * gap * (math.log1p(-bet) + bet)
            largest[j] = max(largest[j], weight[j] * delta - drift[j])
            bound[j] = min(bound[j], (drift[j] + log_target) / weight[j])
            total[j] += losses[t, j]
            square[j] += (losses[t, j] - total[j] / (t + 2)) ** 2
    return largest, bound


def predictable_bernstein(
    losses: FloatArray, delta: float, *, level: float
) -> tuple[FloatArray, FloatArray]:
    """Largest log capital and smallest bound per column; see `riskcal.pvalues.predictable_bernstein`."""
    largest, bound = predictable_plug_in(np.ascontiguousarray(losses), delta, -math.log(level))
    return largest, bound
