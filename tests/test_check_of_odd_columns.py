"""`riskcal check` of columns of mixed kinds: it lists the row that it names and as many as it counts, and never breaks."""

import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from riskcal import RiskcalError, Runs
from riskcal.records.check import findings


def table(n: int = 6) -> pd.DataFrame:
    grid = (math.inf, 0.75, 0.5)
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0 if t > 0.6 else 0.125}
        for i in range(n)
        for t in grid
    ]
    return pd.DataFrame(rows).assign(group="easy", failed=False)


def column(*odd: Any, rest: Any, rows: int = 18) -> pd.Series:
    return pd.Series([*odd, *[rest] * (rows - len(odd))], dtype=object)


ODD: dict[str, dict[str, Any]] = {
    "thresholds null and of words": {"threshold": column(None, "high", None, rest=0.5)},
    "prompts null and empty": {"prompt": column("p", None, "", None, rest="q")},
    "prompts first a fraction": {"prompt": column(0.5, "p", "q", rest=3)},
    "clusters of several kinds": {"cluster": column("c", 0.5, None, rest="d")},
    "clusters that nothing can write": {"cluster": column("c", "\ud800", "\ud800", rest="d")},
    "directions of two kinds": {"lower_is_stricter": column(True, None, rest=7)},
    "sources of another meaning": {"source": column("api", rest="generated")},
    "exact of another meaning": {"exact": column(False, 3, "x", rest=False)},
    "stopped of another meaning": {"stopped": column("no", rest="no")},
    "thresholds of another meaning": {"thresholds": column("a", rest="a")},
    "costs that nothing can write": {"tokens": column("\ud800", rest="\ud800")},
    "a prompt of lists": {"prompt": column([1], [2], rest=[1])},
    "a temperature that is a date": {
        "temperature": column(2.0, np.datetime64("2026-01-01"), None, rest=2.0)
    },
}


@pytest.mark.parametrize("name", ODD)
def test_rows_are_those_that_are_named_and_as_many_as_are_counted(name: str) -> None:
    frame = table().assign(**ODD[name])
    with pytest.raises(RiskcalError):
        Runs.from_frame(frame)
    found = findings(frame)
    assert found
    for one in found:
        assert one.remedy or one.column == "prompt", one
        if row := re.search(r"at row (\d+)", one.problem):
            assert not one.rows or int(row[1]) in one.rows, one
        if many := re.search(r"\((\d+) such rows", one.problem):
            assert int(many[1]) == len(one.rows), one


def test_two_columns_of_one_name_are_a_finding_and_hide_no_other() -> None:
    frame = table().assign(failed="no")
    frame = pd.concat([frame, frame[["group"]]], axis=1)
    assert [one.column for one in findings(frame)] == ["group", "failed"]


def test_what_is_missing_among_percentages_is_said_beside_them() -> None:
    frame = table()
    frame["dissimilarity"] *= 95 / frame["dissimilarity"].max()
    frame.loc[5, "dissimilarity"] = math.nan
    first, second = findings(frame)
    assert first.mend == ("--columns dissimilarity=dissimilarity/100",)
    assert (second.rows, second.mend) == ((5,), ())


@pytest.mark.parametrize(
    ("true", "false"), [(1, 0), ("yes", "no"), ("True", "False"), (1.0, 0.0)], ids=str
)
def test_what_says_true_otherwise_is_mended_as_told(true: Any, false: Any) -> None:
    table_ = table().assign(failed=column(true, true, rest=false))
    with pytest.raises(RiskcalError, match="failed") as refusal:
        Runs.from_frame(table_)
    told = re.search(r"\('COLUMN', \"(.*?)\"\)", str(refusal.value))
    assert told is not None
    runs = Runs.from_frame(table_, columns={"failed": ("failed", told[1])})
    assert runs.values["failed"].sum() == 1  # of two, one is the full model's


def test_a_percentage_written_as_text_is_told_from_a_failure() -> None:
    frame = table().assign(dissimilarity=column("0%", "25%", rest="0%"))
    (found,) = findings(frame)
    assert "'25%'" in found.remedy
    assert "failed" not in found.remedy
