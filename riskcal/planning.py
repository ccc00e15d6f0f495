"""How many prompts a certificate needs, and how small a delta a number of prompts supports. Guides, guarantees nothing."""

import math
from dataclasses import dataclass

from riskcal import _validate, pvalues
from riskcal._validate import RiskcalError


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes
    ----------
    prompts : int
        About how many independent prompts certify ``delta`` with the wanted power, if mean and deviation are as assumed.
    smallest_delta : float or None
        About the smallest delta that ``n`` prompts support with that power; None where n was not given.
    """

    prompts: int
    smallest_delta: float | None
    delta: float
    epsilon: float
    mean: float
    deviation: float
    power: float
    test: str

    def __str__(self) -> str:
        text = (
            f"About {self.prompts} prompts certify delta {self.delta:g} (epsilon {self.epsilon:g}, {self.test}) in "
            f"{self.power:.0%} of draws, if the loss has mean {self.mean:g} and standard deviation {self.deviation:.3g}."
        )
        if self.smallest_delta is None:
            return text
        return text + f" The prompts at hand support a delta of about {self.smallest_delta:.3g}."


def plan(
    delta: float,
    epsilon: float = 0.05,
    *,
    mean: float,
    deviation: float | None = None,
    n: int | None = None,
    test: str = "betting",
    power: float = 0.8,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Plan:
    """Size a calibration sample before recording it.

    Parameters
    ----------
    delta, epsilon : float
        As in `riskcal.calibrate`; for Bonferroni or Holm over k candidates give ``epsilon / k``.
    mean : float
        Expected loss of the candidate that should be certified, from a pilot; below delta.
    deviation : float, optional
        Standard deviation of one prompt's loss. Default: the largest that losses in [lower, upper] of this mean can have.
    n : int, optional
        Also report the smallest delta that this many prompts support.
    test : {"betting", "convex_order", "hoeffding_bentkus", "bentkus", "hoeffding", "binomial", "empirical_bernstein"}
    power : float
        Share of samples in which the certificate should be issued.

    Returns
    -------
    Plan

    Raises
    ------
    RiskcalError
        If the mean is not in [lower, delta), or the test is unknown.

    Notes
    -----
    By the normal approximation of the sample mean. Pilot prompts that were used here must not be tested afterwards.
    """
    low, high = _validate.bounds(lower, upper)
    tolerated = (_validate.tolerance(delta, low, high) - low) / (high - low)
    level, power = _validate.level(epsilon, "epsilon"), _validate.level(power, "power")
    _validate.choice(test, "test", (*pvalues.OF_SUMS, "betting", "empirical_bernstein"))
    expected = (_validate.number(mean, "mean") - low) / (high - low)
    if not 0 <= expected < tolerated:
        raise RiskcalError(
            f"mean: {mean:g} is not in [{low:g}, {delta:g}); a candidate whose mean is not below delta is never certified."
        )
    widest = math.sqrt(expected * (1 - expected))
    spread = widest if deviation is None else _validate.number(deviation, "deviation") / (high - low)
    if not 0 <= spread <= widest + _validate.TOLERANCE:
        raise RiskcalError(f"deviation: {deviation} is not possible with mean {mean:g} in [{low:g}, {high:g}].")

    def needed(candidate: float) -> int:
        return pvalues.sample_size(test, expected, spread, candidate, level, power=power)

    smallest = None
    if n is not None:
        available = _validate.count(n, "n", least=2)
        below, above = expected, 1.0
        while above - below > 1e-6:
            middle = (below + above) / 2
            below, above = (below, middle) if needed(middle) <= available else (middle, above)
        smallest = low + above * (high - low)
    return Plan(
        prompts=needed(tolerated),
        smallest_delta=smallest,
        delta=float(delta),
        epsilon=level,
        mean=float(mean),
        deviation=spread * (high - low),
        power=power,
        test=test,
    )
