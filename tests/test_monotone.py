"""Conformal risk control, RCPS, and the detection of risks that rise with the threshold."""

import math

import numpy as np
import pytest

import riskcal
from riskcal import RiskcalError, bounds, fwer, monotone, pvalues

GRID = np.linspace(0.95, 0.0, 20)
RISK = 0.35 * (1 - GRID) ** 1.5


def falling(rng, n, risk=RISK):
    """Each prompt fails below its own threshold, with its own size of loss: monotone in every row, mean ``risk``."""
    return np.where(rng.random((n, 1)) < risk / 0.4, rng.beta(2, 3, (n, 1)), 0.0)


def test_conformal_risk_control_by_hand():
    losses = [[0.0, 0.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]
    thresholds = [0.9, 0.6, 0.3]
    # (sum + 1) / 4 is .25, .375, .75
    assert monotone.conformal_risk_control(losses, thresholds, 0.2) == math.inf
    assert monotone.conformal_risk_control(losses, thresholds, 0.25) == 0.9
    assert monotone.conformal_risk_control(losses, thresholds, 0.37) == 0.9
    assert monotone.conformal_risk_control(losses, thresholds, 0.375) == 0.6
    assert monotone.conformal_risk_control(losses, thresholds, 0.75) == 0.3
    assert monotone.conformal_risk_control(losses, thresholds, 1.0, upper=2.0) == 0.3
    assert monotone.conformal_risk_control(losses, thresholds, 0.9, upper=2.0) == 0.6


def test_conformal_risk_control_says_first_that_it_controls_the_expectation_only():
    first = monotone.conformal_risk_control.__doc__.splitlines()[0]
    assert first.startswith("Controls the expectation only, with no ``1 - epsilon`` guarantee")


def test_conformal_risk_control_keeps_the_expectation_and_not_the_probability():
    """2,000 draws of 100 prompts: mean risk at most delta + 3 SE; but more than .1 of the draws lie above delta."""
    rng, draws, delta = np.random.default_rng(1), 2000, 0.1
    risk = dict(zip(GRID.tolist(), RISK.tolist(), strict=True)) | {math.inf: 0.0}
    found = [
        risk[monotone.conformal_risk_control(falling(rng, 100), GRID, delta)] for _ in range(draws)
    ]
    assert np.mean(found) <= delta + 3 * np.std(found) / math.sqrt(draws)
    assert np.mean(np.array(found) > delta) > 0.1


@pytest.mark.parametrize("bound", ["convex_order", "betting", "empirical_bernstein"])
def test_rcps_keeps_the_probability(bound):
    """1,500 draws of 150 prompts, a candidate just above delta: violations at most epsilon + 3 SE, SE .0077."""
    rng, draws, delta, epsilon = np.random.default_rng(2), 1500, 0.1, 0.1
    curve = np.array([0.02, 0.05, 0.1001, 0.15])
    above = 0
    for _ in range(draws):
        threshold = monotone.rcps(
            falling(rng, 150, curve), [0.9, 0.8, 0.7, 0.6], delta, epsilon, bound
        )
        above += threshold <= 0.7
    assert above / draws <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / draws)


@pytest.mark.parametrize("name", bounds.METHODS)
def test_rcps_is_the_lowest_threshold_from_which_on_every_bound_is_at_most_delta(name):
    rng = np.random.default_rng(3)
    for n in (10, 300, *[60] * 15):
        losses = falling(rng, n)
        losses = np.ceil(losses) if name == "clopper_pearson" else losses
        for delta in (0.05, 0.1, 0.3):
            options = {"grid": [delta]} if name == "betting" else {}
            passes = np.atleast_1d(bounds.METHODS[name](losses, epsilon=0.1, **options)) <= delta
            certified = GRID[np.logical_and.accumulate(passes)]
            expected = certified[-1] if certified.size else math.inf
            assert monotone.rcps(losses, GRID, delta, 0.1, name) == expected


