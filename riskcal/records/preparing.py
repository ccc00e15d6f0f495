"""A log's table on its way to the checks: riskcal's names, the attempts that were served, and infinity where JSON has null."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from riskcal.records import candidates, nulls, renaming, retries
from riskcal.records import costs as costs_


def prepared(
    table: Any,
    candidate_columns: Sequence[str] = (),
    columns: renaming.Columns | None = None,
    keep: retries.Keep | None = None,
    costs: Sequence[str] = (),
    *,
    is_json: bool = False,
) -> pd.DataFrame:
    """What `riskcal.records.reading.fields_of` reads; rows keep the numbers that they have in the log."""
    frame = renaming.of_table(table, columns)
    sources = renaming.sources(columns)
    settings = candidates.column_names(candidate_columns)
    further = costs_.columns_named(costs, settings)
    served = retries.served(frame, keep, settings, sources, further)
    name = sources.get("threshold", "threshold")
    return nulls.as_full_model(served, is_json=is_json, name=name)
