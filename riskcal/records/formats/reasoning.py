"""Checkpoints of reasoning models: the answer that was forced from a fork at each, as traces with as many exits as there were."""

import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any, Literal

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records.formats import settings as settings_
from riskcal.records.traces import Traces

#: What logs call the list of checkpoints, and what they say at one of whether its answer is right.
_LISTS = ("checkpoints", "checks", "intermediate_checks")
_RIGHT = ("is_correct", "intermediate_correct")


def read(
    path: str | os.PathLike[str],
    *,
    key: str = "question_id",
    confidence: str = "confidence",
    outcome: Literal["agrees", "loss"] = "agrees",
) -> Traces:
    """Traces of a log of checkpoints, one question a line of JSON.

    A question has a list ``checkpoints``, ``checks`` or ``intermediate_checks``; each of these has ``checkpoint_idx``,
    ``tokens_used``, ``predicted_answer``, ``is_correct`` or ``intermediate_correct``, and ``confidence``, ``entropy`` or
    ``probe_confidence``.

    Parameters
    ----------
    path : path
        JSON lines, packed or not.
    key : str
        What a question's id is called.
    confidence : str
        By what to stop. Of an ``entropy`` low values stop: say ``lower_is_stricter=True`` to `riskcal.replay_traces`.
    outcome : {"agrees", "loss"}
        Whether an answer is compared with the last checkpoint's, or with the reference (``loss`` is 1 where it is wrong).
        No answer (null, or an empty text) agrees with nothing, and nothing with it where it is the last checkpoint's.

    Returns
    -------
    Traces
        One row a question, its exits the checkpoints in the order of ``checkpoint_idx``, the last one the whole thought; a
        final answer that stands elsewhere has to be added as the last checkpoint. The cost ``tokens`` is ``tokens_used``.
        Replay with ``exact=True`` is right where each answer was forced on a fork, so that asking changed nothing.

    Raises
    ------
    RiskcalError
        For a question without checkpoints or that comes twice, a checkpoint without one of these, tokens that become fewer, and
        a ``final_answer`` that is not the last checkpoint's, where answers are compared.

    Examples
    --------
    >>> import pandas as pd
    >>> from riskcal.records.formats import reasoning
    >>> def question(name, *checks):
    ...     return {"question_id": name, "checkpoints": [
    ...         {"checkpoint_idx": i, "tokens_used": 100 * (i + 1), "predicted_answer": answer, "confidence": sure}
    ...         for i, (answer, sure) in enumerate(checks)
    ...     ]}
    >>> log = [question("q1", ("3", 0.2), ("7", 0.6), ("7", 0.9)), question("q2", ("5", 0.7), ("5", 0.8))]
    >>> pd.DataFrame(log).to_json("log.jsonl", orient="records", lines=True)
    >>> runs = riskcal.replay_traces(reasoning.read("log.jsonl"), [0.5, 0.1], exact=True)
    >>> runs.losses("textual").mean(0).tolist(), runs.mean_costs()["tokens"].tolist()
    ([0.0, 0.5], [150.0, 100.0])
    """
    _validate.choice(outcome, "outcome", ("agrees", "loss"))
    settings_.name_of(key, "key")
    settings_.name_of(confidence, "confidence")
    source = settings_.path_of(path)
    columns: dict[str, list[Any]] = {"prompt": [], "confidence": [], outcome: [], "tokens": []}
    seen: dict[Any, int] = {}
    unanswered: list[str] = []
    for row, question in settings_.objects(source):
        place = f"{path}: row {row}"
        if not isinstance(question.get(key), str | int):
            raise RiskcalError(
                f"{place} has no {key}; it has {_listed(question)}. Name the question's id with key=."
            )
        checks = _checks(question, place)
        if (before := seen.setdefault(question[key], row)) != row:
            raise RiskcalError(
                f"{place}: {key} {question[key]!r} stands twice, first in row {before}. If it was sampled again, keep one "
                "line of it, by when it was sent and not by what came of it; if two questions are alike, name another key=."
            )
        if outcome == "agrees":
            _refuse_another_end(question, checks[-1], place)
            if _is_none(checks[-1].get("predicted_answer")):
                unanswered.append(place)
        columns["prompt"].append(question[key])
        columns["confidence"].append([_number(one, confidence, place) for one in checks])
        columns["tokens"].append(tokens := [_number(one, "tokens_used", place) for one in checks])
        if tokens != sorted(tokens):
            raise RiskcalError(
                f"{place}: tokens_used becomes less, {tokens}; it is what was generated up to the checkpoint, in all."
            )
        columns[outcome].append(_outcomes(checks, outcome, place))
    if not columns["prompt"]:
        raise RiskcalError(f"{path}: holds no question.")
    if unanswered:
        _validate.warn(
            f"predicted_answer: none at the last checkpoint in {unanswered[0]} ({len(unanswered)} such questions); nothing "
            "agrees with no answer, so that these count as losses at every threshold."
        )
    with warnings.catch_warnings():
        if unanswered:
            warnings.filterwarnings("ignore", "agrees: false at row .* for the last exit")
        return Traces.from_arrays(
            prompt=columns["prompt"],
            position=[0] * len(columns["prompt"]),
            confidence=columns["confidence"],
            cost={"tokens": columns["tokens"]},
            **{outcome: columns[outcome]},
        )


