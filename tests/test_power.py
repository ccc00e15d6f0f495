"""The default test is strong where users need it: small deltas, rare large losses. ``benchmarks/power.py`` has the whole grid."""

import numpy as np
import pytest

from riskcal import pvalues


def draws(law: str, mean: float, n: int, k: int) -> np.ndarray:
    rng = np.random.default_rng([n, k])
    if law == "coins":
        return (rng.random((n, k)) < mean) * 1.0
    largest = {"zero-inflated": 1.0, "zero-inflated / 4": 0.25}[law]
    return np.where(rng.random((n, k)) < 2 * mean / largest, largest * rng.random((n, k)), 0.0)


@pytest.mark.parametrize(
    ("delta", "mean", "n", "level", "k", "least"),
    [
        (0.01, 0.003, 2_000, 0.05, 2_000, 0.975),  # was .72
        (0.001, 0.0003, 20_000, 0.05, 500, 0.96),  # was .60
        (0.02, 0.008, 1_500, 0.0025, 2_000, 0.80),  # was .28, where the exact test has .86
        (0.05, 0.02, 100, 0.05, 4_000, 0.37),  # was .33, where the exact test has .40
    ],
)
def test_rare_failures_do_not_take_all_that_a_quiet_stretch_has_won(
    delta: float, mean: float, n: int, level: float, k: int, least: float
) -> None:
    """k samples: standard errors of .004 to .009, of which ``least`` leaves three."""
    losses = draws("coins", mean, n, k)
    betting = (pvalues.betting(losses, delta, level=level) <= level).mean()
    assert betting >= least
    assert betting >= (pvalues.convex_order(losses, delta) <= level).mean() - 0.02


@pytest.mark.parametrize("law", ["coins", "zero-inflated", "zero-inflated / 4"])
@pytest.mark.parametrize("level", [0.05, 0.0025])
@pytest.mark.parametrize(("delta", "n"), [(0.01, 1_500), (0.02, 700), (0.1, 200)])
def test_never_below_the_order_free_test_by_more_than_noise(
    law: str, level: float, delta: float, n: int
) -> None:
    """2,000 common samples: the difference's standard error is at most .011."""
    losses = draws(law, 0.5 * delta, n, 2_000)
    betting = pvalues.betting(losses, delta, level=level) <= level
    order_free = pvalues.convex_order(losses, delta) <= level
    assert betting.mean() >= order_free.mean() - 0.02


@pytest.mark.parametrize("level", [0.05, 0.0025])
@pytest.mark.parametrize(("delta", "n"), [(0.001, 4_000), (0.01, 400), (0.05, 100), (0.3, 60)])
@pytest.mark.parametrize("largest", [1.0, 0.25])
def test_at_the_null_it_rejects_no_more_than_its_level(
    level: float, delta: float, n: int, largest: float
) -> None:
    """20,000 samples whose mean loss is exactly delta (10,000 at .001): three standard errors are at most .0066 and .0015."""
    if delta / largest > 1:
        pytest.skip("a mean of delta is not possible with losses of this size")
    k = 10_000 if delta < 0.005 else 20_000
    rng = np.random.default_rng([n, int(1 / level), int(4 * largest)])
    rejected = 0
    for _ in range(10):
        losses = (rng.random((n, k // 10)) < delta / largest) * largest
        rejected += int((pvalues.betting(losses, delta, level=level) <= level).sum())
    assert rejected / k <= level + 3 * np.sqrt(level * (1 - level) / k)
