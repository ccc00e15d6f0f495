"""What several tests share: one definition of each world, list and yardstick."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from riskcal import pvalues

#: Every p-value whose guarantee holds in finite samples.
VALID_TESTS: dict[str, Callable[..., Any]] = {
    "hoeffding": pvalues.hoeffding,
    "bentkus": pvalues.bentkus,
    "hoeffding_bentkus": pvalues.hoeffding_bentkus,
    "convex_order": pvalues.convex_order,
    "empirical_bernstein": pvalues.empirical_bernstein,
    "predictable_bernstein": pvalues.predictable_bernstein,
    "betting": pvalues.betting,
    "binomial": pvalues.binomial,
}
#: Those that ask for the level at which they will be read.
TUNED_TESTS = ("betting", "predictable_bernstein")
#: Worlds of the laboratory whose losses are 0 or 1, which `pvalues.binomial` needs.
COINS = ("sparse", "binary", "dependent")


def tuned_at(level: float) -> dict[str, Callable[..., Any]]:
    """`VALID_TESTS`, all called with losses, delta and bounds alone."""
    return {
        name: functools.partial(test, level=level) if name in TUNED_TESTS else test
        for name, test in VALID_TESTS.items()
    }


def allowed(level: float, draws: int) -> float:
    """The share of errors up to which a Monte Carlo test accepts a true rate of ``level``: three standard errors above it."""
    return level + 3 * math.sqrt(level * (1 - level) / draws)


def varied(name: str, values: list[object], n: int = 80) -> pd.DataFrame:
    """Candidates that differ in their thresholds and in one more column, of which the second value is cheaper."""
    return pd.DataFrame(
        [
            {
                "prompt": f"p{i}",
                "threshold": t,
                name: value,
                "dissimilarity": 0.0,
                "layers": 4.0 - j + t,
            }
            for i in range(n)
            for t in (0.9, 0.5)
            for j, value in enumerate(values)
        ]
    )


# worlds: losses with a given expectation


def bernoulli(rng, mean, shape):
    return (rng.random(shape) < mean).astype(float)


def zero_inflated(rng, mean, shape):
    """0, or Beta(2, 3): like the distance of a text to the full model's."""
    losses = (rng.random(shape) < mean / 0.4).astype(float)
    losses[losses > 0] = rng.beta(2, 3, int(losses.sum()))
    return losses


def rare(rng, mean, shape):
    """Mostly 0, seldom small, more seldom 1."""
    u = rng.random(shape)
    return np.where(u < 0.9 * mean, 1.0, np.where(u < 1.9 * mean, rng.uniform(0, 0.2, shape), 0.0))
