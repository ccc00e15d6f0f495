"""The incident drill, end to end: tokens agree, documents fail, and calibration, monitor and kill switch do what they must."""

import numpy as np
import pytest
import torch

import riskcal
from recipes.numbers import drill
from riskcal.serving import EventWatch
from riskcal_adapters.torch import load_example

THRESHOLD, DELTA, RATE, RUN_LENGTH = 0.75, 0.15, 1.0, 200
DOCUMENTS = drill.prompts(drill.DOCUMENT, 150, seed=3)


@pytest.fixture(scope="module")
def decoder():
    torch.set_num_threads(1)
    return load_example("numbers")


@pytest.fixture(scope="module")
def runs(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        digits: drill.recorded(
            decoder, drill.prompts(digits, n, seed=1), [THRESHOLD], folder / f"{digits}"
        )
        for digits, n in ((drill.NOTE, 150), (drill.DOCUMENT, 100))
    }


def policies(runs):
    """What agreement with the full model certifies, and what the product's validator does."""
    agree = riskcal.calibrate(runs, delta=0.06, objective="textual")
    return agree, riskcal.calibrate(runs, delta=DELTA, objective="risk_clipped")


@pytest.fixture(scope="module")
def day(decoder, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("day")
    _, validated = policies(runs[drill.NOTE])
    policy, reference = validated.policy(), drill.prompts(drill.NOTE, 60, seed=2)
    kept = {"delta": DELTA, "run_length": RUN_LENGTH}
    before = drill.serve(decoder, policy, reference, [], folder / "reference", rate=0.0, **kept)
    notes = drill.prompts(drill.NOTE, 60, seed=3)
    return drill.serve(
        decoder, policy, notes, DOCUMENTS, folder / "day", rate=RATE, reference=before.log, **kept
    )


def test_a_validator_refuses_what_agreement_of_tokens_would_let_pass(runs):
    """Of letters 96 in 100 and more are the full model's on both kinds of traffic; documents fail beyond delta."""
    agree, validated = policies(runs[drill.NOTE])
    assert agree.threshold == validated.threshold == THRESHOLD
    apart = {digits: one.losses("textual").mean() for digits, one in runs.items()}
    failed = {digits: one.losses("risk_clipped").mean() for digits, one in runs.items()}
    assert max(apart.values()) < 0.04
    assert failed[drill.NOTE] < DELTA
    assert failed[drill.DOCUMENT] > 1.5 * DELTA
    agree, refused = policies(runs[drill.DOCUMENT])
    assert agree.threshold == THRESHOLD
    assert not refused.certified
    assert refused.policy().is_full_model


def test_agreement_stays_flat_while_schema_failures_rise_and_the_monitor_alarms_when_foretold(
    decoder, runs, day
):
    count = day.alarm - day.shift + 1
    agreed, failed = drill.compared(decoder, day.done[day.shift :][:count], DOCUMENTS[:count])
    assert agreed.mean() > 0.95
    assert failed.mean() > DELTA
    delays = drill.foretold(day, runs[drill.DOCUMENT].losses("risk_clipped")[:, 0], RATE)
    assert np.quantile(delays, 0.01) <= count <= np.quantile(delays, 0.99)


def test_what_drifted_is_told_by_name(day):
    assert {"prompt length", "output length"} <= {one.feature for one in day.watch.drift.drifted}
    assert all(one.at > day.shift for one in day.watch.drift.drifted)


def test_the_switch_is_full_depth_from_the_next_token_on(decoder, day):
    """What was under way when the file appeared goes on deep, and what came after it never leaves early."""
    asked_after = day.done[day.pulled :]
    assert len(asked_after) > 20
    assert all((one.exit_layers == decoder.n_layers).all() for one in asked_after)
    early = [(one.exit_layers < decoder.n_layers) for one in day.done[: day.pulled]]
    under_way = [one for one in early if one.any() and one[0] and not one[-5:].any()]
    assert under_way
    assert sum(one.any() for one in early) >= day.pulled - 64
    pulls = [one for one in drill.events(day.log) if one["name"] == "riskcal.kill_switch.pulled"]
    assert len(pulls) == 1
    assert pulls[0]["attributes"]["riskcal.reason"].startswith("alarm at loss")


def test_nothing_is_lost_from_the_log(day):
    told = drill.events(day.log)
    names = [
        one["attributes"]["gen_ai.response.id"]
        for one in told
        if one["name"] == "riskcal.request.served"
    ]
    assert sorted(names, key=int) == [str(i) for i in range(len(day.done))]
    deep = {
        one["attributes"]["gen_ai.response.id"]
        for one in told
        if one["name"] == "riskcal.request.served" and "riskcal.full_depth" in one["attributes"]
    }
    shadow = drill.Shadow(RATE)
    due = [name for name in names if shadow.takes(name) and name not in deep]
    dropped = [one for one in told if one["name"] == "riskcal.shadow.dropped"]
    assert sorted(name for name, _ in drill.shadows(day.log)) == sorted(due)
    assert not dropped
    again = EventWatch(riskcal.RiskMonitor(DELTA, average_run_length=RUN_LENGTH)).read(day.log)
    assert again.monitor.to_json() == day.watch.monitor.to_json()
    assert again.counts["damaged"] == again.counts["lost"] == again.counts["failed"] == 0
