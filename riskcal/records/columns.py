"""Columns of tables as numpy holds them: the one place that knows the types of pandas, Arrow and other libraries."""

import math
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import advice


def from_object(table: Any) -> pd.DataFrame:
    """A pandas frame of a pandas frame, or of any object with the Arrow PyCapsule interface (polars, duckdb, pyarrow).

    Columns come as numpy holds them, in the machine's byte order (`as_numpy`); named levels of an index become columns.
    """
    if isinstance(table, pd.DataFrame):
        frame = _flat(table)
    elif isinstance(table, pd.Series):
        raise RiskcalError(
            "table: a Series is not a table; give the DataFrame that it is of, or its reset_index() where it has keys."
        )
    elif hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__"):
        with _validate.reading("table", "readable through Arrow"):
            frame = of_arrow(pa.table(table))
    elif isinstance(table, dict):
        with _validate.reading("table", "a dictionary of columns of one length"):
            frame = pd.DataFrame({name: _entries(column) for name, column in table.items()})
    else:
        raise RiskcalError(
            f"table: a {type(table).__name__} is not a table; give a DataFrame or any object with the Arrow PyCapsule interface."
        )
    return canonical(frame)


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """Columns of one level, and the keys that a groupby left in the index among them."""
    if table.columns.nlevels > 1:
        raise RiskcalError(
            f"table: its columns have {table.columns.nlevels} levels, {table.columns[0]!r} for instance; "
            f"{advice.of_levels(table.columns, table.index.nlevels)}"
        )
    keys = [name for name in table.index.names if name is not None and name not in table.columns]
    if not keys:
        return table.reset_index(drop=True)
    with _validate.reading("table", "a table whose index can become columns"):
        return table.reset_index(level=keys).reset_index(drop=True)


def canonical(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every column that has a type of numbers as numpy's own; rows of others are looked at where they are used."""
    changed = {}
    for place, (name, column) in enumerate(frame.items()):
        # a date may stand where nobody looks; who asks for the column refuses it
        with suppress(RiskcalError):
            converted = as_numpy(column, str(name))
            if converted is not column:
                changed[place] = converted
    if not changed:
        return frame
    columns = [changed.get(place, frame.iloc[:, place]) for place in range(frame.shape[1])]
    result = pd.concat(columns, axis=1)
    result.columns = frame.columns
    return result


def as_numpy(column: pd.Series, name: str) -> pd.Series:
    """A column of any array type as numpy's: the one place that knows pandas' and Arrow's types.

    Durations are seconds in the column ``seconds``; anywhere else they have no unit that riskcal could know, and are refused,
    as are dates and complex numbers.
    """
    with _validate.reading(name, f"a column of numbers or texts, but of {column.dtype}"):
        return _as_numpy(column, name)


def _as_numpy(column: pd.Series, name: str) -> pd.Series:
    if column.dtype == object and name == "seconds":  # of durations, perhaps
        column = column.infer_objects()
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        simple = (
            column.astype(object).infer_objects()
            if column.isna().any()
            else column.astype(kind.categories.dtype)
        )
        return as_numpy(simple, name)
    if isinstance(kind, pd.ArrowDtype):
        return as_numpy(
            of_arrow(pa.table({"": pa.array(column)})).iloc[:, 0].set_axis(column.index), name
        )
    if isinstance(kind, pd.SparseDtype):
        return as_numpy(pd.Series(np.asarray(column), index=column.index), name)
    if pd.api.types.is_timedelta64_dtype(kind):
        if name != "seconds":
            raise RiskcalError(
                f"{name}: holds durations, whose unit is not that of {name}; give plain numbers (seconds alone may be durations)."
            )
        seconds: pd.Series = column.dt.total_seconds()
        return seconds
    if isinstance(kind, pd.DatetimeTZDtype | pd.PeriodDtype | pd.IntervalDtype) or kind.kind == "M":
        raise RiskcalError(
            f"{name}: holds dates or intervals ({kind}); give numbers, or text where it is a name."
        )
    if kind.kind in "cV":
        raise RiskcalError(
            f"{name}: holds {'complex numbers' if kind.kind == 'c' else 'records'}; give real numbers."
        )
    if pd.api.types.is_extension_array_dtype(kind):
        if not pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind):
            return column  # pandas' strings
        if column.isna().any():
            boolean = pd.api.types.is_bool_dtype(kind)
            return (
                column.astype(object)
                if boolean
                else pd.Series(column.to_numpy("float64", na_value=float("nan")), column.index)
            )
        return pd.Series(
            column.to_numpy(getattr(kind, "numpy_dtype", "float64")), index=column.index
        )
    values = column.to_numpy()
    if kind.kind == "f" and values.dtype.itemsize not in (4, 8):
        return column.astype("float64")  # no index takes half or long doubles
    return (
        column
        if values.dtype.isnative
        else pd.Series(values.astype(values.dtype.newbyteorder("=")), index=column.index)
    )


