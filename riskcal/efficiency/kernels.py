"""The loop of an engine's calls, compiled. Imported in a function, as numba takes half a second to import."""

import numpy as np
from numba import njit


@njit(cache=True)
def engine_calls(exits, tokens, slots, least, rules, rows, admitted, begun, ended):  # type: ignore[no-untyped-def]
    """Calls of layers until all requests are answered, and of each the rows and newcomers; returns their number.

    ``exits`` (B, T) and ``tokens`` (B,); written are ``rows`` and ``admitted``, one per call, and ``begun`` and ``ended`` (B,).
    """
    tenths, in_a_row, whole_every, admitted_at = rules
    n_layers = exits.max()
    first_calls = since_whole = 0
    is_whole = False
    request = np.full(slots, -1, dtype=np.int64)
    layer, position = np.zeros(slots, dtype=np.int64), np.zeros(slots, dtype=np.int64)
    waiting = np.zeros(n_layers, dtype=np.int64)
    free, taken, calls, at = slots, 0, 0, 0
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
        before, at = at, 0
        if before > 0:
            for deeper in range(before + 1, n_layers):
                if waiting[deeper] >= (1 if is_whole else least):
                    at = deeper
                    break
        if at == 0:
            is_whole = False
            in_flight = slots - free
            deep = in_flight - waiting[0]
            is_due = first_calls >= in_a_row or since_whole >= whole_every
            if deep and (is_due or 10 * deep >= tenths * in_flight):
                if is_due:
                    since_whole, is_whole = 0, True
                at = 1
                while waiting[at] == 0:
                    at += 1
        first_calls = 0 if at else first_calls + 1
        since_whole += 1
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
