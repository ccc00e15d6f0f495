"""P-values of H: E[L] > delta for bounded losses; a small one says that the expected loss is at most delta.

Every function takes losses (n,) or (n, k), one row per independent unit, and returns a float or (k,). Losses may lie in
any declared [lower, upper]; they and delta are mapped to the unit interval first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError

#: Slack on a sum before it counts as the next integer, relative to the sum: rounding, not evidence.
_ROUNDING = 1e-9
_TINY = float(np.finfo(np.float64).tiny)


class Sums(NamedTuple):
    """All that the sum-based tests see of the losses."""

    total: Floats  # (k,), of losses mapped to [0, 1]
    n: int
    delta: float


def hoeffding(losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0) -> float | Floats:
    """Hoeffding's bound, ``exp(-2 n max(0, delta - mean)^2)`` (CALM, Eq. 9).

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
    """
    return _test(_hoeffding, losses, delta, lower, upper)


def bentkus(losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0) -> float | Floats:
    """Bentkus' bound, ``e P(Bin(n, delta) <= ceil(sum))`` (Bentkus 2004; Learn then Test, Eq. 5).

    Parameters, returns and errors as in `hoeffding`. A sum within a relative 1e-9 above an integer counts as that integer:
    floating-point error must not cost a whole step. (This is the same as testing losses that are lower by at most 1e-9.)
    """
    return _test(_bentkus, losses, delta, lower, upper)


def hoeffding_bentkus(losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0) -> float | Floats:
    """The smaller of Hoeffding's bound in its relative-entropy form and Bentkus' (CALM's own test).

    ``min(exp(-n h(min(mean, delta), delta)), e P(Bin(n, delta) <= ceil(sum)))`` with ``h(a, b) = a ln(a/b) + (1-a)
    ln((1-a)/(1-b))``. Both bounds hold at the same time with no correction, since each is a function of the same sum with
    nested rejection regions. Parameters, returns and errors as in `hoeffding`.
    """
    return _test(_hoeffding_bentkus, losses, delta, lower, upper)


def convex_order(losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0) -> float | Floats:
    """The sharpest bound that the convex order gives from the sum alone; never above Hoeffding-Bentkus.

    ``min over integers t > sum of E max(0, t - B) / (t - sum)`` with ``B ~ Bin(n, delta)``. Each loss is below a Bernoulli
    of its mean in the convex order (Hoeffding 1963), so ``E max(0, t - sum)`` is at most the binomial's, and Markov's
    inequality does the rest. Continuous in the sum, so rounding cannot move it. Parameters, returns and errors as in
    `hoeffding`.
    """
    return _test(_convex_order, losses, delta, lower, upper)


def binomial(losses: ArrayLike, delta: float) -> float | Floats:
    """The exact test for 0/1 losses, ``P(Bin(n, delta) <= sum)``.

    Raises
    ------
    RiskcalError
        Beside the refusals of `hoeffding`, for a loss that is neither 0 nor 1.
    """
    matrix = _validate.losses(losses, lower=0.0, upper=1.0)
    counts = np.rint(matrix)
    fractional = np.abs(matrix - counts) > _validate.TOLERANCE
    if fractional.any():
        raise RiskcalError(
            f"losses: {matrix[fractional][0]:g} at row {_validate.first(fractional)} is neither 0 nor 1; "
            "use betting or convex_order for losses in between."
        )
    return _test(OF_SUMS["binomial"], counts if np.ndim(losses) == 2 else counts[:, 0], delta, 0.0, 1.0)


def betting(
    losses: ArrayLike, delta: float, *, level: float, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Option-hedged betting: one over the largest capital of a bettor against H, who bets on each row in the order given.

    Parameters
    ----------
    losses : (n,) or (n, k)
        Rows in an order that does not depend on their content. Sorted rows make the test wrong: put records in
        `riskcal.records.tested_order` first, as `riskcal.calibrate` does.
    delta, lower, upper
        As in `hoeffding`.
    level : float
        The level at which this hypothesis will be tested. The bets are the delta hedge of the option that pays ``1 / level``
        if the test rejects, so that power is concentrated there: the p-value barely falls below ``level``.

    Returns
    -------
    float or (k,)
        Valid whenever each row's mean given the earlier rows exceeds delta under H (i.i.d. rows do); the row count n only
        steers the bets. Ville's inequality, for any stopping.

    Notes
    -----
    A capital W starts at 1 and is multiplied by ``1 + bet (delta - loss)``; the bet is ``phi(z) / p / sqrt(r s2)`` at ``p =
    W level / 1.03``, z its normal quantile, r the rows left and s2 the running variance about delta, at most ``0.99 / (1 -
    delta)``, and never negative. The variance starts from 8 pseudo-observations at delta (1 - delta), or a twentieth of it
    where the bounds straddle zero (differences, mostly ties).
    """
    level = _validate.level(level, "level")
    low, high = _validate.bounds(lower, upper)
    matrix = _validate.losses(losses, lower=low, upper=high)
    tolerated = _validate.tolerance(delta, low, high)
    prior = 0.05 if low < 0.0 < high else 1.0
    from riskcal import _kernels

    unit = matrix if (low, high) == (0.0, 1.0) else (matrix - low) / (high - low)
    log_capital = _kernels.option_hedged_betting(unit, (tolerated - low) / (high - low), level=level, prior=prior)
    pvalues = np.exp(-log_capital)
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def sample_size(test: str, mean: float, deviation: float, delta: float, level: float, *, power: float = 0.8) -> int:
    """About how many units a test needs to reject at ``level`` with this power, on losses mapped to the unit interval.

    By the normal approximation of the sample mean, so it guides planning and guarantees nothing.

    Parameters
    ----------
    test : str
        A sum-based test's name, or ``"betting"``.
    mean, deviation : float
        Of one unit's loss; the mean below delta.
    """
    deviation = max(deviation, 0.05)  # a sample of zeros does not show that the losses cannot vary
    if test == "betting":
        normal = ((special.ndtri(1 - level) + special.ndtri(power)) * deviation / (delta - mean)) ** 2
        return math.ceil(max(normal, math.log(level) / math.log1p(-delta)))

    def rejects(n: int) -> bool:
        likely = min(mean + special.ndtri(power) * deviation / math.sqrt(n), 1.0)
        return bool(_finish(OF_SUMS[test], Sums(np.array([likely * n]), n, delta))[0] <= level)

    low, high = 1, 2
    while not rejects(high):
        low, high = high, 2 * high
        if high > 2**24:  # beyond any calibration set
            break
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if rejects(middle) else (middle, high)
    return high


def _sums(losses: ArrayLike, delta: float, lower: float, upper: float) -> Sums:
    low, high = _validate.bounds(lower, upper)
    matrix = _validate.losses(losses, lower=low, upper=high)
    tolerated = _validate.tolerance(delta, low, high)
    n = matrix.shape[0]
    total = matrix.sum(0)  # never n * mean: 100 * (7 / 100) is above 7 in floating point
    if (low, high) != (0.0, 1.0):
        total = (total - n * low) / (high - low)
        tolerated = (tolerated - low) / (high - low)
    return Sums(np.clip(total, 0.0, n), n, tolerated)


def _hoeffding(s: Sums) -> Floats:
    return np.exp(-2.0 * s.n * np.maximum(0.0, s.delta - s.total / s.n) ** 2)


def _bentkus(s: Sums) -> Floats:
    return np.minimum(1.0, math.e * _binomial_cdf(np.ceil(s.total - _ROUNDING * np.maximum(s.total, 1.0)), s))


def _hoeffding_bentkus(s: Sums) -> Floats:
    mean = np.minimum(s.total / s.n, s.delta)
    entropy = special.xlogy(mean, mean / s.delta) + special.xlogy(1.0 - mean, (1.0 - mean) / (1.0 - s.delta))
    return np.minimum(np.exp(-s.n * entropy), _bentkus(s))


def _convex_order(s: Sums) -> Floats:
    t = np.arange(1.0, s.n + 1.0)
    below = special.betainc(s.n - t + 1.0, t, 1.0 - s.delta)  # P(B <= t - 1)
    shortfall = np.cumsum(below)  # E max(0, t - B)
    upto = np.append(below[1:], 1.0)  # P(B <= t)
    # the bound falls from t to t + 1 if and only if sum > t - shortfall / upto, which is nondecreasing in t
    stop = t - np.divide(shortfall, upto, out=np.zeros(s.n), where=upto > 0)
    best = np.searchsorted(stop, s.total).clip(np.floor(s.total), s.n - 1).astype(np.intp)
    room = t[best] - s.total
    return np.where(room > 0, shortfall[best] / np.maximum(room, _TINY), 1.0)


def _binomial_cdf(count: Floats, s: Sums) -> Floats:
    """P(Bin(n, delta) <= count) by the incomplete beta function, accurate far into the tail."""
    inside = np.clip(count, 0, s.n - 1)
    return np.where(count >= s.n, 1.0, special.betainc(s.n - inside, inside + 1.0, 1.0 - s.delta))


def _finish(test: Callable[[Sums], Floats], s: Sums) -> Floats:
    return np.where(s.total >= s.n * s.delta, 1.0, np.clip(test(s), _TINY, 1.0))


def _test(test: Callable[[Sums], Floats], losses: ArrayLike, delta: float, lower: float, upper: float) -> float | Floats:
    pvalues = _finish(test, _sums(losses, delta, lower, upper))
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


#: The tests that depend on the losses through their sum alone, as functions of it.
OF_SUMS: dict[str, Callable[[Sums], Floats]] = {
    "hoeffding": _hoeffding,
    "bentkus": _bentkus,
    "hoeffding_bentkus": _hoeffding_bentkus,
    "convex_order": _convex_order,
    "binomial": lambda s: _binomial_cdf(s.total, s),
}
