"""Whether high thresholds are the strict ones, as with confidences, or low ones, as with entropies."""

from typing import Any

import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import columns, truths

#: The column that says so in a table of runs; where there is none, high thresholds are.
COLUMN = "lower_is_stricter"


def given(value: Any) -> bool:
    """A truth value."""
    return _validate.truth(value, COLUMN)


def of_frame(frame: pd.DataFrame, told: Any) -> bool:
    """What a table says in its column, or whoever reads it."""
    lower = given(told)
    if COLUMN not in frame.columns or len(frame) == 0:
        return lower
    stated = truths.of(columns.as_numpy(frame[COLUMN], COLUMN), COLUMN)
    if stated.any() != stated.all():
        raise RiskcalError(
            f"{COLUMN}: {bool(stated[0])} at row 0, but {not stated[0]} at row {int((stated != stated[0]).argmax())}; it is the "
            "same throughout. Calibrate each direction from a table of its own."
        )
    if lower and not stated[0]:
        raise RiskcalError(
            f"{COLUMN}: the column says that high thresholds are strict; keep one of the two."
        )
    return bool(stated[0])
