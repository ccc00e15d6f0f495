"""Monte Carlo checks of `RiskMonitor` and `AdaptiveCalibration`, at true expected losses of exactly delta and beyond.

Every test says how many draws it makes; a share of false alarms or certificates must not exceed its level by more than three
standard errors, ``3 sqrt(level (1 - level) / draws)``. As a script (``PYTHONPATH=tests``), this prints
the tables of docs/sequential.md.
"""

import math
import zlib

import numpy as np
import pytest

from helpers import bernoulli, rare, rows_to_certify, zero_inflated
from riskcal.monitor import RiskMonitor

DELTA, EPSILON = 0.1, 0.05
BETS = ("combined", "mixture", "hedged")


# worlds: losses with a given expectation, given the past


def nearly_constant(rng, mean, shape):
    return rng.beta(200 * mean, 200 * (1 - mean), shape)


def dependent(rng, mean, shape):
    """The mean give or take a fifth; after a coin that decided which, Bernoulli. The past sets the spread, not the mean."""
    coin = rng.random(shape) < 0.5
    wild = np.zeros(shape, dtype=bool)
    wild[1:] = coin[:-1]
    return np.where(wild, bernoulli(rng, mean, shape), np.where(coin, 1.2, 0.8) * mean)


WORLDS = (zero_inflated, bernoulli, nearly_constant, rare, dependent)
NAMED = {"ids": lambda world: world.__name__}


def generator(*key):
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


def assert_rate_at_most(errors, level):
    draws = len(errors)
    assert np.mean(errors) <= level + 3 * math.sqrt(level * (1 - level) / draws), (
        f"{np.mean(errors):.4f} of {draws}"
    )


# RiskMonitor


def false_alarms(world, draws=1500, n=20_000):
    """Whether Ville's alarm is ever raised in n losses at the boundary."""
    rng = generator("ville", world.__name__)
    return [
        RiskMonitor(DELTA, epsilon=EPSILON).update(world(rng, DELTA, (n,))).alarm
        for _ in range(draws)
    ]


def run_lengths(world, length, draws, horizon):
    """Losses to the false alarm at the boundary, cut off at ``horizon`` times the stated length (which lowers the mean)."""
    rng = generator("run length", world.__name__, length)
    lengths = []
    for _ in range(draws):
        monitor = RiskMonitor(DELTA, average_run_length=length)
        while not monitor.alarm and monitor.n < horizon * length:
            monitor.update(world(rng, DELTA, (2 * length,)))
        lengths.append(min(monitor.alarm_at or horizon * length, horizon * length))
    return np.array(lengths)


def delays(world, kind, ratio, good=0, draws=400):
    """Losses of mean ``ratio delta`` to the alarm, after ``good`` ones of mean 0.7 delta; earlier alarms left out."""
    rng = generator("delay", world.__name__, ratio, good)
    result = []
    for _ in range(draws):
        monitor = RiskMonitor(DELTA, **kind)
        if good:
            monitor.update(world(rng, 0.7 * DELTA, (good,)))
        if not monitor.alarm:
            monitor.update(world(rng, ratio * DELTA, (6000 if "epsilon" in kind else 3000,)))
            result.append(monitor.alarm_at - good if monitor.alarm else math.inf)
    return float(np.median(result))


@pytest.mark.parametrize("world", WORLDS, **NAMED)
def test_ville_false_alarm_probability(world):
    """1,500 streams of 20,000 losses: a probability above 0.067 would be noticed."""
    assert_rate_at_most(false_alarms(world), EPSILON)


def test_ville_false_alarm_probability_of_signed_losses():
    """1,500 streams of 5,000 differences of mean 0.02 in [-1, 1], four fifths of them ties."""
    rng = generator("signed")
    steps = rng.choice([-1.0, 0.0, 1.0], (1500, 5000), p=[0.09, 0.8, 0.11])
    assert_rate_at_most([RiskMonitor(0.02, lower=-1.0).update(row).alarm for row in steps], EPSILON)


