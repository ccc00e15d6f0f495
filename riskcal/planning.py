"""How many prompts a certificate needs, found by simulating the very test, procedure and order. Guarantees nothing.

`plan` draws from a law that is stated beforehand. `outlook` is what a calibration says that certified nothing: it draws
from the losses that were observed, all candidates of a prompt together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _problem, _simulation, _validate, pvalues
from riskcal._problem import Problem, Risk
from riskcal._simulation import Law, Sample
from riskcal._validate import Floats, RiskcalError

#: In how many draws a sample should certify.
_POWER = 0.8
#: An observed mean is beyond chance above delta where a test of the opposite hypothesis rejects at this level.
_CHANCE = 0.05


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
    """
    low, high = _validate.bounds(lower, upper)
    width, tolerated = high - low, _validate.tolerance(delta, low, high)
    level, power = _validate.level(epsilon, "epsilon"), _validate.level(power, "power")
    _validate.choice(test, "test", (*pvalues.OF_SUMS, "betting", "empirical_bernstein"))
    if test == "binomial" and (low, high) != (0.0, 1.0):
        raise RiskcalError(
            f"test: 'binomial' is for 0/1 losses, but these lie in [{low:g}, {high:g}]; use betting."
        )
    law, told = _stated(mean, deviation, losses, low, high, test)
    expected, spread = float(law.mean[0]), float(law.deviation[0])
    if not low <= expected < tolerated:
        raise RiskcalError(
            f"{'mean' if losses is None else 'losses'}: {expected:g} is not in [{low:g}, {tolerated:g}); a candidate whose "
            "mean is not below delta is never certified. Give a larger delta, or a safer candidate."
        )
    known = {"lower": low, "upper": high}

    def share(size: int, at: float = tolerated) -> float:
        return pvalues._share_rejected(test, law, size, at, level, **known)

    guess = pvalues._rough_size(expected - low, spread, tolerated - low, level, power, width=width)
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
    expected = (_validate.number(mean, "mean") - low) / (high - low)
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


