"""`riskcal check`: all problems of a log at once, none exactly where it is read, and options that really mend it."""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from riskcal import RiskcalError, Runs, cli
from riskcal.records import renaming
from riskcal.records.check import Finding, findings

GRID = (math.inf, 0.75, 0.5)


def table(n: int = 8) -> pd.DataFrame:
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0 if t > 0.6 else 0.125}
        for i in range(n)
        for t in GRID
    ]
    return pd.DataFrame(rows).assign(layers=3.0, group="easy", measure="softmax", failed=False)


def put(row: int, column: str, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.astype({column: object})
        frame.loc[row, column] = value
        return frame.infer_objects()

    return change


def again(row: int) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: pd.concat([frame, frame.iloc[[row]]], ignore_index=True)


#: What can be wrong: the change, and the column and first row of the finding.
FAULTS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str, int]] = {
    "no threshold": (put(4, "threshold", None), "threshold", 4),
    "a word as threshold": (put(4, "threshold", "high"), "threshold", 4),
    "no prompt": (put(8, "prompt", None), "prompt", 8),
    "a number among texts": (put(8, "prompt", 7), "prompt", 8),
    "no loss": (put(10, "dissimilarity", None), "dissimilarity", 10),
    "too large a loss": (put(10, "dissimilarity", 1.5), "dissimilarity", 10),
    "far from itself": (put(12, "dissimilarity", 0.5), "dissimilarity", 12),
    "a negative cost": (put(11, "layers", -1.0), "layers", 11),
    "no cost": (put(11, "layers", None), "layers", 11),
    "no truth": (put(13, "failed", "yes"), "failed", 13),
    "another group": (put(14, "group", "hard"), "group", 14),
    "no group": (put(14, "group", None), "group", 14),
    "no measure": (put(16, "measure", None), "measure", 16),
    "twice": (again(17), "prompt", 24),
    "a candidate lacks": (lambda frame: frame.drop(index=19), "prompt", 18),
    "candidates lack": (lambda frame: frame.drop(index=[22, 23]), "prompt", 21),
    "the full model lacks": (lambda frame: frame.drop(index=21), "prompt", 22),
}


def refused(frame: pd.DataFrame, **more: Any) -> str | None:
    try:
        Runs.from_frame(frame, **more)
    except RiskcalError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_alone_is_the_one_finding_in_the_words_of_the_refusal(name: str) -> None:
    change, column, row = FAULTS[name]
    frame = change(table())
    at = int(np.flatnonzero(frame.index == row)[0])
    (found,) = findings(frame)
    assert (found.column, found.rows) == (column, (at,))
    message = refused(frame)
    assert message is not None
    assert message.startswith(f"{column}: {found.problem}")
    assert message.endswith(found.remedy[1:])


@settings(max_examples=25, deadline=None)
@given(names=st.sets(st.sampled_from(sorted(FAULTS)), max_size=4))
def test_no_findings_exactly_where_the_table_is_read(names: set[str]) -> None:
    frame = table()
    for name in sorted(names, key=lambda name: name in ("twice", "a candidate lacks")):
        frame = FAULTS[name][0](frame)
    found = findings(frame)
    assert (found == []) == (refused(frame) is None) == (not names)


def test_faults_of_several_columns_are_all_found() -> None:
    frame = table(12)
    names = ["no threshold", "no loss", "a negative cost", "no truth", "another group"]
    for name in names:
        frame = FAULTS[name][0](frame)
    frame = again(35)(frame).drop(index=[31])
    found = [(one.column, one.rows) for one in findings(frame)]
    assert found == [
        *[("threshold", (4,)), ("failed", (13,)), ("dissimilarity", (10,)), ("layers", (11,))],
        *[("group", (14,)), ("prompt", (35,)), ("prompt", (30,))],
    ]


def test_all_rows_of_a_problem_are_named() -> None:
    frame = table()
    frame.loc[[1, 4, 7, 22], "dissimilarity"] = [math.nan, 2.0, -1.0, math.inf]
    (found,) = findings(frame)
    assert found.rows == (1, 4, 7, 22)
    assert "(4 such rows)" in found.problem


