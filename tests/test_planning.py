"""Sample sizes come true: drawn from what the message or the plan states, so many units certify as often as it says.

Monte Carlo throughout: 250 draws with fixed seeds, so a share near .8 has a standard error of .025. What is claimed is .05
around the share; asserted is that plus two and a half standard errors.
"""

import dataclasses
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import riskcal
from riskcal import RiskcalError, Runs, _simulation, calibrate, fwer, pvalues
from riskcal.calibration import outlook
from riskcal.calibration import problem as problems
from riskcal.calibration.outlook import Design
from riskcal.fwer.procedures import pilot_size
from riskcal.pvalues import sampled

DRAWS = 250
SLACK = 0.05 + 2.5 * 0.025
TESTS = ["betting", "convex_order", "hoeffding_bentkus", "empirical_bernstein"]


def coins(*rates):
    """0/1 losses; a candidate's failures are among those of every riskier one."""
    return lambda rng, n: (rng.random((n, 1)) < np.array(rates)).astype(float)


def unrelated(*rates):
    """0/1 losses, independent from candidate to candidate."""
    return lambda rng, n: (rng.random((n, len(rates))) < np.array(rates)).astype(float)


def mostly_zero(rate, mean):
    return lambda rng, n: np.where(
        rng.random((n, 1)) < rate, np.minimum(1.0, rng.gamma(2, mean / 2, (n, 1))), 0.0
    )


def close_together(mean, deviation):
    return lambda rng, n: np.clip(rng.normal(mean, deviation, (n, 1)), 0.0, 1.0)


def differences(rng, n):
    """Mostly ties, losses as often as gains."""
    return np.where(rng.random((n, 1)) < 0.2, rng.uniform(-1.0, 1.0, (n, 1)), 0.0)


def grid_for(k):
    return np.linspace(0.9, 0.1, k) if k > 1 else [0.5]


def a_failure(draw, **options):
    """A sample that certifies nothing, its mean below delta, and its calibration; the first of a seeded series."""
    for seed in range(500):
        rng = np.random.default_rng(seed)
        losses = draw(rng, (60, 150, 300, 1000)[seed // 125])
        found = calibrate(losses, thresholds=grid_for(losses.shape[1]), **options)
        if losses.any() and not found.certified and "fresh sample of about" in found.message:
            return losses, found
    raise AssertionError("no seed fails with a number")


def promised(message):
    """The number of fresh units and in what share of draws they certify."""
    size = int(re.search(r"fresh sample of about (\d+)", message)[1])
    share = re.search(r"in (\d+) draws of 100", message)
    return size, 0.8 if share is None else int(share[1]) / 100


def share_certified(losses, size, **options):
    certified = 0
    for seed in range(DRAWS):
        rows = np.random.default_rng(10_000 + seed).integers(0, len(losses), size)
        certified += calibrate(
            losses[rows], thresholds=grid_for(losses.shape[1]), **options
        ).certified
    return certified / DRAWS


@pytest.mark.parametrize("test", ["betting", "convex_order"])
@pytest.mark.parametrize(
    ("draw", "delta", "lower"),
    [
        (coins(0.003), 0.01, 0.0),
        (coins(0.008), 0.02, 0.0),
        (coins(0.05), 0.1, 0.0),
        (coins(0.2), 0.3, 0.0),
        (mostly_zero(0.2, 0.3), 0.1, 0.0),
        (close_together(0.28, 0.05), 0.3, 0.0),
        (differences, 0.05, -1.0),
    ],
    ids=[
        "coins .01",
        "coins .02",
        "coins .1",
        "coins .3",
        "mostly zero .1",
        "close together .3",
        "signed",
    ],
)
def test_the_fresh_sample_that_a_message_names_certifies_as_often_as_it_says(
    draw, delta, lower, test
):
    options = {"delta": delta, "lower": lower, "test": test}
    losses, failed = a_failure(draw, **options)
    size, share = promised(failed.message)
    assert abs(share_certified(losses, size, **options) - share) <= SLACK


@pytest.mark.parametrize(
    ("draw", "options"),
    [
        (coins(*np.linspace(0.01, 0.2, 20)), {"procedure": "holm"}),
        (unrelated(*np.full(20, 0.05)), {"procedure": "holm"}),
        (unrelated(*np.full(20, 0.05)), {"procedure": "bonferroni"}),
        (unrelated(*np.full(8, 0.05)), {"procedure": "hochberg"}),
        (unrelated(0.08, 0.07, 0.06, 0.05, 0.05, 0.05), {"starts": 3}),
        (unrelated(0.08, 0.05, 0.05, 0.3), {"procedure": "fallback"}),
        (
            unrelated(0.08, 0.05, 0.05),
            {
                "procedure": "graphical",
                "weights": [0.5, 0.5, 0],
                "transitions": np.roll(np.eye(3), 1, 1),
            },
        ),
        (unrelated(0.05, 0.07, 0.09, 0.2), {"procedure": "pilot_order"}),
        (unrelated(0.05, 0.07, 0.09, 0.2), {"procedure": "pareto", "pilot_fraction": 0.3}),
        (unrelated(0.09, 0.05), {"order": [1, 0]}),
        (coins(0.05), {"attempt": 2}),
        (coins(0.05), {"test": "hoeffding_bentkus"}),
        (mostly_zero(0.2, 0.3), {"test": "empirical_bernstein"}),
        (unrelated(0.05, 0.05, 0.05), {"test": "binomial", "procedure": "holm"}),
    ],
    ids=[
        "holm, nested",
        "holm",
        "bonferroni",
        "hochberg",
        "starts",
        "fallback",
        "graphical",
        "pilot",
        "pareto",
        "order",
        "attempt",
        "hoeffding_bentkus",
        "empirical_bernstein",
        "binomial",
    ],
)
def test_so_it_does_under_every_procedure_and_order(draw, options):
    options = {"delta": 0.1} | options
    losses, failed = a_failure(draw, **options)
    size, share = promised(failed.message)
    assert abs(share_certified(losses, size, **options) - share) <= SLACK


def test_so_it_does_for_a_list_of_deltas():
    deltas = [0.1, 0.15, 0.2]
    losses = coins(0.02, 0.06, 0.07)(np.random.default_rng(2), 40)
    for which, failed in enumerate(calibrate(losses, thresholds=grid_for(3), delta=deltas)):
        if failed.certified:
            continue
        size, share = promised(failed.message)
        certified = [
            calibrate(losses[rows], thresholds=grid_for(3), delta=deltas)[which].certified
            for rows in np.random.default_rng(which).integers(0, 40, (DRAWS, size))
        ]
        assert abs(np.mean(certified) - share) <= SLACK


def runs_of(losses, **columns):
    """Runs of one threshold, 0/1 dissimilarity and risk."""
    n = len(losses)
    one = pd.DataFrame(
        {
            "prompt": np.arange(n),
            "threshold": 0.5,
            "dissimilarity": losses[:, 0],
            "risk": losses[:, 1],
        }
    )
    one["full_risk"] = 0.0
    return Runs.from_frame(one.assign(**columns))


def test_so_it_does_for_two_risks_at_once():
    losses = unrelated(0.05, 0.1)(np.random.default_rng(0), 60)
    delta = {"textual": 0.15, "risk": 0.2}
    failed = calibrate(runs_of(losses), delta=delta)
    size, share = promised(failed.message)
    certified = [
        calibrate(runs_of(losses[rows]), delta=delta).certified
        for rows in np.random.default_rng(1).integers(0, 60, (100, size))
    ]
    assert abs(np.mean(certified) - share) <= 0.05 + 2.5 * 0.04  # 100 draws


def test_clusters_are_counted_and_drawn_whole():
    rng = np.random.default_rng(4)
    difficulty = np.repeat(rng.random((40, 1)) < 0.1, 5, axis=0)
    losses = (rng.random((200, 2)) < np.where(difficulty, 0.6, 0.02)).astype(float)
    failed = calibrate(runs_of(losses, cluster=np.repeat(np.arange(40), 5)), delta=0.08)
    assert re.search(r"fresh sample of about \d+ clusters", failed.message)
    size, share = promised(failed.message)
    certified = []
    for clusters in np.random.default_rng(5).integers(0, 40, (100, size)):
        rows = (clusters[:, None] * 5 + np.arange(5)).ravel()
        runs = runs_of(losses[rows], cluster=np.repeat(np.arange(size), 5))
        certified.append(calibrate(runs, delta=0.08).certified)
    assert abs(np.mean(certified) - share) <= 0.05 + 2.5 * 0.04  # 100 draws


def test_losses_that_do_not_vary_need_what_the_test_needs_and_no_more():
    failed = calibrate(np.zeros((8, 1)), thresholds=[0.5], delta=0.05)
    size, share = promised(failed.message)
    assert share == 1.0
    assert calibrate(np.zeros((size, 1)), thresholds=[0.5], delta=0.05).certified
    assert not calibrate(np.zeros((size - 1, 1)), thresholds=[0.5], delta=0.05).certified


def test_a_size_beyond_a_million_is_not_named():
    failed = calibrate(np.zeros((20, 1)), thresholds=[0.5], delta=1e-12)
    assert "more than a million fresh rows" in failed.message
    assert "fresh sample of about" not in failed.message
    assert calibrate(np.zeros((20, 1)), thresholds=[0.5], delta=0.2).certified  # "raise delta"


# Where a fresh sample would not help


LOW_IS_STRICT = np.array([0.1, 0.3, 0.5, 0.8, 1.2])
RISING = np.array([0.0, 0.01, 0.03, 0.2, 0.5])


def entropies(seed, n):
    return (np.random.default_rng(seed).random((n, 5)) < RISING).astype(float)


def test_a_sequence_that_begins_at_a_risky_candidate_is_told_so_and_every_remedy_helps():
    failed = calibrate(entropies(0, 400), thresholds=LOW_IS_STRICT, delta=0.1)
    assert "fresh sample of about" not in failed.message
    assert "Testing begins at threshold 1.2" in failed.message
    assert "more rows in this order will not help" in failed.message
    assert not calibrate(entropies(1, 20_000), thresholds=LOW_IS_STRICT, delta=0.1).certified
    assert "lower_is_stricter=True" in failed.message
    assert calibrate(entropies(1, 400), thresholds=-LOW_IS_STRICT, delta=0.1).threshold == -0.5
    assert "order=" in failed.message
    assert calibrate(
        entropies(1, 400), thresholds=LOW_IS_STRICT, delta=0.1, order=[4, 3, 2, 1, 0]
    ).certified
    assert "procedure='holm'" in failed.message
    assert calibrate(
        entropies(1, 400), thresholds=LOW_IS_STRICT, delta=0.1, procedure="holm"
    ).certified


def test_so_are_starts_that_are_all_risky_and_one_that_is_risky_by_chance_alone():
    starts = calibrate(
        entropies(0, 400), thresholds=LOW_IS_STRICT, delta=0.1, starts=2, epsilon=0.01
    )
    if not starts.certified:
        assert "Testing begins at" in starts.message
    by_chance = np.zeros((30, 2))
    by_chance[:4, 0] = 1.0
    failed = calibrate(by_chance, thresholds=[0.9, 0.5], delta=0.1)
    assert "by no more than chance" in failed.message
    assert "will not help" not in failed.message
    assert "lower_is_stricter" in failed.message


def test_a_middle_candidate_that_is_safest_is_no_reason_to_turn_the_grid_round():
    losses = unrelated(0.4, 0.01, 0.5)(np.random.default_rng(0), 300)
    failed = calibrate(losses, thresholds=[0.9, 0.5, 0.1], delta=0.1)
    assert "lower_is_stricter" not in failed.message
    assert "order=" in failed.message


def test_a_mean_above_delta_by_chance_alone_is_not_called_hopeless():
    rng = np.random.default_rng(3)
    losses = next(x for x in (coins(0.09)(rng, 100) for _ in range(99)) if 0.1 <= x.mean() <= 0.13)
    failed = calibrate(losses, thresholds=[0.5], delta=0.1)
    assert "will not help" not in failed.message
    assert "by no more than chance explains in 100 rows" in failed.message
    assert "fresh sample of about" not in failed.message
    clearly = calibrate(coins(0.3)(rng, 300), thresholds=[0.5], delta=0.1)
    assert "more rows alone will not help" in clearly.message


def test_one_risk_that_is_beyond_chance_above_its_delta_is_enough_to_be_hopeless():
    losses = coins(0.3, 0.01)(np.random.default_rng(9), 300)
    for delta, column in (
        ({"textual": 0.1, "risk": 0.2}, [0, 1]),
        ({"textual": 0.2, "risk": 0.1}, [1, 0]),
    ):
        failed = calibrate(runs_of(losses[:, column]), delta=delta)
        assert "more prompts alone will not help" in failed.message
    chance = calibrate(runs_of(losses), delta={"textual": losses[:, 0].mean() - 0.01, "risk": 0.2})
    assert "by no more than chance explains" in chance.message


def test_the_mean_of_what_is_called_hopeless_is_seldom_below_delta():
    """At a true mean just below delta, "will not help" is said in at most .05 of draws: 1,000 draws, SE .007."""
    rng = np.random.default_rng(8)
    said = [
        "will not help" in calibrate(x, thresholds=[0.5], delta=0.1).message for x in above(rng)
    ]
    assert np.sum(said) <= (0.05 + 3 * 0.007) * 1000


def above(rng):
    """Of 1,000 samples of 80 coins of .0999, those with a mean of at least delta, .1: no other says anything of the kind."""
    return [x for x in (coins(0.0999)(rng, 80) for _ in range(1000)) if x.mean() >= 0.1]


def test_the_size_is_sought_where_the_message_is_first_read_and_a_calibration_can_be_pickled():
    losses = coins(0.05)(np.random.default_rng(0), 60)
    failed = calibrate(losses, thresholds=[0.5], delta=0.1)
    assert "message" not in vars(failed)
    again = pickle.loads(pickle.dumps(failed))
    assert again.message == failed.message
    assert failed.message == calibrate(losses, thresholds=[0.5], delta=0.1).message


# plan


def drawn(law, rng, shape):
    mean, deviation = law
    if deviation is None:
        return (rng.random(shape) < mean).astype(float)
    both = mean * (1 - mean) / deviation**2 - 1
    return rng.beta(mean * both, (1 - mean) * both, shape)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize(
    ("law", "delta"),
    [
        ((0.003, None), 0.01),
        ((0.008, None), 0.02),
        ((0.05, None), 0.1),
        ((0.05, 0.13), 0.1),
        ((0.29, 0.1), 0.3),
        ((0.28, 0.02), 0.3),
        ((0.0, 0.0), 0.02),
    ],
)
def test_a_planned_sample_certifies_as_often_as_the_plan_says(law, delta, test):
    mean, deviation = law
    plan = riskcal.plan(delta, mean=mean, deviation=deviation, test=test)
    assert plan.share >= 0.74
    if plan.prompts > 20_000:
        pytest.skip("too many rows for a test")
    if mean == 0.0:
        losses = np.zeros((plan.prompts, 2))
    else:
        losses = drawn(law, np.random.default_rng(11), (plan.prompts, DRAWS))
    level = {"level": 0.05} if test == "betting" else {}
    share = (getattr(pvalues, test)(losses, delta, **level) <= 0.05).mean()
    assert abs(share - plan.share) <= SLACK
    if deviation is None or deviation > 0.0:
        size = pvalues.sample_size(test, mean, plan.deviation, delta, 0.05)
        assert size == pytest.approx(plan.prompts, rel=0.03)


def test_a_plan_in_other_units_is_the_same_plan():
    plain, stretched = (
        riskcal.plan(0.1, mean=0.05, n=500),
        riskcal.plan(10.0, mean=5.0, n=500, upper=100.0),
    )
    assert stretched.prompts == pytest.approx(plain.prompts, rel=0.03)
    assert stretched.smallest_delta == pytest.approx(100 * plain.smallest_delta, rel=0.03)
    signed = riskcal.plan(0.05, mean=0.0, deviation=0.26, lower=-1.0)
    rng = np.random.default_rng(1)
    both = 1 / 0.26**2 - 1
    losses = 2 * rng.beta(both / 2, both / 2, (signed.prompts, DRAWS)) - 1
    assert (
        abs((pvalues.betting(losses, 0.05, level=0.05, lower=-1.0) <= 0.05).mean() - signed.share)
        <= SLACK
    )


def test_a_plan_from_a_pilot_draws_from_it():
    pilot = mostly_zero(0.2, 0.3)(np.random.default_rng(1), 80)[:, 0]
    plan = riskcal.plan(0.1, losses=pilot)
    losses = np.random.default_rng(2).choice(pilot, (plan.prompts, DRAWS))
    assert abs((pvalues.betting(losses, 0.1, level=0.05) <= 0.05).mean() - plan.share) <= SLACK
    assert "distributed as the 80 given" in str(plan)


def test_the_smallest_delta_is_what_the_prompts_at_hand_certify():
    smallest = riskcal.plan(0.1, mean=0.05, n=500).smallest_delta
    losses = coins(0.05)(np.random.default_rng(1), 500 * DRAWS).reshape(500, DRAWS)
    assert abs((pvalues.betting(losses, smallest, level=0.05) <= 0.05).mean() - 0.8) <= SLACK


def test_two_prompts_are_the_fewest_that_a_smallest_delta_is_found_for():
    known = {"mean": 0.0, "test": "hoeffding"}
    two, three = (riskcal.plan(0.5, **known, n=n).smallest_delta for n in (2, 3))
    assert 0.0 < three < two <= 1.0
    assert two == pytest.approx(math.sqrt(math.log(20) / 4), abs=1e-3)  # exp(-2 n delta^2) = .05
    with pytest.raises(RiskcalError, match="n: 1 "):
        riskcal.plan(0.5, **known, n=1)


def test_a_plan_says_what_the_losses_were_drawn_from_and_names_no_size_beyond_a_million():
    assert "0 or 1 with mean 0.05" in str(riskcal.plan(0.1, mean=0.05))
    assert "beta distributed" in str(riskcal.plan(0.1, mean=0.05, deviation=0.1))
    beyond = riskcal.plan(0.1, mean=0.09999)
    assert beyond.prompts is None
    assert math.isnan(beyond.share)
    assert str(beyond).startswith("More than a million prompts")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mean, losses: give one"),
        ({"mean": 0.05, "losses": [0.0, 0.1]}, "mean, losses: give one"),
        ({"losses": [0.0, 0.1], "deviation": 0.1}, "deviation: the pilot"),
        ({"losses": [[0.0, 0.1]]}, r"losses: has shape \(1, 2\)"),
        ({"losses": [0.0, 0.3]}, "losses: 0.15 is not in"),
        ({"mean": 0.1}, "mean: 0.1 is not in"),
        ({"mean": -0.1}, "mean: -0.1 is not in"),
        ({"mean": 1.0}, r"mean: 1 is not in \[0, 1\)"),
        ({"mean": 1.5}, r"mean: 1.5 is not in \[0, 1\)"),
        ({"mean": 0.05, "deviation": 0.3}, "deviation: 0.3 is not possible .* at most 0.2179"),
        ({"mean": 0.05, "deviation": 0.1, "test": "binomial"}, "deviation: 'binomial'"),
        ({"mean": 0.05, "test": "binomial", "upper": 2.0}, "test: 'binomial'"),
        ({"mean": 0.05, "test": "clt"}, "test: 'clt'"),
    ],
)
def test_bad_plans_are_refused_by_name(options, message):
    with pytest.raises(RiskcalError, match=message):
        riskcal.plan(0.1, **options)


@pytest.mark.parametrize("mean", ["0.05", np.array(0.05), Fraction(1, 20)])
def test_a_mean_may_be_given_as_any_number(mean):
    assert riskcal.plan(0.1, mean=mean) == riskcal.plan(0.1, mean=0.05)
    with pytest.raises(RiskcalError, match=r"deviation: 0.3 is not possible with mean 0.05"):
        riskcal.plan(0.1, mean=mean, deviation=0.3)


# The simulation


@pytest.mark.parametrize(
    ("mean", "deviation"), [(0.05, 0.13), (0.3, 0.01), (1e-4, 0.0099), (1e-3, 0.01), (0.9, 0.2)]
)
def test_a_law_has_the_mean_and_deviation_that_were_asked_for(mean, deviation):
    law = _simulation.of_moments(mean, deviation)
    assert law.mean[0] == pytest.approx(mean, rel=1e-3)
    assert law.deviation[0] == pytest.approx(deviation, rel=0.01)


def test_a_law_of_rows_is_their_distribution():
    rows = np.array([[0.0, 0.0]] * 6 + [[1.0, 0.5], [0.5, 0.5], [1.0, 0.5]])
    law = _simulation.of_rows(rows)
    assert law.share == pytest.approx(1 / 3)
    np.testing.assert_allclose(law.mean, rows.mean(0))
    np.testing.assert_allclose(law.deviation, rows.std(0))
    for ordered in (True, False):
        totals = np.concatenate([s.totals(0) for _, s in law.samples(1000, ordered=ordered)])
        assert totals.mean() == pytest.approx(
            1000 * rows[:, 0].mean(), abs=4 * math.sqrt(1000 / len(totals)) * 0.4
        )


def test_a_candidate_that_nearly_always_fails_is_mapped_with_the_others():
    law = _simulation.Law(np.array([[0.0, 1.0], [1.0, 1.0]]), 1e-4)
    delta, upper = np.array([2e-4, 0.5]), np.ones(2)
    _, moved, rows = _simulation.scaled(law, delta, 500_000, upper)
    assert rows < 500_000
    assert 0 < moved[0] < 1


@pytest.mark.parametrize(
    ("mean", "delta"), [(0.294, 0.3), (0.096, 0.1), (0.0045, 0.005), (0.0008, 0.001)]
)
def test_large_samples_are_mapped_to_small_ones_of_nearly_the_same_power(mean, delta):
    """On 200 draws of the whole sample, SE .028."""
    law = _simulation.of_moments(mean, math.sqrt(mean * (1 - mean)))
    n = int(sampled.rough_size(mean, float(law.deviation[0]), delta, 0.05, 0.8))
    assert _simulation.scaled(law, np.array([delta]), n, np.array([1.0]))[2] <= n / 1.05
    share = sampled.share_rejected(pvalues.Betting(), law, n, delta, 0.05, lower=0.0, upper=1.0)
    losses = (np.random.default_rng(3).random((n, 200), dtype=np.float32) < mean).astype(float)
    assert (
        abs((pvalues.betting(losses, delta, level=0.05) <= 0.05).mean() - share)
        <= 0.05 + 2.5 * 0.028
    )


@pytest.mark.parametrize(
    "test", ["betting", "convex_order", "hoeffding_bentkus", "hoeffding", "empirical_bernstein"]
)
def test_the_planned_sample_certifies_about_as_often_as_planned(test):
    """Planned at power .8: 400 draws certify in .8 +- .12 (the normal approximation and 3 SE = .06)."""
    mean, deviation = 0.05, 0.13
    n = riskcal.plan(0.1, mean=mean, deviation=deviation, test=test).prompts
    rng = np.random.default_rng(11)
    hit = rng.random((n, 400)) < 0.155
    losses = np.where(hit, np.clip(rng.normal(mean / 0.155, 0.10, (n, 400)), 0, 1), 0)
    level = {"level": 0.05} if test == "betting" else {}
    share = (getattr(pvalues, test)(losses, 0.1, **level) <= 0.05).mean()
    assert abs(share - 0.8) <= 0.12


def test_the_smallest_delta_is_what_the_prompts_at_hand_can_certify():
    found = riskcal.plan(0.1, mean=0.05, n=500)
    assert riskcal.plan(found.smallest_delta + 1e-4, mean=0.05).prompts <= 500
    assert riskcal.plan(found.smallest_delta - 1e-3, mean=0.05).prompts > 500


@pytest.mark.parametrize("procedure", ["fixed_sequence", "holm", "hochberg", "pilot_order"])
@pytest.mark.parametrize("delta", [0.1, 0.3, 0.7, 1 / 3])
@pytest.mark.parametrize("n", [20, 333])
def test_losses_that_all_equal_delta_have_a_message_and_no_certificate(n, delta, procedure):
    """Their mean, as it is summed, may stand a rounding error below delta or above it."""
    found = calibrate(
        np.full((n, 2), delta), thresholds=[0.9, 0.8], delta=delta, procedure=procedure
    )
    assert not found.certified
    assert "fresh sample of about" not in found.message
    assert "more than a million" in found.message or "not below delta" in found.message


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 8.0)])
def test_a_delta_next_to_a_bound_has_a_message_too(lower, upper):
    """Seen from the other bound it is within rounding of that."""
    for delta in (math.nextafter(lower, upper), lower + 1e-17 * upper or 1e-17):
        worst = np.full((50, 2), upper)
        known = {"thresholds": [0.9, 0.8], "lower": lower, "upper": upper}
        if lower < delta:
            assert "will not help" in calibrate(worst, delta=delta, **known).message
    near = math.nextafter(upper, lower)
    assert "not below delta" in calibrate(worst, delta=near, **known).message


@pytest.mark.parametrize("test", [*pvalues.OF_SUMS, "empirical_bernstein", "betting"])
@pytest.mark.parametrize(("low", "high", "delta"), [(0.0, 1.0, 0.75), (-1.0, 3.0, 2.0)])
def test_simulated_samples_have_the_p_values_of_their_rows(test, low, high, delta):
    if test == "binomial" and low < 0:
        return
    rng = np.random.default_rng(3)
    rows = low + (high - low) * rng.integers(0, 2 if test == "binomial" else 5, (40, 2)) / 4.0
    rows = np.sign(rows) if test == "binomial" else rows
    law = _simulation.of_rows(rows)
    [(_, sample)] = law.samples(200, ordered=True)
    of = np.array([0, 3, 17])
    bounds = {"lower": low, "upper": high}
    found = pvalues.BY_NAME[test].simulated(sample, 1, of, delta, 0.05, **bounds)
    losses = sample.rows(1, of)
    expected = pvalues.BY_NAME[test].pvalues(losses, delta, level=0.05, **bounds)
    assert found == pytest.approx(expected)
    assert (expected < 1).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test": "foo"}, "test: 'foo' is unknown; choose one of"),
        ({"mean": 1.2}, r"mean: 1.2 is not in \[0, 0.1\)"),
        ({"mean": 0.1}, r"mean: 0.1 is not in \[0, 0.1\)"),
        ({"deviation": -1}, "deviation: -1 is below 0"),
        ({"delta": 1.5}, r"delta: 1.5 is not in \(0, 1\]"),
        ({"level": 0}, "level: 0 is not strictly between 0 and 1"),
        ({"power": 80}, "power: 80 is not strictly between 0 and 1"),
    ],
)
def test_a_size_that_nothing_has_is_not_looked_for(given, message):
    known = {"test": "betting", "mean": 0.05, "deviation": 0.1, "delta": 0.1, "level": 0.05}
    with pytest.raises(RiskcalError, match=message):
        pvalues.sample_size(**(known | given))


def test_a_deviation_that_no_coin_has_is_none_for_the_test_of_coins():
    """As `plan` says, whose remedy is to leave it out."""
    given = {"mean": 0.05, "delta": 0.1, "level": 0.05}
    with pytest.raises(RiskcalError, match=r"^deviation: 'binomial' .* is (\S+); give") as told:
        pvalues.sample_size("binomial", deviation=0.1, **given)
    mended = float(re.search(r"is (\S+); give that", str(told.value))[1])
    exact = pvalues.sample_size("binomial", deviation=math.sqrt(0.05 * 0.95), **given)
    assert pvalues.sample_size("binomial", deviation=mended, **given) == exact
    assert pvalues.sample_size("binomial", deviation=0.218, **given) == exact
    assert pvalues.sample_size("binomial", mean=0.0, deviation=0.0, delta=0.1, level=0.05) == 29


def test_a_deviation_beyond_the_largest_is_the_largest():
    given = {"mean": 0.1, "delta": 0.3, "level": 0.05}
    widest = pvalues.sample_size("convex_order", deviation=0.3, **given)
    assert pvalues.sample_size("convex_order", deviation=0.4, **given) == widest
    assert pvalues.sample_size("convex_order", deviation=0.1, **given) < widest


def test_the_size_that_two_values_need_does_not_depend_on_which_they_are():
    """0 or 1, or what a cost of 2 or 7 seconds is: rows without ids, whose betting p-value is never below their count's."""
    wrong = np.repeat([1.0, 0.0], [7, 93])[:, None]
    plain = calibrate(wrong, thresholds=[0.5], delta=0.1)
    moved = calibrate(2 + 5 * wrong, thresholds=[0.5], delta=2.5, lower=2.0, upper=7.0)
    sizes = [re.search(r"about (\d+) rows", one.message)[1] for one in (plain, moved)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("test", ["convex_order", "betting"])
def test_a_delta_that_is_the_upper_bound_has_a_size_too(test):
    """As one that lies so near to it that it is rounded there, on the way to the unit interval."""
    given = {"mean": 0.5, "deviation": 0.1, "level": 0.05}
    assert pvalues.sample_size(test, delta=1.0, **given) <= pvalues.sample_size(
        test, delta=0.99, **given
    )


def test_who_turned_the_grid_round_for_nothing_is_told_so_and_the_remedy_helps(tmp_path):
    losses = coins(0.01, 0.05, 0.4)(np.random.default_rng(0), 300)
    known = {"thresholds": [0.9, 0.5, 0.1], "delta": 0.1}
    turned = calibrate(losses, **known, lower_is_stricter=True)
    assert not turned.certified
    assert (
        "If high thresholds are the strict ones here, leave lower_is_stricter out, and the column of that name"
        in turned.message
    )
    fresh = coins(0.01, 0.05, 0.4)(np.random.default_rng(1), 300)
    assert calibrate(fresh, **known).certified
    frame = Runs.from_arrays(thresholds=known["thresholds"], dissimilarity=fresh).to_frame()
    Runs.from_frame(frame, lower_is_stricter=True).write(tmp_path / "turned.parquet")
    written = pd.read_parquet(tmp_path / "turned.parquet")
    assert not calibrate(Runs.from_frame(written), delta=0.1).certified
    mended = Runs.from_frame(written.drop(columns="lower_is_stricter"))
    assert calibrate(mended, delta=0.1).certified


# Shares of simulated samples against what they are exactly


class Given(pvalues.Method):
    """A test that finds ``p``, whatever the losses are, and keeps on how many rows."""

    name = "given"

    def __init__(self, p, *, walks=False, totals=False):
        for name, value in {"p": p, "walks": walks, "of_totals_alone": totals, "rows": []}.items():
            object.__setattr__(self, name, value)

    def pvalues(self, losses, delta, *, level, lower, upper):
        raise AssertionError("asked of rows")

    def simulated(self, sample, column, of, delta, level, *, lower, upper):
        self.rows.append(sample.n)
        return np.full(len(of), self.p)


def risks_of(*tables, delta, bounds=()):
    """A problem with a risk for each of these tables of losses (n, k)."""
    bounds = bounds or [(0.0, 1.0)] * len(tables)
    return problems.Problem(
        risks=tuple(
            problems.TestedRisk(f"risk {r}", np.array(table, dtype=float), delta[r], *bounds[r])
            for r, table in enumerate(tables)
        ),
        candidates=pd.DataFrame({"threshold": -np.arange(np.shape(tables[0])[1])}),
        costs={},
        full={},
        units=np.arange(len(tables[0])),
        unit="rows",
        digest="",
    )


def trial_of(problem, test, procedure, epsilon=0.05):
    return outlook._Trial.of(problem, Design.of(test, procedure, epsilon, problem.k))


def counts_of(problem, n):
    """Every way to draw n rows of a problem's distinct rows, at most three: its probability, and mean losses (ways, r, k)."""
    rows = np.stack([risk.losses for risk in problem.risks], axis=1)
    kinds, often = np.unique(rows.reshape(len(rows), -1), axis=0, return_counts=True)
    assert len(kinds) <= 3
    ways = np.array([(a, b) for a in range(n + 1) for b in range(n + 1 - a)])
    ways = (
        np.c_[ways, n - ways.sum(1)][:, : len(kinds)] if len(kinds) == 3 else ways[ways.sum(1) == n]
    )
    chance = stats.multinomial.pmf(ways, n, often / often.sum())
    return chance, (ways @ kinds / n).reshape(-1, *rows.shape[1:])


def pvalues_of(problem, means, n, test):
    """The largest p-value of its risks, of each candidate (ways, k)."""
    return np.max(
        [
            test.of_totals(n * means[:, r], n, risk.delta, lower=risk.lower, upper=risk.upper)
            for r, risk in enumerate(problem.risks)
        ],
        axis=0,
    )


def exact_share(problem, n, test, procedure, epsilon=0.05):
    """How often n rows, distributed as a problem's, certify something by the test and the procedure themselves."""
    aside = math.ceil(getattr(procedure, "pilot_fraction", 0.0) * n)
    chance, means = counts_of(problem, n - aside)
    p = pvalues_of(problem, means, n - aside, test)
    if not aside:
        return chance[[procedure.rejected(row, epsilon).any() for row in p]].sum()
    first, seen = counts_of(problem, aside)
    worst = np.max(
        [(seen[:, r] - x.delta) / (x.upper - x.lower) for r, x in enumerate(problem.risks)], axis=0
    )
    chosen = np.bincount(worst.argmin(1), first, minlength=problem.k)
    return chosen @ (chance @ (p <= epsilon))


APART = np.repeat([[1, 0], [0, 1], [0, 0]], [8, 9, 83], axis=0)  # no row is lost to both
ALIKE = np.repeat([[1, 1], [0, 0]], [8, 92], axis=0)
#: The first candidate is the safer by one risk, the second by the one that matters.
OF_TWO_KINDS = [
    np.repeat([[0.2, 0.2], [0.2, 0.8], [0.2, 0.2]], [25, 10, 65], axis=0),
    np.repeat([[4.0, -2.0], [-2.0, 4.0], [-2.0, -2.0]], [25, 10, 65], axis=0),
]


@pytest.mark.parametrize(
    ("tables", "delta", "bounds", "procedure", "test"),
    [
        ([APART], [0.16], [(0, 1)], fwer.FixedSequence(), "binomial"),
        ([APART], [0.16], [(0, 1)], fwer.Holm(), "binomial"),
        ([APART], [0.16], [(0, 1)], fwer.Hochberg(), "binomial"),
        ([ALIKE], [0.16], [(0, 1)], fwer.Hochberg(), "binomial"),
        ([APART], [0.16], [(0, 1)], fwer.PilotOrder(0.3), "binomial"),
        ([APART, APART[:, ::-1]], [0.16, 0.2], [(0, 1)] * 2, fwer.Holm(), "binomial"),
        (
            [APART, 3 * APART[:, ::-1] - 1],
            [0.16, -0.4],
            [(0, 1), (-1, 2)],
            fwer.Hochberg(),
            "convex_order",
        ),
        (
            [0.2 + 0.6 * APART, 6 * APART[:, ::-1] - 2],
            [0.4, -0.2],
            [(0, 1), (-2, 4)],
            fwer.PilotOrder(0.4),
            "convex_order",
        ),
        (OF_TWO_KINDS, [0.6, -0.2], [(0, 1), (-2, 4)], fwer.PilotOrder(0.4), "convex_order"),
    ],
)
@pytest.mark.parametrize("n", [30, 80])
def test_a_share_is_that_of_all_samples(tables, delta, bounds, procedure, test, n):
    """Up to five standard errors of 2,000 draws, .056."""
    problem, method = risks_of(*tables, delta=delta, bounds=bounds), pvalues.BY_NAME[test]
    expected = exact_share(problem, n, method, procedure)
    assert trial_of(problem, method, procedure).share(n) == pytest.approx(expected, abs=0.056)


@pytest.mark.parametrize("delta", [[0.16, 0.3], [0.3, 0.16]])
def test_two_values_of_rows_without_names_are_counted_too_by_a_test_that_walks(delta):
    """By one that rejects always: what is left is the exact test of the count."""
    plain = risks_of(APART, APART[:, ::-1], delta=delta)
    moved = [delta[0], 2 + 5 * delta[1]]
    named = risks_of(APART, 2 + 5 * APART[:, ::-1], delta=moved, bounds=[(0, 1), (2, 7)])
    nameless = dataclasses.replace(named, nameless=True)
    expected = exact_share(plain, 60, pvalues.Binomial(), fwer.Holm())
    assert trial_of(nameless, Given(0.0, walks=True), fwer.Holm()).share(60) == pytest.approx(
        expected, abs=0.056
    )
    assert trial_of(named, Given(0.0, walks=True), fwer.Holm()).share(60) == 1.0
    assert trial_of(nameless, Given(0.0), fwer.Holm()).share(60) == 1.0


@pytest.mark.parametrize("procedure", [fwer.Hochberg(), fwer.Bonferroni(), fwer.FixedSequence()])
def test_a_p_value_that_equals_its_level_certifies(procedure):
    """Hochberg's step up asks of two no more than the whole level."""
    problem = risks_of(APART, delta=[0.16])
    level = 0.025 if procedure.name == "bonferroni" else 0.05
    assert trial_of(problem, Given(level), procedure).share(30) == 1.0
    assert trial_of(problem, Given(math.nextafter(level, 1.0)), procedure).share(30) == 0.0


@pytest.mark.parametrize("procedure", [fwer.Holm(), fwer.PilotOrder(0.5), fwer.PilotOrder(0.1)])
def test_a_sample_that_calibrate_would_refuse_certifies_nothing(procedure):
    trial = trial_of(risks_of(APART, delta=[0.16]), Given(0.0), procedure)
    aside = getattr(procedure, "pilot_fraction", None)
    for n in (*range(1, 13), 19, 20, 21):
        possible = n >= 2 if aside is None else pilot_size(n, aside) is not None
        assert trial.share(n) == float(possible)


def test_a_test_that_walks_is_simulated_on_a_smaller_problem_with_as_large_a_share_aside():
    problem, aside = risks_of(APART, delta=[0.16]), fwer.PilotOrder(0.25)
    sums, walks, left = Given(0.0, totals=True), Given(0.0, walks=True), Given(0.0, walks=True)
    assert trial_of(problem, sums, fwer.Holm()).share(50_000) == 1.0
    assert trial_of(problem, walks, fwer.Holm()).share(50_000) == 1.0
    assert trial_of(problem, left, aside).share(50_000) == 1.0
    assert set(sums.rows) == {50_000}
    assert set(walks.rows) == {_simulation._ROWS}
    assert set(left.rows) == {_simulation._ROWS * 3 // 4}


def test_only_candidates_that_may_begin_and_keep_every_delta_are_hoped_for_those_of_few_units_first():
    """The first needs most by its first risk, the third keeps the second risk's delta not, and the last cannot begin."""
    rates = np.array([[0.14, 0.1, 0.05, 0.0], [0.0, 0.1, 0.2, 0.0]])
    tables = [np.arange(100)[:, None] < 100 * one for one in rates]
    problem = risks_of(*tables, delta=[0.16, 0.16])
    hoped = trial_of(problem, pvalues.Binomial(), fwer.FixedSequence(starts=3)).hopeful
    assert hoped.tolist() == [1, 0]
    assert trial_of(problem, pvalues.Binomial(), fwer.Hochberg()).hopeful.tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.8, "four draws of five"),
        (0.83, "four draws of five"),
        (0.77, "four draws of five"),
        (0.85, "85 draws of 100"),
        (0.74, "74 draws of 100"),
        (1.0, "100 draws of 100"),
    ],
)
def test_a_share_is_put_into_words(share, said):
    assert outlook._often(share) == said


# Every word of what a message says, where the answer is known


CONDITION = (
    "if losses are distributed as those observed. Testing these data again, or more of the same pool, is a new attempt that "
    "this epsilon does not cover."
)


def test_the_whole_message_of_a_sequence_and_of_a_procedure_without_order():
    """Of rows without a loss .95^59 is below .05, .95^58 is not; and .95^72 is below .025, .95^71 is not."""
    known = {"delta": 0.05, "test": "binomial"}
    assert calibrate(np.zeros((8, 1)), thresholds=[0.9], **known).message == (
        "Nothing was certified at delta 0.05: run the full model. The first candidate tested, threshold 0.9, has an observed "
        "loss of 0; a fresh sample of about 59 rows, tested in the same way, certifies it in 100 draws of 100, "
        + CONDITION
    )
    losses = np.c_[np.arange(20) < 1, np.zeros(20)]
    found = calibrate(losses, thresholds=[0.9, 0.5], procedure="holm", **known)
    assert found.message == (
        "Nothing was certified at delta 0.05: run the full model. The safest candidate, threshold 0.5, has an observed loss "
        "of 0; a fresh sample of about 72 rows, tested in the same way, certifies at least one candidate in 100 draws of 100, "
        + CONDITION
    )


def constant(*means):
    """Five rows alike for each list of means, one a candidate."""
    return [np.tile(np.array(one, dtype=float), (5, 1)) for one in means]


