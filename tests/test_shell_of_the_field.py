"""Command lines as people type them: patterns that the shell expands, an option said twice, cascades in every command."""

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pytest
from typer.testing import CliRunner

from riskcal.cli import app

RUN = CliRunner()


def table(n: int = 60) -> pd.DataFrame:
    rows = [
        {
            "prompt": f"p{i}",
            "threshold": t,
            "dissimilarity": 0.0,
            "layers": 8 if t == math.inf else 3,
        }
        for i in range(n)
        for t in (math.inf, 0.9, 0.5)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    table()[:90].to_csv(paths[0], index=False)
    table()[90:].to_csv(paths[1], index=False)
    return [str(path) for path in paths]


def test_a_pattern_that_the_shell_expands_is_one_log(two: list[str], tmp_path: Path) -> None:
    policy = str(tmp_path / "policy.json")
    checked = RUN.invoke(app, ["check", *two])
    assert checked.exit_code == 0, checked.output
    assert "60 prompts" in checked.output
    made = RUN.invoke(app, ["calibrate", *two, "--delta", "0.1", "--out", policy])
    assert made.exit_code == 0, made.output
    assert "60 calibration prompts" in made.output.replace("\n", " ")
    tried = RUN.invoke(app, ["trials", *two, "--delta", "0.1", "--n-trials", "2"])
    assert tried.exit_code == 0, tried.output
    agreed = RUN.invoke(app, ["verify", policy, *two])
    assert agreed.exit_code == 0, agreed.output


def test_delta_said_twice_is_refused_rather_than_the_last_taken(two: list[str]) -> None:
    result = RUN.invoke(app, ["calibrate", *two, "--delta", "0.05", "--delta", "0.2"])
    assert result.exit_code != 0
    assert "--delta: is given 2 times" in str(result.exception)


def test_trials_of_a_cascade_are_told_its_coordinates(tmp_path: Path) -> None:
    frame = pd.concat([table().assign(threshold_2=t) for t in (0.8, 0.2)])
    frame.to_csv(tmp_path / "runs.csv", index=False)
    given = ["trials", str(tmp_path / "runs.csv"), "--delta", "0.1", "--n-trials", "2"]
    assert RUN.invoke(app, given).exit_code != 0
    told = RUN.invoke(app, [*given, "--coordinate", "threshold_2"])
    assert told.exit_code == 0, told.output


def test_a_packed_log_of_losses_is_watched(tmp_path: Path) -> None:
    """Logs are packed when they are rotated."""
    path = tmp_path / "losses.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"loss": 0.0}\n{"loss": 1.0}\n'))
    result = RUN.invoke(app, ["monitor", str(path), "--delta", "0.1"])
    assert result.exit_code == 0, result.output
    assert "2 losses seen" in result.output
    path.write_bytes(path.read_bytes()[:20])
    torn = RUN.invoke(app, ["monitor", str(path), "--delta", "0.1"])
    assert "cannot be read" in str(torn.exception)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"loss": 0.1}\n{"loss": null}\n', "row 1 cannot be read (its loss is missing; a request whose"),
        ("loss,id\n,3\n", "row 0 cannot be read (its loss is missing"),
        ("id,loss\n3\n", "row 0 cannot be read (its loss is missing"),
        ('{"loss": [0.1, 1.0]}\n', "row 0 cannot be read (its loss is [0.1, 1.0], which is no number)"),
        ('{"loss": {"0": 0.1}}\n', "which is no number"),
        ('{"loss": 1.0, "loss": 0.0}\n', "'loss' stands in it 2 times; keep one"),
        ('[{"loss": 1.0, "loss": 0.0}]\n', "'loss' stands in it 2 times; keep one"),
    ],
)  # fmt: skip
def test_a_loss_that_is_none_is_told_by_what_stands_there(
    content: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text(content)
    result = RUN.invoke(app, ["monitor", str(tmp_path / "log"), "--delta", "0.1"])
    assert said in str(result.exception)


@pytest.mark.parametrize(
    "write",
    [
        lambda frame, path: pl.from_pandas(frame).write_csv(path),
        lambda frame, path: pyarrow.csv.write_csv(pa.Table.from_pandas(frame), path),
    ],
    ids=["polars", "pyarrow"],
)
@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_missing_loss_that_was_written_as_a_blank_line_is_not_passed_over(
    write: Callable[[pd.DataFrame, Path], None], where: int, stream: bool, tmp_path: Path
) -> None:
    """An output that failed would otherwise have left no trace, and the mean be of those that did not."""
    path = tmp_path / "losses.csv"
    losses = pd.DataFrame({"loss": [0.0, 0.0, 0.0]})
    losses.loc[where, "loss"] = None
    write(losses, path)
    given = "-" if stream else str(path)
    result = RUN.invoke(app, ["monitor", given, "--delta", "0.1"], input=path.read_bytes())
    assert f"{given}: row {where}: is blank" in str(result.exception)
    path.write_text("loss\n" + "\n".join("1" if row == where else "0" for row in range(3)) + "\n")
    mended = RUN.invoke(app, ["monitor", str(path), "--delta", "0.1"])
    assert "3 losses seen, mean 0.3333" in mended.output


def test_a_blank_last_line_is_told_what_it_may_be(tmp_path: Path) -> None:
    """Of a missing last loss pandas and polars write one, too."""
    path = tmp_path / "losses.csv"
    path.write_text("loss\n0.1\n0.2\n\n")
    result = RUN.invoke(app, ["monitor", str(path), "--delta", "0.1"])
    assert "row 2: is blank" in str(result.exception)
    assert "also as the last line of a file" in str(result.exception)
    assert "A line that means nothing: delete it." in str(result.exception)
    path.write_text("loss\n0.1\n0.2\n")
    assert "2 losses seen" in RUN.invoke(app, ["monitor", str(path), "--delta", "0.1"]).output


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_log_of_losses_that_is_no_text_is_told_by_what_it_is(ending: str, tmp_path: Path) -> None:
    pd.DataFrame({"loss": [1.0] * 300}).to_parquet(tmp_path / f"losses.{ending}")
    result = RUN.invoke(app, ["monitor", str(tmp_path / f"losses.{ending}"), "--delta", "0.1"])
    assert "is not UTF-8 text (it is Parquet" in str(result.exception)
    assert "Write its losses as CSV, in Python" in str(result.exception)
