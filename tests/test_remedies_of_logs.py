"""What reading a log advises works when it is followed to the letter, and what attempts are kept by is an order of attempts."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from riskcal import RiskcalError, Runs, cli


def table(n: int = 4, **more: Any) -> pd.DataFrame:
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0 if t > 0.6 else 0.125}
        for i in range(n)
        for t in (math.inf, 0.75, 0.5)
    ]
    return pd.DataFrame(rows).assign(**more)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


UNUSED: dict[str, tuple[dict[str, Any], bool]] = {
    "what an error was": ({"error": ["timeout", *[None] * 11]}, False),
    "durations as texts": ({"latency": "00:00:03"}, False),
    "users of some": ({"user": ["u", *[None] * 11]}, False),
    "a task that changes": ({"task": ["a", "b", "c"] * 4}, False),
    "milliseconds": ({"latency_ms": 250.0}, True),
    "sessions": ({"session_id": [f"s{i // 6}" for i in range(12)]}, True),
}


@pytest.mark.parametrize("name", UNUSED)
def test_columns_that_may_also_be_read_are_read_when_they_are_named(
    name: str, tmp_path: Path
) -> None:
    more, proposed = UNUSED[name]
    log = tmp_path / "log.parquet"
    table(**more).to_parquet(log)
    said = run("check", log)
    assert said.exit_code == 0
    assert ("May also be read" in said.stdout) is proposed
    for option in re.findall(r"--columns (\S+)", said.stdout):
        assert run("check", log, "--columns", *shlex.split(option)).exit_code == 0


@pytest.mark.parametrize(("mark", "decimal"), [(";", ","), (";", "."), ("\t", "."), ("|", ".")])
def test_other_separators_are_refused_with_the_way_that_reads_them(
    mark: str, decimal: str, tmp_path: Path
) -> None:
    path = tmp_path / "log.csv"
    table().to_csv(path, sep=mark, decimal=decimal, index=False)
    with pytest.raises(RiskcalError, match="are parted by") as refusal:
        Runs.read(path)
    told = re.search(r"(Runs\.from_frame.*\))\.$", str(refusal.value))
    assert told is not None
    found = eval(told[1], {"Runs": Runs, "pandas": pd, "path": path})
    assert found.digest() == Runs.from_frame(table()).digest()


def test_folders_name_columns_for_patterns_and_lists_as_for_a_folder(tmp_path: Path) -> None:
    for threshold, rows in table().groupby("threshold"):
        below = tmp_path / f"threshold={threshold}"
        below.mkdir()
        rows.drop(columns="threshold").to_parquet(below / "part.parquet")
    files = sorted(tmp_path.glob("*/*.parquet"))
    for source in (tmp_path, f"{tmp_path}/*/*.parquet", f"{tmp_path}/**/*.parquet", files):
        assert Runs.read(source).digest() == Runs.from_frame(table()).digest()


def twice(first: Any, second: Any) -> pd.DataFrame:
    parts = [table(when=pd.Series([value] * 12, dtype=object)) for value in (first, second)]
    return pd.concat([parts[0].assign(dissimilarity=0.0), parts[1]], ignore_index=True)


@pytest.mark.parametrize("values", [(False, True), (True, False)], ids=str)
def test_truth_values_order_no_attempts(values: tuple[bool, bool]) -> None:
    with pytest.raises(RiskcalError, match="keep: when holds truth values"):
        Runs.from_frame(twice(*values), keep=("last", "when"))


def test_times_with_and_without_a_zone_are_in_no_order() -> None:
    mixed = twice("2026-03-29T02:30:00Z", "2026-03-29 02:45")
    with pytest.raises(RiskcalError, match=r"when: .* at row 12 has no time zone"):
        Runs.from_frame(mixed, keep=("last", "when"))


@pytest.mark.parametrize(
    "values",
    [(10**25, 10**25 + 1), (str(2**60), str(2**60 + 1)), ("9", "10"),
     ("2026-03-29T02:30:00+02:00", "2026-03-29T01:30:00Z"), ("2026-03-29", "2026-03-30")],
    ids=str,
)  # fmt: skip
def test_attempts_are_told_apart_to_the_last_digit_and_in_their_zones(
    values: tuple[Any, Any],
) -> None:
    for frame in (twice(*values), twice(*values).iloc[::-1]):
        kept = Runs.from_frame(frame, keep=("last", "when"))
        assert kept.values["dissimilarity"].max() == 0.125


def test_what_stands_in_objects_is_listed_and_read_by_its_path(tmp_path: Path) -> None:
    flat = table()
    nested = flat.drop(columns="dissimilarity").assign(
        metrics=pd.Series([{"text": {"rougeL": 1 - loss}} for loss in flat["dissimilarity"]]),
        tags=pd.Series([{"id": f"d{i}"} for i in range(len(flat))]),
    )
    log = tmp_path / "log.jsonl"
    nested.replace({"threshold": {math.inf: "full"}}).to_json(log, orient="records", lines=True)
    assert "metrics.text" in run("check", log).stdout
    read = Runs.read(log, columns={"dissimilarity": ("metrics.text.rougeL", "1 - x")})
    assert read.digest() == Runs.from_frame(flat).digest()
    option = "dissimilarity=1-metrics.text.rougeL"
    assert run("check", log, "--columns", option).exit_code == 0
    for wrong in ("metrics.text.wer", "metrics.wer", "tags.id.x", "prompt.x", "."):
        with pytest.raises(RiskcalError, match=r"has no column|stands"):
            Runs.read(log, columns={"dissimilarity": wrong})


def test_a_failure_within_objects_is_null_and_refused() -> None:
    cells = [{"rougeL": 1.0 - loss} for loss in table()["dissimilarity"]]
    frame = (
        table()
        .drop(columns="dissimilarity")
        .assign(metrics=pd.Series([*cells[:5], {}, *cells[6:]], dtype=object))
    )
    with pytest.raises(RiskcalError, match=r"dissimilarity: .* at row 5"):
        Runs.from_frame(frame, columns={"dissimilarity": ("metrics.rougeL", "1 - x")})
