import hashlib
import inspect
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riskcal import (
    Constant,
    Decaying,
    ExitPolicy,
    RiskcalError,
    Runs,
    calibrate,
    fwer,
    pvalues,
    records,
)
from riskcal.calibration.posing import pose

GRID = [1.0, 0.9, 0.7, 0.5, 0.3]


def losses_with(counts, n=100, seed=0):
    """0/1 losses with these column sums, in scattered rows."""
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(np.arange(n) < count) for count in counts]
    return np.column_stack(columns).astype(float)


def rare(n=300, seed=0, grid=GRID):
    """Losses that grow as the threshold falls, from far below .1 to far above."""
    rng = np.random.default_rng(seed)
    u = rng.random(n)[:, None]
    return np.where(u < 0.6 * (1 - np.array(grid)) ** 2, rng.random((n, len(grid))), 0.0)


def runs_of(losses, grid=GRID, **more):
    return Runs.from_arrays(thresholds=grid, dissimilarity=losses, **more)


def permuted(losses):
    """The documented order of an array's rows."""
    return losses[records.content_order(losses)]


# Which candidates are certified


@pytest.mark.parametrize(
    ("counts", "certified", "threshold"),
    [
        ([0, 1, 3, 4, 20], [1, 1, 1, 1, 0], 0.5),
        ([0, 9, 0, 0, 0], [1, 0, 0, 0, 0], 1.0),
        ([9, 0, 0, 0, 0], [0, 0, 0, 0, 0], math.inf),
        ([0, 0, 0, 0, 0], [1, 1, 1, 1, 1], 0.3),
        ([100, 100, 100, 100, 100], [0, 0, 0, 0, 0], math.inf),
    ],
)
def test_a_fixed_sequence_walks_down_from_the_highest_threshold_and_never_past_a_failure(
    counts, certified, threshold
):
    """At n = 100 and delta .1 the exact test passes up to 4 ones (.024) and fails from 5 (.058)."""
    calibration = calibrate(losses_with(counts), thresholds=GRID, delta=0.1, test="binomial")
    assert calibration.procedure == "fixed_sequence"
    assert calibration.table["threshold"].tolist() == GRID
    assert calibration.table["certified"].tolist() == [bool(c) for c in certified]
    assert calibration.threshold == threshold
    assert calibration.certified == any(certified)
    assert calibration.table["loss"].tolist() == [c / 100 for c in counts]
    assert calibration.table["n"].tolist() == [100] * 5


@pytest.mark.parametrize(
    ("procedure", "counts", "certified"),
    [
        ("bonferroni", [9, 2, 3, 1, 0], [0, 1, 1, 1, 1]),  # .0078 for 3 is at most .05 / 5
        ("holm", [9, 2, 3, 4, 0], [0, 1, 1, 1, 1]),  # .0237 for 4 is at most .05 / 2
        ("bonferroni", [9, 2, 3, 4, 0], [0, 1, 1, 0, 1]),
        ("holm", [9, 9, 9, 9, 4], [0, 0, 0, 0, 0]),
    ],
)
def test_holm_and_bonferroni_pass_over_failures(procedure, counts, certified):
    calibration = calibrate(
        losses_with(counts), thresholds=GRID, delta=0.1, test="binomial", procedure=procedure
    )
    assert calibration.table["certified"].tolist() == [bool(c) for c in certified]


def test_starts_let_a_sequence_begin_again_at_a_share_of_the_level():
    counts = [9, 0, 0, 2, 2]  # starts at candidates 0 and 2, each at .025
    two = calibrate(losses_with(counts), thresholds=GRID, delta=0.1, test="binomial", starts=2)
    assert two.table["certified"].tolist() == [False, False, True, True, True]
    one = calibrate(losses_with(counts), thresholds=GRID, delta=0.1, test="binomial")
    assert not one.certified


@given(st.permutations(range(5)))
def test_the_columns_of_an_array_may_stand_in_any_order(order):
    losses = rare()
    expected = calibrate(losses, thresholds=GRID, delta=0.1).table
    found = calibrate(losses[:, order], thresholds=np.array(GRID)[order], delta=0.1).table
    pd.testing.assert_frame_equal(found, expected)


