"""What the columns of other systems' logs are likely to be: proposals that `riskcal check` prints, and nobody follows unasked."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.records import candidates, columns, truths
from riskcal.records.renaming import options, renamed, unfolded

#: Names that logs have for riskcal's columns, the likeliest first; only their letters and digits count.
_NAMES = {
    "prompt": "prompt custom_id request_id trace_id prompt_id query_id question_id example_id instance_id sample_id doc_hash "
    "doc_id task_id item_id uid id",
    "threshold": "threshold lambda lam tau confidence_threshold exit_threshold early_exit_threshold min_confidence thr cutoff "
    "conf_cutoff confidence_cutoff",
    "seconds": "seconds latency_seconds latency_s latency e2e_latency duration duration_s elapsed wall_clock wall_time "
    "total_time",
    "tokens": "tokens output_tokens completion_tokens generated_tokens num_tokens n_tokens token_count",
    "layers": "layers mean_layers avg_layers average_layers layers_per_token mean_exit_layer avg_exit_layer exit_layer "
    "mean_depth",
    "failed": "failed timed_out timeout is_failed status state outcome finish_reason stop_reason error error_message exception",
    "cluster": "cluster document_id session_id conversation_id user_id user session",
    "group": "group task category subset dataset",
}

_DISTANCES = "dissimilarity distance normalized_edit_distance edit_distance token_error_rate wer cer error_rate loss"

_SCORES = "rougel rougelsum rouge similarity token_f1 f1 agreement exact_match em bleu chrf bertscore accuracy acc quality score"

_ATTEMPTS = "attempt attempt_no attempt_number attempt_id try retry retries retry_no retry_count timestamp created_at time ts"

#: Share of a column's cells that must speak for a guess: a few are what is wrong with the log.
_MOST = 0.9

#: What some of a log's percentages reach.
_NEAR_100 = 90.0


def required(frame: pd.DataFrame) -> dict[str, str]:
    """For each of the columns that runs need and the table lacks, the option that would make it of one that it has."""
    frame = unfolded(frame)
    proposals: dict[str, str] = {}
    if "threshold" not in frame.columns and (found := _first(frame, _NAMES["threshold"])):
        proposals["threshold"] = f"threshold={found}"
    threshold = proposals.get("threshold", "threshold=threshold").partition("=")[2]
    if "prompt" not in frame.columns and (found := _first_id(frame, threshold)):
        proposals["prompt"] = f"prompt={found}"
    if not {"dissimilarity", "risk"} & set(frame.columns):
        proposals |= _loss(frame, threshold)
    return proposals


def _first_id(frame: pd.DataFrame, threshold: str) -> str | None:
    """The likeliest name of a prompt's id; not of a row's, if several rows of a prompt are to be expected."""
    several = threshold in frame.columns and _distinct(frame[threshold]) > 1
    found = (_first(frame, known) for known in _NAMES["prompt"].split())
    return next(
        (name for name in found if name and not (several and _distinct(frame[name]) == len(frame))),
        None,
    )


def _distinct(column: pd.Series) -> int:
    """How many different values a column has; none is known of lists and objects."""
    try:
        return int(column.nunique(dropna=False))
    except TypeError:
        return 0


def optional(frame: pd.DataFrame) -> dict[str, str]:
    """The same for columns that runs may have: costs, failures, clusters and strata."""
    frame, proposals = unfolded(frame), {}
    for target in ("seconds", "tokens", "layers", "failed", "cluster", "group"):
        if target in frame.columns:
            continue
        if found := _first(frame, _NAMES[target], of_truths=target == "failed"):
            proposals[target] = f"{target}={found}"
        elif target == "seconds" and (found := _first(frame, _NAMES[target], "_ms")):
            proposals[target] = f"{target}={found}/1000"
    return proposals


def failures(frame: pd.DataFrame, rows: NDArray[np.bool_]) -> str | None:
    """The column that may say which outputs failed, or a formula of it, if it says so of all these rows."""
    if not rows.any():
        return None
    for known in _NAMES["failed"].split():
        name = _first(frame, known)
        for formula in () if name is None else _saying(frame[name], name):
            try:
                said = truths.of(
                    renamed(frame[[name]], options([f"failed={formula}"]))["failed"], "failed"
                )
            except RiskcalError:
                continue
            if said[rows].all() and not said.all():
                return formula
    return None


def _saying(column: pd.Series, name: str) -> Sequence[str]:
    """What of a column may say that an output failed: its truths, all but the text for success, or that there is a text."""
    text = truths.good(set(column.dropna().map(columns.plain).map(str)))
    return (name, f"{name}!={text}", f"{name}!=null") if text else (name, f"{name}!=null")


def attempts(frame: pd.DataFrame) -> Sequence[str]:
    """Columns that may put the attempts of a request in order, the likeliest first."""
    found = (_first(frame, known) for known in _ATTEMPTS.split())
    return [name for name in found if name]


def percent(column: pd.Series, least: float = _NEAR_100) -> bool:
    """Whether numbers look like percentages: of those that are not 0 most are beyond 1, hardly any beyond 100, some near it.

    Counts, marks from 1 to 10 and losses in nats are not: the largest that could be is at ``least`` that much.
    """
    values = _values(column)
    above = values[values > 0]
    within = values[(values >= 0) & (values <= 100)]
    return (
        bool(above.size)
        and _mostly(above > 1)
        and len(within) >= _MOST * len(values)
        and bool(within.max() >= least)
    )


def _loss(frame: pd.DataFrame, threshold: str) -> dict[str, str]:
    """A distance to the full model, where its own rows are nearest to themselves, or else a risk."""
    known = [(name, False) for name in _DISTANCES.split()]
    known += [(name, True) for name in _SCORES.split()]
    for likely, is_score in known:
        said = None if (name := _first(frame, likely)) else _first(frame, likely, "_pct")
        name = name or said
        if name is None or not (values := _values(frame[name])).size:
            continue
        whole = 100.0 if percent(frame[name], 0.0 if said else _NEAR_100) else 1.0
        if not _mostly((values >= 0) & (values <= whole)):
            continue
        formula = ("1-" if is_score else "") + name + ("/100" if whole > 1 else "")
        best = whole if is_score else 0.0
        own = _own(frame, name, threshold)
        nearest = _mostly(np.abs(own - best) <= _validate.TOLERANCE) if own.size else None
        # without rows of the full model nothing tells a distance to it from an error, unless the name does
        is_distance = likely == "dissimilarity" if nearest is None else nearest
        target = "dissimilarity" if is_distance else "risk"
        return {target: f"{target}={formula}"}
    return {}


def _own(frame: pd.DataFrame, name: str, threshold: str) -> Floats:
    """What of a column stands in rows that seem to be the full model's."""
    if threshold not in frame.columns:
        return np.zeros(0)
    try:
        numbers = candidates.as_numbers(columns.as_numpy(frame[threshold], threshold))
    except RiskcalError:
        return np.zeros(0)
    return _values(frame.loc[np.isposinf(numbers) | np.isnan(numbers), name])


