"""Defects that were demonstrated in public implementations of risk control, each as a test that riskcal passes.

The numbers in the names' comments are what the other implementation did on the same input.
"""

import math

import numpy as np
import pytest
from scipy import stats

import riskcal
from helpers import allowed, tuned_at
from riskcal import RiskcalError, bounds, fwer, monotone, pvalues

FINITE_SAMPLE = tuned_at(0.1)
TESTS = FINITE_SAMPLE | {"clt": pvalues.clt}
each_test = pytest.mark.parametrize("name", TESTS)
each_valid_test = pytest.mark.parametrize("name", FINITE_SAMPLE)


# 1. A "fixed sequence" that keeps every small p-value, and starts that are counted wrongly (family-wise error .88 and .19)


def test_a_fixed_sequence_stops_at_its_first_failure():
    assert not fwer.fixed_sequence([0.5, 0.01, 0.9, 0.05], 0.1).any()
    draws = 4000
    p = np.random.default_rng(1).random((draws, 20))
    assert np.mean([fwer.fixed_sequence(row, 0.1).any() for row in p]) <= allowed(0.1, draws)


@pytest.mark.parametrize("starts", [1, 2, 7, 50, 100])
def test_each_start_gets_its_share_of_the_level(starts):
    draws = 1500
    p = np.random.default_rng(2).random((draws, 100))
    assert np.mean([fwer.fixed_sequence(row, 0.1, starts=starts).any() for row in p]) <= allowed(
        0.1, draws
    )


# 2. A betting p-value that bets both ways (p = 6e-9 at three times the tolerated risk)


@each_test
def test_a_risk_above_delta_is_never_evidence_of_a_risk_below_it(name):
    losses = (np.random.default_rng(3).random((500, 300)) < 0.3) * 1.0
    assert (TESTS[name](losses, 0.1) > 0.1).all()
    assert TESTS[name](np.ones(500), 0.1) == pytest.approx(1.0)


# 3. A betting bound that adds the maxima of two half-sample capitals (misses .18 to .21 of draws at a nominal .1)


@pytest.mark.parametrize("method", ["betting", "predictable_bernstein"])
@pytest.mark.parametrize("n", [100, 101])
def test_a_sequential_bound_misses_no_more_than_its_level_and_uses_every_row(method, n):
    draws, risk = 2000, 0.0999
    losses = (np.random.default_rng(4).random((n, draws)) < risk) * 1.0
    assert (bounds.METHODS[method](losses, epsilon=0.1) < risk).mean() <= allowed(0.1, draws)
    other = losses.copy()
    other[-1] = 1 - other[-1]
    assert (
        TESTS[method](other, 0.15) != TESTS[method](losses, 0.15)
    ).any()  # the last row of an odd number counts too


# 4. A NaN p-value that stops Holm before it starts (61 valid candidates, none certified)


@pytest.mark.parametrize(
    "procedure",
    [
        fwer.bonferroni,
        fwer.holm,
        fwer.hochberg,
        fwer.fixed_sequence,
        lambda p, epsilon: fwer.fallback(p, epsilon, [0.5, 0.5, 0.0]),
        lambda p, epsilon: fwer.graphical(p, epsilon, [0.5, 0.5, 0.0], np.zeros((3, 3))),
    ],
    ids=["bonferroni", "holm", "hochberg", "fixed_sequence", "fallback", "graphical"],
)
def test_a_nan_p_value_is_refused_by_every_procedure(procedure):
    with pytest.raises(RiskcalError, match="pvalues: nan at index 1"):
        procedure([0.001, float("nan"), 0.2], 0.1)


@each_test
def test_a_nan_loss_is_an_error_and_never_a_p_value(name):
    for row in (0, 5, 11):
        losses = np.zeros((12, 3))
        losses[row, 1] = np.nan
        with pytest.raises(RiskcalError, match="losses: nan at index"):
            TESTS[name](losses, 0.1)


# 5. The direction of a fixed sequence taken from the calibration curve (family-wise error .143 at .1)