def test_the_highest_threshold_is_tested_first_even_above_one_or_below_zero():
    losses = losses_with([0, 0, 50])
    calibration = calibrate(losses, thresholds=[1.5, 0.0, -2.0], delta=0.1)
    assert calibration.table["threshold"].tolist() == [1.5, 0.0, -2.0]
    assert calibration.threshold == 0.0


# Nothing certified


def test_a_first_failure_leaves_the_full_model_and_names_the_size_of_a_fresh_sample():
    calibration = calibrate(losses_with([4, 0, 0, 0, 0], n=50), thresholds=GRID, delta=0.1)
    assert calibration.threshold == math.inf
    assert not calibration.certified
    assert calibration.chosen is None
    policy = calibration.policy()
    assert policy.is_full_model
    assert policy.threshold == math.inf
    assert policy.certificate.pvalue is None
    found = re.search(r"fresh sample of about (\d+) rows", calibration.message)
    assert found is not None, calibration.message
    assert 50 < int(found[1]) < 2000
    assert "Nothing was certified" in calibration.message
    assert "new attempt" in calibration.message


def test_where_even_the_safest_candidate_loses_more_than_delta_no_sample_size_is_promised():
    calibration = calibrate(losses_with([40, 30, 30, 60, 90]), thresholds=GRID, delta=0.1)
    assert "fresh sample" not in calibration.message
    assert "raise delta" in calibration.message


@pytest.mark.parametrize(
    "test", ["betting", "convex_order", "hoeffding_bentkus", "bentkus", "hoeffding", "binomial"]
)
def test_a_mean_just_below_delta_or_a_tiny_delta_still_gets_an_answer(test):
    near = np.zeros((1000, 1))
    near[:99] = 1
    for losses, delta in (
        (near, 0.0990001),
        (np.zeros((20, 1)), 1e-12),
        (near, 0.0990000000000001),
    ):
        calibration = calibrate(losses, thresholds=[0.5], delta=delta, test=test)
        assert not calibration.certified
        assert "more than a million fresh rows" in calibration.message


# The level and the order at which betting is tuned


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({}, 0.05),
        ({"epsilon": 0.2}, 0.2),
        ({"starts": 2}, 0.05 / 2),
        ({"procedure": "holm"}, 0.05 / 5),
        ({"procedure": "bonferroni", "epsilon": 0.1}, 0.1 / 5),
        ({"attempt": 1}, 6 * 0.05 / math.pi**2),
        ({"attempt": 3}, 6 * 0.05 / math.pi**2 / 9),
        ({"attempt": 2, "procedure": "holm"}, 6 * 0.05 / math.pi**2 / 4 / 5),
        ({"attempt": 2, "starts": 5}, 6 * 0.05 / math.pi**2 / 4 / 5),
    ],
)
def test_betting_is_tuned_at_the_level_that_each_hypothesis_gets(options, level):
    losses = rare()
    p = pvalues.betting(permuted(losses), 0.1, level=level)
    from_array = calibrate(losses, thresholds=GRID, delta=0.1, **options)
    assert from_array.table["pvalue"].tolist() == pytest.approx(p.tolist(), rel=1e-12)
    wrong = pvalues.betting(permuted(losses), 0.1, level=level * 1.7)
    assert from_array.table["pvalue"].tolist() != pytest.approx(wrong.tolist(), rel=1e-3)
    runs = runs_of(losses)
    p = pvalues.betting(runs.losses("textual"), 0.1, level=level)
    assert calibrate(runs, delta=0.1, **options).table["pvalue"].tolist() == pytest.approx(
        p.tolist(), rel=1e-12
    )


def test_the_attempts_share_epsilon_and_the_default_spends_it_all():
    losses = rare()
    spent = [
        calibrate(losses, thresholds=GRID, delta=0.1, attempt=j).epsilon_spent for j in (1, 2, 3)
    ]
    assert spent == pytest.approx([6 * 0.05 / (math.pi**2 * j**2) for j in (1, 2, 3)], rel=1e-12)
    assert sum(6 * 0.05 / (math.pi**2 * j**2) for j in range(1, 10_000)) < 0.05
    default = calibrate(losses, thresholds=GRID, delta=0.1)
    assert (default.epsilon_spent, default.attempt) == (0.05, None)
    assert default.policy().certificate.attempt is None


