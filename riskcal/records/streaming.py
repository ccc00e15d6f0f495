"""Runs from Parquet files too large for a long table in memory: read some prompts at a time, and put together as matrices.

Every check of `riskcal.records.reading` is of a prompt's own rows, or that all rows say the same. So parts that hold whole
prompts are checked by themselves, and only compared with each other. Where that cannot be told, or anything is wrong, there is
no answer here: the table is read at once, and whoever reads it names what is wrong by its row.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from riskcal import _parquet
from riskcal._validate import Floats, RiskcalError
from riskcal.records import files
from riskcal.records.columns import canonical, of_arrow
from riskcal.records.order import content_prints, numbered_order, tested_order

if TYPE_CHECKING:
    from riskcal.records.runs import Runs

#: Rows of a part, about. Tables of fewer than twice as many are read at once.
ROWS = 2**15

_Runs = TypeVar("_Runs", bound="Runs")


class _AtOnce(Exception):
    """The parts do not tell what the whole would."""


def runs(
    source: files.Source,
    names: Mapping[str, str],
    prepare: Callable[[pd.DataFrame], pd.DataFrame],
    build: Callable[[pd.DataFrame], _Runs],
) -> _Runs | None:
    """The runs of a table of which ``build`` makes those of some prompts; None where the table has to be read at once.

    That is where files are not Parquet, or hold few rows; where columns hold anything but numbers, texts and truth values;
    where the rows of a prompt do not stand together; and where the table would be refused or warned of.
    """
    found = files.parts(source)
    try:
        rows, failed = _alike(found, names)
        whole: _Gathered[_Runs] | None = None
        for frame in _of_whole_prompts(map(prepare, _frames(found, names, failed))):
            if _repeats_a_text(frame):
                return None
            part = build(frame)
            whole = _Gathered(part, rows) if whole is None else whole
            whole.add(part)
        return None if whole is None else whole.in_order()
    except (_AtOnce, RiskcalError, OSError, pa.ArrowException, ValueError):
        return None


class _Gathered(Generic[_Runs]):
    """Matrices with a row for each prompt that there can be, of which as many are filled as were read."""

    def __init__(self, first: _Runs, rows: int) -> None:
        self.first = first
        self.most = rows // (first.k + bool(first.full))
        self.filled = 0
        self.matrices: dict[str, Floats] = {}
        self.rest: list[_Runs] = []
        self.prints: list[NDArray[np.uint64]] = []

    def add(self, part: _Runs) -> None:
        """The runs of further prompts."""
        if not _same_kind(self.first, part) or self.filled + len(part.prompts) > self.most:
            raise _AtOnce
        end = self.filled + len(part.prompts)
        for name, matrix in part.values.items():
            held = self._widened(name, matrix)
            held[self.filled : end] = matrix[:, : held.shape[1]]
        self.prints.append(content_prints(*part.content()))
        self.rest.append(replace(part, values={}))
        self.filled = end

    def _widened(self, name: str, matrix: Floats) -> Floats:
        """Where a matrix goes: one column as long as each row holds one number throughout, as numbers of tokens do."""
        held = self.matrices.get(name, np.empty((self.most, 1)))
        if held.shape[1] < matrix.shape[1] and not (matrix == matrix[:, :1]).all():
            wide = np.empty((self.most, matrix.shape[1]))
            wide[: self.filled] = held[: self.filled]
            held = wide
        self.matrices[name] = held
        return held

    def in_order(self) -> _Runs | None:
        """The runs of all prompts in the order in which they are tested; None where some would be refused or warned of."""
        prompts = np.concatenate([part.prompts for part in self.rest])
        labels = {
            name: np.concatenate([part.labels[name] for part in self.rest])
            for name in self.first.labels
        }
        if pd.Series(prompts).duplicated().any() or _repeats_a_text(labels | {"prompt": prompts}):
            return None
        bare = replace(
            self.first, prompts=prompts, values={}, full={}, full_risk=None, labels=labels
        )
        order = (
            numbered_order(prompts, np.concatenate(self.prints))
            if "cluster" not in labels and bare.nameless
            else tested_order(prompts)
        )
        full = {
            name: np.concatenate([part.full[name] for part in self.rest])[order]
            for name in self.first.full
        }
        risks = [part.full_risk for part in self.rest if part.full_risk is not None]
        for matrix in self.matrices.values():
            for column in matrix[: self.filled].T:  # a column at a time: no second matrix
                column[:] = column[order]
        shape = self.filled, self.first.k
        return replace(
            bare,
            prompts=prompts[order],
            values={
                name: np.broadcast_to(matrix[: self.filled], shape)
                if matrix.shape[1] < self.first.k
                else matrix[: self.filled]
                for name, matrix in self.matrices.items()
            },
            full=full,
            full_risk=np.concatenate(risks)[order] if risks else None,
            labels={name: label[order] for name, label in labels.items()},
        )


def _repeats_a_text(labels: Any) -> bool:
    """Whether one text stands under two prompts, or, where there are clusters, in two of them: whoever reads it is warned."""
    if "text" not in labels:
        return False
    unit = "cluster" if "cluster" in labels else "prompt"
    held = pd.DataFrame({"unit": labels[unit], "text": labels["text"]}).drop_duplicates()
    return bool(held["text"].duplicated().any())


def _alike(found: list[files.Part], names: Mapping[str, str]) -> tuple[int, bool]:
    """The rows of all files, and whether any says what failed; their other columns are of the same names and plain types."""
    shapes = []
    for part in found:
        if part.file.suffix.lower() not in (".parquet", ".pq"):
            raise _AtOnce
        shapes.append(_parquet.shape(part.file))
    rows = sum(rows for _, rows in shapes)
    if rows < 2 * ROWS:
        raise _AtOnce
    failed = names.get("failed", "failed")
    types = [
        {field.name: field.type for field in schema if field.name != failed} for schema, _ in shapes
    ]
    if any(other != types[0] for other in types) or not all(map(_is_plain, types[0].values())):
        raise _AtOnce
    if any(len(set(schema.names)) < len(schema.names) for schema, _ in shapes):
        raise _AtOnce
    return rows, any(failed in schema.names for schema, _ in shapes)


def _is_plain(kind: pa.DataType) -> bool:
    """Numbers, truth values and texts: their columns are the same in a part as in the whole."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean
    return any(test(kind) for test in (*tests, pa.types.is_string, pa.types.is_large_string))


