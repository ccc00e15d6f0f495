"""What refusals of a log's columns advise; each of these is done to the letter in the tests."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from riskcal import _validate
from riskcal._validate import Floats

#: What programs write for true and false where they write texts.
_TRUTHS = frozenset("true false yes no pass passed fail failed correct incorrect wrong".split())

#: How far outside its range a number may stand that was rounded in float32, or summed so.
ROUNDING = 1e-5

#: Where a column was renamed as it was read, its pair, or what stands for it, names the log's.
_RENAMED = ", by the log's own name of the column if that is another"


def of_number(name: str, upper: float, cell: Any, *, of_full_model: bool) -> str:
    """What to give for a number that is missing or impossible; never to leave out what failed, nor to credit for it."""
    if isinstance(cell, str) and any(letter.isdigit() for letter in cell):
        if name == "seconds" and _is_duration(cell):
            return (
                "It is the text of a duration: pandas.to_timedelta(table['seconds']) makes durations of such a column, and they "
                "are read."
            )
        return of_text(cell)
    if isinstance(cell, str) and cell.strip().lower() in _TRUTHS:
        return of_text(cell)
    if not isinstance(cell, str) and not _validate.is_number(cell) and _is_there(cell):
        return f"It is a {type(cell).__name__}: write plain numbers, one a row."
    if upper == float("inf"):
        return (
            f"Give what the run took, failed or not; or leave {name} out if it is not known of all."
        )
    failed = _of_failure(name, upper, of_full_model=of_full_model)
    if not _validate.is_number(cell) or not abs(cell) < float("inf"):
        return failed
    if -ROUNDING <= cell <= upper + ROUNDING:
        return f"So little is rounding, of float32 for instance: clip the column to [0, {upper:g}]."
    return (
        f"If it is of another scale, x / 100 makes shares of percentages, of a table with columns={{{name!r}: ({name!r}, "
        f"'x / 100')}} (on the shell --columns {name}={name}/100){_RENAMED}, and 1 - x losses of scores; a loss of any other "
        f"range is divided by the most that it can be. {failed}"
    )


def of_text(cell: str) -> str:
    """What to write in place of a text, where numbers or truth values are read."""
    if any(letter.isdigit() for letter in cell):
        return "It is a text: write a number, 0.25 for '25%' or '0,25'."
    if cell.strip().lower() in _TRUTHS:
        return "It is a text: write 1 where it is true, and 0 where it is not."
    return "It is a text: write numbers, or 1 and 0 for true and false."


def _is_duration(text: str) -> bool:
    """Whether pandas reads a text as a duration, with a unit or a colon in it."""
    with suppress(ValueError, OverflowError):
        return not isinstance(pd.to_timedelta(text), type(pd.NaT)) and not text.isdecimal()
    return False


def of_levels(columns: pd.Index, keys: int) -> str:
    """How columns of several levels become columns of one: of a groupby, of its statistics, or of an unstacked threshold.

    ``keys`` is how many levels the index has, by which pandas numbers the one that has no name.
    """
    first = [level[0] for level in columns]
    repeated = next((level for level in columns if first.count(level[0]) > 1), None)
    if repeated is None:
        return "flatten them first: table.columns = [level[0] for level in table.columns]."
    if not isinstance(repeated[-1], str):
        named = f".rename(columns={{'level_{keys}': 'threshold'}})"
        return (
            "if the last level is a column of its own, such as the threshold, make it one: table.stack().reset_index()"
            f"{named if columns.names[-1] is None else ''}."
        )
    return (
        "flatten them first, table.columns = ['_'.join(filter(None, level)) for level in table.columns], and say which "
        f"{repeated[0]} is meant: columns={{{repeated[0]!r}: {'_'.join(filter(None, repeated))!r}}}."
    )


def of_missing(name: str, columns: Sequence[Any]) -> str:
    """Where what a missing column would say may stand."""
    if name == "position":
        return (
            " Where each row is a request of its own (a classifier's, a cascade's), write 0 in it."
        )
    if (
        name == "threshold"
        and "prompt" in columns
        and len(columns) > 2
        and _are_thresholds(columns)
    ):
        return (
            " If a column's name is the threshold, make rows of them: table.melt('prompt', var_name='threshold', "
            "value_name='dissimilarity'), after table.reset_index() where prompt is the index."
        )
    return ""


def _are_thresholds(columns: Sequence[Any]) -> bool:
    """Whether all names but the prompt's are numbers, or the full model's."""
    with suppress(TypeError, ValueError):
        return all(name in ("prompt", "full") or float(name) > -math.inf for name in columns)
    return False


def _of_failure(name: str, upper: float, *, of_full_model: bool) -> str:
    if name == "full_risk":
        return (
            "Where the full model's output failed write 0, so that no candidate is credited for it."
        )
    if of_full_model:
        return "It is of the full model: if its output failed (a time-out, a loop, an empty text), say so in a column failed."
    return (
        f"An output that failed (a time-out, a loop, an empty text) has the worst loss, {upper:g}: write it there, or say so "
        "in a column failed. To leave out what failed would select on the outcome."
    )


def _is_there(cell: Any) -> bool:
    """Whether a cell is no null; what is neither is there."""
    missing = pd.isna(cell) if pd.api.types.is_scalar(cell) else False
    return not (isinstance(missing, bool | np.bool_) and missing)


def other_meaning(name: str) -> str:
    """What to do with a log's column that has one of riskcal's names, and says something else."""
    return (
        f"If it means something else here, leave it out or name it otherwise, with columns={{'{name}_logged': {name!r}}} (on "
        f"the shell --columns {name}_logged={name}){_RENAMED}."
    )


def of_tasks(task: str) -> str:
    """What to do where several tasks number their prompts alike."""
    return (
        "Several tasks that number their prompts alike: a prompt is both, "
        f"table.assign(prompt=table[{task!r}].astype(str) + '/' + table['prompt'].astype(str))."
    )


def of_own_distances(distances: Floats, *, has_risk: bool) -> str:
    """What it may be that full-model rows have for a distance to themselves, and what to do."""
    if distances.min() >= 1.0 - _validate.TOLERANCE:
        return (
            "All of these rows have 1, as a similarity has, of which 1 - x is the distance: of a table with "
            "columns={'dissimilarity': ('dissimilarity', '1 - x')} (on the shell --columns dissimilarity=1-dissimilarity)"
            f"{_RENAMED}."
        )
    rounding = (
        " If it is rounding, all of these being so small, write 0 there."
        if distances.max() < 1e-5
        else ""
    )
    of_labels = (
        ""
        if has_risk
        else " If it is a loss against references, such as labels, it is a risk: columns={'risk': 'dissimilarity'} (on the shell "
        f"--columns risk=dissimilarity){_RENAMED}."
    )
    return f"Is the decoder deterministic? Compare against the very same generation.{of_labels}{rounding}"
