"""Tables in JSON: a row per line, an array of rows, or columns. Which of these a file holds is seen by how it begins."""

import io
import itertools
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from riskcal import _validate
from riskcal._validate import Repeated, RiskcalError
from riskcal.records.columns import is_unicode
from riskcal.records.sources import ending, what_it_is


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects in a file of JSON lines, or of one JSON array, with the numbers of their rows, as they stand there."""
    try:
        with pa.input_stream(str(path), compression=ending(path)[1]) as stream:
            # some programs begin a file with a byte-order mark
            yield from _objects(io.TextIOWrapper(stream, encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise RiskcalError(f"{path}: is not UTF-8 text ({what_it_is(path, error)}).") from None
    except (OSError, pa.ArrowException) as error:
        raise RiskcalError(f"{path}: cannot be read ({_validate.reason(error)}).") from None


def whole(text: io.TextIOBase, path: Path) -> pd.DataFrame:
    """The table in one JSON document, or in JSON lines under its ending: rows, or columns of one length.

    An object of totals and means, as benchmarks write, holds none.
    """
    content = text.read()
    try:
        found = _validate.from_json(content, each_name_once=True)
    except ValueError:
        if not _begins_with_a_row(content):
            raise
        return pd.DataFrame([row for _, row in _objects(io.StringIO(content), path)])
    rows = [found, *(found.values() if isinstance(found, dict) else [])]  # or its columns
    repeated = next((one for one in rows if isinstance(one, Repeated)), None)
    if repeated is not None:
        raise RiskcalError(f"{path}: {repeated.said}.")
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        twice = next((n for n, row in enumerate(found) if isinstance(row, Repeated)), None)
        if twice is not None:
            raise RiskcalError(f"{path}: row {twice}: {found[twice].said}.")
        if _may_hold_halves(content):
            for number, row in enumerate(found):
                _refuse_halves(row, number, path)
        return pd.DataFrame(found)
    if _is_of_columns(found):
        keys = list(
            next(iter(found.values()))
        )  # of numbered rows, in whatever order a column has them
        return pd.DataFrame({name: _cells(column, keys) for name, column in found.items()})
    raise RiskcalError(
        f"{path}: holds {_what(found)[:200]}, not an array of one object per row. A certificate needs each prompt's "
        "loss: of means over prompts none can be made, and outputs that were left out of them, empty ones for instance, "
        f"would be missing. {_remedy(found)}"
    )


def _objects(text: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # where files were put together, one may bring its byte-order mark along
    lines = (line.removeprefix("\ufeff") for line in iter(text.readline, ""))
    start = []  # blank lines, which are counted, and the first other one
    for line in lines:
        start.append(line)
        if line.strip():
            break
    if "".join(start).lstrip()[:1] == "[":
        rows: Iterator[tuple[int, bool, Any]] = _of_array("".join([*start, text.read()]), path)
    else:
        rows = _of_lines(itertools.chain(start, lines), path)
    for number, suspect, row in rows:
        if not isinstance(row, dict):
            raise RiskcalError(f"{path}: row {number} is not a JSON object.")
        if isinstance(row, Repeated):
            raise RiskcalError(f"{path}: row {number}: {row.said}.")
        if suspect:
            _refuse_halves(row, number, path)
        yield number, row


def _begins_with_a_row(text: str) -> bool:
    """Whether a first line is an object, as JSON lines have it, and not one document's opening."""
    with suppress(ValueError):
        return isinstance(_validate.from_json(text.lstrip().partition("\n")[0]), dict)
    return False


def _may_hold_halves(text: str) -> bool:
    """Whether any surrogate, alone or of a pair, is escaped in it."""
    return "\\ud" in text.lower()


def _refuse_halves(row: dict[str, Any], number: int, path: Path) -> None:
    if not is_unicode(json.dumps(row, ensure_ascii=False)):
        raise RiskcalError(
            f"{path}: row {number} is not valid Unicode (a lone surrogate); repair it."
        )


def _of_lines(lines: Iterator[str], path: Path) -> Iterator[tuple[int, bool, Any]]:
    """Rows by their numbers, and whether `_may_hold_halves`."""
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield number, _may_hold_halves(line), _validate.from_json(line, each_name_once=True)
        except ValueError as error:
            over_lines = " It goes over several lines; write each row as one object in a line."
            raise RiskcalError(
                f"{path}: row {number} is not JSON ({error}).{over_lines if line.strip() == '{' else ''}"
            ) from None


def _of_array(text: str, path: Path) -> Iterator[tuple[int, bool, Any]]:
    try:
        rows = _validate.from_json(text, each_name_once=True)
    except ValueError as error:
        raise RiskcalError(f"{path}: row 0 is not JSON ({error}).") from None
    suspect = _may_hold_halves(text)
    for number, row in enumerate(rows):
        yield number, suspect, row


def _is_of_columns(found: Any) -> bool:
    """Whether an object holds lists of one length, or what pandas writes unasked: objects of numbered rows."""
    if not isinstance(found, dict) or len(found) < 2 or {"columns", "data"} <= found.keys():
        return False
    columns = list(found.values())
    if all(isinstance(column, list) for column in columns):
        return len({len(column) for column in columns}) == 1
    return all(
        isinstance(column, dict)
        and column.keys() == columns[0].keys()
        and all(key.isdecimal() for key in column)
        for column in columns
    )


def _cells(column: Any, keys: list[Any]) -> list[Any]:
    return [column[key] for key in keys] if isinstance(column, dict) else column


def _what(found: Any) -> str:
    return f"an object of {', '.join(map(repr, found))}" if isinstance(found, dict) else "no rows"


def _remedy(found: Any) -> str:
    """What makes a table of it, where some list in it may be one."""
    inner = found if isinstance(found, dict) else {}
    for name, value in inner.items():
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            return (
                f"If {name!r} holds a row per prompt and candidate, give these alone: "
                f"Runs.from_frame(pandas.DataFrame(json.loads(pathlib.Path(path).read_bytes())[{name!r}]))."
            )
    if {"columns", "data"} <= inner.keys():
        return (
            "Rows that pandas split from their columns: "
            "Runs.from_frame(pandas.read_json(path, orient='split', dtype=False))."
        )
    return "Write a row per prompt and candidate, JSON lines for instance."
