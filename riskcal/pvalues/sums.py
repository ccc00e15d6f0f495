"""Tests that depend on the losses through their sum alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats
from riskcal.pvalues.losses import TINY, matrix_and_sums

#: Slack on a sum before it counts as the next integer, relative to the sum: rounding, not evidence.
_ROUNDING = 1e-9


class Sums(NamedTuple):
    """All that the sum-based tests see of the losses."""

    total: Floats  # (k,), of losses mapped to [0, 1]
    n: int
    delta: float

    @classmethod
    def of(cls, total: Floats, n: int, delta: float, lower: float, upper: float) -> Sums:
        """Of the sums (k,) of n losses in [lower, upper]; delta is never rounded to 0 or 1."""
        tolerated = min(max((delta - lower) / (upper - lower), TINY), 1.0 - 2.0**-53)
        return cls(unit_total(total, n, lower, upper), n, tolerated)


def unit_total(total: Floats, n: int, lower: float, upper: float) -> Floats:
    """What the sums of n losses in [lower, upper] are where these are mapped to [0, 1]."""
    return np.clip((total - n * lower) / (upper - lower), 0.0, n)


def hoeffding(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Hoeffding's bound, ``exp(-2 n max(0, delta - mean)^2)`` (CALM, equation 9).

    Parameters
    ----------
    losses : (n,) or (n, k)
        Independent rows with a common mean per column, within [lower, upper].
    delta : float
        Tolerated expected loss, strictly inside (lower, upper).
    lower, upper : float
        Known bounds of the losses, fixed beforehand.

    Returns
    -------
    float or (k,)
        Super-uniform under H for any n.

    Raises
    ------
    RiskcalError
        For NaN or infinite losses, losses outside the bounds, fewer than two rows, or delta outside (lower, upper).

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")  # 3,000 words x 21 thresholds
    >>> riskcal.pvalues.hoeffding(losses[:, 9:12], delta=0.1).round(3).tolist()  # at 0.55, 0.5 and 0.45
    [0.037, 0.262, 0.713]
    """
    return _test(_hoeffding, losses, delta, lower, upper)


