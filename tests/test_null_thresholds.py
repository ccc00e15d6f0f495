"""JSON lines in which pandas wrote the full model's infinity as null: read where it can mean nothing else, refused otherwise."""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from riskcal import RiskcalError, Runs

GRID = (math.inf, 0.75, 0.5)


def table(n: int = 6) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0 if t > 0.6 else 0.125}
            for i in range(n)
            for t in GRID
        ]
    )


def as_json(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_json(path, orient="records", lines=True)
    assert b"null" in path.read_bytes()
    return path


def changed(row: int, **cells: object) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype(dict.fromkeys(cells, object))
        for name, value in cells.items():
            frame.loc[row, name] = value
        return frame

    return change


def test_what_pandas_writes_is_read_as_it_was(tmp_path: Path) -> None:
    log = as_json(table(), tmp_path / "log.jsonl")
    assert Runs.read(log).digest() == Runs.from_frame(table()).digest()
    parts = tmp_path / "parts"
    parts.mkdir()
    for threshold, part in table().groupby("threshold"):
        part.to_json(parts / f"{threshold}.jsonl", orient="records", lines=True)
    assert Runs.read(parts).digest() == Runs.from_frame(table()).digest()
    foreign = table().rename(columns={"threshold": "lambda"})
    foreign["score"] = 1 - foreign.pop("dissimilarity")
    log = as_json(foreign, tmp_path / "foreign.jsonl")
    names = {"threshold": "lambda", "dissimilarity": ("score", "1 - x")}
    assert Runs.read(log, columns=names).digest() == Runs.from_frame(table()).digest()


def test_a_distance_to_itself_that_nobody_wrote_is_0(tmp_path: Path) -> None:
    frame = table()
    frame.loc[frame["threshold"] == math.inf, "dissimilarity"] = math.nan
    log = as_json(frame, tmp_path / "log.jsonl")
    assert Runs.read(log).digest() == Runs.from_frame(table()).digest()


def test_a_failure_of_the_full_model_is_one(tmp_path: Path) -> None:
    frame = table().assign(failed=False)
    frame.loc[0, ["dissimilarity", "failed"]] = [1.0, True]
    runs = Runs.read(as_json(frame, tmp_path / "log.jsonl"))
    assert runs.full["failed"].sum() == 1


def test_of_several_attempts_the_one_that_was_served_is_the_full_model(tmp_path: Path) -> None:
    frame = pd.concat([table().assign(attempt=1), table(2).assign(attempt=0)])
    log = as_json(frame, tmp_path / "log.jsonl")
    found = Runs.read(log, keep=("last", "attempt"))
    assert found.digest() == Runs.from_frame(table()).digest()


@pytest.mark.parametrize(
    "change",
    [
        changed(3, threshold="full"),
        changed(3, threshold=0.25),
        changed(4, threshold=math.nan),
        changed(3, dissimilarity=0.5),
        changed(3, dissimilarity="n/a"),
    ],
    ids=["another says full", "a prompt has none", "two of a prompt", "a distance", "no number"],
)
def test_what_may_mean_something_else_is_refused(
    change: Callable[[pd.DataFrame], pd.DataFrame], tmp_path: Path
) -> None:
    log = as_json(change(table()), tmp_path / "log.jsonl")
    with pytest.raises(RiskcalError, match=r"threshold: (nan|None) at row 0 .* is not a threshold"):
        Runs.read(log)


def test_a_null_that_is_not_of_json_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    log = as_json(table().rename(columns={"threshold": "lambda"}), tmp_path / "log.jsonl")
    frame, names = pd.read_json(log, lines=True), {"threshold": "lambda"}
    with pytest.raises(RiskcalError, match=r'fillna\(\{"lambda": math.inf\}\)'):
        Runs.from_frame(frame, columns=names)
    runs = Runs.from_frame(frame.fillna({"lambda": math.inf}), columns=names)
    assert runs.digest() == Runs.from_frame(table()).digest()
    frame.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(RiskcalError, match=r"threshold: nan at row 0 \(6 such rows\)"):
        Runs.read(tmp_path / "log.parquet", columns=names)


def test_a_risk_does_not_say_which_rows_are_the_full_models(tmp_path: Path) -> None:
    frame = table().rename(columns={"dissimilarity": "risk"})
    path = as_json(frame, tmp_path / "runs.jsonl")
    with pytest.raises(RiskcalError, match="is not a threshold"):
        Runs.read(path)
    whole = pd.read_json(path, lines=True).fillna({"threshold": math.inf})
    assert Runs.from_frame(whole).digest() == Runs.from_frame(frame).digest()