def test_a_failure_is_no_problem() -> None:
    frame = table().assign(failed=lambda f: f.index == 10)
    frame.loc[[10, 13], "dissimilarity"] = math.nan
    assert findings(frame)[0].rows == (13,)


FOREIGN = {"prompt": "Request-ID", "threshold": "lambda", "dissimilarity": "rougeL"}


def foreign(n: int = 8) -> pd.DataFrame:
    frame = table(n)[[*FOREIGN]].assign(dissimilarity=lambda f: 1 - f["dissimilarity"])
    return frame.rename(columns=FOREIGN)


def mended(frame: pd.DataFrame, tmp_path: Path) -> tuple[list[str], pd.DataFrame]:
    """The options that the findings name, pasted as they are."""
    options = shlex.split(" ".join(option for one in findings(frame) for option in one.mend))
    frame.replace({"lambda": {math.inf: "full"}}).to_json(
        tmp_path / "log.jsonl", orient="records", lines=True
    )
    return options, frame


@pytest.mark.parametrize(
    ("change", "target"),
    [
        (lambda f: f, "dissimilarity"),
        (lambda f: f.assign(rougeL=100 * f["rougeL"]), "dissimilarity"),
        (lambda f: f.assign(rougeL=1 - f["rougeL"]).rename(columns={"rougeL": "edit distance"}),
         "dissimilarity"),
        (lambda f: f.assign(rougeL=0.5).rename(columns={"rougeL": "f1"}), "risk"),
        (lambda f: pd.concat([f.assign(attempt=k) for k in range(2)], ignore_index=True),
         "dissimilarity"),
        (lambda f: f.assign(timed_out=lambda f: f.index % 50 == 7,
                            rougeL=lambda f: f["rougeL"].mask(f["timed_out"])), "failed"),
        (lambda f: f.assign(metrics=[{"length": 3, "rougeL": value} for value in f["rougeL"]])
         .drop(columns="rougeL"), "dissimilarity"),
    ],
    ids=["a score", "a percentage", "a distance", "a score of the task", "retries", "failures",
         "a score in an object"],
)  # fmt: skip
def test_options_that_are_proposed_mend_the_log(
    change: Callable[[pd.DataFrame], pd.DataFrame], target: str, tmp_path: Path
) -> None:
    options, _ = mended(change(foreign(200)), tmp_path)
    assert any(option.startswith(f"{target}=") for option in options)
    assert run("check", tmp_path / "log.jsonl").exit_code == 2
    found = run("check", tmp_path / "log.jsonl", *options)
    assert found.exit_code == 0, found.stdout
    objective = "risk" if target == "risk" else "textual"
    arguments = ["--delta", 0.5, "--objective", objective, *options]
    assert run("calibrate", tmp_path / "log.jsonl", *arguments).exit_code == 0


def test_a_loss_in_percent_is_told_from_a_loss_that_is_wrong() -> None:
    frame = table()
    many = frame.assign(dissimilarity=760 * frame["dissimilarity"])  # some 95
    assert findings(many)[0].mend == ("--columns dissimilarity=dissimilarity/100",)
    one = put(10, "dissimilarity", 12.5)(frame)
    assert findings(one)[0].mend == ()


def test_what_was_said_of_a_column_is_not_said_again() -> None:
    frame = table().assign(dissimilarity=lambda f: 760 * f["dissimilarity"])
    frame = frame.rename(columns={"dissimilarity": "distance"})
    assert findings(frame, columns={"dissimilarity": "distance"})[0].mend == ()
    assert not findings(frame, columns={"dissimilarity": ("distance", "x / 100")})


def test_a_column_of_another_meaning_gets_another_name() -> None:
    frame = table().assign(source="web", exact="no")
    assert "or name it otherwise" in str(refused(frame))
    options = [option for one in findings(frame) for option in one.mend]
    assert options == ["--columns source_logged=source", "--columns exact_logged=exact"]
    columns = renaming.options([option.removeprefix("--columns ") for option in options])
    assert not findings(frame, columns=columns)
    assert refused(frame, columns=columns) is None


