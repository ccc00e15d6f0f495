"""The whole of `calibrate`: over many draws of a calibration set a false certificate is issued at most epsilon of the time.

Worlds whose true risk is known. Some candidates lie a hair above delta, so that the guarantee is nearly used up and an
error of a factor would be seen; the last test shows that it would.
"""

import math

import numpy as np
import pytest

from helpers import allowed
from riskcal import Runs, calibrate, pvalues

DELTA, EPSILON = 0.1, 0.1
GRID = np.linspace(1.0, 0.05, 20)
#: True risks of the candidates: monotone, the last five above delta, the first of these by next to nothing.
RISKS = np.r_[
    np.linspace(0.0, 0.06, 10), np.linspace(0.065, 0.09, 5), DELTA + 1e-9, 0.102, 0.12, 0.2, 0.35
]


def monotone_losses(rng, n):
    """A prompt's loss starts at a random depth and keeps its size: losses rise as the threshold falls."""
    starts, size = rng.random((n, 1)), rng.beta(2, 3, (n, 1))
    return np.where(starts < RISKS / 0.4, size, 0.0)


def scattered_losses(rng, n):
    """The same risks, independent from candidate to candidate: many chances for a false certificate."""
    return np.where(rng.random((n, 20)) < RISKS / 0.4, rng.beta(2, 3, (n, 20)), 0.0)


def violations(world, draws, n, seed, **options):
    """How often some certified candidate has a true risk above delta."""
    rng, count = np.random.default_rng(seed), 0
    for _ in range(draws):
        table = calibrate(
            world(rng, n), thresholds=GRID, delta=DELTA, epsilon=EPSILON, **options
        ).table
        count += bool(table["certified"].to_numpy()[RISKS > DELTA].any())
    return count / draws


@pytest.mark.parametrize(
    ("world", "options", "draws"),
    [
        (monotone_losses, {}, 800),
        (monotone_losses, {"starts": 4}, 300),
        (monotone_losses, {"procedure": "holm"}, 300),
        (monotone_losses, {"test": "convex_order"}, 200),
        (scattered_losses, {}, 300),
        (scattered_losses, {"procedure": "holm"}, 300),
        (scattered_losses, {"procedure": "bonferroni"}, 300),
        (scattered_losses, {"test": "hoeffding_bentkus"}, 200),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_false_certificates_are_at_most_epsilon(world, options, draws):
    assert violations(world, draws, 300, 5, **options) <= allowed(EPSILON, draws)


def test_the_guarantee_holds_from_records_too():
    rng, count, draws = np.random.default_rng(6), 0, 150
    for _ in range(draws):
        losses = monotone_losses(rng, 200)
        names = [f"q{i}" for i in np.argsort(losses.sum(1))]  # ids that follow difficulty
        runs = Runs.from_arrays(thresholds=GRID, dissimilarity=losses, prompts=names)
        count += calibrate(runs, delta=DELTA, epsilon=EPSILON).threshold <= GRID[RISKS > DELTA][0]
    assert count / draws <= allowed(EPSILON, draws)


def test_the_world_uses_the_guarantee_up_so_that_errors_of_a_factor_would_be_seen():
    """At the candidate a hair above delta: one honest look, the best of ten orders of the rows, the empirical rule."""
    draws, rng = 2000, np.random.default_rng(7)
    null = int(np.flatnonzero(RISKS > DELTA)[0])
    losses = np.column_stack([monotone_losses(rng, 300)[:, null] for _ in range(draws)])
    honest = pvalues.betting(losses, DELTA, level=EPSILON) <= EPSILON
    best_of_ten = honest.copy()
    for _ in range(9):
        best_of_ten |= (
            pvalues.betting(losses[rng.permutation(300)], DELTA, level=EPSILON) <= EPSILON
        )
    assert 0.06 < honest.mean() <= allowed(EPSILON, draws)
    assert best_of_ten.mean() > allowed(EPSILON, draws)
    assert (losses.mean(0) <= DELTA).mean() > 0.4


def test_retries_that_pay_for_themselves_stay_below_epsilon_together():
    """Five attempts on fresh samples at the null, with attempt=1..5; without it they are false in a third of the draws."""
    draws, rng, paid, unpaid = 100, np.random.default_rng(8), 0, 0
    for _ in range(draws):
        samples = [np.where(rng.random((200, 1)) < DELTA, 1.0, 0.0) for _ in range(5)]
        options = {"thresholds": [0.5], "delta": DELTA, "epsilon": EPSILON}
        paid += any(calibrate(s, attempt=j + 1, **options).certified for j, s in enumerate(samples))
        unpaid += any(calibrate(s, **options).certified for s in samples)
    assert paid / draws <= allowed(EPSILON, draws)
    assert unpaid / draws > 2 * EPSILON


def test_signed_risk_that_is_truly_delta_is_certified_at_most_epsilon_of_the_time():
    rng, count, draws = np.random.default_rng(9), 0, 300
    for _ in range(draws):
        full = rng.choice([0.25, 0.5], 200)
        change = rng.choice([0.25, -0.25, 0.0], 200, p=[0.2, 0.12, 0.68])  # mean .02
        runs = Runs.from_arrays(thresholds=[0.5, math.inf], risk=np.c_[full + change, full])
        count += calibrate(runs, delta=0.02, epsilon=EPSILON, objective="risk").certified
    assert count / draws <= allowed(EPSILON, draws)
    assert count / draws > 0.03
