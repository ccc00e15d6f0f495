"""Which rows run next, and where they stand after a layer: over all rows at once, in compiled loops."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from riskcal.efficiency.kernels import next_layer
from riskcal_adapters.torch.exits import decide, others
from riskcal_adapters.torch.kernels import Ints


@njit(cache=True)
def next_rows(
    active: Any,
    layers: Any,
    positions: Any,
    since: Any,
    latest: Any,
    least: Any,
    ran: Any,
    n_layers: Any,
) -> tuple[Any, Ints, Ints]:
    """A layer, the rows that wait for it, and their positions.

    First comes the layer of a row that has been waiting since before ``latest``; else the one that `next_layer` says.
    """
    waiting = np.zeros(n_layers, dtype=np.int64)
    first, urgent = -1, -1
    for row in range(len(active)):
        if active[row]:
            waiting[layers[row]] += 1
            if first < 0 or since[row] < since[first]:
                first = row
    if first >= 0 and since[first] < latest:
        urgent = layers[first]
    index = next_layer(waiting, ran, least, urgent)
    rows, at = np.empty(waiting[index], np.int64), np.empty(waiting[index], np.int64)
    found = 0
    for row in range(len(active)):
        if active[row] and layers[row] == index:
            rows[found], at[found] = row, positions[row]
            found += 1
    return index, rows, at


class Emitting(NamedTuple):
    """What changes where rows emit tokens, of all rows of the slots."""

    ends: Ints  #: tokens that end a row
    now: float
    tokens: Ints  #: (B, T), as the next
    exits: Ints  #: layers that they left at, from 1
    layers: Ints  #: (B,), as all that follow: the layer that runs next
    positions: Ints
    limits: Ints  #: tokens at most
    since: NDArray[np.float64]  #: when it began to wait
    first_token: NDArray[np.float64]  #: when there was one
    active: NDArray[np.bool_]


@njit(cache=True)
def emit(rows: Any, chosen: Any, all_rows: Any) -> tuple[Ints, Ints, Ints]:
    """Rows emit the tokens ``chosen``: those that end, those that go on to their next position, and their tokens.

    Rows that stay at their position are a layer on already; these are not. ``all_rows`` is an `Emitting`.
    """
    ended, going = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    entering = np.empty(len(rows), np.int64)
    layers, positions = all_rows.layers, all_rows.positions
    n_ended = n_going = 0
    for i in range(len(rows)):
        row, token = rows[i], chosen[i]
        position = positions[row]
        if position == 0:
            all_rows.first_token[row] = all_rows.now
        all_rows.tokens[row, position], all_rows.exits[row, position] = token, layers[row] + 1
        positions[row] = position + 1
        is_end = position + 1 == all_rows.limits[row]
        for end in all_rows.ends:
            is_end = is_end or end == token
        if is_end:
            all_rows.active[row] = False
            ended[n_ended] = row
            n_ended += 1
        else:
            layers[row], all_rows.since[row] = 0, all_rows.now
            going[n_going], entering[n_going] = row, token
            n_going += 1
    return ended[:n_ended].copy(), going[:n_going].copy(), entering[:n_going].copy()


@njit(cache=True)
def leave(
    rows: Any,
    positions: Any,
    places: Any,
    state: Any,
    confidence: Any,
    best: Any,
    index: Any,
    last: Any,
    needed: Any,
    confidences: Any,
    refused: Any,
    states: Any,
    entering: Any,
    embedding: Any,
    all_rows: Any,
) -> Ints:
    """What becomes of rows after a layer where tokens are the most probable ones; gives those that ended.

    Rows that leave emit their tokens (``all_rows`` is an `Emitting`), note confidences, put their ``state`` among the
    ``states`` (T, B, d) that skipped layers read, and enter again by the ``embedding`` of the token; the others enter the
    next layer.
    """
    out = decide(rows, positions, places, needed, index, confidence, refused, last)
    leaving = places[out]
    for i in others(len(rows), leaving):
        entering[rows[i]] = state[i]
        all_rows.layers[rows[i]], all_rows.since[rows[i]] = index + 1, all_rows.now
    for i in range(len(leaving)):
        row, position = rows[leaving[i]], positions[leaving[i]]
        confidences[row, position] = confidence[out[i]]
        states[position, row] = state[leaving[i]]
    ended, going, chosen = emit(rows[leaving], best[out], all_rows)
    for i in range(len(going)):
        entering[going[i]] = embedding[chosen[i]]
    return ended
