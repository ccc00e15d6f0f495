"""Who leaves at an exit: the one rule of `loop.Loop.step`, of the engine's slots, and of the loops over one row."""

import math
from typing import Any

import numpy as np
from numba import njit

from riskcal_adapters.torch.kernels import Ints

_NEVER = np.float32(math.inf)


@njit(cache=True)
def leaves(confidence: Any, needed: Any, last: Any) -> Any:
    """Whether a confidence is enough: a NaN never is, and at the ``last`` exit it is not asked."""
    return last or confidence >= needed


@njit(cache=True)
def asking(rows: Any, positions: Any, staying: Any, needed: Any, index: Any) -> Ints:
    """Those ``staying`` that may leave at an exit: ``needed`` (B, T, L) has a number for their rows."""
    places, count = np.empty(len(staying), dtype=np.int64), 0
    for i in staying:
        if needed[rows[i], positions[i], index] < _NEVER:
            places[count] = i
            count += 1
    return places[:count].copy()


@njit(cache=True)
def others(count: Any, leaving: Any) -> Ints:
    """The numbers up to ``count`` that are not ``leaving``."""
    stays = np.ones(count, dtype=np.bool_)
    for i in leaving:
        stays[i] = False
    return np.flatnonzero(stays)


@njit(cache=True)
def decide(
    rows: Any,
    positions: Any,
    places: Any,
    needed: Any,
    index: Any,
    confidence: Any,
    refused: Any,
    last: Any,
) -> Ints:
    """The numbers among ``places`` of those that leave, at the ``last`` exit all; the others may have been ``refused``.

    ``rows`` and ``positions`` are of all places, ``confidence`` of these; ``refused`` (B, T) keeps the largest.
    """
    out, count = np.empty(len(places), dtype=np.int64), 0
    for i in range(len(places)):
        row, position = rows[places[i]], positions[places[i]]
        if leaves(confidence[i], needed[row, position, index], last):
            out[count] = i
            count += 1
        elif confidence[i] > refused[row, position]:
            refused[row, position] = confidence[i]
    return out[:count].copy()
