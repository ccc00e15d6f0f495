"""A pruned head's rows: how many are multiplied at each layer, and how many times fewer than a whole head's."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.efficiency.layers import Integers, exit_array
from riskcal.policy.pruning import Pruning


def head_sizes(
    pruning: Pruning,
    n_layers: int,
    vocabulary: int,
    *,
    start: int = 1,
    confidence: ArrayLike | None = None,
) -> Integers:
    """Rows of a pruned head that are multiplied at each layer.

    Parameters
    ----------
    pruning : riskcal.Pruning
    n_layers, vocabulary : int
        L and V.
    start : int
        The first exit layer, at which the whole head is multiplied.
    confidence : (..., L), optional
        Confidence of each token at each layer, for the adaptive forms.

    Returns
    -------
    (L,) int, or (..., L) with ``confidence``
        0 below ``start``, V at it, the number of kept tokens after it.

    Examples
    --------
    >>> pruning = riskcal.Pruning(form="decaying", largest=4000, smallest=250)
    >>> riskcal.efficiency.head_sizes(pruning, n_layers=6, vocabulary=32_128).tolist()
    [32128, 666, 470, 363, 296, 250]
    """
    if not isinstance(pruning, Pruning):
        raise RiskcalError(
            f"pruning: {_validate.shown(pruning)} is none; give riskcal.Pruning(...)."
        )
    n_layers = _validate.count(n_layers, "n_layers", least=1, most=2**20)
    vocabulary = _validate.count(vocabulary, "vocabulary", least=1)
    start = _validate.count(start, "start", least=1, most=n_layers)
    known = None if confidence is None else np.asarray(confidence, dtype=np.float64)
    if known is not None and known.shape[-1] != n_layers:
        raise RiskcalError(
            f"confidence: has shape {known.shape}; the last axis must be the {n_layers} layers."
        )
    sizes = np.zeros((n_layers,) if known is None else known.shape, dtype=np.int64)
    sizes[..., start - 1] = vocabulary
    for layer in range(start + 1, n_layers + 1):
        before = None if known is None else known[..., layer - 2]
        sizes[..., layer - 1] = pruning.kept(
            layer, n_layers, vocabulary, start=start, confidence=before
        )
    return sizes


def head_ratio(exit_layers: ArrayLike, sizes: ArrayLike, vocabulary: int) -> float:
    """How many times more a whole head would multiply than the pruned one does, the whole passes of both counted.

    Parameters
    ----------
    exit_layers : (B, T) int
    sizes : (L,) or (B, T, L) int
        From `head_sizes`.
    vocabulary : int
        V.

    Returns
    -------
    float
        At least 1. The head calls made times V, over the rows multiplied in them.

    Examples
    --------
    >>> sizes = riskcal.efficiency.head_sizes(riskcal.Pruning("fixed", 2000), n_layers=6, vocabulary=32_128)
    >>> round(riskcal.efficiency.head_ratio([[2, 1, 6]], sizes, vocabulary=32_128), 2)
    2.84
    """
    exits = exit_array(exit_layers)
    rows = rows_of(sizes, exits, vocabulary)
    at_exit = np.maximum(exits - 1, 0)[..., None]
    called = np.take_along_axis(np.cumsum(rows > 0, axis=-1), at_exit, -1)[..., 0]
    multiplied = np.take_along_axis(np.cumsum(rows, axis=-1), at_exit, -1)[..., 0]
    present = exits > 0
    if not multiplied[present].sum():
        raise RiskcalError(
            "sizes: the head is called at no layer that a token reaches; give the sizes of the run."
        )
    return int(called[present].sum()) * vocabulary / int(multiplied[present].sum())


def rows_of(sizes: ArrayLike, exits: Integers, vocabulary: int) -> Integers:
    """Head sizes for every token, (B, T, L)."""
    values = _validate.array(sizes, "head_sizes", ndim=(1, 3))
    rows = values.astype(np.int64)
    bad = (rows != values) | (rows < 0) | (rows > vocabulary)
    if bad.any():
        raise RiskcalError(
            f"head_sizes: {values[bad][0]:g} at index {_validate.first(bad)}; give whole numbers from 0 to {vocabulary}."
        )
    if rows.shape[-1] < exits.max() or (rows.ndim == 3 and rows.shape[:2] != exits.shape):
        raise RiskcalError(
            f"head_sizes: has shape {rows.shape}; give (L,) or (B, T, L) with B, T = {exits.shape}."
        )
    return np.broadcast_to(rows, (*exits.shape, rows.shape[-1]))