def test_rcps_is_the_fixed_sequence_and_does_not_care_how_columns_stand():
    rng = np.random.default_rng(4)
    losses = falling(rng, 200)
    p = pvalues.convex_order(losses, 0.15)
    expected = GRID[fwer.fixed_sequence(p, 0.05)][-1]
    order = rng.permutation(GRID.size)
    assert monotone.rcps(losses, GRID, 0.15) == expected
    assert monotone.rcps(losses[:, order], GRID[order], 0.15) == expected
    calibrated = riskcal.calibrate(losses, thresholds=GRID, delta=0.15, test="convex_order")
    assert calibrated.threshold == expected
    assert monotone.conformal_risk_control(
        losses[:, order], GRID[order], 0.15
    ) == monotone.conformal_risk_control(losses, GRID, 0.15)


def test_losses_in_other_units():
    losses = falling(np.random.default_rng(5), 100)
    plain = monotone.rcps(losses, GRID, 0.15)
    assert math.isfinite(plain)
    assert monotone.rcps(10 * losses - 3, GRID, -1.5, lower=-3.0, upper=7.0) == plain
    controlled = monotone.conformal_risk_control(losses, GRID, 0.15)
    assert monotone.conformal_risk_control(10 * losses, GRID, 1.5, upper=10.0) == controlled


BOTH = {
    "conformal_risk_control": monotone.conformal_risk_control,
    "rcps": monotone.rcps,
}
each = pytest.mark.parametrize("procedure", BOTH.values(), ids=BOTH.keys())


@each
def test_a_loss_that_rises_with_the_threshold_is_refused_where_it_first_does(procedure):
    losses = [[0.0, 0.1, 0.3], [0.0, 0.4, 0.2], [0.5, 0.0, 0.0]]
    with pytest.raises(RiskcalError) as refusal:
        procedure(losses, [0.9, 0.6, 0.3], 0.2)
    message = str(refusal.value)
    assert message.startswith(
        "losses: in row 1 the loss rises from 0.2 to 0.4 as the threshold rises from 0.3 to 0.6"
    )
    assert "riskcal.calibrate" in message
    reversed_columns = np.array(losses)[:, ::-1]
    with pytest.raises(RiskcalError, match=r"row 1 the loss rises from 0\.2 to 0\.4"):
        procedure(reversed_columns, [0.3, 0.6, 0.9], 0.2)


@each
def test_a_rise_that_is_rounding_is_let_through(procedure):
    losses = np.array([[0.1, 0.1 - 1e-12], [0.0, 0.0]] * 300)
    assert procedure(losses, [0.9, 0.6], 0.4) == 0.6


@each
@pytest.mark.parametrize(
    ("losses", "thresholds", "delta", "named"),
    [
        ([[0.1, float("nan")], [0.0, 0.0]], [0.9, 0.6], 0.2, "losses: nan at index [0, 1]"),
        ([[0.1, 1.2], [0.0, 0.0]], [0.9, 0.6], 0.2, "losses: 1.2 at index [0, 1]"),
        ([0.1, 0.2], [0.9], 0.2, "losses: has shape (2,)"),
        ([[0.1, 0.2]], [0.9, 0.6], 0.2, "losses: one row only"),
        ([[0.1, 0.2], [0.0, 0.0]], [0.9], 0.2, "thresholds: 1 given for 2 columns"),
        ([[0.1, 0.2], [0.0, 0.0]], [0.9, 0.9], 0.2, "thresholds: 0.9 is given more than once"),
        ([[0.1, 0.2], [0.0, 0.0]], [0.9, math.inf], 0.2, "thresholds: inf at index 1"),
        ([[0.1, 0.2], [0.0, 0.0]], [0.9, float("nan")], 0.2, "thresholds: nan at index 1"),
        ([[0.1, 0.2], [0.0, 0.0]], [0.9, 0.6], 1.0, "delta: 1 is not strictly between"),
        ([[0.1, 0.2], [0.0, 0.0]], [0.9, 0.6], float("nan"), "delta: is NaN"),
    ],
)
def test_bad_input_is_refused_by_name(procedure, losses, thresholds, delta, named):
    with pytest.raises(RiskcalError) as refusal:
        procedure(losses, thresholds, delta)
    assert str(refusal.value).startswith(named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bound": "wsr"}, "bound: 'wsr' is unknown"),
        ({"epsilon": 0}, "epsilon: 0 is not"),
        ({"bound": "clopper_pearson"}, "losses: 0.1 at row"),
        ({"bound": "clopper_pearson", "upper": 2.0}, "bound: 'clopper_pearson' is for 0/1 losses"),
    ],
)
def test_rcps_refuses_by_name(options, named):
    with pytest.raises(RiskcalError) as refusal:
        monotone.rcps([[0.1, 0.2], [0.0, 0.0]], [0.9, 0.6], 0.3, **options)
    assert str(refusal.value).startswith(named)


