"""What bettors against k hypotheses own after each row: constant bets, and the hedge of `riskcal.pvalues.betting`."""

import math
from typing import NamedTuple

import numpy as np

from riskcal._validate import Floats
from riskcal.pvalues.bettor import STRADDLING, prior_variance

#: Constant bets, as shares of the largest bet that a single loss cannot make a debt.
CONSTANT = np.array([0.1, 0.2, 0.45, 0.95])
#: How the first unit of capital is split (as logarithms): over the constant bets in equal parts, and to the hedger, the last.
SPLITS = {
    "mixture": np.array([math.log(0.25)] * 4 + [-math.inf]),
    "hedged": np.array([-math.inf] * 4 + [0.0]),
    "combined": np.log([0.125] * 4 + [0.5]),
}


class Capital(NamedTuple):
    """What the bettors against k hypotheses own."""

    accounts: Floats  # (5, k) log of each account's growth: four constant bets, then the hedger
    spread: Floats  # (k,) sum of squares about delta, the prior's included, which steers the hedger
    total: Floats  # (k,) sum of losses, on the unit interval, which does too
    best: Floats  # (k,) log of the largest total so far


def opening(k: int, delta: float, *, straddles: bool) -> Capital:
    """Capital 1. ``straddles``: the losses are differences, most of which are ties, so a smaller spread is assumed at first."""
    from riskcal.pvalues import bettor_kernels

    prior = bettor_kernels.PSEUDO_ROWS * _prior(delta, straddles=straddles)
    return Capital(np.zeros((len(CONSTANT) + 1, k)), np.full(k, prior), np.zeros(k), np.zeros(k))


def _prior(delta: float, *, straddles: bool) -> float:
    """On the unit interval, whose own bounds never straddle zero."""
    return prior_variance(delta, 0.0, 1.0) * (STRADDLING if straddles else 1.0)


def bet(
    capital: Capital,
    losses: Floats,
    delta: float,
    *,
    seen: int,
    n_max: int,
    level: float,
    bets: str,
    straddles: bool,
) -> Capital:
    """Bet on one row of losses (k,), on the unit interval, after ``seen`` rows. The bets depend on earlier rows alone."""
    from riskcal.pvalues import bettor_kernels

    split = SPLITS[bets]
    stakes = np.empty_like(capital.accounts)
    stakes[:-1] = CONSTANT[:, None] / (1.0 - delta)
    stakes[-1] = 0.0
    if bets != "mixture":
        log_price = capital.accounts[-1] + split[-1] + math.log(level / bettor_kernels.MARGIN)
        prior = _prior(delta, straddles=straddles)
        squares = (
            capital.spread
            - bettor_kernels.PSEUDO_ROWS * prior
            + 2.0 * delta * capital.total
            - seen * delta * delta
        )
        stakes[-1] = bettor_kernels.stakes(
            log_price,
            n_max - seen,
            delta,
            1.0,
            capital.total,
            np.maximum(squares, 0.0),
            seen,
            prior,
            bettor_kernels.HEDGE,
        )
    accounts = capital.accounts + np.log1p(stakes * (delta - losses))
    total = np.logaddexp.reduce(accounts + split[:, None], axis=0)
    spread = capital.spread + (losses - delta) ** 2
    return Capital(accounts, spread, capital.total + losses, np.maximum(capital.best, total))