def test_what_stands_in_an_object_is_proposed_where_no_column_has_the_name() -> None:
    frame = table().rename(columns={"dissimilarity": "distance"})
    inner = frame.drop(columns="distance").assign(
        scores=[{"distance": value} for value in frame["distance"]]
    )
    assert findings(inner)[0].mend == ("--columns dissimilarity=scores.distance",)
    both = inner.assign(distance=frame["distance"])
    assert findings(both)[0].mend == ("--columns dissimilarity=distance",)


def test_the_rows_of_a_problem_are_as_many_as_it_says() -> None:
    """The full model's null distances are what they should be, once its null thresholds are known for what they are."""
    frame = table().assign(threshold=lambda f: f["threshold"].replace(math.inf, math.nan))
    gone = frame.index.isin([0, 3, 4, 7])  # two of the full model's
    (one,) = findings(frame.assign(dissimilarity=frame["dissimilarity"].mask(gone)), is_json=True)
    assert one.rows == (4, 7)
    assert "(2 such rows)" in one.problem


def test_what_cannot_be_guessed_is_said_with_what_is_there() -> None:
    found = findings(pd.DataFrame({"a": [1], "b": [2]}))
    assert [one.column for one in found] == ["prompt", "threshold", "dissimilarity, risk"]
    assert all("a, b" in one.remedy and not one.mend for one in found)


@pytest.mark.parametrize(
    "frame",
    [
        table(0),
        table(1),
        table().assign(threshold=math.inf),
        table().assign(threshold=None),
        table().assign(threshold=[[0.5]] * 24),
        table().assign(prompt=[[0.5]] * 24),
        table().assign(prompt=0.5, dissimilarity="x"),
        table().assign(source="dreamt"),
        table().assign(stopped="never", exact=1),
        pd.DataFrame([[1, 2]], columns=["prompt", "prompt"]),
        table().assign(dissimilarity=pd.Timestamp("2026-01-01")),
    ],
    ids=str,
)
def test_logs_that_are_hopeless_have_findings_and_no_end(frame: pd.DataFrame) -> None:
    assert refused(frame)
    found = findings(frame)
    assert found
    assert all(isinstance(one, Finding) and one.problem for one in found)


def test_costs_of_any_name_and_directions_are_looked_at_too() -> None:
    frame = put(3, "price", -1.0)(table().assign(price=0.5))
    assert not findings(frame)
    assert [(one.column, one.rows) for one in findings(frame, costs=["price"])] == [("price", (3,))]
    assert [one.column for one in findings(frame, costs=["joules"])] == ["joules"]
    assert not findings(table().assign(lower_is_stricter=True), lower_is_stricter=True)
    stated = findings(table().assign(lower_is_stricter=False), lower_is_stricter=True)
    assert [one.column for one in stated] == ["lower_is_stricter"]


def test_one_log_is_two_that_differ_in_what_the_user_says() -> None:
    """Findings are those of the arguments given: a rule of retries, a name, a further coordinate."""
    frame = pd.concat([table().assign(sample=s, k=s) for s in range(2)], ignore_index=True)
    assert findings(frame)
    assert not findings(frame, candidate_columns=["sample"])
    assert not findings(frame, keep=("last", "k"))
    assert findings(frame, keep=("last", "group"))[0].column == "group"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


def test_the_shell_lists_them_and_changes_nothing(tmp_path: Path) -> None:
    frame = FAULTS["too large a loss"][0](FAULTS["a negative cost"][0](table()))
    log = tmp_path / "log.csv"
    frame.replace({"threshold": {math.inf: "full"}}).to_csv(log, index=False)
    before = log.read_bytes()
    found = run("check", log)
    assert found.exit_code == 2
    assert "2 problems" in found.stdout
    assert "dissimilarity: 1.5 at row 10" in found.stdout
    assert "layers: -1.0 at row 11" in found.stdout
    listed = json.loads(run("check", log, "--json").stdout)
    assert listed["readable"] is False
    assert [one["rows"] for one in listed["problems"]] == [[10], [11]]
    assert log.read_bytes() == before


