"""Decisions with as many exits as they need: reasoning models, whose last checkpoint is the full model."""

import itertools
import math

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import riskcal
from helpers import allowed
from riskcal import RiskcalError, Traces, calibrate, heads, replay_arrays, replay_traces
from riskcal.replay import walk

CONFIDENCE = [[0.2, 0.9], [0.3, 0.5, 0.8], [0.95, 0.9, 0.9, 0.9], [0.1]]
LOSS = [[1.0, 0.0], [1.0, 1.0, 0.25], [0.0, 0.0, 0.0, 0.0], [0.0]]
TOKENS = [[128, 200], [128, 256, 300], [128, 256, 384, 500], [90]]


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt": ["q1", "q2", "q3", "q4"],
            "position": 0,
            "confidence": CONFIDENCE,
            "loss": LOSS,
            "cost_tokens": TOKENS,
        }
    )


def padded(rows, with_what=math.nan):
    matrix = np.full((len(rows), max(map(len, rows))), with_what)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return matrix


def first_reached(confidence, threshold):
    """The rule in words, for one row: its exit from 1."""
    for i, value in enumerate(confidence[:-1]):
        if value >= threshold:
            return i + 1
    return len(confidence)


def same(one: Traces, other: Traces) -> None:
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame(), check_dtype=False)
    assert (one.lengths is None) == (other.lengths is None)


rows_of_any_length = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0, math.nan]),
            st.sampled_from([0.0, 0.25, 1.0]),
            st.integers(0, 1000),
        ),
        min_size=1,
        max_size=6,
    ),
    min_size=2,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(rows_of_any_length, st.integers(1, 3), st.booleans(), st.integers(1, 4))
def test_a_replay_is_a_plain_loop_over_rows(rows, min_layer, padding, a_prompt):
    """Losses, exits and costs, of lists and of padded arrays, however many rows a prompt has and are held at once."""
    confidence, loss, prices = ([[cell[i] for cell in row] for row in rows] for i in range(3))
    cost = [list(itertools.accumulate(row)) for row in prices]
    min_layer = min(min_layer, max(map(len, rows)))
    grid = [0.95, 0.45, 0.2]
    exits = [
        [
            next(
                (e for e in range(min_layer, len(row)) if row[e - 1] >= t),
                len(row),
            )
            for t in grid
        ]
        for row in confidence
    ]
    arrays = {"confidence": confidence, "loss": loss, "cost": cost}
    lengths = None
    if padding:
        arrays = {name: padded(values) for name, values in arrays.items()}
        lengths = list(map(len, rows))
    losses, found, spent = replay_arrays(
        arrays["confidence"],
        arrays["loss"],
        grid,
        min_layer=min_layer,
        lengths=lengths,
        costs=arrays["cost"],
    )
    assert found.tolist() == exits
    assert losses.tolist() == [[r[e - 1] for e in es] for r, es in zip(loss, exits, strict=True)]
    assert spent["cost"].tolist() == [
        [r[e - 1] for e in es] for r, es in zip(cost, exits, strict=True)
    ]
    prompt = np.arange(len(rows)) // a_prompt
    if prompt[-1] == 0:
        return
    traces = Traces.from_arrays(
        prompt=prompt, position=np.arange(len(rows)), lengths=lengths, **arrays
    )
    whole = walk._AT_ONCE
    try:
        walk._AT_ONCE = 6  # two rows at a time
        runs = replay_traces(traces, grid, min_layer=min_layer, exact=True)
    finally:
        walk._AT_ONCE = whole
    for name, per_row, mean in (
        ("risk", losses, True),
        ("layers", found, True),
        ("cost", spent["cost"], False),
    ):
        sums = pd.DataFrame(np.asarray(per_row)).groupby(prompt)
        expected = (sums.mean() if mean else sums.sum()).loc[runs.prompts].to_numpy()
        assert runs.values[name] == pytest.approx(expected)


def test_what_a_request_took_is_its_own_exits_and_their_cost():
    runs = replay_traces(Traces.from_frame(table()), [0.85, 0.45], exact=True)
    of = {name: dict(zip(runs.prompts, v.tolist(), strict=True)) for name, v in runs.values.items()}
    assert of["risk"] == {"q1": [0, 0], "q2": [0.25, 1], "q3": [0, 0], "q4": [0, 0]}
    assert of["layers"] == {"q1": [2, 2], "q2": [3, 2], "q3": [1, 1], "q4": [1, 1]}
    assert of["tokens"] == {"q1": [200, 200], "q2": [300, 256], "q3": [128, 128], "q4": [90, 90]}
    full = {name: dict(zip(runs.prompts, v.tolist(), strict=True)) for name, v in runs.full.items()}
    assert full["layers"] == {"q1": 2, "q2": 3, "q3": 4, "q4": 1}
    assert full["tokens"] == {"q1": 200, "q2": 300, "q3": 500, "q4": 90}
    assert full["risk"] == {"q1": 0, "q2": 0.25, "q3": 0, "q4": 0}  # of its own last exit


