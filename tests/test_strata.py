"""Estimates by task, difficulty and class of tokens: sums of what was told, with intervals, whatever else stands there."""

import json

import pytest
from typer.testing import CliRunner

from riskcal import RiskMonitor, cli
from riskcal.serving import EventLog, EventWatch, Strata, mean_interval


@pytest.fixture
def log(tmp_path):
    """60 requests of two tasks and difficulties, with tokens of two classes of which strings alone go wrong."""
    log = EventLog(tmp_path / "events.jsonl")
    for index in range(60):
        hard = index % 3 == 0
        told = {"gen_ai.response.id": f"r{index}", "riskcal.task": "ab"[index % 2]}
        told["riskcal.difficulty"] = "hard" if hard else "easy"
        layers = {"string": {"6": 2}, "other": {"1": 5, "2": 1}}
        served = {"riskcal.exit.classes": layers, "riskcal.exit.layers": {"1": 5, "2": 1, "6": 2}}
        served |= {"riskcal.weights": "w" * (1 + index % 2), "gen_ai.request.temperature": 0.0}
        log.write("riskcal.request.served", told | served)
        apart = {"string": [int(hard), 2], "other": [0, 6]}
        shadow = {"riskcal.loss": float(hard), "riskcal.token.classes": apart}
        log.write("riskcal.shadow.evaluated", told | shadow)
    drafted = {"riskcal.task": "a", "riskcal.draft.tokens": 40, "riskcal.draft.rejected": 10}
    log.write("riskcal.request.served", drafted)
    return log


def test_strata_are_sums_of_what_was_told_and_those_below_a_task_add_up_to_it(log):
    watch = EventWatch(RiskMonitor(0.5)).read(log.path)
    found = {(one.task, one.kind, one.name): one for one in watch.estimates()}
    assert found["a", "difficulty", "hard"].mean == 1
    assert found["b", "class", "string"].mean == 10 * 0.5 / 30
    assert found["b", "class", "string"].interval == mean_interval(30, 5.0)
    assert found["b", "class", "other"].mean == 0
    for task in "ab":
        whole = found[task, "task", ""]
        parts = [found[task, "difficulty", name] for name in ("easy", "hard")]
        assert sum(one.n for one in parts) == whole.n
        assert sum(one.n * one.mean for one in parts) == pytest.approx(whole.n * whole.mean)
        layers = sum(watch.strata.layers[task].values(), start=type(watch.layers[task])())
        assert layers == watch.layers[task]
    assert watch.strata.drafts == {"a": (40, 10)}
    assert watch.strata.weights == {"w": 30, "ww": 30}


def test_a_state_keeps_strata_and_one_from_before_has_none(log, tmp_path):
    state = tmp_path / "state.json"
    EventWatch(RiskMonitor(0.5)).read(log.path).save(state)
    assert (
        EventWatch.load(state).estimates()
        == EventWatch(RiskMonitor(0.5)).read(log.path).estimates()
    )
    old = json.loads(state.read_text())
    del old["strata"], old["drift"], old["served"]
    state.write_text(json.dumps(old))
    assert EventWatch.load(state).strata == Strata()


def test_the_command_prints_every_stratum(log):
    said = CliRunner().invoke(cli.app, ["monitor", str(log.path), "--delta", "0.5"]).output
    low, high = mean_interval(10, 10.0)
    assert (
        f"task a, difficulty hard: mean loss 1.0000 over 10 requests ({low:.4f} to {high:.4f} with 95%"
        in said
    )
    assert "task b, class string: token disagreement 0.1667 over 30 requests" in said
    assert "task b, class string: tokens by exit layer 6: 60" in said
    assert "task a: 0.2500 of 40 drafted tokens rejected" in said
    assert "weights differ, by requests: w: 30, ww: 30" in said


@pytest.mark.parametrize(
    "odd",
    [
        {"riskcal.exit.classes": {"string": 3, "x": {"1": "2"}}},
        {"riskcal.exit.classes": [1]},
        {"riskcal.token.classes": {"string": [3, 2], "x": [0, 0], "y": [1], "z": None}},
        {"riskcal.difficulty": 7, "riskcal.weights": [], "gen_ai.request.temperature": True},
        {"riskcal.draft.tokens": "many", "riskcal.draft.rejected": 1},
    ],
)
def test_what_is_no_stratum_is_left_aside(odd):
    strata = Strata()
    strata.served("a", odd)
    strata.evaluated("a", odd, 0.0)
    empty = Strata(layers={"a": {"string": {}, "x": {}}})
    assert strata in (Strata(), empty)
