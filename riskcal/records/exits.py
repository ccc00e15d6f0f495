"""Numbers per exit, for decisions that have as many exits as they need: a matrix, or one row's numbers after another's."""

import operator
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import advice

Lengths = NDArray[np.int64]

_SHAPE, _TYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")


@dataclass(frozen=True, eq=False)
class PerExit:
    """Numbers of N rows at each of their exits.

    Attributes
    ----------
    values : (N, L), or (M,) where rows have unequal numbers of exits
    lengths : (N,), or None where all rows have L
    """

    values: NDArray[Any]
    lengths: Lengths | None = None

    @classmethod
    def read(cls, given: Any, name: str, lengths: Lengths | None) -> Self:
        """Whatever holds one number per exit: a matrix, padded or not, lists of unequal length, or a flat array.

        Behind the ``lengths`` (N,) that are given a row holds padding, which is not looked at, whatever it is.
        """
        rows = unequal(given)
        given = _stacked(given) if rows is None else given
        if lengths is None and rows is None:
            matrix = _validate.as_given(given, name)
            if matrix.dtype == bool and matrix.ndim == 2 and matrix.size:
                return cls(matrix)
            _refuse_texts(cls(_unmixed(given, matrix)), name)
            return cls(_validate.float_matrix(given, name))
        if rows is not None:
            flat, lengths = _of_lists(rows, name, lengths)
        else:
            assert lengths is not None
            flat = _of_padded(_validate.as_given(given, name), name, lengths)
        _refuse_texts(cls(flat, lengths), name)
        flat = _numbers(flat, name)
        if (lengths == lengths[0]).all():
            return cls(flat.reshape(len(lengths), -1))
        return cls(flat, lengths)

    @property
    def counts(self) -> Lengths:
        """How many exits each row has, (N,)."""
        if self.lengths is not None:
            return self.lengths
        return np.full(len(self.values), self.values.shape[1], dtype=np.int64)

    def as_numbers(self) -> Self:
        """Truth values as 0 and 1."""
        if self.values.dtype != bool:
            return self
        return type(self)(self.values.astype(np.float64), self.lengths)

    def where(self, mask: NDArray[np.bool_]) -> str:
        """The first true place of a mask of ``values``, as messages name it."""
        if self.lengths is None:
            return _validate.first(mask)
        ends = np.cumsum(self.lengths)
        place = int(mask.argmax())
        row = int(np.searchsorted(ends, place, side="right"))
        return f"[{row}, {place - int(ends[row] - self.lengths[row])}]"

    def last(self) -> NDArray[Any]:
        """Each row's last exit, (N,): the full model."""
        if self.lengths is None:
            return self.values[:, -1]
        return self.values[np.cumsum(self.lengths) - 1]

    def take(self, rows: NDArray[np.intp]) -> Self:
        """All rows in another order."""
        if self.lengths is None:
            return type(self)(self.values[rows])
        lengths = self.lengths[rows]
        begin = (np.cumsum(self.lengths) - self.lengths)[rows]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return type(self)(self.values[np.repeat(begin, lengths) + within], lengths)


def given_lengths(lengths: Any, name: str = "lengths") -> Lengths | None:
    """Numbers of exits (N,), each at least 1."""
    if lengths is None:
        return None
    counts = _validate.as_given(lengths, name)
    if counts.ndim == 1 and counts.dtype.kind in "fO" and counts.size:  # a CSV's, or nullable
        whole = _validate.as_numbers(counts, name)
        counts = whole.astype(np.int64) if (np.isfinite(whole) & (whole % 1 == 0)).all() else counts
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.size == 0:
        raise RiskcalError(
            f"{name}: has shape {counts.shape} and type {counts.dtype}; give one whole number of exits per row."
        )
    if (counts < 1).any():
        row = int((counts < 1).argmax())
        raise RiskcalError(
            f"{name}: {counts[row]} at row {row} ({int((counts < 1).sum())} such rows); every row has at least one exit, the "
            "full model's own."
        )
    return counts.astype(np.int64)


def refuse_other_lengths(one: PerExit, other: PerExit, name: str, other_name: str) -> None:
    """Refuse two arrays that do not have the same exits in each row."""
    if one.lengths is None and other.lengths is None:
        if one.values.shape != other.values.shape:
            raise RiskcalError(
                f"{name}: has shape {one.values.shape}, but {other_name} has {other.values.shape}; give the same for both."
            )
        return
    counts, others = one.counts, other.counts
    if len(counts) != len(others):
        raise RiskcalError(f"{name}: has {len(counts)} rows, but {other_name} has {len(others)}.")
    differ = counts != others
    if differ.any():
        row = int(differ.argmax())
        remedy = (
            " A full model without a confidence has nan there: it is not looked at."
            if name == "confidence" and counts[row] == others[row] - 1
            else ""
        )
        raise RiskcalError(
            f"{name}: row {row} holds {counts[row]} exits, but {other_name} {others[row]} ({int(differ.sum())} such rows); give "
            f"one number per exit in both.{remedy}"
        )


def of_all_rows(given: Any, name: str, n_exits: int) -> NDArray[Any] | None:
    """Numbers (L,) that hold for all rows; None for anything that is no list of single numbers, or a flat array."""
    values = None if unequal(given) is not None else _validate.as_given(given, name)
    if values is None or values.ndim != 1 or values.size != n_exits:
        return None
    return _validate.as_numbers(values, name)


