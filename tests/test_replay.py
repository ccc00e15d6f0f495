import dataclasses
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from riskcal import (
    Constant,
    Decaying,
    RiskcalError,
    Runs,
    Traces,
    calibrate,
    replay_arrays,
    replay_traces,
)
from riskcal.replay import TokenLosses

# Few distinct values, so that confidences tie with each other and with thresholds.
few = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
levels = (
    few
    | st.floats(0, 1)
    | st.floats(0, 1, width=32)
    | st.sampled_from([math.nan, -0.2, 1.2, math.inf, -math.inf])
)
grids = st.lists(
    few | st.floats(0, 1) | st.sampled_from([math.inf, 0.0, 1.0]),
    min_size=1,
    max_size=6,
    unique=True,
)
schedules = st.one_of(
    st.just(Constant()),
    st.builds(
        Decaying,
        temperature=st.floats(0, 20),
        max_length=st.integers(1, 40),
        form=st.sampled_from(["paper", "t5x"]),
    ),
)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 5))


def exit_layer(confidence, threshold, schedule, position, min_layer):
    """The rule in words: the first layer, from min_layer on, that is sure enough; else the last. Nothing but that."""
    if threshold < math.inf:
        for layer in range(min_layer, len(confidence)):
            if float(confidence[layer - 1]) >= float(schedule.local_threshold(threshold, position)):
                return layer
    return len(confidence)


@st.composite
def recordings(draw):
    shape = draw(shapes)
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    confidence = draw(hnp.arrays(np.float64, shape, elements=levels)).astype(dtype)
    loss = draw(hnp.arrays(np.float64, shape, elements=few | st.floats(0, 1)))
    position = draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, 60)))
    return confidence, loss, position, draw(st.integers(1, shape[1]))


@settings(max_examples=300)
@given(recordings(), grids, schedules)
@pytest.mark.filterwarnings("ignore:position. no token stands at 0")
def test_replay_equals_a_plain_double_loop(recording, thresholds, schedule):
    confidence, loss, position, min_layer = recording
    losses, exits = replay_arrays(
        confidence, loss, thresholds, schedule=schedule, position=position, min_layer=min_layer
    )
    assert losses.shape == exits.shape == (len(confidence), len(thresholds))
    for i in range(len(confidence)):
        for j, threshold in enumerate(thresholds):
            layer = exit_layer(confidence[i], threshold, schedule, position[i], min_layer)
            assert exits[i, j] == layer
            assert losses[i, j] == loss[i, layer - 1]


def test_a_confidence_of_exactly_one_exits_at_threshold_one_but_never_at_the_full_model():
    confidence, loss = (
        np.array([[1.0, 1.0, 1.0], [0.9, 1.0, 0.2]]),
        np.tile([0.3, 0.2, 0.0], (2, 1)),
    )
    losses, exits = replay_arrays(confidence, loss, [1.0, math.inf])
    assert exits.tolist() == [[1, 3], [2, 3]]
    assert losses.tolist() == [[0.3, 0.0], [0.2, 0.0]]
    losses, exits = replay_arrays(np.full((1, 3), math.inf), loss[:1], [math.inf, 1.0])
    assert exits.tolist() == [[3, 1]]


def test_threshold_zero_exits_every_token_at_the_first_allowed_layer_but_for_nan():
    confidence = np.array([[0.0, 0.5, 0.5, 0.5], [math.nan, math.nan, 0.1, 0.1], [math.nan] * 4])
    for min_layer, expected in ((1, [1, 3, 4]), (2, [2, 3, 4]), (4, [4, 4, 4])):
        _, exits = replay_arrays(confidence, np.zeros((3, 4)), [0.0], min_layer=min_layer)
        assert exits[:, 0].tolist() == expected


def test_a_single_layer_is_always_the_last():
    losses, exits = replay_arrays([[0.1], [math.nan]], [[0.4], [0.5]], [0.0, 1.0, math.inf])
    assert exits.tolist() == [[1] * 3] * 2
    assert losses.tolist() == [[0.4] * 3, [0.5] * 3]


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.longdouble, ">f4", ">f8", np.int32, bool, object]
)
def test_any_type_of_number_gives_the_same_exits(dtype):
    confidence = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    _, expected = replay_arrays(confidence, np.zeros((3, 3)), [0.5])
    _, exits = replay_arrays(confidence.astype(dtype), np.zeros((3, 3), dtype=dtype), [0.5])
    assert exits.tolist() == expected.tolist() == [[2], [1], [3]]


