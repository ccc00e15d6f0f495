"""Tables of several files as one, and which file a row of it stands in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

#: The mark of a table from JSON lines, in which a null may have been an infinity.
JSON_LINES = "riskcal.json_lines"

#: How messages about a table name a row, and how those about the matrices of traces, whose rows are the table's, do.
ROW, ROW_OR_INDEX = re.compile(r"\brow (\d+)\b"), re.compile(r"\b(?:row |index \[?)(\d+)\b")

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass(frozen=True)
class Places:
    """The files that a table was read from, and how many rows each has."""

    files: list[Path]
    sizes: list[int]

    def told(self, message: str, naming: re.Pattern[str] = ROW) -> str:
        """A message about the table with the file of the first row that it names, where there are several files."""
        row = naming.search(_QUOTED.sub("", message))  # an id may read like a row
        if row is None or len(self.files) < 2 or int(row[1]) >= sum(self.sizes):
            return message
        ends = np.cumsum(self.sizes)
        file = int(np.searchsorted(ends, int(row[1]), side="right"))
        own = int(row[1]) - int(ends[file]) + self.sizes[file]
        return f"{message} (Row {row[1]} of all is row {own} of {self.files[file]}.)"


def is_json_lines(frame: pd.DataFrame) -> bool:
    """Whether all of a table that was read from files comes from JSON lines."""
    return bool(frame.attrs.get(JSON_LINES))


def together(parts: list[pd.DataFrame], names: Mapping[str, str]) -> pd.DataFrame:
    """Tables below one another; a column that some of them lack is missing there, as the checks of each column say.

    A part of outputs that all ended need not say that none ``failed``. Columns of several types become objects, since pandas
    would make floats of signed and unsigned ids.
    """
    if len(parts) == 1:
        return parts[0]
    failed = names.get("failed", "failed")
    if any(failed in part.columns for part in parts):
        parts = [
            part if failed in part.columns else part.assign(**{failed: False}) for part in parts
        ]
    found = dict.fromkeys(name for part in parts for name in part.columns if part.columns.is_unique)
    mixed = [
        name
        for name in found
        if len({part[name].dtype for part in parts if name in part.columns}) > 1
    ]
    alike = [
        part.astype({name: object for name in mixed if name in part.columns}) for part in parts
    ]
    whole = pd.concat(alike, ignore_index=True)
    whole.attrs = {JSON_LINES: True} if all(map(is_json_lines, parts)) else {}
    return whole
