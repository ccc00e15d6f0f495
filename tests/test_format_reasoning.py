"""Checkpoints of reasoning models as logs have them: ragged, out of order, under three names, with answers or verdicts."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from riskcal import RiskcalError, calibrate, replay_traces
from riskcal.records.formats import reasoning


def check(index: int, answer: str, confidence: float, **more: Any) -> dict[str, Any]:
    return {
        "checkpoint_idx": index,
        "tokens_used": 100 * (index + 1),
        "predicted_answer": answer,
        "confidence": confidence,
        "entropy": 1 - confidence,
        "is_correct": answer == "7",
    } | more


def question(name: str, *checks: dict[str, Any], held: str = "checkpoints") -> dict[str, Any]:
    return {"question_id": name, held: list(checks)}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    question("a", check(0, "3", 0.25), check(1, "7", 0.9)),
    question("b", check(2, "5", 0.9), check(0, "7", 0.2), check(1, "5", 0.6)),
    question("c", check(0, "7", 0.95)),
]


def test_questions_have_as_many_exits_as_checkpoints(tmp_path: Path) -> None:
    traces = reasoning.read(write(tmp_path / "log.jsonl", *ROWS))
    runs = replay_traces(traces, [0.5, 0.1], exact=True)
    at = {name: i for i, name in enumerate(runs.prompts)}
    order = [at["a"], at["b"], at["c"]]
    assert runs.losses()[order].tolist() == [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    assert runs.values["tokens"][order].tolist() == [[200, 100], [200, 100], [100, 100]]


def test_answers_may_be_compared_with_the_reference(tmp_path: Path) -> None:
    traces = reasoning.read(write(tmp_path / "log.jsonl", *ROWS), outcome="loss")
    by_name = dict(
        zip(traces.prompt, np.split(traces.loss, np.cumsum(traces.lengths)[:-1]), strict=True)
    )
    assert {name: loss.tolist() for name, loss in by_name.items()} == {
        "a": [1.0, 0.0],
        "b": [0.0, 1.0, 1.0],
        "c": [0.0],
    }


@pytest.mark.parametrize("held", ["checkpoints", "checks", "intermediate_checks"])
def test_lists_have_three_names_and_ids_any(held: str, tmp_path: Path) -> None:
    rows = [
        {"id": i, held: [check(0, "7", 0.5, intermediate_correct=True), check(1, "7", 0.9)]}
        for i in range(4)
    ]
    log = write(tmp_path / "log.jsonl", *rows)
    assert len(reasoning.read(log, key="id").prompt) == 4
    with pytest.raises(RiskcalError, match=r"row 0 has no question_id; it has id, .*key="):
        reasoning.read(log)


def test_an_entropy_stops_from_below(tmp_path: Path) -> None:
    rows = [
        question(f"q{i}", check(0, "7" if i % 20 else "3", 0.75), check(1, "7", 0.9))
        for i in range(200)
    ]
    traces = reasoning.read(write(tmp_path / "log.jsonl", *rows), confidence="entropy")
    runs = replay_traces(traces, [0.1, 0.3], exact=True, lower_is_stricter=True)
    found = calibrate(runs, delta=0.2)
    assert found.threshold == 0.3
    assert found.full_costs["tokens"] == 200


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"question_id": "a"}, "row 0 has no checkpoints"),
        (question("a"), "row 0 has no checkpoints"),
        (question("a", check(0, "7", 0.5), check(0, "7", 0.5)), "two checkpoints of one"),
        (question("a", check(0, "7", 0.5) | {"confidence": None}), "confidence is None; write a number, or NaN"),
        (question("a", check(0, "7", 0.5, tokens_used=9), check(1, "7", 0.5, tokens_used=3)),
         "tokens_used becomes less"),
        (question("a", {"checkpoint_idx": 0, "tokens_used": 1, "confidence": 0.5}),
         "without predicted_answer"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(RiskcalError, match=named):
        reasoning.read(write(tmp_path / "log.jsonl", row))


@pytest.mark.parametrize("none", [None, "", " "])
def test_nothing_agrees_with_no_answer(none: Any, tmp_path: Path) -> None:
    rows = [question(n, check(0, none, 0.9), check(1, none, 0.9)) for n in "ab"]
    path = write(
        tmp_path / "log.jsonl",
        *rows,
        question(
            "c",
            check(0, none, 0.9),
            ROWS[2]["checkpoints"][0] | {"checkpoint_idx": 1, "tokens_used": 200},
        ),
    )
    with pytest.warns(UserWarning, match=r"^predicted_answer: none .*row 0 \(2 such questions\)"):
        traces = reasoning.read(path)
    assert traces.agrees is not None
    assert traces.agrees.sum() == 1
    runs = replay_traces(traces, [0.95, 0.5], exact=True)
    assert runs.losses().sum(0).tolist() == [2.0, 3.0]


def test_a_final_answer_is_the_last_checkpoints_and_the_remedy_works(tmp_path: Path) -> None:
    rows = [row | {"final_answer": "7"} for row in ROWS]
    with pytest.raises(RiskcalError, match=r"row 1: final_answer is '7', .* checkpoint '5'"):
        reasoning.read(write(tmp_path / "log.jsonl", *rows))
    rows[1]["checkpoints"] = [*rows[1]["checkpoints"], check(3, "7", float("nan"))]
    traces = reasoning.read(write(tmp_path / "log.jsonl", *rows))
    assert traces.n_layers == 4
    assert np.isnan(traces.confidence).sum() == 1
    rows[1] = ROWS[1]
    assert reasoning.read(write(tmp_path / "log.jsonl", *rows)).n_layers == 3


@pytest.mark.parametrize(
    ("final", "last", "alike"),
    [
        (1.0, "1", True),
        (" 1", "1", True),
        ("1.50\n", 1.5, True),
        ("yes ", "yes", True),
        (None, " ", True),
        ("1", "2", False),
        ("Yes", "No", False),
        (2**64, str(2**64 + 1), False),
        (True, 1, False),
        ("sNaN", "1", False),
    ],
)
def test_a_final_answer_is_compared_as_answers_are_read(
    final: Any, last: Any, alike: bool, tmp_path: Path
) -> None:
    rows = [question(n, check(0, "3", 0.5), check(1, last, 0.9)) for n in "ab"]
    path = write(tmp_path / "log.jsonl", *(row | {"final_answer": final} for row in rows))
    assert reasoning.read(path, outcome="loss").n_layers == 2  # no answers are compared
    if alike:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of no answer
            assert reasoning.read(path).n_layers == 2
        return
    with pytest.raises(RiskcalError, match="row 0: final_answer is "):
        reasoning.read(path)


def test_a_question_that_comes_twice_is_told_by_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", *ROWS, ROWS[0])
    with pytest.raises(RiskcalError, match="row 3: question_id 'a' stands twice, first in row 0"):
        reasoning.read(path)


def test_a_document_over_several_lines_is_told_how_to_write_it(tmp_path: Path) -> None:
    (path := tmp_path / "log.json").write_text(json.dumps(ROWS[0], indent=1))
    with pytest.raises(RiskcalError, match=r"row 0 is not JSON .* over several lines; write"):
        reasoning.read(path)
