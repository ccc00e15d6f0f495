"""A T5's layers on a CPU in float32 as one compiled loop each, where calling torch takes as long as the work in it."""

from typing import Any

import numpy as np
from numba import njit

from riskcal_adapters.torch import kernels
from riskcal_adapters.torch.blas import product
from riskcal_adapters.torch.kernels import attend, gated_gelu, margins, put, ranges, rms_norm
from riskcal_adapters.torch.weights import CrossAttention, Layer

_ZERO, _ONE = np.float32(0), np.float32(1)
_behind, _entering, _place, _of = kernels.behind, kernels.entering, kernels.place, kernels.of


def arrays(matrices: Layer | CrossAttention) -> Any:
    """The same as numpy reads them."""
    return type(matrices)._make(matrix.numpy() for matrix in matrices)


@njit(cache=True, nogil=True)
def recall(fresh: Any, states: Any, starts: Any, counts: Any, memory: Any, held: Any) -> None:
    """Keys and values of ``fresh`` rows' prompts, from the encoder's normed output, to where they are ``held``.

    In one product, since one of few rows takes the time of many.
    """
    places = ranges(starts[fresh], counts[fresh])
    projected = np.empty((len(places), held.shape[1]), dtype=np.float32)
    product(_of(states, places), memory, projected, _ZERO)
    put(projected, places, held)


@njit(cache=True, nogil=True)
def decoder_layer(given: Any, state: Any) -> Any:
    """As `Backbone.layer_of_rows`: for rows at positions of their own, (A, d) to (A, d).

    ``given`` is, one after the other:

    layer, cross : Layer, CrossAttention
        As `arrays`.
    offset, width
        Of norms (`kernels.rms_norm`), and d_kv.
    rows, positions : (A,)
    filled : (B,)
        How many positions of each row have keys and values; moved on.
    states : (T, B, d)
        Of positions that skipped the layer.
    begins, row_step, step, held
        Where keys and values are (`kernels.place`), the last columns of ``held``.
    bias : (heads, n)
        On attention from the last of n positions.
    memory, memory_starts, memory_counts : (N, 2 h), (B,), (B,)
        Keys and values of all prompts, where a row's begin, and how many they are.
    """
    layer, cross, offset, width, rows, positions, filled, states = given[:8]
    begins, row_step, step, held, bias, memory, memory_starts, memory_counts = given[8:]
    inside = cross.query.shape[1]
    all_rows, all_positions = _behind(rows, positions, filled)
    gaps, count = len(all_rows) - len(rows), len(rows)
    normed = rms_norm(_entering(states, all_rows, all_positions, state), offset)
    fresh = np.empty((len(all_rows), 2 * inside), dtype=np.float32)
    product(normed, layer.self_in[:, inside:], fresh, _ZERO)
    queries = np.empty((count, inside), dtype=np.float32)
    product(normed[gaps:], layer.self_in[:, :inside], queries, _ZERO)
    places, starts, counts = _place(all_rows, all_positions, count, begins, begins, row_step, step)
    keys = held.shape[1] - 2 * inside
    for i in range(len(places)):
        for j in range(2 * inside):
            held[places[i], keys + j] = fresh[i, j]
    attended = attend(
        queries,
        held,
        starts,
        step,
        counts,
        bias,
        bias.shape[1] - counts,
        (keys, keys + inside, 1),
        inside,
        width,
        _ONE,
    )
    out = state.copy()
    product(attended, layer.self_out, out, _ONE)
    product(rms_norm(out, offset), cross.query, queries, _ZERO)
    attended = attend(
        queries,
        memory,
        memory_starts[rows],
        1,
        memory_counts[rows],
        np.empty((0, 0), dtype=np.float32),
        counts,
        (0, inside, 1),
        inside,
        width,
        _ONE,
    )
    product(attended, cross.out, out, _ONE)
    _feed_forward(layer, offset, out)
    return out


@njit(cache=True, nogil=True)
def turn(head: Any, places: Any, entering: Any, rows: Any, given: Any) -> tuple[Any, Any, Any]:
    """States of ``rows`` after a layer, and at these ``places`` among them `kernels.margins` of the ``head``'s logits.

    ``entering`` (B, d) are the states of all rows; ``given`` is what `decoder_layer` is given.
    """
    state = decoder_layer(given, _of(entering, rows))
    logits = np.empty((len(places), head.shape[1]), dtype=np.float32)
    product(rms_norm(_of(state, places), given[2]), head, logits, _ZERO)
    sure, best = margins(logits)
    return state, sure, best


@njit(cache=True, nogil=True)
def encoder_layer(
    layer: Any,
    offset: Any,
    width: Any,
    state: Any,
    begins: Any,
    counts: Any,
    shifts: Any,
    bias: Any,
) -> None:
    """A layer of the encoder in place, on prompts that stand one after the other (N, d): each token attends to its own prompt."""
    projected = np.empty((len(state), layer.self_in.shape[1]), dtype=np.float32)
    product(rms_norm(state, offset), layer.self_in, projected, _ZERO)
    inside = projected.shape[1] // 3
    attended = attend(
        projected,
        projected,
        begins,
        1,
        counts,
        bias,
        shifts,
        (inside, 2 * inside, 1),
        inside,
        width,
        _ONE,
    )
    product(attended, layer.self_out, state, _ONE)
    _feed_forward(layer, offset, state)


@njit(cache=True)
def _feed_forward(layer: Any, offset: Any, state: Any) -> None:
    hidden = np.empty((len(state), layer.ff_in.shape[1]), dtype=np.float32)
    product(rms_norm(state, offset), layer.ff_in, hidden, _ZERO)
    product(gated_gelu(hidden), layer.ff_out, state, _ONE)
