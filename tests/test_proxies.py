"""A proxy of the loss, known of requests that nobody labelled: power where it is good, no harm where it lies."""

import numpy as np
import pytest

from riskcal import pvalues

DELTA, LEVEL = 0.1, 0.05


def even(rng, shape):
    """Losses that are mostly zero, else even up to .8: mean .1."""
    return np.where(rng.random(shape) < 0.25, 0.8 * rng.random(shape), 0.0)


def coins(rng, shape):
    return (rng.random(shape) < DELTA).astype(float)


PROXIES = {
    "good": lambda losses, rng: losses + 0.1 * rng.standard_normal(losses.shape),
    "useless": lambda losses, rng: rng.random(losses.shape),
    "lying": lambda losses, rng: 1 - losses + 0.1 * rng.standard_normal(losses.shape),
    "the loss": lambda losses, rng: losses,
    "heavy": lambda losses, rng: losses * rng.pareto(1.2, losses.shape),
}


def drawn(law, proxy, n, m, draws, rng, *, scale=1.0):
    """Losses, proxies and unlabelled proxies of so many draws, one a column."""
    both = scale * law(rng, (n + m, draws))
    known = PROXIES[proxy](both, rng)
    return both[:n], known[:n], known[n:]


@pytest.mark.parametrize("law", [even, coins])
@pytest.mark.parametrize("proxy", PROXIES)
def test_false_rejections_at_the_boundary(law, proxy):
    """2,000 draws at a mean of exactly delta: at most .05 and three standard errors (.015)."""
    given = drawn(law, proxy, 120, 300, 2000, np.random.default_rng(1))
    p = pvalues.betting_with_proxy(*given, DELTA, level=LEVEL)
    assert (p <= LEVEL).mean() <= 0.065


def test_a_good_proxy_gives_power_and_an_idle_one_takes_none():
    """300 draws, mean .08, paired: a difference of .3 has a standard error of .027, that of the idle proxy is below .01."""
    rng = np.random.default_rng(2)
    for proxy, least in (("good", 0.2), ("lying", 0.2), ("useless", -0.01)):
        losses, *known = drawn(even, proxy, 300, 3000, 300, rng, scale=0.8)
        plain = pvalues.betting(losses, DELTA, level=LEVEL) <= LEVEL
        helped = pvalues.betting_with_proxy(losses, *known, DELTA, level=LEVEL) <= LEVEL
        assert helped.mean() - plain.mean() >= least, proxy


def test_small_samples_lose_nothing_to_the_wider_range():
    """Forty zeros, which plain bets certify at their cap, are certified with any proxy."""
    rng = np.random.default_rng(3)
    losses = np.zeros((40, 1))
    p = pvalues.betting_with_proxy(losses, rng.random(40), rng.random(400), DELTA, level=LEVEL)
    assert p == pvalues.betting(losses, DELTA, level=LEVEL) <= LEVEL


def test_a_constant_proxy_changes_no_bet_and_a_scale_is_of_no_account():
    rng = np.random.default_rng(4)
    losses, proxy, unlabelled = drawn(even, "good", 300, 900, 20, rng, scale=0.8)
    plain = pvalues.betting(losses, DELTA, level=LEVEL)
    constant = pvalues.betting_with_proxy(losses, 0 * proxy, 0 * unlabelled, DELTA, level=LEVEL)
    assert constant == pytest.approx(plain, rel=1e-9)
    helped = pvalues.betting_with_proxy(losses, proxy, unlabelled, DELTA, level=LEVEL)
    moved = pvalues.betting_with_proxy(
        losses, 5 - 8 * proxy, 5 - 8 * unlabelled, DELTA, level=LEVEL
    )
    assert helped == pytest.approx(moved, rel=1e-6)
    assert (helped != plain).any()
