"""Columns as other systems fill them: scales, scores, words for true, names of another meaning; refusals are followed."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from helpers import served
from riskcal import (
    Constant,
    ExitPolicy,
    RiskcalError,
    RiskMonitor,
    Runs,
    Traces,
    calibrate,
    load_example,
    replay_arrays,
    replay_traces,
)
from riskcal.records.check import findings
from riskcal.records.renaming import options


def table(n: int = 40, **more: Any) -> pd.DataFrame:
    return served(n, 3.0).assign(**more)


DIGEST = Runs.from_frame(table()).digest()


def refusal(frame: Any, **given: Any) -> str:
    with pytest.raises(RiskcalError) as error:
        Runs.from_frame(frame, **given)
    return str(error.value)


def told(message: str) -> dict[str, Any]:
    """The ``columns=`` that a refusal names; what it says for the shell must mean the same."""
    found = re.search(r"columns=(\{.*?\})", message)
    assert found is not None, message
    columns: dict[str, Any] = eval(found[1])
    shell = re.search(r"on the shell --columns (\S+?)\)", message)
    assert shell is not None, message
    said = options([shell[1]])
    assert said.keys() == columns.keys()
    return columns


# Numbers of another scale


def test_a_percentage_is_not_taken_for_a_failure() -> None:
    """Whoever wrote 1 in its place, as for a failure, would have another loss."""
    frame = table().assign(dissimilarity=lambda f: 100 * f["dissimilarity"])
    assert Runs.from_frame(frame, columns=told(refusal(frame))).digest() == DIGEST
    assert "of another scale" in refusal(table(risk=3.2))


def test_a_score_is_told_by_the_full_models_own_rows() -> None:
    frame = table().assign(dissimilarity=lambda f: 1 - f["dissimilarity"])
    columns = told(refusal(frame))
    assert Runs.from_frame(frame, columns=columns).digest() == DIGEST
    (found,) = findings(frame)
    assert found.mend == ("--columns dissimilarity=1-dissimilarity",)


def test_what_float32_rounds_is_said_to_be_rounding() -> None:
    """BERTScore of a text with itself; a mean in float32."""
    over = table().assign(dissimilarity=lambda f: f["dissimilarity"] * 8 * 1.0000001)
    assert "is rounding, of float32" in refusal(over)
    frame = over.assign(dissimilarity=over["dissimilarity"].clip(0, 1))
    assert Runs.from_frame(frame).losses().max() == 1.0
    near = table().assign(dissimilarity=lambda f: f["dissimilarity"].clip(lower=6e-8))
    assert "write 0 there" in refusal(near)
    far = table().assign(dissimilarity=lambda f: f["dissimilarity"].clip(lower=0.01))
    assert "write 0" not in refusal(far)


@pytest.mark.parametrize("cell", [[0.125], {"f": 0.125}, np.array(0.125), pd.Timedelta(seconds=2)])
@pytest.mark.parametrize("name", ["dissimilarity", "layers"])
def test_what_is_no_number_is_told_by_its_type(cell: Any, name: str) -> None:
    frame = table().assign(**{name: pd.Series([cell] * 120, dtype=object)})
    assert "write plain numbers, one a row" in refusal(frame)


@pytest.mark.parametrize(("true", "false"), [("True", "False"), ("fail", "pass"), ("yes", "no")])
def test_words_for_true_are_not_taken_for_failures(true: str, false: str) -> None:
    frame = table(dissimilarity=lambda f: np.where(f["dissimilarity"] > 0, true, false))
    assert "write 1 where it is true, and 0 where it is not" in refusal(frame)


# Failures


@pytest.mark.parametrize("value", ["False", "false", "no", 0, 0.0])
def test_where_nothing_failed_no_word_for_false_is_proposed_as_true(value: Any) -> None:
    message = refusal(table(failed=value))
    found = re.search(r"columns=\{'failed': \('COLUMN', \"(.*?)\"\)\}", message)
    assert found is not None
    runs = Runs.from_frame(table(failed=value), columns={"failed": ("failed", found[1])})
    assert not runs.values["failed"].any()


def test_truths_that_are_null_where_nothing_failed_are_said_so() -> None:
    frame = table(failed=[True if row == 5 else None for row in range(120)])
    assert "x != null" in refusal(frame)
    assert (
        Runs.from_frame(frame, columns={"failed": ("failed", "x != null")}).values["failed"].sum()
        == 1
    )


# Names that mean something else in another system


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text", [f"output {row}" for row in range(120)]),
        ("group", [row % 2 for row in range(120)]),
        ("policy", "greedy"),
        ("learned", "yes"),
        ("source", "web"),
        ("exact", 1),
        ("stopped", "eos"),
        ("temperature", 0.0),
    ],
)
def test_a_name_that_means_something_else_has_a_way_around(name: str, value: Any) -> None:
    frame = table(**{name: value})
    assert Runs.from_frame(frame, columns=told(refusal(frame))).digest() == DIGEST
    (found,) = findings(frame)
    assert found.mend == (f"--columns {name}_logged={name}",)


@pytest.mark.parametrize("more", [{}, {"max_length": 128}])
def test_a_sampling_temperature_is_not_made_a_schedule(more: dict[str, Any]) -> None:
    """Names of Hugging Face's generate; nothing decayed there."""
    frame = table(temperature=0.7, **more)
    with pytest.raises(RiskcalError, match="temperature of sampling") as error:
        calibrate(Runs.from_frame(frame), delta=0.3).policy()
    runs = Runs.from_frame(frame, columns=told(str(error.value)))
    assert calibrate(runs, delta=0.3).policy().model_dump()["schedule"]["kind"] == "constant"


