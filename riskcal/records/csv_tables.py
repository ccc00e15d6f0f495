"""Tables in CSV: commas and points; what is written in another way is refused with the call of pandas that reads it."""

import re
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records.columns import floats, is_full, is_missing, of_arrow
from riskcal.records.sources import OPENING, no_text

#: How integers are written, so that a text of one and the integer are the same.
INTEGER = re.compile(r"0|-?[1-9]\d{0,18}")

#: A cell up to its end. A quote that closes behind a line break has nothing but blanks behind it: else it opens another cell, and
#: the rows between are none of this one's.
_WHOLE_CELL = (
    rb'(?:"(?:[^"\r\n]++|"")*+"[^,\r\n]*+|"(?:[^"]++|"")*+"[ \t]*+(?=[,\r\n]|\Z)|(?!")[^,\r\n]*+)'
)

#: A cell, and what ends it: a comma, or a row's end.
_CELL = re.compile(rb"(CELL)(,|\r?\n|\r|\Z)".replace(b"CELL", _WHOLE_CELL))

#: All rows of which every quote is closed.
_ROWS = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:(?:CELL(?:,CELL)*+)(?:[\r\n]++|\Z))*+".replace(b"CELL", _WHOLE_CELL)
)


def read(stream: Any, texts: Collection[str], ids: Collection[str], threshold: str) -> pd.DataFrame:
    """The table in a CSV file: ``texts`` stay text, ``ids`` among them are integers where all of a column are written so.

    ``threshold`` is the file's name of that column.
    """
    content = stream.read()
    _refuse_other_dialects(content, threshold)
    own = _own_texts(content)
    text = pa.csv.ConvertOptions(
        column_types=dict.fromkeys([*texts, *own], pa.string()),
        strings_can_be_null=False,
    )
    lines = pa.csv.ParseOptions(newlines_in_values=True)
    try:
        table = pa.csv.read_csv(pa.BufferReader(content), parse_options=lines, convert_options=text)
    except pa.ArrowInvalid:  # of cells that are too many, or one that is too long, for instance
        _refuse_open_quotes(content, lines)
        raise
    header = pa.chunked_array([pa.array(table.column_names, pa.string())])
    if any(map(_has_line_breaks, [header, *table.columns])):
        _refuse_open_quotes(content, lines)
    frame = of_arrow(table)
    _refuse_a_header_again(frame)
    return _with_infinities(_with_integers(frame, ids), own)


def _own_texts(content: bytes) -> list[str]:
    """The columns of texts in a CSV of riskcal's own, in which texts stand in quotes and numbers do not: ``"007"`` is none."""
    header, end = _record(content, 3 if content.startswith(b"\xef\xbb\xbf") else 0)
    first, _ = _record(content, end)
    own = len(header) == len(first) and all(re.fullmatch(r"\".*\"", cell) for cell in header)
    if not own or not {'"prompt"', '"threshold"', '"source"'} <= set(header):
        return []
    if first[header.index('"threshold"')][:1] == '"':  # whoever wrote it quotes numbers, too
        return []
    return [
        name[1:-1].replace('""', '"')
        for name, cell in zip(header, first, strict=True)
        if cell[:1] == '"' and cell != '""' and header.count(name) == 1 and name != '"failed"'
    ]


def _record(content: bytes, start: int) -> tuple[list[str], int]:
    """The cells of the record that begins at ``start``, in their quotes, and where it ends; none where a quote is not closed."""
    cells = []
    while found := _CELL.match(content, start):
        cells.append(found[1].decode(errors="replace"))
        start = found.end()
        if found[2] != b",":
            return cells, start
    return [], len(content)


def _has_line_breaks(column: pa.ChunkedArray) -> bool:
    """Whether a text of a column goes on in another line, as one does whose quote is not closed."""
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind)):
        return False
    return any(pa.compute.any(pa.compute.match_substring(column, end)).as_py() for end in "\n\r")


