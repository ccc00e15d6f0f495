"""A T5's layers on a CPU in float32 as one compiled loop each, where calling torch takes as long as the work in it."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from riskcal_adapters.torch import kernels
from riskcal_adapters.torch.blas import product
from riskcal_adapters.torch.exits import leaves
from riskcal_adapters.torch.kernels import attend, gated_gelu, put, ranges, rms_norm, surest
from riskcal_adapters.torch.weights import CrossAttention, Layer

#: Tokens of a row between which Python is back, and whoever interrupts it is heard.
_AT_ONCE = 16
_ZERO, _ONE = np.float32(0), np.float32(1)
_catch_up, _entering, _place, _of = kernels.catch_up, kernels.entering, kernels.place, kernels.of
_whole_prompts = kernels.whole_prompts


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


class Given(NamedTuple):
    """What `decoder_layer` knows of a layer and of the rows that it runs for."""

    layer: Layer  #: as `arrays`
    cross: CrossAttention
    offset: Any  #: of norms (`kernels.rms_norm`)
    width: int  #: d_kv
    rows: Any  #: (A,)
    positions: Any  #: (A,)
    filled: Any  #: (B,): how many positions of each row have keys and values; moved on
    states: Any  #: (T, B, d): of positions that skipped the layer
    begins: Any  #: where keys and values are (`kernels.place`), as the next two say
    row_step: int
    step: int
    held: Any  #: these keys and values, in its last columns
    bias: Any  #: (heads, n): on attention from the last of n positions
    memory: Any  #: (N, 2 h): keys and values of all prompts
    memory_starts: Any  #: (B,): where a row's begin
    memory_counts: Any  #: (B,): how many they are


@njit(cache=True, nogil=True)
def decoder_layer(given: Any, state: Any) -> Any:
    """As `Backbone.layer_of_rows`: for rows at positions of their own, (A, d) to (A, d)."""
    layer, cross, offset, width = given.layer, given.cross, given.offset, given.width
    rows, begins, step, held, bias = given.rows, given.begins, given.step, given.held, given.bias
    inside = cross.query.shape[1]
    all_rows, all_positions = _catch_up(rows, given.positions, given.filled)
    gaps, count = len(all_rows) - len(rows), len(rows)
    normed = rms_norm(_entering(given.states, all_rows, all_positions, state), offset)
    fresh = np.empty((len(all_rows), 2 * inside), dtype=np.float32)
    product(normed, layer.self_in[:, inside:], fresh, _ZERO)
    queries = np.empty((count, inside), dtype=np.float32)
    product(normed[gaps:], layer.self_in[:, :inside], queries, _ZERO)
    places, starts, counts = _place(
        all_rows, all_positions, count, begins, begins, given.row_step, step
    )
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
        given.memory,
        given.memory_starts[rows],
        1,
        given.memory_counts[rows],
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
def layer_and_surest(
    head: Any, measure: Any, places: Any, entering: Any, rows: Any, given: Any
) -> tuple[Any, Any, Any]:
    """States of ``rows`` after a layer, and at these ``places`` among them `kernels.surest` of the ``head``'s logits.

    ``entering`` (B, d) are the states of all rows, ``given`` is a `Given`.
    """
    state = decoder_layer(given, _of(entering, rows))
    logits = np.empty((len(places), head.shape[1]), dtype=np.float32)
    product(rms_norm(_of(state, places), given.offset), head, logits, _ZERO)
    sure, best = surest(measure, logits)
    return state, sure, best


class Stack(NamedTuple):
    """A T5, for loops over its layers."""

    encoder: Layer  #: of all layers, as are the next two
    decoder: Layer
    cross: CrossAttention
    embedding: Any  #: (V, d)
    head: Any  #: (d, V)
    offset: Any  #: of norms (`kernels.rms_norm`)
    width: int  #: d_kv


class Room(NamedTuple):
    """What is known of one row's prompt of S tokens, and remembered of T generated ones."""

    encoded: Any  #: (S, d)
    measure: int  #: of confidence, by its place in `kernels.OF_LOGITS`
    needed: Any  #: (T, L): confidence to exit with; of the last layer it is not asked
    bias: Any  #: (1 or L, heads, T): on attention from the last of T positions
    memory: Any  #: (L, S, 2 h): keys and values of the prompt, in layers that ran
    held: Any  #: (L, T, 2 h): of what was generated
    filled: Any  #: (L, 1): of how many positions
    states: Any  #: (T, 1, d): where each position left
    whole: Any  #: (2, T + 1): tokens, the one before the first too, and the layers that they left at, from 1
    real: Any  #: (2, T + 1): their confidences there, and the largest that were not enough


