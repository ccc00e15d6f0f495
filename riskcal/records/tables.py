"""From a long table, in memory or in files, to `Runs`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd

from riskcal._validate import RiskcalError
from riskcal.records import (
    candidates,
    direction,
    files,
    joining,
    reading,
    renaming,
    retries,
    streaming,
)
from riskcal.records.preparing import prepared
from riskcal.records.unnamed import unnamed, warn_of_unnamed

if TYPE_CHECKING:
    from riskcal.records.runs import Runs

_Runs = TypeVar("_Runs", bound="Runs")


@dataclass(frozen=True)
class TableOptions:
    """How `Runs.from_frame` and `Runs.read` were told to read a table: their arguments beside it."""

    candidate_columns: Sequence[str]
    costs: Sequence[str]
    lower_is_stricter: bool
    columns: renaming.Columns | None
    keep: retries.Keep | None

    def __post_init__(self) -> None:
        names = candidates.column_names(self.candidate_columns)
        object.__setattr__(self, "candidate_columns", names)
        object.__setattr__(self, "costs", candidates.column_names(self.costs, "costs"))

    def prepared(self, table: Any, *, is_json: bool = False) -> pd.DataFrame:
        """The table under riskcal's names."""
        return prepared(
            table, self.candidate_columns, self.columns, self.keep, self.costs, is_json=is_json
        )

    @property
    def named(self) -> list[str]:
        """The columns that were named because riskcal does not know them."""
        return [*self.candidate_columns, *self.costs, *(self.keep or ())[1:]]

    def unread(self, frame: pd.DataFrame) -> list[str]:
        """The columns of numbers that nobody named."""
        return unnamed(frame, [*self.named, *(self.columns or ())])


def of_frame(make: type[_Runs], table: Any, options: TableOptions) -> _Runs:
    """The runs in a table."""
    frame = options.prepared(table)
    fields, lower = _fields(frame, options)
    _warn(options.unread(frame), options)
    return make(**fields).in_content_order().directed(lower)


def of_files(make: type[_Runs], path: files.Source, options: TableOptions) -> _Runs:
    """The runs in files, a part of the prompts at a time where there are many."""
    path = files.listed(path)
    names = renaming.only_renamed(options.columns)
    unread: list[str] = []  # of all parts

    def of_part(frame: pd.DataFrame) -> _Runs:
        fields, lower = _fields(frame, options)
        found = {*unread, *options.unread(frame)}
        unread[:] = [name for name in frame.columns if name in found]
        return make(**fields).directed(lower)

    # attempts of one prompt may be anywhere, and so may what a formula asks for
    if options.keep is None and not renaming.compares(options.columns):
        runs = streaming.runs(path, names, options.prepared, of_part)
        if runs is not None:
            _warn(unread, options)
            return runs
    frame, places = files.read_placed(path, names)
    try:
        frame = options.prepared(frame, is_json=joining.is_json_lines(frame))
        fields, lower = _fields(frame, options)
    except RiskcalError as error:
        # which of several attempts is kept leaves rows out
        told = str(error) if options.keep else places.told(str(error))
        raise RiskcalError(f"{files.named(path)}: {told}{_of_folders(error, places)}") from None
    _warn(options.unread(frame), options)
    return make(**fields).in_content_order().directed(lower)


def _of_folders(refusal: RiskcalError, places: joining.Places) -> str:
    """Where the thresholds may stand that no file has: in the names of folders."""
    folders = list(dict.fromkeys(file.parent.name for file in places.files))
    if not str(refusal).startswith("threshold: the column is missing") or len(folders) < 2:
        return ""
    if np.isnan(candidates.as_numbers(pd.Series(folders, dtype=object))).any():
        return ""
    first = folders[0]
    return f" If the folders' names are the thresholds, rename {first} to threshold={first}, and the others likewise."


def _fields(frame: pd.DataFrame, options: TableOptions) -> tuple[dict[str, Any], bool]:
    """The fields of the runs in a prepared table, and whether its low thresholds are the strict ones."""
    lower = direction.of_frame(frame, options.lower_is_stricter)
    return reading.fields_of(frame, options.candidate_columns, options.costs), lower


def _warn(unread: Sequence[str], options: TableOptions) -> None:
    warn_of_unnamed(unread, options.named, options.columns or ())