def _frames(
    found: list[files.Part], names: Mapping[str, str], failed: bool
) -> Iterator[pd.DataFrame]:
    """The rows of all files, in their order, as they would stand in one table."""
    column = names.get("failed", "failed")
    for part in found:
        for table in _parquet.read_in_parts(part.file, ROWS):
            frame = files.in_its_folder(canonical(of_arrow(table)), part, names)
            yield frame.assign(**{column: False}) if failed and column not in frame else frame


def _of_whole_prompts(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Tables of about so many rows or more and two prompts or more, cut where a prompt ends."""
    held: list[pd.DataFrame] = []
    types: Any = None
    for frame in frames:
        types = dict(frame.dtypes) if types is None else types
        if dict(frame.dtypes) != types:
            raise _AtOnce  # a column of nulls, of whole numbers here and of fractions there
        held.append(frame[list(types)])
        if sum(map(len, held)) < 2 * ROWS:
            continue
        whole = pd.concat(held, ignore_index=True)
        prompts = whole["prompt"].to_numpy()
        begins = np.flatnonzero(prompts[1:] != prompts[:-1]) + 1
        later = begins[begins >= ROWS]
        if len(later) < 2 or later[0] == begins[0]:  # two prompts on either side
            held = [whole]
            continue
        yield whole.iloc[: later[0]].reset_index(drop=True)
        held = [whole.iloc[later[0] :]]
    yield pd.concat(held, ignore_index=True)


def _same_kind(one: "Runs", other: "Runs") -> bool:
    """Whether two parts can be parts of one table: all that is said once of all rows is the same."""
    return (
        one.candidates.equals(other.candidates)
        and list(one.values) == list(other.values)
        and list(one.full) == list(other.full)
        and list(one.labels) == list(other.labels)
        and (one.full_risk is None) == (other.full_risk is None)
        and (one.source, one.exact, one.stopped, one.lower_is_stricter)
        == (other.source, other.exact, other.stopped, other.lower_is_stricter)
    )
