"""The default test: betting against H, hedged as an option on its rejection."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats
from riskcal.pvalues.losses import TINY, matrix_and_sums

#: Of the largest variance, what losses that are differences (mostly ties) are taken to have at first.
STRADDLING = 0.05


def betting(
    losses: ArrayLike, delta: float, *, level: float, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Option-hedged betting: one over the largest capital of a bettor against H, who bets on each row in the order given.

    Parameters
    ----------
    losses : (n,) or (n, k)
        Rows in an order that does not depend on their content. Sorted rows make the test wrong: put records in
        `riskcal.records.tested_order` first, as `riskcal.calibrate` does.
    delta, lower, upper
        As in `hoeffding`.
    level : float
        The level at which this hypothesis will be tested. The bets are the delta hedge of the option that pays ``1 / level``
        if the test rejects, so that power is concentrated there: the p-value barely falls below ``level``.

    Returns
    -------
    float or (k,)
        Valid whenever each row's mean given the earlier rows exceeds delta under H (i.i.d. rows do); the row count n only
        steers the bets. Ville's inequality, for any stopping.

    Notes
    -----
    A capital W starts at 1 and is multiplied by ``1 + bet (delta - loss)``. The bet is the hedge of an option that is worth
    ``p = W level / 1.15``: ``phi(z) / p / sqrt(r s2)`` with z the normal quantile of p and r the rows left, or, where what is
    left are few large losses (``r (delta - lower)^2 / s2`` of them: 5, or in part up to 20), of one on their Poisson number.
    It is at most ``0.99 / (upper - delta)``, never negative, and renewed every ``clip(r / 20, 1, 16)`` rows, always from
    earlier rows. The variance s2 is the running one about delta; where losses of the size seen (sum of squares over sum, from
    a tenth of a loss at the upper bound on) would have a larger one at mean delta, as after a quiet stretch, it is four fifths
    that. The running variance starts from 8 pseudo-observations at delta (1 - delta), or a twentieth of it where the bounds
    straddle zero (differences, mostly ties). Where the observed mean is not below delta, 1 is returned: only an order that
    follows the losses makes a bettor rich there, and a higher p-value is never wrong. Any stakes would be valid; these are the
    ones of ``benchmarks/power.py``.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")  # whose rows stand in tested order
    >>> p = riskcal.pvalues.betting(losses[:, 9:13], delta=0.1, level=0.05)  # at 0.55 to 0.4
    >>> (p <= 0.05).tolist()
    [True, True, True, False]
    """
    level = _validate.level(level, "level")
    low, high = _validate.bounds(lower, upper)
    matrix, total = matrix_and_sums(losses, low, high)
    tolerated = _validate.tolerance(delta, low, high)
    prior = prior_variance(tolerated, low, high)
    from riskcal.pvalues import bettor_kernels

    opening = math.log(level / bettor_kernels.MARGIN)
    pvalues = np.exp(
        -bettor_kernels.betting_log_capital(
            matrix, tolerated, low, high, opening, prior, bettor_kernels.HEDGE
        )
    )
    pvalues[total >= len(matrix) * tolerated] = 1.0
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def prior_variance(delta: float, lower: float, upper: float) -> float:
    """The variance that `betting` starts from: the largest at mean delta, a twentieth where losses are differences."""
    return float(_prior_variances(np.float64(delta), lower, upper))


def count_rejected(
    columns: Floats, deltas: Floats, *, lower: float, upper: float, level: float
) -> NDArray[np.int64]:
    """Leading ``deltas`` (descending) that `betting` rejects, per row of ``columns`` (k, n)."""
    from riskcal.pvalues import bettor_kernels

    priors = _prior_variances(deltas, lower, upper)
    result: NDArray[np.int64] = bettor_kernels.rejected_deltas(
        columns, deltas, lower, upper, level, priors, bettor_kernels.HEDGE
    )
    return result


def count_certified(
    columns: Floats,
    splits: NDArray[np.intp],
    deltas: Floats,
    *,
    lower: float,
    upper: float,
    level: float,
) -> NDArray[np.int64]:
    """Leading rows of ``columns`` (k, n) that `betting` certifies, per delta and split (T, m) of their units."""
    from riskcal.pvalues import bettor_kernels

    priors = _prior_variances(deltas, lower, upper)
    result: NDArray[np.int64] = bettor_kernels.betting_prefix(
        columns, splits, deltas, lower, upper, level, priors, bettor_kernels.HEDGE
    )
    return result


def _prior_variances(deltas: Any, lower: float, upper: float) -> Any:
    share = STRADDLING if lower < 0.0 < upper else 1.0
    return np.maximum((deltas - lower) * (upper - deltas) * share, TINY**0.5)