def test_the_decision_is_made_at_what_the_attempt_spends():
    """Four ones in 100 have p = .024: below .05 and .0304 (attempt 1), above .0076 (attempt 2)."""
    for attempt, certified in ((None, True), (1, True), (2, False)):
        calibration = calibrate(
            losses_with([4]), thresholds=[0.5], delta=0.1, test="binomial", attempt=attempt
        )
        assert calibration.certified == certified


@pytest.mark.parametrize("name", ["convex_order", "hoeffding_bentkus", "bentkus", "hoeffding"])
def test_the_other_tests_give_their_own_p_values(name):
    losses = rare()
    table = calibrate(losses, thresholds=GRID, delta=0.1, test=name).table
    assert table["pvalue"].tolist() == pytest.approx(
        getattr(pvalues, name)(losses, 0.1).tolist(), rel=1e-12
    )


def test_every_procedure_is_the_one_of_its_name():
    losses = rare(400)
    for procedure, select in (
        ("holm", fwer.holm),
        ("bonferroni", fwer.bonferroni),
        ("fixed_sequence", fwer.fixed_sequence),
    ):
        table = calibrate(
            losses, thresholds=GRID, delta=0.1, procedure=procedure, test="convex_order"
        ).table
        assert table["certified"].tolist() == select(table["pvalue"], 0.05).tolist()


# Arrays and runs


@given(st.integers(0, 1000), st.sampled_from(["convex_order", "hoeffding_bentkus"]))
def test_arrays_and_runs_agree_wherever_the_order_of_prompts_plays_no_part(seed, test):
    losses = rare(60, seed)
    from_array = calibrate(losses, thresholds=GRID, delta=0.2, test=test)
    from_runs = calibrate(runs_of(losses), delta=0.2, test=test)
    assert from_runs.threshold == from_array.threshold
    assert from_runs.table["pvalue"].tolist() == pytest.approx(
        from_array.table["pvalue"].tolist(), rel=1e-9
    )


@pytest.mark.parametrize("ids", ["int", "str"])
def test_arrays_with_prompts_are_tested_in_the_order_of_runs_betting_included(ids):
    losses = rare(200, 4)
    prompts = np.random.default_rng(3).permutation(1000)[:200]
    prompts = prompts if ids == "int" else np.array([f"prompt {i}" for i in prompts])
    from_array = calibrate(losses, thresholds=GRID, delta=0.1, prompts=prompts)
    from_runs = calibrate(runs_of(losses, prompts=prompts), delta=0.1)
    assert from_array.table["pvalue"].tolist() == from_runs.table["pvalue"].tolist()
    assert (
        from_array.table["pvalue"].tolist()
        != calibrate(losses, thresholds=GRID, delta=0.1).table["pvalue"].tolist()
    )


def test_rows_of_one_prompt_are_averaged_and_count_once():
    losses = rare(120, 1)
    prompts = np.arange(120) % 40
    means = losses.reshape(3, 40, 5).mean(0)
    averaged = calibrate(losses, thresholds=GRID, delta=0.15, prompts=prompts)
    assert averaged.n == 40
    expected = pvalues.betting(means[records.content_order(means)], 0.15, level=0.05)
    assert averaged.table["pvalue"].tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_clusters_are_the_units_of_runs():
    losses = rare(120, 1)
    cluster = np.array([f"paragraph {i % 40}" for i in range(120)])
    calibration = calibrate(runs_of(losses, cluster=cluster), delta=0.15)
    assert calibration.n == 40
    by_prompt = calibrate(losses, thresholds=GRID, delta=0.15, prompts=cluster)
    assert calibration.table["pvalue"].tolist() == pytest.approx(
        by_prompt.table["pvalue"].tolist(), rel=1e-12
    )


