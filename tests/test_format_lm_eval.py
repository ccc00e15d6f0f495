"""Samples as lm-evaluation-harness writes them: joined by document, one filter, one metric, no document asked in two ways."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from riskcal import RiskcalError, calibrate
from riskcal.records.formats import lm_eval

SETTINGS = {0.9: "0.9", 0.5: "0.5"}


def sample(i: int, score: float, **more: Any) -> dict[str, Any]:
    """Keys and their order as in `lm_eval.evaluator` (4e7e0d4)."""
    return {
        "doc_id": i,
        "doc": {"question": f"q{i}"},
        "target": "1",
        "arguments": {"gen_args_0": {"arg_0": f"q{i}"}},
        "resps": [["1"]],
        "filtered_resps": ["1"],
        "filter": "none",
        "metrics": ["exact_match"],
        "doc_hash": f"d{i:03d}",
        "prompt_hash": f"p{i:03d}",
        "target_hash": "t",
        "exact_match": score,
    } | more


def write(
    folder: Path,
    change: Callable[[dict[str, Any]], list[dict[str, Any]]] = lambda one: [one],
    task: str = "gsm8k",
    n: int = 40,
) -> Path:
    """Two settings and the full model, which is right four times in five; the lowest threshold loses one more in ten."""
    for name in ("full", "0.9", "0.5"):
        rows = []
        for i in range(n):
            score = float(i % 5 > 0) * float(name != "0.5" or i % 10 != 1)
            rows += change(sample(i, score) | {"setting": name})
        path = folder / name / "org__model"
        path.mkdir(parents=True, exist_ok=True)
        order = rows if name == "full" else rows[::-1]
        text = "".join(json.dumps(row) + "\n" for row in order)
        (path / f"samples_{task}_2026-11-29T04-11-00.123456.jsonl").write_text(text)
        (path / "results_2026-11-29T04-11-00.123456.json").write_text("{}")
    return folder


def read(folder: Path, **more: Any) -> Any:
    settings = {key: folder / name for key, name in SETTINGS.items()}
    return lm_eval.read(settings, full=folder / "full", **more)


def test_settings_are_joined_by_document(tmp_path: Path) -> None:
    runs = read(write(tmp_path))
    assert (runs.n, runs.k) == (40, 2)
    assert runs.prompts[0].startswith("gsm8k/d0")
    assert runs.losses("risk").mean(0).tolist() == [0.0, 0.1]
    assert runs.full_risk.mean() == 0.2
    assert set(runs.group) == {"gsm8k"}
    assert calibrate(runs, delta=0.5, objective="risk").threshold == 0.5


def two_filters(one: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        one | {"filter": "strict-match"},
        one | {"filter": "flexible-extract", "exact_match": 1.0},
    ]


def test_of_several_filters_one_is_chosen(tmp_path: Path) -> None:
    write(tmp_path, two_filters)
    with pytest.raises(
        RiskcalError, match=r"filter: .* 'flexible-extract', 'strict-match'; choose"
    ):
        read(tmp_path)
    with pytest.raises(RiskcalError, match="filter: the log has no 'none'; it has 'flex"):
        read(tmp_path, filter="none")
    assert read(tmp_path, filter="strict-match").full_risk.mean() == 0.2
    assert read(tmp_path, filter="flexible-extract").full_risk.mean() == 0.0


def test_a_task_with_one_filter_is_read_beside_one_with_several(tmp_path: Path) -> None:
    write(tmp_path, two_filters)
    write(tmp_path, task="arc")
    for chosen in ("strict-match", "flexible-extract"):
        runs = read(tmp_path, filter=chosen)
        assert set(runs.labels["group"]) == {"gsm8k", "arc"}
        assert runs.n == 80
    with pytest.raises(RiskcalError, match="filter"):
        read(tmp_path, filter="none")


def test_of_several_metrics_one_is_chosen(tmp_path: Path) -> None:
    write(tmp_path, lambda one: [one | {"metrics": ["exact_match", "bleu"], "bleu": 50.0}])
    with pytest.raises(RiskcalError, match="metric: task gsm8k has several, 'bleu', 'exact_match'"):
        read(tmp_path)
    with pytest.raises(RiskcalError, match=r"row 0: bleu makes a loss of -49, outside \[0, 1\]"):
        read(tmp_path, metric="bleu")
    assert read(tmp_path, metric="bleu", loss="1 - x / 100").full_risk.mean() == 0.5
    assert read(tmp_path, metric={"gsm8k": "exact_match"}).full_risk.mean() == 0.2
    with pytest.raises(RiskcalError, match="metric: task gsm8k has no 'acc'; it has 'bleu', 'exac"):
        read(tmp_path, metric="acc")


def test_tasks_are_groups_and_may_have_metrics_of_their_own(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, lambda one: [one | {"metrics": ["acc"], "acc": 1.0}], task="arc_easy")
    runs = read(tmp_path)
    assert runs.n == 80
    assert runs.of_group("arc_easy").full_risk.max() == 0.0


def test_older_versions_name_neither_filter_nor_metrics(tmp_path: Path) -> None:
    def old(one: dict[str, Any]) -> list[dict[str, Any]]:
        return [{k: v for k, v in one.items() if k not in ("filter", "metrics", "setting")}]

    assert read(write(tmp_path, old)).full_risk.mean() == 0.2


def test_a_document_that_stands_twice_is_one_unit(tmp_path: Path) -> None:
    def again(one: dict[str, Any]) -> list[dict[str, Any]]:
        return [one, one | {"doc_id": one["doc_id"] + 100}] if one["doc_id"] < 3 else [one]

    runs = read(write(tmp_path, again))
    assert "gsm8k/d001#1" in runs.prompts
    assert (len(runs.prompts), runs.n) == (43, 40)


def test_several_coordinates_tell_settings_apart(tmp_path: Path) -> None:
    write(tmp_path)
    settings = {(0.9, 4): tmp_path / "0.9", (0.5, 4): tmp_path / "0.5"}
    runs = lm_eval.read(settings, coordinates=("threshold", "min_layer"))
    assert runs.candidates.to_dict("list") == {"threshold": [0.9, 0.5], "min_layer": [4, 4]}
    with pytest.raises(RiskcalError, match="has 2 coordinates, not 1: threshold"):
        lm_eval.read(settings)


def dropped(key: str) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    return lambda one: [{k: v for k, v in one.items() if k != key}]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dropped("doc_hash"), "row 0 has no doc_hash"),
        (lambda one: [one | {"prompt_hash": one["setting"]}], "was asked in two ways"),
        (
            lambda one: [one | {"exact_match": [1, 0]}],
            r"task gsm8k has none .*is \[1, 0\] in .*row 0",
        ),
        (lambda one: [one | {"exact_match": "1"}], "task gsm8k has none .*is '1' in .*row 0"),
        (
            lambda one: [one | ({"exact_match": math.nan} if one["doc_id"] == 7 else {})],
            "row 7 has no finite number for exact_match",
        ),
        (lambda one: [one] * (one["setting"] != "0.5" or one["doc_id"] > 0), "is not in .*0.5"),
        (lambda one: [], "holds no samples_"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    change: Callable[[dict[str, Any]], list[dict[str, Any]]], named: str, tmp_path: Path
) -> None:
    write(tmp_path, change)
    with pytest.raises(RiskcalError, match=named):
        read(tmp_path)


def test_two_runs_of_one_setting_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path)
    (path,) = (tmp_path / "0.5").rglob("*.jsonl")
    (path.parent / "samples_gsm8k_2026-11-30T04-11-00.jsonl").write_bytes(path.read_bytes())
    with pytest.raises(RiskcalError, match="holds two files of task gsm8k"):
        read(tmp_path)


def test_two_files_of_one_name_are_told_by_their_folders(tmp_path: Path) -> None:
    write(tmp_path)
    (path,) = (tmp_path / "0.5").rglob("*.jsonl")
    (other := path.parents[1] / "other").mkdir()
    (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RiskcalError, match=r"org__model/samples_\S+ and other/samples_"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], "is no dictionary of paths"),
        ({}, "is no dictionary of paths"),
        ({0.9: 3}, "3 is no path"),
        ({0.9: "nowhere"}, "nowhere does not exist"),
        ({0.9: '{"doc_id": 0}\n' * 99}, r"settings: 0\.9: .* cannot be looked for \(File name too"),
        ({"full": "."}, "is the full model, as is full="),
    ],
)
def test_settings_are_thresholds_and_folders(settings: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(RiskcalError, match=named):
        lm_eval.read(settings, full=write(tmp_path) / "full")
