"""A monitor's loop over losses, compiled. Imported in functions, as numba takes half a second to import."""

import math

import numpy as np
from numba import njit


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
        if alarm < 0 and largest >= limit:
            capital = 0.0
            for b in range(bets.size):
                capital += math.exp(growth[b] - largest)
            if largest + math.log(capital / bets.size) >= limit:
                alarm = t
        totals[0] += weights[t] * losses[t]
        totals[1] += weights[t]
    return alarm