def series(values: Any, name: str) -> pd.Series:
    """A column of what was given as an array of labels: ids, clusters, groups, texts."""
    with _validate.reading(name, "a list of labels"):
        array = _entries(values)
        array = (
            array
            if isinstance(array, np.ndarray | pd.Series)
            else np.asarray(array, dtype=_label_type(array))
        )
        column = pd.Series(array).reset_index(drop=True) if array.ndim == 1 else None
    if column is None:
        raise RiskcalError(f"{name}: has shape {array.shape}; give one entry per row, (n,).")
    return as_numpy(column, name)


def _entries(values: Any) -> Any:
    """What pandas can make a column of: other libraries' arrays and tensors as numpy's, lists and all else as they are."""
    values = _validate.on_the_host(values)
    tensor = hasattr(values, "dtype") and hasattr(values, "__array__")
    foreign = tensor or isinstance(values, pa.Array | pa.ChunkedArray)
    return (
        np.asarray(values) if foreign and not isinstance(values, np.ndarray | pd.Series) else values
    )


def _label_type(values: Any) -> type | None:
    """Lists of whole numbers and texts keep both, to be refused by name; numpy would make texts of the numbers."""
    kinds = {type(value) for value in values} if isinstance(values, list | tuple) else set()
    return object if str in kinds and len(kinds) > 1 else None


def are_traces(names: Collection[Any]) -> bool:
    """Whether a table with columns of these names holds traces rather than runs."""
    levels = any(re.fullmatch(r"confidence(_\d+)?", str(name)) for name in names)
    return levels and "position" in names and "threshold" not in names


