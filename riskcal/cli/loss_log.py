"""The losses in a log, oldest first: CSV, JSON lines, or one JSON array, from a file or a stream. Silence is refused too."""

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.cli.standard_input import standard_input
from riskcal.records import sources

_REMEDY = 'Give CSV (commas) with a column loss, JSON lines such as {"loss": 0.1}, or one JSON array of either.'
_AS_CSV = (
    'Close a quote where its cell ends, and write quotes within it twice, "" for each; or give the columns loss, failed and rate '
    "alone, without texts."
)
_END: Any = object()

#: What a column ``failed`` says, as JSON and as programs write truth values into CSV.
_TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


class Entry(NamedTuple):
    """One loss: its row, counted from 0 without the header, and the rate at which the request was sampled."""

    row: int
    loss: float
    rate: float


@contextmanager
def opened(log: str) -> Iterator[TextIO]:
    """A log as text, ``-`` being standard input; a byte-order mark is no part of it.

    Bytes of standard input that are no text are let through, as surrogates: among events they are a damaged line, among losses
    `entries` refuses them.
    """
    try:
        if log == "-":
            yield standard_input()
        elif packed := sources.ending(Path(log))[1]:
            with pa.input_stream(str(_replacing.a_path(log)), compression=packed) as stream:
                yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        else:
            with _replacing.a_path(log).open(encoding="utf-8-sig", newline="") as file:
                yield file
    except OSError as error:
        reason = error.strerror or _validate.reason(error)
        raise RiskcalError(f"{log}: cannot be read ({reason}).") from None
    except UnicodeDecodeError as error:
        reason = sources.what_it_is(_replacing.a_path(log), error)
        if reason.startswith("it is Parquet"):
            raise RiskcalError(
                f"{log}: is not UTF-8 text (it is Parquet). Write its losses as CSV, in Python: "
                f"pandas.read_parquet({log!r}).to_csv('losses.csv', index=False), and watch losses.csv."
            ) from None
        raise RiskcalError(f"{log}: is not UTF-8 text ({reason}). {_REMEDY}") from None


def first_line(file: TextIO) -> str:
    """The first line that says anything, which tells losses from events; nothing of a stream that is left before it."""
    try:
        return next((text for line in file if (text := line.lstrip("\ufeff")).strip()), "")
    except KeyboardInterrupt:
        return ""


def may_begin(line: str) -> bool:
    """Whether a log of losses may begin with this line, and is watched from there on: an array is read whole before."""
    try:
        is_json = line.lstrip()[:1] in ("{", "[")
        columns = _validate.from_json(line) if is_json else next(csv.reader([line]), ())
    except (ValueError, csv.Error):
        return False
    return any(name in columns for name in ("loss", "exits"))


def entries(
    start: str,
    file: TextIO,
    name: str,
    sampling_rate: float,
    counted: Callable[[float, float], Any] | None = None,
    worst: float = 1.0,
) -> Iterator[Entry]:
    """Every loss of a log, one at a time as its lines come; a log without any is refused.

    ``start`` is the log's `first_line`, or some of its first ones. ``counted`` makes a loss of the columns ``exits`` and
    ``errors``, where there is no column ``loss``. An output that ``failed`` has the ``worst`` loss, whatever stands there.
    """
    rows = _rows(start, file, name, ("loss",) if counted is None else ("loss", "exits"))

    for number in itertools.count():
        try:
            row = next(rows, _END)
            if row is _END:
                break
            if isinstance(row, _validate.Repeated):
                raise ValueError(row.said)
            record = row if isinstance(row, Mapping) else {"loss": row}
            if any(cell.strip() for cell in record.get(None, ())):
                raise ValueError(
                    f"it has {len(record) - 1 + len(record[None])} cells, and the header {len(record) - 1}; decimals have "
                    'points in CSV, and texts with commas stand in quotes: "a, b"'
                )
            if _truth(record.get("failed", False)):
                loss = worst
            elif (
                "loss" not in record
                and counted is not None
                and {"exits", "errors"} <= record.keys()
            ):
                loss = counted(float(record["exits"]), float(record["errors"]))
            else:
                loss = _number(record["loss"])
            yield Entry(number, loss, float(record.get("rate", sampling_rate)))
        except KeyError:
            wanted = "loss" if counted is None else "loss, and not both of exits and errors"
            raise RiskcalError(
                f"{name}: row {number} has no {wanted}; it has {_listed(record)}. {evaluations(str(record), name) or _REMEDY}"
            ) from None
        except RiskcalError as error:
            raise RiskcalError(
                f"{name}: row {number}: {str(error).replace(' at index 0', '')}"
            ) from None
        except csv.Error as error:
            raise RiskcalError(
                f"{name}: row {number} cannot be read ({error}). {_AS_CSV}"
            ) from None
        except (ValueError, TypeError, OverflowError) as error:
            raise RiskcalError(f"{name}: row {number} cannot be read ({error}).") from None
    if number == 0:
        raise RiskcalError(
            f"{name}: holds no loss, so that nothing can be said of the requests. {_REMEDY}"
        )


