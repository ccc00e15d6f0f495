"""What published statistics, protocols and cost figures come to (Schuster et al. 2022; Valade 2024)."""

import math

import mpmath
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import riskcal
from riskcal import efficiency, fwer, pvalues
from riskcal.efficiency import DecoderDimensions

SMALL = DecoderDimensions(d_model=512, d_ff=1024, vocabulary=32_128, n_layers=8, gated=False)


# -- p-values


def test_hoeffding_bentkus_against_mpmath_at_the_edges():
    with mpmath.workdps(40):
        for n, total, delta in [
            (100, 0, 0.05),
            (100, 3, 0.1),
            (500, 25, 0.1),
            (80, 8, 0.1),
            (60, 30, 0.1),
        ]:
            mean, tolerance = mpmath.mpf(total) / n, mpmath.mpf(delta)
            below = min(mean, tolerance)
            entropy = sum(
                (p * mpmath.log(p / q) if p else mpmath.mpf(0))
                for p, q in ((below, tolerance), (1 - below, 1 - tolerance))
            )
            tail = sum(
                mpmath.binomial(n, i) * tolerance**i * (1 - tolerance) ** (n - i)
                for i in range(total + 1)
            )
            expected = min(1, mpmath.exp(-n * entropy), mpmath.e * tail) if mean < tolerance else 1
            losses = np.r_[np.ones(total), np.zeros(n - total)]
            assert pvalues.hoeffding_bentkus(losses, delta) == pytest.approx(
                float(expected), rel=1e-10
            )


# -- fixed-sequence testing


@pytest.mark.parametrize(
    ("pvalues_", "certified"),
    [
        ([0.2, 0.001, 0.001], []),
        ([0.01, 0.2, 0.001], [0]),
        ([0.01, 0.05, 0.051], [0, 1]),
        ([0.01, 0.01, 0.01], [0, 1, 2]),
    ],
)
def test_stops_at_the_first_failure_and_returns_the_one_before(pvalues_, certified):
    rejected = fwer.fixed_sequence(np.array(pvalues_), 0.05)
    assert np.flatnonzero(rejected).tolist() == certified
    # what released code returned: never right
    first_failing = next((i for i, p in enumerate(pvalues_) if p > 0.05), -1)
    assert first_failing not in certified or first_failing == -1


def test_nothing_certified_is_the_full_model():
    losses = np.ones((50, 3))
    calibration = riskcal.calibrate(losses, thresholds=[0.9, 0.5, 0.1], delta=0.1)
    assert not calibration.certified
    assert calibration.threshold == math.inf
    assert calibration.policy().is_full_model


def test_violations_in_two_thousand_draws():
    """Four thresholds of risks .06, .09, .11 and .2 at delta .1; a violation certifies one of the last two."""
    rng = np.random.default_rng(13)
    risks, draws = np.array([0.06, 0.09, 0.11, 0.2]), 2000
    violations = 0
    for _ in range(draws):
        losses = (rng.random((200, 1)) < risks).astype(float)
        calibration = riskcal.calibrate(losses, thresholds=[0.9, 0.7, 0.5, 0.3], delta=0.1)
        violations += calibration.threshold <= 0.5
    assert stats.binomtest(violations, draws, 0.05, alternative="greater").pvalue > 0.001


# -- textual and risk losses


def test_losses_are_zero_for_the_full_models_output_and_clipped_where_exits_are_better():
    table = pd.DataFrame(
        [
            ("a", math.inf, 0.0, 0.4), ("a", 0.5, 0.0, 0.4), ("a", 0.3, 0.2, 0.1),
            ("b", math.inf, 0.0, 0.0), ("b", 0.5, 0.3, 0.5), ("b", 0.3, 1.0, 1.0),
        ],
        columns=["prompt", "threshold", "dissimilarity", "risk"],
    )  # fmt: skip
    runs = riskcal.Runs.from_frame(table)
    a, b = (int(np.flatnonzero(runs.prompts == name)[0]) for name in "ab")
    np.testing.assert_allclose(runs.losses("textual")[[a, b]], [[0.0, 0.2], [0.3, 1.0]])
    np.testing.assert_allclose(runs.losses("risk")[[a, b]], [[0.0, -0.3], [0.5, 1.0]])
    np.testing.assert_allclose(runs.losses("risk_clipped")[[a, b]], [[0.0, 0.0], [0.5, 1.0]])


# -- the protocol of fifty trials


def test_fifty_trials_are_reproducible_and_tell_layers():
    runs = riskcal.load_example("g2p")
    arguments = {"deltas": [0.05, 0.1], "n_trials": 50, "calibration_fraction": 0.8}
    trials = riskcal.run_trials(runs, seed=3, **arguments)
    assert len(trials) == 100
    pd.testing.assert_frame_equal(trials, riskcal.run_trials(runs, seed=3, **arguments))
    assert not trials.equals(riskcal.run_trials(runs, seed=4, **arguments))
    layers = trials.groupby("delta")["layers"].mean()
    assert layers[0.1] < layers[0.05] < 8


# -- FLOPs after Elbayad et al. 2020, Appendix B


@pytest.mark.parametrize(
    ("exit_layer", "predictor", "per_token"),
    [
        (8, "none", 413_712_384),
        (1, "head", 87_840_768),
        (2, "head", 167_292_928),
        (2, "none", 134_393_856),
        (8, "head", 644_005_888),
    ],
)
def test_flops_per_token(exit_layer, predictor, per_token):
    """d 512, f 1024, V 32,128, L 8, 5 tokens after 200 of source, plain feed-forward layers: integers computed by hand."""
    exits = np.full((1, 5), exit_layer)
    assert efficiency.decoder_flops(exits, SMALL, [200], predictor=predictor).per_token == per_token


# -- timing


def test_drops_the_warm_up_and_compares_with_both_baselines():
    rows = [
        (turn, run, setting, seconds * (100 if turn == 0 else 1))
        for turn in range(4)
        for run in range(3)
        for setting, seconds in (
            ("generate with a cache", 1.0),
            ("full model", 0.5),
            ("certified", 0.1),
        )
    ]
    table = efficiency.speed_table(
        pd.DataFrame(rows, columns=["round", "run", "setting", "seconds"]),
        ["generate with a cache", "full model"],
    ).set_index("setting")
    assert table.loc["certified", "mean"] == pytest.approx(0.1)
    assert table.loc["certified", "x generate with a cache"] == pytest.approx(10)
    assert table.loc["certified", "x full model"] == pytest.approx(5)
