"""What the adapters and the benchmarks need of the core beyond its public names; it may change with any version.

Checks of arguments, tables in any format that `riskcal` reads, and files that appear whole or not at all.
"""

from riskcal._replacing import a_path, flush, replacing
from riskcal._validate import (
    TOLERANCE,
    Floats,
    array,
    choice,
    count,
    finite,
    first,
    in_range,
    level,
    number,
    shown,
    threshold_grid,
    tolerance,
)
from riskcal.calibration.verifying import arguments_of
from riskcal.records.columns import from_object as table_from_object
from riskcal.records.columns import identifiers
from riskcal.records.columns import require as require_columns
from riskcal.records.files import read as read_table
from riskcal.records.files import write as write_table

__all__ = [
    "TOLERANCE",
    "Floats",
    "a_path",
    "arguments_of",
    "array",
    "choice",
    "count",
    "finite",
    "first",
    "flush",
    "identifiers",
    "in_range",
    "level",
    "number",
    "read_table",
    "replacing",
    "require_columns",
    "shown",
    "table_from_object",
    "threshold_grid",
    "tolerance",
    "write_table",
]