def bentkus(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Bentkus' bound, ``e P(Bin(n, delta) <= ceil(sum))`` (Bentkus 2004; Learn then Test, equation 5).

    Parameters, returns and errors as in `hoeffding`. A sum within a relative 1e-9 above an integer counts as that integer:
    floating-point error must not cost a whole step. (This is the same as testing losses that are lower by at most 1e-9.)

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")
    >>> riskcal.pvalues.bentkus(losses[:, 9:12], delta=0.1).round(3).tolist()
    [0.0, 0.009, 0.256]
    """
    return _test(_bentkus, losses, delta, lower, upper)


def hoeffding_bentkus(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """The smaller of Hoeffding's bound in its relative-entropy form and Bentkus' (CALM's own test).

    ``min(exp(-n h(min(mean, delta), delta)), e P(Bin(n, delta) <= ceil(sum)))`` with ``h(a, b) = a ln(a/b) + (1-a)
    ln((1-a)/(1-b))``. Both bounds hold at the same time with no correction, since each is a function of the same sum with
    nested rejection regions. Parameters, returns and errors as in `hoeffding`.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")
    >>> riskcal.pvalues.hoeffding_bentkus(losses[:, 9:12], delta=0.1).round(3).tolist()
    [0.0, 0.009, 0.256]
    """
    return _test(_hoeffding_bentkus, losses, delta, lower, upper)


def convex_order(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """The sharpest bound that the convex order gives from the sum alone; never above Hoeffding-Bentkus.

    ``min over integers t > sum of E max(0, t - B) / (t - sum)`` with ``B ~ Bin(n, delta)``. Each loss is below a Bernoulli
    of its mean in the convex order (Hoeffding 1963), so ``E max(0, t - sum)`` is at most the binomial's, and Markov's
    inequality does the rest. Continuous in the sum, so rounding cannot move it. Parameters, returns and errors as in
    `hoeffding`.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")
    >>> riskcal.pvalues.convex_order(losses[:, 9:12], delta=0.1).round(3).tolist()
    [0.0, 0.007, 0.208]
    """
    return _test(_convex_order, losses, delta, lower, upper)


def binomial(losses: ArrayLike, delta: float) -> float | Floats:
    """The exact test for 0/1 losses, ``P(Bin(n, delta) <= sum)``.

    Raises
    ------
    RiskcalError
        Beside the refusals of `hoeffding`, for a loss that is neither 0 nor 1.

    Examples
    --------
    >>> wrong = np.repeat([1, 0], [3, 297])  # 3 of 300 answers differ from the full model's
    >>> round(riskcal.pvalues.binomial(wrong, delta=0.03), 3)
    0.02
    """
    counts = _validate.binary(losses)
    return _test(
        OF_SUMS["binomial"], counts if np.ndim(losses) == 2 else counts[:, 0], delta, 0.0, 1.0
    )


def sums_of(losses: ArrayLike, delta: float, lower: float, upper: float) -> Sums:
    """Of checked losses."""
    low, high = _validate.bounds(lower, upper)
    tolerated = _validate.tolerance(delta, low, high)
    # sums, never n * mean: 100 * (7 / 100) is above 7 in floating point
    matrix, total = matrix_and_sums(losses, low, high)
    return Sums.of(total, len(matrix), tolerated, low, high)


def _binomial(s: Sums) -> Floats:
    distinct, where = np.unique(s.total, return_inverse=True)
    return binomial_cdf(distinct, s.n, s.delta)[where]


def _hoeffding(s: Sums) -> Floats:
    return np.exp(-2.0 * s.n * np.maximum(0.0, s.delta - s.total / s.n) ** 2)


def _bentkus(s: Sums) -> Floats:
    return np.minimum(1.0, math.e * _binomial(s._replace(total=rounded_up(s.total))))


def _hoeffding_bentkus(s: Sums) -> Floats:
    mean = np.minimum(s.total / s.n, s.delta)
    entropy = special.xlogy(mean, mean / s.delta) + special.xlogy(
        1.0 - mean, (1.0 - mean) / (1.0 - s.delta)
    )
    smaller: Floats = np.minimum(np.exp(-s.n * entropy), _bentkus(s))
    return smaller


def _convex_order(s: Sums) -> Floats:
    from riskcal.pvalues import kernels

    mode = min(math.floor((s.n + 1) * s.delta), s.n)
    log_mode = -math.log(s.n + 1) - special.betaln(s.n - mode + 1, mode + 1)
    log_mode += special.xlogy(mode, s.delta) + special.xlog1py(s.n - mode, -s.delta)
    upto, shortfall = kernels.binomial_shortfall(s.n, s.delta, float(log_mode))
    t = np.arange(1.0, s.n + 1.0)
    # the bound falls from t to t + 1 if and only if sum > t - shortfall / upto, which is nondecreasing in t
    stop = t - np.divide(shortfall, upto, out=np.zeros(s.n), where=upto > 0)
    best = np.searchsorted(stop, s.total).clip(np.floor(s.total), s.n - 1).astype(np.intp)
    room = t[best] - s.total
    bound: Floats = np.divide(
        shortfall[best], room, out=np.ones_like(room), where=room > shortfall[best]
    )
    return bound


def rounded_up(total: Floats) -> Floats:
    """Sums as the next whole numbers."""
    return np.ceil(total - _ROUNDING * np.maximum(total, 1.0))


def binomial_cdf(count: Floats, n: int, delta: float | Floats) -> Floats:
    """P(Bin(n, delta) <= count) by the incomplete beta function, accurate far into the tail."""
    inside = np.clip(count, 0.0, n - 1.0)
    below_n = special.betainc(n - inside, inside + 1.0, 1.0 - delta)
    return np.where(count < 0, 0.0, np.where(count >= n, 1.0, below_n))


def pvalues_of(test: Callable[[Sums], Floats], s: Sums) -> Floats:
    """Those of one of `OF_SUMS`; 1 where the mean is not below delta, but of the binomial test, which is exact there too."""
    pvalues = np.clip(test(s), TINY, 1.0)
    return pvalues if test is _binomial else np.where(s.total >= s.n * s.delta, 1.0, pvalues)


def _test(
    test: Callable[[Sums], Floats], losses: ArrayLike, delta: float, lower: float, upper: float
) -> float | Floats:
    pvalues = pvalues_of(test, sums_of(losses, delta, lower, upper))
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


#: The tests that depend on the losses through their sum alone, as functions of it.
OF_SUMS: dict[str, Callable[[Sums], Floats]] = {
    "hoeffding": _hoeffding,
    "bentkus": _bentkus,
    "hoeffding_bentkus": _hoeffding_bentkus,
    "convex_order": _convex_order,
    "binomial": _binomial,
}
