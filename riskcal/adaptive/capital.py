"""What bettors against k hypotheses own after each row: constant bets, and the hedge of `riskcal.pvalues.betting`."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
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


def rows_to_certify(
    losses: ArrayLike,
    delta: float,
    *,
    level: float,
    bets: str = "combined",
    n_max: int | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> NDArray[np.intp]:
    """How many rows it takes until each column's capital reaches ``1 / level``.

    Parameters
    ----------
    losses : (n,) or (n, k)
        Rows in an order that does not depend on their content, within [lower, upper].
    delta : float
        Tolerated expected loss, strictly inside (lower, upper).
    level : float
        Probability with which a column whose conditional means are all above delta may ever get there.
    bets : {"combined", "mixture", "hedged"}
        As in `AdaptiveCalibration`.
    n_max : int, optional
        Horizon of the hedger, fixed beforehand; default n.

    Returns
    -------
    (k,) int
        0 where the capital never got there. For (n,) losses, k is 1.

    Raises
    ------
    RiskcalError
        For NaN or out-of-range losses, an invalid delta, level or bets, or more rows than ``n_max``.

    Notes
    -----
    Valid at any stopping time; see `AdaptiveCalibration` for the proof.
    """
    low, high = _validate.bounds(lower, upper)
    matrix = _validate.losses(losses, lower=low, upper=high)
    tolerated = (_validate.tolerance(delta, low, high) - low) / (high - low)
    _validate.level(level, "level")
    _validate.choice(bets, "bets", SPLITS)
    n, k = matrix.shape
    horizon = n if n_max is None else _validate.count(n_max, "n_max", least=2)
    if n > horizon:
        raise RiskcalError(
            f"losses: {n} rows exceed n_max = {horizon}; raise n_max before any loss is seen."
        )
    unit = (matrix - low) / (high - low)
    straddles = low < 0.0 < high
    capital = opening(k, tolerated, straddles=straddles)
    rows = np.zeros(k, dtype=np.intp)
    for seen in range(n):
        given = {"seen": seen, "n_max": horizon, "level": level, "straddles": straddles}
        capital = bet(capital, unit[seen], tolerated, bets=bets, **given)  # type: ignore[arg-type]
        rows[(rows == 0) & (capital.best >= -math.log(level))] = seen + 1
    return rows


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
