"""Seconds that a batch costs, fitted to measured times: a step, and a call of a layer on so many rows.

`riskcal.efficiency.batch_work` counts a batch's steps and calls from its exits; what is fitted here turns them into time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from riskcal import RiskcalError, internal
from riskcal.efficiency import BatchWork


@dataclass(frozen=True)
class BatchCosts:
    """Seconds that decoding a batch costs.

    Attributes
    ----------
    sizes : tuple of m int
        Numbers of rows, ascending.
    call : tuple of m float
        Seconds of calling a layer on so many rows, its confidence included. It is no straight line from one row on: one row
        is read against all weights, many are a product of matrices. It is a straight line from size to size, and beyond the
        last as between the last two; fewer rows than the first size cost as much as that, and with one size so do all.
    step : float
        Of a step: embedding, choosing tokens, bookkeeping.
    """

    sizes: tuple[int, ...]
    call: tuple[float, ...]
    step: float

    def seconds(self, work: BatchWork) -> float:
        """Predicted time of a batch, its encoding not included."""
        steps = np.diff(self.call, prepend=0.0)
        return float(_call_shares(work, self.sizes) @ steps) + self.step * work.steps


def _call_shares(work: BatchWork, sizes: Sequence[int]) -> NDArray[np.float64]:
    """(m,) of what a piecewise linear cost adds from one size to the next, how often this work pays it."""
    rows = np.asarray(work.rows, dtype=np.float64)
    shares = [float(rows.size)]
    for place, (low, high) in enumerate(itertools.pairwise(sizes)):
        last = place == len(sizes) - 2
        shares.append(float(np.clip((rows - low) / (high - low), 0.0, None if last else 1.0).sum()))
    return np.array(shares)


def fit_batch_costs(works: Sequence[BatchWork], seconds: ArrayLike) -> BatchCosts:
    """Costs that explain measured times best.

    Parameters
    ----------
    works : sequence of n BatchWork
        From `riskcal.efficiency.batch_work`, of batches of the sizes that will be served, several batches of each. Fit modes
        apart, as a regrouped call gathers its rows first, and without the full model, which never looks at a confidence.
    seconds : (n,)
        Measured times of these batches, encoding not included; medians over repetitions serve best.

    Returns
    -------
    BatchCosts
        For the sizes of the largest calls of these works. None negative, none falling with the size, of least squared
        relative error.

    Raises
    ------
    RiskcalError
        If times are not above 0, or the works do not tell the costs apart: batches of several depths do.
    """
    times = internal.array(seconds, "seconds", ndim=(1,))
    if len(works) != times.size:
        raise RiskcalError(
            f"seconds: {times.size} given for {len(works)} batches; give one time per batch."
        )
    if (bad := times <= 0).any():
        raise RiskcalError(
            f"seconds: {times[bad][0]:g} at index {internal.first(bad)}; a time is above 0."
        )
    sizes = sorted({max(work.rows) for work in works})
    counts = np.array(
        [[*_call_shares(work, sizes), work.steps] for work in works], dtype=np.float64
    )
    relative = counts / times[:, None]
    if np.linalg.matrix_rank(relative / np.linalg.norm(relative, axis=0)) < counts.shape[1]:
        raise RiskcalError(
            f"works: {len(works)} batches do not tell the costs of steps and of calls of {len(sizes)} sizes apart; time more "
            "batches, at policies that exit at different depths."
        )
    (*increments, step), _ = optimize.nnls(relative, np.ones(times.size))
    return BatchCosts(tuple(sizes), tuple(np.cumsum(increments).tolist()), float(step))
