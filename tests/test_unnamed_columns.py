"""Columns of numbers that nobody named are not read, and whoever reads the table is told which."""

import subprocess
import sys
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import riskcal
from riskcal import Runs

TABLE = pd.DataFrame(
    {
        "prompt": np.repeat(["a", "b"], 2),
        "threshold": [0.9, 0.5] * 2,
        "dissimilarity": 0.25,
        "layers": 2.0,
    }
)


def warned(table: Any, **options: Any) -> list[str]:
    """The names in the warnings of reading a table."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Runs.from_frame(table, **options)
    assert all(one.filename == __file__ for one in said)  # the line that read it
    return [str(one.message).partition(":")[0] for one in said]


def test_they_are_named_once_with_what_to_do() -> None:
    log = TABLE.assign(price=1.5, joules=[1, 2, 3, 4])
    assert warned(log) == ["price, joules"]
    with pytest.warns(
        UserWarning, match=r"price: the column is not read.*costs=.*candidate_columns="
    ):
        runs = Runs.from_frame(log, costs=["joules"])
    assert list(runs.values) == ["dissimilarity", "layers", "joules"]


@pytest.mark.parametrize(
    ("column", "options"),
    [
        ("price", {"costs": ["price"]}),
        ("variant", {"candidate_columns": ["variant"]}),
        ("attempt", {"keep": ("last", "attempt")}),
        ("ms", {"columns": {"seconds": ("ms", "x / 1000")}}),
        ("ms", {"columns": {"ms_logged": "ms"}}),  # named, and so put out of the way
        ("risk", {}),
        ("min_layer", {}),
        ("cluster", {}),
    ],
)
def test_what_was_named_or_is_known_is_not_among_them(column: str, options: Any) -> None:
    assert warned(TABLE.assign(**{column: 1}), **options) == []


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        ([1, 2, 3, 4], True),
        ([1, None, None, 2.5], True),
        ([Decimal(1), Decimal(2), Decimal(3), None], True),
        ([True, False, True, False], False),
        (["an", "output", "as", "text"], False),
        ([None, None, None, None], False),
        ([[1], [2, 3], [], [4]], False),
    ],
)
def test_numbers_of_any_type_are_seen_and_nothing_else_is(cells: list[Any], numbers: bool) -> None:
    assert warned(TABLE.assign(other=pd.Series(cells))) == ["other"] * numbers


def test_numbers_that_pandas_gave_its_rows_are_none(tmp_path: Path) -> None:
    TABLE[::-1].to_csv(tmp_path / "log.csv")
    TABLE[::-1].to_parquet(tmp_path / "log.parquet")
    Runs.read(tmp_path / "log.csv")
    Runs.read(tmp_path / "log.parquet")
    assert warned(TABLE.assign(**{"Unnamed: 0": [0, 1, 2, 3]})) == []


def test_files_warn_alike_and_what_is_written_here_does_not(tmp_path: Path) -> None:
    for ending in ("parquet", "csv", "jsonl"):
        path = tmp_path / f"runs.{ending}"
        Runs.from_frame(TABLE).write(path)
        Runs.read(path)  # a warning would be an error
    TABLE.assign(price=1).to_csv(tmp_path / "log.csv", index=False)
    with pytest.warns(UserWarning, match="price: ") as said:
        Runs.read(tmp_path / "log.csv")
    assert [one.filename for one in said] == [__file__]
    runs = riskcal.load_example("g2p")
    assert Runs.from_frame(runs.to_frame(), costs=runs.costs).digest() == runs.digest()


def test_on_the_shell_the_warning_is_one_line_that_names_no_source(tmp_path: Path) -> None:
    TABLE.assign(price=1).to_csv(tmp_path / "log.csv", index=False)
    command = [sys.executable, "-m", "riskcal", "calibrate", "log.csv", "--delta", "0.5", "--json"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (line,) = ran.stderr.splitlines()
    assert line.startswith("riskcal: price: the column is not read")
