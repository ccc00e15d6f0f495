"""Loops of the replay, compiled. Imported inside the functions that need them, since importing numba takes half a second."""

import numpy as np
from numba import njit


@njit(cache=True)
def exit_layers(confidence, begin, length, local, position, min_layer, exits):  # type: ignore[no-untyped-def]
    """Exit of every row under every threshold, in one walk up the exits.

    Row i's confidences are ``length[i]`` of ``confidence`` (M,) from ``begin[i]`` on. ``local`` (T, k) holds each position's
    confidence needed, ascending along k, so that thresholds leave in that order.
    """
    k = local.shape[1]
    for i in range(begin.size):
        needed = local[position[i]]
        left = 0
        for layer in range(min_layer - 1, length[i] - 1):
            value = confidence[begin[i] + layer]
            while left < k and value >= needed[left]:
                exits[i, left] = layer + 1
                left += 1
            if left == k:
                break
        exits[i, left:] = length[i]


@njit(cache=True)
def exit_stages(confidence, begin, length, needed, given_up, min_layer, exits):  # type: ignore[no-untyped-def]
    """Exit of every row under every candidate, of thresholds ``needed`` and ``given_up`` (k, E) of its own at each exit."""
    for i in range(begin.size):
        for j in range(needed.shape[0]):
            exits[i, j] = length[i]
            for layer in range(min_layer - 1, length[i] - 1):
                value = confidence[begin[i] + layer]
                enough = value >= needed[j, layer] and needed[j, layer] < np.inf
                hopeless = value <= given_up[j, layer] and given_up[j, layer] > -np.inf
                if enough or hopeless:
                    exits[i, j] = layer + 1
                    break


@njit(cache=True, inline="always")
def bucket_of(value, low, scale, top):  # type: ignore[no-untyped-def]
    """A whole number from 0 to ``top`` that never falls as ``value`` grows; 0 for NaN."""
    place = (value - low) * scale
    place = place if place > 0.0 else 0.0
    return np.uint32(np.int32(place if place < top else top))


@njit(cache=True)
def ranks_by_bucket(needed, low, scale, top):  # type: ignore[no-untyped-def]
    """Per row of ascending ``needed`` (T, k + 1; the last is no threshold) and bucket: how many stand in lower buckets.

    Where the bucket itself holds some, what is written is -1 minus that number: there the values must be compared.
    """
    k = needed.shape[1] - 1
    table = np.empty((needed.shape[0], top + 1), dtype=np.int32)
    for row in range(needed.shape[0]):
        j = 0
        for bucket in range(top + 1):
            lower = j
            while j < k and bucket_of(float(needed[row, j]), low, scale, float(top)) == bucket:
                j += 1
            table[row, bucket] = lower if j == lower else -1 - lower
    return table


@njit(cache=True)
def replay_means(  # type: ignore[no-untyped-def]
    confidence,
    outcome,
    start,
    row_of,
    first,
    needed,
    table,
    low,
    scale,
    offset,
    sign,
    steps,
    losses,
    layers,
    met,
):
    """Per prompt and threshold: means over its tokens of ``offset + sign outcome`` at the exit and of the exit layer.

    A token's exit is a step function of the threshold whose steps are the records: the layers, from ``first`` (from 0) on,
    whose confidence exceeds all before it. So the records of a tile of tokens are collected first, without branches; then
    each adds what changes from it to the next record to the number of thresholds that it reaches, and the prompt's row is
    summed up once. ``needed`` (T, k + 1) ascends, with NaN at its end; token i uses row ``row_of[i]``, or 0 if that is
    empty. ``start`` (n + 1,) bounds each prompt's tokens; ``steps`` (k + 1,) is scratch of the sums' type. Columns of
    ``losses`` and ``layers`` (n, k) are for thresholds from the highest down. ``met`` (k,), ascending, is set where a record
    equals what is needed.
    """
    tile, one = 256, np.uintp(1)
    top = float(table.shape[1] - 1)
    k = losses.shape[1]
    # unsigned: numba need not wrap such an index
    width, from_layer = np.uintp(confidence.shape[1]), np.uintp(first)
    where = np.empty(tile * (confidence.shape[1] + 1), dtype=np.uint32)
    value = np.empty(where.size, dtype=confidence.dtype)
    bucket = np.empty(where.size, dtype=np.uint32)
    depth = np.empty(k + 1, dtype=np.int64)
    outcomes, lowest = outcome.reshape(-1), confidence.dtype.type(-np.inf)
    for p in range(start.size - 1):
        tokens = start[p + 1] - start[p]
        base = steps[0] * 0
        steps[:] = 0
        depth[:] = 0
        for begin in range(start[p], start[p + 1], tile):
            n = np.uintp(0)
            for t in range(np.uintp(min(tile, start[p + 1] - begin))):
                i = np.uintp(begin) + t
                c = confidence[i, from_layer]
                where[n] = t * width + from_layer
                value[n] = c
                n += one
                base += outcome[i, from_layer]
                highest = c if c == c else lowest
                for layer in range(from_layer + one, width - one):
                    c = confidence[i, layer]
                    where[n] = t * width + layer
                    value[n] = c
                    n += np.uintp(c > highest)
                    highest = c if c > highest else highest
                where[n] = (t + one) * width - one  # the last layer takes whatever is left
                value[n] = np.inf
                n += one
            for q in range(n):
                bucket[q] = bucket_of(float(value[q]), low, scale, top)
            row = 0
            origin = np.uintp(begin) * width
            for q in range(n - one):
                if row_of.size:
                    row = row_of[begin + where[q] // width]
                rank = np.int64(table[row, np.uintp(bucket[q])])
                if rank < 0:
                    rank = -1 - rank
                    c = float(value[q])
                    while c >= needed[row, rank]:
                        rank += 1
                    if rank > 0 and c == needed[row, rank - 1]:
                        met[rank - 1] = True
                here, following = np.uintp(where[q]), np.uintp(where[q + one])
                reached = np.uintp(rank)
                steps[reached] = (
                    steps[reached] + outcomes[origin + following] - outcomes[origin + here]
                )
                depth[reached] += np.int64(following - here)
        count = 0
        for j in range(k):
            base += steps[j]
            count += depth[j]
            steps[j] = base
            depth[j] = count
        for j in range(k):
            losses[p, k - 1 - j] = min(max((offset * tokens + sign * steps[j]) / tokens, 0.0), 1.0)
            layers[p, k - 1 - j] = first + 1 + depth[j] / tokens
