"""What several tests share: one definition of each world, list and yardstick."""

import functools
import math
from collections.abc import Callable
from typing import Any

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
