"""What traces say of a prompt beside its decisions: its cluster and text, and whether its output failed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import columns, reading, truths

#: The columns that the runs of a replay have, too; ``group`` is a token's class there.
NAMES = ("cluster", "text", "failed")


def of_rows(
    given: Mapping[str, Any], ids: NDArray[Any], code: NDArray[np.intp]
) -> dict[str, NDArray[Any]]:
    """Labels of each row, (N,), as far as given; of prompts that ``code`` numbers, in whose rows they may not change.

    A column of nothing but nulls is none. A ``text`` that changes, as a token's own does, is left out with a warning.
    """
    found = {
        name: columns.series(value, name) for name, value in given.items() if value is not None
    }
    for name, column in found.items():
        if len(column) != len(ids):
            raise RiskcalError(
                f"{name}: has shape ({len(column)},); expected ({len(ids)},), one entry per token."
            )
    found = {
        name: column for name, column in found.items() if not all(map(columns.is_missing, column))
    }
    if not found:
        return {}
    frame = pd.DataFrame({"prompt": ids, **found})
    labels: dict[str, NDArray[Any]] = {}
    for name in found:
        if name == "failed":
            labels[name] = _failed(found[name])
            continue
        try:
            labels[name] = reading.label_of(frame, name, code, int(code.max()) + 1)[code]
        except RiskcalError as error:
            if name != "text":
                raise
            _validate.warn(f"{error} The column is left out.")
    return labels


def _failed(column: pd.Series) -> NDArray[np.bool_]:
    """Truth values, which may be written as 1 and 0."""
    if pd.api.types.is_numeric_dtype(column) and column.isin([0, 1]).all():
        column = column.astype(bool)
    return truths.of(column, "failed")


def of_prompts(
    labels: Mapping[str, NDArray[Any]], start: NDArray[np.intp]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Cluster and text of each prompt, (n,), whose rows begin at ``start`` (n + 1,), and where any row's output failed."""
    first = start[:-1]
    own = {name: label[first] for name, label in labels.items() if name != "failed"}
    if "failed" not in labels:
        return own, np.zeros(len(first), dtype=bool)
    return own, np.logical_or.reduceat(labels["failed"], first)
