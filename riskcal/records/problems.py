"""Kinds of problems of a log, known by how they are refused: which rows have one, what mends it, and the log without it."""

import math
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import candidates, columns, guessing, names, retries

_Rows = NDArray[np.bool_]

#: Columns that say one thing of a whole table, and which values they may have.
_ONE_THROUGHOUT: dict[str, Callable[[Any], bool]] = {
    "source": lambda value: isinstance(value, str) and value in ("generated", "replayed"),
    "exact": lambda value: isinstance(value, bool),
    "stopped": lambda value: isinstance(value, str),
    "lower_is_stricter": lambda value: isinstance(value, bool | np.bool_),
}

#: How a prompt is refused that has no candidate.
_ALONE = "has the full model's row alone"

_SHARES = ("dissimilarity", "risk", "full_risk")

#: Columns that another system may mean something else by.
_OTHER_MEANINGS = ("source", "exact", "stopped")

#: Columns without which runs can be read, and what a bad one stands for is the default.
_OPTIONAL = (*names.LABELS, "full_risk", *names.THROUGHOUT, "thresholds")


def rows(frame: pd.DataFrame, column: str, said: str, settings: Sequence[str]) -> _Rows:
    """The rows that have the problem of a column that was refused; none where it is not one of rows.

    ``settings`` are the further columns that tell candidates apart.
    """
    if column not in frame.columns:
        return np.zeros(len(frame), dtype=bool)
    found = _alike(frame, column, said, settings)
    named = re.search(r"\brow (\d+)", said)
    here = frame.index == int(named[1]) if named else np.zeros(len(frame), dtype=bool)
    if here.any() and not (found & here).any():
        # of a kind that is not known: what else is wrong in the same way, only reading tells; the same value is
        cell = _validate.shown(frame.loc[here, column].iloc[0])
        alike = np.array([_validate.shown(value) == cell for value in frame[column]], dtype=bool)
        return (
            alike & ~_full(frame) if "threshold" in frame and not _full(frame)[here].any() else here
        )
    return found


def _alike(frame: pd.DataFrame, column: str, said: str, settings: Sequence[str]) -> _Rows:
    if "stands twice" in said:
        return retries.repeated(frame, settings)
    if "lacks the" in said:
        lacking = _without_full if "lacks the full model's row" in said else _without_some
        return _first_rows(frame, lacking(frame, settings))
    if _ALONE in said:
        tried = _of_prompts(frame, frame["prompt"][~_full(frame)])
        return _first_rows(frame, frame["prompt"][~tried])
    if "the full model's rows of" in said:
        return _of_prompts(frame, _unsteady(frame, column)) & _full(frame)
    if "a full-model row" in said:
        return _full(frame) & (columns.floats(frame[column]) > _validate.TOLERANCE)
    if column == "threshold":
        nulls_alone = "JSON has no infinity" in said
        return _absent(frame[column]) if nulls_alone else _no_thresholds(frame[column])
    if "true or false in every row" in said:
        return np.array([not isinstance(v, bool | np.bool_) for v in frame[column]], dtype=bool)
    if "not valid Unicode" in said:
        return np.array([isinstance(v, str) and not columns.is_unicode(v) for v in frame[column]])
    if column in _ONE_THROUGHOUT:
        return _unlike_all(frame[column], column)
    if column == "prompt":
        return no_labels(frame[column], column)
    if column in names.LABELS:
        wrong = no_labels(frame[column], column)
        return wrong if wrong.any() else _changing(frame, column)
    if "must be a finite number" in said:
        upper = 1.0 if column in _SHARES else math.inf
        return _out_of_range(frame, column, upper)
    return _missing(frame[column]) & ~_full(frame)


def without(
    frame: pd.DataFrame, column: str, said: str, bad: _Rows, known: Collection[str]
) -> pd.DataFrame:
    """The log as if the problem were mended, to see what it hides; as it is where nothing more can be seen.

    ``known`` is as in `mend`.
    """
    if "stands twice" in said:
        return frame[~bad]
    if "lacks the" in said or _ALONE in said or "the full model's rows of" in said:
        return frame[~_of_prompts(frame, frame["prompt"][bad])]
    if _in_percent(frame, column, said, known):
        return frame.assign(**{column: columns.floats(frame[column]) / 100})
    if column in _OPTIONAL:
        return frame.drop(columns=column)
    if column == "threshold" and bad.any():
        return _with_thresholds(frame, bad)
    if column == "prompt":
        return frame[~bad]
    if column == "failed":
        return frame.assign(failed=frame[column].astype(object).mask(bad, False).infer_objects())
    if "a full-model row" in said and "'1 - x')" in said:
        return frame.assign(**{column: 1.0 - columns.floats(frame[column])})
    if f"--columns {column}_logged={column}" in said:
        return frame.drop(columns=column)
    if "a full-model row" in said or "must be a finite number" in said:
        numbers = np.where(bad, 0.0, columns.floats(frame[column])) if not bad.all() else 0.0
        return frame.assign(**{column: numbers})
    return frame[~_of_prompts(frame, frame["prompt"][bad])]


def too_few(frame: pd.DataFrame) -> bool:
    """Whether what is left of a log is too little to say anything of it."""
    return _prompts(frame).nunique() < 2 or bool(_full(frame).all())


