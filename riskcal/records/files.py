"""Tables in files: Parquet, CSV, JSON lines, packed or not, and folders, patterns and lists of them."""

import csv
import io
import json
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from riskcal import _parquet, _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.records import csv_tables, json_tables, sources
from riskcal.records.columns import canonical, of_arrow
from riskcal.records.csv_tables import INTEGER
from riskcal.records.joining import JSON_LINES, Places, together
from riskcal.records.json_tables import objects as json_objects
from riskcal.records.sources import RECORDING, Part, Source, listed, named, parts

__all__ = [
    "RECORDING",
    "Part",
    "Source",
    "in_its_folder",
    "json_objects",
    "listed",
    "named",
    "parts",
    "read",
    "read_part",
    "read_placed",
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

#: The mark of a table from CSV, where nothing says whether an id of digits is a number or a text.
_CSV = "riskcal.csv"


def read(source: Source, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table in a file, by its ending, or in all files of a folder or a pattern, by their names, or of a list, in its order.

    Columns keep their names. ``names`` gives the file's name of each of riskcal's columns that has another there, to be read so.
    """
    return read_placed(source, names)[0]


def read_placed(
    source: Source, names: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, Places]:
    """As `read`, and which file each of the rows stands in."""
    found = parts(source)
    tables = [read_part(part, names) for part in found]
    for part, table in zip(found, tables, strict=True):
        if len(found) > 1 and not table.columns.is_unique:
            twice = table.columns[table.columns.duplicated()]
            raise RiskcalError(
                f"{part.file}: two columns are called {twice[0]!r}; rename or drop one."
            )
    places = Places([part.file for part in found], [len(table) for table in tables])
    return together(_with_ids_alike(tables, names or {}), names or {}), places


def read_part(part: Part, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table in one file, with what the names of its folders say."""
    return in_its_folder(_read_file(part.file, names or {}), part, names or {})


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
        if value == "__HIVE_DEFAULT_PARTITION__" and name == names.get("threshold", "threshold"):
            raise RiskcalError(
                f"{part.file}: its folder says that {name} is missing, as programs write an infinity that became null. If these "
                f"rows are the full model's, rename the folder {folder} to {name}=full."
            )
        frame = frame.assign(**{name: _partition_value(name, urllib.parse.unquote(value), names)})
    return frame


def _says(column: pd.Series, value: str) -> bool:
    """Whether all cells of a column are what the name of a folder says."""
    for cell in column.drop_duplicates():
        with suppress(TypeError, ValueError):
            truth = isinstance(cell, bool | np.bool_)
            alike = str(cell).lower() == value.lower() if truth else str(cell) == value
            if alike or float(cell) == float(value):
                continue
        return False
    return True


def _partition_value(name: str, value: str, names: Mapping[str, str]) -> Any:
    if value == "__HIVE_DEFAULT_PARTITION__":
        return None
    if name in _in_the_file(TEXT_COLUMNS, names):
        is_id = name in _in_the_file(ID_COLUMNS, names)
        return int(value) if is_id and INTEGER.fullmatch(value) else value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _in_the_file(columns: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """How a file calls these columns: by their name, unless that name is another's, or by what ``names`` says."""
    own = [name for name in columns if name not in names and name not in names.values()]
    return {*own, *(names[name] for name in columns if name in names)}


def _with_ids_alike(tables: list[pd.DataFrame], names: Mapping[str, str]) -> list[pd.DataFrame]:
    """Tables whose ids, where a CSV's were taken for integers as they were written, are texts if another table has texts.

    Raises
    ------
    RiskcalError
        For a text that may be one of these integers in another writing: one prompt would count as two.
    """
    for name in _in_the_file(ID_COLUMNS, names):
        columns = [table[name] for table in tables if name in table]
        texts = {
            cell for one in columns if pd.api.types.is_string_dtype(one) for cell in one.dropna()
        }
        if not texts:
            continue
        are_whole = [
            _CSV in table.attrs and name in table and table[name].dtype.kind == "i"
            for table in tables
        ]
        whole = {
            cell
            for table, is_whole in zip(tables, are_whole, strict=True)
            if is_whole
            for cell in table[name].tolist()
        }
        _refuse_other_writings(name, texts, whole)
        tables = [
            table.astype({name: str}) if is_whole else table
            for table, is_whole in zip(tables, are_whole, strict=True)
        ]
    return tables


def _refuse_other_writings(name: str, texts: set[Any], whole: set[int]) -> None:
    for text in texts:
        number = None
        with suppress(ValueError, OverflowError):
            number = float(text)
        if number in whole and not INTEGER.fullmatch(str(text)):
            raise RiskcalError(
                f"{name}: {text!r} in one file may be {number:g} in another, and would count twice; write the ids of all files "
                "alike."
            )


def write(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table in the format of the path's ending, packed if that says so; a file is replaced whole or not at all."""
    target = _replacing.a_path(path)
    kind = sources.kind(target)
    if kind == "json":
        raise RiskcalError(
            f"{target}: rows are written as .parquet, .csv or .jsonl; use one of these."
        )
    with _replacing.replacing(target) as partial:
        try:
            _write_as(kind, sources.ending(target)[1], frame, partial)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RiskcalError(
                f"{target}: cannot be written as {kind} ({_validate.reason(error)})."
            ) from None


def _write_as(kind: str, packed: str | None, frame: pd.DataFrame, path: Path) -> None:
    if kind == "parquet":
        _parquet.write(pa.Table.from_pandas(frame, preserve_index=False), path)
        return
    with (
        pa.output_stream(str(path), compression=packed) as stream,
        io.TextIOWrapper(stream, encoding="utf-8", newline="") as file,
    ):
        if kind == "csv":  # a bare carriage return ends a row
            frame.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC)
            return
        for row in frame.to_dict("records"):
            cells = {key: _jsonable(value) for key, value in row.items()}
            file.write(json.dumps(cells) + "\n")


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
        reason = _validate.reason(error) if kind == "jsonl" else sources.what_it_is(path, error)
        raise RiskcalError(f"{path}: not a readable {kind} file ({reason}).") from None


def _read_as(kind: str, path: Path, names: Mapping[str, str]) -> pd.DataFrame:
    if kind == "parquet":
        return canonical(of_arrow(_parquet.read(path)))
    if kind == "jsonl":
        return _marked(pd.DataFrame([row for _, row in json_objects(path)]), JSON_LINES)
    with pa.input_stream(str(path), compression=sources.ending(path)[1]) as stream:
        if kind == "json":
            text = io.TextIOWrapper(stream, encoding="utf-8-sig")
            return _marked(json_tables.whole(text, path), JSON_LINES)
        texts, ids = _in_the_file(TEXT_COLUMNS, names), _in_the_file(ID_COLUMNS, names)
        threshold = names.get("threshold", "threshold")
        return _marked(csv_tables.read(stream, texts, ids, threshold), _CSV)


def _marked(frame: pd.DataFrame, mark: str) -> pd.DataFrame:
    result = canonical(frame)
    result.attrs[mark] = True
    return result


def _jsonable(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float) and math.isinf(value):  # which JSON lacks
        return "full" if value > 0 else "-inf"
    return value