def room(stack: Stack, encoded: Any, measure: int, needed: Any, bias: Any, start: int) -> Room:
    """For a generation that has not begun."""
    (length, layers), (_, width, both) = needed.shape, stack.cross.memory.shape
    memory, held, states, real = (
        np.empty(shape, dtype=np.float32)
        for shape in (
            (layers, len(encoded), both),
            (layers, length, both),
            (length, 1, width),
            (2, length + 1),
        )
    )
    whole = np.full((2, length + 1), start)
    filled = np.zeros((layers, 1), dtype=np.int64)
    return Room(encoded, measure, needed, bias, memory, held, filled, states, whole, real)


@njit(cache=True)
def _layer(layers: Any, index: Any) -> Any:
    return Layer(
        layers.self_in[index], layers.self_out[index], layers.ff_in[index], layers.ff_out[index]
    )


def generate(stack: Stack, room: Room, ends: Any) -> tuple[Any, Any]:
    """``whole`` and ``real`` (2, n) of the n tokens up to one of the ``ends``, or to the last that there is room for."""
    size, ended, length = 0, False, len(room.needed)
    while size < length and not ended:
        size, ended = _go_on(stack, room, ends, size, min(size + _AT_ONCE, length))
    return room.whole[:, 1 : size + 1], room.real[:, 1 : size + 1]


@njit(cache=True, nogil=True)
def _go_on(stack: Any, room: Any, ends: Any, begin: Any, end: Any) -> tuple[Any, Any]:
    """Positions from ``begin`` up to ``end``: how many have a token then, and whether the last one is one of the ``ends``."""
    for position in range(begin, end):
        _next_token(stack, room, position)
        if (room.whole[0, position + 1] == ends).any():
            return position + 1, True
    return end, False


@njit(cache=True)
def _next_token(stack: Any, room: Any, position: Any) -> None:
    """From its embedding through layer after layer to the first at which it is sure enough, or the last."""
    before, needed, last = room.whole[0, position], room.needed[position], len(room.filled) - 1
    logits = np.empty((1, stack.head.shape[1]), dtype=np.float32)
    state, refused = stack.embedding[before : before + 1], np.float32(-np.inf)
    for index in range(last + 1):
        state = decoder_layer(_given(stack, room, position, index), state)
        if index < last and needed[index] == np.inf:
            continue
        product(rms_norm(state, stack.offset), stack.head, logits, _ZERO)
        sure, best = surest(room.measure, logits)
        if leaves(sure[0], needed[index], index == last):
            room.states[position] = state
            room.whole[:, position + 1] = best[0], index + 1
            room.real[:, position + 1] = sure[0], refused
            break
        if sure[0] > refused:  # a NaN is not
            refused = sure[0]


@njit(cache=True)
def _given(stack: Any, room: Any, position: Any, index: Any) -> Any:
    """The `Given` of a layer; one that runs for the first time reads the prompt."""
    row, cross, memory, bias = np.zeros(1, dtype=np.int64), stack.cross, room.memory, room.bias
    own = CrossAttention(cross.query[index], cross.memory[index], cross.out[index])
    if not room.filled[index, 0]:
        product(room.encoded, own.memory, memory[index], _ZERO)
    return Given(
        _layer(stack.decoder, index),
        own,
        stack.offset,
        stack.width,
        row,
        np.full(1, position),
        room.filled[index],
        room.states,
        row,
        1,
        1,
        room.held[index],
        bias[index % len(bias)],
        memory[index],
        row,
        np.full(1, len(room.encoded)),
    )


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


@njit(cache=True, nogil=True)
def encode(stack: Any, tokens: Any, lengths: Any, bias: Any) -> Any:
    """The encoder's normed output of prompts that stand one after the other (N,): (N, d).

    ``bias`` (1 or L, heads, 2 S - 1) is by how far ahead a position is, from 1 - S on, S the longest of the ``lengths``.
    """
    begins, counts, shifts = _whole_prompts(lengths)
    state = _of(stack.embedding, tokens)
    for index in range(len(stack.encoder.self_in)):
        own = bias[index % len(bias)]
        layer = _layer(stack.encoder, index)
        encoder_layer(layer, stack.offset, stack.width, state, begins, counts, shifts, own)
    return rms_norm(state, stack.offset)


@njit(cache=True)
def _feed_forward(layer: Any, offset: Any, state: Any) -> None:
    hidden = np.empty((len(state), layer.ff_in.shape[1]), dtype=np.float32)
    product(rms_norm(state, offset), layer.ff_in, hidden, _ZERO)
    product(gated_gelu(hidden), layer.ff_out, state, _ONE)