def unequal(given: Any) -> list[Any] | None:
    """The rows of a list or column of lists that are not of one length; None for anything else."""
    if not isinstance(given, list | tuple):
        given = _validate.on_the_host(given)
        if isinstance(given, np.ndarray) and given.dtype != object:
            return None
        with suppress(Exception):  # whatever it is, who reads it as a matrix will refuse it
            given = np.asarray(given)
        if not (isinstance(given, np.ndarray) and given.dtype == object and given.ndim == 1):
            return None
    rows = [as_row(row) for row in given]
    if not rows or any(row is None for row in rows):
        return None
    return rows if len({len(row) for row in rows}) > 1 else None


def _stacked(given: Any) -> Any:
    """A column of lists of one length, as tables hold them, as a matrix; anything else as it is."""
    if isinstance(given, list | tuple):
        return [_validate.on_the_host(entry) for entry in given]
    with suppress(Exception):  # whatever it is, who reads it as a matrix will refuse it
        array = np.asarray(_validate.on_the_host(given))
        if array.dtype == object and array.ndim == 1 and array.size:
            held = [as_row(entry) for entry in array]
            return given if any(one is None for one in held) else np.asarray(held)
    return given


def of_equal_rows(column: Iterable[Any]) -> NDArray[Any] | None:
    """The matrix (N, L) of a column of numpy arrays (L,) of numbers of one type, as Parquet files give; None for others."""
    rows = list(column)
    if set(map(type, rows)) != {np.ndarray}:
        return None
    shapes, kinds = set(map(_SHAPE, rows)), set(map(_TYPE, rows))
    if len(shapes) > 1 or len(kinds) > 1 or len(rows[0].shape) != 1 or not rows[0].size:
        return None
    if rows[0].dtype.kind not in "biuf":
        return None
    return np.concatenate(rows).reshape(len(rows), -1)


def as_row(given: Any) -> Any:
    """A list, or any library's array of one dimension; None for anything else."""
    if isinstance(given, list | tuple):
        return given
    if type(given) is np.ndarray:  # as all others, but a table has millions
        return given if given.ndim == 1 else None
    if hasattr(given, "__array__") and not isinstance(given, np.generic):
        with suppress(Exception):
            row = np.asarray(_validate.on_the_host(given))
            return row if row.ndim == 1 else None
    return None


def _of_lists(rows: list[Any], name: str, lengths: Lengths | None) -> tuple[NDArray[Any], Lengths]:
    held = np.array([len(row) for row in rows], dtype=np.int64)
    if (held == 0).any():
        row = int((held == 0).argmax())
        raise RiskcalError(
            f"{name}: row {row} is empty ({int((held == 0).sum())} such rows); every row has at least one exit, the full "
            "model's own."
        )
    if lengths is not None:
        _refuse_longer(lengths, held, name)
        rows = [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]
        held = lengths
    with _validate.reading(name, "an array of numbers"):
        flat: NDArray[Any] = np.concatenate([np.asarray(row) for row in rows])
    cells = [cell for row in rows for cell in row] if flat.dtype.kind == "U" else ()
    return _unmixed(cells, flat), held


def _of_padded(given: NDArray[Any], name: str, lengths: Lengths) -> NDArray[Any]:
    if given.ndim == 1 and given.dtype != object:
        if given.size != lengths.sum():
            raise RiskcalError(
                f"{name}: holds {given.size} numbers for {lengths.sum()} exits in lengths; give as many."
            )
        return given
    if given.ndim != 2:
        raise RiskcalError(
            f"{name}: has shape {given.shape}; give (rows, exits) behind lengths, or a list of numbers per row."
        )
    _refuse_longer(lengths, np.full(len(given), given.shape[1]), name)
    return np.asarray(given[np.arange(given.shape[1]) < lengths[:, None]])


def _refuse_longer(lengths: Lengths, held: NDArray[Any], name: str) -> None:
    if len(lengths) != len(held):
        raise RiskcalError(
            f"lengths: {len(lengths)} given for {len(held)} rows of {name}; give one per row."
        )
    longer = lengths > held
    if longer.any():
        row = int(longer.argmax())
        raise RiskcalError(
            f"lengths: {lengths[row]} at row {row}, where {name} holds {held[row]} exits ({int(longer.sum())} such rows)."
        )


def _unmixed(given: Any, array: NDArray[Any]) -> NDArray[Any]:
    """An array of which numpy made texts, as it was given: numbers beside a text are none."""
    if array.dtype.kind == "U":
        with suppress(Exception):  # as for rows
            cells = np.asarray(given, dtype=object)
            return cells if cells.shape == array.shape else array
    return array


def _refuse_texts(given: PerExit, name: str) -> None:
    """Refuse words for true and false, percentages and the like with their place and what to write."""
    if given.values.dtype.kind not in "UO":
        return
    cells = given.values.ravel()
    texts = np.array([isinstance(cell, str) for cell in cells], dtype=bool)
    if texts.any():
        cell = str(cells[texts][0])
        where = given.where(texts.reshape(given.values.shape))
        raise RiskcalError(
            f"{name}: not an array of numbers ({_validate.shown(cell)} at index {where}). {advice.of_text(cell)}"
        )


def _numbers(flat: NDArray[Any], name: str) -> NDArray[Any]:
    """Truth values and float32 as they are, all else as float64."""
    if flat.dtype == object and all(isinstance(v, bool | np.bool_) for v in flat):
        return flat.astype(bool)
    if flat.dtype == bool:
        return flat
    numbers: NDArray[Any] = _validate.float_matrix(flat[None, :], name).reshape(-1)
    return numbers
