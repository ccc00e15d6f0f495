"""Tables in and out: Parquet, CSV, JSON lines, folders of Parquet shards, and anything that speaks Arrow."""

import csv
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv

from riskcal import _parquet, _validate
from riskcal._validate import RiskcalError

#: Columns that stay text when a CSV is read, so that ids such as 007 keep their zeros.
TEXT_COLUMNS = ("prompt", "cluster", "group", "measure", "form", "source", "text", "references", "threshold")


def read(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The table in a file, by its ending, or in all Parquet files of a folder."""
    source = Path(path)
    if source.is_dir():
        shards = sorted(source.glob("*.parquet"))
        if not shards:
            raise RiskcalError(f"{source}: the folder holds no .parquet file.")
        return pd.concat([_read_file(shard) for shard in shards], ignore_index=True)
    if not source.exists():
        raise RiskcalError(f"{source}: no such file.")
    return _read_file(source)


def write(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table in the format of the path's ending; an existing file is replaced whole or not at all."""
    target = Path(path)
    kind = _kind(target)
    with _validate.replacing(target) as partial:
        if kind == "parquet":
            _parquet.write(pa.Table.from_pandas(frame, preserve_index=False), partial)
        elif kind == "csv":
            frame.to_csv(partial, index=False, quoting=csv.QUOTE_NONNUMERIC)  # a bare carriage return ends a row
        else:
            with partial.open("w", encoding="utf-8") as file:
                for row in frame.to_dict("records"):
                    file.write(json.dumps({key: _jsonable(str(key), value) for key, value in row.items()}) + "\n")


def from_object(table: Any) -> pd.DataFrame:
    """A pandas frame of a pandas frame, or of any object with the Arrow PyCapsule interface (polars, duckdb, pyarrow)."""
    if isinstance(table, pd.DataFrame):
        return table.reset_index(drop=True)
    if hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__"):
        return _to_pandas(pa.table(table))
    if isinstance(table, dict):
        try:
            return pd.DataFrame(table)
        except ValueError as error:
            raise RiskcalError(f"table: columns of unequal length ({error}).") from None
    raise RiskcalError(
        f"table: a {type(table).__name__} is not a table; give a DataFrame or any object with the Arrow PyCapsule interface."
    )


def require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        have = ", ".join(map(str, frame.columns)) or "none"
        raise RiskcalError(f"{missing[0]}: the column is missing; the table has: {have}.")
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise RiskcalError(f"{twice[0]}: two columns have this name; rename or drop one.")
    if len(frame) == 0:
        raise RiskcalError(f"{columns[0]}: the table is empty; it needs at least one row.")


def identifiers(column: pd.Series, name: str) -> pd.Series:
    """A column of integers or strings; anything else (floats, nulls) cannot name a prompt reliably."""
    missing = column.isna().to_numpy()
    if missing.any():
        raise RiskcalError(f"{name}: missing at row {int(missing.argmax())}; every row needs one.")
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    text = np.array([isinstance(value, str) for value in column])
    if not text.any():
        column = column.infer_objects()
        if pd.api.types.is_integer_dtype(column):
            return column
    if not text.all():
        row = int(text.argmin()) if text[0] else int(text.argmax())  # the first that is not like row 0
        raise RiskcalError(
            f"{name}: {plain(column.iloc[row])!r} at row {row}, in a column of type {column.dtype}; give integers "
            "throughout, or strings throughout."
        )
    empty = (column == "").to_numpy() & (name in ("prompt", "prompts", "cluster"))
    if empty.any():
        raise RiskcalError(f"{name}: missing (an empty text) at row {int(empty.argmax())}; every row needs one.")
    for row, value in enumerate(column):
        if not value.isascii() and value.encode(errors="ignore").decode() != value:
            raise RiskcalError(f"{name}: {value!r} at row {row} is not valid Unicode (a lone surrogate); repair it.")
    return column


def numbers(column: pd.Series, name: str, lower: float, upper: float) -> _validate.Floats:
    """A column of finite numbers within a range; rounding errors beyond it (1e-9) are clipped."""
    values = floats(column)
    bad = ~((values >= lower - _validate.TOLERANCE) & (values <= upper + _validate.TOLERANCE) & (values < float("inf")))
    if bad.any():
        row = int(bad.argmax())
        raise RiskcalError(
            f"{name}: {plain(column.iloc[row])!r} at row {row}; every value must be a finite number in "
            f"[{lower:g}, {upper:g}]. Repair the row, or drop its prompt whole."
        )
    return values.clip(lower, upper)


def floats(column: pd.Series) -> _validate.Floats:
    """A column as float64; whatever is not a number is NaN."""
    try:
        return pd.to_numeric(column, errors="coerce").to_numpy(dtype="float64", na_value=float("nan"))
    except OverflowError:  # an integer beyond any float
        return floats(column.map(lambda v: None if isinstance(v, int) and abs(v) > 2**1000 else v))


def plain(value: Any) -> Any:
    """A cell as Python writes it, for messages: ``nan``, not ``np.float64(nan)``."""
    return value.item() if isinstance(value, np.generic) else value


def _kind(path: Path) -> str:
    kinds = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    if path.suffix.lower() not in kinds:
        raise RiskcalError(f"{path}: unknown ending {path.suffix!r}; use .parquet, .csv or .jsonl.")
    return kinds[path.suffix.lower()]


def _read_file(path: Path) -> pd.DataFrame:
    kind = _kind(path)
    if path.stat().st_size == 0:
        raise RiskcalError(f"{path}: the file is empty.")
    try:
        if kind == "parquet":
            return _to_pandas(_parquet.read(path))
        if kind == "csv":
            text = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(TEXT_COLUMNS, pa.string()), strings_can_be_null=False
            )
            lines = pa.csv.ParseOptions(newlines_in_values=True)
            return _restore_integers(_to_pandas(pa.csv.read_csv(path, parse_options=lines, convert_options=text)))
        return _read_json_lines(path)
    except RiskcalError:
        raise
    except UnicodeDecodeError as error:
        raise RiskcalError(f"{path}: is not UTF-8 text ({error}).") from None
    except OSError as error:
        raise RiskcalError(f"{path}: cannot be read ({error.strerror or str(error).splitlines()[0]}).") from None
    except (pa.ArrowException, ValueError) as error:
        raise RiskcalError(f"{path}: not a readable {kind} file ({str(error).splitlines()[0]}).") from None


def _read_json_lines(path: Path) -> pd.DataFrame:
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RiskcalError(f"{path}: row {number} is not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise RiskcalError(f"{path}: row {number} is not a JSON object.")
            rows.append(row)
    return pd.DataFrame(rows)


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame


def _restore_integers(frame: pd.DataFrame) -> pd.DataFrame:
    """Read ids back as integers where a CSV's text is exactly how integers are written."""
    for name in ("prompt", "cluster"):
        if list(frame.columns).count(name) == 1 and frame[name].str.fullmatch(r"0|-?[1-9]\d{0,18}").all():
            with suppress(OverflowError):  # 19 digits may be more than an int64 holds
                frame[name] = frame[name].astype("int64")
    return frame


def _jsonable(name: str, value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return "full" if name == "threshold" and value == float("inf") else value