def test_views_of_arrays_give_what_copies_give():
    rng = np.random.default_rng(0)
    wide = rng.random((40, 12))
    expected = replay_arrays(wide[::3, ::2].copy(), wide[::3, ::2].copy(), [0.9, 0.5])
    for view in (wide[::3, ::2], np.asfortranarray(wide[::3, ::2])):
        frozen = view.view()
        frozen.flags.writeable = False
        losses, exits = replay_arrays(frozen, frozen, [0.9, 0.5])
        assert (losses == expected[0]).all()
        assert (exits == expected[1]).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"confidence": [0.1, 0.2]}, "confidence: has shape"),
        ({"confidence": [[0.1, 0.2]]}, "loss: has shape (2, 2), but confidence has (1, 2)"),
        ({"confidence": [["a", "b"]] * 2}, "confidence: not an array of numbers"),
        ({"confidence": [[0.1], [0.1, 0.2]]}, "loss: row 0 holds 2 exits, but confidence 1"),
        ({"confidence": np.empty((0, 2))}, "confidence: has shape (0, 2)"),
        ({"loss": [[0.1, math.nan], [0.1, 0.1]]}, "loss: nan at index [0, 1]"),
        ({"loss": [[0.1, 0.1], [math.inf, 0.1]]}, "loss: inf at index [1, 0]"),
        ({"thresholds": [0.5, math.nan]}, "thresholds: nan at index 1"),
        ({"thresholds": [-math.inf]}, "thresholds: -inf at index 0"),
        ({"thresholds": []}, "thresholds: has shape (0,)"),
        ({"thresholds": [0.5, 0.5]}, "thresholds: 0.5 is given more than once"),
        ({"thresholds": [True, False]}, "thresholds: not an array of numbers"),
        ({"min_layer": 3}, "min_layer: 3 exceeds"),
        ({"min_layer": 0}, "min_layer: 0"),
        ({"min_layer": 1.0}, "min_layer: 1.0"),
        ({"schedule": Decaying()}, "position: a decaying schedule needs"),
        ({"position": [0]}, "position: has shape (1,)"),
        ({"position": [0, -1]}, "position: "),
        ({"position": [0.0, 0.7]}, "position: has shape (2,) and type float64"),
        ({"position": ["a", "b"]}, "position: "),
    ],
)
def test_bad_input_is_refused_by_name(arguments, named):
    given_ = {
        "confidence": [[0.1, 0.2]] * 2,
        "loss": [[0.1, 0.0]] * 2,
        "thresholds": [0.5],
    } | arguments
    with pytest.raises(RiskcalError) as refusal:
        replay_arrays(**given_)
    assert str(refusal.value).startswith(named)


# Token rows are marked, so that they cannot be tested as if they were prompts


def test_token_rows_are_refused_by_calibrate_without_prompts_and_averaged_with_them():
    rng = np.random.default_rng(5)
    confidence, loss = rng.random((600, 4)), rng.random((600, 4)) * 0.1
    prompts = np.repeat(np.arange(120), 5)
    losses, _ = replay_arrays(confidence, loss, [0.9, 0.5])
    assert isinstance(losses, TokenLosses)
    for rows in (
        losses,
        losses[::2],
        losses * 1.0,
        losses.astype(np.float32),
        np.concatenate([losses, losses]),
    ):
        with pytest.raises(
            RiskcalError, match=r"^losses: these rows were replayed.* give prompts="
        ):
            calibrate(rows, thresholds=[0.9, 0.5], delta=0.1)
    calibration = calibrate(losses, thresholds=[0.9, 0.5], delta=0.1, prompts=prompts, exact=True)
    assert calibration.n == 120
    assert calibration.table["loss"].tolist() == pytest.approx(
        np.asarray(losses).mean(0).tolist(), rel=1e-12
    )


# Traces: the mean over each prompt's tokens


