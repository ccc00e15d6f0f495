"""Upper confidence bounds on E[L] for bounded losses: each is the inversion of the test of the same name.

Every function takes losses (n,) or (n, k), one row per independent unit, and returns a float or (k,): a bound that lies
below the column's expected loss with probability at most epsilon. Each column has its own epsilon; `simultaneous` shares
one among all of them. Losses may lie in any declared [lower, upper].
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.pvalues.bettor import count_rejected
from riskcal.pvalues.losses import _matrix
from riskcal.pvalues.methods import Betting, Binomial, Method, inverted

_TINY = float(np.finfo(np.float64).tiny)
#: Slack on a sum before it counts as the next integer, as in `riskcal.pvalues.bentkus`.
_ROUNDING = 1e-9


def hoeffding(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Hoeffding's bound: ``mean + sqrt(log(1 / epsilon) / (2 n))`` on losses mapped to the unit interval.

    Parameters
    ----------
    losses : (n,) or (n, k)
        Independent rows with a common mean per column, within [lower, upper].
    epsilon : float
        Probability that the expected loss lies above the bound.
    lower, upper : float
        Known bounds of the losses, fixed beforehand.

    Returns
    -------
    float or (k,)
        In the loss's own units, at most ``upper``.

    Raises
    ------
    RiskcalError
        For NaN or infinite losses, losses outside the bounds, fewer than two rows, or epsilon outside (0, 1).
    """
    return _of_total(_hoeffding, losses, epsilon, lower, upper)


