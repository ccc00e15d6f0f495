"""`plan`: how many prompts a certificate needs, found by simulating the very test. Guarantees nothing."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _simulation, _validate, pvalues
from riskcal._simulation import Law
from riskcal._validate import RiskcalError
from riskcal.pvalues.sampled import rough_size, share_rejected


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes
    ----------
    prompts : int or None
        How many independent prompts certify ``delta`` with the wanted power, if the losses follow ``law``; None where more
        than 2^20, about a million, would be needed.
    share : float
        Of simulated samples of that many prompts, the share that certifies. Within .02 of ``power``, except where it jumps
        from one sample size to the next; NaN without ``prompts``.
    law : str
        What the losses were drawn from.
    smallest_delta : float or None
        The smallest delta that ``n`` prompts support with that power; None where n was not given, and ``upper`` where they
        support none.
    delta, epsilon, power, test
        As they were asked for.
    mean, deviation : float
        Of the law, in the losses' own units.
    """

    prompts: int | None
    share: float
    law: str
    smallest_delta: float | None
    delta: float
    epsilon: float
    mean: float
    deviation: float
    power: float
    test: str

    def __str__(self) -> str:
        number = "More than a million" if self.prompts is None else f"About {self.prompts}"
        text = (
            f"{number} prompts certify delta {self.delta:g} (epsilon {self.epsilon:g}, {self.test}) in "
            f"{self.power if self.prompts is None else self.share:.0%} of draws, if the losses are {self.law}."
        )
        if self.smallest_delta is None:
            return text
        return text + f" The prompts at hand support a delta of about {self.smallest_delta:.3g}."


def plan(
    delta: float,
    epsilon: float = 0.05,
    *,
    mean: float | None = None,
    deviation: float | None = None,
    losses: ArrayLike | None = None,
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
        Expected loss of the candidate that should be certified; below delta.
    deviation : float, optional
        Standard deviation of one prompt's loss. Default: the largest that losses in [lower, upper] of this mean can have,
        which is that of losses at the two bounds alone.
    losses : (n,), optional
        One loss per prompt of a pilot, in place of ``mean`` and ``deviation``: the sample is then drawn from these.
    n : int, optional
        Also report the smallest delta that this many prompts support.
    test : {"betting", "convex_order", "hoeffding_bentkus", "bentkus", "hoeffding", "binomial", "empirical_bernstein"}
    power : float
        Share of samples in which the certificate should be issued.
    lower, upper : float
        The losses' known bounds.

    Returns
    -------
    Plan

    Raises
    ------
    RiskcalError
        If the mean is not in [lower, delta), the deviation is impossible, the test is unknown, or both or neither of
        ``mean`` and ``losses`` are given.

    Notes
    -----
    By simulation of the test, seeded, so that the same question has the same answer. From a mean and a deviation the losses
    drawn are beta distributed on [lower, upper]; at the largest deviation they are at the bounds alone. The true power at
    the size found is within .05 of ``share`` for that law; for betting beyond some 100,000 prompts, which are simulated on a
    smaller problem of nearly the same power, within .1. Pilot prompts that were used here must not be tested afterwards,
    and a pilot's losses are themselves a draw: a mean that is low by luck makes the plan too small.

    Examples
    --------
    >>> print(riskcal.plan(delta=0.05, mean=0.03, n=200))
    About 636 prompts certify delta 0.05 (epsilon 0.05, betting) in 80% of draws, if the losses are 0 or 1 with
    mean 0.03. The prompts at hand support a delta of about 0.071.
    """
    low, high = _validate.bounds(lower, upper)
    width, tolerated = high - low, _validate.tolerance(delta, low, high)
    level, power = _validate.level(epsilon, "epsilon"), _validate.level(power, "power")
    method = pvalues.BY_NAME[_validate.choice(test, "test", pvalues.BY_NAME)]
    method.refuse_bounds(low, high, "test", test)
    law, told = _stated(mean, deviation, losses, low, high, test)
    expected, spread = float(law.mean[0]), float(law.deviation[0])
    if not low <= expected < tolerated:
        raise RiskcalError(
            f"{'mean' if losses is None else 'losses'}: {expected:g} is not in [{low:g}, {tolerated:g}); a candidate whose "
            "mean is not below delta is never certified. Give a larger delta, or a safer candidate."
        )
    known = {"lower": low, "upper": high}

    def share(size: int, at: float = tolerated) -> float:
        return share_rejected(method, law, size, at, level, **known)

    guess = rough_size(expected - low, spread, tolerated - low, level, power, width=width)
    found = _simulation.smallest(share, power, guess)
    smallest = None
    if n is not None:
        available = _validate.count(n, "n", least=2)
        below, above = expected, high
        while above - below > 1e-4 * (above - expected) + 1e-9 * width:
            middle = 0.5 * (below + above)
            below, above = (below, middle) if share(available, middle) >= power else (middle, above)
        smallest = above
    return Plan(
        prompts=None if found is None else found[0],
        share=math.nan if found is None else found[1],
        law=told,
        smallest_delta=smallest,
        delta=tolerated,
        epsilon=level,
        mean=expected,
        deviation=spread,
        power=power,
        test=test,
    )


def _stated(
    mean: float | None,
    deviation: float | None,
    losses: ArrayLike | None,
    low: float,
    high: float,
    test: str,
) -> tuple[Law, str]:
    """The law to draw from, in the losses' own units, and its description."""
    if (mean is None) == (losses is None):
        raise RiskcalError(
            "mean, losses: give one of them, the expected loss or the losses of a pilot."
        )
    if losses is not None:
        if deviation is not None:
            raise RiskcalError("deviation: the pilot's losses have their own; leave it out.")
        if np.ndim(losses) != 1:
            raise RiskcalError(
                f"losses: has shape {np.shape(losses)}; give one candidate's, one loss per prompt."
            )
        rows = (
            _validate.binary(losses)
            if test == "binomial"
            else _validate.losses(losses, lower=low, upper=high)
        )
        law = _simulation.of_rows(rows)
        return law, f"distributed as the {len(rows)} given, whose mean is {law.mean[0]:.4g}"
    mean = _validate.number(mean, "mean")
    expected = (mean - low) / (high - low)
    if not 0.0 <= expected < 1.0:
        raise RiskcalError(f"mean: {mean:g} is not in [{low:g}, {high:g}).")
    widest = math.sqrt(expected * (1.0 - expected))
    spread = (
        widest if deviation is None else _validate.number(deviation, "deviation") / (high - low)
    )
    if not 0.0 <= spread <= widest + _validate.TOLERANCE:
        raise RiskcalError(
            f"deviation: {deviation} is not possible with mean {mean:g} in [{low:g}, {high:g}]; it is at most "
            f"{widest * (high - low):.4g}."
        )
    if test == "binomial" and spread < widest * (1.0 - 1e-6):
        raise RiskcalError(
            "deviation: 'binomial' is for 0/1 losses, which have the largest; leave it out."
        )
    unit = _simulation.of_moments(expected, spread)
    law = Law(low + (high - low) * unit.values, unit.share)
    if len(unit.values) == 2 and unit.share > 0.0:
        return law, f"{low:g} or {high:g} with mean {mean:g}"
    told = f"of mean {mean:g} and standard deviation {spread * (high - low):.3g}"
    return law, f"{'beta distributed, ' * (unit.share > 0.0)}{told}"
