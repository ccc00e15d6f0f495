"""Columns under the names that a log has for them, and scores turned into losses: ``columns=`` and what it may say."""

import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import columns as table_columns
from riskcal.records import truths

#: Of each of riskcal's columns the log's name for it, or that name and a formula in x: ``("rougeL", "1 - x")`` makes losses
#: of scores, ``("status", "x != 'ok'")`` truths of texts.
Columns = Mapping[str, str | tuple[str, str]]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_GRAMMAR = (
    rf"\s*(?:(?P<minuend>{_NUMBER})\s*-\s*)?{{}}\s*(?:(?P<sign>[*/])\s*(?P<factor>{_NUMBER})\s*)?"
)
_COMPARISON = (
    r"\s*{}\s*(?P<sign>[=!]=)\s*(?P<cell>'[^']*'|\"[^\"]*\"|[^\s='\"](?:[^='\"]*[^\s='\"])?)\s*"
)
_NAME = r'(?P<name>"[^"]+"|\S(?:.*?\S)??)'
_FORMULA = re.compile(_GRAMMAR.format("x"))
_TRUTH = re.compile(_COMPARISON.format("x"))
_ON_THE_SHELL = (re.compile(_COMPARISON.format(_NAME)), re.compile(_GRAMMAR.format(_NAME)))
_ALLOWED = (
    'a formula is a number minus x, x times or over a number, or both: "1 - x", "x / 100", "1 - x / 100"; or it says where '
    'a column is true: "x != \'ok\'", "x == \'timeout\'", "x != null"'
)


@dataclass(frozen=True)
class _Column:
    """Where a column comes from, and what is made of it: ``minuend - x * factor``, ``x / factor``, or ``x != cell``."""

    source: str
    formula: str | None = None
    minuend: float | None = None
    sign: str = "*"
    factor: float = 1.0
    cell: str | None = None

    def of(self, value: Any) -> Any:
        """Of numbers, by a formula of numbers."""
        scaled = value / self.factor if self.sign == "/" else value * self.factor
        return scaled if self.minuend is None else self.minuend - scaled


def of_table(table: Any, columns: Columns | None) -> pd.DataFrame:
    """A table of any kind as a frame with riskcal's names."""
    return renamed(table_columns.from_object(table), columns)


def renamed(frame: pd.DataFrame, columns: Columns | None) -> pd.DataFrame:
    """The table with riskcal's names; a column that was given another name no longer stands under its own.

    Cells that are no number (a null, the text "full") stay as they are where a formula is applied, for later checks to judge.
    """
    wanted = _parsed(columns)
    if not wanted:
        return frame
    frame = _with_nested(frame, wanted)
    numbered = _numbered(frame, wanted)
    wanted = {
        f"{target}{end}": _Column(f"{column.source}{end}", *_rest(column))
        for target, column in wanted.items()
        for end in numbered.get(target, [""])
    }
    taken = {column.source for column in wanted.values()}
    _refuse_what_is_not_there(frame, taken)
    hidden = [name for name in wanted if name in frame.columns and name not in taken]
    if hidden:
        name = hidden[0]
        other = "text" if name == "prompt" and "text" not in frame.columns else f"{name}_logged"
        raise RiskcalError(
            f"columns: {name} would be made of {wanted[name].source!r}, but the table has a column {name} already. Give that "
            f"one another name, in columns={{{name!r}: ..., {other!r}: {name!r}}} (on the shell: --columns {other}={name}), "
            f"or leave {name} out of columns if it is the right one."
        )
    made = {target: _made(frame[column.source], column) for target, column in wanted.items()}
    kept = frame.drop(columns=[name for name in taken if name in frame.columns])
    return kept.assign(**made)


def only_renamed(columns: Columns | None) -> dict[str, str]:
    """The log's name of each of riskcal's columns that only has another name, and is read as that column is."""
    return {
        target: column.source
        for target, column in _parsed(columns).items()
        if column.formula is None
    }


def sources(columns: Columns | None) -> dict[str, str]:
    """The log's name of each of riskcal's columns that has another."""
    return {target: column.source for target, column in _parsed(columns).items()}


def compares(columns: Columns | None) -> bool:
    """Whether a column is made by ``==``, of which all rows together tell whether it is written as the log writes it."""
    return any(column.sign == "==" for column in _parsed(columns).values())