def test_a_bump_is_found_with_its_size():
    rng = np.random.default_rng(6)
    curve = RISK.copy()
    curve[4:7] = 0.2
    losses = falling(rng, 500, curve)
    table = monotone.risk_rises(losses, GRID)
    assert table.columns.tolist() == [
        "threshold",
        "higher_threshold",
        "loss",
        "higher_loss",
        "rise",
        "pvalue",
    ]
    pairs = set(zip(table["threshold"].round(2), table["higher_threshold"].round(2), strict=True))
    assert (0.6, 0.65) in pairs  # the step down behind the bump
    assert (table["threshold"] < table["higher_threshold"]).all()
    assert (table["rise"] > 0).all()
    row = table[
        table["threshold"].round(2).eq(0.6) & table["higher_threshold"].round(2).eq(0.65)
    ].iloc[0]
    assert row["loss"] == pytest.approx(losses[:, 7].mean())
    assert row["higher_loss"] == pytest.approx(losses[:, 6].mean())
    assert row["rise"] == pytest.approx(row["higher_loss"] - row["loss"])
    order = rng.permutation(GRID.size)
    assert monotone.risk_rises(losses[:, order], GRID[order]).equals(table)


def test_a_slow_rise_is_found_where_no_two_neighbours_show_it():
    rng = np.random.default_rng(7)
    grid = np.linspace(0.99, 0.0, 100)
    losses = falling(rng, 200, 0.1 + 0.06 * np.sin(8 * grid))
    table = monotone.risk_rises(losses, grid)
    assert len(table) > 0
    assert (table["higher_threshold"] - table["threshold"]).min() > 0.05


def test_rows_that_all_fall_are_never_reported():
    assert monotone.risk_rises(falling(np.random.default_rng(8), 300), GRID).empty


def test_noise_is_reported_in_at_most_epsilon_of_the_draws():
    """1,000 draws of ten candidates with the same risk: at most epsilon + 3 SE, SE .0095."""
    rng, draws, epsilon = np.random.default_rng(9), 1000, 0.1
    found = 0
    for _ in range(draws):
        losses = (rng.random((60, 10)) < rng.beta(1, 4, (60, 1))) * 1.0
        found += not monotone.risk_rises(losses, GRID[:10], epsilon=epsilon).empty
    assert found / draws <= epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / draws)


@pytest.mark.parametrize(
    ("losses", "thresholds", "options", "named"),
    [
        ([[0.1], [0.2]], [0.5], {}, "thresholds: one only"),
        ([[0.1, 0.2], [0.2, float("nan")]], [0.5, 0.4], {}, "losses: nan at index [1, 1]"),
        ([[0.1, -0.2], [0.2, 0.0]], [0.5, 0.4], {}, "losses: -0.2 at index [0, 1]"),
        ([[0.1, 0.2], [0.2, 0.0]], [0.5], {}, "thresholds: 1 given for 2 columns"),
        ([[0.1, 0.2], [0.2, 0.0]], [0.5, 0.4], {"epsilon": 1}, "epsilon: 1 is not"),
    ],
)
def test_risk_rises_refuses_by_name(losses, thresholds, options, named):
    with pytest.raises(RiskcalError) as refusal:
        monotone.risk_rises(losses, thresholds, **options)
    assert str(refusal.value).startswith(named)