@settings(max_examples=20)
@given(st.permutations(range(30)))
def test_the_order_of_rows_in_a_table_changes_nothing(order):
    losses = rare(30, 2)
    frame = runs_of(losses, prompts=[f"p{i}" for i in range(30)]).to_frame()
    rows = np.concatenate([np.arange(5 * i, 5 * i + 5) for i in order])
    expected, found = (calibrate(Runs.from_frame(f), delta=0.3) for f in (frame, frame.iloc[rows]))
    pd.testing.assert_frame_equal(found.table, expected.table)
    assert found.records_digest == expected.records_digest


def test_bounds_are_the_losses_own():
    losses = rare()
    unit = calibrate(losses, thresholds=GRID, delta=0.1)
    scaled = calibrate(losses * 8, thresholds=GRID, delta=0.8, upper=8.0)
    assert scaled.table["pvalue"].tolist() == pytest.approx(unit.table["pvalue"].tolist(), rel=1e-9)
    assert (scaled.lower, scaled.upper) == (0.0, 8.0)
    assert scaled.policy().certificate.upper == 8.0


# Objectives


def signed_runs(n=400, seed=0):
    """Early exits change many outputs, as often for the better as for the worse."""
    rng = np.random.default_rng(seed)
    full_risk = rng.choice([0.25, 0.5], n)
    change = rng.choice([-0.25, 0.0, 0.25], (n, 2), p=[0.2, 0.6, 0.2])
    risk = np.c_[full_risk[:, None] + change, full_risk]
    names = [f"p{i}" for i in range(n)]
    return Runs.from_arrays(thresholds=[0.8, 0.4, math.inf], risk=risk, prompts=names), change


def test_risk_is_the_signed_difference_and_risk_clipped_its_positive_part():
    runs, change = signed_runs()
    order = records.tested_order([f"p{i}" for i in range(400)])
    signed = calibrate(runs, delta=0.03, objective="risk")
    clipped = calibrate(runs, delta=0.03, objective="risk_clipped")
    assert signed.table["loss"].tolist() == pytest.approx(change.mean(0).tolist(), abs=1e-12)
    assert clipped.table["loss"].tolist() == pytest.approx(
        np.maximum(change, 0).mean(0).tolist(), abs=1e-12
    )
    expected = pvalues.betting(change[order], 0.03, level=0.05, lower=-1.0, upper=1.0)
    assert signed.table["pvalue"].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    expected = pvalues.betting(np.maximum(change[order], 0), 0.03, level=0.05)
    assert clipped.table["pvalue"].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert signed.certified  # nothing got worse on average
    assert not clipped.certified  # but improvements do not count: their mean is .05
    assert (signed.lower, signed.upper) == (-1.0, 1.0)
    assert (clipped.lower, clipped.upper) == (0.0, 1.0)


def test_a_negative_delta_asks_that_the_early_exits_be_better():
    runs, _ = signed_runs()
    assert not calibrate(runs, delta=-0.05, objective="risk").certified
    better = Runs.from_arrays(thresholds=[0.5, math.inf], risk=np.tile([0.1, 0.5], (200, 1)))
    assert calibrate(better, delta=-0.05, objective="risk").certified


def test_the_binomial_test_is_refused_for_signed_risk_and_for_losses_in_between():
    runs, _ = signed_runs()
    with pytest.raises(RiskcalError, match=r"^test: 'binomial' is for 0/1 losses"):
        calibrate(runs, delta=0.1, objective="risk", test="binomial")
    with pytest.raises(RiskcalError, match=r"^losses: 0\.25 at row .* is neither 0 nor 1"):
        calibrate(runs, delta=0.1, objective="risk_clipped", test="binomial")


# Several coordinates


def grid_of_two(n=250, cost=True):
    """Two measures at two thresholds; the state measure is cheaper at the same threshold, and worse."""
    rng = np.random.default_rng(0)
    rows = []
    for prompt, u in enumerate(rng.random(n)):
        for measure, threshold, rate, layers in (
            ("softmax", 0.9, 0.01, 6.0),
            ("softmax", 0.5, 0.03, 5.0),
            ("state", 0.9, 0.02, 4.0),
            ("state", 0.5, 0.4, 1.0),
        ):
            row = {"prompt": prompt, "measure": measure, "min_layer": 2, "threshold": threshold}
            rows.append(row | {"dissimilarity": float(u < rate), "layers": layers + rng.random()})
    frame = pd.DataFrame(rows)
    return Runs.from_frame(frame if cost else frame.drop(columns="layers"))


