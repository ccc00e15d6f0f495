"""How many units a test needs, by simulating it."""

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.pvalues.methods import BY_NAME, Method

if TYPE_CHECKING:
    from riskcal._simulation import Law

#: How far below the largest, relative to it, a deviation may be that somebody wrote with few digits.
_ROUNDED = 1e-3


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
        The name of a test that `riskcal.calibrate` takes.
    mean, deviation : float
        Of one unit's loss; the mean below delta, and no deviation above ``sqrt(mean (1 - mean))`` is possible.
    delta : float
        Tolerated expected loss, at most 1.
    level : float
        At which the hypothesis is tested: epsilon, or this one's share of it.
    power : float
        Share of samples in which it should be rejected.

    Returns
    -------
    int
        At most 2^20, beyond any calibration set: that many are not known to be enough.

    Raises
    ------
    RiskcalError
        For another test, a mean that is not in [0, delta), a delta above 1, a negative deviation (for ``"binomial"`` any but
        that of losses of 0 or 1, ``sqrt(mean (1 - mean))``), and a level or power that is not between 0 and 1.

    Examples
    --------
    >>> tests = ("betting", "hoeffding")
    >>> [riskcal.pvalues.sample_size(t, mean=0.05, deviation=0.1, delta=0.1, level=0.05) for t in tests]
    [82, 685]
    """
    from riskcal import _simulation

    method = BY_NAME[_validate.choice(test, "test", BY_NAME)]
    level, power = _validate.level(level, "level"), _validate.level(power, "power")
    delta = _validate.number(delta, "delta")
    if not 0.0 < delta <= 1.0:
        raise RiskcalError(f"delta: {delta:g} is not in (0, 1]; losses are mapped to [0, 1].")
    mean, deviation = _validate.number(mean, "mean"), _validate.number(deviation, "deviation")
    if not 0.0 <= mean < delta:
        raise RiskcalError(
            f"mean: {mean:g} is not in [0, {delta:g}); what is not below delta is never certified."
        )
    if deviation < 0.0:
        raise RiskcalError(f"deviation: {deviation:g} is below 0.")
    widest = math.sqrt(mean * (1.0 - mean))
    if test == "binomial":
        if deviation < widest * (1.0 - _ROUNDED):
            raise RiskcalError(
                f"deviation: 'binomial' is for losses of 0 or 1, whose deviation at mean {mean:g} is {widest:.4g}; give that."
            )
        deviation = widest
    law = _simulation.of_moments(mean, min(deviation, widest))
    delta = min(delta, 1.0 - 2.0**-53)
    rough = rough_size(mean, float(law.deviation[0]), delta, level, power)

    def share(n: int) -> float:
        return share_rejected(method, law, n, delta, level, lower=0.0, upper=1.0)

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
    test: Method, law: "Law", n: int, delta: float, level: float, *, lower: float, upper: float
) -> float:
    """Of simulated samples of n units from a law of one column, the share in which H is rejected at ``level``."""
    from riskcal import _simulation

    moved = np.array([delta])
    ordered = not test.of_totals_alone
    if ordered:
        law, moved, n = _simulation.scaled(law, moved, n, np.array([upper]))
    rejected = []
    for _, sample in law.samples(n, ordered=ordered):
        draws = np.arange(sample.draws)
        p = test.simulated(sample, 0, draws, float(moved[0]), level, lower=lower, upper=upper)
        rejected.append(p <= level)
    return float(np.concatenate(rejected).mean())
