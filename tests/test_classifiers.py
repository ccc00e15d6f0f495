"""Exits without memory and of unequal stages: replays, costs and certificates, and the shipped classifier's records."""

import functools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import riskcal
from helpers import allowed
from riskcal import Runs, Traces, calibrate, cli, heads, replay_arrays, replay_traces

GRID = [0.95, 0.75, 0.55, 0.35]
#: FLOPs of a multi-scale dense network's stages (Huang et al. 2018 have five to ten such blocks, the later ones dearer).
STAGES = np.array([6.1e6, 1.3e7, 9.2e7, 8.8e7, 3.1e8])

load = functools.cache(riskcal.load_example)


def by_loop(confidence, thresholds, spent):
    """What a service does, request by request: run a stage, pay for it, look at its head, perhaps stop."""
    paid = []
    for row in confidence:
        total = 0.0
        for level, needed, stage in zip(row, [*thresholds, -math.inf], spent, strict=True):
            total += stage
            if level >= needed:
                break
        paid.append(total)
    return float(np.mean(paid))


def traces_of(confidence, loss, stages):
    n = len(confidence)
    return Traces.from_arrays(
        prompt=[f"p{i}" for i in range(n)],
        position=np.zeros(n, dtype=int),
        confidence=confidence,
        loss=loss,
        cost={"flops": np.cumsum(stages)},
    )


stages = st.lists(st.integers(1, 10**9), min_size=2, max_size=7)


@settings(max_examples=25)
@given(stages, st.integers(0, 2**32 - 1), st.integers(5, 60))
def test_mean_flops_of_unequal_stages_are_those_of_a_loop(spent, seed, n):
    """In a calibration's table, for the full model, and for a threshold per exit."""
    rng = np.random.default_rng(seed)
    confidence = rng.random((n, len(spent)))
    confidence[rng.random(confidence.shape) < 0.1] = math.nan  # never exits
    traces = traces_of(confidence, np.zeros(confidence.shape), spent)
    table = calibrate(
        replay_traces(traces, GRID, exact=True), delta=0.5, objective="risk", cost="flops"
    )
    expected = [by_loop(confidence, [t] * (len(spent) - 1), spent) for t in GRID]
    assert table.table["flops"].tolist() == pytest.approx(expected, rel=1e-12)
    assert table.full_costs["flops"] == pytest.approx(sum(spent), rel=1e-12)
    vector = rng.random((1, len(spent) - 1))
    runs = replay_traces(traces, vector, exact=True)
    assert runs.values["flops"].mean() == pytest.approx(by_loop(confidence, vector[0], spent))


def test_flops_choose_what_the_number_of_exits_would_not():
    """All leaving at the fourth of five exits, or half at the first and half at the last, which is the dearest stage."""
    confidence = np.tile([0.1, 0.1, 0.1, 0.9, 1.0], (400, 1))
    confidence[:200, 0] = 0.9
    traces = traces_of(confidence, np.zeros((400, 5)), STAGES)
    never = math.inf
    vectors = [[never, never, never, 0.8], [0.8, never, never, never]]
    runs = replay_traces(traces, vectors, exact=True)
    chosen = {
        cost: calibrate(runs, delta=0.1, objective="risk", cost=cost).chosen
        for cost in ("flops", "layers")
    }
    assert (chosen["flops"]["layers"], chosen["layers"]["layers"]) == (4.0, 3.0)
    spent = [by_loop(confidence, vector, STAGES) for vector in vectors]
    assert spent[0] < spent[1]
    assert [chosen[cost]["flops"] for cost in ("flops", "layers")] == pytest.approx(spent)


def test_false_certificates_of_a_classifier_at_exactly_delta_are_rare():
    """Shipped requests drawn with replacement; delta is their own mean. 400 draws, epsilon .1: at most .1 + 3 standard errors."""
    draws, n, epsilon = 400, 300, 0.1
    runs = replay_traces(load("stress"), [0.9, 0.5], exact=True)
    losses = runs.losses("textual")
    assert losses.mean(0)[0] < losses.mean(0)[1]
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(draws):
        sample = losses[rng.integers(0, runs.n, n)]
        found = calibrate(
            sample,
            thresholds=runs.thresholds,
            delta=float(losses.mean(0)[1]),
            epsilon=epsilon,
            prompts=rng.permutation(n) + 10**6,
        )
        false += found.threshold == 0.5
    assert 0 < false / draws <= allowed(epsilon, draws)


# the shipped records


