"""What `test_worlds.py` leaves out in the eight worlds: every p-value at every level, every other procedure, every sequence.

Each world has a candidate a hair above delta (the other four above it are plainly worse; in the world of dependent candidates
all six are at it), so that the level is nearly used up. A count of violations is held against the exact binomial distribution
at the nominal level: it must not exceed what is exceeded with the probability of three standard errors, .00135.
"""

import math

import numpy as np
import pytest
from scipy import stats

import riskcal
from helpers import COINS, TUNED_TESTS, VALID_TESTS, rows_to_certify
from laboratory import worlds
from riskcal import RiskMonitor, Runs, fwer, monotone

EPSILON, N, DRAWS = 0.1, 120, 3000


@pytest.fixture(scope="module", params=worlds.WORLDS)
def world(request):
    return worlds.WORLDS[request.param]()


@pytest.fixture(scope="module")
def losses(world):
    """Independent samples of 120 prompts, (120, draws * k)."""
    return world.sample_many(N, DRAWS, generator(world))


def generator(world, *key):
    names = [make().name for make in worlds.WORLDS.values()]
    return np.random.default_rng([names.index(world.name), *key])


def most(level, draws):
    """A binomial count of this level exceeds it with probability .00135 at most."""
    return stats.binom.isf(stats.norm.sf(3), draws, level)


def available(world):
    coins = world.name in {worlds.WORLDS[name]().name for name in COINS}
    return [name for name in VALID_TESTS if coins or name != "binomial"]


def evaluated(name, world, losses, levels):
    """P-values (draws, k), each candidate's tuned at its own level."""
    by_draw = losses.reshape(len(losses), -1, world.k)
    p = np.empty(by_draw.shape[1:])
    for level in np.unique(levels):
        chosen = levels == level
        options = {} if name == "binomial" else {"lower": world.lower, "upper": world.upper}
        options |= {"level": float(level)} if name in TUNED_TESTS else {}
        columns = by_draw[:, :, chosen].reshape(len(losses), -1)
        p[:, chosen] = VALID_TESTS[name](columns, world.delta, **options).reshape(-1, chosen.sum())
    return p


def test_every_p_value_is_super_uniform_at_every_level(world, losses):
    """At each candidate whose risk is above delta: 3,000 draws, six levels, betting tuned at two of them."""
    above, found = world.risk > world.delta, {}
    for name in available(world):
        for tuned in (0.1, 0.02) if name in TUNED_TESTS else (0.1,):
            p = evaluated(name, world, losses, np.full(world.k, tuned))[:, above]
            for level in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
                count = int((p <= level).sum(0).max())
                if count > most(level, DRAWS):
                    found[name, tuned, level] = count / DRAWS
    assert found == {}


def shares(k):
    """Weights of a graph: most for the first, none for the last two."""
    return np.r_[0.4, np.full(k - 3, 0.6 / (k - 3)), 0.0, 0.0]


def edges(k):
    return np.random.default_rng(k).dirichlet(np.ones(k), k) * (1 - np.eye(k))


#: Levels to tune at, (k,), and what is rejected.
PROCEDURES = {
    "two starts": (lambda k: np.full(k, EPSILON / 2), lambda p: fwer.fixed_sequence(p, EPSILON, 2)),
    "k starts": (
        lambda k: np.full(k, EPSILON / k),
        lambda p: fwer.fixed_sequence(p, EPSILON, p.size),
    ),
    "fallback": (
        lambda k: fwer.initial_levels(EPSILON, shares(k)),
        lambda p: fwer.fallback(p, EPSILON, shares(p.size)),
    ),
    "graphical": (
        lambda k: fwer.initial_levels(EPSILON, shares(k), edges(k)),
        lambda p: fwer.graphical(p, EPSILON, shares(p.size), edges(p.size)),
    ),
}


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_starts_fallback_and_graphs_certify_falsely_at_most_epsilon_of_the_time(
    procedure, world, losses
):
    """Betting, tuned where each hypothesis is first tested, and the exact test or the sharpest of sums: 3,000 draws."""
    levels, select = PROCEDURES[procedure]
    above, found = world.risk > world.delta, {}
    for name in ("betting", "binomial" if "binomial" in available(world) else "convex_order"):
        p = evaluated(name, world, losses, levels(world.k))
        false = sum(bool((select(row) & above).any()) for row in p[(p[:, above] <= EPSILON).any(1)])
        if false > most(EPSILON, DRAWS):
            found[name] = false / DRAWS
    assert found == {}


