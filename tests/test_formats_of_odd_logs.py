"""Readers of other systems' logs refuse what is not as they know it, in words of their own and by row; nothing else escapes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from riskcal import RiskcalError
from riskcal.records.formats import lm_eval, otel, reasoning, vllm


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def harness(path: Path, **more: Any) -> Any:
    for name in ("full", "early"):
        rows = [
            {"doc_id": i, "filter": "none", "metrics": ["acc"], "doc_hash": f"h{i}", "acc": 1.0}
            | more
            for i in range(4)
        ]
        write(path / name / "samples_arc_2026-01-01T00-00-00.0.jsonl", rows)
    return lm_eval.read({0.5: path / "early"}, full=path / "full")


@pytest.mark.parametrize(
    "odd",
    [{"filter": ["a"]}, {"prompt_hash": {"a": 1}}, {"metrics": "acc"}, {"metrics": [["acc"]]},
     {"acc": 10**400}, {"doc_hash": "\ud800"}, {"filter": None}],
    ids=str,
)  # fmt: skip
def test_samples_of_another_kind_are_refused(odd: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RiskcalError, match=r"row 0|acc|metric"):
        harness(tmp_path, **odd)


def test_documents_that_stand_twice_are_told_apart_whatever_their_numbers_are(
    tmp_path: Path,
) -> None:
    assert len(harness(tmp_path, doc_hash="same", doc_id="3").prompts) == 4


@pytest.mark.parametrize("value", [["acc"], 3, ""], ids=str)
def test_arguments_that_name_nothing_are_refused(value: Any, tmp_path: Path) -> None:
    harness(tmp_path)
    path = write(tmp_path / "log.jsonl", [{}])
    calls: dict[str, Callable[[], Any]] = {
        "metric": lambda: lm_eval.read({0.5: tmp_path / "early"}, metric=value),
        "filter": lambda: lm_eval.read({0.5: tmp_path / "early"}, filter=value),
        "confidence": lambda: reasoning.read(path, confidence=value),
        "key": lambda: vllm.read({0.5: path}, full=path, distance=lambda a, b: 0.0, key=value),
    }
    for name, call in calls.items():
        with pytest.raises(RiskcalError, match=f"^{name}: "):
            call()


@pytest.mark.parametrize("threshold", [None, (1, 2), [0.5]], ids=str)
def test_settings_that_are_none_are_refused(threshold: Any, tmp_path: Path) -> None:
    harness(tmp_path)
    key = (0.5, tuple(threshold)) if isinstance(threshold, list) else (0.5, threshold)
    with pytest.raises(RiskcalError, match=r"^settings: "):
        lm_eval.read({key: tmp_path / "early"}, coordinates=("threshold", "variant"))


@pytest.mark.parametrize("name", ["full", "FULL ", float("inf"), "inf"], ids=repr)
def test_the_full_model_is_given_once_however_it_is_called(name: Any, tmp_path: Path) -> None:
    harness(tmp_path)
    with pytest.raises(RiskcalError, match="give it once"):
        lm_eval.read({name: tmp_path / "early"}, full=tmp_path / "full")


def request(i: int, text: str = "a", **more: Any) -> dict[str, Any]:
    output = {"index": 0, "text": text, "token_ids": [1], "finish_reason": "stop"} | more
    return {"request_id": f"r{i}", "outputs": [output], "finished": True}


def test_a_request_that_was_sent_again_is_refused_with_its_row(tmp_path: Path) -> None:
    full = write(tmp_path / "full.jsonl", [request(i) for i in range(3)])
    again = write(tmp_path / "again.jsonl", [*(request(i) for i in range(3)), request(0, "b")])
    with pytest.raises(RiskcalError, match=r"again.jsonl: row 3: request_id 'r0' stands twice"):
        vllm.read({0.5: again}, full=full, distance=lambda a, b: float(a != b))
    with pytest.raises(RiskcalError, match="distance: 'rouge'"):
        vllm.read({0.5: again}, full=full, distance="rouge")  # type: ignore[arg-type]


def evaluated(path: Path, labels: Any = None, **score: Any) -> Any:
    rows = [
        {
            "name": "gen_ai.evaluation.result",
            "attributes": {"gen_ai.evaluation.name": "c", "gen_ai.response.id": f"x{i}"}
            | {f"gen_ai.evaluation.score.{key}": value for key, value in score.items()},
        }
        for i in range(2)
    ]
    return otel.read(write(path / "log.jsonl", rows), labels=labels)


def test_evaluations_that_have_labels_alone_need_their_losses(tmp_path: Path) -> None:
    for labels in (None, {"Pass": 0}):
        with pytest.raises(RiskcalError, match="labels: 'pass'"):
            evaluated(tmp_path, labels, label="pass")
    assert evaluated(tmp_path, {"pass": 0}, label="pass")["loss"].tolist() == [0.0, 0.0]
    assert evaluated(tmp_path)["failed"].all()  # neither a score nor a label


def test_a_score_that_is_the_text_of_a_number_is_one(tmp_path: Path) -> None:
    assert evaluated(tmp_path, value="0.75")["loss"].tolist() == [0.25, 0.25]
    assert evaluated(tmp_path, value="NaN")["failed"].all()
    assert evaluated(tmp_path, value=10**400)["failed"].all()


@pytest.mark.parametrize("labels", [["pass"], {"pass": "zero"}, {"pass": 3}], ids=str)
def test_losses_of_labels_are_numbers_between_0_and_1(labels: Any, tmp_path: Path) -> None:
    with pytest.raises(RiskcalError, match=r"^labels: "):
        evaluated(tmp_path, labels, label="pass")


@pytest.mark.parametrize("path", [3, None, ".", "nowhere.jsonl"], ids=str)
@pytest.mark.parametrize("read", [otel.read, reasoning.read], ids=["otel", "reasoning"])
def test_a_path_is_one_file(read: Callable[[Any], Any], path: Any) -> None:
    with pytest.raises(RiskcalError, match=r"^path: "):
        read(path)
