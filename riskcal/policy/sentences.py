"""What a policy's certificate says, in plain words."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from riskcal.policy.exit_policy import ExitPolicy

#: What a certified mean is taken over, where that is not plain.
OVER = {
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

#: What a certificate of agreement leaves open where prompts have several tokens.
OF_RECORDED_TOKENS = (
    "This is of tokens along the recorded text, usually the full model's own: a decoder that left early goes on from other "
    "states, and may agree less often."
)


def meaning(name: str) -> str:
    """What the mean of a risk is, in words."""
    return MEANING.get(name, f"cost in {name}")


def of_policy(policy: "ExitPolicy") -> str:
    """What a policy's certificate says, where the records it was made from are not at hand."""
    certificate = policy.certificate
    if certificate is None:
        return "No certificate: this policy was written by hand, and nothing is guaranteed of it."
    deltas = certificate.delta
    if not isinstance(deltas, dict):
        deltas = {certificate.objective: deltas}
    whose = "" if certificate.asked is None else certificate.asked.whose
    if policy.is_full_model:
        return f"Nothing was certified at delta {tolerated(deltas)}{whose}: the policy is the full model."
    unit = "clusters" if certificate.weighting in ("clusters", "requests") else "prompts"
    over = OVER[certificate.weighting or "prompts"]
    claims = " and ".join(f"{_claim(name)} at most {as_text(d)}" for name, d in deltas.items())
    where = (
        f"at threshold {as_text(policy.threshold)}"
        if policy.thresholds is None
        else "at each head's threshold"
        if policy.learned is None
        else f"at max_risk {as_text(policy.learned.max_risk)}"
    )
    where += "".join(
        f", {name} {as_text(value)}" for name, value in (policy.coordinates or {}).items()
    )
    of_recorded = "agreement" in deltas and certificate.max_tokens != 1
    return (
        f"Certified: with probability at least {at_least(certificate.epsilon_spent)} over the draw of the {certificate.n} "
        f"calibration {unit}, {where} {claims}{over}{whose}."
        + (f" {OF_RECORDED_TOKENS}" if of_recorded else "")
    )


def tolerated(deltas: Mapping[str, float]) -> str:
    """What was tolerated of each risk, budgets as such."""
    losses = (*MEANING, "agreement")
    return " and ".join(
        as_text(delta) if name in losses else f"a budget of {as_text(delta)} for {name}"
        for name, delta in deltas.items()
    )


def _claim(name: str) -> str:
    if name == "agreement":
        return "the share that is not the full model's, among the tokens that leave early, is"
    return f"the expected {meaning(name)} is"


def at_least(epsilon: float) -> str:
    """1 - epsilon as messages write it: never rounded up."""
    if epsilon < 1e-6:
        return f"1 - {as_text(epsilon)}"
    return f"{math.floor((1 - epsilon) * 1e6 + 1e-6) / 1e6:.6g}"


def as_text(value: Any) -> str:
    """A coordinate's value or a tolerance, as messages write it: six digits, or as many more as tell it from others."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return str(value)
    number = float(value)
    written = (f"{number:.{digits}g}" for digits in range(6, 18))
    return next(
        (text for text in written if math.isclose(float(text), number, rel_tol=1e-12)), repr(number)
    )


def setting(value: Any) -> str:
    """A field's value, as JSON has it, for a reader who knows none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        kind = [value["kind"]] if "kind" in value else []  # of a schedule, whose settings follow
        rest = [f"{name}: {setting(one)}" for name, one in value.items() if name != "kind"]
        return ", ".join(kind + rest)
    if isinstance(value, list):
        return "; ".join(map(setting, value)) or "none"
    return as_text(value)