@pytest.mark.parametrize("procedure", ["pilot_order", "pareto"])
def test_orders_that_a_pilot_chooses_certify_falsely_at_most_epsilon_of_the_time(procedure, world):
    """The whole of `calibrate`, which splits off the pilot itself: 60 draws, of which .23 may fail."""
    rng, draws, false = generator(world, 1), 60, 0
    risk = dict(zip(world.thresholds, world.risk, strict=True))
    for _ in range(draws):
        table = riskcal.calibrate(
            world.sample(N, rng),
            thresholds=world.thresholds,
            delta=world.delta,
            epsilon=EPSILON,
            procedure=procedure,
            pilot_fraction=0.25,
            lower=world.lower,
            upper=world.upper,
        ).table
        false += any(risk[t] > world.delta for t in table.loc[table["certified"], "threshold"])
    assert false <= most(EPSILON, draws)


@pytest.mark.parametrize("name", ["signed", "non_monotone", "dependent"])
def test_every_delta_of_a_list_holds_at_once(name):
    """Deltas a hair below each candidate's risk, so that every one is at its border: 60 draws, .23 may fail.

    What `calibrate` uses for a list, simultaneous bounds, is tested in all eight worlds by `test_bounds_validity.py`.
    """
    world = worlds.WORLDS[name]()
    rng, draws, false = generator(world, 2), 60, 0
    deltas = np.unique(world.risk * (1 - 1e-9))
    risk = dict(zip(world.thresholds, world.risk, strict=True))
    for _ in range(draws):
        found = riskcal.calibrate(
            world.sample(N, rng),
            thresholds=world.thresholds,
            delta=deltas.tolist(),
            epsilon=EPSILON,
            lower=world.lower,
            upper=world.upper,
        )
        false += any(
            risk[t] > c.delta for c in found for t in c.table.loc[c.table["certified"], "threshold"]
        )
    assert false <= most(EPSILON, draws)


def test_two_risks_at_once():
    """One non-monotone, one signed, at the border at the same candidate: 60 draws."""
    text, task = worlds.non_monotone(), worlds.signed()
    above, rng, draws, false = (
        (text.risk > text.delta) | (task.risk > task.delta),
        np.random.default_rng(3),
        60,
        0,
    )
    for _ in range(draws):
        change = task.sample(N, rng)
        full = (
            change.min(1, keepdims=True) < 0
        ) * 1.0  # each prompt gains at all candidates or loses at all
        runs = Runs.from_arrays(
            thresholds=np.r_[text.thresholds, math.inf],
            dissimilarity=np.c_[text.sample(N, rng), np.zeros(N)],
            risk=np.c_[full + change, full],
        )
        table = riskcal.calibrate(
            runs,
            delta={"textual": text.delta, "risk": task.delta},
            epsilon=EPSILON,
            procedure="holm",
        ).table
        false += bool((table["certified"].to_numpy() & above).any())
    assert false <= most(EPSILON, draws)


def test_strata_that_share_epsilon_are_right_together():
    """Two strata of the binary world, each with candidates at the border: 60 draws."""
    world, rng, draws, false = worlds.binary(), np.random.default_rng(4), 60, 0
    group = np.array(["a", "b"])[np.arange(2 * N) % 2]
    for _ in range(draws):
        runs = Runs.from_arrays(
            thresholds=world.thresholds, dissimilarity=world.sample(2 * N, rng), group=group
        )
        found = riskcal.calibrate_groups(runs, delta=world.delta, epsilon=EPSILON)
        false += any(
            (c.table["certified"].to_numpy() & (world.risk > world.delta)).any()
            for c in found.values()
        )
    assert false <= most(EPSILON, draws)


@pytest.mark.parametrize("bets", ["combined", "mixture", "hedged"])
def test_a_calibration_that_may_stop_at_any_time_holds_epsilon(bets, world, losses):
    """`AdaptiveCalibration`'s capital after every one of 120 prompts, candidates in sequence: 1,500 draws."""
    draws = DRAWS // 2
    bounds = {"lower": world.lower, "upper": world.upper}
    arrived = (
        rows_to_certify(
            losses[:, : draws * world.k], world.delta, level=EPSILON, bets=bets, **bounds
        )
        > 0
    )
    certified = np.logical_and.accumulate(arrived.reshape(draws, world.k), axis=1)
    assert (certified & (world.risk > world.delta)).any(1).sum() <= most(EPSILON, draws)
    alone = arrived.reshape(draws, world.k)[:, world.risk > world.delta].sum(0)
    assert alone.max() <= most(EPSILON, draws)


def monotone_in_every_row(world):
    return bool((np.diff(world.sample(500, generator(world, 5)), axis=1) >= -1e-12).all())


def test_six_of_the_worlds_are_monotone_in_every_row():
    """So that the two tests below are about all that RCPS and conformal risk control accept."""
    assert sum(monotone_in_every_row(make()) for make in worlds.WORLDS.values()) == 6