def test_the_direction_of_the_sequence_is_not_taken_from_the_data():
    """Two candidates at risk delta: the higher threshold goes first, whichever of the two looks better; 4,000 draws."""
    draws = 4000
    losses = (np.random.default_rng(5).random((100, draws, 2)) < 0.1) * 1.0
    p = np.stack([pvalues.binomial(losses[:, :, j], 0.1) for j in (0, 1)], axis=1)
    errors = np.array([fwer.fixed_sequence(row, 0.1).any() for row in p])
    assert errors.mean() <= allowed(0.1, draws)
    looks_better = np.array([fwer.fixed_sequence(np.sort(row), 0.1).any() for row in p])
    assert looks_better.mean() > allowed(0.1, draws)  # what the defect does
    for i in range(40):
        calibration = riskcal.calibrate(
            losses[:, i],
            thresholds=[0.9, 0.5],
            delta=0.1,
            epsilon=0.1,
            test="binomial",
            procedure="fixed_sequence",
        )
        assert calibration.table["threshold"].tolist() == [0.9, 0.5]
        assert calibration.certified == errors[i]


# 6. The first failing row instead of the last that passes, and no way to say "none" (violations in every draw)


def test_the_last_candidate_that_passes_is_returned_and_not_the_first_that_fails():
    losses = np.tile([0.0, 1.0, 1.0], (200, 1))
    grid = [0.9, 0.8, 0.7]
    assert monotone.rcps(losses, grid, 0.05) == 0.9
    assert monotone.conformal_risk_control(losses, grid, 0.05) == 0.9
    calibration = riskcal.calibrate(losses, thresholds=grid, delta=0.05)
    assert calibration.threshold == 0.9
    assert calibration.table["certified"].tolist() == [True, False, False]


def test_a_staircase_is_climbed_no_further_than_it_may_be():
    """Six steps, the third just above delta: violations at most epsilon + 3 SE."""
    rng, draws, above = np.random.default_rng(6), 1500, 0
    risks, grid = np.array([0.0, 0.02, 0.11, 0.3, 0.6, 1.0]), [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    for _ in range(draws):
        losses = (rng.random((150, 1)) < risks) * 1.0
        above += monotone.rcps(losses, grid, 0.1, 0.1, "clopper_pearson") <= 0.7
    assert above / draws <= allowed(0.1, draws)


def test_none_is_the_full_model():
    losses = np.ones((50, 2))
    assert monotone.rcps(losses, [0.9, 0.8], 0.1) == math.inf
    assert monotone.conformal_risk_control(losses, [0.9, 0.8], 0.1) == math.inf
    calibration = riskcal.calibrate(losses, thresholds=[0.9, 0.8], delta=0.1)
    assert (calibration.threshold, calibration.certified) == (math.inf, False)


@pytest.mark.parametrize("method", [name for name in bounds.METHODS if name != "betting"])
def test_no_observed_loss_is_not_a_bound_of_zero(method):
    """1,000 zeros at .1: exactly 1 - .1^(1 / 1000) = .0023."""
    bound = bounds.METHODS[method](np.zeros(1000), epsilon=0.1)
    assert bound >= -math.expm1(math.log(0.1) / 1000) * (1 - 1e-12)
    if method in ("clopper_pearson", "convex_order", "hoeffding_bentkus", "clt"):
        assert bound == pytest.approx(0.0022999, abs=1e-6)
    assert 0.0023 <= bounds.betting(np.zeros(1000), epsilon=0.1) <= 0.0026


# 7. Figures on "the test split" that are of all rows, and a rule that is deployed otherwise than it was calibrated


def test_held_out_losses_are_of_prompts_that_were_not_calibrated_on():
    """Every prompt's loss is its own power of two, so that a mean of them says which prompts it is of."""
    losses = 2.0 ** -np.arange(1, 41)[:, None]
    runs = riskcal.Runs.from_arrays(thresholds=[0.5], dissimilarity=losses)
    table = riskcal.run_trials(runs, [0.9], n_trials=20, test="hoeffding")
    assert table["certified"].all()
    total = losses.sum()
    for row in table.itertuples():
        calibrated, heldout = row.calibration_loss * 32, row.heldout_loss * 8
        assert calibrated + heldout == pytest.approx(total, abs=1e-13)
        assert bin(round(calibrated * 2**40)).count("1") == 32
        assert bin(round(heldout * 2**40)).count("1") == 8


def test_the_rule_that_was_calibrated_is_the_one_that_is_deployed(tmp_path):
    """Measure, schedule, first layer and length limit of the certified rows, through the file, to the letter."""
    schedule = riskcal.Decaying(4.0, 32)
    recorded = {
        "temperature": 4.0,
        "max_length": 32,
        "form": "paper",
        "min_layer": 2,
        "measure": "entropy",
    }
    frame = riskcal.Runs.from_arrays(
        thresholds=[0.9, 0.5], dissimilarity=np.zeros((80, 2))
    ).to_frame()
    runs = riskcal.Runs.from_frame(frame.assign(**recorded, policy='{"max_new_tokens": 16}'))
    policy = riskcal.calibrate(runs, delta=0.1).policy()
    wanted = riskcal.ExitPolicy(
        threshold=0.5,
        measure="entropy",
        schedule=schedule,
        min_layer=2,
        max_new_tokens=16,
        cache="project",
        batching="diverge",
        certificate=policy.certificate,
    )
    assert policy == wanted
    policy.save(tmp_path / "policy.json")
    assert riskcal.ExitPolicy.load(tmp_path / "policy.json") == wanted


# 8. Freed level moved to the smallest remaining p-value (family-wise error .41), and a z-test that says 0 to five zeros


def test_freed_level_follows_the_graph_and_not_the_p_values():
    """Twenty hypotheses, ten true and independent: at most epsilon + 3 SE for a graph fixed beforehand."""
    rng, draws, k = np.random.default_rng(8), 1200, 20
    weights, cycle = np.full(k, 1 / k), np.roll(np.eye(k), 1, axis=1)
    true = np.arange(k) % 2 == 0
    errors = 0
    for _ in range(draws):
        p = np.where(true, rng.random(k), 0.0)
        errors += bool(fwer.graphical(p, 0.1, weights, cycle)[true].any())
    assert errors / draws <= allowed(0.1, draws)
    # level freed by the first goes to the second alone, though the third p-value is smaller
    assert fwer.graphical([0.01, 0.06, 0.03], 0.06, [0.5, 0.5, 0], np.eye(3, k=1)).tolist() == [
        True,
        True,
        True,
    ]
    assert fwer.graphical([0.01, 0.07, 0.03], 0.06, [0.5, 0.5, 0], np.eye(3, k=1)).tolist() == [
        True,
        False,
        False,
    ]


def test_five_losses_of_zero_are_no_proof():
    assert pvalues.clt(np.zeros(5), 0.01) == pytest.approx(0.951, abs=1e-3)
    assert pvalues.binomial(np.zeros(5), 0.01) == pytest.approx(0.99**5)
    assert bounds.clt(np.zeros(5)) > 0.4
    for name in FINITE_SAMPLE:
        assert TESTS[name](np.zeros(5), 0.01) >= 0.99**5 * (1 - 1e-9)


# 9. Signed losses fed to a test for [0, 1] (p <= .1 in .29 of draws at the null, p <= .01 in .22)


@each_test
def test_signed_losses_are_refused_unless_their_range_is_declared(name):
    with pytest.raises(RiskcalError, match=r"losses: -0\.5 at index .*1.* is outside \[0, 1\]"):
        TESTS[name]([0.1, -0.5, 0.3], 0.2)


@pytest.mark.parametrize("name", [n for n in FINITE_SAMPLE if n != "binomial"])
def test_declared_signed_losses_keep_the_level(name):
    """Half of the prompts disagree, by +1 or -1, at a mean of exactly delta: 4,000 draws."""
    draws, delta = 4000, 0.02
    kind = np.random.default_rng(9).random((300, draws))
    losses = np.select([kind < 0.26, kind < 0.5], [1.0, -1.0], 0.0)
    p = TESTS[name](losses, delta, lower=-1.0, upper=1.0)
    for level in (0.1, 0.01):
        assert (p <= level).mean() <= allowed(level, draws)


# 10. A sum rebuilt from a rounded mean: one step too many (p 1.7 times too large) or, in float32, one too few (invalid)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, bool])
@pytest.mark.parametrize("n", [10, 100, 500])
def test_every_count_is_counted_right_in_every_number_type(dtype, n):
    counts = np.arange(n + 1)
    losses = (np.arange(n)[:, None] < counts).astype(dtype)
    delta = 0.2
    exact = stats.binom.cdf(counts, n, delta)
    below = counts < n * delta
    assert pvalues.binomial(losses, delta)[below] == pytest.approx(exact[below], rel=1e-9)
    assert pvalues.bentkus(losses, delta)[below] == pytest.approx(
        np.minimum(1, math.e * exact[below]), rel=1e-9
    )
    assert bounds.clopper_pearson(losses)[:-1] == pytest.approx(
        stats.beta.ppf(0.95, counts + 1, n - counts)[:-1]
    )


def test_seven_losses_of_one_in_a_hundred_are_seven():
    assert math.ceil(100 * (7 / 100)) == 8  # the trap
    losses = np.r_[np.ones(7), np.zeros(93)]
    assert pvalues.bentkus(losses, 0.2) == pytest.approx(
        math.e * stats.binom.cdf(7, 100, 0.2), rel=1e-9
    )


@pytest.mark.parametrize("tenths", [3, 7, 11, 29])
def test_fractional_losses_that_add_up_to_an_integer_cost_no_step(tenths):
    losses = np.r_[np.full(10 * tenths, 0.1), np.zeros(500 - 10 * tenths)]
    assert pvalues.bentkus(losses, 0.2) == pytest.approx(
        math.e * stats.binom.cdf(tenths, 500, 0.2), rel=1e-9
    )
    assert pvalues.bentkus(losses.astype(np.float32), 0.2) == pytest.approx(
        math.e * stats.binom.cdf(tenths, 500, 0.2), rel=1e-9
    )


def test_no_observed_loss_loses_no_factor_to_a_logarithm_of_zero():
    """(1 - delta)^n, not e times that: n = 100, delta = .05."""
    assert pvalues.hoeffding_bentkus(np.zeros(100), 0.05) == pytest.approx(0.95**100)
    assert pvalues.hoeffding_bentkus(np.zeros(100), 0.05) == pytest.approx(0.00592, abs=1e-5)
    assert pvalues.convex_order(np.zeros(100), 0.05) <= 0.95**100 * (1 + 1e-9)


@each_test
def test_no_p_value_leaves_the_unit_interval(name):
    losses = (np.arange(40)[:, None] < np.arange(41)).astype(float)
    for delta in (1e-6, 0.3, 1 - 1e-6):
        p = TESTS[name](losses, delta)
        assert (p > 0).all()
        assert (p <= 1).all()


# 11. Edges: a delta of 0 or 1 divides by zero, NaN gives NaN, a negative mean gives p = 0, a numpy integer breaks an axis


@each_test
@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), "a", None])
def test_a_delta_that_claims_nothing_or_everything_is_refused(name, delta):
    with pytest.raises(RiskcalError, match=r"^delta: "):
        TESTS[name]([0.0, 1.0, 0.0], delta)


def test_numpy_numbers_are_numbers():
    losses = np.zeros((np.int64(30), np.int64(2)), dtype=np.int64)
    one = np.float32(0.25)
    assert pvalues.convex_order(losses, one).shape == (2,)
    assert fwer.fixed_sequence(
        np.zeros(3, dtype=np.float32), np.float64(0.1), starts=np.int64(3)
    ).all()
    assert bounds.simultaneous(losses, epsilon=one).shape == (2,)
    assert monotone.rcps(losses, np.array([3, 1]), np.float32(0.5)) == 1.0
    calibration = riskcal.calibrate(losses, thresholds=np.array([1, 0]), delta=np.float64(0.5))
    assert type(calibration.certified) is bool
    assert type(calibration.threshold) is float


def test_a_policy_is_saved_although_its_risk_rises_with_the_threshold(tmp_path):
    losses = (np.random.default_rng(11).random((500, 3)) < [0.0, 0.4, 0.02]) * 1.0
    calibration = riskcal.calibrate(losses, thresholds=[0.9, 0.7, 0.5], delta=0.1, procedure="holm")
    assert "does not fall steadily" in calibration.message
    calibration.policy().save(tmp_path / "policy.json")
    assert riskcal.ExitPolicy.load(tmp_path / "policy.json").threshold == 0.5