@pytest.mark.parametrize("length", [20, 500, 5000])
@pytest.mark.parametrize("world", [zero_inflated, bernoulli, dependent], **NAMED)
def test_mean_run_length_of_the_detector(world, length):
    """400 streams, cut off at 20 times the stated length; the standard error is a twentieth of the mean."""
    lengths = run_lengths(world, length, 400, 20)
    assert lengths.mean() >= length - 3 * lengths.std(ddof=1) / math.sqrt(len(lengths))


# Medians measured with bets of 0.1, 0.25, 0.5, 1 and 2 at delta 0.1, for losses of 1.2, 1.5, 2 and 3 delta.
RATIOS = (1.2, 1.5, 2.0, 3.0)
REFERENCE = {
    (zero_inflated, "ville", 0): (644, 108, 37, 16),
    (zero_inflated, "detector", 0): (560, 162, 66, 31),
    (bernoulli, "ville", 0): (1504, 256, 71, 25),
    (bernoulli, "detector", 0): (892, 300, 113, 47),
    (zero_inflated, "ville", 3000): (6000, 2686, 1290, 629),
    (zero_inflated, "detector", 3000): (512, 145, 60, 27),
    (bernoulli, "ville", 3000): (6000, 3294, 1525, 738),
    (bernoulli, "detector", 3000): (811, 267, 98, 42),
}
KINDS = {"ville": {"epsilon": EPSILON}, "detector": {"average_run_length": 5000}}


@pytest.mark.parametrize(
    "case", REFERENCE, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}"
)
def test_detection_delay(case):
    """Medians of 400 streams, whose error is about 5%: at most 15% above the reference."""
    world, kind, good = case
    for ratio, reference in zip(RATIOS, REFERENCE[case], strict=True):
        if reference < 6000:  # beyond, it never alarmed within the 6,000 losses
            assert delays(world, KINDS[kind], ratio, good) <= 1.15 * reference + 1


def shadow(rng, requests):
    """A fifth of the requests are hard, of mean 0.5, and always evaluated; the others, of mean 0, at rate 0.1."""
    hard = rng.random(requests) < 0.2
    rates = np.where(hard, 1.0, 0.1)
    sampled = rng.random(requests) < rates
    return np.where(hard, bernoulli(rng, 0.5, requests), 0.0)[sampled], rates[sampled]


def test_rates_that_depend_on_the_request():
    """500 streams of 10,000 requests of mean loss exactly delta. Without the rates nearly all alarms are false."""
    rng = generator("shadow")
    weighted, plain, estimates = [], [], []
    for _ in range(500):
        losses, rates = shadow(rng, 10_000)
        monitor = RiskMonitor(DELTA, sampling_rate=0.1).update(losses, rates=rates)
        weighted.append(monitor.alarm)
        estimates.append(monitor.mean_loss)
        plain.append(RiskMonitor(DELTA, sampling_rate=0.1).update(losses).alarm)
    assert_rate_at_most(weighted, EPSILON)
    assert abs(np.mean(estimates) - DELTA) < 3 * np.std(estimates) / math.sqrt(500)
    assert np.mean(plain) > 0.95


def test_rates_keep_the_run_length():
    """300 streams: the mean number of evaluated requests to a false alarm."""
    rng, lengths = generator("shadow run length"), []
    for _ in range(300):
        monitor = RiskMonitor(DELTA, average_run_length=300, sampling_rate=0.1)
        while not monitor.alarm and monitor.n < 6000:
            losses, rates = shadow(rng, 2000)
            monitor.update(losses, rates=rates)
        lengths.append(min(monitor.alarm_at or 6000, 6000))
    assert np.mean(lengths) >= 300 - 3 * np.std(lengths, ddof=1) / math.sqrt(300)


