"""Procedures for losses that can only fall as the threshold rises, and a check of whether measured risks do.

Every function takes losses (n, k), one row per independent unit, and one threshold per column, in any order.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate, fwer, pvalues
from riskcal._validate import Floats, RiskcalError
from riskcal.pvalues.methods import Method, inverted


def conformal_risk_control(
    losses: ArrayLike, thresholds: ArrayLike, delta: float, upper: float = 1.0
) -> float:
    """Controls the expectation only, with no ``1 - epsilon`` guarantee: conformal risk control (Angelopoulos et al. 2024).

    The lowest threshold with ``(sum of losses + upper) / (n + 1) <= delta``. Over the draw of the calibration data *and*
    of the next prompt, the expected loss at that threshold is at most delta; for the data at hand it may well be higher,
    in a share of draws that no epsilon bounds.

    Parameters
    ----------
    losses : (n, k)
        Exchangeable rows, each of which never rises with the threshold; at most ``upper``.
    thresholds : (k,)
        One per column, distinct and finite, fixed before the data were seen.
    delta : float
        Tolerated expected loss, in the loss's own units. The full model's own loss must not exceed it.
    upper : float
        The largest possible loss, fixed beforehand.

    Returns
    -------
    float
        ``inf``, the full model, if no threshold qualifies.

    Raises
    ------
    RiskcalError
        For a row whose loss rises with the threshold (naming the first), NaN, a loss above ``upper``, or a delta that is
        not below it.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> ever_worse = np.maximum.accumulate(runs.losses("textual"), axis=1)
    >>> riskcal.monotone.conformal_risk_control(ever_worse, runs.thresholds, delta=0.1)
    0.5
    """
    values = _validate.array(losses, "losses", ndim=(2,))
    low, high = _validate.bounds(min(0.0, float(values.min())), upper)
    tolerated = _validate.tolerance(delta, low, high)
    matrix, grid = _falling(values, thresholds, low, high)
    qualifies = (matrix.sum(0) + high) / (len(matrix) + 1) <= tolerated
    return _lowest(grid, qualifies)


def rcps(
    losses: ArrayLike,
    thresholds: ArrayLike,
    delta: float,
    epsilon: float = 0.05,
    bound: str | Method = "convex_order",
    *,
    lower: float = 0.0,
    upper: float = 1.0,
) -> float:
    """Risk-controlling prediction sets (Bates et al. 2021): the lowest threshold from which on every bound is at most delta.

    Parameters
    ----------
    losses : (n, k)
        Independent rows, each of which never rises with the threshold; within [lower, upper].
    thresholds : (k,)
        One per column, distinct and finite, fixed before the data were seen.
    delta : float
        Tolerated expected loss, in the loss's own units.
    epsilon : float
        Probability, over the draw of the calibration data, that the expected loss at the returned threshold exceeds delta.
    bound : str or Method
        Name of a bound in `riskcal.bounds`, or the test whose inversion it is (``riskcal.pvalues.Betting()``), each taken at
        epsilon: no correction for the number of thresholds is due.
        ``"betting"`` and ``"predictable_bernstein"`` use the rows in the order given, which must not depend on their content.
    lower, upper : float
        Known bounds of the losses, fixed beforehand.

    Returns
    -------
    float
        ``inf``, the full model, if not even the highest threshold qualifies.

    Raises
    ------
    RiskcalError
        For a row whose loss rises with the threshold (naming the first), an unknown bound, and what the bound refuses.

    Notes
    -----
    Asking that all larger thresholds pass makes this the fixed sequence from the highest threshold down, with the same
    p-values: a bound is at most delta exactly where its test rejects. So the guarantee needs no monotone losses, and
    `riskcal.calibrate` gives it for any losses; without the clause a bound that is not monotone itself would break it.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> ever_worse = np.maximum.accumulate(runs.losses("textual"), axis=1)  # of this and all higher thresholds
    >>> riskcal.monotone.rcps(ever_worse, runs.thresholds, delta=0.1)
    0.55
    """
    test = inverted(bound, "bound")
    level = _validate.level(epsilon, "epsilon")
    low, high = _validate.bounds(lower, upper)
    matrix, grid = _falling(losses, thresholds, low, high)
    test.refuse_bounds(low, high, "bound", test.bound)
    p = test.pvalues(matrix, delta, level=level, lower=low, upper=high)
    return _lowest(grid, fwer.fixed_sequence(p, level))


def risk_rises(
    losses: ArrayLike,
    thresholds: ArrayLike,
    *,
    epsilon: float = 0.05,
    lower: float = 0.0,
    upper: float = 1.0,
) -> pd.DataFrame:
    """Pairs of thresholds between which the risk rises with the threshold by more than noise.

    Parameters
    ----------
    losses : (n, k)
        Independent rows, in an order that does not depend on their content; within [lower, upper].
    thresholds : (k,)
        One per column, distinct and finite.
    epsilon : float
        Probability of naming any pair at all if the risk never rises.
    lower, upper : float
        Known bounds of the losses.

    Returns
    -------
    DataFrame
        One row per offending pair: ``threshold``, ``higher_threshold``, the mean ``loss`` and ``higher_loss`` at the two,
        their difference ``rise`` and its ``pvalue``; empty if the data do not contradict a falling risk.

    Raises
    ------
    RiskcalError
        For fewer than two thresholds, NaN, or losses outside the bounds.

    Notes
    -----
    Each prompt's two losses are subtracted and `riskcal.pvalues.betting` tests that the mean difference is not a rise:
    exact, whatever the losses' distribution. Compared are thresholds 1, 2, 4, 8, ... places apart, since a slow rise shows
    between no two neighbours, each at epsilon over the number of pairs. No rise found does not mean that there is none.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.monotone.risk_rises(runs.losses("textual"), runs.thresholds).empty
    True
    """
    found = _rising_pairs(losses, thresholds, epsilon=epsilon, lower=lower, upper=upper)
    columns = ["threshold", "higher_threshold", "loss", "higher_loss", "rise", "pvalue"]
    table = pd.DataFrame(found, columns=columns, dtype=np.float64)
    return table.sort_values(["threshold", "higher_threshold"], ascending=False, ignore_index=True)


def _rising_pairs(
    losses: ArrayLike,
    thresholds: ArrayLike,
    *,
    epsilon: float = 0.05,
    lower: float = 0.0,
    upper: float = 1.0,
) -> list[tuple[float, ...]]:
    """The rows of `risk_rises`, in no order: a table of none would take as long to make as the tests."""
    level = _validate.level(epsilon, "epsilon")
    low, high = _validate.bounds(lower, upper)
    matrix, grid = _descending(losses, thresholds, low, high)
    k = grid.size
    if k < 2:
        raise RiskcalError("thresholds: one only; a rise needs at least two.")
    distances = [2**i for i in range(k.bit_length()) if 2**i < k]
    level /= sum(k - distance for distance in distances)
    mean = matrix.mean(0)
    found: list[tuple[float, ...]] = []
    for distance in distances:
        p = np.atleast_1d(
            pvalues.betting(  # of the lower threshold's loss minus the higher one's
                matrix[:, distance:] - matrix[:, :-distance],
                0.0,
                level=level,
                lower=low - high,
                upper=high - low,
            )
        )
        for j in np.flatnonzero(p <= level):
            i = j + distance
            found.append((grid[i], grid[j], mean[i], mean[j], mean[j] - mean[i], p[j]))
    return found


def _descending(
    losses: ArrayLike, thresholds: ArrayLike, lower: float, upper: float
) -> tuple[Floats, Floats]:
    """Losses and thresholds with columns from the highest threshold down."""
    grid = _validate.threshold_grid(thresholds, allow_full=False)
    matrix = _validate.losses(
        _validate.array(losses, "losses", ndim=(2,)), lower=lower, upper=upper
    )
    if matrix.shape[1] != grid.size:
        raise RiskcalError(
            f"thresholds: {grid.size} given for {matrix.shape[1]} columns of losses; give one per column."
        )
    order = np.argsort(-grid, kind="stable")
    in_order = bool((np.diff(order) == 1).all())  # as `calibrate` keeps them: no copy then
    return matrix if in_order else np.take(matrix, order, axis=1), grid[order]


def _falling(
    losses: ArrayLike, thresholds: ArrayLike, lower: float, upper: float
) -> tuple[Floats, Floats]:
    """As `_descending`, refusing a row whose loss rises with the threshold."""
    matrix, grid = _descending(losses, thresholds, lower, upper)
    rises = np.diff(matrix, axis=1) < -_validate.TOLERANCE * (upper - lower)
    if rises.any():
        row, j = (int(i) for i in np.argwhere(rises)[0])
        raise RiskcalError(
            f"losses: in row {row} the loss rises from {matrix[row, j + 1]:g} to {matrix[row, j]:g} as the threshold rises "
            f"from {grid[j + 1]:g} to {grid[j]:g}; this needs losses that are monotone in every row. Use riskcal.calibrate."
        )
    return matrix, grid


def _lowest(grid: Floats, passes: NDArray[np.bool_]) -> float:
    return float(grid[passes][-1]) if passes.any() else math.inf
