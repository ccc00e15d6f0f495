"""What a calibration says of itself, in plain words."""

import math
from collections.abc import Callable

import pandas as pd

from riskcal import monotone
from riskcal.calibration.problem import Problem, plain
from riskcal.policy import ExitPolicy, Stop

#: What a certified mean is taken over, where that is not plain.
_OVER = {
    "prompts": "",
    "clusters": ", as the mean over clusters, each cluster counting alike whatever its size",
    "requests": ", as the mean over requests",
}
MEANING = {
    "textual": "dissimilarity to the full model's output",
    "risk": "increase in risk over the full model",
    "risk_clipped": "increase in risk over the full model (improvements counted as 0)",
    "losses": "loss",
    "selective": "dissimilarity to the full model's output, among the requests that stopped early,",
}


def meaning(name: str) -> str:
    """What the mean of a risk is, in words."""
    return MEANING.get(name, f"cost in {name}")


def message(opening: str, outlook: Callable[[], str] | None, remarks: str) -> str:
    """The whole of it; what would help is found where it is read."""
    return opening + ("" if outlook is None else outlook()) + remarks


def opening(problem: Problem, chosen: pd.Series | None, epsilon: float) -> str:
    """What is certified, with what probability."""
    if chosen is None:
        deltas = " and ".join(plain(risk.delta) for risk in problem.risks)
        return f"Nothing was certified at delta {deltas}: run the full model. "
    where = ", ".join(f"{name} {plain(chosen[name])}" for name in problem.coordinates)
    loss = "loss" if len(problem.risks) == 1 else "loss_{}"
    claims = " and ".join(
        f"the expected {meaning(risk.name)} is at most {plain(risk.delta)} "
        f"(observed {chosen[loss.format(risk.name)]:.4g})"
        for risk in problem.risks
    )
    return (
        f"Certified: with probability at least {at_least(epsilon)} over the draw of the {problem.n} calibration "
        f"{problem.unit}, at {where} {claims}{_OVER[problem.weighting]}."
    )


def of_policy(policy: ExitPolicy) -> str:
    """What a policy's certificate says, where the records it was made from are not at hand."""
    certificate = policy.certificate
    if certificate is None:
        return "No certificate: this policy was written by hand, and nothing is guaranteed of it."
    deltas = certificate.delta
    if not isinstance(deltas, dict):
        deltas = {certificate.objective: deltas}
    if policy.is_full_model:
        tolerated = " and ".join(map(plain, deltas.values()))
        return f"Nothing was certified at delta {tolerated}: the policy is the full model."
    unit = "clusters" if certificate.weighting in ("clusters", "requests") else "prompts"
    over = _OVER[certificate.weighting or "prompts"]
    claims = " and ".join(f"{_claim(name)} at most {plain(d)}" for name, d in deltas.items())
    where = (
        f"at threshold {plain(policy.threshold)}"
        if policy.thresholds is None
        else "at each head's threshold"
    )
    where += "".join(
        f", {name} {plain(value)}" for name, value in (policy.coordinates or {}).items()
    )
    return (
        f"Certified: with probability at least {at_least(certificate.epsilon_spent)} over the draw of the {certificate.n} "
        f"calibration {unit}, {where} {claims}{over}."
    )


def _claim(name: str) -> str:
    if name == "agreement":
        return "the share of tokens that leave early and are not the full model's is"
    return f"the expected {meaning(name)} is"


def worth(problem: Problem, table: pd.DataFrame, chosen: pd.Series | None) -> str:
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


def at_least(epsilon: float) -> str:
    """1 - epsilon as messages write it: never rounded up."""
    if epsilon < 1e-6:
        return f"1 - {plain(epsilon)}"
    return f"{math.floor((1 - epsilon) * 1e6 + 1e-6) / 1e6:.6g}"


def end(table: pd.DataFrame, stopped: Stop | None) -> str:
    """What a recording that stopped leaves open."""
    if stopped is None:
        return ""
    end = (
        f" Thresholds below {plain(table['threshold'].iloc[-1])} were never run: there fixed-sequence testing of the "
        f"{meaning(stopped.objective)} had failed (delta {stopped.delta:g}, epsilon {stopped.epsilon:g}, {stopped.test})."
    )
    return end + " Here it did not fail, so that a lower one might do." * bool(
        table["certified"].iloc[-1]
    )


def rises(problem: Problem) -> str:
    """A warning where the risk rises with the threshold by more than noise: a sequence may have stopped for nothing."""
    if problem.several or problem.k < 2:
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