def mend(
    frame: pd.DataFrame, column: str, said: str, bad: _Rows, known: Collection[str]
) -> tuple[str, ...]:
    """The option of the command line that mends it, where one does; what is ``known`` of a column is not said again."""
    if column in _OTHER_MEANINGS or f"--columns {column}_logged={column}" in said:
        return (f"--columns {column}_logged={column}",)
    if "a full-model row" in said and "'1 - x')" in said and column not in known:
        return (f"--columns {column}=1-{column}",)
    if "must be a finite number" not in said or column not in _SHARES:
        return ()
    if _in_percent(frame, column, said, known):
        return (f"--columns {column}={column}/100",)
    if "failed" not in frame.columns and (name := guessing.failures(frame, bad)):
        return (f"--columns {shlex.quote(f'failed={name}')}",)
    return ()


def _in_percent(frame: pd.DataFrame, column: str, said: str, known: Collection[str]) -> bool:
    """Whether a share was refused because all of its column are percentages."""
    refused = "must be a finite number" in said and column in _SHARES and column not in known
    return refused and guessing.percent(frame[column])


def _without_full(frame: pd.DataFrame, _: Sequence[str]) -> pd.Series:
    return frame["prompt"][~_of_prompts(frame, frame["prompt"][_full(frame)])]


def _without_some(frame: pd.DataFrame, settings: Sequence[str]) -> pd.Series:
    """The prompts that have not as many candidates as there are."""
    ran = frame[~_full(frame)]
    candidate = retries.coded(ran, settings, of_prompts=False)
    held = pd.Series(candidate, ran.index).groupby(ran["prompt"], sort=False).nunique()
    whole = held.index[held == len(np.unique(candidate))]
    return frame["prompt"][~frame["prompt"].isin(whole)]


def _unsteady(frame: pd.DataFrame, name: str) -> pd.Series:
    """The prompts whose rows of the full model differ."""
    full = frame[_full(frame)]
    held = pd.Series(columns.floats(full[name])).groupby(full["prompt"].to_numpy(), sort=False)
    return pd.Series(held.nunique()[held.nunique() > 1].index)


def _missing(column: pd.Series) -> _Rows:
    empty = np.array([isinstance(value, str) and not value for value in column], dtype=bool)
    missing: _Rows = column.isna().to_numpy(dtype=bool) | empty
    return missing


def _absent(column: pd.Series) -> _Rows:
    result: _Rows = column.isna().to_numpy(dtype=bool)
    return result


def _unlike_all(column: pd.Series, name: str) -> _Rows:
    """What a column of one value for the whole table does not allow, or what is not its first where that is allowed."""
    allowed = _ONE_THROUGHOUT[name]
    wrong = np.array([not allowed(value) for value in column], dtype=bool)
    if wrong.any():
        return wrong
    first = column.iloc[0]
    return np.array([value != first for value in column], dtype=bool)


def _full(frame: pd.DataFrame) -> _Rows:
    return np.isposinf(candidates.as_numbers(frame["threshold"]))


def _no_thresholds(column: pd.Series) -> _Rows:
    with suppress(RiskcalError):
        numbers = candidates.as_numbers(columns.as_numpy(column, "threshold"))
        return np.isnan(numbers) | np.isneginf(numbers)
    return np.ones(len(column), dtype=bool)


def no_labels(column: pd.Series, name: str) -> _Rows:
    """What is null; where nothing is, what is of another type than the first; where nothing is, an empty text."""
    if (missing := _absent(column)).any():
        return missing
    if (unlike := columns.unlike(column)).any():
        return unlike
    return _missing(column) if name in ("prompt", "cluster") else missing


def _changing(frame: pd.DataFrame, name: str) -> _Rows:
    """Where a prompt's label is not that of its first row."""
    first = frame.groupby("prompt", sort=False)[name].transform("first")
    return (frame[name] != first).to_numpy(dtype=bool)


def _out_of_range(frame: pd.DataFrame, name: str, upper: float) -> _Rows:
    try:
        numbers = columns.floats(frame[name])
    except RiskcalError:
        return np.ones(len(frame), dtype=bool)
    slack = _validate.TOLERANCE
    bad = ~((numbers >= -slack) & (numbers <= upper + slack) & (numbers < math.inf))
    excused = "failed" in frame.columns and upper == 1.0
    result: _Rows = bad & ~frame["failed"].to_numpy(dtype=bool) if excused else bad
    return result


def _of_prompts(frame: pd.DataFrame, prompts: pd.Series) -> _Rows:
    return _prompts(frame).isin(prompts).to_numpy(dtype=bool)


def _prompts(frame: pd.DataFrame) -> pd.Series:
    """Prompts that can be compared, before it is known that they are numbers or texts."""
    comparable = [
        v if isinstance(v, str) or _validate.is_whole(v) else _validate.shown(v)
        for v in frame["prompt"]
    ]
    return pd.Series(comparable, frame.index, dtype=object)


def _first_rows(frame: pd.DataFrame, prompts: pd.Series) -> _Rows:
    return _of_prompts(frame, prompts) & ~frame["prompt"].duplicated().to_numpy(dtype=bool)


def _with_thresholds(frame: pd.DataFrame, bad: _Rows) -> pd.DataFrame:
    """Infinity for what is no threshold, if it may be the full model's; else the log less such prompts.

    It may where no other row is, and a prompt has one at most, or all of them say the same word, retries of it included.
    """
    prompts = _prompts(frame)[bad]
    words = frame["threshold"][bad]
    one = all(isinstance(word, str) for word in words) and words.nunique() == 1
    if (one or not prompts.duplicated().any()) and not _full(frame).any():
        numbers = np.where(bad, math.inf, candidates.as_numbers(frame["threshold"]))
        return frame.assign(threshold=numbers)
    return frame[~_of_prompts(frame, prompts)]
