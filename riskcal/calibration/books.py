"""Which thresholds of several classes are tested together: the cheapest on a pilot, from cautious to bold."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from riskcal._validate import Floats, RiskcalError
from riskcal.fwer import Pareto

#: Books that are looked at, at most, where a joint budget ties the classes together.
_MOST = 1_000_000


class Pilot(NamedTuple):
    """What a pilot says of one class, its k candidates and then the full model.

    Attributes
    ----------
    share : float
        Of the pilot's requests.
    loss, square : (k + 1,)
        Mean loss and mean square of it, 0 for the full model.
    cost : (k + 1,)
        Mean cost.
    excess : (k + 1,)
        How far the mean loss stands above the class's budget, in standard errors of what a pilot and a test of these sizes can
        tell; ``-inf`` for the full model, which has nothing to show.
    """

    share: float
    loss: Floats
    square: Floats
    cost: Floats
    excess: Floats


def of_class(
    losses: Floats,
    cost: Floats,
    delta: float,
    upper: float,
    *,
    share: float,
    n_rest: int,
) -> Pilot:
    """Of one class's losses (n, k) and mean costs (k + 1,) on the pilot, ``n_rest`` of whose requests are left to test with."""
    loss, square = _moments(losses, upper)
    excess = standardised(loss, square, delta, len(losses), n_rest)
    excess[-1] = -math.inf
    return Pilot(share, loss, square, cost, excess)


def _moments(losses: Floats, upper: float) -> tuple[Floats, Floats]:
    """Means (k + 1,) of losses (n, k) and of their squares, as if one more request had the worst loss; then the full model's."""
    n = len(losses)
    first = (losses.sum(0) + upper) / (n + 1)
    second = ((losses**2).sum(0) + upper**2) / (n + 1)
    return np.r_[first, 0.0], np.r_[second, 0.0]


def standardised(loss: Floats, square: Floats, delta: float, n_pilot: int, n_rest: int) -> Floats:
    """Means above delta, in standard errors of the difference between the pilot's mean and the test's."""
    variance = np.maximum(square - loss**2, 0.0)
    error = np.sqrt(variance * (1.0 / n_pilot + 1.0 / n_rest))
    with np.errstate(divide="ignore", invalid="ignore"):
        excess: Floats = (loss - delta) / error
    return np.where(error > 0, excess, np.where(loss > delta, math.inf, -math.inf))


def path(
    pilots: Sequence[Pilot], joint: float | None, n_pilot: int, n_rest: int
) -> NDArray[np.intp]:
    """The books (steps, classes) to test, by number of each class's candidate: each the cheapest of its excess or less.

    The excess of a book is that of its worst budget. Books that another beats in excess and cost are left out, as is the one
    of full models alone, with which the path would begin.
    """
    books = _separable(pilots) if joint is None else _all(pilots)
    excess = np.max([one.excess[books[:, c]] for c, one in enumerate(pilots)], axis=0)
    if joint is not None:
        loss = sum(one.share * one.loss[books[:, c]] for c, one in enumerate(pilots))
        square = sum(one.share * one.square[books[:, c]] for c, one in enumerate(pilots))
        own = standardised(np.asarray(loss), np.asarray(square), joint, n_pilot, n_rest)
        full = (books == [len(one.cost) - 1 for one in pilots]).all(1)
        excess = np.maximum(excess, np.where(full, -math.inf, own))
    cost = np.asarray(sum(one.share * one.cost[books[:, c]] for c, one in enumerate(pilots)))
    order = Pareto().chosen(excess, cost)
    front: NDArray[np.intp] = books[order[excess[order] > -math.inf]]
    return front


def _separable(pilots: Sequence[Pilot]) -> NDArray[np.intp]:
    """For every excess that some candidate has: each class's cheapest candidate of that excess or less."""
    levels = np.unique(np.concatenate([one.excess for one in pilots]))
    books = np.empty((len(levels), len(pilots)), dtype=np.intp)
    for c, one in enumerate(pilots):
        order = np.lexsort((one.cost, one.excess))
        best = np.minimum.accumulate(one.cost[order])
        place = np.searchsorted(one.excess[order], levels, side="right") - 1
        # the safest of equally cheap ones
        first = np.searchsorted(-best, -best[place], side="left")
        books[:, c] = order[first]
    return books


def _all(pilots: Sequence[Pilot]) -> NDArray[np.intp]:
    """Every book."""
    sizes = [len(one.cost) for one in pilots]
    if math.prod(sizes) > _MOST:
        raise RiskcalError(
            f"joint: ties {len(sizes)} classes together, of which {math.prod(sizes):,} books can be made (at most {_MOST:,} are "
            "looked at); give fewer candidates, or budgets by class alone."
        )
    return np.stack(np.unravel_index(np.arange(math.prod(sizes)), sizes), axis=1)