@st.composite
def traces_and_rows(draw):
    """Traces in a shuffled order, and the same tokens by prompt."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=5))
    n_layers = draw(st.integers(1, 4))
    total = sum(lengths)
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    confidence = draw(hnp.arrays(np.float64, (total, n_layers), elements=levels)).astype(dtype)
    agrees = draw(hnp.arrays(bool, (total, n_layers)))
    agrees[:, -1] = True
    prompt = np.repeat([f"p{i}" for i in range(len(lengths))], lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    order = np.array(draw(st.permutations(range(total))))
    outcome = draw(st.sampled_from(["agrees", "loss"]))
    loss = draw(hnp.arrays(np.float64, (total, n_layers), elements=few | st.floats(0, 1)))
    value = agrees if outcome == "agrees" else loss
    traces = Traces.from_arrays(
        prompt=prompt[order],
        position=position[order],
        confidence=confidence[order],
        **{outcome: value[order]},
    )
    return (
        traces,
        prompt,
        position,
        confidence,
        (~agrees).astype(float) if outcome == "agrees" else loss,
        outcome,
    )


@settings(max_examples=150)
@given(traces_and_rows(), grids, schedules, st.integers(1, 4))
def test_replayed_runs_are_the_prompts_means_of_the_double_loop(
    recorded, grid, schedule, min_layer
):
    traces, prompt, position, confidence, loss, outcome = recorded
    grid = [threshold for threshold in grid if threshold < math.inf] or [0.5]
    min_layer = min(min_layer, traces.n_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # grids here do equal confidences
        runs = replay_traces(traces, grid, schedule=schedule, min_layer=min_layer)
    assert runs.thresholds.tolist() == sorted(grid, reverse=True)
    name = "dissimilarity" if outcome == "agrees" else "risk"
    for row, which in enumerate(runs.prompts):
        tokens = np.flatnonzero(prompt == which)
        assert runs.values["tokens"][row].tolist() == [len(tokens)] * len(grid)
        for column, threshold in enumerate(runs.thresholds):
            exits = [
                exit_layer(confidence[i], threshold, schedule, position[i], min_layer)
                for i in tokens
            ]
            assert runs.values["layers"][row, column] == pytest.approx(np.mean(exits), rel=1e-12)
            mean = np.mean([loss[i, layer - 1] for i, layer in zip(tokens, exits, strict=True)])
            assert runs.values[name][row, column] == pytest.approx(mean, rel=1e-12, abs=1e-15)
        assert runs.full["layers"][row] == traces.n_layers
        if outcome == "loss":
            assert runs.full_risk[row] == pytest.approx(
                loss[tokens, -1].mean(), rel=1e-12, abs=1e-15
            )
    if outcome == "loss":
        assert ("dissimilarity" in runs.values) == (not loss[:, -1].any())


def small_traces(n=40, n_layers=3, seed=0):
    rng = np.random.default_rng(seed)
    tokens = 4 * n
    agrees = rng.random((tokens, n_layers)) < 0.97
    agrees[:, -1] = True
    return Traces.from_arrays(
        prompt=np.repeat(np.arange(n), 4),
        position=np.tile(np.arange(4), n),
        confidence=rng.random((tokens, n_layers)),
        agrees=agrees,
    )


def test_replayed_runs_are_refused_by_calibrate_unless_declared_exact():
    traces = small_traces(200)
    runs = replay_traces(traces, [0.9, 0.5, 0.05])
    assert (runs.source, runs.exact) == ("replayed", False)
    with pytest.raises(RiskcalError, match=r"^runs: they were replayed.*exact=True"):
        calibrate(runs, delta=0.1)
    exact = replay_traces(traces, [0.9, 0.5, 0.05], exact=True)
    assert calibrate(exact, delta=0.1).certified


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_replayed_runs_stay_refused_after_a_trip_through_a_file(tmp_path, ending):
    for exact in (False, True):
        runs = replay_traces(small_traces(), [0.9, 0.5], exact=exact)
        runs.write(tmp_path / f"runs.{ending}")
        back = Runs.read(tmp_path / f"runs.{ending}")
        assert (back.source, back.exact) == ("replayed", exact)
        assert back.digest() == runs.digest()
        if not exact:
            with pytest.raises(RiskcalError, match=r"^runs: they were replayed"):
                calibrate(back, delta=0.1)


def test_the_policy_of_exact_replays_exits_as_was_replayed():
    """A policy that forgot min_layer or the schedule would exit where nothing was tested."""
    schedule = Decaying(2.0, 16, "t5x")
    runs = replay_traces(
        small_traces(300), [0.9, 0.5, 0.05], schedule=schedule, min_layer=2, exact=True
    )
    policy = calibrate(runs, delta=0.1).policy()
    assert policy.threshold < math.inf
    assert policy.min_layer == 2
    assert policy.schedule == schedule
    constant = replay_traces(small_traces(300), [0.9, 0.5, 0.05], exact=True)
    assert calibrate(constant, delta=0.1).policy().schedule == Constant()


def test_thresholds_at_which_a_token_exits_exactly_are_warned_about_and_round_ones_at_the_ends_are_not():
    traces = small_traces()
    with pytest.warns(
        UserWarning, match=r"^thresholds: 1 of 2 \(first .*\) equal a recorded confidence"
    ):
        replay_traces(traces, [0.5, traces.confidence[3, 0]])
    ends = dataclasses.replace(traces, confidence=np.round(traces.confidence))
    replay_traces(ends, [0.0, 0.5, 1.0])  # a warning here is an error


def test_positions_that_count_from_1_are_told_where_thresholds_decay():
    table = pd.DataFrame(
        {"prompt": [1, 1, 2, 2], "position": [1, 2, 1, 2], "confidence": [[0.5, 0.9]] * 4}
    ).assign(agrees=[[True, True]] * 4)
    replay_traces(Traces.from_frame(table), [0.55])  # a warning here is an error
    with pytest.warns(UserWarning, match=r"^position: no token stands at 0.*position - 1"):
        replay_traces(Traces.from_frame(table), [0.55], schedule=Decaying(4.0, 3))
    table = table.assign(position=table["position"] - 1)
    replay_traces(Traces.from_frame(table), [0.55], schedule=Decaying(4.0, 3))


def test_grids_of_any_shape_and_prompts_longer_than_a_tile_give_what_the_plain_rule_gives():
    """Thresholds bunched together, far apart, outside [0, 1], and one alone, over prompts of hundreds of tokens."""
    rng = np.random.default_rng(3)
    lengths = [700, 1, 257, 256]
    confidence = np.round(rng.random((sum(lengths), 5)), 3)
    agrees = rng.random(confidence.shape) < 0.5
    agrees[:, -1] = True
    prompt = np.repeat(np.arange(4), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    traces = Traces.from_arrays(
        prompt=prompt, position=position, confidence=confidence, agrees=agrees
    )
    for grid in (
        [0.90001 + 1e-9 * i for i in range(40)],
        [1e300, 0.50005, -1e300],
        [2.0, 1.5, -0.5],
        [0.25005],
    ):
        for schedule in (Constant(), Decaying(4.0, 300), Decaying(1.0, 50, "t5x")):
            runs = replay_traces(traces, grid, schedule=schedule, min_layer=2)
            losses, exits = replay_arrays(
                confidence,
                ~agrees,
                runs.thresholds,
                schedule=schedule,
                position=position,
                min_layer=2,
            )
            for row, which in enumerate(runs.prompts):
                rows = prompt == which
                assert (
                    runs.values["dissimilarity"][row].tolist()
                    == np.asarray(losses[rows]).mean(0).tolist()
                )
                assert runs.values["layers"][row] == pytest.approx(exits[rows].mean(0), rel=1e-12)


def test_traces_whose_prompts_do_not_stand_together_or_are_one_are_refused():
    whole = small_traces(3)
    apart = dataclasses.replace(whole, prompt=np.tile(whole.prompt[::4], 4))
    with pytest.raises(
        RiskcalError, match=r"^traces: the tokens of prompt \d+ do not stand together"
    ):
        replay_traces(apart, [0.5])
    alone = dataclasses.replace(whole, prompt=np.zeros_like(whole.prompt))
    with pytest.raises(RiskcalError, match=r"^traces: only 1 prompt"):
        replay_traces(alone, [0.5])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            {"thresholds": [math.inf, 0.5]},
            "thresholds: inf at index 0; the full model is never a hypothesis",
        ),
        ({"thresholds": [math.nan]}, "thresholds: nan at index 0"),
        ({"min_layer": 4}, "min_layer: 4 exceeds the 3 recorded layers"),
    ],
)
def test_replaying_traces_refuses_bad_arguments_by_name(arguments, named):
    with pytest.raises(RiskcalError) as refusal:
        replay_traces(**({"traces": small_traces(), "thresholds": [0.5]} | arguments))
    assert str(refusal.value).startswith(named)