def test_numbered_prompts_with_a_policy_of_another_kind_are_no_recording() -> None:
    """Recordings, known by that column, keep their numbers' order; of others the numbers may follow the outcome."""
    frame = table(prompt=lambda f: np.repeat(np.arange(40), 3))
    assert Runs.from_frame(frame).nameless
    assert "which is no JSON object, as it is in a recording" in refusal(
        frame.assign(policy="greedy")
    )


def test_names_in_another_case_are_proposed(tmp_path: Path) -> None:
    found = findings(table().rename(columns=str.title))
    assert [one.mend for one in found] == [
        ("--columns prompt=Prompt",),
        ("--columns threshold=Threshold",),
        ("--columns dissimilarity=Dissimilarity",),
    ]


# What is said of candidates, clusters and objectives


@pytest.mark.parametrize("other", [0.1 + 0.2, float(np.float32(0.3))], ids=["arange", "float32"])
def test_thresholds_that_differ_by_rounding_are_not_called_failures(other: float) -> None:
    """Workers that compute their grids otherwise; a row with failed true for each would be the worst loss of nothing."""
    frame = table().replace({"threshold": {0.5: 0.3}})
    late = (frame["threshold"] == 0.3) & (frame.index >= 60)
    message = refusal(frame.assign(threshold=frame["threshold"].mask(late, other)))
    assert "differs from it by rounding alone" in message
    assert "failed true" not in message
    alike = frame.assign(threshold=frame["threshold"].mask(late, other).round(6))
    assert Runs.from_frame(alike).k == 2


def test_one_cluster_of_all_prompts_is_named() -> None:
    with pytest.raises(RiskcalError, match="cluster: all prompts are of one, 'c'"):
        calibrate(Runs.from_frame(table(cluster="c")), delta=0.3)


def test_an_objective_that_was_not_recorded_leads_to_the_one_that_was() -> None:
    risk = Runs.from_frame(table().rename(columns={"dissimilarity": "risk"}))
    with pytest.raises(RiskcalError, match=r"There is risk: objective='risk' or 'risk_clipped'"):
        calibrate(risk, delta=0.3)
    assert calibrate(risk, delta=0.3, objective="risk").certified
    with pytest.raises(RiskcalError, match=r"There is dissimilarity: objective='textual'"):
        calibrate(Runs.from_frame(table()), delta=0.3, objective="risk")


def test_a_table_of_a_column_per_threshold_is_an_array() -> None:
    wide = table().pivot_table("dissimilarity", "prompt", "threshold")[[0.9, 0.5]]
    told = r"table\.to_numpy\(\) and thresholds=\[float\(name\) for name in table\.columns\]"
    for names in (wide.columns, ["0.9", "0.5"]):
        wide.columns = pd.Index(names)
        with pytest.raises(RiskcalError, match=told):
            calibrate(wide, delta=0.3)
        grid = [float(name) for name in wide.columns]
        assert calibrate(wide.to_numpy(), thresholds=grid, delta=0.3).threshold == 0.5


def test_traces_of_requests_without_a_position_are_told_what_it_is() -> None:
    frame = pd.DataFrame(
        {"prompt": ["a", "b"], "confidence": [[0.5, 1.0]] * 2, "agrees": [[1, 1]] * 2}
    )
    with pytest.raises(RiskcalError, match="write 0 in it"):
        Traces.from_frame(frame)
    assert len(Traces.from_frame(frame.assign(position=0)).prompt) == 2


# Arrays and containers of other libraries


def test_a_bfloat16_tensor_is_numbers_and_in_traces_too() -> None:
    """What a model computes in; numpy has no such type."""
    torch = pytest.importorskip("torch")
    confidence = torch.tensor([[0.5, 1.0], [0.25, 1.0]]).bfloat16()
    for given in (confidence, [*confidence]):
        traces = Traces.from_arrays(
            prompt=["a", "b"], position=[0, 0], confidence=given, agrees=torch.ones(2, 2)
        )
        assert sorted(traces.confidence[:, 0].tolist()) == [0.25, 0.5]
    monitor = RiskMonitor(0.1)
    monitor.update(torch.tensor([0.0, 0.5]).bfloat16())
    assert monitor.n == 2


