"""A monitor's loop over losses, compiled. Imported in functions, as numba takes half a second to import."""

import math

import numpy as np
from numba import njit

#: Squared standard errors by which a proxy's correlation with the losses is discounted, as in `riskcal.pvalues.bettor_kernels`:
#: a compiled loop of another file would not be compiled anew when that changes.
DOUBT = 4.0
#: The largest part of its capital that a bettor may lose at once to a loss and a proxy.
ROOM = 0.75


@njit(cache=True)
def log_mean(growth, largest):  # type: ignore[no-untyped-def]
    """The logarithm of the mean of ``exp(growth)``, of which ``largest`` is the largest."""
    capital = 0.0
    for b in range(growth.size):
        capital += math.exp(growth[b] - largest)
    return largest + math.log(capital / growth.size)


@njit(cache=True)
def watch(losses, weights, delta, bets, growth, totals, restarts, limit):  # type: ignore[no-untyped-def]
    """Multiply each bettor's capital by ``1 + bet weight (loss - delta)``, loss by loss, and return the first alarm.

    Updated in place: ``growth`` (m,), the logarithms of the capitals, and ``totals`` (2,), the sums of weight times loss and
    of weights. With ``restarts`` each bettor starts with one unit and is given the weight of every loss after it, to bet with
    from the next on (Shiryaev-Roberts). Returned is the first loss after which the mean of ``exp(growth)`` is at least
    ``exp(limit)``, or -1.
    """
    alarm = -1
    for t in range(losses.size):
        gap = weights[t] * (losses[t] - delta)
        largest = -np.inf
        for b in range(bets.size):
            grown = growth[b] + math.log1p(bets[b] * gap)
            if restarts:
                fresh = math.log(weights[t])
                grown = max(grown, fresh) + math.log1p(math.exp(-abs(grown - fresh)))
            growth[b] = grown
            largest = max(largest, grown)
        if alarm < 0 and largest >= limit and log_mean(growth, largest) >= limit:
            alarm = t
        totals[0] += weights[t] * losses[t]
        totals[1] += weights[t]
    return alarm


@njit(cache=True)
def coefficient(sums):  # type: ignore[no-untyped-def]
    """What a proxy's gap says of a loss, from the sums of those sampled; 0 before it has shown that it says anything."""
    rows, total, squares, product, gaps, square_gaps = sums[2:]
    if rows <= 0.0:
        return 0.0
    spread, shared = squares - total * total / rows, product - total * gaps / rows
    if spread * square_gaps <= 0.0:
        return 0.0
    explained = min(shared * shared / (spread * square_gaps), 1.0)
    if explained * rows <= DOUBT * (1.0 - explained):
        return 0.0
    return (1.0 - DOUBT * (1.0 - explained) / (explained * rows)) * shared / square_gaps


@njit(cache=True)
def watch_helped(  # type: ignore[no-untyped-def]
    losses, weights, proxies, rate, sums, delta, bets, growth, totals, restarts, limit
):
    """As `watch`, helped by the proxies (n,) in [0, 1] of all requests; those with weight 0 were not sampled.

    ``sums`` (8,) are updated in place: the number of requests and the sum of their proxies; of those sampled, by weight, the
    number, losses, their squares, losses times gaps, gaps, and squared gaps.
    """
    alarm = -1
    taken = coefficient(sums)
    for t in range(losses.size):
        weight, loss = weights[t], losses[t]
        gap = proxies[t] - (0.5 + sums[1]) / (1.0 + sums[0])
        largest = -np.inf
        for b in range(bets.size):
            room = max(ROOM / bets[b] - delta, 0.0)
            helped = min(max(taken, -room), room) * (rate - weight) * gap
            grown = growth[b] + math.log1p(bets[b] * (weight * (loss - delta) + helped))
            if restarts and weight > 0.0:
                fresh = math.log(weight)
                grown = max(grown, fresh) + math.log1p(math.exp(-abs(grown - fresh)))
            growth[b] = grown
            largest = max(largest, grown)
        if alarm < 0 and largest >= limit and log_mean(growth, largest) >= limit:
            alarm = t
        sums[0] += 1.0
        sums[1] += proxies[t]
        if weight > 0.0:
            totals[0] += weight * loss
            totals[1] += weight
            known = (1.0, loss, loss * loss, loss * gap, gap, gap * gap)
            for i in range(6):
                sums[2 + i] += weight * known[i]
            taken = coefficient(sums)
    return alarm
