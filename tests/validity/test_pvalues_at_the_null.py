"""Every p-value is super-uniform where the expected loss is exactly delta: 20,000 samples per cell, from fixed seeds.

A level u is exceeded if the share of p-values up to u is above ``u + 3.5 SE`` with ``SE = sqrt(u (1 - u) / draws)``: .0015
at .05, .0035 at .5. So errors of more than a tenth of u are seen at all levels from .05 on (3.5 SE is .0054 there), given
that the bound is sharp in the cell. Where it is (binomial just below its atoms, betting on coins) the tests at the end
shrink each p-value by 10 % and show that the very same check then fails.
"""

import functools
import math

import numpy as np
import pytest
from scipy import stats

from helpers import bernoulli, rare, zero_inflated
from riskcal import pvalues

DRAWS = 20_000
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
DELTA = 0.1


def beta(rng, mean, shape):
    return rng.beta(10 * mean, 10 * (1 - mean), shape)


def two_points(rng, mean, shape):
    """As far from a coin as can be: .2 or nothing."""
    return 0.2 * (rng.random(shape) < 5 * mean)


DISTRIBUTIONS = {f.__name__: f for f in (bernoulli, beta, zero_inflated, rare, two_points)}
TESTS = {
    "hoeffding": pvalues.hoeffding,
    "bentkus": pvalues.bentkus,
    "hoeffding_bentkus": pvalues.hoeffding_bentkus,
    "convex_order": pvalues.convex_order,
    "empirical_bernstein": pvalues.empirical_bernstein,
    "predictable_bernstein at .05": functools.partial(pvalues.predictable_bernstein, level=0.05),
    "betting at .05": functools.partial(pvalues.betting, level=0.05),
    "betting at .01": functools.partial(pvalues.betting, level=0.01),
    "betting at .3": functools.partial(pvalues.betting, level=0.3),
}


@functools.cache
def sample(name, n, delta=DELTA, seed=0):
    losses = DISTRIBUTIONS[name](np.random.default_rng([seed, n, len(name)]), delta, (n, DRAWS))
    losses.flags.writeable = False
    return losses


def exceeded(p, levels=LEVELS):
    """The levels at which p-values are too small too often, beyond 3.5 standard errors."""
    found = {}
    for u in levels:
        share, error = float((p <= u).mean()), math.sqrt(u * (1 - u) / len(p))
        if share > u + 3.5 * error:
            found[u] = f"{share:.4f}, standard error {error:.4f}"
    return found


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_samples_have_mean_delta(name):
    """Else the cells below would not be at the null."""
    losses = sample(name, 200)
    assert losses.min() >= 0
    assert losses.max() <= 1
    assert abs(losses.mean() - DELTA) < 4 * losses.std() / math.sqrt(losses.size)


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("test", TESTS)
def test_no_level_is_exceeded_at_the_null(test, name, n):
    p = TESTS[test](sample(name, n), DELTA)
    assert exceeded(p) == {}


@pytest.mark.parametrize("level", [0.05, 0.01])
def test_betting_on_paired_differences_holds_its_level(level):
    """Bounds that straddle zero, where the bettor starts from a twentieth of the variance: 80 % ties, else half up or down."""
    rng = np.random.default_rng(7)
    for n in (30, 200):
        u = rng.random((n, DRAWS))
        losses = np.where(u < 0.15, 0.5, np.where(u < 0.2, -0.5, 0.0))  # mean .05
        assert abs(losses.mean() - 0.05) < 0.001
        assert exceeded(pvalues.betting(losses, 0.05, level=level, lower=-1.0, upper=1.0)) == {}


def levels_below_atoms(n, delta):
    """Just below an atom of the exact test a share equal to the atom before it is rejected; shrunk by 10 %, the atom itself."""
    atoms = stats.binom.cdf(np.arange(n + 1), n, delta)
    return [0.91 * a for a in atoms if 0.15 < a < 0.6]


