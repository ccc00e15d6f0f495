"""Losses as the tests take them: checked, with what they see of them."""

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats

#: No p-value is smaller.
TINY = float(np.finfo(np.float64).tiny)


def matrix_and_sums(losses: ArrayLike, lower: float, upper: float) -> tuple[Floats, Floats]:
    """Checked losses as C-ordered (n, k), and their column sums, in one pass where nothing is wrong."""
    from riskcal.pvalues import kernels

    values = _validate.as_given(losses, "losses", "an array of numbers")
    if (
        values.dtype.kind in "fbiu"
        and values.ndim in (1, 2)
        and values.shape[0] > 1
        and values.size
    ):
        matrix = np.ascontiguousarray(values, dtype=np.float64).reshape(len(values), -1)
        total, smallest, largest = kernels.column_summary(matrix)
        if smallest >= lower and largest <= upper and np.isfinite(total).all():
            return matrix, total
    # says what is wrong, or clips
    matrix = np.ascontiguousarray(_validate.losses(values, lower=lower, upper=upper))
    return matrix, matrix.sum(0)


def unit_moments(
    losses: ArrayLike, delta: float, lower: float, upper: float
) -> tuple[Floats, Floats, float, int]:
    """Each column's mean and standard deviation, delta, all mapped to the unit interval, and n."""
    low, high = _validate.bounds(lower, upper)
    tolerated = _validate.tolerance(delta, low, high)
    matrix, total = matrix_and_sums(losses, low, high)
    from riskcal.pvalues import kernels

    n, width, mean = len(matrix), high - low, total / len(matrix)
    deviation = kernels.sample_deviation(matrix, mean)
    return (mean - low) / width, deviation / width, (tolerated - low) / width, n
