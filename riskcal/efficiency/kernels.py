"""Which layer a depth-wise engine runs next, and the loop of its calls, compiled.

Imported in a function, as numba takes half a second to import; by `riskcal_adapters.torch.Engine`, too.
"""

from typing import Any

import numpy as np
from numba import njit

#: Of ten rows in flight, so many wait for deeper layers than the first when these have their turn.
_TENTHS = 7
#: So often the first layer runs in a row, whoever waits deeper.
_IN_A_ROW = 24
#: After so many calls deep layers have a turn in which none is passed over.
_WHOLE_EVERY = 64


@njit(cache=True)
def nothing_ran() -> Any:
    """What `next_layer` remembers of the layers that ran: none yet.

    The last one, how often the first one ran in a row, how many calls came since a turn began in which no layer is passed
    over, and whether the turn is such a one.
    """
    return np.zeros(4, dtype=np.int64)


@njit(cache=True)
def next_layer(waiting: Any, ran: Any, least: Any, urgent: Any) -> Any:
    """The layer, from 0, that runs next; how many rows are ``waiting`` (L,) for each is known.

    The first layer runs until 7 of 10 rows wait for deeper ones. Then these run in turn, from the lowest up, so that each call
    has the rows of the one before that stayed, beside those that waited; a layer that fewer than ``least`` rows wait for is
    passed over. But no row waits for ever, whatever others do: after 24 calls of the first layer in a row, and 64 calls after the
    last such turn, none is passed over. And an ``urgent`` layer goes before all; -1: none is.
    ``ran`` is of `nothing_ran`, and moved on.
    """
    index = urgent
    if index < 0 and ran[0] > 0:
        for deep in range(ran[0] + 1, len(waiting)):
            if waiting[deep] >= (1 if ran[3] else least):
                index = deep
                break
    if index < 0:
        index, ran[3] = 0, 0
        in_flight = waiting.sum()
        deeper = in_flight - waiting[0]
        is_due = ran[1] >= _IN_A_ROW or ran[2] >= _WHOLE_EVERY
        if deeper and (is_due or 10 * deeper >= _TENTHS * in_flight):
            if is_due:
                ran[2], ran[3] = 0, 1
            index = 1
            while not waiting[index]:
                index += 1
    ran[0], ran[1], ran[2] = index, (0 if index else ran[1] + 1), ran[2] + 1
    return index


@njit(cache=True)
def engine_calls(exits, tokens, slots, least, admitted_at, rows, admitted, begun, ended):  # type: ignore[no-untyped-def]
    """Calls of layers until all requests are answered, and of each the rows and newcomers; returns their number.

    ``exits`` (B, T) and ``tokens`` (B,); written are ``rows`` and ``admitted``, one per call, and ``begun`` and ``ended`` (B,).
    """
    n_layers = exits.max()
    ran = nothing_ran()
    request = np.full(slots, -1, dtype=np.int64)
    layer, position = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int64)
    waiting = np.zeros(n_layers, dtype=np.int64)
    free, taken, calls = slots, 0, 0
    while True:
        new = 0
        if free * admitted_at >= slots:
            for s in range(slots):
                if request[s] < 0 and taken < exits.shape[0]:
                    request[s], layer[s], position[s] = taken, 0, 0
                    begun[taken] = calls
                    waiting[0] += 1
                    taken, new, free = taken + 1, new + 1, free - 1
        if free == slots:
            return calls
        at = next_layer(waiting, ran, least, -1)
        rows[calls], admitted[calls] = waiting[at], new
        for s in range(slots):
            if request[s] < 0 or layer[s] != at:
                continue
            r = request[s]
            waiting[at] -= 1
            if exits[r, position[s]] > at + 1:
                layer[s] = at + 1
                waiting[at + 1] += 1
                continue
            position[s] += 1
            layer[s] = 0
            if position[s] == tokens[r]:
                ended[r], request[s], free = calls, -1, free + 1
            else:
                waiting[0] += 1
        calls += 1
