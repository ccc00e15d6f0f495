"""From a long table, in memory or in files, to `Runs`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from riskcal._validate import RiskcalError
from riskcal.records import direction, files, reading, renaming, retries, streaming
from riskcal.records.preparing import prepared
from riskcal.records.unnamed import unnamed, warn_of_unnamed

if TYPE_CHECKING:
    from riskcal.records.runs import Runs

_Runs = TypeVar("_Runs", bound="Runs")


@dataclass(frozen=True)
class Asked:
    """What `Runs.from_frame` was asked for beside its table."""

    candidate_columns: Sequence[str]
    costs: Sequence[str]
    lower_is_stricter: bool
    columns: renaming.Columns | None
    keep: retries.Keep | None

    def prepared(self, table: Any, *, is_json: bool = False) -> pd.DataFrame:
        """The table under riskcal's names."""
        return prepared(
            table, self.candidate_columns, self.columns, self.keep, self.costs, is_json=is_json
        )

    @property
    def named(self) -> list[str]:
        """The columns that were named because riskcal does not know them."""
        return [*self.candidate_columns, *self.costs, *(self.keep or ())[1:]]


def of_frame(make: type[_Runs], table: Any, asked: Asked) -> _Runs:
    """The runs in a table."""
    frame = asked.prepared(table)
    lower = direction.of_frame(frame, asked.lower_is_stricter)
    fields = reading.fields_of(frame, asked.candidate_columns, asked.costs)
    _warn(_unread(frame, asked), asked)
    return make(**fields).in_content_order().directed(lower)


def of_files(make: type[_Runs], path: files.Source, asked: Asked) -> _Runs:
    """The runs in files, a part of the prompts at a time where there are many."""
    path = files.listed(path)
    names = renaming.only_renamed(asked.columns)
    unread: list[str] = []

    def of_part(frame: pd.DataFrame) -> _Runs:
        lower = direction.of_frame(frame, asked.lower_is_stricter)
        fields = reading.fields_of(frame, asked.candidate_columns, asked.costs)
        found = {*unread, *_unread(frame, asked)}
        unread[:] = [name for name in frame.columns if name in found]
        return make(**fields).directed(lower)

    # attempts of one prompt may be anywhere, and so may what a formula asks for
    if asked.keep is None and not renaming.compares(asked.columns):
        runs = streaming.runs(path, names, asked.prepared, of_part)
        if runs is not None:
            _warn(unread, asked)
            return runs
    frame = files.read(path, names)
    try:
        frame = asked.prepared(frame, is_json=files.is_json_lines(frame))
        lower = direction.of_frame(frame, asked.lower_is_stricter)
        fields = reading.fields_of(frame, asked.candidate_columns, asked.costs)
    except RiskcalError as error:
        raise RiskcalError(f"{files.named(path)}: {error}") from None
    _warn(_unread(frame, asked), asked)
    return make(**fields).in_content_order().directed(lower)


def _unread(frame: pd.DataFrame, asked: Asked) -> list[str]:
    return unnamed(frame, [*asked.named, *(asked.columns or ())])


def _warn(unread: Sequence[str], asked: Asked) -> None:
    warn_of_unnamed(unread, asked.named, asked.columns or ())
