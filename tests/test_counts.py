"""Counts of two-valued losses: whatever the two values are, the answer is that of zeros and ones."""

import numpy as np
import pytest

from riskcal.calibration.counts import bounds_of_counts, count_pvalue


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 0.5), (2.0, 9.0)])
def test_the_two_values_only_scale_what_the_count_says(low: float, high: float) -> None:
    ones = (np.random.default_rng(0).random((60, 3)) < [0.1, 0.3, 0.6]).astype(float)
    plain = bounds_of_counts(ones, 0.05)
    assert (plain > ones.mean(0)).all()
    assert (plain < 1.0).all()
    scaled = bounds_of_counts(low + (high - low) * ones, 0.05)
    assert scaled == pytest.approx(low + (high - low) * plain)
    for count in (0, 3, 20):
        found = count_pvalue(count, 60, (low, high), low + (high - low) * 0.2)
        assert found == pytest.approx(count_pvalue(count, 60, (0.0, 1.0), 0.2))
