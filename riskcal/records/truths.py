"""Columns of true and false, as ``failed`` is, and what makes one of a log's texts and numbers."""

import shlex
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records.columns import plain

#: What programs write for true where they write one of two numbers or texts.
_TRUE = ("1", "1.0", "true", "yes", "y", "t")

#: What they then write for false.
_FALSE = ("0", "0.0", "false", "no", "n", "f")

#: What they write of an output that is there.
_GOOD = (
    "ok okay success succeeded successful completed complete done finished stop none 200 0".split()
)


def of(column: pd.Series, name: str) -> NDArray[np.bool_]:
    """A column of true and false, none missing."""
    bad = np.array([not isinstance(value, bool | np.bool_) for value in column])
    if bad.any():
        row = int(bad.argmax())
        cell, many = _validate.shown(plain(column.iloc[row])), int(bad.sum())
        raise RiskcalError(
            f"{name}: {cell} at row {column.index[row]} ({many} such rows); it is true or false in every row. "
            f"{_how_to_say_true(column, name)}"
        )
    return column.to_numpy(dtype=bool)


def where(column: pd.Series, source: str, sign: str, said: str) -> pd.Series:
    """Where cells are the one that a formula says, or are not; a null is neither, unless ``null`` is what it says."""
    with _validate.reading(source, "a column of texts, numbers or truth values"):
        absent = column.isna().to_numpy(dtype=bool)
    if said == "null":  # an empty text is a CSV's null
        absent = absent | np.array(
            [isinstance(cell, str) and not cell for cell in column], dtype=bool
        )
        return pd.Series(absent == (sign == "=="), index=column.index)
    cells = [plain(cell) for cell in column]
    odd = [
        not (isinstance(cell, str) or _validate.is_number(cell) or null)
        for cell, null in zip(cells, absent, strict=True)
    ]
    if any(odd):
        row = odd.index(True)
        raise RiskcalError(
            f"columns: {source!r} is {_validate.shown(cells[row])} at row {column.index[row]}, of which x {sign} {said} "
            "says nothing; name a column of texts, numbers or truth values."
        )
    alike = np.array([_is_said(cell, said) for cell in cells], dtype=bool)
    if sign == "==" and len(alike) and not alike.any():
        there = sorted({_validate.shown(cell) for cell in np.array(cells, dtype=object)[~absent]})
        _validate.warn(
            f"columns: no row of {source!r} is {said}; it holds {', '.join(there[:5]) or 'nothing'}. See that it is written "
            "as the log writes it.",
        )
    truth = pd.Series(alike == (sign == "=="), index=column.index)
    return truth.astype(object).mask(absent, None) if absent.any() else truth


def _is_said(cell: Any, said: str) -> bool:
    """Whether a cell is what a formula says, in quotes or without: a text, a number, true or false."""
    text = said[1:-1] if said[0] in "'\"" else said
    if isinstance(cell, bool | np.bool_) and text.lower() in ("true", "false"):
        return text.lower() == str(cell).lower()
    if _validate.is_number(cell):
        try:
            return float(text) == float(cell)
        except ValueError:
            return False
    return str(cell) == text


def good(cells: Collection[Any]) -> str | None:
    """The one of some texts and numbers that says of an output that it is there, if one alone does."""
    found = [str(cell) for cell in cells if str(cell).strip().lower() in _GOOD]
    return found[0] if len(found) == 1 else None


def _how_to_say_true(column: pd.Series, name: str) -> str:
    """The formula that makes truth values of a column's texts or numbers; what they mean is for its writer to say."""
    cells = [plain(cell) for cell in column[~column.isna()]]
    absent = len(cells) < len(column)
    said = {cell for cell in cells if isinstance(cell, str) or _validate.is_number(cell)}
    if not said or any(
        not isinstance(cell, str) and not _validate.is_number(cell) for cell in cells
    ):
        return "Fill in which it is."
    if absent:
        truths = all(isinstance(cell, bool | np.bool_) and cell for cell in cells)
        if name != "failed" or not (truths or all(isinstance(cell, str) for cell in cells)):
            return "Fill in which it is."
        meaning, formula = "a null means that nothing failed", "x != null"
    elif name == "failed" and (text := good(said)) is not None:
        meaning, formula = f"{text!r} means that nothing failed", f"x != {text!r}"
    else:
        likely = [value for value in said if str(value).strip().lower() in _TRUE]
        false = [value for value in said if str(value).strip().lower() in _FALSE]
        if not likely and len(said) > 2:
            return "Fill in which it is."
        if not likely and false:
            meaning, formula = f"{false[0]!r} means false", f"x != {false[0]!r}"
        else:
            true = likely[0] if likely else min(said, key=cells.count)
            meaning, formula = f"{true!r} means true", f"x == {true!r}"
    on_the_shell = shlex.quote(f"{name}=COLUMN{formula.removeprefix('x')}")
    quoted = formula.partition("=")[2].partition(" ")[2]
    if "\\" in quoted or quoted.count("'") > 2 or quoted.startswith('"'):
        return "Fill in which it is."  # no formula can quote it
    return (
        f"If {meaning}, say so with the log's name of the column: columns={{{name!r}: ('COLUMN', \"{formula}\")}}, "
        f"on the shell --columns {on_the_shell}."
    )