def bentkus(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """`riskcal.pvalues.bentkus` inverted: the Clopper-Pearson bound of the rounded-up sum at level ``epsilon / e``.

    Parameters, returns and errors as in `hoeffding`.
    """
    return _of_total(_bentkus, losses, epsilon, lower, upper)


def hoeffding_bentkus(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """`riskcal.pvalues.hoeffding_bentkus` inverted: the lower of Bentkus' and the relative-entropy Hoeffding bound.

    Parameters, returns and errors as in `hoeffding`.
    """
    return _of_total(_hoeffding_bentkus, losses, epsilon, lower, upper)


def convex_order(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """`riskcal.pvalues.convex_order` inverted: the lowest bound that the convex order gives from the sum alone.

    Never above `hoeffding_bentkus`. Parameters, returns and errors as in `hoeffding`.
    """
    return _of_total(_convex_order, losses, epsilon, lower, upper)


def clopper_pearson(losses: ArrayLike, *, epsilon: float = 0.05) -> float | Floats:
    """The exact bound for 0/1 losses (Clopper and Pearson 1934, one-sided): `riskcal.pvalues.binomial` inverted.

    Raises
    ------
    RiskcalError
        Beside the refusals of `hoeffding`, for a loss that is neither 0 nor 1.
    """
    counts = _validate.binary(losses)
    bound = _clopper_pearson(counts.sum(0), len(counts), _validate.level(epsilon, "epsilon"))
    return float(bound[0]) if np.ndim(losses) == 1 else bound


def empirical_bernstein(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Maurer and Pontil's bound (2009, Theorem 4), with the sample variance.

    ``mean + sqrt(2 variance log(2 / epsilon) / n) + 7 log(2 / epsilon) / (3 (n - 1))`` on losses mapped to the unit
    interval. Parameters, returns and errors as in `hoeffding`.
    """
    mean, deviation, n, level, low, high = _moments(losses, epsilon, lower, upper)
    x = math.log(2.0 / level)
    width = deviation * math.sqrt(2.0 * x / n) + (high - low) * 7.0 * x / (3.0 * (n - 1))
    return _shaped(np.minimum(mean + width, high), losses)


def predictable_bernstein(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """`riskcal.pvalues.predictable_bernstein` inverted, in closed form; uses the rows in the order given.

    Rows must stand in an order that does not depend on their content. Parameters, returns and errors as in `hoeffding`.
    """
    matrix, _, level, low, high = _checked(losses, epsilon, lower, upper)
    from riskcal.pvalues import kernels

    unit = matrix if (low, high) == (0.0, 1.0) else (matrix - low) / (high - low)
    _, bound = kernels.predictable_bernstein(unit, 0.5, level=level)
    return _shaped(low + (high - low) * bound, losses)


def betting(
    losses: ArrayLike,
    *,
    epsilon: float = 0.05,
    lower: float = 0.0,
    upper: float = 1.0,
    grid: ArrayLike | None = None,
) -> float | Floats:
    """`riskcal.pvalues.betting`, tuned at epsilon, inverted on a grid; uses the rows in the order given.

    Parameters
    ----------
    losses : (n,) or (n, k)
        Rows in an order that does not depend on their content, as for `riskcal.pvalues.betting`.
    epsilon, lower, upper
        As in `hoeffding`.
    grid : (m,), optional
        Where the bound may stand, strictly inside (lower, upper), fixed before the data were seen: for example the
        deltas that one would settle for. The default has about ``64 sqrt(n)`` points, denser near the bounds (near zero,
        where lower < 0 < upper), so that it costs a few hundredths of the bound's distance from the mean.

    Returns
    -------
    float or (k,)
        A point of the grid, or ``upper``.

    Raises
    ------
    RiskcalError
        Beside the refusals of `hoeffding`, for a grid that is not strictly inside (lower, upper).

    Notes
    -----
    The grid is tested from the top down, each point at epsilon, until one is not rejected; the bound is the point above
    it. If the mean lies in [g, g') between two neighbours, it is missed only if the true hypothesis at g, a fixed one, is
    rejected, so the bound holds on any grid and for a test whose rejections need not be monotone in delta (betting's are
    not proved to be). A coarse grid loses up to one step, never the guarantee. Bisection would not be covered.
    """
    matrix, _, level, low, high = _checked(losses, epsilon, lower, upper)
    points = (
        _default_grid(len(matrix), low, high)
        if grid is None
        else _validate.array(grid, "grid", ndim=(1,))
    )
    outside = (points <= low) | (points >= high)
    if outside.any():
        raise RiskcalError(
            f"grid: {points[outside][0]:g} at index {_validate.first(outside)} is not strictly between the losses' bounds "
            f"{low:g} and {high:g}."
        )
    points = np.unique(points)[::-1]
    columns = np.ascontiguousarray(matrix.T)
    rejected = count_rejected(columns, points, lower=low, upper=high, level=level)
    return _shaped(np.append(high, points)[rejected], losses)


def clt(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Asymptotic, without any finite-sample guarantee: ``mean + z deviation / sqrt(n)``.

    Never below ``lower + (upper - lower) (1 - epsilon^(1 / n))``, the exact bound for n losses at ``lower``: see
    `riskcal.pvalues.clt`, which it inverts. Nothing in riskcal uses it by default. Parameters and errors as in `hoeffding`.
    """
    mean, deviation, n, level, low, high = _moments(losses, epsilon, lower, upper)
    bound = mean - special.ndtri(level) * deviation / math.sqrt(n)
    floor = low - (high - low) * math.expm1(math.log(level) / n)
    return _shaped(np.minimum(np.maximum(bound, floor), high), losses)


#: Every bound by name, as `simultaneous` takes them.
METHODS: dict[str, Callable[..., float | Floats]] = {
    "betting": betting,
    "convex_order": convex_order,
    "hoeffding_bentkus": hoeffding_bentkus,
    "bentkus": bentkus,
    "hoeffding": hoeffding,
    "clopper_pearson": clopper_pearson,
    "empirical_bernstein": empirical_bernstein,
    "predictable_bernstein": predictable_bernstein,
    "clt": clt,
}


def simultaneous(
    losses: ArrayLike,
    *,
    epsilon: float = 0.05,
    method: str | Method = "convex_order",
    lower: float = 0.0,
    upper: float = 1.0,
    grid: ArrayLike | None = None,
) -> Floats:
    """Bounds for all candidates at once, so that a user may read the whole curve and then choose delta and candidate.

    Parameters
    ----------
    losses : (n, k)
        One column per candidate; a single column may be (n,).
    epsilon : float
        Probability that the expected loss of any candidate lies above its bound.
    method : str or Method
        Name of a bound in `riskcal.bounds`, or the test whose inversion it is (``riskcal.pvalues.Betting()``). Betting is the
        tightest but for losses of 0 or 1; it uses rows in the order given, which must not depend on their content; the
        default does not care about the order.
    lower, upper : float
        Known bounds of the losses, fixed beforehand.
    grid : (m,), optional
        For ``"betting"``: where the bounds may stand.

    Returns
    -------
    (k,)
        With probability at least ``1 - epsilon``, every candidate's expected loss is at most its bound, for any dependence
        between candidates and whatever the shape of the curve. Every choice of a candidate and of a delta at or above its
        bound, made after looking, is therefore covered.

    Raises
    ------
    RiskcalError
        For an unknown method, a grid without betting, bounds other than [0, 1] with ``"clopper_pearson"``, and what the
        method refuses.

    Notes
    -----
    Each bound is taken at ``epsilon / k`` (Bonferroni). For a delta that was fixed beforehand `riskcal.fwer` certifies
    more: what is paid here is the freedom to choose.
    """
    level = _validate.level(epsilon, "epsilon")
    test = inverted(method, "method")
    low, high = _validate.bounds(lower, upper)
    test.refuse_bounds(low, high, "method", test.bound)
    if grid is not None and not isinstance(test, Betting):
        raise RiskcalError(
            f"grid: it belongs to method='betting', not to {test.bound!r}, which needs none."
        )
    options: dict[str, Any] = {} if grid is None else {"grid": grid}
    if not isinstance(test, Binomial):  # whose losses are 0 or 1
        options |= {"lower": low, "upper": high}
    k = np.shape(losses)[1] if np.ndim(losses) == 2 else 1
    return np.atleast_1d(METHODS[test.bound](losses, epsilon=level / max(k, 1), **options))


def _checked(
    losses: ArrayLike, epsilon: float, lower: float, upper: float
) -> tuple[Floats, Floats, float, float, float]:
    """Checked losses as (n, k), their column sums, epsilon and the bounds."""
    level = _validate.level(epsilon, "epsilon")
    low, high = _validate.bounds(lower, upper)
    matrix, total = _matrix(losses, low, high)
    return matrix, total, level, low, high


def _moments(
    losses: ArrayLike, epsilon: float, lower: float, upper: float
) -> tuple[Floats, Floats, int, float, float, float]:
    """Each column's mean and standard deviation, n, epsilon and the bounds."""
    matrix, total, level, low, high = _checked(losses, epsilon, lower, upper)
    from riskcal.pvalues import kernels

    mean = total / len(matrix)
    return mean, kernels.sample_deviation(matrix, mean), len(matrix), level, low, high


def _shaped(bound: Floats, losses: ArrayLike) -> float | Floats:
    return float(bound[0]) if np.ndim(losses) == 1 else bound


def _of_total(
    bound: Callable[[Floats, int, float], Floats],
    losses: ArrayLike,
    epsilon: float,
    lower: float,
    upper: float,
) -> float | Floats:
    """A bound that depends on the losses through their sum alone, on the unit interval."""
    matrix, total, level, low, high = _checked(losses, epsilon, lower, upper)
    n = len(matrix)
    total = np.clip((total - n * low) / (high - low), 0.0, n)
    distinct, where = np.unique(total, return_inverse=True)
    return _shaped((low + (high - low) * bound(distinct, n, level))[where], losses)


def _hoeffding(total: Floats, n: int, level: float) -> Floats:
    return np.minimum(total / n + math.sqrt(-math.log(level) / (2.0 * n)), 1.0)


def _clopper_pearson(count: Floats, n: int, level: float) -> Floats:
    inside = np.minimum(count, n - 1)
    return np.where(count >= n, 1.0, special.betaincinv(inside + 1.0, n - inside, 1.0 - level))


def _bentkus(total: Floats, n: int, level: float) -> Floats:
    return _clopper_pearson(np.ceil(total - _ROUNDING * np.maximum(total, 1.0)), n, level / math.e)


def _hoeffding_bentkus(total: Floats, n: int, level: float) -> Floats:
    mean, needed = total / n, -math.log(level) / n
    low, high = mean.copy(), np.ones_like(mean)
    for _ in range(60):  # entropy rises from 0 at the mean
        middle = 0.5 * (low + high)
        entropy = special.rel_entr(mean, middle) + special.rel_entr(1.0 - mean, 1.0 - middle)
        low, high = (
            np.where(entropy < needed, middle, low),
            np.where(entropy < needed, high, middle),
        )
    return np.minimum(high, _bentkus(total, n, level))


def _convex_order(total: Floats, n: int, level: float) -> Floats:
    """Newton's method from above on the log p-value, which is concave and decreasing in delta, so that it stays above.

    With ``t`` the best integer at delta and G(t) = E max(0, t - B), log p = log G(t) - log(t - total), and the derivative
    of G(t) in delta is ``-n P(Bin(n - 1, delta) <= t - 1)``.
    """
    bound = np.minimum(_bentkus(total, n, level), 1.0 - level * (n - total) / n)
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
            / (n * _binomial_cdf(t - 1.0, n - 1, delta))
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
        rises = (middle - total) * _binomial_cdf(middle, n, delta) >= _shortfall(middle, n, delta)
        low, high = np.where(rises, low, middle + 1.0), np.where(rises, middle, high)
    return low


def _shortfall(t: Floats, n: int, delta: Floats) -> Floats:
    """E max(0, t - B) for B ~ Bin(n, delta)."""
    return np.maximum(
        t * _binomial_cdf(t - 1.0, n, delta) - n * delta * _binomial_cdf(t - 2.0, n - 1, delta),
        _TINY,
    )


def _binomial_cdf(count: Floats, n: int, delta: Floats) -> Floats:
    inside = np.clip(count, 0.0, n - 1.0)
    return np.where(
        count < 0,
        0.0,
        np.where(count >= n, 1.0, special.betainc(n - inside, inside + 1.0, 1.0 - delta)),
    )


def _default_grid(n: int, lower: float, upper: float) -> NDArray[np.float64]:
    """Points whose spacing shrinks with the standard deviation that a mean there allows, or towards zero if it is inside."""
    m = math.ceil(64.0 * math.sqrt(n))
    if lower < 0.0 < upper:
        half = np.arange(1, m // 2) / (m // 2)
        return np.concatenate([lower * half**2, upper * half**2])
    return lower + (upper - lower) * np.sin(0.5 * math.pi * np.arange(1, m) / m) ** 2