def require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuse a table without rows or without one of these columns, or with two of one name."""
    missing = [name for name in columns if name not in frame.columns]
    if missing[:1] == ["threshold"] and are_traces(frame.columns):
        raise RiskcalError(
            "threshold: the column is missing; a confidence per exit makes traces, which riskcal.Traces.read reads and "
            "riskcal.replay_traces(traces, thresholds) makes runs of."
        )
    if missing:
        have = ", ".join(map(str, frame.columns)) or "none"
        hint = advice.of_missing(missing[0], list(frame.columns))
        raise RiskcalError(f"{missing[0]}: the column is missing; the table has: {have}.{hint}")
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()]
        raise RiskcalError(f"{twice[0]}: two columns have this name; rename or drop one.")
    if len(frame) == 0:
        raise RiskcalError(f"{columns[0]}: the table is empty; it needs at least one row.")


def identifiers(column: pd.Series, name: str) -> pd.Series:
    """A column of integers or strings; anything else (floats, nulls) cannot name a prompt reliably."""
    with _validate.reading(name, "a column of labels"):
        missing = column.isna().to_numpy()
    if missing.any():
        raise _unlabelled(column, name, missing)
    column = as_numpy(column, name)
    if column.dtype == object and all(isinstance(value, UUID) for value in column):
        return column.map(str)  # as all programs write it
    if column.dtype.kind in "iu":
        return column
    if isinstance(column.dtype, pd.StringDtype):
        _refuse_texts(column.drop_duplicates(), name)  # which are the first rows of each
        return column
    text = np.array([isinstance(value, str) for value in column])
    if not text.any():
        column = column.infer_objects()
        if pd.api.types.is_integer_dtype(column):
            return column
        if all(map(_validate.is_whole, column)):
            return _whole(column, name)
    if not text.all():
        row = first_unlike(column)
        raise RiskcalError(
            f"{name}: {_validate.shown(plain(column.iloc[row]))} at row {column.index[row]}, in a column of type "
            f"{column.dtype}; give integers throughout, or strings throughout."
        )
    _refuse_texts(column, name)
    return column


def _refuse_texts(column: pd.Series, name: str) -> None:
    """Refuse texts that cannot be labels; rows keep their numbers."""
    empty = (column == "").to_numpy() & (name in ("prompt", "prompts", "cluster"))
    if empty.any():
        raise _unlabelled(column, name, empty, " (an empty text)")
    for label, value in column.items():
        if not is_unicode(value):
            raise RiskcalError(
                f"{name}: {value!r} at row {label} is not valid Unicode (a lone surrogate); repair it."
            )


def is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogates, which nothing can write."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


def _unlabelled(
    column: pd.Series, name: str, missing: NDArray[np.bool_], what: str = ""
) -> RiskcalError:
    remedy = (
        ""
        if name in ("prompt", "prompts")
        else f"; fill it in, or leave {name} out if nothing is known of it"
    )
    return RiskcalError(
        f"{name}: missing{what} at row {column.index[int(missing.argmax())]} ({int(missing.sum())} such rows); every row "
        f"needs one{remedy}."
    )


def unlike(column: pd.Series) -> NDArray[np.bool_]:
    """Labels that are not of the kind of the first; where that is neither a text nor a whole number, whatever is neither."""
    if len(column) == 0:
        return np.zeros(0, dtype=bool)
    texts = np.array([isinstance(value, str) for value in column], dtype=bool)
    wholes = np.array([_validate.is_whole(value) for value in column], dtype=bool)
    if texts[0] or wholes[0]:
        return ~(texts if texts[0] else wholes)
    result: NDArray[np.bool_] = ~(texts | wholes)
    return result


def first_unlike(column: pd.Series) -> int:
    """The first row whose label is not of the kind of the first."""
    return int(unlike(column).argmax())


def _whole(column: pd.Series, name: str) -> pd.Series:
    """Whole numbers of several types, signed beside unsigned, as one: int64, or uint64 where they need it."""
    values = [int(value) for value in column]
    for kind in (np.int64, np.uint64):
        with suppress(OverflowError):
            return pd.Series(np.array(values, dtype=kind), index=column.index)
    row = next(row for row, value in enumerate(values) if not -(2**63) <= value < 2**63)
    raise RiskcalError(
        f"{name}: {values[row]} at row {column.index[row]} is beyond 64 bits; give ids as strings."
    )


def numbers(
    column: pd.Series,
    name: str,
    lower: float,
    upper: float,
    failed: NDArray[np.bool_] | None = None,
    is_full: NDArray[np.bool_] | None = None,
) -> _validate.Floats:
    """A column of finite numbers within a range; rounding errors beyond it (1e-9) are clipped, what ``failed`` is ``upper``.

    Which rows are the full model's, ``is_full``, changes only what a refusal advises.
    """
    values = floats(column)
    if failed is not None:
        values = np.where(failed, upper, values)
    bad = ~(
        (values >= lower - _validate.TOLERANCE)
        & (values <= upper + _validate.TOLERANCE)
        & (values < float("inf"))
    )
    if bad.any():
        row, many = int(bad.argmax()), int(bad.sum())
        remedy = advice.of_number(
            name,
            upper,
            column.iloc[row],
            of_full_model=is_full is not None and bool(is_full[row]),
        )
        raise RiskcalError(
            f"{name}: {_validate.shown(plain(column.iloc[row]))} at row "
            f"{column.index[row]}{f' ({many} such rows)' if many > 1 else ''}; every value must be a finite number in "
            f"[{lower:g}, {upper:g}]. {remedy}"
        )
    return values.clip(lower, upper)


def is_full(cell: Any) -> bool:
    """Whether a cell is the word for a threshold that nothing reaches."""
    return isinstance(cell, str) and cell.strip().lower() == "full"


def is_missing(cell: Any) -> bool:
    """Whether a cell is a null, NaN, or the empty text that a CSV has for them."""
    if isinstance(cell, str):
        return not cell
    if isinstance(cell, float | np.floating | Decimal):
        return cell != cell
    return cell is None or cell is pd.NA


def floats(column: pd.Series) -> _validate.Floats:
    """A column as float64; whatever is not a number is NaN."""
    column = as_numpy(column, str(column.name))
    if column.dtype == object:
        column = pd.Series([as_number(value) for value in column], column.index, dtype=object)
    try:
        read = pd.to_numeric(column, errors="coerce")
        numbers = read.to_numpy(dtype="float64", na_value=float("nan"), copy=True)
        return _to_the_bit(numbers, column) if column.dtype.kind == "O" else numbers
    except OverflowError:  # an integer beyond any float
        return floats(column.map(lambda v: None if isinstance(v, int) and abs(v) > 2**1000 else v))
    except (TypeError, ValueError):
        return np.full(len(column), np.nan)


def _to_the_bit(numbers: _validate.Floats, column: pd.Series) -> _validate.Floats:
    """The floats nearest to the texts; before pandas 3 the one beside it for a third of those with 17 digits."""
    for row, value in enumerate(column):
        if isinstance(value, str) and np.isfinite(numbers[row]):
            with suppress(ValueError):  # what pandas alone takes for a number
                numbers[row] = float(value)
    return numbers


def as_number(value: Any) -> Any:
    """A cell that is a number or the text of one; pandas would make nanoseconds of a duration or a date."""
    if isinstance(value, Decimal | Fraction):
        if isinstance(value, Decimal) and not value.is_finite():
            return None if value.is_nan() else float(value)
        with suppress(OverflowError):
            number = float(value)
            return number if math.isfinite(number) else None  # a decimal's 1e400
        return None
    return value if isinstance(value, str) or _validate.is_number(value) else None


def plain(value: Any) -> Any:
    """A cell as Python writes it, for messages: ``nan``, not ``np.float64(nan)``."""
    return value.item() if isinstance(value, np.generic) else value


def of_arrow(table: pa.Table) -> pd.DataFrame:
    """An Arrow table as a pandas frame, whatever pandas once wrote of its index."""
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame
