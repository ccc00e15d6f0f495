"""FREE's threshold: moments and densities against scipy.stats, the rule by brute force, and samples that give nothing to fit."""

import free_threshold
import numpy as np
import pytest
from free_threshold import GRID, BetaMixture
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from riskcal import RiskcalError

confidences = st.lists(st.floats(0, 1), min_size=2, max_size=30)
shapes = st.floats(0.2, 20)


def draw(seed, n, disagree=(2, 4), agree=(6, 1.5), share=0.7):
    rng = np.random.default_rng(seed)
    agrees = rng.random(n) < share
    return np.where(agrees, rng.beta(*agree, n), rng.beta(*disagree, n)), agrees


@given(confidences, st.data())
def test_fit_has_the_weighted_moments_of_each_outcome(values, data):
    agrees = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    )
    inside = np.clip(values, 1e-4, 1 - 1e-4)
    assume(np.ptp(inside) > 1e-3)
    mixture = free_threshold.fit(values, agrees)
    for parameters, own in ((mixture.agree, agrees), (mixture.disagree, ~agrees)):
        # the released code's responsibilities, before they are normalised
        weights = np.where(own, 0.2, 1e-4)
        mean = np.average(inside, weights=weights)
        fitted = stats.beta(*parameters)
        assert min(parameters) > 0
        assert fitted.mean() == pytest.approx(mean, rel=1e-6)
        assert fitted.var() == pytest.approx(
            np.average((inside - mean) ** 2, weights=weights), rel=1e-4
        )


def test_fit_recovers_what_the_sample_was_drawn_from():
    mixture = free_threshold.fit(*draw(0, 100_000))  # standard errors below 2%
    assert mixture.agree == pytest.approx((6, 1.5), rel=0.06)
    assert mixture.disagree == pytest.approx((2, 4), rel=0.06)


@given(shapes, shapes, shapes, shapes, st.floats(0.05, 0.95))
def test_agreement_and_threshold_are_those_of_the_densities(a0, b0, a1, b1, zeta):
    mixture = BetaMixture((a0, b0), (a1, b1))
    density = stats.beta.pdf(GRID, a1, b1)
    expected = density / (density + stats.beta.pdf(GRID, a0, b0))
    np.testing.assert_allclose(mixture.agreement(GRID), expected, rtol=1e-9, atol=1e-12)
    assume(np.abs(expected - zeta).min() > 1e-9)
    good = [g for i, g in enumerate(GRID) if (expected[i:] > zeta).all()]
    assert mixture.threshold(zeta) == (good[0] if good else GRID[-1])


@given(confidences, st.data())
def test_row_24_the_threshold_is_on_the_grid_whatever_the_sample(values, data):
    agrees = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    assert free_threshold.threshold(values, agrees) in GRID
    assert GRID[0] == 0.3
    assert GRID[-1] == 0.9


@given(st.integers(0, 20), st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_more_agreement_asks_for_no_less_confidence(seed, one, other):
    sample = draw(seed, 200)
    low, high = sorted([one, other])
    assert free_threshold.threshold(*sample, agreement=low) <= free_threshold.threshold(
        *sample, agreement=high
    )


def test_a_shallow_model_that_tells_good_from_bad_exits_earlier():
    sharp = free_threshold.threshold(*draw(1, 2000, disagree=(1, 8), agree=(8, 1)))
    blunt = free_threshold.threshold(*draw(1, 2000, disagree=(8, 3), agree=(10, 1.5)))
    assert sharp == pytest.approx(0.5, abs=0.11)
    assert blunt > sharp


def test_confidence_that_misleads_gives_the_most_cautious_threshold():
    assert free_threshold.threshold(*draw(2, 2000, disagree=(8, 2), agree=(2, 8))) == 0.9


@pytest.mark.parametrize(
    ("confidence", "agrees"),
    [
        ([0.7], [True]),
        ([0.7, 0.7, 0.7], [1, 1, 0]),
        ([1.0, 1.0, 0.99999], [1, 1, 0]),
    ],  # margins saturate at 1
)
def test_what_cannot_be_fitted_keeps_its_start(confidence, agrees):
    assert free_threshold.fit(confidence, agrees) == BetaMixture((1.0, 2.0), (2.0, 1.0))
    # 2c > 0.4 (2c + 2(1-c)): c > 0.4
    assert free_threshold.threshold(confidence, agrees) == GRID[2]


def test_an_outcome_never_seen_has_the_moments_of_all():
    for outcome in (True, False):
        found = free_threshold.fit([0.2, 0.5, 0.9], [outcome] * 3)
        assert found.disagree == pytest.approx(found.agree)
        assert found.agreement([0.1, 0.6]) == pytest.approx([0.5, 0.5])


def test_a_shallow_model_that_is_never_right_gets_the_largest_threshold():
    assert free_threshold.threshold([0.2, 0.5, 0.9], [False] * 3) == GRID[-1]
    assert (
        free_threshold.running_thresholds([0.2, 0.5, 0.9, 0.4], [0, 0, 0, 1], [0, 0, 1, 2])[
            :2
        ].tolist()
        == [GRID[-1]] * 2
    )


def test_one_outcomes_ties_are_fitted():
    found = free_threshold.fit([1.0, 1.0, 1.0, 0.2, 0.4], [1, 1, 1, 0, 0])
    assert np.isfinite([*found.agree, *found.disagree]).all()
    assert found.agreement(0.99) > 0.99 > 0.01 > found.agreement(0.3)


def test_running_thresholds_are_fits_to_all_so_far_and_then_stay():
    confidence, agrees = draw(3, 60)
    prompts = np.repeat(np.arange(20), 3)
    found = free_threshold.running_thresholds(confidence, agrees, prompts, updates=8)
    expected = [free_threshold.threshold(confidence[: 3 * i], agrees[: 3 * i]) for i in range(1, 9)]
    assert found.tolist() == expected + expected[-1:] * 12
    assert len(set(free_threshold.running_thresholds(confidence, agrees, prompts))) > 1
    assert free_threshold.running_thresholds(confidence, agrees, prompts).size == 20


@pytest.mark.parametrize(
    ("confidence", "agrees", "message"),
    [
        ([0.5, 1.2], [1, 0], "confidence: 1.2 at index 1"),
        ([0.5, np.nan], [1, 0], "confidence: nan at index 1"),
        ([0.5, 0.6], [1, 2], "agrees: 2 at index 1"),
        ([0.5, 0.6], [1], r"agrees: has shape \(1,\)"),
        ([], [], "confidence: is empty"),
    ],
)
def test_bad_tokens_are_refused(confidence, agrees, message):
    with pytest.raises(RiskcalError, match=message):
        free_threshold.fit(confidence, agrees)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, 2], r"prompts: has shape \(2,\)"),
        ([1, 2, 1], "prompts: the tokens of a prompt stand apart"),
    ],
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(RiskcalError, match=message):
        free_threshold.running_thresholds([0.5, 0.6, 0.7], [1, 0, 1], prompts)


@pytest.mark.parametrize("zeta", [0.0, 1.0, float("nan")])
def test_bad_agreement_is_refused(zeta):
    with pytest.raises(RiskcalError, match="agreement"):
        free_threshold.threshold([0.5], [1], agreement=zeta)