def _mostly(true: NDArray[np.bool_]) -> bool:
    return bool(true.mean() >= _MOST)


def _values(column: pd.Series) -> Floats:
    """What of a column is a finite number; none where it cannot be read as one of numbers."""
    try:
        numbers = columns.floats(column)
    except RiskcalError:
        return np.zeros(0)
    return numbers[np.isfinite(numbers)]


def _first(
    frame: pd.DataFrame, names: str, ending: str = "", *, of_truths: bool = False
) -> str | None:
    """The table's column with the likeliest of these names, and one that the shell can say.

    What stands in an object goes by its own name, ``metrics.rougeL`` by ``rougeL``, unless a column of the table has that.
    """
    whole = [name for name in reversed(frame.columns) if isinstance(name, str)]
    leaves = [(_letters(name.rpartition(".")[2]), name) for name in whole if "." in name]
    # of several stages that each have a score none is the log's
    often = Counter(leaf for leaf, _ in leaves)
    own = {leaf: name for leaf, name in leaves if often[leaf] == 1}
    own |= {_letters(name): name for name in whole}
    for known in names.split():
        found = own.get(_letters(known + ending))
        if not found or options([f"prompt={found}"]) != {"prompt": found}:
            continue
        if not of_truths or all(isinstance(cell, bool | np.bool_) for cell in frame[found]):
            return found
    return None


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