def test_with_several_coordinates_the_default_is_holm_and_the_cheapest_certified_candidate_is_chosen():
    runs = grid_of_two()
    calibration = calibrate(runs, delta=0.1)
    assert calibration.procedure == "holm"
    assert calibration.table["certified"].sum() == 3
    assert (calibration.chosen["measure"], calibration.chosen["threshold"]) == ("state", 0.9)
    policy = calibration.policy(max_new_tokens=64)
    assert (policy.measure, policy.threshold, policy.min_layer, policy.max_new_tokens) == (
        "state",
        0.9,
        2,
        64,
    )
    assert policy.certificate.k == 4
    assert policy.certificate.pvalue == calibration.chosen["pvalue"] <= 0.05 / 2


def test_a_fixed_sequence_over_several_coordinates_needs_a_preregistered_order():
    runs = grid_of_two()
    with pytest.raises(RiskcalError, match=r"^order: .* needs a preregistered order="):
        calibrate(runs, delta=0.1, procedure="fixed_sequence")
    order = [2, 0, 3, 1]
    calibration = calibrate(runs, delta=0.1, procedure="fixed_sequence", order=order)
    coordinates = ["threshold", "measure"]
    tested = calibration.table[coordinates].to_numpy().tolist()
    assert tested == runs.candidates[coordinates].to_numpy()[order].tolist()
    expected = pvalues.betting(runs.losses()[:, order], 0.1, level=0.05)
    assert calibration.table["pvalue"].tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert calibration.table["layers"].tolist() == pytest.approx(
        runs.values["layers"].mean(0)[order].tolist()
    )
    first = calibration.table["certified"].to_numpy()
    assert first.tolist() == sorted(first.tolist(), reverse=True)


@pytest.mark.parametrize(
    "order",
    [[0, 1, 2], [0, 1, 2, 2], [1, 2, 3, 4], [-1, 0, 1, 2], [0.0, 1.0, 2.0, 3.0], [[0, 1, 2, 3]], [True, False, True, False],
     ["a"], [None] * 4, 3, "0123", []],
    ids=repr,
)  # fmt: skip
def test_an_order_that_is_no_permutation_is_refused(order):
    for runs in (grid_of_two(), rare(grid=GRID[:4])):
        grid = None if isinstance(runs, Runs) else GRID[:4]
        with pytest.raises(RiskcalError, match=r"^order: give every row number"):
            calibrate(runs, delta=0.1, procedure="fixed_sequence", order=order, thresholds=grid)


def test_choosing_among_several_coordinates_needs_the_cost_it_minimises():
    with pytest.raises(RiskcalError, match=r"^cost: 'layers' was not recorded"):
        calibrate(grid_of_two(cost=False), delta=0.1)
    with pytest.raises(RiskcalError, match=r"^cost: 'seconds' was not recorded"):
        calibrate(grid_of_two(), delta=0.1, cost="seconds")


# The full model is inf and nothing else


@pytest.mark.parametrize("kind", ["array", "runs"])
def test_threshold_one_is_a_candidate_like_any_other(kind):
    losses = losses_with([0, 60])
    data = losses if kind == "array" else runs_of(losses, [1.0, 0.5])
    calibration = calibrate(data, delta=0.1, thresholds=[1.0, 0.5] if kind == "array" else None)
    assert calibration.k == 2
    assert calibration.threshold == 1.0
    policy = calibration.policy()
    assert not policy.is_full_model
    assert policy.threshold == 1.0
    failing = losses_with([60, 60])
    data = failing if kind == "array" else runs_of(failing, [1.0, 0.5])
    calibration = calibrate(data, delta=0.1, thresholds=[1.0, 0.5] if kind == "array" else None)
    assert not calibration.certified
    assert calibration.policy().is_full_model


