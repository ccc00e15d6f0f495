"""What the labels of tables say of matrices made of them, which keep none: rows and columns must stand in one order."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError


def column_labels(table: Any) -> list[Any] | None:
    """The names of a table's columns, or the coordinates of an array's second dimension; None where nobody gave any."""
    names = getattr(table, "column_names", None)  # of Arrow's tables, whose columns are arrays
    names = getattr(table, "columns", None) if names is None else names
    if names is None:
        dims, coords = getattr(table, "dims", ()), getattr(table, "coords", None)
        if not isinstance(dims, tuple) or len(dims) != 2 or coords is None or dims[1] not in coords:
            return None
        names = coords[dims[1]]
        names = getattr(names, "values", names)
    if _counts(names):
        return None
    try:
        return list(names)
    except TypeError:
        return None


def column_numbers(table: Any) -> list[float] | None:
    """The numbers that the names of a table's columns are, 0.9 of ``"0.90"`` too; None where some are none."""
    return _as_floats(column_labels(table))


def _as_floats(labels: list[Any] | None) -> list[float] | None:
    try:
        return [float(label) for label in labels or ()] or None
    except (TypeError, ValueError):
        return None


def _counts(names: Any) -> bool:
    """Whether names only count from 0, as pandas does where nobody gave any; those of what was turned round do not."""
    return isinstance(names, pd.RangeIndex) and (names.start, names.step) == (0, 1)


def labels_of(row: Any) -> list[Any] | None:
    """The names of the entries of one row of a table, a Series; None where nobody gave any."""
    if not isinstance(row, pd.Series) or _counts(row.index):
        return None
    return list(row.index)


def numbers_of(table: Any) -> list[int] | None:
    """By what numbers alone the names of a table's columns differ, 2 and 4 of ``head_2, head_4``; None where by other things."""
    return _numbers(column_labels(table) or [])


def _parts(names: list[Any]) -> list[re.Match[str] | None]:
    """Of each name what stands before its last digits, and these; None of a fraction's, which number nothing."""
    return [re.fullmatch(r"(.*?(?<!\d)(?<!\d\.))(\d{1,9})", str(name)) for name in names]


def _numbers(names: list[Any]) -> list[int] | None:
    parts = _parts(names)
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


def refuse_other_exits(first: Any, second: Any, what: str, other: str) -> None:
    """As `refuse_other_order`, and each of the two tables that is in another order than the exits."""
    refuse_other_order(first, second, what, other)
    refuse_unordered_exits(first, what)
    refuse_unordered_exits(second, other)


def refuse_unordered_exits(given: Any, what: str, *, one_row: bool = False) -> None:
    """Refuse a table, or with ``one_row`` a row of one, whose names number exits in another order than that of the exits."""
    names = (labels_of(given) if one_row else column_labels(given)) or []
    numbers = _numbers(names)
    if not numbers or numbers == sorted(numbers):
        return
    place = next(i for i in range(1, len(numbers)) if numbers[i] < numbers[i - 1])
    begin = re.sub(r"\d*$", "", str(names[0]))
    key = f"lambda name: int(str(name)[{len(begin)}:])" if begin else "int"
    kind, mended = (
        ("entries" if one_row else "columns"),
        _sorted_by(key, given, what, one_row=one_row),
    )
    raise RiskcalError(
        f"{what}: its {kind} are numbered {_validate.shown(numbers)}, of which {numbers[place]} at index {place} comes behind "
        f"{numbers[place - 1]}, as where texts are sorted; they are taken for the exits from the first to the full model. Bring "
        f"them into that order: {mended}. If the numbers mean something else, give np.asarray({_own_name(what)})."
    )


def _own_name(what: str) -> str:
    """The last word of what messages call an argument, ``price`` of ``cost price``."""
    return what.rpartition(" ")[2]


def _sorted_by(key: str, given: Any, what: str, *, one_row: bool) -> str:
    """The expression that sorts what was given by its names."""
    name = _own_name(what)
    if one_row:
        return f"{name}[sorted({name}.index, key={key})]"
    if dims := getattr(given, "dims", ()):  # of xarray
        return f"{name}.sel({dims[-1]}=sorted({name}[{dims[-1]!r}].values, key={key}))"
    if hasattr(given, "column_names"):
        return f"{name}.select(sorted({name}.column_names, key={key}))"
    return f"{name}[sorted({name}.columns, key={key})]"


def refuse_other_thresholds(given: Any, grid: Floats, name: str) -> None:
    """Refuse costs of each candidate, (n, k) or (k,), whose names are the thresholds in another order."""
    row = labels_of(given)
    labels = _other_thresholds(column_labels(given) if row is None else row, grid)
    if labels is not None:
        key = "lambda name: list(thresholds).index(float(name))"
        raise RiskcalError(
            f"{name}: it is labelled {_validate.shown(labels)}, and thresholds are {_validate.shown(grid.tolist())}; give them "
            f"in one order: {_sorted_by(key, given, name, one_row=row is not None)}."
        )


def refuse_other_columns(table: Any, grid: Floats, name: str) -> None:
    """Refuse a table whose columns bear these thresholds in another order: a matrix keeps no names, and would mix them up."""
    labels = _other_thresholds(column_labels(table), grid)
    if labels is not None:
        names = "column_names" if hasattr(table, "column_names") else "columns"
        raise RiskcalError(
            f"{name}: its columns are {labels}, and thresholds {grid.tolist()}; give them in one order, "
            f"thresholds=[float(name) for name in table.{names}] for instance."
        )


def _other_thresholds(names: list[Any] | None, grid: Floats) -> list[float] | None:
    """Names that are these thresholds in another order, as numbers."""
    labels = _as_floats(names)
    others = labels is not None and sorted(labels) == sorted(grid) and labels != grid.tolist()
    return labels if others else None


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
