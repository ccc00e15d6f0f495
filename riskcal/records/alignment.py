"""What the labels of tables say of matrices made of them, which keep none: rows and columns must stand in one order."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError


def column_labels(table: Any) -> list[Any] | None:
    """The names of a table's columns, or the coordinates of an array's second dimension; None where nobody gave any."""
    names = getattr(table, "columns", None)
    if names is None:
        dims, coords = getattr(table, "dims", ()), getattr(table, "coords", None)
        if not isinstance(dims, tuple) or len(dims) != 2 or coords is None or dims[1] not in coords:
            return None
        names = coords[dims[1]]
        names = getattr(names, "values", names)
    if isinstance(names, pd.RangeIndex):
        return None
    try:
        return list(names)
    except TypeError:
        return None


def column_numbers(table: Any) -> list[float] | None:
    """The numbers that the names of a table's columns are, 0.9 of ``"0.90"`` too; None where some are none."""
    try:
        return [float(label) for label in column_labels(table) or ()] or None
    except (TypeError, ValueError):
        return None


def numbers_of(table: Any) -> list[int] | None:
    """By what numbers alone the names of a table's columns differ, 2 and 4 of ``head_2, head_4``; None where by other things."""
    parts = [re.fullmatch(r"(.*?)(\d{1,9})", str(name)) for name in column_labels(table) or ()]
    named = [part.groups() for part in parts if part]
    numbers = [int(number) for _, number in named]
    alike = len(named) == len(parts) and len({name for name, _ in named}) == 1
    return numbers if alike and len(set(numbers)) == len(numbers) else None


def refuse_other_order(first: Any, second: Any, what: str, other: str) -> None:
    """Refuse two tables with a column per exit whose names say that they stand in another order."""
    one, two = numbers_of(first), numbers_of(second)
    if one and two and one != two and sorted(one) == sorted(two):
        raise RiskcalError(
            f"{other}: its columns are numbered {two}, and those of {what} {one}; give both in one order, that of the exits."
        )


def refuse_other_rows(given: Mapping[str, Any]) -> None:
    """Refuse pandas' tables and columns whose indices say that their rows stand in another order.

    An index that nobody gave counts: rows that were shuffled or sorted afterwards bear its numbers.
    """
    found = {
        name: value.index
        for name, value in given.items()
        if isinstance(value, pd.DataFrame | pd.Series)
    }
    for (first, one), (name, index) in itertools.combinations(found.items(), 2):
        if len(index) != len(one) or index.equals(one):
            continue
        place = one.get_indexer_for(index) if one.is_unique else None
        if place is not None and (place >= 0).all():
            row = int((place != range(len(one))).argmax())
            raise RiskcalError(
                f"{name}: {_validate.shown(index[row])} is the index of row {row}, but {_validate.shown(one[row])} that of "
                f"{first}; bring both into one order, {name}.loc[{first}.index] for instance. If they are in one already, drop "
                "the indices that deny it: .reset_index(drop=True) of both."
            )
