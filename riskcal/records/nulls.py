"""Thresholds that are null in JSON lines, which have no infinity: pandas writes null where the full model ran."""

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import candidates as candidates_
from riskcal.records import columns as table_columns
from riskcal.records import truths


def as_full_model(frame: pd.DataFrame, *, is_json: bool, name: str) -> pd.DataFrame:
    """The table with infinity where a null can mean nothing else; any other null is refused.

    It can mean nothing else in a table from JSON lines in which no row says that it is the full model's, every prompt has one
    null, and what was compared there with the full model, as it must have been, does not differ from it. ``name`` is what the
    log calls a threshold.
    """
    table_columns.require(frame, ["prompt", "threshold"])
    column = table_columns.as_numpy(frame["threshold"], "threshold")
    missing = column.isna().to_numpy(dtype=bool)
    if not missing.any():
        return frame
    if (
        is_json
        and _one_for_each_prompt(frame, column, missing)
        and _are_the_full_model(frame, missing)
    ):
        whole = frame.assign(threshold=np.where(missing, math.inf, candidates_.as_numbers(column)))
        if "dissimilarity" in frame.columns:
            unknown = missing & frame["dissimilarity"].isna().to_numpy(dtype=bool)
            whole["dissimilarity"] = frame["dissimilarity"].mask(unknown, 0.0)
        return whole
    row, many = int(missing.argmax()), int(missing.sum())
    count = f" ({many} such rows)" if many > 1 else ""
    raise RiskcalError(
        f"threshold: {_validate.shown(table_columns.plain(column.iloc[row]))} at row {frame.index[row]}{count} "
        "is not a threshold; give a number, or 'full' for the full model. JSON has no infinity, and pandas writes null for "
        "it: if these "
        f'rows are the full model\'s, read the table with pandas and give Runs.from_frame its fillna({{"{name}": math.inf}}).'
    )


def _one_for_each_prompt(
    frame: pd.DataFrame, column: pd.Series, missing: NDArray[np.bool_]
) -> bool:
    """Whether every prompt has one null, and no threshold stands for the full model beside them."""
    if np.isposinf(candidates_.as_numbers(column)).any():
        return False
    prompts = table_columns.identifiers(frame["prompt"], "prompt")
    of_nulls = prompts[missing]
    return bool(of_nulls.is_unique) and len(of_nulls) == prompts.nunique()


def _are_the_full_model(frame: pd.DataFrame, missing: NDArray[np.bool_]) -> bool:
    """Whether no row with a null has a distance to the full model, but for those whose output failed."""
    if "dissimilarity" not in frame.columns:
        return False  # a risk says nothing of which rows are the full model's
    given = frame["dissimilarity"]
    there = missing & ~given.isna().to_numpy(dtype=bool)
    if "failed" in frame.columns:
        there &= ~truths.of(frame["failed"], "failed")
    return bool((np.abs(table_columns.floats(given)[there]) <= _validate.TOLERANCE).all())