def test_the_full_models_rows_are_a_reference_and_no_hypothesis():
    losses = rare(150)
    with_full = Runs.from_arrays(
        thresholds=[*GRID, math.inf],
        dissimilarity=np.c_[losses, np.zeros(150)],
        layers=np.full((150, 6), [4, 4, 3, 2, 1, 8]),
    )
    without = runs_of(losses, layers=np.full((150, 5), [4, 4, 3, 2, 1]))
    for procedure in ("fixed_sequence", "holm"):
        a, b = (calibrate(runs, delta=0.1, procedure=procedure) for runs in (with_full, without))
        assert (a.k, b.k) == (5, 5)
        pd.testing.assert_frame_equal(a.table, b.table)
    assert a.full_costs == {"layers": 8.0}
    with pytest.raises(
        RiskcalError, match=r"^thresholds: inf at index 1; the full model is never a hypothesis"
    ):
        calibrate(losses[:, :2], thresholds=[0.5, math.inf], delta=0.1)


# What is handed on


def test_the_certificate_says_what_was_shown():
    runs = runs_of(rare(300), layers=np.full((300, 5), [5, 4, 3, 2, 1]))
    calibration = calibrate(runs, delta=0.1, epsilon=0.08, attempt=1, starts=1)
    policy = calibration.policy()
    certificate = policy.certificate
    assert calibration.certified
    assert policy.threshold == calibration.threshold
    assert certificate.delta == 0.1
    assert certificate.epsilon == 0.08
    assert (
        certificate.epsilon_spent
        == calibration.epsilon_spent
        == pytest.approx(6 * 0.08 / math.pi**2)
    )
    assert certificate.attempt == 1
    assert (certificate.objective, certificate.test, certificate.procedure) == (
        "textual",
        "betting",
        "fixed_sequence",
    )
    assert (certificate.lower, certificate.upper, certificate.starts) == (0.0, 1.0, 1)
    assert (certificate.n, certificate.k) == (300, 5)
    chosen = calibration.table["threshold"] == calibration.threshold
    assert (
        certificate.pvalue
        == calibration.table.loc[chosen, "pvalue"].item()
        <= certificate.epsilon_spent
    )
    assert certificate.records_digest == runs.digest()
    assert certificate.versions["numpy"] == np.__version__
    assert calibration.chosen["layers"] == calibration.table.loc[chosen, "layers"].item()


def test_the_digest_of_arrays_tells_other_losses_and_other_thresholds_apart():
    losses = rare(100)
    other = losses.copy()
    other[50, 2] += 1e-6 if other[50, 2] < 0.5 else -1e-6
    digests = {
        calibrate(data, thresholds=grid, delta=0.1).records_digest
        for data, grid in ((losses, GRID), (other, GRID), (losses, [0.95, *GRID[1:]]))
    }
    assert len(digests) == 3


def test_a_policy_cannot_be_given_a_threshold_that_was_not_certified():
    calibration = calibrate(rare(300), thresholds=GRID, delta=0.1)
    for fields in ({"threshold": 0.1}, {"thresholds": {1: 0.1}}, {"certificate": None}):
        with pytest.raises(RiskcalError, match=rf"^{next(iter(fields))}: "):
            calibration.policy(**fields)
    with pytest.raises(RiskcalError, match=r"^min_layer: 1 is not the recorded 2"):
        calibrate(grid_of_two(), delta=0.1).policy(min_layer=1)
    with pytest.raises(RiskcalError, match=r"^measure: 'softmax' is not the recorded 'state'"):
        calibrate(grid_of_two(), delta=0.1).policy(measure="softmax")
    # an array of losses says neither
    assert calibration.policy(measure="state", min_layer=3).measure == "state"


def decaying_runs(**columns):
    frame = runs_of(rare(200), prompts=np.arange(200)).to_frame().assign(temperature=4.0, **columns)
    return Runs.from_frame(frame)


def test_a_recorded_schedule_is_the_policys():
    recorded = decaying_runs(max_length=64, form="t5x")
    policy = calibrate(recorded, delta=0.1).policy()
    assert policy.schedule == Decaying(4.0, 64, "t5x")
    assert (
        calibrate(recorded, delta=0.1).policy(schedule=Decaying(4.0, 64, "t5x")).schedule
        == policy.schedule
    )
    with pytest.raises(RiskcalError, match=r"^schedule: "):
        calibrate(recorded, delta=0.1).policy(schedule=Decaying(4.0, 128, "t5x"))
    with pytest.raises(RiskcalError, match=r"^schedule: "):
        calibrate(recorded, delta=0.1).policy(schedule=Constant())
    partly = calibrate(decaying_runs(), delta=0.1)
    with pytest.raises(RiskcalError, match=r"^schedule: .*temperature 4 .* give"):
        partly.policy()
    assert partly.policy(schedule=Decaying(4.0, 32)).schedule == Decaying(4.0, 32)


