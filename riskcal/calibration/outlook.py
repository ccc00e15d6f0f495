"""What would help a calibration that certified nothing, found by simulating its very test, procedure and order.

The samples are drawn from the losses that were observed, all candidates of a prompt together. Guarantees nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from riskcal import _simulation, pvalues
from riskcal._simulation import Law, Sample
from riskcal._validate import Floats
from riskcal.calibration.counts import count_pvalue, two_values
from riskcal.calibration.problem import Problem, TestedRisk
from riskcal.fwer import PilotOrder, Procedure
from riskcal.policy.sentences import meaning
from riskcal.pvalues import Method
from riskcal.pvalues.sampled import rough_size

#: In how many draws a sample should certify.
_POWER = 0.8
#: An observed mean is beyond chance above delta where a test of the opposite hypothesis rejects at this level.
_CHANCE = 0.05


@dataclass(frozen=True)
class Design:
    """How candidates are tested.

    ``levels`` (k,) and ``begins`` (k,) are those of `riskcal.fwer.Procedure`; with ``step_up``, the level of Hochberg's
    procedure, ``begins`` is not used. With ``pilot``, a share of the units, that many choose the one candidate that is
    tested first.
    """

    test: Method
    levels: Floats
    begins: Floats
    step_up: float | None = None
    pilot: float | None = None

    @classmethod
    def of(cls, test: Method, procedure: Procedure, epsilon: float, k: int) -> "Design":
        """The design of a procedure over k candidates."""
        return cls(
            test,
            procedure.levels(epsilon, k),
            procedure.begins(epsilon, k),
            step_up=epsilon if procedure.step_up else None,
            pilot=procedure.pilot_fraction if isinstance(procedure, PilotOrder) else None,
        )


def outlook(problem: Problem, design: Design) -> str:
    """What is known after nothing was certified, and what would help: the rest of a calibration's message.

    ``problem`` holds all units, those of a pilot too, and the candidates in tested order (with a pilot: in the order that
    breaks ties).
    """
    # (r, k)
    excess = np.array([(risk.losses.mean(0) - risk.delta) / risk.width for risk in problem.risks])
    means = np.array([problem.mean(risk) for risk in problem.risks])
    worst = np.where(np.isnan(means).any(0), math.inf, excess.max(0))  # nobody stops early there
    may_begin = design.begins > 0.0
    if not ((worst < 0.0) & may_begin).any():
        return _above(problem, worst, may_begin)
    found = sample_size(problem, design)
    sequence = may_begin.sum() == 1
    named = (
        int(may_begin.argmax()) if sequence else int(np.where(may_begin, worst, math.inf).argmin())
    )
    risk = problem.risks[int(excess[:, named].argmax())]
    subject = (
        f"{'The first candidate tested' if sequence else 'The safest candidate'}, {problem.name(named)}, has an observed "
        f"{meaning(risk.name)} of {problem.mean(risk)[named]:.4g}; "
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
    if not trial.hopeful.size:  # a mean that is delta, and was below it by rounding alone
        return None
    return _simulation.smallest(trial.share, _POWER, trial.guess())


@dataclass(frozen=True)
class _Trial:
    """A calibration that can be repeated on samples of any size from a law."""

    design: Design
    risks: tuple[TestedRisk, ...]
    law: Law  # columns: risk by candidate
    delta: Floats  # (r, k)
    # candidates whose mean is below every delta, those that need fewest units first
    hopeful: NDArray[np.intp]
    # the two values of columns whose p-value is never below their count's
    counted: dict[int, tuple[float, float]]

    @classmethod
    def of(cls, problem: Problem, design: Design) -> "_Trial":
        law = _simulation.of_rows(np.concatenate([risk.losses for risk in problem.risks], axis=1))
        delta = np.repeat([[risk.delta] for risk in problem.risks], problem.k, axis=1)
        shape = delta.shape
        below = (law.mean.reshape(shape) < delta).all(0) & (
            (design.begins > 0.0) | (design.step_up is not None)
        )
        losses = [column for risk in problem.risks for column in risk.losses.T]
        capped = problem.nameless and design.test.walks
        found = {c: two_values(column) for c, column in enumerate(losses) if capped}
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
                    rough_size(
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
        law, delta, ordered = self.law, self.delta, not self.design.test.of_totals_alone
        if ordered:
            upper = np.repeat([risk.upper for risk in self.risks], delta.shape[1])
            law, moved, size = _simulation.scaled(law, delta.ravel(), n, upper)
            delta, pilot, n = moved.reshape(delta.shape), math.ceil(pilot * size / n), size
        for chooses, sample in law.samples(n, pilot=pilot, ordered=ordered):
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
                    found = self.design.test.simulated(
                        sample, r * k + j, of, float(delta[r, j]), level, **known
                    )
                    if r * k + j in self.counted:
                        low, high = self.counted[r * k + j]
                        counts = np.rint(
                            (sample.totals(r * k + j)[of] - sample.n * low) / (high - low)
                        )
                        exact = count_pvalue(counts, sample.n, (low, high), float(delta[r, j]))
                        found = np.maximum(found, exact)
                    p[of, j] = np.where(r > 0, np.maximum(p[of, j], found), found)
            if step_up is None:
                done[of] = p[of, j] <= self.design.begins[j]
        if step_up is None:
            return done
        any_: NDArray[np.bool_] = np.any(np.sort(p, axis=1) <= step_up / (k - np.arange(k)), axis=1)
        return any_


def _often(share: float) -> str:
    if abs(share - _POWER) <= 0.04:
        return "four draws of five"
    return f"{100 * share:.0f} draws of 100"


def _above(problem: Problem, worst: Floats, may_begin: NDArray[np.bool_]) -> str:
    """What to say where no candidate that could be certified first is observed below delta."""
    first = int(np.where(may_begin, worst, math.inf).argmin())
    if np.isinf(worst).all():
        return (
            f"No request stopped early under any candidate, so that there is nothing to test: record more lenient thresholds on "
            f"fresh {problem.unit}."
        )
    if math.isinf(worst[first]):
        return (
            f"At {problem.name(first)}, where testing begins, no request stopped early, so that there is nothing to test: begin "
            f"elsewhere, with an order= fixed beforehand, or procedure='holm', which needs none, on fresh {problem.unit}."
        )
    beyond = all(_beyond_chance(problem, j) for j in np.flatnonzero(may_begin).tolist())
    if (worst < 0.0).any():
        return _below_elsewhere(problem, worst, first, beyond, alone=may_begin.sum() == 1)
    return _below_nowhere(problem, first, beyond)


def _hardest(problem: Problem, candidate: int) -> tuple[TestedRisk, float, str]:
    """The risk of a candidate that is the furthest above its delta, its observed mean, and what its delta is called."""
    risk = max(problem.risks, key=lambda r: (r.losses[:, candidate].mean() - r.delta) / r.width)
    return risk, problem.mean(risk)[candidate], "its budget" if risk.is_cost else "delta"


def _by_chance(problem: Problem, limit: str) -> str:
    return f"not below {limit}, but by no more than chance explains in {problem.n} {problem.unit}"


def _below_nowhere(problem: Problem, safest: int, beyond: bool) -> str:
    """What to say where no candidate at all is observed below delta."""
    risk, mean, limit = _hardest(problem, safest)
    observed = f"observed {meaning(risk.name)} is {mean:.4g}"
    failing = {r.is_cost for r in problem.risks if problem.mean(r)[safest] >= r.delta}
    failing.add(risk.is_cost)
    remedies = {False: "raise delta", True: "raise the budget"}
    raised = " and ".join(remedies[is_cost] for is_cost in sorted(failing))
    if beyond:
        return (
            f"Even the safest candidate's {observed}, so more {problem.unit} alone will not help: {raised}, record "
            f"{'other candidates' if risk.is_cost else 'stricter thresholds'}, or train the model for early exit."
        )
    return (
        f"The safest candidate's {observed}: {_by_chance(problem, limit)}. Its true mean may lie below {limit}, and then a "
        "larger fresh sample would certify it, or above, and then none will; these data do not say which. What helps in either "
        f"case: {raised}, or record {'other' if risk.is_cost else 'safer'} candidates."
    )


def _below_elsewhere(
    problem: Problem, worst: Floats, first: int, beyond: bool, *, alone: bool
) -> str:
    """What to say where a candidate is below delta that could not be certified first; ``alone``: one only could."""
    risk, mean, limit = _hardest(problem, first)
    begins = "" if alone else " candidates of which the safest is"
    text = (
        f"Testing begins at{begins} {problem.name(first)}, whose observed {meaning(risk.name)} is {mean:.4g}"
        + (
            f", and ends there: more {problem.unit} in this order will not help. "
            if beyond
            else f": {_by_chance(problem, limit)}. It ends there as long as the true mean is above {limit}, however many "
            f"{problem.unit} there are. "
        )
    )
    safest = int(worst.argmin())
    text += f"Yet {problem.name(safest)} was observed at {_hardest(problem, safest)[1]:.4g}. "
    if problem.stopped is not None:
        return (
            text
            + f"Record the whole grid on fresh {problem.unit}, and calibrate it with procedure='holm'."
        )
    if not problem.several_coordinates and worst[np.argmin(problem.strictness)] < 0.0:
        text += (
            "If high thresholds are the strict ones here, leave lower_is_stricter out, and the column of that name where records "
            "have one. Otherwise "
            if problem.lower_is_stricter
            else "If low thresholds are the strict ones here (as where entropy must fall below them), say so: "
            "lower_is_stricter=True (on the shell --lower-is-stricter). Otherwise "
        )
    else:
        text += "So "
    return text + (
        f"begin elsewhere: give an order= fixed beforehand, or procedure='holm' (--procedure holm), which needs none. "
        f"Either way on fresh {problem.unit}: these have been looked at."
    )


def _beyond_chance(problem: Problem, candidate: int) -> bool:
    """Whether some risk of the candidate is certainly above its delta: a test of the opposite, on the losses mirrored."""
    return any(
        pvalues.betting(
            risk.lower + risk.upper - risk.losses[:, candidate],
            _mirrored(risk),
            level=_CHANCE,
            lower=risk.lower,
            upper=risk.upper,
        )
        <= _CHANCE
        for risk in problem.risks
    )


def _mirrored(risk: TestedRisk) -> float:
    """The tolerance seen from the other bound, never rounded on to a bound."""
    low, high = math.nextafter(risk.lower, risk.upper), math.nextafter(risk.upper, risk.lower)
    return min(max(risk.lower + risk.upper - risk.delta, low), high)
