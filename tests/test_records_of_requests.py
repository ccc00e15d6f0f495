"""The shipped cascade and thoughts: they are what their cards say, certify what the pages say, and hold on held-out requests."""

import re
from importlib import resources

import numpy as np
import pytest

import riskcal
from riskcal.records.check import findings

SHIPPED = {"cascade": "cascade", "reasoning": "reasoning", "reasoning-errors": "reasoning"}
GRID = np.round(np.arange(0.95, 0.19, -0.05), 2)
PAIRS = [[first, second] for first in GRID[1:12:2] for second in GRID[1:12:2]]


def runs_of(name: str) -> riskcal.Runs:
    traces = riskcal.load_example(name)
    return riskcal.replay_traces(traces, PAIRS if name == "cascade" else GRID, exact=True)


@pytest.mark.parametrize("name", SHIPPED)
def test_records_are_small_and_what_their_card_counts(name):
    data = resources.files("riskcal") / "data"
    packed = (data / f"{SHIPPED[name]}.parquet").read_bytes()
    card = (data / f"{SHIPPED[name]}.md").read_text()
    traces = riskcal.load_example(name)
    assert len(packed) < 300_000
    count = len(traces.prompt)
    texts = [re.sub(r"^\d+: ", "", prompt) for prompt in traces.prompt]
    repeated = count - len(set(texts))
    assert re.search(rf"\| {count} of the (package|family)", card)
    assert re.search(rf"\b{repeated} (questions )?occurred before", card)
    assert len(set(traces.prompt)) == count >= 300


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_stands_in_the_way_of_their_runs(name):
    frame = runs_of(name).to_frame()
    costs = ["price"] if name == "cascade" else ["thought"]
    assert findings(frame, costs=costs) == []


def test_a_question_that_was_drawn_twice_was_answered_once():
    for name, outcome in (("cascade", "loss"), ("reasoning", "agrees")):
        frame = riskcal.load_example(name).to_frame()
        question = frame["prompt"].str.replace(r"^\d+: ", "", regex=True)
        assert (
            frame[outcome].map(lambda of: str(of.tolist())).groupby(question).nunique().max() == 1
        )


def test_stages_and_checkpoints_are_what_they_are_said_to_be():
    cascade = riskcal.load_example("cascade")
    assert not cascade.loss[:, 2].any()  # the expert is the reference
    assert np.isnan(cascade.confidence[:, 2]).all()
    assert (cascade.costs["price"] == [1, 3, 103]).all()
    thoughts = riskcal.load_example("reasoning").to_frame()
    for row in thoughts.itertuples():
        assert row.agrees[-1]
        assert np.isnan(row.confidence[-1])
        assert (row.cost_thought[:-1] == 12 * np.arange(len(row.cost_thought) - 1)).all()
        assert (np.diff(row.cost_tokens - row.cost_thought) >= 0).all()


@pytest.mark.parametrize(("name", "objective", "cost"), [
    ("cascade", "textual", "price"),
    ("reasoning", "textual", "tokens"),
    ("reasoning-errors", "risk", "tokens"),
])  # fmt: skip
def test_certified_candidates_hold_on_requests_that_were_held_out(name, objective, cost):
    deltas = [0.1, 0.15, 0.2]
    trials = riskcal.run_trials(
        runs_of(name),
        deltas,
        n_trials=12,
        calibration_fraction=0.6,
        objective=objective,
        cost=cost,
        test="convex_order",
    )
    worst = trials.groupby("delta")["heldout_loss"].mean()
    assert (worst <= deltas).all()
    used = trials[trials["certified"]]
    heldout = 0.4 * len(riskcal.load_example(name).prompt)
    error = np.sqrt(used["delta"] * (1 - used["delta"]) / heldout)
    assert (used["heldout_loss"] <= used["delta"] + 3 * error).all()


def test_they_certify_what_their_pages_say():
    cascade = riskcal.calibrate(runs_of("cascade"), delta=0.1, cost="price")
    assert cascade.policy().thresholds == {1: 0.7, 2: 0.5}
    assert cascade.chosen["price"] == pytest.approx(65.73, abs=0.01)
    assert cascade.full_costs["price"] == 103
    thoughts = riskcal.calibrate(runs_of("reasoning"), delta=0.2, cost="tokens")
    assert thoughts.threshold == 0.5
    assert thoughts.chosen["tokens"] == pytest.approx(29.45, abs=0.01)
    assert thoughts.full_costs["thought"] == pytest.approx(42.61, abs=0.01)
    errors = riskcal.load_example("reasoning-errors").to_frame()["loss"]
    assert np.mean([row[-1] for row in errors]) == pytest.approx(0.79)
