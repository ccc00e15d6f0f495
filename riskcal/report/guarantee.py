"""The guarantee in one sentence, what it rests on, and the facts of its certificate."""

from typing import Any

import pandas as pd

from riskcal.policy import Certificate, Contrast, ExitPolicy, sentences
from riskcal.report.html import Html, details, joined, table, tag
from riskcal.report.sections import Section


def guarantee(sentence: str, certificate: Certificate | None, *, certified: bool) -> Section:
    """The sentence, its assumptions and the certificate's facts."""
    parts: list[Any] = [tag("p", sentence, class_="verdict certified" if certified else "verdict")]
    if certificate is not None:
        rests = [tag("li", one) for one in assumptions(certificate)]
        title = "What this rests on" if certified else "What a guarantee would rest on"
        parts += [tag("h3", title), tag("ul", *rests), _facts(certificate)]
    return Section("guarantee", "Guarantee", joined(parts))


def assumptions(certificate: Certificate) -> list[str]:
    """What has to be true for the sentence to hold, each in plain words."""
    clusters = certificate.weighting in ("clusters", "requests")
    unit = "clusters of prompts" if clusters else "prompts"
    look = (
        "This is the only look: testing these records again, at another delta or with another test, is not covered."
        if certificate.attempt is None
        else f"This is planned attempt {certificate.attempt}, which spends {certificate.epsilon_spent:.4g} of epsilon "
        f"{certificate.epsilon:g}."
    )
    said = [
        f"The calibration {unit} are independent draws from what will be served. Watch with riskcal monitor that it stays so.",
        "Candidates, their order, the loss, delta, epsilon and the test were fixed before these records were looked at. "
        + look,
        f"Losses lie between {certificate.lower:g} and {certificate.upper:g}, and an output that failed counts as the worst.",
        "What serves is what was recorded: the same weights, tokenizer, confidence measure, cache, batching and length limit.",
        f"It is about the mean over {_over(certificate)}. Nothing is said of a single request or of a group of them.",
    ]
    if certificate.max_cluster is not None:
        said.append(f"No cluster that is served has more than {certificate.max_cluster} prompts.")
    if budgets := [
        name for name in _risks(certificate) if name not in (*sentences.MEANING, "agreement")
    ]:
        said.append(
            f"No request costs more {' or '.join(budgets)} than the largest that was given with the budget."
        )
    return said


def _risks(certificate: Certificate) -> list[str]:
    return [*certificate.delta] if isinstance(certificate.delta, dict) else [certificate.objective]


def _over(certificate: Certificate) -> str:
    if _risks(certificate) == ["selective"]:
        return "the requests that stopped early"
    if certificate.weighting == "clusters":
        return "clusters, each counting alike"
    return "what is served"


def _facts(certificate: Certificate) -> Html:
    """The certificate, name by name."""
    fields = certificate.model_dump(mode="json", exclude_none=True, exclude={"asked", "versions"})
    fields |= {f"version of {name}": value for name, value in certificate.versions.items()}
    rows = [(name.replace("_", " "), sentences.setting(value)) for name, value in fields.items()]
    frame = pd.DataFrame(rows, columns=["fact", "value"], dtype=object)
    return details("Certificate", table(frame, "What was tested, and how", class_="facts"))


def of_policy(policy: ExitPolicy) -> list[Section]:
    """What a policy says: its certificate, and its settings."""
    certificate = policy.certificate
    certified = certificate is not None and not policy.is_full_model
    left_out = {"certificate", "schema_version"}
    if policy.contrast == Contrast():
        left_out.add("contrast")  # which most measures do not look at
    if policy.thresholds is not None:
        left_out.add("threshold")  # there is one for each exit
    settings = policy.model_dump(mode="json", exclude_none=True, exclude=left_out)
    rows = [(name.replace("_", " "), sentences.setting(value)) for name, value in settings.items()]
    frame = pd.DataFrame(rows, columns=["setting", "value"], dtype=object)
    caption = "What changes tokens; a decoder that differs refuses the policy"
    about = table(frame, caption, class_="facts")
    return [
        guarantee(sentences.of_policy(policy), certificate, certified=certified),
        Section("policy", "Policy", about),
    ]
