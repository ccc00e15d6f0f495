"""Logs as programs leave them: columns nobody reads, folders of all sorts, repeated rows, coordinates that are none."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from helpers import ladder
from riskcal import RiskcalError, Runs, calibrate


def table(n: int = 8, **more: Any) -> pd.DataFrame:
    return ladder(n, lowest=0.1, **more)


# Columns that nobody reads


@pytest.mark.parametrize(
    "value",
    [
        pd.Timestamp("2024-01-01"),
        pd.Timestamp("2024-01-01", tz="UTC"),
        pd.Timedelta(seconds=3),
        pd.Period("2024-01"),
        1j,
    ],
    ids=["date", "date of a zone", "duration", "period", "complex"],
)
def test_a_column_that_is_not_read_may_be_of_any_type(value: Any, tmp_path: Path) -> None:
    frame = table(created=value)
    assert Runs.from_frame(frame).digest() == Runs.from_frame(table()).digest()
    if not isinstance(value, complex | pd.Period):
        frame.to_parquet(tmp_path / "runs.parquet")
        frame.to_csv(tmp_path / "runs.csv", index=False)
        for name in ("runs.parquet", "runs.csv"):
            assert Runs.read(tmp_path / name).digest() == Runs.from_frame(table()).digest()


@pytest.mark.parametrize(
    "column", ["prompt", "threshold", "dissimilarity", "layers", "cluster", "measure", "failed"]
)
@pytest.mark.parametrize(
    "value",
    [pd.Timestamp("2024-01-01"), pd.Timedelta(seconds=3), 1j],
    ids=["date", "span", "complex"],
)
def test_and_none_of_these_where_it_is_read(column: str, value: Any) -> None:
    with pytest.raises(RiskcalError, match=column):
        Runs.from_frame(table().assign(**{column: value}))


# Folders


def folder(path: Path, **parts: pd.DataFrame) -> Path:
    path.mkdir()
    for name, part in parts.items():
        part.to_parquet(path / f"{name}.parquet")
    return path


def test_ids_that_one_shard_keeps_signed_and_another_unsigned_are_ids(tmp_path: Path) -> None:
    frame = table().assign(prompt=np.repeat(np.arange(100, 108), 3))
    parts = {
        kind: part.astype({"prompt": kind})
        for kind, part in (("int64", frame[:12]), ("uint64", frame[12:]))
    }
    assert Runs.read(folder(tmp_path / "runs", **parts)).digest() == Runs.from_frame(frame).digest()


def test_a_shard_of_outputs_that_all_ended_need_not_say_so(tmp_path: Path) -> None:
    frame = table()
    failed = frame.assign(failed=frame.index == 13)
    runs = Runs.read(folder(tmp_path / "runs", a=frame[:12], b=failed[12:]))
    assert runs.digest() == Runs.from_frame(failed).digest()


def test_files_with_an_underscore_and_files_of_hidden_folders_are_read_or_named_too(
    tmp_path: Path,
) -> None:
    frame = table()
    runs = folder(tmp_path / "runs", a=frame[:12], _b=frame[12:])
    for mark in ("_SUCCESS", ".DS_Store", ".a.parquet.0a1b.partial", ".a.parquet.crc"):
        (runs / mark).write_text("x")
    assert Runs.read(runs).digest() == Runs.from_frame(frame).digest()
    (runs / "_delta_log").mkdir()
    (runs / "_delta_log" / "0.json").write_text("{}")
    with pytest.raises(RiskcalError, match=r"_delta_log.0\.json"):
        Runs.read(runs)


def test_of_a_recording_the_table_is_read_and_what_was_put_beside_it_is_not_passed_over(
    tmp_path: Path,
) -> None:
    runs = folder(tmp_path / "runs", a=table())
    for name in ("recording.json", "traces/traces-0.parquet", "unfinished/runs-0.parquet"):
        (runs / name).parent.mkdir(exist_ok=True)
        (runs / name).write_text("{}")
    assert Runs.read(runs).n == 8
    (runs / "more.jsonl").write_text("no table\n")
    with pytest.raises(RiskcalError, match=r"more\.jsonl: row 0 is not JSON"):
        Runs.read(runs)


@pytest.mark.parametrize("path", [123, None, 1.5, b"runs.csv", [1], object()])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(RiskcalError, match=r"path: .* is no path"):
        Runs.read(path)
    if not isinstance(path, list):
        with pytest.raises(RiskcalError, match=r"path: .* is no path"):
            Runs.from_frame(table()).write(path)


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"]
)
def test_json_that_is_nested_too_deep_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(RiskcalError, match="row 0 is not JSON"):
        Runs.read(tmp_path / "runs.jsonl")


# Rows that stand twice: every remedy that the message names


def refused(frame: pd.DataFrame, match: str) -> None:
    with pytest.raises(RiskcalError, match=match):
        Runs.from_frame(frame)


def test_the_very_same_rows_again() -> None:
    frame = pd.concat([table(), table()[1:6]], ignore_index=True)
    refused(
        frame,
        r"stands twice, again at row 24 \(5 such rows\).*keep one of each, with drop_duplicates\(\)",
    )
    assert Runs.from_frame(frame.drop_duplicates()).digest() == Runs.from_frame(table()).digest()


@pytest.mark.parametrize("reference", ["in each sample", "once"])
def test_samples_of_a_prompt_averaged_or_as_clusters(reference: str) -> None:
    rng = np.random.default_rng(0)
    frame = pd.concat([table().assign(sample=s) for s in range(3)], ignore_index=True)
    ran = np.isfinite(frame["threshold"])
    frame.loc[ran, "dissimilarity"] = rng.random(ran.sum())
    frame = frame if reference == "in each sample" else frame[ran | (frame["sample"] == 0)]
    refused(
        frame,
        "give each a prompt of its own, and name the prompt they share in a column cluster, or average them",
    )
    averaged = Runs.from_frame(
        frame.drop(columns="sample").groupby(["prompt", "threshold"], as_index=False).mean()
    )
    assert averaged.n == 8
    if reference == "in each sample":
        own = frame.assign(
            cluster=frame["prompt"], prompt=frame["prompt"] + "#" + frame["sample"].astype(str)
        )
        clustered = Runs.from_frame(own.drop(columns="sample"))
        assert clustered.n == 8
        order = [clustered.units.tolist().index(prompt) for prompt in averaged.prompts]
        np.testing.assert_allclose(clustered.losses()[order], averaged.losses(), rtol=1e-12)


def test_a_full_model_that_several_samples_share_is_repeated_for_each() -> None:
    table = pd.DataFrame(
        {"prompt": i, "threshold": t, "dissimilarity": 0.1 * (t < 1), "layers": 3.0}
        for i in ("a", "b", "c")
        for t in (math.inf, 0.5)
    )
    full, early = table[table["threshold"] == math.inf], table[table["threshold"] < 1]
    samples = [
        early.assign(cluster=early["prompt"], prompt=early["prompt"] + f"#{s}") for s in "12"
    ]
    alone = pd.concat([*samples, full.assign(cluster=full["prompt"])], ignore_index=True)
    with pytest.raises(
        RiskcalError,
        match=r"'a' \(row 6\) has the full model's row alone \(3 such prompts\).*repeat",
    ):
        Runs.from_frame(alone)
    each = [full.assign(cluster=full["prompt"], prompt=full["prompt"] + f"#{s}") for s in "12"]
    assert Runs.from_frame(pd.concat([*samples, *each])).n == 3


def test_another_setting_is_named_in_candidate_columns() -> None:
    frame = pd.concat([table(draft=draft) for draft in ("a", "b")], ignore_index=True)
    refused(frame, "name the column that tells them apart in candidate_columns")
    runs = Runs.from_frame(frame, candidate_columns=["draft"])
    assert (runs.k, len(runs.full["layers"])) == (4, 8)


def test_settings_with_a_full_model_each_are_calibrated_from_tables_of_their_own() -> None:
    frame = pd.concat([table(model=m, risk=0.1 * m) for m in (1, 2)], ignore_index=True)
    with pytest.raises(
        RiskcalError,
        match=r"risk: .*0\.1 and 0\.2; 8 such prompts.*each by itself, from a table of its own",
    ):
        Runs.from_frame(frame, candidate_columns=["model"])
    for _, own in frame.groupby("model"):
        assert (
            calibrate(Runs.from_frame(own.drop(columns="model")), delta=0.5, objective="risk").n
            == 8
        )


def test_references_in_every_cell_are_one_whatever_the_order_of_rows() -> None:
    """Costs measured again differ; their mean must not depend on the order in which they are added."""
    rng = np.random.default_rng(0)
    cells = [table(measure=m, seconds=rng.random(24), risk=0.1) for m in ("a", "b", "c")]
    frame = pd.concat(cells, ignore_index=True)
    digests = {
        Runs.from_frame(frame.sample(frac=1, random_state=seed)).digest() for seed in range(20)
    }
    assert len(digests) == 1
    same = frame.assign(seconds=0.7)
    once = same[np.isfinite(same["threshold"]) | (same["measure"] == "a")]
    assert Runs.from_frame(same).digest() == Runs.from_frame(once).digest()


# Coordinates


NO_COORDINATES: dict[str, tuple[str, Any, str]] = {
    "an empty text is a null in a CSV": (
        "measure",
        "",
        r"measure: missing at row 1 \(16 such rows\)",
    ),
    "truth as a layer": ("min_layer", True, "min_layer: True at row 1 is not a whole number"),
    "part of a layer": ("min_layer", 2.7, "min_layer: 2.7 at row 1 is not a whole number"),
    "text as a temperature": ("temperature", "4", "temperature: '4' at row 1 is a text"),
    "temperature below 0": (
        "temperature",
        -4.0,
        "temperature: -4.0 at row 1 is no finite number above 0",
    ),
    "temperature of infinity": (
        "temperature",
        math.inf,
        "temperature: inf at row 1 is no finite number above 0",
    ),
    "a duration of numpy": (
        "variant",
        np.timedelta64(2, "s"),
        "variant: .* at row 1; a coordinate of a candidate",
    ),
    "a number of more than 64 bits": (
        "variant",
        10**30,
        "variant: 10{30} at row 1 is not a number of 64 bits",
    ),
    "half a character": ("variant", "\ud800", "variant: .* at row 1 is not valid Unicode"),
}


@pytest.mark.parametrize("case", NO_COORDINATES)
def test_what_no_policy_could_hold_is_refused_where_it_is_read(case: str) -> None:
    name, value, message = NO_COORDINATES[case]
    frame = table()
    frame[name] = pd.Series([value] * len(frame), dtype=object)
    with pytest.raises(RiskcalError, match=message):
        Runs.from_frame(frame, candidate_columns=["variant"] if name == "variant" else [])


def test_an_empty_measure_in_a_csv_is_refused(tmp_path: Path) -> None:
    table(measure=["softmax", "", "softmax"] * 8).to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(RiskcalError, match=r"measure: missing at row 1 \(8 such rows\)"):
        Runs.read(tmp_path / "runs.csv")


def test_truth_values_beside_numbers_are_two_types() -> None:
    frame = pd.concat([table(variant=True), table(variant=0.5)], ignore_index=True)
    with pytest.raises(
        RiskcalError, match=r"variant: 0.5 at row 25 is of another type than True at row 1"
    ):
        Runs.from_frame(frame, candidate_columns=["variant"])


def test_what_stands_in_the_full_models_rows_of_a_coordinate_means_nothing() -> None:
    frame = table()
    frame["variant"] = pd.Series([[1], 2, 2] * 8, dtype=object)
    assert Runs.from_frame(frame, candidate_columns=["variant"]).k == 2


@pytest.mark.parametrize(
    "names", ["variant", [["variant"]], [1], ["dissimilarity"], ["prompt"], ["failed"]]
)
def test_candidate_columns_are_names_of_settings(names: Any) -> None:
    with pytest.raises(
        RiskcalError,
        match=r"candidate_columns: .* is no (list of names of columns|setting of the decoder)",
    ):
        Runs.from_frame(table(variant=1), candidate_columns=names)


# Writing


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_table_that_a_format_cannot_hold_is_refused_and_leaves_what_was_there(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = tmp_path / f"runs.{ending}", Runs.from_frame(table())
    runs.write(path)
    before = path.read_bytes()

    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("no such type there")

    target: dict[str, tuple[Any, str]] = {"csv": (pd.DataFrame, "to_csv"), "jsonl": (json, "dumps")}
    if ending == "parquet":
        import pyarrow as pa

        runs.candidates["odd"] = pd.Series([object(), object()], dtype=object)
        with pytest.raises(RiskcalError, match="cannot be written as parquet"):
            runs.write(path)
        assert pa.parquet.read_table(path).num_rows == 24
    else:
        monkeypatch.setattr(*target[ending], broken)
        with pytest.raises(
            RiskcalError, match=f"cannot be written as {ending} .no such type there"
        ):
            runs.write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# JSON that is not lines


def test_an_array_of_rows_is_a_table(tmp_path: Path) -> None:
    table().to_json(tmp_path / "runs.json", orient="records")
    assert Runs.read(tmp_path / "runs.json").digest() == Runs.from_frame(table()).digest()
    with pytest.raises(RiskcalError, match="rows are written as"):
        Runs.from_frame(table()).write(tmp_path / "again.json")


@pytest.mark.parametrize(
    "content",
    [
        {"predicted_text": {"rouge-l": 0.4}, "acceptance_rate": {"mean": 0.6}},
        {"prompt": ["a", "b"]},
        [],
        [1],
        3,
    ],
    ids=["LayerSkip's benchmark", "columns", "nothing", "numbers", "a number"],
)
def test_json_without_rows_is_refused_with_the_reason(content: Any, tmp_path: Path) -> None:
    """LayerSkip's benchmark (02075d0) writes means, of generations that were not empty."""
    (tmp_path / "benchmark_20261129_041100.json").write_text(json.dumps(content))
    with pytest.raises(RiskcalError, match="of means over prompts none can be made"):
        Runs.read(tmp_path / "benchmark_20261129_041100.json")
    (tmp_path / "torn.json").write_text('[{"prompt": 1')
    with pytest.raises(RiskcalError, match=r"torn.json: not a readable json file"):
        Runs.read(tmp_path / "torn.json")
