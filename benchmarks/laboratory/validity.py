"""How often a procedure breaks its guarantee, counted in a world whose truth is known."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from laboratory.worlds import World
from riskcal import RiskcalError, internal
from riskcal.internal import Floats


class Validity(NamedTuple):
    """How often a procedure certified a candidate whose expected loss is above delta."""

    violations: int
    trials: int
    rate: float
    low: float  # Clopper-Pearson interval of the rate
    high: float


def validity(
    world: World,
    decide: Callable[[Floats], ArrayLike],
    *,
    n: int,
    trials: int = 1000,
    seed: int = 0,
    delta: float | None = None,
    confidence: float = 0.95,
) -> Validity:
    """How often a procedure breaks its guarantee, in a world whose truth is known.

    Parameters
    ----------
    world : World
    decide : callable
        From losses (n, k), columns from the highest threshold down, to which candidates are certified, boolean (k,).
    n : int
        Prompts per trial.
    trials : int
        Independent samples.
    seed : int
    delta : float, optional
        Tolerance that ``decide`` tests; default the world's own.
    confidence : float
        Of the exact (Clopper-Pearson) interval.

    Returns
    -------
    Validity
        A trial counts as a violation if any certified candidate's expected loss is above delta. A procedure that holds
        epsilon has a rate of at most epsilon, so that an interval wholly above it is evidence of a defect.
    """
    n, trials = internal.count(n, "n", least=1), internal.count(trials, "trials", least=1)
    level = internal.level(confidence, "confidence")
    wrong = world.risk > (world.delta if delta is None else internal.number(delta, "delta"))
    rng = np.random.default_rng(internal.count(seed, "seed", least=0))
    violations = 0
    for _ in range(trials):
        certified = np.asarray(decide(world.sample(n, rng)))
        if certified.shape != wrong.shape or certified.dtype != np.bool_:
            raise RiskcalError(
                f"decide: returned an array of shape {certified.shape} and type {certified.dtype}; it must say for each of "
                f"the {world.k} candidates whether it is certified, true or false."
            )
        violations += bool((certified & wrong).any())
    low, high = clopper_pearson(violations, trials, level)
    return Validity(violations, trials, violations / trials, low, high)


def clopper_pearson(count: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a binomial share (Clopper and Pearson 1934)."""
    tail = (1.0 - confidence) / 2.0
    low = special.betaincinv(count, trials - count + 1, tail) if count > 0 else 0.0
    high = special.betaincinv(count + 1, trials - count, 1.0 - tail) if count < trials else 1.0
    return float(low), float(high)
