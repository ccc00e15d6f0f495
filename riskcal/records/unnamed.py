"""Columns of numbers that nothing was said about: they are not read, and whoever reads the table is told which."""

import re
from collections.abc import Iterable, Sequence

import pandas as pd

from riskcal import _validate
from riskcal.policy import CANDIDATE_COLUMNS
from riskcal.records import costs as costs_
from riskcal.records.names import NO_SETTINGS

#: What a table of runs has columns for, without being told.
KNOWN = frozenset(("threshold", *CANDIDATE_COLUMNS, *NO_SETTINGS, *costs_.COSTS))

#: How pandas' rows are numbered where it writes the numbers beside its columns.
_ROW_NUMBERS = re.compile(r"__index_level_\d+__|Unnamed: \d+|")

_NUMBERS = ("integer", "floating", "mixed-integer-float", "decimal")


def unnamed(frame: pd.DataFrame, named: Iterable[str]) -> list[str]:
    """The columns that hold numbers and have no meaning, neither by themselves nor because somebody named them."""
    meant = KNOWN.union(named)
    others = [name for name in frame.columns if name not in meant]
    others = [name for name in others if not _ROW_NUMBERS.fullmatch(str(name))]
    return [str(name) for name in others if _holds_numbers(frame[name])]


def warn_of_unnamed(names: Sequence[str], named: Iterable[str], columns: Iterable[str]) -> None:
    """Name what a reader of runs leaves out, once, at the line that called it: columns of numbers, and names nobody reads.

    ``names`` are `unnamed` columns, ``named`` those that its caller named, and ``columns`` names that it gave to the log's.
    """
    lost = [name for name in columns if name not in KNOWN.union(named) and not _aside(name)]
    if lost:
        _validate.warn(
            f"columns: nothing reads {', '.join(map(repr, lost))}. Name one of riskcal's columns, or put the column aside as "
            f"{lost[0]}_logged.",
        )
    if names:
        several = len(names) > 1
        _validate.warn(
            f"{', '.join(names)}: {'these columns are' if several else 'the column is'} not read, since nobody said what "
            f"{'they mean' if several else 'it means'}. Name in costs= what a run took, in candidate_columns= what tells "
            "candidates apart (on the shell: --cost, --coordinate), and leave others out of the table.",
        )


def _aside(name: str) -> bool:
    """Whether a column was given a name under which nothing is read, as refusals advise."""
    return name.endswith("_logged")


def _holds_numbers(column: pd.Series) -> bool:
    """Whether a column, as `riskcal.records.columns.canonical` left it, holds any number."""
    if column.dtype.kind in "iu":
        return True
    if column.dtype.kind == "f":
        return bool(column.notna().any())
    return column.dtype == object and pd.api.types.infer_dtype(column, skipna=True) in _NUMBERS
