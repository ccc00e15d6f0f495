"""What procedures are given: p-values, shares of epsilon, and the edges along which they pass on."""

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError


def pvalues(values: ArrayLike) -> Floats:
    """(k,), each in [0, 1]."""
    result = _validate.array(values, "pvalues", ndim=(1,))
    bad = (result < 0) | (result > 1)
    if bad.any():
        raise RiskcalError(
            f"pvalues: {result[bad][0]:g} at index {_validate.first(bad)} is outside [0, 1]."
        )
    return result


def weights(values: ArrayLike, k: int) -> Floats:
    """Shares (k,) of epsilon."""
    given = _validate.array(values, "weights", ndim=(1,)).size
    if given != k:
        raise RiskcalError(f"weights: {given} given for {k} p-values; give one per p-value.")
    return _validate.shares(values, "weights")


def transitions(values: ArrayLike, k: int) -> Floats:
    """Edges (k, k) of a graph: none negative, none from a hypothesis to itself, at most one in total from each."""
    result = _validate.array(values, "transitions", ndim=(2,))
    if result.shape != (k, k):
        raise RiskcalError(
            f"transitions: has shape {result.shape}; expected {(k, k)}, from row to column."
        )
    bad = result < 0
    if bad.any():
        raise RiskcalError(
            f"transitions: {result[bad][0]:g} at index {_validate.first(bad)} is negative; leave the edge out with 0."
        )
    loops = np.diag(result) != 0
    if loops.any():
        raise RiskcalError(
            f"transitions: hypothesis {_validate.first(loops)} passes to itself; the diagonal must be 0."
        )
    bad = result.sum(1) > 1.0 + _validate.TOLERANCE
    if bad.any():
        raise RiskcalError(
            f"transitions: row {_validate.first(bad)} sums to {result.sum(1)[bad][0]:.12g}; a hypothesis passes on at most "
            "all it has."
        )
    return result