def _refuse_open_quotes(content: bytes, options: pa.csv.ParseOptions) -> None:
    """Refuse a cell whose quote nothing closes: pyarrow takes all that follows, rows and all, for its text."""
    whole = _ROWS.match(content)
    end = 0 if whole is None else whole.end()
    if end == len(content):
        return
    row = (
        pa.csv.read_csv(pa.BufferReader(content[:end]), parse_options=options).num_rows
        if end
        else -1
    )
    line = content[end:].splitlines()[0].decode(errors="replace")
    where = f"row {row}" if end else "its header"
    raise RiskcalError(
        f"{where} ({_validate.shown(line)}) opens a quote that is not closed, so that what follows would be text of one cell. "
        'Close it at the end of its cell, and write quotes within the cell twice, "" for each; or write the table with pandas or '
        "the csv module, which do."
    )


def _with_infinities(frame: pd.DataFrame, texts: Collection[str]) -> pd.DataFrame:
    """The table with thresholds of stages, ``threshold_2``, as numbers where ``full`` alone made texts of a column."""
    for name in set(frame.columns).difference(texts):
        if not re.fullmatch(r"threshold_\d+", name) or list(frame.columns).count(name) > 1:
            continue
        column = frame[name]
        full = np.array([is_full(cell) for cell in column], dtype=bool)
        numbers = floats(column) if full.any() else np.zeros(0)
        missing = np.array([is_missing(cell) for cell in column], dtype=bool)
        if np.isfinite(numbers).any() and (np.isfinite(numbers) | full | missing).all():
            frame[name] = np.where(full, np.inf, numbers)
    return frame


def _with_integers(frame: pd.DataFrame, ids: Collection[str]) -> pd.DataFrame:
    for name in ids:
        if (
            list(frame.columns).count(name) == 1
            and frame[name].str.fullmatch(INTEGER.pattern).all()
        ):
            with suppress(OverflowError):  # 19 digits may be more than an int64 holds
                frame[name] = frame[name].astype("int64")
    return frame


def _refuse_a_header_again(frame: pd.DataFrame) -> None:
    """Refuse a row that is the header, where files were put together byte by byte."""
    header = [str(name) for name in frame.columns]
    if not header or pd.api.types.is_numeric_dtype(frame.dtypes.iloc[0]):
        return
    alike = np.flatnonzero((frame.iloc[:, 0] == header[0]).to_numpy(dtype=bool, na_value=False))
    again = [row for row in alike if [str(cell) for cell in frame.iloc[row]] == header]
    if again:
        raise RiskcalError(
            f"row {again[0]} is the header again ({len(again)} such rows), as where files were put together; delete it, or give "
            "the files as a list."
        )


def _refuse_other_dialects(content: bytes, threshold: str) -> None:
    """Refuse other separators than commas, and blanks after them, with the way that reads it."""
    if no_text(content[:OPENING]) or b"\0" in content[:2]:  # an id may hold a null, a header none
        raise ValueError("it is not UTF-8 text")
    if re.match(rb"(\xef\xbb\xbf)?\s*(\{|\[\s*[\[{])", content):
        raise ValueError("it is JSON; let its name end in .jsonl")
    start = content[:100_000]
    header, _, rest = start.decode("utf-8-sig", errors="replace").partition("\n")
    header, skipped = header.strip(), ""
    if said := re.fullmatch(r"\"?sep=(.)\"?", header):
        found: str | None = said[1]
        what, skipped = (
            f"its first line says how columns are parted, as Excel writes it, and is none of the table ({header!r})",
            ", skiprows=1",
        )
    else:
        found = next((mark for mark in ";\t|" if mark in header and "," not in header), None)
        what = f"its columns are parted by {found!r}, not by commas"
    if found is not None:
        comma = (
            f", decimal=',', converters={{{threshold!r}: lambda cell: cell.replace(',', '.')}}"
            if found != "," and re.search(r"\d,\d", rest)
            else ""
        )
        _refuse(what, f"sep={found!r}{skipped}{comma}")
    names = header.split(",")[1:]
    if names and all(name[:1] == " " for name in names):
        _refuse("there are blanks after its commas", "skipinitialspace=True")


def _refuse(what: str, options: str) -> None:
    raise RiskcalError(
        f"{what}. Read it with pandas (ids that begin with zeros need dtype={{'prompt': str}} there), and check the table that "
        f"you get: Runs.from_frame(pandas.read_csv(path, {options}))."
    )
