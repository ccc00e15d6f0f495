"""`columns=`: a log's own names, scores as losses, and what is said of names and formulas that lead nowhere."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from riskcal import ExitPolicy, RiskcalError, Runs, Traces, cli
from riskcal.records import renaming

NAMES = {
    "prompt": "request_id",
    "threshold": "lambda",
    "dissimilarity": ("rougeL", "1 - x"),
    "seconds": ("latency_ms", "x / 1000"),
}


def table(n: int = 40) -> pd.DataFrame:
    rows = [
        {"prompt": f"{i:03d}", "threshold": t, "dissimilarity": 0.0 if t > 0.6 else 0.125}
        for i in range(n)
        for t in (math.inf, 0.75, 0.5)
    ]
    return pd.DataFrame(rows).assign(seconds=np.arange(3.0 * n) / 8)


def foreign(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "request_id": frame["prompt"],
            "lambda": frame["threshold"],
            "rougeL": 1 - frame["dissimilarity"],
            "latency_ms": 1000 * frame["seconds"],
        }
    )


def written(frame: pd.DataFrame, path: Path) -> Path:
    """A log as a serving system might leave it, by the ending."""
    frame = frame.replace({"lambda": {math.inf: "full"}})
    if path.suffix == ".parquet":
        frame.astype({"lambda": str}).to_parquet(path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in frame.to_dict("records"))
        path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl.gz"])
def test_a_log_under_its_own_names_is_the_same_runs(name: str, tmp_path: Path) -> None:
    right = Runs.from_frame(table()).digest()
    assert Runs.from_frame(foreign(table()), columns=NAMES).digest() == right
    assert Runs.read(written(foreign(table()), tmp_path / name), columns=NAMES).digest() == right


def test_ids_keep_their_zeros_under_another_name(tmp_path: Path) -> None:
    log = written(foreign(table()), tmp_path / "log.csv")
    assert "007" in Runs.read(log, columns=NAMES).prompts
    folder = tmp_path / "by_id"
    for name, part in table(4).groupby("prompt"):
        (folder / f"request_id={name}").mkdir(parents=True)
        part.drop(columns="prompt").to_csv(folder / f"request_id={name}" / "part.csv", index=False)
    assert "003" in Runs.read(folder, columns={"prompt": "request_id"}).prompts


def test_a_column_whose_name_another_one_gets_may_be_numbers(tmp_path: Path) -> None:
    """`text` holds a score here: under another name it is read as numbers, not as texts."""
    frame = table().rename(columns={"dissimilarity": "text"})
    frame.to_csv(tmp_path / "log.csv", index=False)
    found = Runs.read(tmp_path / "log.csv", columns={"dissimilarity": "text"})
    assert found.digest() == Runs.from_frame(table()).digest()


@settings(max_examples=60, deadline=None)
@given(
    minuend=st.one_of(st.none(), st.floats(0, 100)),
    factor=st.one_of(st.none(), st.floats(1e-3, 1e3)),
    sign=st.sampled_from("*/"),
    values=st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1),
)
def test_formulas_are_what_python_makes_of_them(
    minuend: float | None, factor: float | None, sign: str, values: list[float | None]
) -> None:
    formula = "x" if minuend is None else f"{minuend!r} - x"
    formula += "" if factor is None else f" {sign} {factor!r}"
    made = renaming.renamed(pd.DataFrame({"score": values}), {"loss": ("score", formula)})
    assert list(made.columns) == ["loss"]
    for value, result in zip(values, made["loss"], strict=True):
        if value is None:
            assert math.isnan(result)
        else:
            assert result == eval(formula, {"x": value})
    assert renaming.options([f"loss={formula.replace('x', 'my score')}"])["loss"] == (
        "my score" if formula == "x" else ("my score", formula)
    )


def test_what_is_no_number_stays_for_the_checks_to_name() -> None:
    frame = foreign(table()).astype({"rougeL": object})
    frame.loc[1, "rougeL"], frame.loc[4, "rougeL"] = "n/a", None
    with pytest.raises(RiskcalError, match=r"dissimilarity: 'n/a' at row 1 \(2 such rows\)"):
        Runs.from_frame(frame, columns=NAMES)
    failed = frame.assign(failed=frame.index.isin([1, 4]))
    assert Runs.from_frame(failed, columns=NAMES).losses()[:, 0].sum() == 2
    made = renaming.renamed(pd.DataFrame({"a": ["full", 50, True]}), {"b": ("a", "x / 100")})
    assert made["b"].tolist() == ["full", 0.5, 0.01]


def test_one_column_may_serve_twice_and_two_may_change_places() -> None:
    frame = table().rename(columns={"prompt": "id"}).assign(prompt=lambda f: "say " + f["id"])
    runs = Runs.from_frame(frame, columns={"prompt": "id", "cluster": "id", "text": "prompt"})
    assert sorted(runs.labels) == ["cluster", "text"]
    assert runs.labels["text"][0] == f"say {runs.prompts[0]}"


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"prompt": "id"}, "no column 'id'; it has: prompt, threshold"),
        ({"dissimilarity": ("seconds", "2x")}, "formula '2x'; a formula is a number minus x"),
        ({"dissimilarity": ("seconds", "x / 0")}, "makes no numbers"),
        ({"dissimilarity": ("seconds", "1e999 - x")}, "makes no numbers"),
        ({"dissimilarity": ("seconds",)}, "give the log's name of the column"),
        ({"dissimilarity": 3}, "give the log's name of the column"),
        ({3: "seconds"}, "3 is no name of a column"),
        (["prompt"], "is no dictionary"),
        ({"prompt": "seconds"}, "the table has a column prompt already"),
    ],
)
def test_what_leads_nowhere_is_refused(columns: Any, named: str) -> None:
    with pytest.raises(RiskcalError) as caught:
        Runs.from_frame(table(), columns=columns)
    assert named in str(caught.value)
    assert str(caught.value).startswith("columns: ")


def test_the_remedy_for_a_name_that_is_taken_works() -> None:
    frame = table().rename(columns={"prompt": "id"}).assign(prompt="the same question")
    frame["prompt"] += frame["id"]
    with pytest.raises(RiskcalError, match="'text': 'prompt'"):
        Runs.from_frame(frame, columns={"prompt": "id"})
    assert Runs.from_frame(frame, columns={"prompt": "id", "text": "prompt"}).n == 40
    again = frame.assign(text="x")
    with pytest.raises(RiskcalError, match="'prompt_logged': 'prompt'"):
        Runs.from_frame(again, columns={"prompt": "id", "cluster": "id"})
    columns = {"prompt": "id", "prompt_logged": "prompt"}
    assert Runs.from_frame(again.drop(columns="text"), columns=columns).n == 40


def test_traces_have_names_of_their_own_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    traces = Traces.from_arrays(
        prompt=np.repeat(["01", "02", "03"], 4),
        position=np.tile(np.arange(4), 3),
        confidence=rng.integers(0, 8, (12, 3)) / 8,
        agrees=rng.random((12, 3)) < [0.5, 0.5, 1],
    )
    frame = traces.to_frame()
    log = pd.DataFrame({"id": frame["prompt"], "step": frame["position"], "ok": frame["agrees"]})
    log["entropy"] = [1 - level for level in frame["confidence"]]
    names = {"prompt": "id", "position": "step", "agrees": "ok"}
    names["confidence"] = ("entropy", "1 - x")
    log.to_json(tmp_path / "log.jsonl", orient="records", lines=True)
    spread = log[["id", "step"]].copy()
    for name in ("entropy", "ok"):
        for exit_, cells in enumerate(np.vstack(log[name].to_list()).T, 1):
            spread[f"{name}_{exit_}"] = cells
    spread.to_csv(tmp_path / "log.csv", index=False)
    for found in (
        Traces.from_frame(log, columns=names),
        Traces.read(tmp_path / "log.jsonl", columns=names),
        Traces.read(tmp_path / "log.csv", columns=names),
    ):
        assert found.prompt.tolist() == traces.prompt.tolist()
        assert np.array_equal(found.confidence, traces.confidence)
        assert np.array_equal(found.agrees, traces.agrees)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


SHELL = ["--columns", "prompt=request_id", "--columns", "threshold=lambda"]
SHELL += ["--columns", "dissimilarity=1-rougeL", "--columns", "seconds = latency_ms / 1000"]


def test_the_shell_says_the_same(tmp_path: Path) -> None:
    log, out = written(foreign(table(200)), tmp_path / "log.csv"), tmp_path / "policy.json"
    found = run("calibrate", log, "--delta", 0.3, *SHELL, "--out", out)
    assert found.exit_code == 0
    assert ExitPolicy.load(out).threshold == 0.5
    assert run("trials", log, "--delta", 0.3, "--n-trials", 2, *SHELL).exit_code == 0


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=id", " = ", ""])
def test_what_the_shell_cannot_mean_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(RiskcalError, match="is not NAME=COLUMN or NAME=FORMULA"):
        renaming.options([text])


def test_a_column_is_said_once() -> None:
    with pytest.raises(RiskcalError, match="prompt is said twice"):
        renaming.options(["prompt=a", "prompt=b"])


def test_a_name_that_nothing_reads_is_said() -> None:
    frame = table().assign(user="u1", timed_out=False)
    with pytest.warns(UserWarning, match=r"columns: nothing reads 'clusters', 'fail'"):
        Runs.from_frame(frame, columns={"clusters": "user", "fail": "timed_out"})
    Runs.from_frame(frame, columns={"cluster_logged": "user"})


@pytest.mark.parametrize("empty", [None, {}])
def test_what_stands_in_objects_is_named_whatever_points_its_names_have(empty: Any) -> None:
    frame = table().drop(columns="prompt")
    held = {"gen_ai.response.id": 0, "more": {"a.b": {"c": 1}}}
    cells: list[Any] = [held | {"gen_ai.response.id": f"r{i // 3}"} for i in range(len(frame))]
    frame = frame.assign(attributes=cells, **{"run.meta": cells})
    for name in ("attributes", "run.meta"):
        runs = Runs.from_frame(frame, columns={"prompt": f"{name}.gen_ai.response.id"})
        assert runs.n == 40
        made = renaming.renamed(frame, {"layers": f"{name}.more.a.b.c"})
        assert made["layers"].tolist() == [1] * len(frame)
    frame.loc[0, "attributes"] = None
    frame.at[0, "attributes"] = empty  # noqa: PD008  # a cell may be an object
    assert "attributes.gen_ai.response.id" in renaming.names_in(frame)


def test_a_name_that_looks_like_a_formula_is_quoted_on_the_shell() -> None:
    frame = pd.DataFrame({"f1*100": [25.0, 100.0], "prompt": [1, 2]})
    with pytest.raises(RiskcalError, match=r"""it has: f1\*100, .*--columns 'risk="f1\*100"'"""):
        renaming.renamed(frame, renaming.options(["risk=1-f1*100"]))
    said = renaming.options(['risk=1-"f1*100"/100', 'score="f1*100"'])
    assert said == {"risk": ("f1*100", "1-x/100"), "score": "f1*100"}
    assert renaming.renamed(frame, {"risk": said["risk"]})["risk"].tolist() == [0.75, 0.0]