def evaluations(text: str, name: str) -> str:
    """What reads a log in which evaluations of OpenTelemetry stand; nothing to say of others."""
    if "gen_ai.evaluation.result" not in text:
        return ""
    return (
        "It holds evaluations of OpenTelemetry: make losses of them in Python, riskcal.records.formats.otel.read("
        f"{name!r}).to_csv('losses.csv', index=False), and watch losses.csv."
    )


def _truth(cell: Any) -> bool:
    """Whether an output failed, as a truth value or the text of one; where nothing is written, nothing failed."""
    said = "" if cell is None else str(cell).strip().lower()
    if said and said not in _TRUTHS:
        raise ValueError(
            f"its failed is {_validate.shown(cell)}, which says neither true nor false; write true where the output failed, and "
            "false or nothing where it did not, or name the column otherwise if it means something else"
        )
    return _TRUTHS.get(said, False)


def _number(cell: Any) -> float:
    """A loss, as a number or the text of one."""
    if cell is None or cell == "":
        raise ValueError("its loss is missing; a request whose output failed has the worst loss")
    if not isinstance(cell, str) and not _validate.is_number(cell):
        raise ValueError(f"its loss is {_validate.shown(cell)}, which is no number")
    return float(cell)


def _rows(start: str, file: TextIO, name: str, wanted: tuple[str, ...]) -> Iterator[Any]:
    lines = (_text(line, name) for line in itertools.chain(io.StringIO(start, newline=""), file))
    opening = start.lstrip()[:1]
    if opening == "{":
        return (_validate.from_json(line, each_name_once=True) for line in lines if line.strip())
    if opening == "[":
        return _array(_text(start + file.read(), name), name)
    return _table(lines, name, wanted)


def _text(line: str, name: str) -> str:
    if not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line):
        raise RiskcalError(f"{name}: is not UTF-8 text. {_REMEDY}")
    return line


def _array(text: str, name: str) -> Iterator[Any]:
    try:
        return iter(_validate.from_json(text, each_name_once=True))
    except ValueError as error:
        raise RiskcalError(
            f"{name}: begins like a JSON array but is none ({error}). {_REMEDY}"
        ) from None


def _table(lines: Iterator[str], name: str, wanted: tuple[str, ...]) -> Iterator[Any]:
    table = csv.DictReader(lines, strict=True)
    try:
        header = list(table.fieldnames or [])
    except csv.Error as error:
        raise RiskcalError(
            f"{name}: its first line is no header of a table ({error}). {_REMEDY}"
        ) from None
    if header and not any(column in header for column in wanted):
        raise RiskcalError(
            f"{name}: has no column {' or '.join(wanted)}; its columns are {_listed(header)}. {_REMEDY}"
        )
    twice = [column for column in (*wanted, "rate", "failed") if header.count(column) > 1]
    if twice:
        raise RiskcalError(
            f"{name}: has the column {twice[0]} {header.count(twice[0])} times; keep one."
        )
    return csv.DictReader(_none_blank(lines), header, strict=True) if len(header) == 1 else table


def _none_blank(lines: Iterator[str]) -> Iterator[str]:
    """The rows of a table of one column, where a blank line is no row to the `csv` module, and a null to those who wrote it."""
    for line in lines:
        if not line.strip():
            raise RiskcalError(
                "is blank, as pandas, polars, duckdb and pyarrow write a missing loss, also as the last line of a file; a "
                "request whose output failed has the worst loss: write it there. A line that means nothing: delete it."
            )
        yield line


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in list(names)[:8]) or "nothing"