def merged_alarms(losses, how, step):
    """Whether the fleet's merged alarm is raised at any of the times at which it is merged; losses (n, shards)."""
    shards = [RiskMonitor(DELTA) for _ in range(losses.shape[1])]
    for start in range(0, len(losses), step):
        for s, shard in enumerate(shards):
            shard.update(losses[start : start + step, s])
        if RiskMonitor.merge(shards, how=how).alarm:
            return True
    return False


@pytest.mark.parametrize("how", ["product", "mean"])
@pytest.mark.parametrize("world", [bernoulli, dependent], **NAMED)
def test_merged_alarms(world, how):
    """300 fleets of four shards, merged after every 100 losses each until 1,500."""
    rng = generator("merge", world.__name__, how)
    assert_rate_at_most(
        [merged_alarms(world(rng, DELTA, (1500, 4)), how, 100) for _ in range(300)], EPSILON
    )


def test_losses_that_depend_across_shards():
    """200 fleets of six shards that see the same loss at the same time: only the mean allows for that."""
    rng = generator("same losses")
    same = [np.repeat(bernoulli(rng, DELTA, (1500, 1)), 6, axis=1) for _ in range(200)]
    assert np.mean([merged_alarms(losses, "product", 100) for losses in same]) > 0.2
    assert_rate_at_most([merged_alarms(losses, "mean", 100) for losses in same], EPSILON)


def test_merged_run_length():
    """300 fleets of three detectors, merged after every ten losses each: the mean joint number of losses to the alarm."""
    rng, lengths = generator("merged run length"), []
    for _ in range(300):
        shards = [RiskMonitor(DELTA, average_run_length=300) for _ in range(3)]
        merged = RiskMonitor.merge(shards)
        while not merged.alarm and merged.n < 6000:
            for shard in shards:
                shard.update(bernoulli(rng, DELTA, 10))
            merged = RiskMonitor.merge(shards)
        lengths.append(merged.n)
    assert np.mean(lengths) >= 300 - 3 * np.std(lengths, ddof=1) / math.sqrt(300)


# AdaptiveCalibration


def rows(world, ratio, bets, *, n=1000, draws=3000, key=""):
    """Prompts until one candidate of mean ``ratio delta`` is certified, 0 where it never is; one column per draw."""
    losses = world(generator("adaptive", world.__name__, ratio, key), ratio * DELTA, (n, draws))
    return rows_to_certify(losses, DELTA, level=EPSILON, bets=bets)


@pytest.mark.parametrize("bets", BETS)
@pytest.mark.parametrize("world", WORLDS, **NAMED)
def test_error_when_stopped_at_the_most_favourable_time(world, bets):
    """3,000 draws of 1,000 prompts: a probability above 0.062 would be noticed."""
    assert_rate_at_most(rows(world, 1.0, bets) > 0, EPSILON)


@pytest.mark.parametrize("bets", BETS)
def test_error_of_signed_losses(bets):
    """3,000 draws of 1,000 differences of mean 0.02 in [-1, 1], nine tenths of them ties."""
    steps = generator("signed", bets).choice([-1.0, 0.0, 1.0], (1000, 3000), p=[0.04, 0.9, 0.06])
    assert_rate_at_most(
        rows_to_certify(steps, 0.02, level=EPSILON, bets=bets, lower=-1.0) > 0, EPSILON
    )


@pytest.mark.parametrize("bets", BETS)
@pytest.mark.parametrize("comonotone", [True, False], ids=["comonotone", "independent"])
def test_error_of_five_candidates_in_sequence(bets, comonotone):
    """1,500 draws: is any of the three candidates at or above delta certified, in the sequence of five, at any time?"""
    rng, means = generator("sequence", bets, comonotone), np.array([0.02, 0.06, 0.1, 0.1, 0.12])
    n, draws = 600, 1500
    shape = (n, draws, 1) if comonotone else (n, draws, 5)
    losses = np.where(rng.random(shape) < means / 0.4, rng.beta(2, 3, shape), 0.0)
    reached = (
        rows_to_certify(losses.reshape(n, -1), DELTA, level=EPSILON, bets=bets).reshape(draws, 5)
        > 0
    )
    certified = np.logical_and.accumulate(reached, axis=1)
    assert certified[:, 1].mean() > 0.9
    assert_rate_at_most(certified[:, 2:].any(1), EPSILON)