def test_a_bfloat16_array_of_jax_is_numbers() -> None:
    types = pytest.importorskip("ml_dtypes")
    losses = np.zeros((40, 1)).astype(types.bfloat16)
    assert calibrate(losses, thresholds=[0.5], delta=0.3).certified


@pytest.mark.parametrize(
    "given",
    [{0.5: 1}.keys(), {0.5}, (t for t in [0.5]), map(float, [0.5]), {0.5: 1}],
    ids=["keys", "set", "generator", "map", "dict"],
)
def test_containers_that_are_no_arrays_are_told_by_their_type(given: Any) -> None:
    """Not that float() must have a number."""
    kind = type(given).__name__
    with pytest.raises(RiskcalError, match=rf"thresholds: .*\(a {kind} is none; give a list\)"):
        calibrate(np.zeros((40, 1)), thresholds=given, delta=0.3)
    with pytest.raises(RiskcalError, match=rf"losses: .*\(a {kind} is none; give a list\)"):
        RiskMonitor(0.1).update(given)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_loss_that_is_missing_is_named_without_an_index_of_nothing(missing: Any) -> None:
    with pytest.raises(RiskcalError, match="losses: nan at index 0;"):
        RiskMonitor(0.1).update(missing)


def test_thresholds_of_unequal_length_are_told_so() -> None:
    traces = load_example("g2p-traces")
    with pytest.raises(RiskcalError, match=r"thresholds: .*its rows are not of one length"):
        replay_traces(traces, [[0.9], [0.8, 0.7]], exact=True)


@pytest.mark.parametrize("schedule", ["constant", None, Constant, 4.0])
def test_a_schedule_is_an_object(schedule: Any) -> None:
    traces = load_example("g2p-traces")
    with pytest.raises(RiskcalError, match=r"schedule: .* is none; give riskcal\.Constant\(\)"):
        replay_traces(traces, [0.5], schedule=schedule, exact=True)
    with pytest.raises(RiskcalError, match=r"schedule: .* is none; give riskcal\.Constant\(\)"):
        replay_arrays([[0.5, 1.0]], [[1, 0]], [0.5], schedule=schedule)


@pytest.mark.parametrize("kind", ["series", "polars", "arrow", "tensors", "tensors of a graph"])
def test_exits_may_be_a_column_of_lists_of_one_length(kind: str) -> None:
    lists = [[0.5, 1.0], [0.25, 1.0], [0.75, 1.0]]
    column: Any
    if kind == "polars":
        column = pytest.importorskip("polars").Series(lists)
    elif kind == "arrow":
        column = pytest.importorskip("pyarrow").array(lists)
    elif kind.startswith("tensors"):
        torch = pytest.importorskip("torch")
        column = pd.Series([torch.tensor(row, requires_grad="graph" in kind) for row in lists])
    else:
        column = pd.Series(lists)
    agrees = [[True, True]] * 3
    given = {"prompt": ["a", "b", "c"], "position": [0] * 3, "agrees": agrees}
    want = Traces.from_arrays(**given, confidence=lists).confidence.tolist()
    assert Traces.from_arrays(**given, confidence=column).confidence.tolist() == want
    if isinstance(column, pd.Series):
        frame = pd.DataFrame(given).assign(confidence=column)
        assert Traces.from_frame(frame).confidence.tolist() == want


def test_exits_that_are_numbered_by_layers_are_told_where_layers_belong() -> None:
    frame = pd.DataFrame({"prompt": range(30), "position": 0})
    spread = {f"confidence_{i}": 0.5 for i in (2, 4, 6)} | {f"agrees_{i}": True for i in (2, 4, 6)}
    with pytest.raises(
        RiskcalError, match=r"replay_traces\(..., costs=\{'layers': \[2, 4, 6\]\}\)"
    ):
        Traces.from_frame(frame.assign(**spread))
    from_nothing = {f"{name}_{i}": True for name in ("confidence", "agrees") for i in (0, 1)}
    with pytest.raises(RiskcalError, match=r"exits \[0, 1\]; number them from .*, with no gap\.$"):
        Traces.from_frame(frame.assign(**from_nothing))
    names = {
        f"{name}_{i}": f"{name}_{i // 2}" for name in ("confidence", "agrees") for i in (2, 4, 6)
    }
    traces = Traces.from_frame(frame.assign(**spread).rename(columns=names))
    runs = replay_traces(traces, [0.4], exact=True, costs={"layers": [2, 4, 6]})
    assert runs.values["layers"][0, 0] == 2.0
    assert runs.full["layers"][0] == 6.0