def test_the_outcome_is_one_plain_sentence_with_its_numbers():
    calibration = calibrate(runs_of(rare(300)), delta=0.1, epsilon=0.04)
    assert "probability at least 0.96" in calibration.message
    assert "300 calibration prompts" in calibration.message
    assert f"threshold {calibration.threshold:g}" in calibration.message
    assert "at most 0.1" in calibration.message
    assert calibration.message in repr(calibration)
    assert "<table" in calibration._repr_html_()


def test_the_frame_is_a_copy():
    calibration = calibrate(rare(), thresholds=GRID, delta=0.1)
    frame = calibration.to_frame()
    frame["certified"] = True
    assert not calibration.table["certified"].all()


def test_the_policy_survives_its_file(tmp_path):
    for delta in (0.1, 0.0001):
        policy = calibrate(runs_of(rare(300)), delta=delta).policy()
        policy.save(tmp_path / "policy.json")
        assert ExitPolicy.load(tmp_path / "policy.json") == policy


def test_calibrating_changes_no_input():
    losses = rare()
    before = losses.copy()
    calibrate(losses, thresholds=GRID, delta=0.1)
    assert (losses == before).all()
    runs = runs_of(losses)
    digest = runs.digest()
    calibrate(runs, delta=0.1, procedure="fixed_sequence", order=[4, 3, 2, 1, 0])
    assert runs.digest() == digest


def test_there_is_no_seed_to_choose():
    assert not {"seed", "rng", "random_state", "shuffle"} & set(
        inspect.signature(calibrate).parameters
    )


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"delta": 0.0}, "delta: 0 is not strictly between"),
        ({"delta": 1.0}, "delta: 1 is not strictly between"),
        ({"delta": math.nan}, "delta: is NaN"),
        ({"delta": "x"}, "delta: 'x' is not a number"),
        ({"delta": None}, "delta: None is not a number"),
        ({"epsilon": 0.0}, "epsilon: 0"),
        ({"epsilon": 1.5}, "epsilon: 1.5"),
        ({"epsilon": math.nan}, "epsilon: is NaN"),
        ({"test": "wsr"}, "test: 'wsr' is unknown; choose one of 'betting'"),
        ({"test": ["betting"]}, "test: ['betting'] is unknown"),
        ({"procedure": "hommel"}, "procedure: 'hommel' is unknown; choose one of 'fixed_sequence', 'holm'"),
        ({"objective": "nonsense"}, "objective: 'nonsense' is unknown; choose one of 'textual', 'risk', 'risk_clipped'"),
        ({"starts": 0}, "starts: 0"),
        ({"starts": 6}, "starts: 6 exceeds"),
        ({"starts": 2, "procedure": "holm"}, "starts: procedure 'holm' does not use it"),
        ({"attempt": 0}, "attempt: 0"),
        ({"attempt": 1.0}, "attempt: 1.0"),
        ({"attempt": True}, "attempt: True"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["array", "runs"])
