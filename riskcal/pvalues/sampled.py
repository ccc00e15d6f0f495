"""How many units a test needs, by simulating it."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import special

from riskcal._validate import Floats
from riskcal.pvalues.bernstein import _empirical_bernstein
from riskcal.pvalues.bettor import betting
from riskcal.pvalues.sums import OF_SUMS, Sums, pvalues_of

if TYPE_CHECKING:
    from riskcal._simulation import Law, Sample


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

    Examples
    --------
    >>> tests = ("betting", "hoeffding")
    >>> [riskcal.pvalues.sample_size(t, mean=0.05, deviation=0.1, delta=0.1, level=0.05) for t in tests]
    [82, 685]
    """
    from riskcal import _simulation

    law = _simulation.of_moments(mean, min(deviation, math.sqrt(mean * (1.0 - mean))))
    delta = min(delta, 1.0 - 2.0**-53)
    rough = rough_size(mean, float(law.deviation[0]), delta, level, power)

    def share(n: int) -> float:
        return share_rejected(test, law, n, delta, level, lower=0.0, upper=1.0)

    found = _simulation.smallest(share, power, rough)
    return _simulation.LARGEST if found is None else found[0]


def rough_size(
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


def share_rejected(
    test: str, law: "Law", n: int, delta: float, level: float, *, lower: float, upper: float
) -> float:
    """Of simulated samples of n units from a law of one column, the share in which H is rejected at ``level``."""
    from riskcal import _simulation

    moved = np.array([delta])
    if test == "betting":
        law, moved, n = _simulation.scaled(law, moved, n, np.array([upper]))
    rejected = []
    for _, sample in law.samples(n, ordered=test == "betting"):
        p = of_sample(
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


def of_sample(
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
    return pvalues_of(OF_SUMS[test], Sums(np.clip(totals, 0.0, n), n, tolerated))
