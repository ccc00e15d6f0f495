"""Loops over tokens and heads, compiled. Imported in functions, as numba takes half a second to import."""

import math

import numpy as np
from numba import njit


@njit(cache=True)
def head_exits(confidence, agrees, prompt, thresholds, exits, errors):  # type: ignore[no-untyped-def]
    """Per prompt and head (n, K): tokens that exit there, at the first head whose threshold they reach, and wrong ones."""
    for i in range(confidence.shape[0]):
        for k in range(thresholds.size):
            if confidence[i, k] >= thresholds[k]:
                exits[prompt[i], k] += 1
                if not agrees[i, k]:
                    errors[prompt[i], k] += 1
                break


@njit(cache=True)
def head_levels(  # type: ignore[no-untyped-def]
    level,
    count,
    agrees,
    start,
    used,
    weight,
    agreement,
    max_tokens,
    n,
    quantile,
    target,
    cap,
    margin,
    chosen,
):
    """The boldest level of each used head, one after the other, that a pilot projects to be certified; returns the saving.

    ``level`` (K, N) is the first of a head's ``count`` descending thresholds that a token reaches; ``start`` bounds each
    pilot prompt's tokens. On n further prompts the surplus of agreement per prompt must exceed both ``quantile`` standard
    errors and what lets the largest bet, ``cap`` of what would be ruin, reach the log capital ``target``; the projection
    must clear this by ``margin`` of its own standard errors, with one wrong exit more than was seen. A head without such a
    level is passed over (-1).
    """
    waiting = np.ones(level.shape[1], dtype=np.bool_)
    prompts = start.size - 1
    one = agreement / max_tokens
    saving = 0.0
    for k in range(level.shape[0]):
        chosen[k] = -1
        if not used[k]:
            continue
        total, first, second = np.zeros(count[k]), np.zeros(count[k]), np.zeros(count[k])
        exits, errors = np.zeros(count[k]), np.zeros(count[k])
        for p in range(prompts):
            for i in range(start[p], start[p + 1]):
                if waiting[i] and level[k, i] < count[k]:
                    exits[level[k, i]] += 1.0
                    if not agrees[k, i]:
                        errors[level[k, i]] += 1.0
            excess = 0.0
            for g in range(count[k]):
                if exits[g] > 0.0:
                    step = (errors[g] - (1.0 - agreement) * exits[g]) / max_tokens
                    total[g] += exits[g]
                    first[g] += step
                    # by how much the square of the excess grows
                    second[g] += step * (step + 2.0 * excess)
                    excess += step
                    exits[g], errors[g] = 0.0, 0.0
        total, first, second = np.cumsum(total), np.cumsum(first), np.cumsum(second)
        for g in range(count[k] - 1, -1, -1):
            if total[g] == 0.0:
                break
            surplus = -(first[g] + one) / prompts
            variance = (second[g] + one * one) / prompts
            needed = max(quantile * math.sqrt(variance / n), target * agreement / (cap * n))
            if surplus - needed >= margin * math.sqrt(variance * (1.0 / n + 1.0 / prompts)):
                chosen[k] = g
                saving += weight[k] * total[g]
                break
        for i in range(level.shape[1]):
            if level[k, i] <= chosen[k]:
                waiting[i] = False
    return saving
