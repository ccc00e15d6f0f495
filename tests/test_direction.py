"""Where an entropy must be at most the threshold, low thresholds are the strict ones: everything that has a direction follows."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import riskcal
from riskcal import (
    Decaying,
    ExitPolicy,
    RiskcalError,
    Runs,
    Traces,
    calibrate,
    replay_arrays,
    replay_traces,
)

GRID = [0.1, 0.3, 0.5, 0.8, 1.2]
RISK = np.array([0.0, 0.01, 0.03, 0.2, 0.5])


def draw(seed: int, n: int = 400) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, 5)) < RISK).astype(float)


def table(seed: int = 0, n: int = 400) -> pd.DataFrame:
    losses = draw(seed, n)
    return pd.DataFrame(
        {
            "prompt": [f"p{i}" for i in range(n) for _ in GRID],
            "threshold": GRID * n,
            "dissimilarity": losses.ravel(),
            "layers": np.tile([5.0, 4.0, 3.0, 2.0, 1.0], n),
        }
    )


def ways():
    """The same runs, however they were told."""
    yield Runs.from_frame(table(), lower_is_stricter=True)
    yield Runs.from_frame(table().assign(lower_is_stricter=True))
    yield Runs.from_arrays(
        thresholds=GRID,
        prompts=table()["prompt"].unique(),
        dissimilarity=draw(0),
        layers=np.tile([5.0, 4.0, 3.0, 2.0, 1.0], (400, 1)),
        lower_is_stricter=True,
    )


def test_the_order_is_from_the_lowest_threshold_up_and_the_highest_certified_is_chosen():
    for runs in ways():
        assert runs.thresholds.tolist() == GRID
        assert runs.candidates["threshold"].tolist() == GRID
        calibration = calibrate(runs, delta=0.1)
        assert calibration.table["threshold"].tolist() == GRID
        assert calibration.threshold == 0.5
        assert calibration.procedure == "fixed_sequence"
    assert calibrate(Runs.from_frame(table()), delta=0.1, lower_is_stricter=True).threshold == 0.5


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["betting", "convex_order"]),
    st.sampled_from([None, "holm", "pareto"]),
)
def test_it_is_the_negated_grid_under_its_own_name(seed, test, procedure):
    given_ = {"delta": 0.1, "test": test, "procedure": procedure}
    ids = np.random.default_rng(seed).permutation(10**6)[:200]
    losses = draw(seed, 200)
    here = calibrate(losses, thresholds=GRID, prompts=ids, lower_is_stricter=True, **given_)
    there = calibrate(losses, thresholds=[-t for t in GRID], prompts=ids, **given_)
    assert here.threshold == -there.threshold or not here.certified
    assert here.certified == there.certified
    columns = ["loss", "pvalue", "certified"]
    pd.testing.assert_frame_equal(here.table[columns], there.table[columns])
    assert (here.table["threshold"] == -there.table["threshold"]).all()
    assert here.records_digest != there.records_digest


def test_the_size_that_it_promises_certifies_in_the_same_direction():
    failed = calibrate(draw(0, 12), thresholds=GRID, delta=0.1, lower_is_stricter=True)
    assert not failed.certified
    assert "threshold 0.1" in failed.message
    assert "negate" not in failed.message
    assert "lower_is_stricter" not in failed.message  # which it is already
    import re

    need = int(re.search(r"fresh sample of about (\d+)", failed.message)[1])
    again = [
        calibrate(draw(s, need), thresholds=GRID, delta=0.1, lower_is_stricter=True).certified
        for s in range(1, 41)
    ]
    assert np.mean(again) >= 0.6


def test_the_picture_says_which_way_is_cautious():
    import matplotlib

    matplotlib.use("Agg")
    runs = next(ways())
    assert "lower: more cautious" in calibrate(runs, delta=0.1).plot().get_xlabel()
    assert "lower: more cautious" in calibrate(runs, delta=0.1).plot(cost="layers").get_xlabel()


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_files_keep_it(tmp_path, ending):
    runs, path = next(ways()), tmp_path / f"runs.{ending}"
    runs.write(path)
    again = Runs.read(path)
    assert again.lower_is_stricter
    assert again.prompts.tolist() == runs.prompts.tolist()
    assert again.digest() == runs.digest() != Runs.from_frame(table()).digest()
    assert Runs.read(path, lower_is_stricter=True).digest() == runs.digest()


def test_the_policy_says_it_and_decoders_that_cannot_do_it_refuse():
    policy = calibrate(next(ways()), delta=0.1).policy(
        measure="entropy", cache="project", batching="diverge"
    )
    assert policy.lower_is_stricter
    assert policy.threshold == 0.5
    assert ExitPolicy(**policy.model_dump(mode="json")) == policy
    for use in (policy.named, lambda: policy.exit_thresholds(4, 2)):
        with pytest.raises(RiskcalError, match=r"lower_is_stricter: this decoder exits where"):
            use()
    reasons = riskcal.serving.check_policy(policy, riskcal.serving.ModelFacts())
    assert any("lower_is_stricter" in reason for reason in reasons)
    with pytest.raises(RiskcalError, match="certificate: was issued for other settings"):
        ExitPolicy(**(policy.model_dump(mode="json") | {"lower_is_stricter": False}))


def test_the_full_model_has_no_direction():
    nothing = calibrate(np.ones((50, 1)), thresholds=[0.3], delta=0.1, lower_is_stricter=True)
    policy = nothing.policy()
    assert policy.is_full_model
    assert not policy.lower_is_stricter
    policy.named()
    with_full = pd.concat(
        [table(), table().query("threshold == 0.1").assign(threshold=math.inf, dissimilarity=0.0)]
    )
    runs = Runs.from_frame(with_full, lower_is_stricter=True)
    assert (runs.k, len(runs.full["layers"])) == (5, 400)


values = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.4, math.nan])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(values, min_size=1, max_size=4), min_size=2, max_size=8), st.booleans())
def test_a_replay_exits_where_the_value_is_at_most_the_threshold(rows, ragged):
    if not ragged:
        rows = [[*row, math.nan, math.nan, math.nan][:4] for row in rows]
    grid = [0.251, 0.11, math.inf]
    loss = [np.linspace(1, 0, len(row)) for row in rows]
    _, exits = replay_arrays(rows, loss, grid, lower_is_stricter=True)
    expected = [
        [
            next((e for e in range(1, len(row)) if t < math.inf and row[e - 1] <= t), len(row))
            for t in grid
        ]
        for row in rows
    ]
    assert exits.tolist() == expected
    traces = Traces.from_arrays(
        prompt=np.arange(len(rows)), position=np.zeros(len(rows), int), confidence=rows, loss=loss
    )
    runs = replay_traces(traces, grid[:2], lower_is_stricter=True)
    assert runs.lower_is_stricter
    assert runs.thresholds.tolist() == [0.11, 0.251]
    assert runs.values["layers"].tolist() == np.array(expected)[runs.prompts][:, [1, 0]].tolist()


def test_what_has_no_such_direction_is_refused():
    with pytest.raises(RiskcalError, match="lower_is_stricter: decay is for confidences"):
        replay_arrays(
            [[0.1, 0.2]], [[0, 0]], [0.5], schedule=Decaying(), position=[0], lower_is_stricter=True
        )
    with pytest.raises(RiskcalError, match="lower_is_stricter: 'yes' is neither True nor False"):
        Runs.from_frame(table(), lower_is_stricter="yes")
    with pytest.raises(RiskcalError, match="lower_is_stricter: False at row 0, but True at row 1"):
        Runs.from_frame(table().assign(lower_is_stricter=[False, True] * 1000))
    with pytest.raises(RiskcalError, match="lower_is_stricter: the column says that high"):
        Runs.from_frame(table().assign(lower_is_stricter=False), lower_is_stricter=True)


def test_trials_choose_the_highest_that_is_certified():
    for test in ("betting", "convex_order"):
        trials = riskcal.run_trials(next(ways()), 0.1, n_trials=4, test=test)
        assert set(trials["threshold"]) == {0.5}


@pytest.mark.parametrize("lower", [False, True])
def test_prompts_without_ids_are_tested_in_one_order_wherever_they_come_from(tmp_path, lower):
    rng = np.random.default_rng(3)
    shape = (60, 5)
    traces = Traces.from_arrays(
        prompt=np.arange(60),
        position=np.zeros(60, dtype=int),
        confidence=rng.random(shape),
        loss=np.c_[rng.random((60, 4)), np.zeros(60)],
    )
    runs = replay_traces(traces, [0.2, 0.4, 0.6], exact=True, lower_is_stricter=lower)
    runs.write(tmp_path / "runs.parquet")
    again = Runs.read(tmp_path / "runs.parquet")
    assert runs.nameless
    assert again.prompts.tolist() == runs.prompts.tolist()
    one, other = (calibrate(found, delta=0.5) for found in (runs, again))
    assert one.table["pvalue"].tolist() == other.table["pvalue"].tolist()


def test_entropies_that_are_thresholds_are_warned_of():
    entropy = np.round(np.random.default_rng(0).random((50, 3)) * 2, 1)
    traces = Traces.from_arrays(
        prompt=np.arange(50),
        position=np.zeros(50, dtype=int),
        confidence=entropy,
        agrees=entropy < 3,
    )
    with pytest.warns(UserWarning, match="equal a recorded confidence"):
        replay_traces(traces, [1.2, 1.5], exact=True, lower_is_stricter=True)
