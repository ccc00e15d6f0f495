"""The simulated worlds say the truth about themselves, the limit is the exact one, and what riskcal certifies holds in them."""

import math

import numpy as np
import pytest
from scipy import stats

from helpers import COINS, allowed
from laboratory import worlds
from laboratory.limit import _best_bet, neyman_pearson_power, power_limit, share_of_limit
from laboratory.validity import clopper_pearson, validity
from riskcal import RiskcalError, Runs, fwer, pvalues

EPSILON, DRAWS, N = 0.1, 3000, 120
TESTS = {name: getattr(pvalues, name) for name in pvalues.BY_NAME}
EVERY = worlds.WORLDS | {
    "monotone": worlds.steady,
    "monotone_100": lambda: worlds.steady(100),
    "low_bump": lambda: worlds.bump(0.075),
    "high_bump": lambda: worlds.bump(0.13),
}


@pytest.fixture(scope="module", params=EVERY.values(), ids=EVERY)
def world(request):
    return request.param()


def test_the_stated_risk_is_the_mean_of_a_large_sample(world):
    """100,000 prompts; with up to 100 candidates, which all depend on each other, four standard errors are rare."""
    losses = world.sample(100_000, np.random.default_rng(3))
    assert losses.shape == (100_000, world.k)
    assert losses.min() >= world.lower
    assert losses.max() <= world.upper
    error = losses.std(axis=0) / math.sqrt(len(losses))
    assert (np.abs(losses.mean(axis=0) - world.risk) <= 4 * error + 1e-9).all()


def test_candidates_stand_in_order_with_their_savings(world):
    assert world.thresholds.shape == world.risk.shape == world.saving.shape == (world.k,)
    assert (np.diff(world.thresholds) < 0).all()
    assert (np.diff(world.saving) > 0).all()
    assert world.oracle() == world.saving[world.risk <= world.delta].max(initial=0.0)


