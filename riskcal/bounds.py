"""Upper confidence bounds on E[L] for bounded losses: each is the inversion of the test of the same name.

Every function takes losses (n,) or (n, k), one row per independent unit, and returns a float or (k,): a bound that lies
below the column's expected loss with probability at most epsilon. Each column has its own epsilon; `simultaneous` shares
one among all of them. Losses may lie in any declared [lower, upper].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.pvalues import inversions
from riskcal.pvalues.bettor import count_rejected
from riskcal.pvalues.losses import matrix_and_sums
from riskcal.pvalues.methods import Betting, Binomial, Method, inverted
from riskcal.pvalues.sums import unit_total


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

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")[:, 10]  # at threshold 0.5
    >>> round(losses.mean().item(), 3), round(riskcal.bounds.hoeffding(losses), 3)
    (0.085, 0.107)
    """
    return _of_total(inversions.hoeffding, losses, epsilon, lower, upper)


def bentkus(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """`riskcal.pvalues.bentkus` inverted: the Clopper-Pearson bound of the rounded-up sum at level ``epsilon / e``.

    Parameters, returns and errors as in `hoeffding`.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")[:, 10]
    >>> round(riskcal.bounds.bentkus(losses), 3)
    0.097
    """
    return _of_total(inversions.bentkus, losses, epsilon, lower, upper)


def hoeffding_bentkus(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """`riskcal.pvalues.hoeffding_bentkus` inverted: the lower of Bentkus' and the relative-entropy Hoeffding bound.

    Parameters, returns and errors as in `hoeffding`.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")[:, 10]
    >>> round(riskcal.bounds.hoeffding_bentkus(losses), 3)
    0.097
    """
    return _of_total(inversions.hoeffding_bentkus, losses, epsilon, lower, upper)


def convex_order(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """`riskcal.pvalues.convex_order` inverted: the lowest bound that the convex order gives from the sum alone.

    Never above `hoeffding_bentkus`. Parameters, returns and errors as in `hoeffding`.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")[:, 10]
    >>> round(riskcal.bounds.convex_order(losses), 3)
    0.096
    """
    return _of_total(inversions.convex_order, losses, epsilon, lower, upper)


def clopper_pearson(losses: ArrayLike, *, epsilon: float = 0.05) -> float | Floats:
    """The exact bound for 0/1 losses (Clopper and Pearson 1934, one-sided): `riskcal.pvalues.binomial` inverted.

    Raises
    ------
    RiskcalError
        Beside the refusals of `hoeffding`, for a loss that is neither 0 nor 1.

    Examples
    --------
    >>> wrong = np.repeat([1, 0], [3, 297])
    >>> round(riskcal.bounds.clopper_pearson(wrong), 3)
    0.026
    """
    counts = _validate.binary(losses)
    bound = inversions.clopper_pearson(
        counts.sum(0), len(counts), _validate.level(epsilon, "epsilon")
    )
    return float(bound[0]) if np.ndim(losses) == 1 else bound


def empirical_bernstein(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Maurer and Pontil's bound (2009, Theorem 4), with the sample variance.

    ``mean + sqrt(2 variance log(2 / epsilon) / n) + 7 log(2 / epsilon) / (3 (n - 1))`` on losses mapped to the unit
    interval. Parameters, returns and errors as in `hoeffding`.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")[:, 10]
    >>> round(riskcal.bounds.empirical_bernstein(losses), 3)
    0.097
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

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")[:, 10]
    >>> round(riskcal.bounds.predictable_bernstein(losses), 3)
    0.094
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

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")[:, 10]
    >>> round(riskcal.bounds.betting(losses), 3)
    0.091
    """
    matrix, _, level, low, high = _checked(losses, epsilon, lower, upper)
    points = inversions.grid_points(grid, len(matrix), low, high)
    columns = np.ascontiguousarray(matrix.T)
    rejected = count_rejected(columns, points, lower=low, upper=high, level=level)
    return _shaped(np.append(high, points)[rejected], losses)


def clt(
    losses: ArrayLike, *, epsilon: float = 0.05, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Asymptotic, without any finite-sample guarantee: ``mean + z deviation / sqrt(n)``.

    Never below ``lower + (upper - lower) (1 - epsilon^(1 / n))``, the exact bound for n losses at ``lower``: see
    `riskcal.pvalues.clt`, which it inverts. Nothing in riskcal uses it by default. Parameters and errors as in `hoeffding`.

    Examples
    --------
    >>> round(riskcal.bounds.clt(np.zeros(5)), 3)  # never 0, however quiet the losses were
    0.451
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
        For ``"betting"``, and a test of one's own, which is inverted in the same way: where the bounds may stand.

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

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> bounds = riskcal.bounds.simultaneous(runs.losses("textual"), method="betting")
    >>> runs.thresholds[bounds <= 0.08].min().item()  # a delta that was chosen after looking
    0.6
    """
    level = _validate.level(epsilon, "epsilon")
    test = inverted(method, "method")
    low, high = _validate.bounds(lower, upper)
    test.refuse_bounds(low, high, "method", test.bound)
    if grid is not None and test.bounded and not isinstance(test, Betting):
        raise RiskcalError(
            f"grid: it belongs to method='betting', not to {test.bound!r}, which needs none."
        )
    given = _validate.as_given(losses, "losses", "an array of numbers")
    k = given.shape[1] if given.ndim == 2 else 1
    return _of_test(test, losses, epsilon=level / max(k, 1), lower=low, upper=high, grid=grid)


def _of_test(
    test: Method,
    losses: ArrayLike,
    *,
    epsilon: float,
    lower: float,
    upper: float,
    grid: ArrayLike | None = None,
) -> Floats:
    """The bounds (k,) that invert a test, those of one's own on a grid as `betting`'s are; ``grid`` is for these alone."""
    if test.bounded:
        options: dict[str, Any] = {} if grid is None else {"grid": grid}
        if not isinstance(test, Binomial):  # whose losses are 0 or 1
            options |= {"lower": lower, "upper": upper}
        return np.atleast_1d(METHODS[test.bound](losses, epsilon=epsilon, **options))
    matrix, _, level, low, high = _checked(losses, epsilon, lower, upper)
    bound, left = np.full(matrix.shape[1], high), np.arange(matrix.shape[1])
    for point in inversions.grid_points(grid, len(matrix), low, high):
        p = test.pvalues(matrix[:, left], float(point), level=level, lower=low, upper=high)
        left = left[p <= level]
        if not left.size:
            break
        bound[left] = point
    return bound


def _checked(
    losses: ArrayLike, epsilon: float, lower: float, upper: float
) -> tuple[Floats, Floats, float, float, float]:
    """Checked losses as (n, k), their column sums, epsilon and the bounds."""
    level = _validate.level(epsilon, "epsilon")
    low, high = _validate.bounds(lower, upper)
    matrix, total = matrix_and_sums(losses, low, high)
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
    distinct, where = np.unique(unit_total(total, n, low, high), return_inverse=True)
    return _shaped((low + (high - low) * bound(distinct, n, level))[where], losses)