def test_a_log_that_is_read_is_described_with_what_else_it_holds(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    table().assign(latency_ms=3.0, user_id=4).to_parquet(log)
    found = run("check", log)
    assert found.exit_code == 0
    assert "8 prompts x 2 candidates" in found.stdout
    assert "latency_ms, user_id: these columns are not read" in found.stdout
    assert "--columns seconds=latency_ms/1000 --columns cluster=user_id" in found.stdout
    assert json.loads(run("check", log, "--json").stdout) == {"readable": True, "problems": []}


def test_a_null_that_json_made_of_infinity_is_no_problem(tmp_path: Path) -> None:
    table().to_json(tmp_path / "log.jsonl", orient="records", lines=True)
    assert run("check", tmp_path / "log.jsonl").exit_code == 0


def test_a_word_for_the_full_model_hides_nothing_where_it_was_tried_again():
    """One prompt's row of the full model is there twice: the word is not in every row that it was in once."""
    log = pd.concat([table(), table().iloc[[0]]], ignore_index=True).astype({"threshold": object})
    log.loc[[i for i, t in enumerate(log["threshold"]) if math.isinf(t)], "threshold"] = "none"
    log.loc[10, "dissimilarity"] = 1.5
    found = findings(log)
    assert sorted(one.column for one in found) == ["dissimilarity", "prompt", "threshold"]
    assert "If 'none' means that, replace it before reading" in found[0].remedy


def test_names_that_several_stages_share_are_taken_for_none_of_the_logs_own():
    """A confidence of the first stage would pass for a score of the whole request."""
    stage = {"score": 0.5, "usd": 0.1}
    log = pd.DataFrame({"ticket": ["a", "b"], "small": [stage] * 2, "large": [stage] * 2})
    found = {one.column: one for one in findings(log)}
    assert not any(one.mend for one in found.values())
    assert "riskcal.Traces.from_arrays" in found["threshold"].remedy
    alone = findings(log.drop(columns="large"))
    assert alone[-1].mend == ("--columns risk=1-small.score",)


def test_names_of_a_router_are_known():
    log = pd.DataFrame(
        {
            "trace_id": ["a", "a", "a", "b", "b"],
            "conf_cutoff": ["full", 0.5, 0.5, "full", 0.5],
            "rougeL_pct": [100.0, 90.0, 80.0, 100.0, 70.0],
            "ts": ["2026-01-01", "2026-01-02", "2026-01-03", "2026-01-04", "2026-01-05"],
        }
    )
    assert [option for one in findings(log) for option in one.mend] == [
        "--columns prompt=trace_id",
        "--columns threshold=conf_cutoff",
        "--columns dissimilarity=1-rougeL_pct/100",
        "--keep last:ts",
    ]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("score", [1, 4, 10]),
        ("edit_distance", [0, 12, 37]),
        ("loss", [1.2, 1.7, 2.2]),
        ("f1", [3, 5, 5]),
    ],
)
def test_marks_counts_and_nats_are_no_percentages(name: str, values: list[float]) -> None:
    log = table().drop(columns="dissimilarity").assign(**{name: values * 8})
    (finding,) = findings(log)
    assert (finding.column, finding.mend) == ("dissimilarity, risk", ())
    log = table().assign(dissimilarity=[0, 12, 37] * 8)
    assert all(not finding.mend for finding in findings(log))


def test_without_the_full_model_a_score_makes_a_risk() -> None:
    log = table().drop(columns="dissimilarity").assign(accuracy=[1.0, 1.0, 0.75] * 8)
    (finding,) = findings(log)
    assert finding.mend == ("--columns dissimilarity=1-accuracy",)
    (finding,) = findings(log[log["threshold"] < math.inf])
    assert finding.mend == ("--columns risk=1-accuracy",)


def test_prompts_without_candidates_are_one_problem() -> None:
    (finding,) = findings(table(12).drop(index=[19, 20, 22, 23]))
    assert len(finding.rows) == 2
    assert "(2 such prompts)" in finding.problem


def test_an_id_of_each_row_is_not_proposed_as_the_prompts() -> None:
    log = table().drop(columns="prompt").assign(uid=range(24), id=range(24))
    (finding,) = findings(log)
    assert finding.mend == ()
    (finding,) = findings(log.assign(custom_id=table()["prompt"]))
    assert finding.mend == ("--columns prompt=custom_id",)
    one = log[log["threshold"] == 0.5]
    assert findings(one)[0].mend == ("--columns prompt=uid",)