def test_an_order_by_content_would_break_it():
    """Why the order is dictated: 50 samples sorted by their losses, true mean exactly delta."""
    losses = np.sort(zero_inflated(generator("sorted"), DELTA, (300, 50)), axis=0)
    assert (rows_to_certify(losses, DELTA, level=EPSILON) > 0).all()


MARGINS = (0.3, 0.5, 0.7, 0.8, 0.9)
# Mean prompts used of 2,000 and share certified, with constant bets of .05, .1, .2, .4, .8, and by the hedger.
PROMPTS = {
    zero_inflated: {
        "mixture": ((84, 1), (138, 1), (348, 1), (740, 0.975), (1614, 0.393)),
        "hedged": ((341, 1), (473, 1), (756, 1), (1084, 0.999), (1676, 0.727)),
    },
    bernoulli: {
        "mixture": ((113, 1), (239, 1), (694, 0.984), (1285, 0.70), (1799, 0.19)),
        "hedged": ((480, 1), (671, 1), (1078, 1), (1472, 0.914), (1852, 0.454)),
    },
}


def usage(world, ratio, bets, draws=400):
    """Mean number of prompts used of 2,000, and the share certified."""
    needed = rows(world, ratio, bets, n=2000, draws=draws, key="usage")
    return np.where(needed > 0, needed, 2000).mean(), (needed > 0).mean()


@pytest.mark.parametrize("world", PROMPTS, **NAMED)
def test_prompts_used(world):
    """400 draws per cell: means within 8% of the reference (errors 2 to 4%), shares within three standard errors."""
    for i, ratio in enumerate(MARGINS):
        used, share = {}, {}
        for bets in BETS:
            used[bets], share[bets] = usage(world, ratio, bets)
        for bets, reference in PROMPTS[world].items():
            assert used[bets] <= 1.08 * reference[i][0]
            expected = reference[i][1]
            assert (
                share[bets]
                >= expected - 3 * math.sqrt(max(expected * (1 - expected), 0.001) / 400) - 0.02
            )
        # the default: nearly as quick as the mixture where that is quick, nearly as strong as the hedger by the end
        assert used["combined"] <= 1.25 * min(used["mixture"], used["hedged"])
        assert share["combined"] >= max(share["mixture"], share["hedged"]) - 0.15


def print_tables():
    for world in (zero_inflated, bernoulli):
        alarms, name = false_alarms(world, 4000), world.__name__
        print(
            f"{name}: false alarms in 20,000 losses {np.mean(alarms):.4f} (SE {np.std(alarms) / 4000**0.5:.4f})"
        )
        lengths = run_lengths(world, 5000, 1000, 20)
        error, cut = lengths.std() / 1000**0.5, (lengths == 100_000).sum()
        print(
            f"{name}: mean run length {lengths.mean():.0f} (SE {error:.0f}), {cut} of 1000 cut off"
        )
    for world, kind, good in REFERENCE:
        cells = [f"{delays(world, KINDS[kind], ratio, good, 1000):g}" for ratio in RATIOS]
        reference = REFERENCE[world, kind, good]
        print(
            f"{world.__name__}: delay of {kind} after {good}: {' / '.join(cells)} (reference {reference})"
        )
    for world in PROMPTS:
        for bets in BETS:
            error = (rows(world, 1.0, bets, draws=20_000) > 0).mean()
            cells = [
                "{:.0f} ({:.3f})".format(*usage(world, ratio, bets, 2000)) for ratio in MARGINS
            ]
            print(f"{world.__name__}: {bets}: error {error:.4f}; prompts {' | '.join(cells)}")


if __name__ == "__main__":
    print_tables()
