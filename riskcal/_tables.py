"""Tables in and out: Parquet, CSV, JSON lines, folders of Parquet shards, and anything that speaks Arrow."""

import csv
import glob
import io
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from riskcal import _parquet, _validate
from riskcal._validate import RiskcalError

#: Columns that stay text when a CSV is read, so that ids such as 007 keep their zeros.
TEXT_COLUMNS = (
    "prompt",
    "cluster",
    "group",
    "measure",
    "form",
    "source",
    "text",
    "references",
    "threshold",
)


#: What a path may be: a file, a folder, a pattern such as ``logs/*.jsonl``, or a list of these.
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
#: Stands in the folders that `riskcal_adapters.record` writes: their shards are at the top, and what is below is not runs.
RECORDING = "recording.json"


def read(source: Source) -> pd.DataFrame:
    """The table in a file, by its ending, or in all files of a folder, a pattern or a list, in the order of their names."""
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, bytes) or not isinstance(source, Iterable):
            raise RiskcalError(
                f"path: {source!r} is no path; give a file, a folder, a pattern or a list of these."
            )
        parts = [read(one) for one in source]
        if not parts:
            raise RiskcalError("path: the list is empty; give at least one file.")
        return _together(parts)
    path = Path(source)
    if path.is_dir():
        return _together(
            [_partition(_read_file(file), file.relative_to(path), file) for file in _files(path)]
        )
    if not path.exists():
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  (pathlib has no patterns of absolute paths)
        if found:
            return read(found)
        raise RiskcalError(f"{path}: no such file.")
    return _read_file(path)


def _files(folder: Path) -> list[Path]:
    """Every file below a folder; one that cannot be read is named rather than left out."""
    try:
        seen = [file for file in _contents(folder, set()) if not _is_mark(file)]
    except OSError as error:
        raise RiskcalError(
            f"{error.filename or folder}: cannot be read ({error.strerror})."
        ) from None
    files = [file for file in seen if _ending(file)[0] in _KINDS]
    others = [file for file in seen if _ending(file)[0] not in _KINDS]
    if others:
        named = ", ".join(str(file.relative_to(folder)) for file in others[:20])
        raise RiskcalError(
            f"{folder}: holds {len(others)} files that are no tables ({named}{', ...' if len(others) > 20 else ''}), and would "
            f"be read without them. Move them elsewhere, or give the tables alone: a list of files, or a pattern such as "
            f"'{folder}/**/*.parquet'."
        )
    if not files:
        raise RiskcalError(f"{folder}: the folder holds no .parquet, .csv or .jsonl file.")
    return files


def _contents(folder: Path, entered: set[Path]) -> Iterator[Path]:
    """All files to the folder's depth, links followed, none twice; of a recording its table alone, which stands at the top."""
    if (real := folder.resolve()) in entered:
        return
    entered.add(real)
    recorded = (folder / RECORDING).exists()
    for path in sorted(folder.iterdir()):
        if recorded and path.name in (RECORDING, "traces", "unfinished"):
            continue
        if path.is_dir():
            yield from _contents(path, entered)
        else:
            yield path


def _is_mark(file: Path) -> bool:
    """Whether a file is a mark of some program (``.DS_Store``, ``_SUCCESS``), or not whole yet, and no table."""
    return file.name[0] in "._" and _ending(file)[0] not in _KINDS


def _partition(frame: pd.DataFrame, below: Path, file: Path) -> pd.DataFrame:
    """The frame with what folders such as ``threshold=0.9`` say of it as columns."""
    for part in below.parts[:-1]:
        name, says, value = part.partition("=")
        if not says:
            continue
        if name in frame.columns:
            raise RiskcalError(
                f"{file}: {name} is a column of the file and the name of its folder; keep one of the two."
            )
        frame = frame.assign(**{name: _partition_value(name, urllib.parse.unquote(value))})
    return frame