def test_the_shipped_classifier_is_two_tables_of_the_same_requests():
    agrees, errors = load("stress"), load("stress-errors")
    assert agrees.n_layers == errors.n_layers == 5
    assert len(set(agrees.prompt)) == len(agrees.prompt)
    assert (agrees.position == 0).all()
    assert (agrees.prompt == errors.prompt).all()
    assert np.array_equal(agrees.confidence, errors.confidence)
    assert agrees.agrees[:, -1].all()
    assert agrees.loss is None
    # exits that agree are right or wrong together
    assert (errors.loss == errors.loss[:, -1:])[agrees.agrees].all()
    assert (np.diff(agrees.agrees.mean(0)) > 0).all()
    assert (np.diff(errors.loss.mean(0)) < 0).all()


def test_the_shipped_stages_are_unequal_and_their_mean_is_a_loops():
    traces = load("stress")
    costs = traces.costs["flops"]
    spent = np.diff(np.atleast_2d(costs)[0], prepend=0)
    assert (costs == np.cumsum(spent)).all()
    assert spent.max() > 10 * spent.min() > 0
    found = calibrate(replay_traces(traces, GRID, exact=True), delta=0.1, cost="flops")
    assert found.certified
    assert found.chosen["flops"] == pytest.approx(
        by_loop(traces.confidence, [found.threshold] * 4, spent)
    )
    assert found.chosen["flops"] < found.full_costs["flops"] == pytest.approx(spent.sum())


def test_thresholds_by_head_replay_to_what_a_loop_spends():
    traces = load("stress")
    some = slice(0, 1500)
    found = heads.certified(
        traces.confidence[some, :-1],
        traces.agrees[some, :-1],
        prompts=traces.prompt[some],
        max_tokens=1,
        agreement=0.9,
        layers=[1, 2, 3, 4],
    )
    assert found.certified
    flops = np.atleast_2d(traces.costs["flops"])[0]
    _, _, costs = replay_arrays(
        traces.confidence, ~traces.agrees, found.thresholds[None, :], costs={"flops": flops}
    )
    expected = by_loop(traces.confidence, found.thresholds, np.diff(flops, prepend=0))
    assert costs["flops"].mean() == pytest.approx(expected)


def test_commands_read_what_ships_and_what_is_replayed(tmp_path):
    run = CliRunner().invoke
    traces, runs = tmp_path / "traces.parquet", tmp_path / "runs.parquet"
    load("stress").write(traces)
    checked = run(cli.app, ["check", str(traces)])
    assert checked.exit_code == 0
    assert "requests x 5 exits" in checked.output
    assert "replay_traces" in checked.output
    replay_traces(Traces.read(traces), GRID, exact=True).write(runs)
    assert run(cli.app, ["check", str(runs)]).exit_code == 0
    asked = ["calibrate", str(runs), "--delta", "0.1", "--cost", "flops", "--json"]
    said = json.loads(run(cli.app, asked).output)
    expected = calibrate(Runs.read(runs), delta=0.1, cost="flops")
    assert said["threshold"] == expected.threshold
    assert said["full_costs"]["flops"] == expected.full_costs["flops"]
    table = run(cli.app, asked[:-1]).output
    for j, row in expected.table.iterrows():
        line = next(line for line in table.splitlines() if f" {row['threshold']:g} " in line)
        assert f"{row['flops']:.4g}" in line
        assert f"{1 - row['flops'] / expected.full_costs['flops']:.0%}" in line, j


# traces given to commands that read runs


def traces_table():
    return pd.DataFrame(
        {"prompt": ["a", "b"], "position": 0, "confidence": [[0.2, 0.9]] * 2, "loss": [[1, 0]] * 2}
    )


def test_calibrate_says_what_makes_runs_of_traces(tmp_path):
    path = tmp_path / "traces.jsonl"
    traces_table().to_json(path, orient="records", lines=True)
    for call in (lambda: Runs.read(path), lambda: Runs.from_frame(traces_table())):
        with pytest.raises(riskcal.RiskcalError, match=r"threshold: .*replay_traces\(traces,"):
            call()
    assert replay_traces(Traces.read(path), [0.5]).n == 2  # the remedy


def test_check_finds_what_is_wrong_with_traces(tmp_path):
    path = tmp_path / "traces.jsonl"
    traces_table().assign(loss=[[1, 0], [2, 0]]).to_json(path, orient="records", lines=True)
    said = CliRunner().invoke(cli.app, ["check", str(path), "--json"])
    assert said.exit_code == 2
    (found,) = json.loads(said.output)["problems"]
    assert found["column"] == "loss"
    renamed = traces_table().rename(columns={"prompt": "request_id"})
    renamed.to_json(path, orient="records", lines=True)
    assert CliRunner().invoke(cli.app, ["check", str(path)]).exit_code == 2
    asked = ["check", str(path), "--columns", "prompt=request_id"]
    assert CliRunner().invoke(cli.app, asked).exit_code == 0
