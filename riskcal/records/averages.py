"""Means within independent units: of the prompts of a cluster, or of the tokens of a prompt."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal._validate import Floats


def means_within(values: Floats, unit: NDArray[np.intp]) -> Floats:
    """Mean (units, ...) of the rows (n, ...) of each unit, which ``unit`` (n,) numbers from 0."""
    counts = np.bincount(unit)
    sums: NDArray[Any] = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, unit, values)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))