def _partition_value(name: str, value: str) -> Any:
    if value == "__HIVE_DEFAULT_PARTITION__":
        return None
    if name in TEXT_COLUMNS:
        return int(value) if name in ("prompt", "cluster") and _INTEGER.fullmatch(value) else value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _together(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables below one another; a column that some of them lack is missing there, as the checks of each column say.

    A part of outputs that all ended need not say that none ``failed``. Columns of several types become objects, since pandas
    would make floats of signed and unsigned ids.
    """
    if len(parts) == 1:
        return parts[0]
    if any("failed" in part.columns for part in parts):
        parts = [part if "failed" in part.columns else part.assign(failed=False) for part in parts]
    names = dict.fromkeys(name for part in parts for name in part.columns if part.columns.is_unique)
    mixed = [
        name
        for name in names
        if len({part[name].dtype for part in parts if name in part.columns}) > 1
    ]
    alike = [
        part.astype({name: object for name in mixed if name in part.columns}) for part in parts
    ]
    return pd.concat(alike, ignore_index=True)


def write(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table in the format of the path's ending; an existing file is replaced whole or not at all."""
    if not isinstance(path, str | os.PathLike):
        raise RiskcalError(f"path: {path!r} is no path of a file.")
    target = Path(path)
    kind = _kind(target)
    with _validate.replacing(target) as partial:
        try:
            _write_as(kind, frame, partial)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RiskcalError(
                f"{target}: cannot be written as {kind} ({_validate.reason(error)})."
            ) from None


def _write_as(kind: str, frame: pd.DataFrame, path: Path) -> None:
    if kind == "parquet":
        _parquet.write(pa.Table.from_pandas(frame, preserve_index=False), path)
    elif kind == "csv":
        frame.to_csv(
            path, index=False, quoting=csv.QUOTE_NONNUMERIC
        )  # a bare carriage return ends a row
    else:
        with path.open("w", encoding="utf-8") as file:
            for row in frame.to_dict("records"):
                file.write(
                    json.dumps({key: _jsonable(str(key), value) for key, value in row.items()})
                    + "\n"
                )


def from_object(table: Any) -> pd.DataFrame:
    """A pandas frame of a pandas frame, or of any object with the Arrow PyCapsule interface (polars, duckdb, pyarrow).

    Columns come as numpy holds them, in the machine's byte order (`as_numpy`); named levels of an index become columns.
    """
    if isinstance(table, pd.DataFrame):
        frame = _flat(table)
    elif hasattr(table, "__arrow_c_stream__") or hasattr(table, "__arrow_c_array__"):
        with _validate.reading("table", "readable through Arrow"):
            frame = _to_pandas(pa.table(table))
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
            f"table: its columns have {table.columns.nlevels} levels, {table.columns[0]!r} for instance; flatten them first: "
            "table.columns = [level[0] for level in table.columns]."
        )
    keys = [name for name in table.index.names if name is not None and name not in table.columns]
    if not keys:
        return table.reset_index(drop=True)
    with _validate.reading("table", "a table whose index can become columns"):
        return table.reset_index(level=keys).reset_index(drop=True)


