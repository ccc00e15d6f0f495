"""Requests that were tried again: which attempt counts, what all of them cost, and what cannot say which was served."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from riskcal import RiskcalError, Runs, cli
from riskcal.records import retries
from riskcal.records.check import findings

GRID = (math.inf, 0.75, 0.5)


def table(n: int = 6) -> pd.DataFrame:
    """Every request of p1 and p3 timed out twice before it was served."""
    rows = []
    for i in range(n):
        for t in GRID:
            tries = 3 if i in (1, 3) else 1
            for attempt in range(tries):
                lost = attempt < tries - 1
                loss = math.nan if lost else 0.0 if t > 0.6 else 0.125
                rows.append(
                    {"prompt": f"p{i}", "threshold": t, "dissimilarity": loss, "attempt": attempt}
                    | {"layers": 8.0 if lost else 3.0, "seconds": 10.0 if lost else 1.0}
                )
    return pd.DataFrame(rows)


def test_the_last_attempt_counts_with_the_seconds_of_all_whatever_the_order_of_rows() -> None:
    for seed in range(4):
        frame = table().sample(frac=1, random_state=seed)
        runs = Runs.from_frame(frame, keep=("last", "attempt"))
        assert runs.losses().max() == 0.125
        tried = np.isin(runs.prompts, ["p1", "p3"])
        assert (runs.values["seconds"] == np.where(tried, 21.0, 1.0)[:, None]).all()
        assert (runs.full["seconds"] == np.where(tried, 21.0, 1.0)).all()
        assert (runs.values["layers"] == 3.0).all()


def test_vectors_of_thresholds_are_candidates_too() -> None:
    vectors = [[0.9, 0.8] if t > 0.6 else [0.5, 0.4] for t in table()["threshold"]]
    frame = table().assign(thresholds=vectors)
    runs = Runs.from_frame(frame, keep=("last", "attempt"))
    assert (runs.n, runs.k) == (6, 2)
    assert findings(frame, keep=("last", "attempt")) == []
    assert [one.mend for one in findings(frame)] == [("--keep last:attempt",)]
    arrays = frame.assign(thresholds=[np.array(v) for v in vectors])
    assert Runs.from_frame(arrays, keep=("last", "attempt")).digest() == runs.digest()


def test_costs_of_any_name_add_up_but_layers() -> None:
    frame = table().assign(price=0.5)
    runs = Runs.from_frame(frame, keep=("last", "attempt"), costs=["price"])
    assert sorted(set(runs.values["price"].ravel())) == [0.5, 1.5]
    with pytest.raises(RiskcalError, match="keep: price is a result of the attempt"):
        Runs.from_frame(frame, keep=("last", "price"), costs=["price"])


def test_the_first_attempt_counts_alone() -> None:
    frame = table()
    frame["failed"] = frame["dissimilarity"].isna()
    runs = Runs.from_frame(frame, keep=("first", "attempt"))
    tried = np.isin(runs.prompts, ["p1", "p3"])
    assert (runs.losses()[tried] == 1.0).all()
    assert (runs.values["seconds"] == np.where(tried, 10.0, 1.0)[:, None]).all()


def test_without_a_rule_rows_that_stand_twice_are_refused_and_the_rule_is_named() -> None:
    frame = table().fillna({"dissimilarity": 0.0})
    with pytest.raises(RiskcalError, match=r"keep=\('last', 'attempt'\).*--keep last:attempt"):
        Runs.from_frame(frame)
    assert Runs.from_frame(frame, keep=("last", "attempt")).n == 6


@settings(max_examples=40, deadline=None)
@given(
    tries=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    which=st.sampled_from(["last", "first"]),
    kind=st.sampled_from(["numbers", "texts", "times", "iso", "epoch"]),
)
def test_of_any_attempts_in_any_order_one_is_kept(
    tries: list[int], seed: int, which: str, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    order = {
        "numbers": lambda k: k * 10.0,
        "texts": str,
        "times": lambda k: pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(seconds=k),
        "iso": lambda k: f"2026-01-01T0{k}:00:00+0{k % 2}:00",
        "epoch": lambda k: 1_700_000_000_000_000_000 + k,
    }[kind]
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": k / 8, "when": order(8 + k)}
        for i in range(2)
        for t, n in zip((0.9, 0.5), tries[2 * i : 2 * i + 2], strict=True)
        for k in ((2 * np.arange(n)).tolist() if kind == "iso" else range(n))
    ]
    if kind == "iso":
        rows = [row | {"when": order(round(8 * row["dissimilarity"]))} for row in rows]
    frame = pd.DataFrame(rows).iloc[rng.permutation(len(rows))]
    runs = Runs.from_frame(frame, keep=(which, "when"))
    right = frame.groupby(["prompt", "threshold"])["dissimilarity"].agg(
        "max" if which == "last" else "min"
    )
    for prompt, losses in zip(runs.prompts, runs.losses(), strict=True):
        assert losses.tolist() == [right[prompt, 0.9], right[prompt, 0.5]]


def test_rows_of_a_refusal_are_those_of_the_log() -> None:
    frame = table()
    at = int(np.flatnonzero(frame["prompt"] == "p4")[1])
    frame.loc[at, "dissimilarity"] = 7.0
    with pytest.raises(RiskcalError, match=rf"dissimilarity: 7.0 at row {at};"):
        Runs.from_frame(frame, keep=("last", "attempt"))


def test_candidates_of_several_coordinates_are_kept_apart() -> None:
    frame = pd.concat([table().assign(threshold_2=t) for t in (0.1, 0.2)], ignore_index=True)
    runs = Runs.from_frame(frame, keep=("last", "attempt"), candidate_columns=["threshold_2"])
    assert (runs.n, runs.k) == (6, 4)
    assert runs.values["seconds"].max() == 21.0


@pytest.mark.parametrize(
    ("changes", "keep", "named"),
    [
        ({}, ("last", "tries"), "the table has no column 'tries'; it has: prompt"),
        ({}, ("best", "attempt"), "says not which attempt was served"),
        ({}, "last", "says not which attempt was served"),
        ({}, ("last", "dissimilarity"), "would select on the outcome"),
        ({}, ("first", "seconds"), "would select on the outcome"),
        ({"attempt": 1}, ("last", "attempt"), "stands twice for one candidate of prompt 'p1'"),
        ({"attempt": None}, ("last", "attempt"), "missing at row 0 (30 such rows)"),
        ({"attempt": "second"}, ("last", "attempt"), "not a column of numbers or times"),
        ({"attempt": [[1]] * 30}, ("last", "attempt"), "not a column of numbers or times"),
        ({"seconds": None}, ("last", "attempt"), "one of several attempts. The cost of all"),
    ],
)
def test_what_does_not_say_which_attempt_was_served_is_refused(
    changes: dict[str, Any], keep: Any, named: str
) -> None:
    with pytest.raises(RiskcalError) as caught:
        Runs.from_frame(table().assign(**changes), keep=keep)
    assert named in str(caught.value)


def test_a_score_is_a_result_under_its_own_name_too() -> None:
    frame = table().rename(columns={"dissimilarity": "score"})
    columns = {"dissimilarity": "score", "risk": "score"}
    with pytest.raises(RiskcalError, match="keep: score is a result of the attempt"):
        Runs.from_frame(frame, columns=columns, keep=("last", "score"))


def test_remedies_for_attempts_work() -> None:
    frame = table().astype({"attempt": "Int64"})
    frame.loc[frame["prompt"] == "p0", "attempt"] = pd.NA
    with pytest.raises(RiskcalError, match="Where a request was never tried again, 0 will do"):
        Runs.from_frame(frame, keep=("last", "attempt"))
    assert Runs.from_frame(frame.fillna({"attempt": 0}), keep=("last", "attempt")).n == 6
    twice = pd.concat([table(), table().iloc[:1]])
    with pytest.raises(RiskcalError, match="drop_duplicates"):
        Runs.from_frame(twice, keep=("last", "attempt"))
    assert Runs.from_frame(twice.drop_duplicates(), keep=("last", "attempt")).n == 6


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


def test_the_shell_keeps_them_too(tmp_path: Path) -> None:
    frame = table(60).replace({"threshold": {math.inf: "full"}})
    frame.to_json(tmp_path / "log.jsonl", orient="records", lines=True)
    arguments = ("calibrate", tmp_path / "log.jsonl", "--delta", 0.3)
    assert run(*arguments, "--keep", "last:attempt").exit_code == 0
    with pytest.raises(RiskcalError, match="neither last:COLUMN nor first:COLUMN"):
        retries.option("attempt")
    for text in ("last:", "best:attempt"):
        with pytest.raises(RiskcalError, match="neither"):
            run(*arguments, "--keep", text)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_what_an_attempt_cannot_have_cost_does_not_hide_in_a_sum(value: float) -> None:
    frame = table()
    row = int(frame.index[(frame["prompt"] == "p1") & (frame["attempt"] == 1)][0])
    frame.loc[row, "seconds"] = value
    with pytest.raises(RiskcalError, match=f"seconds: .* at row {row} "):
        Runs.from_frame(frame, keep=("last", "attempt"))
    assert findings(frame, keep=("last", "attempt"))[0].column == "seconds"
