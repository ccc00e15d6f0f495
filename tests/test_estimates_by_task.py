"""Means by task with intervals that hold however often one looks, from logs and from streams."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from riskcal import RiskcalError, RiskMonitor, cli
from riskcal.serving import EventWatch, mean_interval

LOSSES = np.random.default_rng(0).binomial(1, 0.1, 200).astype(float)


@pytest.mark.parametrize("mean", [0.03, 0.5])
def test_an_interval_ever_leaves_the_mean_in_at_most_epsilon_of_streams(mean):
    """1,000 streams of 200, looked at 40 times each: at .1, four standard errors are .038; looks of 95% each miss .3 and more."""
    rng = np.random.default_rng(1)
    totals = (rng.random((1000, 200)) < mean).cumsum(1)
    looks = np.unique(np.geomspace(1, 200, 50).astype(int))
    known = {}
    for n in looks.tolist():
        for total in np.unique(totals[:, n - 1]).tolist():
            low, high = mean_interval(n, total, epsilon=0.1)
            known[n, total] = low <= mean <= high
    missed = [not all(known[n, row[n - 1]] for n in looks.tolist()) for row in totals.tolist()]
    assert np.mean(missed) <= 0.1 + 0.038
    assert np.mean(missed) > 0.01  # not because it says nothing


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(-5, 5), st.floats(0.1, 9))
def test_intervals_hold_the_estimate_and_move_with_the_losses_scale(n, share, lower, span):
    low, high = mean_interval(n, n * share)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    moved = mean_interval(n, n * (lower + span * share), lower=lower, upper=lower + span)
    np.testing.assert_allclose(moved, (lower + span * low, lower + span * high), atol=1e-5 * span)


def test_over_nothing_an_interval_is_all_there_is_and_sums_that_cannot_be_are_refused():
    assert mean_interval(0, 0.0, lower=-1) == (-1, 1)
    with pytest.raises(RiskcalError, match="total: 3 cannot be the sum of 2 losses from 0 to 1"):
        mean_interval(2, 3.0)
    for upper in (0, math.inf):
        with pytest.raises(RiskcalError, match=r"lower, upper: \[0, .*\] is not a finite range"):
            mean_interval(2, 0.0, upper=upper)


def lines_of(losses, first=0):
    for index, loss in enumerate(losses, start=first):
        told = {"gen_ai.response.id": f"r{index}", "riskcal.task": "ab"[index % 2]}
        told |= {"riskcal.loss": loss, "riskcal.token.disagreement": 0.25}
        yield json.dumps({"name": "riskcal.shadow.evaluated", "attributes": told}) + "\n"


def test_a_stream_is_read_as_the_file_is(tmp_path):
    log = tmp_path / "events.jsonl"
    text = [*lines_of(LOSSES), "torn {\n", "\n", '{"name": "other", "attributes": {}}\n']
    log.write_text("".join(text))
    file = EventWatch(RiskMonitor(0.3)).read(log)
    stream = EventWatch(RiskMonitor(0.3)).follow(text)
    assert stream.monitor.to_json() == file.monitor.to_json()
    assert (stream.losses, stream.counts) == (file.losses, file.counts)
    assert stream.disagreements == {"a": (100, 25.0), "b": (100, 25.0)}
    assert stream.events == {"riskcal.shadow.evaluated": 200, "other": 1}
    stream.save(tmp_path / "state.json")
    again = EventWatch.load(tmp_path / "state.json").follow(lines_of(LOSSES))
    assert again.monitor.to_json() == file.monitor.to_json()  # a stream that began again
    assert again.counts["repeated"] == 200


def test_the_command_stops_a_stream_at_its_alarm(tmp_path):
    def run(lines, *options):
        arguments = ["monitor", "-", "--delta", "0.3", *options]
        return CliRunner().invoke(cli.app, arguments, input="".join(lines))

    good = run(lines_of(LOSSES))
    assert good.exit_code == 0
    assert "no alarm over 200 losses" in good.output
    low, high = mean_interval(100, LOSSES[::2].sum())
    assert (
        f"task a: mean loss {LOSSES[::2].mean():.4f} over 100 requests ({low:.4f} to {high:.4f} with 95%"
        in good.output
    )
    assert "token disagreement 0.2500" in good.output
    state = tmp_path / "state.json"
    bad = run(lines_of(np.ones(200)), "--state", str(state))
    assert bad.exit_code == 3
    assert EventWatch.load(state).monitor.n == RiskMonitor(0.3).update(np.ones(200)).alarm_at < 200
    silent = run(['{"name": "riskcal.request.served", "attributes": {}}\n'])
    assert "holds no loss" in str(silent.exception)
    assert "no alarm" not in silent.output


def test_states_from_before_are_still_read(tmp_path):
    state = tmp_path / "state.json"
    EventWatch(RiskMonitor(0.2)).save(state)
    old = json.loads(state.read_text())
    del old["disagreements"], old["events"]
    state.write_text(json.dumps(old))
    assert EventWatch.load(state).follow(lines_of([0.0])).monitor.n == 1