@pytest.mark.parametrize(("n", "delta"), [(30, 0.1), (30, 0.5), (200, 0.1), (200, 0.5)])
def test_the_exact_test_reaches_its_level_at_its_atoms_and_exceeds_none(n, delta):
    p = pvalues.binomial(sample("bernoulli", n, delta), delta)
    assert exceeded(p, [*LEVELS, *levels_below_atoms(n, delta)]) == {}
    for atom in stats.binom.cdf(np.arange(n + 1), n, delta):
        if atom > 0.01:
            share = (p <= atom * (1 + 1e-9)).mean()
            assert abs(share - atom) < 4.5 * math.sqrt(atom * (1 - atom) / DRAWS) + 1e-12


def rejections(level, shrink, draws=200_000, n=200):
    """How many of 200,000 coin samples at the null betting rejects, tuned and tested at one level."""
    rng, count = np.random.default_rng(11), 0
    for _ in range(0, draws, DRAWS):
        losses = bernoulli(rng, DELTA, (n, DRAWS))
        count += int((shrink * pvalues.betting(losses, DELTA, level=level) <= level).sum())
    return count / draws


def test_betting_at_its_customary_level_holds_it_with_ten_times_the_draws():
    """Standard error .0005. The share is .046 of .05: sharp enough that 10 % too small a p-value is seen (next test)."""
    share = rejections(0.05, 1.0)
    assert share <= 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / 200_000)
    assert share > 0.04


# The checks above would fail if the bounds were 10 % too small


@pytest.mark.parametrize(("n", "delta"), [(30, 0.1), (30, 0.5), (200, 0.1), (200, 0.5)])
def test_an_exact_test_ten_percent_too_small_would_be_caught(n, delta):
    p = 0.9 * pvalues.binomial(sample("bernoulli", n, delta), delta)
    levels = levels_below_atoms(n, delta)
    assert len(levels) >= 2
    assert set(exceeded(p, levels)) == set(levels)


def test_betting_a_fifth_too_small_would_be_caught():
    """Its p-values stand at level / 1.15 or are not small, so that a tenth would change no decision."""
    assert rejections(0.05, 0.8) > 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / 200_000)


@pytest.mark.parametrize("delta", [0.1, 0.3, 0.5])
def test_betting_a_fifth_too_small_would_be_caught_at_high_levels_with_few_draws(delta):
    """Not at .5: a mean that is not below delta is never certified, which alone takes half of the draws."""
    p = pvalues.betting(sample("bernoulli", 200, delta), delta, level=0.3)
    assert exceeded(p) == {}
    assert 0.3 in exceeded(0.8 * p)


# Power


def test_betting_has_six_times_the_power_of_hoeffding_bentkus_on_text_losses():
    """Zero-inflated losses of risk .8 delta, n = 500, level .05; standard error at most .0056."""
    losses = zero_inflated(np.random.default_rng(1), 0.08, (500, 8000))
    power = (pvalues.betting(losses, 0.1, level=0.05) <= 0.05).mean()
    calm = (pvalues.hoeffding_bentkus(losses, 0.1) <= 0.05).mean()
    sharper = (pvalues.convex_order(losses, 0.1) <= 0.05).mean()
    assert power >= 0.65
    assert 0.09 <= calm <= 0.135
    assert 0.18 <= sharper <= 0.24


@pytest.mark.parametrize(
    ("name", "n", "ratio", "least"),
    [
        ("bernoulli", 500, 0.75, 0.56),
        ("rare", 500, 0.75, 0.58),
        ("beta", 500, 0.88, 0.75),
        ("zero_inflated", 100, 0.6, 0.48),
    ],
)
def test_the_power_of_betting_on_other_losses(name, n, ratio, least):
    losses = DISTRIBUTIONS[name](np.random.default_rng(2), ratio * DELTA, (n, 6000))
    assert (pvalues.betting(losses, DELTA, level=0.05) <= 0.05).mean() >= least