def _is_none(answer: Any) -> bool:
    return answer is None or (isinstance(answer, str) and not answer.strip())


def _refuse_another_end(question: Mapping[str, Any], last: Mapping[str, Any], place: str) -> None:
    """Refuse a final answer that is not the last checkpoint's, which is taken for the full model's."""
    if "final_answer" not in question or "predicted_answer" not in last:
        return
    final, answer = question["final_answer"], last["predicted_answer"]
    if not _are_alike(final, answer) and not (_is_none(final) and _is_none(answer)):
        raise RiskcalError(
            f"{place}: final_answer is {_validate.shown(final)}, and predicted_answer of the last checkpoint "
            f"{_validate.shown(answer)}, which would count as the full model's. Add it as the last checkpoint, with its "
            "tokens_used, and NaN where it has no number to stop by; or leave final_answer out, if it is the same in "
            "other words."
        )


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two answers are the same text but for blanks around it, or the same number."""
    texts = str(one).strip(), str(other).strip()
    if texts[0] == texts[1]:
        return True
    with suppress(ArithmeticError):  # of what is no number
        return Decimal(texts[0]) == Decimal(texts[1])
    return False


def _checks(question: Mapping[str, Any], place: str) -> list[Mapping[str, Any]]:
    """The checkpoints of a question in their order."""
    found = next((question[name] for name in _LISTS if name in question), None)
    if not isinstance(found, list) or not found or not all(isinstance(c, Mapping) for c in found):
        raise RiskcalError(
            f"{place} has no checkpoints ({' or '.join(_LISTS)}); it has {_listed(question)}. Without answers at "
            "checkpoints there is nothing that stopping could be read off."
        )
    order = [_number(one, "checkpoint_idx", place) for one in found]
    if len(set(order)) < len(order):
        raise RiskcalError(f"{place} has two checkpoints of one checkpoint_idx; keep one of each.")
    return [found[at] for at in sorted(range(len(order)), key=order.__getitem__)]


def _outcomes(checks: list[Mapping[str, Any]], outcome: str, place: str) -> list[Any]:
    if outcome == "agrees":
        if not all("predicted_answer" in one for one in checks):
            raise RiskcalError(f"{place} has a checkpoint without predicted_answer.")
        last = checks[-1]["predicted_answer"]
        return [not _is_none(last) and one["predicted_answer"] == last for one in checks]
    name = next((name for name in _RIGHT if name in checks[0]), _RIGHT[0])
    return [1.0 - _number(one, name, place) for one in checks]


def _number(check: Mapping[str, Any], name: str, place: str) -> float:
    value: Any = check.get(name)
    never = name not in (*_RIGHT, "tokens_used", "checkpoint_idx")
    if never and isinstance(value, float) and not math.isfinite(value):
        return float(value)  # a confidence that is none never stops
    if settings_.finite(value) is None:
        if name in check:
            remedy = "a number, or NaN where nothing could stop" if never else "a number"
            raise RiskcalError(
                f"{place} has a checkpoint whose {name} is {_validate.shown(value)}; write {remedy}."
            )
        raise RiskcalError(
            f"{place} has a checkpoint without a number for {name}; it has {_listed(check)}."
        )
    return float(value)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(str, names)) or "nothing"
