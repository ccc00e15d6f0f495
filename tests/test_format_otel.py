"""Evaluations in OpenTelemetry's exports, however wrapped: losses for the monitor, with nothing that failed left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from riskcal import RiskcalError, RiskMonitor
from riskcal.records.formats import otel

EVENT = "gen_ai.evaluation.result"

Wrap = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def evaluation(request: str, score: Any, name: str = "correctness", **more: Any) -> dict[str, Any]:
    found = {"gen_ai.evaluation.name": name, "gen_ai.response.id": request}
    return found | ({} if score is None else {"gen_ai.evaluation.score.value": score}) | more


def keyed(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    kinds = {float: "doubleValue", str: "stringValue", int: "intValue", bool: "boolValue"}
    return [
        {"key": key, "value": {kinds[type(v)]: str(v) if type(v) is int else v}}
        for key, v in attributes.items()
    ]


WRAPS: dict[str, Wrap] = {
    "an event a line": lambda found: [{"name": EVENT, "attributes": one} for one in found],
    "named among the attributes": lambda found: [
        {"attributes": one | {"event.name": EVENT}} for one in found
    ],
    "batches of logs": lambda found: [
        {"resourceLogs": [{"scopeLogs": [{"logRecords": [
            {"timeUnixNano": "1", "eventName": EVENT, "attributes": keyed(one)} for one in found
        ]}]}]}
    ],
    "events of spans": lambda found: [
        {"resourceSpans": [{"scopeSpans": [{"spans": [
            {"name": "chat", "attributes": [], "events": [{"name": EVENT, "attributes": keyed(one)}]}
            for one in found
        ]}]}]}
    ],
}  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_scores_become_losses_however_they_are_wrapped(wrap: Wrap, tmp_path: Path) -> None:
    found = [evaluation("r0", 1), evaluation("r1", 0.75), evaluation("r2", 0.25)]
    frame = otel.read(write(tmp_path / "log.jsonl", wrap(found)))
    assert frame["loss"].tolist() == [0.0, 0.25, 0.75]
    assert frame["request"].tolist() == ["r0", "r1", "r2"]
    assert not frame["failed"].any()


def test_a_monitor_takes_them(tmp_path: Path) -> None:
    rows = WRAPS["an event a line"]([evaluation(f"r{i}", 0.1) for i in range(200)])
    losses = otel.read(write(tmp_path / "log.jsonl", rows))["loss"]
    assert RiskMonitor(0.1).update(losses).alarm


def test_an_evaluation_that_failed_has_the_worst_loss_and_no_request_comes_twice(
    tmp_path: Path,
) -> None:
    found = [
        evaluation("r0", None, **{"error.type": "timeout"}),
        evaluation("r1", "high"),
        evaluation("r4", float("nan")),
        evaluation("r2", None, **{"gen_ai.evaluation.score.label": "pass"}),
        evaluation("r3", None, **{"gen_ai.evaluation.score.label": "unsure"}),
        evaluation("r2", 0.0),
    ]
    log = write(tmp_path / "log.jsonl", WRAPS["an event a line"](found))
    frame = otel.read(log, labels={"pass": 0, "fail": 1})
    assert frame["loss"].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert frame["failed"].tolist() == [True, True, True, False, True]


def test_of_several_evaluations_one_is_chosen(tmp_path: Path) -> None:
    found = [evaluation("r0", 1.0), evaluation("r0", 0.5, "groundedness")]
    log = write(tmp_path / "log.jsonl", WRAPS["an event a line"](found))
    with pytest.raises(RiskcalError, match="has several, 'correctness', 'groundedness'; choose"):
        otel.read(log)
    assert otel.read(log, name="groundedness")["loss"].tolist() == [0.5]
    with pytest.raises(RiskcalError, match="has no 'tone'; it has 'correctness', 'groundedness'"):
        otel.read(log, name="tone")


def test_scores_of_another_scale_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", WRAPS["an event a line"]([evaluation("r0", 80.0)]))
    with pytest.raises(RiskcalError, match=r"row 0: the score 80.0 makes a loss of -79.*x / 100'"):
        otel.read(log)
    assert otel.read(log, loss="1 - x / 100")["loss"].tolist() == pytest.approx([0.2])


@pytest.mark.parametrize(
    "rows", [[], [{"name": "other"}], [{"resourceLogs": 3}], [{"attributes": 3}]], ids=str
)
def test_a_log_without_evaluations_is_refused(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(RiskcalError, match="holds no event gen_ai"):
        otel.read(write(tmp_path / "log.jsonl", rows))


@pytest.mark.parametrize("none", ["", None])
def test_no_request_comes_again_that_has_no_id(none: Any, tmp_path: Path) -> None:
    rows = [{"name": "gen_ai.evaluation.result", "attributes": evaluation(none, i)} for i in (0, 1)]
    losses = otel.read(write(tmp_path / "log.jsonl", rows), name="correctness")
    assert losses["loss"].tolist() == [1.0, 0.0]
    assert losses["request"].isna().all()