@pytest.mark.parametrize(
    "bound", ["betting", "convex_order", "empirical_bernstein", "predictable_bernstein"]
)
def test_rcps_holds_epsilon_where_it_applies_and_refuses_elsewhere(bound, world):
    """300 draws; its p-values at all bounds are those of the first test of this file."""
    rng, draws, false = generator(world, 6), 300, 0
    options = {"bound": bound, "lower": world.lower, "upper": world.upper}
    if not monotone_in_every_row(world):
        with pytest.raises(riskcal.RiskcalError, match="monotone in every row"):
            monotone.rcps(world.sample(N, rng), world.thresholds, world.delta, EPSILON, **options)
        return
    unsafe = world.thresholds[world.risk > world.delta].max()
    for _ in range(draws):
        false += (
            monotone.rcps(world.sample(N, rng), world.thresholds, world.delta, EPSILON, **options)
            <= unsafe
        )
    assert false <= most(EPSILON, draws)


def test_conformal_risk_control_keeps_the_expectation_where_it_applies(world):
    """500 draws: the mean of the true risks at the thresholds returned, at most delta + 3 standard errors."""
    if not monotone_in_every_row(world):
        with pytest.raises(riskcal.RiskcalError, match="monotone in every row"):
            monotone.conformal_risk_control(
                world.sample(N, generator(world)), world.thresholds, world.delta
            )
        return
    rng = generator(world, 7)
    full = 0.0 if world.lower == 0.0 else world.delta  # the full model is as good as asked
    risk = dict(zip(world.thresholds, world.risk, strict=True)) | {math.inf: full}
    found = [
        risk[
            monotone.conformal_risk_control(
                world.sample(N, rng), world.thresholds, world.delta, world.upper
            )
        ]
        for _ in range(500)
    ]
    assert np.mean(found) <= world.delta + 3 * np.std(found) / math.sqrt(len(found))


def test_a_risk_that_never_rises_is_reported_as_rising_at_most_epsilon_of_the_time(world):
    """300 draws; in the one world whose risk does rise, it is found more often than that."""
    rng, draws = generator(world, 8), 300
    bounds = {"lower": world.lower, "upper": world.upper}
    found = sum(
        not monotone.risk_rises(
            world.sample(N, rng), world.thresholds, epsilon=EPSILON, **bounds
        ).empty
        for _ in range(draws)
    )
    if (np.diff(world.risk) >= -1e-12).all():
        assert found <= most(EPSILON, draws)
    else:
        assert found > draws / 2


def test_the_monitor_raises_a_false_alarm_at_most_epsilon_of_the_time(world):
    """1,000 streams of 500 losses at delta itself, from the candidate a hair above it."""
    streams = world.sample_many(500, 1000, generator(world, 9))
    border = int(np.argmin(np.abs(world.risk - world.delta)))
    bounds = {"lower": world.lower, "upper": world.upper}
    alarms = sum(
        RiskMonitor(world.risk[border], epsilon=EPSILON, **bounds).update(stream).alarm
        for stream in np.ascontiguousarray(streams[:, border :: world.k].T)
    )
    assert alarms <= most(EPSILON, 1000)


# Laws on two points, searched for the worst


def two_point_laws(rng, count):
    """Low, high and the share of high, of mean delta; the ends of the range are drawn often."""
    for _ in range(count):
        delta = rng.uniform(0.02, 0.6)
        low = delta * rng.choice([0.0, rng.random(), 1 - rng.random() ** 4])
        high = delta + (1 - delta) * rng.choice([1.0, rng.random(), rng.random() ** 4])
        yield delta, low, high, (delta - low) / (high - low)


@pytest.mark.parametrize("bets", ["combined", "mixture", "hedged"])
def test_no_two_point_null_breaks_a_calibration_that_may_stop_at_any_time(bets):
    """Of 60 laws, 400 draws of 50 prompts each, the worst four once more with 10,000 fresh draws."""
    rng = np.random.default_rng(51)

    def count(law, draws):
        delta, low, high, share = law
        sample = np.where(rng.random((50, draws)) < share, high, low)
        return int((rows_to_certify(sample, delta, level=EPSILON, bets=bets) > 0).sum())

    suspects = sorted(
        two_point_laws(np.random.default_rng(52), 60), key=lambda law: count(law, 400)
    )[-4:]
    worst = max(count(law, 10_000) for law in suspects)
    assert worst <= most(EPSILON, 10_000)
    assert worst > 0.4 * EPSILON * 10_000  # the search does reach hard cases


def test_no_two_point_null_breaks_the_monitor():
    """Of 30 laws, 80 streams of 1,000 losses each, the worst two once more with 1,500 fresh streams."""
    rng = np.random.default_rng(53)

    def count(law, draws):
        delta, low, high, share = law
        sample = np.where(rng.random((draws, 1000)) < share, high, low)
        return sum(RiskMonitor(delta, epsilon=EPSILON).update(stream).alarm for stream in sample)

    suspects = sorted(
        two_point_laws(np.random.default_rng(54), 30), key=lambda law: count(law, 80)
    )[-2:]
    worst = max(count(law, 1500) for law in suspects)
    assert worst <= most(EPSILON, 1500)
    assert worst > 0.5 * EPSILON * 1500
