"""Rows without ids: an order drawn from their content, so that nobody gains by sorting them by outcome."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from riskcal import RiskcalError, Runs, Stop, calibrate, pvalues, records, replay_traces
from riskcal.calibration.posing import pose
from riskcal.records import Traces

# of version 0.1
DIGEST_OF_RUNS, DIGEST_OF_ARRAYS = (
    "4ff918bbb51da8dd1771aeea43de8e96",
    "7c39171b6d673540bdedb8a09cc65e81",
)


def of_array(losses, **options):
    return calibrate(losses, thresholds=np.linspace(0.9, 0.5, losses.shape[1]), **options)


def of_runs(losses, **options):
    grid = np.linspace(0.9, 0.5, losses.shape[1])
    return calibrate(Runs.from_arrays(thresholds=grid, dissimilarity=losses), **options)


def of_numbered_runs(losses, **options):
    """Of a table whose ids are its row numbers, from 1."""
    frame = pd.DataFrame(
        {"prompt": np.arange(1, len(losses) + 1), "threshold": 0.5, "dissimilarity": losses[:, 0]}
    )
    return calibrate(Runs.from_frame(frame), **options)


def sorted_ones(n, count, *, first=False):
    losses = np.zeros((n, 1))
    losses[:count] = 1
    return losses if first else losses[::-1]


@given(
    hnp.arrays(
        np.float64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.floats(0, 1)
    ),
    st.randoms(),
)
def test_the_order_depends_on_the_rows_as_a_multiset(losses, random):
    rows = random.sample(range(len(losses)), len(losses))
    order = records.content_order(losses)
    assert sorted(order) == list(range(len(losses)))
    assert records.content_order(losses[rows]).tolist() == order.tolist()


def test_other_rows_have_another_order():
    losses = np.random.default_rng(0).random((50, 2))
    changed = losses.copy()
    changed[7, 1] += 1e-6
    assert records.content_order(changed).tolist() != records.content_order(losses).tolist()
    assert records.content_order(losses + 1e-13).tolist() == records.content_order(losses).tolist()
    assert (
        records.content_order(losses[:, :1], losses[:, 1]).tolist()
        == records.content_order(losses).tolist()
    )


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (range(5), True),
        (range(1, 6), True),
        ([3, 1, 0, 2], True),
        (["0", "1", "2"], True),
        (range(2, 7), False),
        ([0, 1, 3], False),
        (["00", "01"], False),
        (["a", "b"], False),
        ([0.5, 1.5], False),
    ],
)
def test_ids_that_only_number_the_rows(ids, expected):
    assert records.numbered(np.array(ids)) == expected


@pytest.mark.parametrize("calibrated", [of_array, of_runs, of_numbered_runs])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("n", "delta"), [(50, 0.1), (100, 0.1), (144, 0.1), (144, 0.05), (100, 0.2), (500, 0.05)]
)
def test_zeros_and_ones_sorted_by_value_are_certified_falsely_in_no_more_than_epsilon(
    calibrated, first, n, delta
):
    """Exactly, by going through all counts. One fixed order gave .137 (n 144, delta .1), .149 (144, .05), .112 (50, .1)."""
    counts = np.arange(math.ceil(n * delta))
    certified = [calibrated(sorted_ones(n, m, first=first), delta=delta).certified for m in counts]
    assert stats.binom.pmf(counts, n, delta) @ certified <= 0.05


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.25), (0.2, 0.8)])
@pytest.mark.parametrize("options", [{"delta": 0.23}, {"delta": [0.23, 0.24]}])
def test_two_other_values_likewise_and_lists_of_deltas(low, high, options):
    delta = low + 0.1 * (high - low)
    options = {"delta": delta if isinstance(options["delta"], float) else [delta, high]}
    counts = np.arange(15)
    certified = []
    for m in counts:
        found = of_array(low + (high - low) * sorted_ones(144, m), **options)
        certified.append((found[0] if isinstance(found, list) else found).certified)
    assert stats.binom.pmf(counts, 144, 0.1) @ certified <= 0.05


@pytest.mark.parametrize("rearranged", [np.sort, lambda x: x], ids=["sorted", "as drawn"])
def test_three_values_sorted_or_not_keep_the_size(rearranged):
    """2,000 draws of 144 losses whose mean is delta; the standard error at .05 is .0049."""
    rng = np.random.default_rng(11)
    false = 0
    for _ in range(2000):
        losses = rearranged(rng.choice([0.0, 0.5, 1.0], 144, p=[0.85, 0.1, 0.05]))
        false += pvalues.betting(losses[records.content_order(losses)], 0.1, level=0.05) <= 0.05
    assert false / 2000 <= 0.05 + 3 * 0.0049


def test_runs_and_arrays_without_ids_agree_and_so_does_a_file(tmp_path):
    losses = np.random.default_rng(1).random((60, 3)) * np.array([0.1, 0.2, 0.3])
    runs = Runs.from_arrays(thresholds=[0.9, 0.7, 0.5], dissimilarity=losses)
    first = calibrate(runs, delta=0.15).table["pvalue"].tolist()
    assert of_array(losses, delta=0.15).table["pvalue"].tolist() == first
    assert pvalues.betting(runs.losses(), 0.15, level=0.05).tolist() == first
    runs.write(tmp_path / "runs.csv")
    again = Runs.read(tmp_path / "runs.csv")
    assert calibrate(again, delta=0.15).table["pvalue"].tolist() == first
    frame = runs.to_frame().sample(frac=1, random_state=3)
    assert calibrate(Runs.from_frame(frame), delta=0.15).table["pvalue"].tolist() == first
    assert (
        again.prompts.tolist() == Runs.from_frame(frame).prompts.tolist() == runs.prompts.tolist()
    )


def test_the_scale_of_losses_changes_no_order():
    losses = np.random.default_rng(1).random((60, 2)) * 0.2
    one = calibrate(losses, thresholds=[0.9, 0.5], delta=0.15).table["pvalue"]
    other = calibrate(1 + 3 * losses, thresholds=[0.9, 0.5], delta=1.45, lower=1, upper=4).table[
        "pvalue"
    ]
    assert other.tolist() == pytest.approx(one.tolist(), rel=1e-9)


def test_prompts_with_ids_stand_by_their_hash_and_digests_are_those_of_earlier_versions():
    losses = np.random.default_rng(0).random((30, 2)).round(3)
    names = [f"p{i}" for i in range(30)]
    named = Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=losses, prompts=names)
    assert named.losses().tolist() == losses[records.tested_order(names)].tolist()
    assert Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=losses).digest() == DIGEST_OF_RUNS
    assert calibrate(losses, thresholds=[0.5, 0.9], delta=0.5).records_digest == DIGEST_OF_ARRAYS


@pytest.mark.parametrize("mark", [{"stopped": '{"delta": 0.1}'}, {"policy": "{}"}])
def test_recordings_number_their_prompts_before_they_run_and_stay_in_that_order(mark):
    losses = np.random.default_rng(0).random((30, 1))
    frame = Runs.from_arrays(thresholds=[0.9], dissimilarity=losses).to_frame()
    recorded = Runs.from_frame(frame.assign(**mark))
    assert not recorded.nameless
    assert recorded.prompts.tolist() == records.tested_order(np.arange(30)).tolist()


def test_how_a_recording_stopped_is_an_object_and_its_text_in_a_table_is_as_the_recorder_wrote_it():
    losses = np.random.default_rng(0).random((30, 1))
    frame = Runs.from_arrays(thresholds=[0.9], dissimilarity=losses).to_frame()
    stop = Stop(delta=0.1, test="holm")
    text = stop.model_dump_json()
    runs = Runs.from_frame(frame.assign(stopped=text))
    assert runs.stopped == stop
    assert set(runs.to_frame()["stopped"]) == {text}
    for foreign in ("soon", "{}", "[1]"):
        with pytest.raises(RiskcalError, match=r"stopped: .* is not how a recording stops"):
            Runs.from_frame(frame.assign(stopped=foreign))


def test_numbered_clusters_and_replayed_prompts_stand_in_the_order_of_their_content():
    rng = np.random.default_rng(0)
    losses = np.repeat([0.0, 1.0], [270, 30])[:, None]
    clusters = np.arange(300) // 2
    named = np.array([f"c{i}" for i in clusters])
    by_number, by_name = (
        calibrate(Runs.from_arrays(thresholds=[0.5], dissimilarity=losses, cluster=c), delta=0.15)
        for c in (clusters, named)
    )
    assert by_number.table["loss"].tolist() == by_name.table["loss"].tolist()
    assert by_number.table["pvalue"].tolist() != by_name.table["pvalue"].tolist()
    confidence, agrees = rng.random((50, 3)), np.ones((50, 3), dtype=bool)
    agrees[:, 0] = np.arange(50) > 9
    traces = Traces.from_arrays(
        prompt=np.arange(50), position=np.zeros(50, int), confidence=confidence, agrees=agrees
    )
    runs = replay_traces(traces, [0.123456789], exact=True)
    content = np.where((confidence[:, 0] >= 0.123456789) & ~agrees[:, 0], 1.0, 0.0)
    assert runs.prompts.tolist() == records.content_order(content).tolist()


def test_the_order_of_numbered_clusters_is_drawn_afresh_for_each_set_of_losses():
    """One fixed order of numbers would be the arrangement of whoever gave them by outcome."""
    orders = []
    for seed in (1, 2):
        losses = np.random.default_rng(seed).random((120, 1)).round(2)
        runs = Runs.from_arrays(thresholds=[0.5], dissimilarity=losses, cluster=np.arange(120) // 2)
        orders.append(pose(runs, 0.6).units.tolist())
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(60))
