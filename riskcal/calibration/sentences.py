"""What a calibration says of itself, in plain words."""

from collections.abc import Callable

import pandas as pd

from riskcal import monotone
from riskcal.calibration.problem import Problem
from riskcal.policy import Stop
from riskcal.policy.certificate import of_group
from riskcal.policy.columns import recorded_limit
from riskcal.policy.sentences import OVER, as_text, at_least, meaning, tolerated


def message(opening: str, outlook: Callable[[], str] | None, remarks: str) -> str:
    """The whole of it; what would help is found where it is read."""
    return opening + ("" if outlook is None else outlook()) + remarks


def opening(problem: Problem, chosen: pd.Series | None, epsilon: float) -> str:
    """What is certified, with what probability."""
    whose = "" if problem.group is None else of_group(problem.group)
    if chosen is None:
        deltas = tolerated({risk.name: risk.delta for risk in problem.risks})
        return f"Nothing was certified at delta {deltas}{whose}: run the full model. "
    where = _where(problem, chosen)
    loss = "loss" if len(problem.risks) == 1 else "loss_{}"
    claims = " and ".join(
        f"the expected {meaning(risk.name)} is at most {as_text(risk.delta)} "
        f"(observed {chosen[loss.format(risk.name)]:.4g})"
        for risk in problem.risks
    )
    over = OVER[problem.weighting]
    if problem.uneven:
        over = ", as the mean over prompts, each counting alike however many rows it has"
    return (
        f"Certified: with probability at least {at_least(epsilon)} over the draw of the {problem.n} calibration "
        f"{problem.unit}, at {where} {claims}{over}{whose}."
    )


def _where(problem: Problem, chosen: pd.Series) -> str:
    """The candidate, by what tells it from others; of vectors of one learned risk the number that they stand for."""
    names, first = problem.coordinates, []
    learned = "learned" in problem.candidates and "learned" not in names
    if learned:
        first = [f"max_risk {as_text(recorded_limit(chosen['learned']).max_risk)}"]
    if learned or "thresholds" in names:  # of a vector the number in `threshold` is but a name
        names = [name for name in names if name != "threshold"]
    return ", ".join([*first, *(f"{name} {as_text(chosen[name])}" for name in names)])


def worth(problem: Problem, chosen: pd.Series | None) -> str:
    """What a certificate alone would leave unsaid: settings that change nothing, and savings that are none."""
    said = ""
    counted = [name for name in problem.costs if name != "seconds"]  # seconds differ by themselves
    alike = [risk.losses for risk in problem.risks] + [problem.costs[name] for name in counted]
    can_tell = bool(counted) or "seconds" not in problem.costs
    if problem.k > 1 and can_tell and all((matrix == matrix[:, :1]).all() for matrix in alike):
        named = ["losses", *("FLOPs" if name == "flops" else name for name in counted)]
        said += (
            f" All {problem.k} candidates gave the same {', '.join(named[:-1])}{' and ' * (len(named) > 1)}{named[-1]} on each "
            f"of the {problem.unit}: "
        )
        said += (
            "the setting made no difference. Make sure that it reached the decoder."
            if counted
            else "the setting made no difference to what was recorded, and no cost was recorded that would tell whether it "
            "reached the decoder."
        )
    if chosen is None:
        return said
    full = problem.full_costs
    for name, per in (("layers", "layers a token"), ("flops", "FLOPs a prompt")):
        if name in full and chosen[name] >= full[name] * (1 - 1e-9):
            said += f" It saves nothing: {chosen[name]:.4g} {per}, where the full model takes {full[name]:.4g}."
            break
    if "seconds" in full and chosen["seconds"] > full["seconds"] * (1 + 1e-9):
        said += (
            f" It is slower than the full model that was recorded beside it: {chosen['seconds']:.4g} seconds a prompt, where "
            f"that takes {full['seconds']:.4g}."
        )
    return said


def end(table: pd.DataFrame, stopped: Stop | None) -> str:
    """What a recording that stopped leaves open."""
    if stopped is None:
        return ""
    end = (
        f" Thresholds below {as_text(table['threshold'].iloc[-1])} were never run: there fixed-sequence testing of the "
        f"{meaning(stopped.objective)} had failed (delta {stopped.delta:g}, epsilon {stopped.epsilon:g}, {stopped.test})."
    )
    return end + " Here it did not fail, so that a lower one might do." * bool(
        table["certified"].iloc[-1]
    )


def rises(problem: Problem) -> str:
    """A warning where the risk rises with the threshold by more than noise: a sequence may have stopped for nothing."""
    if problem.several_coordinates or problem.k < 2:
        return ""
    for risk in problem.risks:
        if risk.is_cost or risk.early is not None:
            continue
        pairs = monotone._rising_pairs(
            risk.losses, problem.strictness, lower=risk.lower, upper=risk.upper
        )
        if pairs:
            rises = "falls" if problem.lower_is_stricter else "rises"
            return (
                f" The {meaning(risk.name)} does not fall steadily as the threshold {rises} ({len(pairs)} pairs of "
                "thresholds say so beyond noise): a fixed sequence can stop early there, Holm does not mind."
            )
    return ""
