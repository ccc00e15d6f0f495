"""No call holds more than two copies of its input, beside the input itself."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

import riskcal
from riskcal import Constant, Decaying, Runs, Traces, bounds, pvalues

GRID = np.linspace(0.99, 0.01, 100)
LOSSES = 0.05 * np.random.default_rng(0).random((3000, 100))
BINARY = np.round(LOSSES + 0.46)


def copies(call, size):
    """The most that a second call holds at a time, in multiples of ``size`` bytes; numpy reports its memory to tracemalloc."""
    call()  # imports and compilation are not the call's
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        call()
        return (tracemalloc.get_traced_memory()[1] - before) / size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "test",
    [
        pvalues.hoeffding,
        pvalues.bentkus,
        pvalues.hoeffding_bentkus,
        pvalues.convex_order,
        pvalues.empirical_bernstein,
    ],
    ids=lambda test: test.__name__,
)
def test_sum_based_p_values_copy_nothing(test):
    assert copies(lambda: test(LOSSES, 0.1), LOSSES.nbytes) < 0.1


CALLS = {
    "betting": lambda: pvalues.betting(LOSSES, 0.1, level=0.05),
    "predictable_bernstein": lambda: pvalues.predictable_bernstein(LOSSES, 0.1, level=0.05),
    "betting, signed": lambda: pvalues.betting(LOSSES, 0.1, level=0.05, lower=-1.0),
    "binomial": lambda: pvalues.binomial(BINARY, 0.6),
    "clt": lambda: pvalues.clt(LOSSES, 0.1),
    "bounds.betting": lambda: bounds.betting(LOSSES, grid=[0.05, 0.1]),
    "calibrate": lambda: riskcal.calibrate(LOSSES, thresholds=GRID, delta=0.1),
    "calibrate, holm": lambda: riskcal.calibrate(
        LOSSES, thresholds=GRID[::-1], delta=0.1, procedure="holm"
    ),
    "calibrate, deltas": lambda: riskcal.calibrate(
        LOSSES, thresholds=GRID, delta=[0.1, 0.2], test="convex_order"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_matrices_are_copied_twice_at_most(call):
    assert copies(call, LOSSES.nbytes) < 2.2  # a tenth each for masks and for what is returned


def test_strided_and_fortran_ordered_losses_are_copied_once():
    for view in (np.asfortranarray(LOSSES), LOSSES[::2, ::2]):
        assert copies(lambda view=view: pvalues.betting(view, 0.1, level=0.05), view.size * 8) < 1.1


def test_calibrating_runs_copies_less_than_twice_what_they_hold():
    runs = Runs.from_arrays(thresholds=GRID, dissimilarity=LOSSES, layers=8 * LOSSES)
    assert copies(lambda: riskcal.calibrate(runs, delta=0.1), 2 * LOSSES.nbytes) < 2.2


@pytest.mark.parametrize("ids", [None, np.array([f"p{i}" for i in range(20_000)])])
def test_runs_are_built_of_matrices_in_three_times_their_memory_and_of_a_table_in_five(ids):
    losses = 0.05 * np.random.default_rng(1).random((20_000, 100))
    held = copies(
        lambda: Runs.from_arrays(thresholds=GRID, dissimilarity=losses, prompts=ids), losses.nbytes
    )
    assert held < 3
    if ids is None:
        table = pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(20_000), 100),
                "threshold": np.tile(GRID, 20_000),
                "dissimilarity": losses.ravel(),
            }
        )
        size = table.memory_usage(index=False).sum()
        assert copies(lambda: Runs.from_frame(table), size) < 5


def test_traces_are_copied_once_when_built_and_not_at_all_when_replayed():
    rng = np.random.default_rng(1)
    confidence = rng.random((40_000, 12), dtype=np.float32)
    agrees = rng.random(confidence.shape) < 0.5
    agrees[:, -1] = True
    prompt, position = np.repeat(np.arange(400), 100), np.tile(np.arange(100), 400)
    size = confidence.nbytes + agrees.nbytes + prompt.nbytes + position.nbytes

    def build():
        return Traces.from_arrays(
            prompt=prompt, position=position, confidence=confidence, agrees=agrees
        )

    assert copies(build, size) < 2.2
    traces = build()
    result = 2 * 8 * 400 * 20
    for schedule in (Constant(), Decaying(4.0, 100)):
        held = copies(
            lambda s=schedule: riskcal.replay_traces(
                traces, np.linspace(0.953, 0.053, 20), schedule=s
            ),
            1,
        )
        assert held - result < 0.2 * size