def said_of(problem, procedure, test=None):
    return outlook.outlook(problem, Design.of(test or Given(0.0), procedure, 0.05, problem.k))


def test_the_safest_of_candidates_is_so_by_its_worst_risk_relative_to_the_losses_range():
    """The first is .1 below the one delta and .5 of 6 below the other, .083; the second .09 and 1.2 of 6."""
    problem = risks_of(
        *constant([0.1, 0.11], [0.5, -0.2]), delta=[0.2, 1.0], bounds=[(0, 1), (-2, 4)]
    )
    assert said_of(problem, fwer.Holm()).startswith(
        "The safest candidate, threshold -1, has an observed cost in risk 0 of 0.11; a fresh sample of about 2 rows"
    )


def test_the_risk_that_is_named_is_the_furthest_above_its_delta_relative_to_the_losses_range():
    """By .1, and by .3 of 6."""
    problem = risks_of(*constant([0.26], [2.0]), delta=[0.16, 1.7], bounds=[(0, 1), (-2, 4)])
    assert said_of(problem, fwer.Holm()).startswith(
        "The safest candidate's observed cost in risk 0 is 0.26: not below delta, but by no more than chance explains in 5 rows."
    )


def test_a_risk_that_equals_its_delta_is_to_be_raised_beside_a_budget_that_is_exceeded():
    problem = risks_of(*constant([0.5], [0.9]), delta=[0.5, 0.1])
    loss, cost = problem.risks
    problem = dataclasses.replace(problem, risks=(loss, cost._replace(is_cost=True)))
    assert "raise delta and raise the budget, record other candidates" in said_of(
        problem, fwer.Holm()
    )


def test_starts_are_hopeless_only_if_all_of_them_are():
    losses = np.c_[np.ones(100), np.arange(100) % 16 == 15]
    message = said_of(risks_of(losses, delta=[0.05]), fwer.FixedSequence(starts=2))
    assert "is 0.06: not below delta, but by no more than chance explains in 100 rows" in message
    both = said_of(risks_of(np.ones((100, 2)), delta=[0.05]), fwer.FixedSequence(starts=2))
    assert "will not help" in both


def test_a_sequence_that_begins_above_delta_is_told_which_candidate_is_the_safest():
    problem = risks_of(*constant([0.9, 0.02, 0.4]), delta=[0.1])
    message = said_of(problem, fwer.FixedSequence())
    assert "Testing begins at threshold 0, whose observed cost in risk 0 is 0.9" in message
    assert "Yet threshold -1 was observed at 0.02. So begin elsewhere" in message


@pytest.mark.parametrize(("loosest", "turned"), [(0.5, False), (0.49, True), (0.51, False)])
def test_only_a_grid_whose_loosest_candidate_is_below_delta_may_stand_the_wrong_way_round(
    loosest, turned
):
    problem = risks_of(*constant([0.9, 0.2, loosest]), delta=[0.5])
    message = said_of(problem, fwer.FixedSequence())
    assert ("If low thresholds are the strict ones here" in message) is turned


@pytest.mark.parametrize(("p", "beyond"), [(0.05, True), (0.0501, False), (0.09, False)])
def test_a_mean_is_beyond_chance_where_the_opposite_is_rejected_at_a_twentieth(
    p, beyond, monkeypatch
):
    monkeypatch.setattr(pvalues, "betting", lambda *_, **__: p)
    message = said_of(risks_of(*constant([0.9]), delta=[0.5]), fwer.FixedSequence())
    assert ("will not help" in message) is beyond
    assert ("by no more than chance" in message) is not beyond


def test_a_risk_of_no_request_leaves_nothing_to_test_whatever_another_says():
    runs = Runs.from_arrays(
        thresholds=[math.inf, 0.9, 0.5],
        dissimilarity=np.zeros((40, 3)),
        layers=np.full((40, 3), 8.0),
        prompts=[f"p{i}" for i in range(40)],
    )
    found = calibrate(runs, delta={"selective": 0.1, "textual": 0.2})
    assert "No request stopped early under any candidate" in found.message


def test_a_plan_of_coins_is_that_of_the_binomial_law():
    plan = riskcal.plan(0.1, mean=0.05, test="binomial")
    most = np.arange(plan.prompts)[
        stats.binom.cdf(np.arange(plan.prompts), plan.prompts, 0.1) <= 0.05
    ]
    assert stats.binom.cdf(most.max(), plan.prompts, 0.05) == pytest.approx(plan.share, abs=0.045)


@pytest.mark.parametrize(("lower", "upper"), [(20.0, 30.0), (-1.0, 4.0)])
def test_a_plan_is_the_same_wherever_the_losses_range_lies(lower, upper):
    """From 20 up, and where delta stands as far above the lower bound as the two bounds add up to."""
    width = upper - lower
    plan = riskcal.plan(
        lower + 0.6 * width, mean=lower + 0.5 * width, n=60, lower=lower, upper=upper
    )
    plain = riskcal.plan(0.6, mean=0.5, n=60)
    assert plan.prompts == pytest.approx(plain.prompts, rel=0.03)
    smallest = (
        plan.smallest_delta - lower
    ) / width  # bets across 0 are others, of nearly the same power
    assert smallest == pytest.approx(plain.smallest_delta, abs=0.004)


@pytest.mark.parametrize("deviation", [0.0, 0.1])
def test_a_law_that_is_not_of_two_values_is_told_by_its_moments(deviation):
    beta = "beta distributed, " if deviation else ""
    told = f"{beta}of mean 0.05 and standard deviation {deviation:g}"
    assert riskcal.plan(0.1, mean=0.05, deviation=deviation).law == told
    assert riskcal.plan(0.1, mean=0.0).law == "of mean 0 and standard deviation 0"