@pytest.mark.parametrize("own", [False, True], ids=["of all rows", "of the traces"])
@pytest.mark.parametrize(
    "thresholds", [[0.9, 0.4], [[0.9, 0.8], [0.4, 0.3]]], ids=["one", "vector"]
)
def test_a_cost_called_layers_is_what_was_given_and_a_mean_per_token(
    thresholds: Any, own: bool
) -> None:
    """Heads after layers 4, 8 and 12. The exits' own numbers were added to it."""
    given: dict[str, Any] = {
        "prompt": ["a", "a", "b", "b"],
        "position": [0, 1, 0, 1],
        "confidence": [[0.5, 0.95, 1.0], [0.95, 1.0, 1.0], [0.5, 0.6, 1.0], [0.1, 0.2, 1.0]],
        "agrees": np.ones((4, 3), dtype=bool),
    }
    layers = {"layers": [4, 8, 12]}
    traces = Traces.from_arrays(**given, cost=layers if own else None)
    runs = replay_traces(traces, thresholds, exact=True, costs=None if own else layers)
    at = {name: runs.values["layers"][list(runs.prompts).index(name)].tolist() for name in "ab"}
    assert at == {"a": [6.0, 4.0], "b": [12.0, 8.0]}
    assert runs.full["layers"].tolist() == [12.0, 12.0]


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_columns_that_bear_thresholds_are_not_taken_in_another_order(library: str) -> None:
    """A pivot's columns ascend; under a grid from the top the losses of .5 would certify .9, and its own those of .5."""
    wide = table().pivot_table("dissimilarity", "prompt", "threshold")[[0.5, 0.9]]
    given = wide
    if library == "polars":
        given = pytest.importorskip("polars").from_pandas(wide.rename(columns=str))
    with pytest.raises(
        RiskcalError, match=r"its columns are \[0.5, 0.9\], and thresholds \[0.9, 0.5\]"
    ):
        Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=given)
    runs = Runs.from_arrays(thresholds=wide.columns, dissimilarity=given)
    assert runs.losses().mean(0).tolist() == [0.0, 0.125]
    if library == "polars":
        with pytest.raises(RiskcalError, match="losses: its columns are"):
            calibrate(given, thresholds=[0.9, 0.5], delta=0.3)
    numbered = pd.DataFrame(wide.to_numpy())
    assert Runs.from_arrays(thresholds=[0.5, 0.9], dissimilarity=numbered).k == 2


def test_a_policy_may_begin_with_a_byte_order_mark_and_has_a_path(tmp_path: Path) -> None:
    policy = calibrate(Runs.from_frame(table()), delta=0.3).policy()
    policy.save(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(text, encoding="utf-8-sig")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy
    with pytest.raises(RiskcalError, match="is no path"):
        ExitPolicy.load({"threshold": 0.5})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["text", "map"])
def test_what_stands_in_texts_of_json_and_in_maps_is_named_by_its_path(
    kind: str, tmp_path: Path
) -> None:
    """A CSV has no objects, and Spark writes maps."""
    frame, path = table(), tmp_path / ("runs.csv" if kind == "text" else "runs.parquet")
    scores = [{"rouge": 1 - loss} for loss in frame.pop("dissimilarity")]
    if kind == "text":
        frame.assign(metrics=list(map(json.dumps, scores))).to_csv(path, index=False)
    else:
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        held = arrow.array(
            [[*one.items()] for one in scores], arrow.map_(arrow.string(), arrow.float64())
        )
        whole = arrow.Table.from_pandas(frame, preserve_index=False)
        parquet.write_table(whole.append_column("metrics", held), path)
    columns = {"dissimilarity": ("metrics.rouge", "1 - x")}
    assert Runs.read(path, columns=columns).digest() == DIGEST


def test_a_policy_may_be_an_object_in_json_lines(tmp_path: Path) -> None:
    rows = table().replace({"threshold": {math.inf: "full"}}).to_dict("records")
    text = "\n".join(json.dumps(row | {"policy": {"cache": "recompute"}}) for row in rows)
    (tmp_path / "runs.jsonl").write_text(text)
    runs = Runs.read(tmp_path / "runs.jsonl")
    assert calibrate(runs, delta=0.3).policy().cache == "recompute"


def test_attempts_that_are_neither_numbers_nor_times_are_named() -> None:
    frame = pd.concat([table(attempt="try1"), table(attempt="try2")], ignore_index=True)
    message = refusal(frame, keep=("last", "attempt"))
    assert "'try1' at row 0, 240 such rows, is neither a number nor a time" in message


def test_a_series_is_no_table() -> None:
    assert (
        refusal(table()["layers"])
        == "table: a Series is not a table; give the DataFrame that it is of, or its reset_index() where it has "
        "keys."
    )