def formula(target: str, text: Any) -> Callable[[Any], Any]:
    """What a formula makes of numbers."""
    column = _column(target, ("x", text))
    if column.cell is not None:
        raise RiskcalError(
            f"{target}: {_validate.shown(text)} makes no numbers; give 1 - x, for instance."
        )
    return column.of


def options(texts: Sequence[str]) -> dict[str, str | tuple[str, str]]:
    """What the command line says of columns, each ``prompt=request_id`` or ``dissimilarity=1-rougeL``."""
    said = [_option(text) for text in texts]
    again = [target for place, (target, _) in enumerate(said) if target in dict(said[:place])]
    if again:
        raise RiskcalError(f"--columns: {again[0]} is said twice; say once where it comes from.")
    return dict(said)


def _option(text: str) -> tuple[str, str | tuple[str, str]]:
    target, equals, rest = (part.strip() for part in text.partition("="))
    matches = (form.fullmatch(rest) for form in _ON_THE_SHELL)
    found = next((match for match in matches if match), None)
    if not target or not equals or not found:
        raise RiskcalError(
            f"--columns: {text!r} is not NAME=COLUMN or NAME=FORMULA, as in prompt=request_id, dissimilarity=1-rougeL and "
            "failed=status!=ok."
        )
    quoted = re.fullmatch(r'"([^"]+)"', found["name"])
    name = quoted[1] if quoted else found["name"]
    if not found.groupdict().get("minuend") and not found["sign"]:
        return target, name
    start, end = found.span("name")
    return target, (name, f"{rest[:start]}x{rest[end:]}")


def _parsed(columns: Columns | None) -> dict[str, _Column]:
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise RiskcalError(
            f"columns: {_validate.shown(columns)} is no dictionary; give {{'prompt': 'request_id'}}, for instance."
        )
    return {_target(name): _column(name, value) for name, value in columns.items()}