@dataclass(frozen=True)
class Design:
    """How candidates are tested.

    ``levels`` (k,) is where betting is tuned, ``first`` (k,) the p-value with which a candidate is certified before any
    other is: 0 for those that come later. With ``step_up``, the level of Hochberg's procedure, ``first`` is not used.
    With ``pilot``, a share of the units, that many choose the one candidate that is tested first.
    """

    test: str
    levels: Floats
    first: Floats
    step_up: float | None = None
    pilot: float | None = None

    @classmethod
    def of(
        cls,
        test: str,
        procedure: str,
        epsilon: float,
        levels: Floats,
        *,
        starts: int = 1,
        weights: ArrayLike | None = None,
        pilot_fraction: float | None = None,
    ) -> "Design":
        """The design of one of the procedures of `riskcal.calibrate`, or of ``"simultaneous"`` bounds."""
        k = len(levels)
        if procedure == "fixed_sequence":
            first = np.zeros(k)
            first[np.arange(starts) * k // starts] = epsilon / starts
            return cls(test, levels, first)
        if procedure in ("pilot_order", "pareto"):
            return cls(test, levels, np.full(k, epsilon), pilot=pilot_fraction)
        if procedure in ("fallback", "graphical"):
            return cls(test, levels, epsilon * np.asarray(weights, dtype=np.float64))
        return cls(
            test,
            levels,
            np.full(k, epsilon / k),
            step_up=epsilon if procedure == "hochberg" else None,
        )


def outlook(problem: Problem, design: Design, meaning: dict[str, str]) -> str:
    """What is known after nothing was certified, and what would help: the rest of a calibration's message.

    ``problem`` holds all units, those of a pilot too, and the candidates in tested order (with a pilot: in the order that
    breaks ties).
    """
    excess = np.array(
        [(risk.losses.mean(0) - risk.delta) / risk.width for risk in problem.risks]
    )  # (r, k)
    worst = excess.max(0)
    begins = design.first > 0.0
    if not ((worst < 0.0) & begins).any():
        return _above(problem, worst, begins, meaning)
    found = sample_size(problem, design)
    sequence = begins.sum() == 1
    named = int(begins.argmax()) if sequence else int(np.where(begins, worst, math.inf).argmin())
    risk = problem.risks[int(excess[:, named].argmax())]
    subject = (
        f"{'The first candidate tested' if sequence else 'The safest candidate'}, {problem.name(named)}, has an observed "
        f"{meaning[risk.name]} of {problem.mean(risk)[named]:.4g}; "
    )
    condition = "if losses are distributed as those observed"
    if found is None:
        return subject + (
            f"{condition}, more than a million fresh {problem.unit} would be needed to certify anything: raise delta, or "
            "record safer candidates."
        )
    what = "certifies it" if sequence else "certifies at least one candidate"
    return subject + (
        f"a fresh sample of about {found[0]} {problem.unit}, tested in the same way, {what} in {_often(found[1])}, "
        f"{condition}. Testing these data again, or more of the same pool, is a new attempt that this epsilon does not cover."
    )


def sample_size(problem: Problem, design: Design) -> tuple[int, float] | None:
    """How many fresh units, distributed as those observed, certify something in four draws of five; and in what share.

    None if more than `riskcal._simulation.LARGEST` are needed.
    """
    trial = _Trial.of(problem, design)
    return _simulation.smallest(trial.share, _POWER, trial.guess())


@dataclass(frozen=True)
class _Trial:
    """A calibration that can be repeated on samples of any size from a law."""

    design: Design
    risks: tuple[Risk, ...]
    law: Law  # columns: risk by candidate
    delta: Floats  # (r, k)
    hopeful: NDArray[
        np.intp
    ]  # candidates whose mean is below every delta, those that need fewest units first
    counted: dict[
        int, tuple[float, float]
    ]  # the two values of columns whose p-value is never below their count's

    @classmethod
    def of(cls, problem: Problem, design: Design) -> "_Trial":
        law = _simulation.of_rows(np.concatenate([risk.losses for risk in problem.risks], axis=1))
        delta = np.repeat([[risk.delta] for risk in problem.risks], problem.k, axis=1)
        shape = delta.shape
        below = (law.mean.reshape(shape) < delta).all(0) & (
            (design.first > 0.0) | (design.step_up is not None)
        )
        losses = [column for risk in problem.risks for column in risk.losses.T]
        capped = problem.nameless and design.test == "betting"
        found = {c: _problem.two_values(column) for c, column in enumerate(losses) if capped}
        counted = {c: values for c, values in found.items() if values is not None}
        trial = cls(design, problem.risks, law, delta, np.flatnonzero(below), counted)
        return replace(trial, hopeful=trial.hopeful[np.argsort(trial._rough(), kind="stable")])

    def guess(self) -> float:
        return float(self._rough().min()) / (1.0 - (self.design.pilot or 0.0))

    def _rough(self) -> Floats:
        shape = self.delta.shape
        mean, deviation = self.law.mean.reshape(shape), self.law.deviation.reshape(shape)
        return np.array(
            [
                max(
                    pvalues._rough_size(
                        mean[r, j] - risk.lower,
                        deviation[r, j],
                        risk.delta - risk.lower,
                        self.design.levels[j],
                        _POWER,
                        width=risk.width,
                    )
                    for r, risk in enumerate(self.risks)
                )
                for j in self.hopeful
            ]
        )

    def share(self, n: int) -> float:
        """Of samples of n units, the share in which something is certified."""
        pilot = math.ceil((self.design.pilot or 0.0) * n)
        if n - pilot < 2 or (self.design.pilot and pilot < 2):
            return 0.0
        return float(np.concatenate(list(self._certified(n, pilot))).mean())

    def _certified(self, n: int, pilot: int) -> Iterator[NDArray[np.bool_]]:
        law, delta, walks = self.law, self.delta, self.design.test == "betting"
        if walks:
            upper = np.repeat([risk.upper for risk in self.risks], delta.shape[1])
            law, moved, size = _simulation.scaled(law, delta.ravel(), n, upper)
            delta, pilot, n = moved.reshape(delta.shape), math.ceil(pilot * size / n), size
        for chooses, sample in law.samples(n, pilot=pilot, ordered=walks):
            tested = np.ones((sample.draws, delta.shape[1]), dtype=bool)
            if chooses is not None:
                tested = np.arange(delta.shape[1]) == self._safest(chooses, delta)[:, None]
            yield self._rejects(sample, delta, tested)

    def _safest(self, pilot: Sample, delta: Floats) -> NDArray[np.intp]:
        """Which candidate each draw's pilot finds the furthest below its tolerances, relative to the losses' ranges."""
        worst = np.full((pilot.draws, delta.shape[1]), -math.inf)
        for r, risk in enumerate(self.risks):
            totals = np.stack(
                [pilot.totals(r * delta.shape[1] + j) for j in range(delta.shape[1])], axis=1
            )
            worst = np.maximum(worst, (totals / pilot.n - delta[r]) / risk.width)
        chosen: NDArray[np.intp] = worst.argmin(1)
        return chosen

    def _rejects(
        self, sample: Sample, delta: Floats, tested: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """In which draws something is certified, if these candidates are tested (draws, k)."""
        k, step_up = delta.shape[1], self.design.step_up
        p, done = np.ones(tested.shape), np.zeros(sample.draws, dtype=bool)
        for j in self.hopeful:
            of = np.flatnonzero(tested[:, j] & ~done)
            for r, risk in enumerate(self.risks):
                level, known = (
                    float(self.design.levels[j]),
                    {"lower": risk.lower, "upper": risk.upper},
                )
                if of.size:
                    found = pvalues._of_sample(
                        self.design.test, sample, r * k + j, of, float(delta[r, j]), level, **known
                    )
                    if r * k + j in self.counted:
                        low, high = self.counted[r * k + j]
                        counts = np.rint(
                            (sample.totals(r * k + j)[of] - sample.n * low) / (high - low)
                        )
                        exact = _problem.count_pvalue(
                            counts, sample.n, (low, high), float(delta[r, j])
                        )
                        found = np.maximum(found, exact)
                    p[of, j] = np.where(r > 0, np.maximum(p[of, j], found), found)
            if step_up is None:
                done[of] = p[of, j] <= self.design.first[j]
        if step_up is None:
            return done
        any_: NDArray[np.bool_] = np.any(np.sort(p, axis=1) <= step_up / (k - np.arange(k)), axis=1)
        return any_


def _often(share: float) -> str:
    if abs(share - _POWER) <= 0.04:
        return "four draws of five"
    return f"{100 * share:.0f} draws of 100"


def _above(
    problem: Problem, worst: Floats, begins: NDArray[np.bool_], meaning: dict[str, str]
) -> str:
    """What to say where no candidate that could be certified first is observed below delta."""
    first = int(np.where(begins, worst, math.inf).argmin())
    risk = max(problem.risks, key=lambda r: (r.losses[:, first].mean() - r.delta) / r.width)
    observed = f"observed {meaning[risk.name]} is {problem.mean(risk)[first]:.4g}"
    beyond = all(_beyond_chance(problem, j) for j in np.flatnonzero(begins).tolist())
    chance = f"not below delta, but by no more than chance explains in {problem.n} {problem.unit}"
    if not (worst < 0.0).any():
        if beyond:
            return (
                f"Even the safest candidate's {observed}, so more {problem.unit} alone will not help: raise delta, record "
                "higher thresholds, or train the model for early exit."
            )
        return (
            f"The safest candidate's {observed}: {chance}. Its true mean may lie below delta, and then a larger fresh sample "
            "would certify it, or above, and then none will; these data do not say which. What helps in either case: raise "
            "delta, or record safer candidates."
        )
    safest = int(worst.argmin())
    lower = problem.mean(
        max(problem.risks, key=lambda r: (r.losses[:, safest].mean() - r.delta) / r.width)
    )[safest]
    many = (
        "Testing begins at"
        if begins.sum() == 1
        else "Testing begins at candidates of which the safest is"
    )
    text = f"{many} {problem.name(first)}, whose {observed}" + (
        f", and ends there: more {problem.unit} in this order will not help. "
        if beyond
        else f": {chance}. It ends there as long as the true mean is above delta, however many {problem.unit} there are. "
    )
    text += f"Yet {problem.name(safest)} was observed at {lower:.4g}. "
    if problem.stopped is not None:
        return (
            text
            + f"Record the whole grid on fresh {problem.unit}, and calibrate it with procedure='holm'."
        )
    if (
        not problem.several
        and worst[np.argmin(problem.candidates["threshold"].to_numpy(dtype=np.float64))] < 0.0
    ):
        text += (
            "If low thresholds are the strict ones here (as where entropy must fall below them), negate the thresholds, "
            "since riskcal exits where the confidence is at least the threshold. Otherwise "
        )
    else:
        text += "So "
    return text + (
        f"begin elsewhere: give an order= fixed beforehand, or procedure='holm', which needs none. Either way on fresh "
        f"{problem.unit}: these have been looked at."
    )


def _beyond_chance(problem: Problem, candidate: int) -> bool:
    """Whether some risk of the candidate is certainly above its delta: a test of the opposite, on the losses mirrored."""
    return any(
        pvalues.betting(
            risk.lower + risk.upper - risk.losses[:, candidate],
            risk.lower + risk.upper - risk.delta,
            level=_CHANCE,
            lower=risk.lower,
            upper=risk.upper,
        )
        <= _CHANCE
        for risk in problem.risks
    )
