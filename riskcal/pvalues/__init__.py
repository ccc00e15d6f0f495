"""P-values of H: E[L] > delta for bounded losses; a small one says that the expected loss is at most delta.

Every function takes losses (n,) or (n, k), one row per independent unit, and returns a float or (k,). Losses may lie in
any declared [lower, upper]; they and delta are mapped to the unit interval first.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats

if TYPE_CHECKING:
    from riskcal._simulation import Law, Sample

#: Slack on a sum before it counts as the next integer, relative to the sum: rounding, not evidence.
_ROUNDING = 1e-9
_TINY = float(np.finfo(np.float64).tiny)


class Sums(NamedTuple):
    """All that the sum-based tests see of the losses."""

    total: Floats  # (k,), of losses mapped to [0, 1]
    n: int
    delta: float


def hoeffding(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
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


def bentkus(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Bentkus' bound, ``e P(Bin(n, delta) <= ceil(sum))`` (Bentkus 2004; Learn then Test, Eq. 5).

    Parameters, returns and errors as in `hoeffding`. A sum within a relative 1e-9 above an integer counts as that integer:
    floating-point error must not cost a whole step. (This is the same as testing losses that are lower by at most 1e-9.)
    """
    return _test(_bentkus, losses, delta, lower, upper)


def hoeffding_bentkus(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """The smaller of Hoeffding's bound in its relative-entropy form and Bentkus' (CALM's own test).

    ``min(exp(-n h(min(mean, delta), delta)), e P(Bin(n, delta) <= ceil(sum)))`` with ``h(a, b) = a ln(a/b) + (1-a)
    ln((1-a)/(1-b))``. Both bounds hold at the same time with no correction, since each is a function of the same sum with
    nested rejection regions. Parameters, returns and errors as in `hoeffding`.
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
    """
    return _test(_convex_order, losses, delta, lower, upper)


def binomial(losses: ArrayLike, delta: float) -> float | Floats:
    """The exact test for 0/1 losses, ``P(Bin(n, delta) <= sum)``.

    Raises
    ------
    RiskcalError
        Beside the refusals of `hoeffding`, for a loss that is neither 0 nor 1.
    """
    counts = _validate.binary(losses)
    return _test(
        OF_SUMS["binomial"], counts if np.ndim(losses) == 2 else counts[:, 0], delta, 0.0, 1.0
    )


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
    A capital W starts at 1 and is multiplied by ``1 + bet (delta - loss)``. The bet is the hedge of an option that is worth
    ``p = W level / 1.15``: ``phi(z) / p / sqrt(r s2)`` with z the normal quantile of p and r the rows left, or, where what is
    left are few large losses (``r (delta - lower)^2 / s2`` of them: 5, or in part up to 20), of one on their Poisson number.
    It is at most ``0.99 / (upper - delta)``, never negative, and renewed every ``clip(r / 20, 1, 16)`` rows, always from
    earlier rows. The variance s2 is the running one about delta; where losses of the size seen (sum of squares over sum, from
    a tenth of a loss at the upper bound on) would have a larger one at mean delta, as after a quiet stretch, it is four fifths
    that. The running variance starts from 8 pseudo-observations at delta (1 - delta), or a twentieth of it where the bounds
    straddle zero (differences, mostly ties). Where the observed mean is not below delta, 1 is returned: only an order that
    follows the losses makes a bettor rich there, and a higher p-value is never wrong. Any stakes would be valid; these are the
    ones of ``benchmarks/power.py``.
    """
    level = _validate.level(level, "level")
    low, high = _validate.bounds(lower, upper)
    matrix, total = _matrix(losses, low, high)
    tolerated = _validate.tolerance(delta, low, high)
    prior = _prior_variance(tolerated, low, high)
    from riskcal import _kernels

    pvalues = np.exp(
        -_kernels.option_hedged_betting(
            matrix, tolerated, level=level, lower=low, upper=high, prior=prior
        )
    )
    pvalues[total >= len(matrix) * tolerated] = 1.0
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def _prior_variance(delta: float, lower: float, upper: float) -> float:
    """The variance that `betting` starts from: the largest at mean delta, a twentieth where losses are differences."""
    share = 0.05 if lower < 0.0 < upper else 1.0
    return float(max((delta - lower) * (upper - delta) * share, _TINY**0.5))


def empirical_bernstein(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Maurer and Pontil's empirical Bernstein bound (2009, Theorem 4), inverted: ``2 exp(-x)``.

    The x is the root of ``mean + sqrt(2 variance x / n) + 7 x / (3 (n - 1)) = delta``, on losses mapped to the unit
    interval, with the sample variance (n - 1 in the denominator): the smallest level at which their bound rejects. Free
    of the rows' order, but not monotone in the single losses. Worth it only where n is large and the variance small.
    Parameters, returns and errors as in `hoeffding`.
    """
    pvalues = _empirical_bernstein(*_moments(losses, delta, lower, upper))
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def predictable_bernstein(
    losses: ArrayLike, delta: float, *, level: float, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Predictable plug-in empirical Bernstein: one over the largest value of a supermartingale, in the order given.

    Parameters
    ----------
    losses : (n,) or (n, k)
        Rows in an order that does not depend on their content, as for `betting`.
    delta, lower, upper
        As in `hoeffding`.
    level : float
        The level at which this hypothesis will be tested, which the plug-in weights aim at.

    Returns
    -------
    float or (k,)
        Valid for any stopping whenever each row's mean given the earlier rows exceeds delta under H. Almost always above
        `betting`; its inversion is a closed form (`riskcal.bounds.predictable_bernstein`).

    Notes
    -----
    The process is ``exp(sum of b (delta - loss) + (loss - m)^2 (log(1 - b) + b))`` with the weight ``b = min(sqrt(2
    log(1 / level) / (n s2)), 1/2)`` and the mean m and variance s2 taken from the earlier rows (Waudby-Smith and Ramdas
    2024, Theorem 2, one-sided and for fixed n).
    """
    level = _validate.level(level, "level")
    low, high = _validate.bounds(lower, upper)
    matrix, _ = _matrix(losses, low, high)
    tolerated = _validate.tolerance(delta, low, high)
    from riskcal import _kernels

    unit = matrix if (low, high) == (0.0, 1.0) else (matrix - low) / (high - low)
    log_capital, _ = _kernels.predictable_bernstein(
        unit, (tolerated - low) / (high - low), level=level
    )
    pvalues = np.maximum(np.exp(-log_capital), _TINY)
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def clt(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Asymptotic, without any finite-sample guarantee: the one-sided z-test with the sample's standard deviation.

    ``Phi(sqrt(n) (mean - delta) / deviation)``, but never below ``((upper - delta) / (upper - lower))^n``, which is what
    the exact test of 0/1 losses answers to n zeros: nothing else keeps p from being 0 where the losses seen do not vary
    (five zeros at delta .01 give .951). It is wrong all the same where losses are rare: 30 losses that are 1 with
    probability .1 are rejected at delta .1 in .18 of draws at a nominal .05, losses just below delta but for a rare 1
    nearly always. For comparison; nothing in riskcal uses it by default. Parameters and errors as in `hoeffding`.

    Returns
    -------
    float or (k,)
        Super-uniform under H only in the limit of many rows.
    """
    mean, deviation, tolerated, n = _moments(losses, delta, lower, upper)
    z = math.sqrt(n) * (mean - tolerated) / np.maximum(deviation, 1e-200)
    pvalues = np.maximum(special.ndtr(z), (1.0 - tolerated) ** n)
    pvalues = np.maximum(pvalues, _TINY)
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def sample_size(
    test: str, mean: float, deviation: float, delta: float, level: float, *, power: float = 0.8
) -> int:
    """How many units a test needs to reject at ``level`` with this power, on losses mapped to the unit interval.

    Found by simulating the test itself (seeded, so that the answer is always the same) on losses that follow the beta law
    of this mean and deviation, which is 0 and 1 alone where the deviation is the largest possible. The power at the size
    returned is within .05 of what was asked; where it jumps, as for losses that do not vary, it may be above. Another law
    of the same mean and deviation needs another number: `riskcal.plan` takes observed losses.

    Parameters
    ----------
    test : str
        A sum-based test's name, ``"betting"`` or ``"empirical_bernstein"``.
    mean, deviation : float
        Of one unit's loss; the mean below delta, and no deviation above ``sqrt(mean (1 - mean))`` is possible.

    Returns
    -------
    int
        At most 2^20, beyond any calibration set: that many are not known to be enough.
    """
    from riskcal import _simulation

    law = _simulation.of_moments(mean, min(deviation, math.sqrt(mean * (1.0 - mean))))
    delta = min(delta, 1.0 - 2.0**-53)
    rough = _rough_size(mean, float(law.deviation[0]), delta, level, power)

    def share(n: int) -> float:
        return _share_rejected(test, law, n, delta, level, lower=0.0, upper=1.0)

    found = _simulation.smallest(share, power, rough)
    return _simulation.LARGEST if found is None else found[0]


def _rough_size(
    mean: float, deviation: float, delta: float, level: float, power: float, *, width: float = 1.0
) -> float:
    """Where to begin the search: the normal approximation, and what the largest bet needs if no loss comes.

    ``mean`` and ``delta`` count from the losses' lower bound.
    """
    gap = delta - mean
    if gap <= 0.0:
        return math.inf
    noise = (special.ndtri(power) - special.ndtri(level)) * deviation / gap
    return float(noise**2 - math.log(level) / math.log1p(gap / (width - delta)))


def _share_rejected(
    test: str, law: "Law", n: int, delta: float, level: float, *, lower: float, upper: float
) -> float:
    """Of simulated samples of n units from a law of one column, the share in which H is rejected at ``level``."""
    from riskcal import _simulation

    moved = np.array([delta])
    if test == "betting":
        law, moved, n = _simulation.scaled(law, moved, n, np.array([upper]))
    rejected = []
    for _, sample in law.samples(n, ordered=test == "betting"):
        p = _of_sample(
            test,
            sample,
            0,
            np.arange(sample.draws),
            float(moved[0]),
            level,
            lower=lower,
            upper=upper,
        )
        rejected.append(p <= level)
    return float(np.concatenate(rejected).mean())


def _of_sample(
    test: str,
    sample: "Sample",
    column: int,
    of: NDArray[np.intp],
    delta: float,
    level: float,
    *,
    lower: float,
    upper: float,
) -> Floats:
    """P-values of one column of simulated losses in the draws ``of``."""
    if test == "betting":
        return np.asarray(
            betting(sample.rows(column, of), delta, level=level, lower=lower, upper=upper)
        )
    n, width = sample.n, upper - lower
    tolerated, totals = (delta - lower) / width, (sample.totals(column)[of] - n * lower) / width
    if test == "empirical_bernstein":
        squares = (
            sample.totals(column, power=2)[of] - 2.0 * lower * width * totals - n * lower**2
        ) / width**2
        variance = np.maximum(squares - totals**2 / n, 0.0) / (n - 1)
        return _empirical_bernstein(totals / n, np.sqrt(variance), tolerated, n)
    return _finish(OF_SUMS[test], Sums(np.clip(totals, 0.0, n), n, tolerated))


def _matrix(losses: ArrayLike, lower: float, upper: float) -> tuple[Floats, Floats]:
    """Checked losses as C-ordered (n, k), and their column sums, in one pass where nothing is wrong."""
    from riskcal import _kernels

    values = _validate.as_given(losses, "losses", "an array of numbers")
    if (
        values.dtype.kind in "fbiu"
        and values.ndim in (1, 2)
        and values.shape[0] > 1
        and values.size
    ):
        matrix = np.ascontiguousarray(values, dtype=np.float64).reshape(len(values), -1)
        total, smallest, largest = _kernels.column_summary(matrix)
        if smallest >= lower and largest <= upper and np.isfinite(total).all():
            return matrix, total
    matrix = np.ascontiguousarray(
        _validate.losses(values, lower=lower, upper=upper)
    )  # says what is wrong, or clips
    return matrix, matrix.sum(0)


def _moments(
    losses: ArrayLike, delta: float, lower: float, upper: float
) -> tuple[Floats, Floats, float, int]:
    """Each column's mean and standard deviation, delta, all mapped to the unit interval, and n."""
    low, high = _validate.bounds(lower, upper)
    tolerated = _validate.tolerance(delta, low, high)
    matrix, total = _matrix(losses, low, high)
    from riskcal import _kernels

    n, width, mean = len(matrix), high - low, total / len(matrix)
    deviation = _kernels.sample_deviation(matrix, mean)
    return (mean - low) / width, deviation / width, (tolerated - low) / width, n


def _empirical_bernstein(mean: Floats, deviation: Floats, delta: float, n: int) -> Floats:
    gap = np.maximum(delta - mean, 0.0)
    linear, slope = deviation * math.sqrt(2.0 / n), 7.0 / (3.0 * (n - 1))
    root = 2.0 * gap / np.maximum(linear + np.sqrt(linear**2 + 4.0 * slope * gap), _TINY)
    return np.clip(2.0 * np.exp(-(root**2)), _TINY, 1.0)


def _sums(losses: ArrayLike, delta: float, lower: float, upper: float) -> Sums:
    low, high = _validate.bounds(lower, upper)
    tolerated = _validate.tolerance(delta, low, high)
    matrix, total = _matrix(
        losses, low, high
    )  # sums, never n * mean: 100 * (7 / 100) is above 7 in floating point
    n = len(matrix)
    if (low, high) != (0.0, 1.0):
        total = (total - n * low) / (high - low)
        tolerated = min(
            max((tolerated - low) / (high - low), _TINY), 1.0 - 2.0**-53
        )  # never rounded to 0 or 1
    return Sums(np.clip(total, 0.0, n), n, tolerated)


def _binomial(s: Sums) -> Floats:
    return _binomial_cdf(s.total, s)


def _hoeffding(s: Sums) -> Floats:
    return np.exp(-2.0 * s.n * np.maximum(0.0, s.delta - s.total / s.n) ** 2)


def _bentkus(s: Sums) -> Floats:
    return np.minimum(
        1.0, math.e * _binomial_cdf(np.ceil(s.total - _ROUNDING * np.maximum(s.total, 1.0)), s)
    )


def _hoeffding_bentkus(s: Sums) -> Floats:
    mean = np.minimum(s.total / s.n, s.delta)
    entropy = special.xlogy(mean, mean / s.delta) + special.xlogy(
        1.0 - mean, (1.0 - mean) / (1.0 - s.delta)
    )
    smaller: Floats = np.minimum(np.exp(-s.n * entropy), _bentkus(s))
    return smaller


def _convex_order(s: Sums) -> Floats:
    from riskcal import _kernels

    mode = min(math.floor((s.n + 1) * s.delta), s.n)
    log_mode = -math.log(s.n + 1) - special.betaln(s.n - mode + 1, mode + 1)
    log_mode += special.xlogy(mode, s.delta) + special.xlog1py(s.n - mode, -s.delta)
    upto, shortfall = _kernels.binomial_shortfall(s.n, s.delta, float(log_mode))
    t = np.arange(1.0, s.n + 1.0)
    # the bound falls from t to t + 1 if and only if sum > t - shortfall / upto, which is nondecreasing in t
    stop = t - np.divide(shortfall, upto, out=np.zeros(s.n), where=upto > 0)
    best = np.searchsorted(stop, s.total).clip(np.floor(s.total), s.n - 1).astype(np.intp)
    room = t[best] - s.total
    bound: Floats = np.divide(
        shortfall[best], room, out=np.ones_like(room), where=room > shortfall[best]
    )
    return bound


def _binomial_cdf(count: Floats, s: Sums) -> Floats:
    """P(Bin(n, delta) <= count) by the incomplete beta function, accurate far into the tail; each count once."""
    distinct, where = np.unique(np.clip(count, 0, s.n), return_inverse=True)
    inside = np.minimum(distinct, s.n - 1)
    return np.where(
        distinct >= s.n, 1.0, special.betainc(s.n - inside, inside + 1.0, 1.0 - s.delta)
    )[where]


def _finish(test: Callable[[Sums], Floats], s: Sums) -> Floats:
    pvalues = np.clip(test(s), _TINY, 1.0)
    return pvalues if test is _binomial else np.where(s.total >= s.n * s.delta, 1.0, pvalues)


def _test(
    test: Callable[[Sums], Floats], losses: ArrayLike, delta: float, lower: float, upper: float
) -> float | Floats:
    pvalues = _finish(test, _sums(losses, delta, lower, upper))
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


#: The tests that depend on the losses through their sum alone, as functions of it.
OF_SUMS: dict[str, Callable[[Sums], Floats]] = {
    "hoeffding": _hoeffding,
    "bentkus": _bentkus,
    "hoeffding_bentkus": _hoeffding_bentkus,
    "convex_order": _convex_order,
    "binomial": _binomial,
}


from riskcal.pvalues.methods import BY_NAME as BY_NAME  # noqa: E402  # they call the functions above
from riskcal.pvalues.methods import Bentkus as Bentkus  # noqa: E402
from riskcal.pvalues.methods import Betting as Betting  # noqa: E402
from riskcal.pvalues.methods import Binomial as Binomial  # noqa: E402
from riskcal.pvalues.methods import ConvexOrder as ConvexOrder  # noqa: E402
from riskcal.pvalues.methods import EmpiricalBernstein as EmpiricalBernstein  # noqa: E402
from riskcal.pvalues.methods import Hoeffding as Hoeffding  # noqa: E402
from riskcal.pvalues.methods import HoeffdingBentkus as HoeffdingBentkus  # noqa: E402
from riskcal.pvalues.methods import Method as Method  # noqa: E402
from riskcal.pvalues.methods import named as named  # noqa: E402
