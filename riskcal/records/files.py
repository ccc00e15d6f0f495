"""Tables in files: Parquet, CSV, JSON lines, packed or not, and folders, patterns and lists of them."""

import csv
import io
import json
import os
import shutil
import tempfile
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from riskcal import _parquet, _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.records import csv_tables, json_tables, sources
from riskcal.records.columns import canonical, of_arrow
from riskcal.records.csv_tables import INTEGER
from riskcal.records.json_tables import objects as json_objects
from riskcal.records.sources import RECORDING, Part, Source, listed, named, parts

__all__ = [
    "RECORDING",
    "Part",
    "Source",
    "in_its_folder",
    "is_json_lines",
    "json_objects",
    "listed",
    "named",
    "parts",
    "read",
    "read_part",
    "write",
]

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

#: Those of them that are read back as integers where they are written like some.
ID_COLUMNS = ("prompt", "cluster")

#: The mark of a table from JSON lines, in which a null may have been an infinity.
_JSON = "riskcal.json_lines"

#: The mark of a table from CSV, where nothing says whether an id of digits is a number or a text.
_CSV = "riskcal.csv"


def read(source: Source, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table in a file, by its ending, or in all files of a folder or a pattern, by their names, or of a list, in its order.

    Columns keep their names. ``names`` gives the file's name of each of riskcal's columns that has another there, to be read so.
    """
    found = parts(source)
    return _together([read_part(part, names) for part in found], names or {})


def read_part(part: Part, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table in one file, with what the names of its folders say."""
    return in_its_folder(_read_file(part.file, names or {}), part, names or {})


def is_json_lines(frame: pd.DataFrame) -> bool:
    """Whether all of a table that `read` made comes from JSON lines."""
    return bool(frame.attrs.get(_JSON))


def in_its_folder(frame: pd.DataFrame, part: Part, names: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a file with what folders such as ``threshold=0.9`` say of them as columns."""
    below = () if part.folder is None else part.file.relative_to(part.folder).parts[:-1]
    for folder in below:
        name, says, value = folder.partition("=")
        if not says:
            continue
        if name in frame.columns and _says(frame[name], urllib.parse.unquote(value)):
            continue  # polars writes the column into the files, too
        if name in frame.columns:
            raise RiskcalError(
                f"{part.file}: {name} is a column of the file and the name of its folder; keep one of the two."
            )
        frame = frame.assign(**{name: _partition_value(name, urllib.parse.unquote(value), names)})
    return frame


def _says(column: pd.Series, value: str) -> bool:
    """Whether all cells of a column are what the name of a folder says."""
    for cell in column.drop_duplicates():
        with suppress(TypeError, ValueError):
            if str(cell) == value or float(cell) == float(value):
                continue
        return False
    return True


def _partition_value(name: str, value: str, names: Mapping[str, str]) -> Any:
    if value == "__HIVE_DEFAULT_PARTITION__":
        return None
    if name in _in_the_file(TEXT_COLUMNS, names):
        is_id = name in _in_the_file(ID_COLUMNS, names)
        return int(value) if is_id and INTEGER.fullmatch(value) else value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _in_the_file(columns: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """How a file calls these columns: by their name, unless that name is another's, or by what ``names`` says."""
    own = [name for name in columns if name not in names and name not in names.values()]
    return {*own, *(names[name] for name in columns if name in names)}


def _together(parts: list[pd.DataFrame], names: Mapping[str, str]) -> pd.DataFrame:
    """Tables below one another; a column that some of them lack is missing there, as the checks of each column say.

    A part of outputs that all ended need not say that none ``failed``. Columns of several types become objects, since pandas
    would make floats of signed and unsigned ids.
    """
    if len(parts) == 1:
        return parts[0]
    failed = names.get("failed", "failed")
    if any(failed in part.columns for part in parts):
        parts = [
            part if failed in part.columns else part.assign(**{failed: False}) for part in parts
        ]
    found = dict.fromkeys(name for part in parts for name in part.columns if part.columns.is_unique)
    mixed = [
        name
        for name in found
        if len({part[name].dtype for part in parts if name in part.columns}) > 1
    ]
    parts = [_with_ids_as_text(part, parts, names) for part in parts]
    alike = [
        part.astype({name: object for name in mixed if name in part.columns}) for part in parts
    ]
    whole = pd.concat(alike, ignore_index=True)
    whole.attrs = {_JSON: True} if all(map(is_json_lines, parts)) else {}
    return whole


def _with_ids_as_text(
    part: pd.DataFrame, parts: list[pd.DataFrame], names: Mapping[str, str]
) -> pd.DataFrame:
    """A CSV whose ids were taken for integers, as they were written, where another part has texts."""
    whole = [
        name
        for name in _in_the_file(ID_COLUMNS, names)
        if name in part.columns
        and part[name].dtype.kind == "i"
        and any(name in other and pd.api.types.is_string_dtype(other[name]) for other in parts)
    ]
    return part.astype(dict.fromkeys(whole, str)) if _CSV in part.attrs else part


def write(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table in the format of the path's ending; an existing file is replaced whole or not at all."""
    target = _replacing.a_path(path)
    kind = sources.kind(target)
    if kind == "json":
        raise RiskcalError(
            f"{target}: rows are written as .parquet, .csv or .jsonl; use one of these."
        )
    with _replacing.replacing(target) as partial:
        try:
            _write_as(kind, frame, partial, sources.ending(target)[1])
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RiskcalError(
                f"{target}: cannot be written as {kind} ({_validate.reason(error)})."
            ) from None


def _write_as(kind: str, frame: pd.DataFrame, path: Path, packed: str | None) -> None:
    if kind == "parquet":
        _parquet.write(pa.Table.from_pandas(frame, preserve_index=False), path)
        return
    if packed is None:
        _write_text(kind, frame, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        _write_text(kind, frame, plain)
        with (
            plain.open("rb") as text,
            pa.output_stream(str(path), compression=packed) as stream,
        ):
            shutil.copyfileobj(text, stream)


def _write_text(kind: str, frame: pd.DataFrame, path: Path) -> None:
    if kind == "csv":
        frame.to_csv(
            path, index=False, quoting=csv.QUOTE_NONNUMERIC
        )  # a bare carriage return ends a row
        return
    with path.open("w", encoding="utf-8") as file:
        for row in frame.to_dict("records"):
            file.write(
                json.dumps({key: _jsonable(str(key), value) for key, value in row.items()}) + "\n"
            )


def _read_file(path: Path, names: Mapping[str, str]) -> pd.DataFrame:
    kind = sources.kind(
        path, " What is of another kind, let pandas read it and give the table to from_frame."
    )
    try:
        if path.stat().st_size == 0:
            raise RiskcalError(f"{path}: the file is empty.")
        return _read_as(kind, path, names)
    except RiskcalError as error:
        raise (
            error if str(error).startswith(str(path)) else RiskcalError(f"{path}: {error}")
        ) from None
    except UnicodeDecodeError as error:
        raise RiskcalError(
            f"{path}: is not UTF-8 text ({sources.what_it_is(path, error)})."
        ) from None
    except OSError as error:
        raise RiskcalError(
            f"{path}: cannot be read ({error.strerror or _validate.reason(error)})."
        ) from None
    except (pa.ArrowException, ValueError) as error:
        reason = sources.what_it_is(path, error) if kind == "csv" else _validate.reason(error)
        raise RiskcalError(f"{path}: not a readable {kind} file ({reason}).") from None


def _read_as(kind: str, path: Path, names: Mapping[str, str]) -> pd.DataFrame:
    if kind == "parquet":
        return canonical(of_arrow(_parquet.read(path)))
    if kind == "jsonl":
        return _marked(pd.DataFrame([row for _, row in json_objects(path)]), _JSON)
    with pa.input_stream(str(path), compression=sources.ending(path)[1]) as stream:
        if kind == "json":
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            return _marked(json_tables.whole(text, path), _JSON)
        texts, ids = _in_the_file(TEXT_COLUMNS, names), _in_the_file(ID_COLUMNS, names)
        threshold = names.get("threshold", "threshold")
        return _marked(csv_tables.read(stream, texts, ids, threshold), _CSV)


def _marked(frame: pd.DataFrame, mark: str) -> pd.DataFrame:
    result = canonical(frame)
    result.attrs[mark] = True
    return result


def _jsonable(name: str, value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return "full" if name == "threshold" and value == float("inf") else value