def test_samples_follow_from_the_generator_and_stand_side_by_side(world):
    first, again = (world.sample_many(7, 3, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (7, 3 * world.k)
    alone = world.sample(21, np.random.default_rng(1))
    np.testing.assert_array_equal(first.reshape(7, 3, world.k), alone.reshape(7, 3, world.k))


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_each_of_the_eight_worlds_has_a_candidate_just_above_delta(name):
    world = worlds.WORLDS[name]()
    wrong = world.risk[world.risk > world.delta]
    assert wrong.min() == pytest.approx(world.delta, rel=1e-8)


def test_the_monotone_world_has_the_published_curves():
    world = worlds.steady()
    np.testing.assert_allclose(world.thresholds[[0, 1, -1]], [0.95, 0.95 - 0.9 / 19, 0.05])
    np.testing.assert_allclose(world.risk, 0.35 * (1 - world.thresholds) ** 1.5)
    np.testing.assert_allclose(world.saving, 0.7 * (1 - world.thresholds**0.8))
    losses = world.sample(500, np.random.default_rng(0))
    assert (np.diff(losses, axis=1) >= 0).all()
    nonzero = losses[:, -1][losses[:, -1] > 0]
    assert stats.kstest(nonzero, stats.beta(2, 3).cdf).pvalue > 0.001


def test_bumps_stand_where_they_should():
    low, high = worlds.bump(0.075), worlds.bump(0.13)
    inside = (low.thresholds > 0.72) & (low.thresholds < 0.85)
    assert inside.any()
    assert (low.risk[inside] == 0.075).all()
    assert (high.risk[inside] > high.delta).all()
    assert (high.risk[~inside] == worlds.steady().risk[~inside]).all()


# The limit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 20, 150, 1000])
@pytest.mark.parametrize("make", [worlds.sparse, worlds.binary])
def test_the_limit_for_binary_losses_is_the_exact_randomised_binomial_test(make, n):
    world = make()
    counts = np.arange(n + 1)
    size = stats.binom.cdf(counts, n, world.delta)
    last = int(np.searchsorted(size, 0.05))
    below = size[last - 1] if last else 0.0
    share = (0.05 - below) / stats.binom.pmf(last, n, world.delta)
    safe = world.risk[world.risk < world.delta]
    expected = stats.binom.cdf(last - 1, n, safe) + share * stats.binom.pmf(last, n, safe)
    found = power_limit(world, n)
    np.testing.assert_allclose(found.power[: safe.size], expected, rtol=1e-9)
    assert np.isnan(found.power[safe.size :]).all()
    steps = np.diff(world.saving[: safe.size], prepend=0.0)
    assert found.saving == pytest.approx(float(steps @ expected))
    assert found.oracle == world.oracle()


def test_the_tilt_has_mean_delta_inside_the_interval_and_at_its_end():
    for values, weights in [
        (np.array([0.0, 1.0]), np.array([0.95, 0.05])),
        (np.array([0.0, 0.3]), np.array([0.9, 0.1])),
        (np.array([0.02, 0.05, 0.08]), np.array([0.2, 0.5, 0.3])),
    ]:
        bet = _best_bet(values, weights, 0.1)
        null = weights / (1 + bet * (0.1 - values))
        missing = 1 - null.sum()
        assert missing >= -1e-9
        assert null @ values + missing == pytest.approx(0.1, abs=1e-9)


def test_the_limit_of_constant_losses_is_known_in_closed_form():
    """All losses are 0: the null puts delta on 1, so that n zeros have probability (1 - delta)^n."""
    for n, expected in [(10, 0.05 / 0.9**10), (40, 1.0)]:
        assert neyman_pearson_power(np.zeros(1), np.ones(1), n, 0.1, 0.05) == pytest.approx(
            expected
        )


def test_the_limit_grows_with_n_epsilon_and_delta_and_stays_below_the_oracle():
    world = worlds.steady()
    by_n = [power_limit(world, n).saving for n in (50, 200, 800)]
    assert by_n == sorted(by_n)
    assert by_n[-1] < world.oracle()
    assert power_limit(world, 200, epsilon=0.2).saving > by_n[1]
    assert power_limit(world, 200, delta=0.2).saving > by_n[1]
    power = power_limit(world, 200).power
    assert (np.diff(power[~np.isnan(power)]) <= 0).all()


def test_no_test_exceeds_the_limit():
    """2,000 draws, n = 100: the betting test's power is below the Neyman-Pearson power of every safe candidate."""
    world = worlds.steady()
    p = pvalues.betting(
        world.sample_many(100, 2000, np.random.default_rng(4)), world.delta, level=0.05
    )
    rejected = (p <= 0.05).reshape(2000, world.k).mean(axis=0)
    power = power_limit(world, 100).power
    safe = world.risk < world.delta
    assert (rejected[safe] <= power[safe] + 4 * np.sqrt(0.25 / 2000)).all()


@pytest.mark.parametrize(
    "make", [worlds.non_monotone, worlds.dependent, lambda: worlds.bump(0.075)]
)
def test_the_limit_is_refused_where_its_argument_fails(make):
    with pytest.raises(RiskcalError, match="monotone kind"):
        power_limit(make(), 100)


def test_efficiency_counts_a_false_certificate_as_no_more_than_the_oracle():
    world = worlds.steady()
    safe = world.risk <= world.delta
    everything, nothing = np.ones((1, world.k), dtype=bool), np.zeros((1, world.k), dtype=bool)
    found = share_of_limit(world, np.r_[everything, nothing, safe[None], nothing], n=200)
    assert found.saving == pytest.approx(world.oracle() / 2)
    assert found.efficiency == pytest.approx(found.saving / power_limit(world, 200).saving)
    assert found.violation_rate == 0.25
    assert found.standard_error == pytest.approx(
        world.oracle() * math.sqrt(1 / 3) / 2 / found.limit
    )
    own = share_of_limit(world, safe[None], n=200, limit=world.oracle())
    assert own.efficiency == 1
    with pytest.raises(RiskcalError, match="certified"):
        share_of_limit(world, safe, n=200)


def test_the_default_reaches_its_certification_efficiency():
    """1,500 draws of 100 prompts (SE .0055); benchmarks/efficiency.py measures more of it, and CALM's test beside it."""
    world = worlds.steady()
    losses = world.sample_many(100, 1500, np.random.default_rng(12))
    p = pvalues.betting(losses, world.delta, level=0.05).reshape(1500, world.k)
    found = share_of_limit(world, np.logical_and.accumulate(p <= 0.05, axis=1), n=100)
    assert found.efficiency + 3 * found.standard_error >= 0.91
    assert found.efficiency - 3 * found.standard_error <= 1
    assert found.violation_rate <= allowed(0.05, 1500)


# Validity ------------------------------------------------------------------------------------------------------------


def in_sequence(losses, world, test="betting"):
    options = {"level": EPSILON} if test == "betting" else {}
    p = TESTS[test](losses, world.delta, lower=world.lower, upper=world.upper, **options)
    return fwer.fixed_sequence(p, EPSILON)


def test_validity_counts_what_a_loop_counts():
    world = worlds.binary()
    found = validity(world, lambda x: x.mean(axis=0) <= world.delta, n=40, trials=200, seed=9)
    rng = np.random.default_rng(9)
    wrong = world.risk > world.delta
    expected = sum(
        bool((world.sample(40, rng).mean(axis=0) <= world.delta)[wrong].any()) for _ in range(200)
    )
    assert found.violations == expected
    assert found.rate == expected / 200
    exact = stats.binomtest(expected, 200).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == (pytest.approx(exact.low), pytest.approx(exact.high))


@pytest.mark.parametrize(
    ("count", "low", "high"), [(0, 0.0, None), (30, None, 1.0), (7, None, None)]
)
def test_the_interval_is_clopper_and_pearsons(count, low, high):
    found = clopper_pearson(count, 30, 0.99)
    exact = stats.binomtest(count, 30).proportion_ci(0.99, method="exact")
    assert found == (pytest.approx(exact.low), pytest.approx(exact.high))
    assert low is None or found[0] == low
    assert high is None or found[1] == high


def test_validity_finds_the_naive_rule_out_and_clears_the_default():
    for make in worlds.WORLDS.values():
        world = make()
        naive = validity(world, lambda x, w=world: x.mean(axis=0) <= w.delta, n=N, trials=150)
        ours = validity(world, lambda x, w=world: in_sequence(x, w), n=N, trials=150)
        assert naive.low > EPSILON, world
        assert ours.low <= EPSILON, world


@pytest.mark.parametrize(
    ("decide", "message"),
    [(lambda x: x.mean(axis=0), "float64"), (lambda x: np.ones(2, dtype=bool), r"\(2,\)")],
)
def test_a_decision_of_the_wrong_kind_is_refused(decide, message):
    with pytest.raises(RiskcalError, match=message):
        validity(worlds.binary(), decide, n=10, trials=2)


@pytest.mark.parametrize("name", worlds.WORLDS)
def test_certificates_hold_in_the_eight_worlds(name):
    """Every test with every procedure, 3,000 draws of 120 prompts at epsilon .1 (SE .0055; an error of .125 is found)."""
    world = worlds.WORLDS[name]()
    losses = world.sample_many(N, DRAWS, np.random.default_rng(sorted(worlds.WORLDS).index(name)))
    known = {"lower": world.lower, "upper": world.upper}
    wrong = world.risk > world.delta
    found = {}
    for test in TESTS:
        if test == "binomial" and name not in COINS:
            continue
        levels = (EPSILON, EPSILON / world.k) if test == "betting" else (EPSILON,)
        for level in levels:
            options = {"level": level} if test == "betting" else {}
            options |= {} if test == "binomial" else known
            p = TESTS[test](losses, world.delta, **options).reshape(DRAWS, world.k)
            prefix = np.logical_and.accumulate(p <= EPSILON, axis=1)
            found[test, level, "fixed_sequence"] = prefix
            found[test, level, "bonferroni"] = p <= EPSILON / world.k
            for procedure in (fwer.holm, fwer.hochberg):
                certified = np.zeros(p.shape, dtype=bool)
                # elsewhere neither rejects anything
                for i in np.flatnonzero(p.min(axis=1) <= EPSILON):
                    certified[i] = procedure(p[i], EPSILON)
                found[test, level, procedure.__name__] = certified
    rates = {key: float((certified & wrong).any(axis=1).mean()) for key, certified in found.items()}
    assert max(rates.values()) <= allowed(EPSILON, DRAWS), rates


NAN = {
    "a world's delta": lambda: worlds.steady(delta=math.nan),
    "risk": lambda: worlds.bump(math.nan),
    "the oracle's delta": lambda: worlds.binary().oracle(math.nan),
    "the limit's delta": lambda: power_limit(worlds.binary(), 100, math.nan),
    "validity's delta": lambda: validity(
        worlds.binary(), lambda x: x.mean(0) < 1, n=5, delta=math.nan
    ),
    "n": lambda: validity(worlds.binary(), lambda x: x.mean(0) < 1, n=math.nan),
    "seed": lambda: validity(worlds.binary(), lambda x: x.mean(0) < 1, n=5, seed=math.nan),
    "efficiency's delta": lambda: share_of_limit(
        worlds.binary(), np.ones((2, 8), bool), n=5, delta=math.nan
    ),
}


@pytest.mark.parametrize("name", NAN)
def test_nan_is_refused_and_never_counts_as_no_violation(name):
    with pytest.raises(RiskcalError, match=f"^{name.split()[-1]}: .*(?i:nan)"):
        NAN[name]()


# Records as a world --------------------------------------------------------------------------------------------------


def test_records_are_a_world_of_their_own():
    rng = np.random.default_rng(0)
    thresholds = np.array([math.inf, 0.8, 0.4])
    losses = np.c_[np.zeros(50), rng.random((50, 2)) * [0.1, 0.4]]
    layers = np.c_[np.full(50, 8.0), rng.uniform([4.0, 2.0], [5.0, 3.0], (50, 2))]
    runs = Runs.from_arrays(thresholds=thresholds, dissimilarity=losses, layers=layers)
    world = worlds.recorded(runs, delta=0.1)
    np.testing.assert_allclose(world.risk, losses[:, 1:].mean(axis=0))
    np.testing.assert_allclose(world.saving, 1 - layers[:, 1:].mean(axis=0) / 8)
    sample = world.sample(5000, rng)
    assert {tuple(row) for row in sample} <= {tuple(row) for row in runs.losses()}
    error = sample.std(axis=0) / math.sqrt(5000)
    assert (np.abs(sample.mean(axis=0) - world.risk) <= 4 * error).all()
    assert world.oracle() == world.saving[0]
    with pytest.raises(RiskcalError, match="seconds"):
        worlds.recorded(runs, delta=0.1, cost="seconds")
    with pytest.raises(RiskcalError, match="measure"):
        worlds.recorded(
            Runs.from_frame(runs.to_frame().assign(measure=lambda t: t["threshold"].astype(str))),
            delta=0.1,
        )
