"""All numba loops. Imported inside the functions that need them, since importing numba takes half a second."""

import math

import numpy as np
from numba import njit

from riskcal._validate import Floats


@njit(cache=True)
def exit_layers(confidence, local, position, min_layer, exits):  # type: ignore[no-untyped-def]
    """Exit layer of every token under every threshold, in one walk up the layers.

    ``local`` (T, k) holds each position's confidence needed, ascending along k, so that thresholds leave in that order.
    """
    n_layers = confidence.shape[1]
    k = local.shape[1]
    for i in range(confidence.shape[0]):
        needed = local[position[i]]
        left = 0
        for layer in range(min_layer - 1, n_layers - 1):
            while left < k and confidence[i, layer] >= needed[left]:
                exits[i, left] = layer + 1
                left += 1
            if left == k:
                break
        exits[i, left:] = n_layers


@njit(cache=True)
def replay_sums(confidence, loss, local, position, start, min_layer, losses, layers):  # type: ignore[no-untyped-def]
    """Per prompt and threshold: the sums over its tokens of the loss at the exit and of the exit layer.

    ``start`` (n + 1,) bounds each prompt's tokens. A token's loss is a step function of the threshold, so only its steps
    are added, and the prompt's row is summed up once at the end.
    """
    n_layers = confidence.shape[1]
    k = local.shape[1]
    for p in range(start.size - 1):
        for i in range(start[p], start[p + 1]):
            needed = local[position[i]]
            left = 0
            loss_before = 0.0
            layers_before = 0
            for layer in range(min_layer - 1, n_layers):
                first = left
                if layer == n_layers - 1:
                    left = k
                else:
                    while left < k and confidence[i, layer] >= needed[left]:
                        left += 1
                if left > first:
                    losses[p, first] += loss[i, layer] - loss_before
                    layers[p, first] += layer + 1 - layers_before
                    loss_before = loss[i, layer]
                    layers_before = layer + 1
                    if left == k:
                        break
        for j in range(1, k):
            losses[p, j] += losses[p, j - 1]
            layers[p, j] += layers[p, j - 1]


@njit(cache=True)
def _hedge(log_p: float) -> float:
    """phi(z) / p for z the normal quantile of p = exp(log_p): how much of the capital the next bet puts at stake.

    The quantile is Wichura's algorithm AS 241 (PPND7, 1988), about 7 digits. Any nonnegative number here keeps the test
    valid; the accuracy serves power alone.
    """
    if log_p >= 0.0:
        return 0.0
    p = math.exp(log_p)
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        z = q * (((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179)
        z /= ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    else:
        tail = -log_p if q < 0 else -math.log1p(-p)
        r = math.sqrt(max(tail, 0.0))
        if r <= 5.0:
            r -= 1.6
            z = (((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777) / (
                (0.12021132975 * r + 0.73700164250) * r + 1.0
            )
        else:
            r = min(r, 27.0) - 5.0
            z = (((0.017337203997 * r + 0.42868294337) * r + 3.0812263860) * r + 6.6579051150) / (
                (0.012258202635 * r + 0.24197894225) * r + 1.0
            )
        if q < 0:
            z = -z
    return math.exp(-0.5 * z * z - log_p) * 0.3989422804014327


@njit(cache=True)
def betting_log_capital(losses, delta, level, prior, cap):  # type: ignore[no-untyped-def]
    """Largest log capital of the option-hedged bettor against each column's null, along the rows in order.

    ``losses`` (n, k) and ``delta`` are on the unit interval. The capital is kept as a logarithm, so that no run of bad
    losses can make it vanish, and its maximum includes the value after the last row.
    """
    n, k = losses.shape
    log_target = math.log(level / 1.03)
    weight = 8.0
    log_capital = np.zeros(k)
    best = np.zeros(k)
    spread = np.full(k, weight * prior * delta * (1.0 - delta))
    for t in range(n):
        for j in range(k):
            stake = _hedge(log_capital[j] + log_target)
            if stake > 0.0:
                bet = min(stake / math.sqrt((n - t) * spread[j] / (weight + t)), cap)
                log_capital[j] += math.log1p(bet * (delta - losses[t, j]))
                best[j] = max(best[j], log_capital[j])
            spread[j] += (losses[t, j] - delta) ** 2
    return best


def option_hedged_betting(losses: Floats, delta: float, *, level: float, prior: float) -> Floats:
    """Largest log capital per column; see `riskcal.pvalues.betting`."""
    largest: Floats = betting_log_capital(np.ascontiguousarray(losses), delta, level, prior, 0.99 / (1.0 - delta))
    return largest