def canonical(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every column that has a type of numbers as numpy's own; rows of others are looked at where they are used."""
    changed = {}
    for place, name in enumerate(frame.columns):
        column = frame.iloc[:, place]
        with suppress(
            RiskcalError
        ):  # a date may stand where nobody looks; who asks for the column refuses it
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
            _to_pandas(pa.table({"": pa.array(column)})).iloc[:, 0].set_axis(column.index), name
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
    with _validate.reading(name, "a column of labels"):
        missing = column.isna().to_numpy()
    if missing.any():
        remedy = (
            ""
            if name in ("prompt", "prompts")
            else f"; fill it in, or leave {name} out if nothing is known of it"
        )
        raise RiskcalError(
            f"{name}: missing at row {int(missing.argmax())} ({int(missing.sum())} such rows); every row needs one{remedy}."
        )
    column = as_numpy(column, name)
    text = np.array([isinstance(value, str) for value in column])
    if not text.any():
        column = column.infer_objects()
        if pd.api.types.is_integer_dtype(column):
            return column
        if all(map(_validate.is_whole, column)):
            return _whole(column, name)
    if not text.all():
        row = (
            int(text.argmin()) if text[0] else int(text.argmax())
        )  # the first that is not like row 0
        raise RiskcalError(
            f"{name}: {_validate.shown(plain(column.iloc[row]))} at row {row}, in a column of type {column.dtype}; give integers "
            "throughout, or strings throughout."
        )
    empty = (column == "").to_numpy() & (name in ("prompt", "prompts", "cluster"))
    if empty.any():
        raise RiskcalError(
            f"{name}: missing (an empty text) at row {int(empty.argmax())}; every row needs one."
        )
    for row, value in enumerate(column):
        if not value.isascii() and value.encode(errors="ignore").decode() != value:
            raise RiskcalError(
                f"{name}: {value!r} at row {row} is not valid Unicode (a lone surrogate); repair it."
            )
    return column


def _whole(column: pd.Series, name: str) -> pd.Series:
    """Whole numbers of several types, signed beside unsigned, as one: int64, or uint64 where they need it."""
    values = [int(value) for value in column]
    for kind in (np.int64, np.uint64):
        with suppress(OverflowError):
            return pd.Series(np.array(values, dtype=kind), index=column.index)
    row = next(row for row, value in enumerate(values) if not -(2**63) <= value < 2**63)
    raise RiskcalError(
        f"{name}: {values[row]} at row {row} is beyond 64 bits; give ids as strings."
    )


def numbers(
    column: pd.Series,
    name: str,
    lower: float,
    upper: float,
    failed: NDArray[np.bool_] | None = None,
    reference: NDArray[np.bool_] | None = None,
) -> _validate.Floats:
    """A column of finite numbers within a range; rounding errors beyond it (1e-9) are clipped, what ``failed`` is ``upper``.

    Which rows are the full model's, ``reference``, changes only what a refusal advises.
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
        remedy = _remedy(name, upper, is_reference=reference is not None and bool(reference[row]))
        raise RiskcalError(
            f"{name}: {_validate.shown(plain(column.iloc[row]))} at row {row}{f' ({many} such rows)' if many > 1 else ''}; every "
            f"value must be a finite number in [{lower:g}, {upper:g}]. {remedy}"
        )
    return values.clip(lower, upper)


def _remedy(name: str, upper: float, *, is_reference: bool) -> str:
    """What to give for a number that is missing or impossible; never to leave out what failed, nor to credit for it."""
    if upper == float("inf"):
        return (
            f"Give what the run took, failed or not; or leave {name} out if it is not known of all."
        )
    if name == "full_risk":
        return (
            "Where the full model's output failed write 0, so that no candidate is credited for it."
        )
    if is_reference:
        return "It is of the full model: if its output failed (a time-out, a loop, an empty text), say so in a column failed."
    return (
        f"An output that failed (a time-out, a loop, an empty text) has the worst loss, {upper:g}: write it there, or say so "
        "in a column failed. To leave out what failed would select on the outcome."
    )


def truths(column: pd.Series, name: str) -> NDArray[np.bool_]:
    """A column of true and false, none missing."""
    bad = np.array([not isinstance(value, bool | np.bool_) for value in column])
    if bad.any():
        row = int(bad.argmax())
        cell, many = _validate.shown(plain(column.iloc[row])), int(bad.sum())
        raise RiskcalError(
            f"{name}: {cell} at row {row} ({many} such rows); it is true or false in every row."
        )
    return column.to_numpy(dtype=bool)


def floats(column: pd.Series) -> _validate.Floats:
    """A column as float64; whatever is not a number is NaN."""
    column = as_numpy(column, str(column.name))
    if column.dtype == object:
        column = column.map(_number)
    try:
        return pd.to_numeric(column, errors="coerce").to_numpy(
            dtype="float64", na_value=float("nan")
        )
    except OverflowError:  # an integer beyond any float
        return floats(column.map(lambda v: None if isinstance(v, int) and abs(v) > 2**1000 else v))
    except (TypeError, ValueError):
        return np.full(len(column), np.nan)


def _number(value: Any) -> Any:
    """A cell that is a number or the text of one; pandas would make nanoseconds of a duration or a date."""
    if isinstance(value, Decimal | Fraction):
        return None if isinstance(value, Decimal) and value.is_nan() else float(value)
    return value if isinstance(value, str) or _validate.is_number(value) else None


def plain(value: Any) -> Any:
    """A cell as Python writes it, for messages: ``nan``, not ``np.float64(nan)``."""
    return value.item() if isinstance(value, np.generic) else value


_KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_INTEGER = re.compile(r"0|-?[1-9]\d{0,18}")


def _ending(path: Path) -> tuple[str, str | None]:
    """The ending that says what a file holds, and how it is packed."""
    packed = _PACKED.get(path.suffix.lower())
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _kind(path: Path) -> str:
    ending, packed = _ending(path)
    if ending not in _KINDS or (packed and _KINDS[ending] == "parquet"):
        raise RiskcalError(
            f"{path}: unknown ending {''.join(path.suffixes[-2:])!r}; use .parquet, .csv or .jsonl (also .csv.gz, .jsonl.zst)."
        )
    return _KINDS[ending]


def _read_file(path: Path) -> pd.DataFrame:
    kind = _kind(path)
    try:
        if path.stat().st_size == 0:
            raise RiskcalError(f"{path}: the file is empty.")
        if kind == "parquet":
            return canonical(_to_pandas(_parquet.read(path)))
        with pa.input_stream(str(path), compression=_ending(path)[1]) as stream:
            return _read_csv(stream) if kind == "csv" else _read_json_lines(stream, path)
    except RiskcalError as error:
        raise (
            error if str(error).startswith(str(path)) else RiskcalError(f"{path}: {error}")
        ) from None
    except UnicodeDecodeError as error:
        raise RiskcalError(f"{path}: is not UTF-8 text ({error}).") from None
    except OSError as error:
        raise RiskcalError(
            f"{path}: cannot be read ({error.strerror or _validate.reason(error)})."
        ) from None
    except (pa.ArrowException, ValueError) as error:
        raise RiskcalError(
            f"{path}: not a readable {kind} file ({_validate.reason(error)})."
        ) from None


def _read_csv(stream: Any) -> pd.DataFrame:
    text = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(TEXT_COLUMNS, pa.string()), strings_can_be_null=False
    )
    lines = pa.csv.ParseOptions(newlines_in_values=True)
    return canonical(
        _restore_integers(
            _to_pandas(pa.csv.read_csv(stream, parse_options=lines, convert_options=text))
        )
    )


def _read_json_lines(stream: Any, path: Path) -> pd.DataFrame:
    rows = []
    # some programs begin a file with a byte-order mark
    for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig")):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RiskcalError(f"{path}: row {number} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise RiskcalError(f"{path}: row {number} is not a JSON object.")
        rows.append(row)
    return canonical(pd.DataFrame(rows))


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(ignore_metadata=True)
    return frame


def _restore_integers(frame: pd.DataFrame) -> pd.DataFrame:
    """Read ids back as integers where a CSV's text is exactly how integers are written."""
    for name in ("prompt", "cluster"):
        if (
            list(frame.columns).count(name) == 1
            and frame[name].str.fullmatch(_INTEGER.pattern).all()
        ):
            with suppress(OverflowError):  # 19 digits may be more than an int64 holds
                frame[name] = frame[name].astype("int64")
    return frame


def _jsonable(name: str, value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return "full" if name == "threshold" and value == float("inf") else value