def test_bad_arguments_are_refused_by_name(kind, options, named):
    losses = rare(40)
    data, grid = (losses, {"thresholds": GRID}) if kind == "array" else (runs_of(losses), {})
    with pytest.raises(RiskcalError) as refusal:
        calibrate(data, **({"delta": 0.1} | grid | options))
    assert str(refusal.value).startswith(named)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"thresholds": None}, "thresholds: an array of losses needs"),
        ({"thresholds": GRID[:4]}, "thresholds: 4 given for 5 columns"),
        ({"thresholds": [*GRID[:4], 0.9]}, "thresholds: 0.9 is given more than once"),
        ({"thresholds": [*GRID[:4], math.nan]}, "thresholds: nan at index 4"),
        ({"thresholds": ["a"] * 5}, "thresholds: not an array of numbers"),
        ({"lower": 1.0}, "lower, upper: "),
        ({"upper": 0.5}, "losses: "),
        ({"prompts": [1, 2]}, "prompts: 2 ids for 40 rows"),
        ({"prompts": ["a"] * 40}, "prompts: all rows belong to one prompt"),
        ({"prompts": [0.5] * 40}, "prompts: 0.5 at row 0"),
        ({"prompts": ["a"] * 39 + [None]}, "prompts: missing at row 39"),
    ],
)
def test_bad_arguments_for_arrays_are_refused_by_name(change, named):
    losses = np.minimum(rare(40) + np.array([0, 0, 0, 0, 0.3]), 1)
    with pytest.raises(RiskcalError) as refusal:
        calibrate(losses, **({"delta": 0.1, "thresholds": GRID} | change))
    assert str(refusal.value).startswith(named)


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        (np.array([[0.1], [math.nan]]), "losses: nan at index [1, 0]"),
        (np.array([[0.1], [1.5]]), "losses: 1.5 at index [1, 0]"),
        (np.array([[0.1]]), "losses: one row only"),
        (np.ma.masked_array([[0.1], [0.1]], mask=[[0], [1]]), "losses: masked at index [1, 0]"),
        (
            pd.DataFrame({"prompt": [1, 2], "threshold": 0.5, "dissimilarity": 0.0}),
            "runs: give Runs or an array",
        ),
        ("runs.parquet", "runs: 'runs.parquet' is a path"),
        (None, "losses: "),
    ],
)
def test_what_is_neither_runs_nor_losses_is_refused(losses, named):
    with pytest.raises(RiskcalError) as refusal:
        calibrate(losses, thresholds=[0.5], delta=0.2)
    assert str(refusal.value).startswith(named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"thresholds": GRID}, "thresholds: Runs carry their own"),
        ({"prompts": list(range(40))}, "prompts: Runs carry their own"),
        ({"upper": 0.5}, "lower, upper: objective 'textual' of Runs has its own bounds"),
        ({"objective": "risk"}, "risk: objective 'risk' needs this column"),
    ],
)
def test_bad_arguments_for_runs_are_refused_by_name(change, named):
    with pytest.raises(RiskcalError) as refusal:
        calibrate(runs_of(rare(40)), delta=0.1, **change)
    assert str(refusal.value).startswith(named)


def test_one_cluster_is_one_unit_and_no_sample():
    with pytest.raises(RiskcalError, match="two"):
        calibrate(runs_of(rare(40), cluster=["a"] * 40), delta=0.1)


def test_one_candidate_and_two_prompts_are_enough_to_ask():
    calibration = calibrate(np.zeros((2, 1)), thresholds=[0.5], delta=0.9, test="convex_order")
    assert (calibration.n, calibration.k) == (2, 1)
    assert calibration.table["pvalue"].item() == pytest.approx(0.01)
    assert calibration.certified


@pytest.mark.parametrize("row", [0, 1, 4095, 4096, 4999])
def test_every_loss_of_an_array_is_in_the_digest(row):
    losses = np.full((5000, 2), 0.25)
    ids = np.arange(5000)
    given = {"thresholds": [0.9, 0.5], "delta": 0.4, "test": "hoeffding"}
    changed = losses.copy()
    changed[row, 1] = 0.5
    for more in ({}, {"prompts": [f"p{i}" for i in ids]}):
        digests = [calibrate(one, **given, **more).records_digest for one in (losses, changed)]
        assert digests[0] != digests[1]


@pytest.mark.parametrize("rows", [4096, 4097, 9000])
def test_the_digest_of_many_rows_is_that_of_their_bytes_at_once(rows):
    losses = np.random.default_rng(0).random((rows, 2))
    grid, ids = np.array([0.9, 0.5]), [f"p{i}" for i in range(rows)]
    problem = pose(losses, 0.3, thresholds=grid, prompts=ids)
    hasher = hashlib.blake2b(problem.risks[0].losses.tobytes(), digest_size=16)
    hasher.update(grid.tobytes())
    assert problem.digest == hasher.hexdigest()
