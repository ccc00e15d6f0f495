"""Costs of batches, fitted to times: exact where there is no noise, within it where there is, refused where nothing tells."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskcal import RiskcalError
from riskcal.efficiency import BatchWork, batch_work
from timing import BatchCosts, fit_batch_costs

SIZES = (1, 4, 8, 16)
# far from a straight line
COSTS = BatchCosts(sizes=SIZES, call=(1e-4, 3e-4, 3.2e-4, 5e-4), step=3e-4)


def measured_batches(seed=0, sizes=SIZES):
    rng = np.random.default_rng(seed)
    batches = [rng.integers(1, depth + 1, (rows, 12)) for rows in sizes for depth in (2, 5, 8)]
    return [batch_work(exits, mode) for exits in batches for mode in ("diverge", "regroup")]


@given(st.integers(1, 40))
def test_a_call_costs_what_lies_on_the_line_through_the_sizes(rows):
    beyond = 5e-4 + (rows - 16) * (5e-4 - 3.2e-4) / 8
    expected = beyond if rows > 16 else np.interp(rows, SIZES, COSTS.call)
    assert COSTS.seconds(BatchWork(2, (rows, 4))) == pytest.approx(expected + 3e-4 + 2 * 3e-4)


def test_fit_recovers_the_costs_of_times_without_noise():
    works = measured_batches()
    found = fit_batch_costs(works, [COSTS.seconds(work) for work in works])
    assert found.sizes == COSTS.sizes
    assert found.call == pytest.approx(COSTS.call)
    assert found.step == pytest.approx(COSTS.step)


def test_fit_predicts_fresh_batches_within_the_noise():
    works = measured_batches()
    noise = np.random.default_rng(1).lognormal(0, 0.05, len(works))
    found = fit_batch_costs(
        works, [COSTS.seconds(w) * e for w, e in zip(works, noise, strict=True)]
    )
    fresh = measured_batches(seed=2, sizes=(1, 2, 6, 12, 20))
    errors = [found.seconds(work) / COSTS.seconds(work) - 1 for work in fresh]
    assert np.abs(errors).max() < 0.1
    assert (np.diff(found.call, prepend=0) >= 0).all()
    assert found.step >= 0


def test_batches_of_one_depth_cannot_tell_calls_from_steps():
    works = [batch_work([[2] * length], "diverge") for length in (1, 2, 3)]
    with pytest.raises(RiskcalError, match="different depths"):
        fit_batch_costs(works, [1.0, 2.0, 3.0])
    with pytest.raises(RiskcalError, match="seconds: 0 at index 1"):
        fit_batch_costs(works, [1.0, 0.0, 3.0])
    with pytest.raises(RiskcalError, match="one time per batch"):
        fit_batch_costs(works, [1.0])