def test_nothing_stands_behind_a_rows_own_exits():
    traces = Traces.from_frame(table())
    assert traces.confidence.shape == traces.loss.shape == (10,)
    assert traces.lengths.sum() == 10
    assert not any(
        np.isnan(v).any() for v in (traces.confidence, traces.loss, traces.costs["tokens"])
    )
    for name, rows in (("confidence", CONFIDENCE), ("loss", LOSS)):
        frame = traces.to_frame().set_index("prompt")[name]
        assert [frame[p].tolist() for p in table()["prompt"]] == rows


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("outcome", ["loss", "agrees"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_format_keeps_every_row_as_long_as_it_was(tmp_path, ending, outcome, dtype):
    confidence = [np.array(row, dtype=dtype) for row in CONFIDENCE]
    confidence[1][1] = np.nan  # a confidence that is not known is no end of a row
    frame = table().assign(confidence=confidence, group=["a", "b", "a", "b"])
    if outcome == "agrees":
        agrees = [[value == row[-1] for value in row] for row in LOSS]
        frame = frame.drop(columns="loss").assign(agrees=agrees)
    traces = Traces.from_frame(frame)
    path = tmp_path / f"traces.{ending}"
    traces.write(path)
    same(Traces.read(path), traces)


def test_rows_of_one_length_are_a_matrix_however_they_were_given():
    lists = {"confidence": [[0.2, 0.9], [0.3, 0.5]], "loss": [[1, 0], [1, 0]]}
    ids = {"prompt": ["a", "b"], "position": [0, 0]}
    plain = Traces.from_arrays(**ids, **lists)
    cut = Traces.from_arrays(
        **ids, lengths=[2, 2], **{name: padded([*v, [0] * 5])[:2] for name, v in lists.items()}
    )
    same(plain, cut)
    assert cut.lengths is None
    assert cut.confidence.shape == (2, 2)


def tensors(rows):
    torch = pytest.importorskip("torch")
    return [torch.tensor(row, requires_grad=True) for row in rows]


HELD = {
    "a column of pandas": pd.Series,
    "a column of Arrow": pa.array,
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "arrays": lambda rows: [np.array(row) for row in rows],
    "an array of objects": lambda rows: pd.Series(rows).to_numpy(),
    "tensors": tensors,
}


@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_rows_may_be_held_in_anything(hold):
    ids = {"prompt": ["q1", "q2", "q3", "q4"], "position": np.zeros(4, int)}
    held = Traces.from_arrays(
        **ids,
        confidence=hold(CONFIDENCE),
        loss=hold(LOSS),
        cost={"tokens": hold([[1.0 * t for t in row] for row in TOKENS])},
    )
    plain = Traces.from_frame(table())
    assert held.lengths.tolist() == plain.lengths.tolist()
    assert held.confidence == pytest.approx(plain.confidence)
    assert held.costs["tokens"] == pytest.approx(plain.costs["tokens"])


@pytest.mark.parametrize(
    "make", [pa.Table.from_pandas, polars.from_pandas], ids=["pyarrow", "polars"]
)
def test_tables_of_any_library_may_be_ragged(make):
    same(Traces.from_frame(make(table())), Traces.from_frame(table()))


def test_what_traces_hold_makes_the_same_traces_again():
    flat = Traces.from_frame(table())
    again = Traces.from_arrays(
        prompt=flat.prompt,
        position=flat.position,
        confidence=flat.confidence,
        loss=flat.loss,
        lengths=flat.lengths,
        cost=flat.costs,
    )
    same(again, flat)


def test_threshold_that_equals_a_confidence_at_which_a_row_exits_is_warned_about():
    traces = Traces.from_frame(table())
    with pytest.warns(UserWarning, match=r"thresholds: 1 of 2 \(first 0.5\)"):
        replay_traces(traces, [0.8, 0.5], exact=True)  # 0.8 is a last exit's, which always accepts


WRONG = {
    "an empty row": (
        {"confidence": [[0.2], [], [0.1], [0.1]]},
        r"confidence: row 1 holds no exit \(1 such rows\)",
    ),
    "no confidence of the full model": (
        {"confidence": [row[:-1] or [0.1] for row in CONFIDENCE]},
        r"confidence: row 0 holds 1 exits, but loss 2 \(3 such rows\).*has nan there",
    ),
    "an unknown loss": (
        {"loss": [*LOSS[:2], [0.0, math.nan, 0.0, 0.0], LOSS[3]]},
        r"loss: NaN at index \[2, 1\].*lengths",
    ),
    "a loss above 1": ({"loss": [*LOSS[:3], [1.5]]}, r"loss: 1.5 at index"),
    "a negative cost": (
        {"cost_tokens": [*TOKENS[:3], [-1]]},
        r"cost tokens: -1.0 at index \[3, 0\].*finite number of at least 0",
    ),
    "costs of other exits": (
        {"cost_tokens": [*TOKENS[:3], [1, 2]]},
        r"cost tokens: row 3 holds 2 exits, but confidence 1",
    ),
}


@pytest.mark.parametrize(("change", "named"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused_by_row(change, named):
    with pytest.raises(RiskcalError, match=named):
        Traces.from_frame(table().assign(**change))


def test_the_remedy_for_a_full_model_without_confidence_works():
    frame = table().assign(confidence=[[*row[:-1], math.nan] for row in CONFIDENCE])
    runs = replay_traces(Traces.from_frame(frame), [0.45], exact=True)
    assert (
        runs.values["risk"] == replay_traces(Traces.from_frame(table()), [0.45]).values["risk"]
    ).all()


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        ([2, 3, 5, 1], r"lengths: 5 at row 2, where confidence holds 4 exits"),
        ([2, 3, 4], r"lengths: 3 given for 4 rows of confidence"),
        ([2, 0, 4, 1], r"lengths: 0 at row 1"),
        ([2.5, 3, 4, 1], r"lengths: has shape \(4,\) and type float64"),
        ("two", r"lengths: has shape \(\)"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, named):
    with pytest.raises(RiskcalError, match=named):
        Traces.from_arrays(
            prompt=np.arange(4),
            position=np.zeros(4, int),
            confidence=padded(CONFIDENCE),
            loss=padded(LOSS),
            lengths=lengths,
        )


def test_padding_that_nobody_declared_is_refused_with_the_remedy():
    ids = {"prompt": np.arange(4), "position": np.zeros(4, int)}
    arrays = {"confidence": padded(CONFIDENCE), "loss": padded(LOSS)}
    with pytest.raises(RiskcalError, match=r"loss: NaN at index \[0, 2\].*say how many in lengths"):
        Traces.from_arrays(**ids, **arrays)
    assert Traces.from_arrays(**ids, **arrays, lengths=[2, 3, 4, 1]).confidence.shape == (10,)


def test_heads_need_the_same_layers_in_every_row():
    traces = Traces.from_frame(table())
    agrees = [[True] * len(row) for row in CONFIDENCE]
    for confidence, right in ((CONFIDENCE, agrees), (traces.confidence, traces.loss == 0)):
        for call in (
            lambda c, a: heads.self_supervised(c, a),
            lambda c, a: heads.certified(c, a, prompts=np.arange(4), max_tokens=1),
        ):
            with pytest.raises(
                RiskcalError, match=r"confidence: .*a threshold per head.*replay_traces"
            ):
                call(confidence, right)


def test_false_certificates_of_ragged_replays_are_rare():
    """The one threshold's true loss is exactly delta: at most epsilon plus three standard errors of 200 draws."""
    rng, draws, n, delta, epsilon = np.random.default_rng(0), 200, 100, 0.2, 0.1
    lengths = rng.integers(1, 6, draws * n)
    # of the four in five that have a checkpoint to stop at
    wrong = rng.random(draws * n) < delta / 0.8
    confidence = [np.r_[0.9, np.zeros(m - 1)] for m in lengths]
    loss = [np.r_[w * (m > 1), np.zeros(m - 1)] for m, w in zip(lengths, wrong, strict=True)]
    ids = rng.permutation(draws * n) + 10**6
    traces = Traces.from_arrays(
        prompt=ids, position=np.zeros(len(ids), int), confidence=confidence, loss=loss
    )
    runs = replay_traces(traces, [0.85], exact=True)
    false = sum(
        calibrate(runs.take(np.arange(first, first + n)), delta=delta, epsilon=epsilon).certified
        for first in range(0, draws * n, n)
    )
    assert 0 < false / draws <= allowed(epsilon, draws)


def test_calibration_takes_the_risk_of_a_reasoning_model_and_counts_its_tokens():
    rng, n = np.random.default_rng(1), 400
    lengths = rng.integers(2, 30, n)
    traces = Traces.from_arrays(
        prompt=np.arange(n),
        position=np.zeros(n, int),
        confidence=[np.linspace(0.1, 1.0, length) for length in lengths],
        loss=[np.r_[np.ones(1), np.zeros(length - 1)] for length in lengths],
        cost={"tokens": [128 * np.arange(1, length + 1) for length in lengths]},
    )
    runs = replay_traces(traces, [0.7503, 0.5003], exact=True)
    calibration = calibrate(runs, delta=0.1, objective="risk")
    assert calibration.threshold == 0.5003
    expected = np.mean([128 * first_reached(np.linspace(0.1, 1.0, m), 0.5003) for m in lengths])
    assert calibration.chosen["tokens"] == pytest.approx(expected)
    assert calibration.full_costs["tokens"] == pytest.approx(np.mean(128 * lengths))
    assert riskcal.Runs.from_frame(runs.to_frame()).digest() == runs.digest()