def _target(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise RiskcalError(
            f"columns: {_validate.shown(name)} is no name of a column; give one of riskcal's, prompt for instance."
        )
    return name


def _column(target: str, value: Any) -> _Column:
    if isinstance(value, str) and value:
        return _Column(value)
    pair = value if isinstance(value, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
        raise RiskcalError(
            f"columns: {target} is {_validate.shown(value)}; give the log's name of the column, or that name and a formula, as "
            f"in {{{target!r}: ('score', '1 - x')}}."
        )
    source, formula = pair
    if truth := _TRUTH.fullmatch(formula):
        return _Column(source, formula, sign=truth["sign"], cell=truth["cell"])
    found = _FORMULA.fullmatch(formula)
    if not found:
        raise RiskcalError(
            f"columns: {target} has the formula {_validate.shown(formula)}; {_ALLOWED}."
        )
    minuend = None if found["minuend"] is None else float(found["minuend"])
    factor = float(found["factor"] or 1)
    if not (math.isfinite(factor) and math.isfinite(minuend or 0.0)) or factor == 0:
        raise RiskcalError(
            f"columns: {target} has the formula {_validate.shown(formula)}, which makes no numbers; {_ALLOWED}, none "
            "of them infinite, the second not 0."
        )
    return _Column(source, formula, minuend, found["sign"] or "*", factor)


def _rest(column: _Column) -> tuple[Any, ...]:
    return column.formula, column.minuend, column.sign, column.factor, column.cell


def names_in(frame: pd.DataFrame) -> list[str]:
    """What columns may be made of: a table's own, and what stands in objects, as ``metrics.rougeL``."""
    names = []
    for place, name in enumerate(map(str, frame.columns)):
        inner = [f"{name}.{key}" for key in _first_object(frame.iloc[:, place])]
        names += inner or [name]
    return names


def unfolded(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with a column for each of `names_in`: of what stands in objects as well."""
    nested = set(names_in(frame)) - set(map(str, frame.columns))
    return _with_nested(frame, {name: _Column(name) for name in nested})


def _with_nested(frame: pd.DataFrame, wanted: Mapping[str, _Column]) -> pd.DataFrame:
    """The table with the columns that are wanted from within objects, ``metrics.rougeL``, null where an object lacks it."""
    made = {}
    for source in {column.source for column in wanted.values()} - set(frame.columns):
        for name, keys in _partings(source.split(".")):
            if not keys or list(frame.columns).count(name) != 1:
                continue
            if (cells := _inside(list(frame[name]), keys)) is not None:
                made[source] = pd.Series(cells, frame.index, dtype=object).infer_objects()
                break
    return frame.assign(**made)


def _partings(parts: list[str]) -> Iterator[tuple[str, list[str]]]:
    """A name's beginning and the rest, the longest beginning first: keys may have points of their own."""
    for end in range(len(parts), 0, -1):
        yield ".".join(parts[:end]), parts[end:]


def _inside(cells: list[Any], keys: list[str]) -> list[Any] | None:
    """What objects hold by a path of keys, null where one lacks it; None where all do."""
    objects = [_object(cell) for cell in cells]
    for key, rest in _partings(keys):
        if any(key in cell for cell in objects):
            held = [cell.get(key) for cell in objects]
            if (found := _inside(held, rest) if rest else held) is not None:
                return found
    return None


def _first_object(column: pd.Series) -> Mapping[str, Any]:
    """What the first cell of a column holds by name that is neither null nor an empty object; nothing, if it is none."""
    if column.dtype.kind in "biuf":
        return {}
    empty = (
        table_columns.is_missing(cell) or (isinstance(cell, dict) and not cell) for cell in column
    )
    there = (cell for cell, none in zip(column, empty, strict=True) if not none)
    return _object(next(there, None))


def _object(cell: Any) -> Mapping[str, Any]:
    """What a cell holds by name: an object, the text of one as a CSV has it, or a map of Arrow; nothing, if it is none."""
    if isinstance(cell, dict):
        return cell
    if isinstance(cell, str) and cell.lstrip().startswith("{"):
        with suppress(ValueError):
            found = _validate.from_json(cell)
            return found if isinstance(found, dict) else {}
    if isinstance(cell, list) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in cell
    ):
        return dict(cell)
    return {}


def _numbered(frame: pd.DataFrame, wanted: Mapping[str, _Column]) -> dict[str, list[str]]:
    """Columns that are spread over ``name_1``, ``name_2`` and so on, as a CSV's exits are: the endings of each."""
    found = {}
    for target, column in wanted.items():
        if column.source not in frame.columns:
            spread = re.compile(rf"{re.escape(column.source)}(_\d+)")
            ends = [match[1] for name in frame.columns if (match := spread.fullmatch(str(name)))]
            if ends:
                found[target] = ends
    return found


def _in_quotes(frame: pd.DataFrame) -> str:
    """How the shell says a name that looks like a formula, if there is one."""
    for name in names_in(frame):
        with suppress(RiskcalError):
            if '"' not in name and options([f"risk={name}"]) != {"risk": name.strip()}:
                option = f'risk="{name}"'
                return f" On the shell {name} stands in quotes: --columns {shlex.quote(option)}, for instance."
    return ""


def _refuse_what_is_not_there(frame: pd.DataFrame, taken: set[str]) -> None:
    missing = sorted(name for name in taken if name not in frame.columns)
    if missing:
        have = ", ".join(names_in(frame)) or "none"
        raise RiskcalError(
            f"columns: the table has no column {missing[0]!r}; it has: {have}. Name one of these."
            f"{_in_quotes(frame)}"
        )
    twice = [name for name in frame.columns[frame.columns.duplicated()] if name in taken]
    if twice:
        raise RiskcalError(f"{twice[0]}: two columns have this name; rename or drop one.")


def _made(column: pd.Series, wanted: _Column) -> pd.Series:
    if wanted.formula is None:
        return column
    if wanted.cell is not None:
        return truths.where(column, wanted.source, wanted.sign, wanted.cell)
    if any(isinstance(cell, list | tuple | np.ndarray) for cell in column.head(1)):
        return _made_of_lists(column, wanted)
    numbers = table_columns.floats(column)
    with np.errstate(over="ignore"):
        values = pd.Series(wanted.of(numbers), index=column.index)
    with _validate.reading(wanted.source, "a column of numbers"):
        others = np.isnan(numbers) & ~column.isna().to_numpy()
    return values.astype(object).mask(others, column) if others.any() else values


def _made_of_lists(column: pd.Series, wanted: _Column) -> pd.Series:
    """One list a row, as traces have them."""
    made = [
        wanted.of(_validate.as_numbers(cell, wanted.source))
        if isinstance(cell, list | tuple | np.ndarray)
        else cell
        for cell in column
    ]
    return pd.Series(made, index=column.index, dtype=object)
