"""What the options of `calibrate` do: several risks, deltas, orders, strata; those that would change nothing are refused."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import riskcal
from riskcal import RiskcalError, fwer, pvalues
from riskcal.calibration.calibrate import with_candidates_in_order
from riskcal.calibration.posing import pose
from riskcal.calibration.problem import excess

GRID = np.round(np.arange(0, 1.01, 0.1), 2)


def zero_inflated(rng, mean, n):
    """(n, k) losses in [0, 1], comonotone over candidates, with these means."""
    return np.where(rng.random((n, 1)) < np.asarray(mean) / 0.4, rng.beta(2, 3, (n, 1)), 0.0)


def runs(seed=0, n=800, group=None):
    rng = np.random.default_rng(seed)
    distance = zero_inflated(rng, 0.35 * (1 - GRID) ** 1.5, n)
    base = 0.3 * rng.random((n, 1))
    risk = np.clip(base + np.where(distance > 0, rng.normal(0.03, 0.1, (n, 1)), 0), 0, 1)
    return riskcal.Runs.from_arrays(
        thresholds=np.r_[GRID, math.inf],
        dissimilarity=np.c_[distance, np.zeros(n)],
        risk=np.c_[risk, base],
        layers=np.tile(np.r_[1 + 7 * GRID, 8.0], (n, 1)),
        group=group,
    )


def several_coordinates(seed=0, n=800):
    rng = np.random.default_rng(seed)
    frame = runs(seed, n).to_frame()
    worse = frame[np.isfinite(frame["threshold"])].assign(measure="entropy")
    worse["dissimilarity"] = np.clip(
        worse["dissimilarity"] + 0.3 * (rng.random(len(worse)) < 0.4), 0, 1
    )
    table = np.array(["softmax"])
    frame["measure"] = np.repeat(table, len(frame))
    return riskcal.Runs.from_frame({c: [*frame[c], *worse[c]] for c in frame.columns})


def test_several_risks_take_the_largest_pvalue_and_certify_no_more_than_each_alone():
    both = riskcal.calibrate(runs(), delta={"textual": 0.1, "risk": 0.01})
    alone = [
        riskcal.calibrate(runs(), delta=d, objective=o)
        for o, d in (("textual", 0.1), ("risk", 0.01))
    ]
    np.testing.assert_array_equal(
        both.table["pvalue"], np.maximum(alone[0].table["pvalue"], alone[1].table["pvalue"])
    )
    assert both.threshold == max(c.threshold for c in alone)
    assert both.policy().certificate.delta == {"textual": 0.1, "risk": 0.01}
    assert {"loss_textual", "loss_risk"} <= set(both.table.columns)


def test_calibrations_of_a_list_of_deltas_hold_together():
    """20 deltas, 300 draws: the share in which any of the chosen thresholds is false is at most epsilon + 3 SE = .088."""
    mean, deltas, false = 0.35 * (1 - GRID) ** 1.5, np.linspace(0.03, 0.3, 20), 0
    for draw in range(300):
        losses = zero_inflated(np.random.default_rng(draw), mean, 200)
        chosen = riskcal.calibrate(losses, thresholds=GRID, delta=list(deltas), test="convex_order")
        risk = {c.delta: mean[c.threshold == GRID] for c in chosen if c.certified}
        false += any(value > delta for delta, value in risk.items())
    assert false / 300 <= 0.088


def test_a_list_of_deltas_is_monotone_and_never_certifies_more_than_one_delta_alone_by_bonferroni():
    thresholds = [c.threshold for c in riskcal.calibrate(runs(), delta=[0.05, 0.1, 0.2])]
    assert thresholds == sorted(thresholds, reverse=True)
    single = riskcal.calibrate(runs(), delta=0.1, procedure="bonferroni")
    assert thresholds[1] >= single.threshold


@pytest.mark.parametrize("procedure", ["pilot_order", "pareto"])
def test_the_pilot_chooses_the_order_and_is_not_tested(procedure):
    data = several_coordinates()
    calibration = riskcal.calibrate(data, delta=0.1, procedure=procedure, pilot_fraction=0.2)
    assert len(calibration.pilot) == 160
    assert calibration.n == 640
    assert list(calibration.pilot) == data.units[:160].tolist()
    rest = data.losses("textual")[160:]
    position = {
        tuple(row): j
        for j, row in enumerate(data.candidates[["threshold", "measure"]].itertuples(index=False))
    }
    tested = [
        position[tuple(r)]
        for r in calibration.table[["threshold", "measure"]].itertuples(index=False)
    ]
    np.testing.assert_allclose(
        calibration.table["pvalue"], pvalues.betting(rest[:, tested], 0.1, level=0.05), rtol=1e-12
    )
    certificate = calibration.policy().certificate
    assert certificate.pilot_n == 160
    assert certificate.pilot_digest is not None
    # a prefix
    assert calibration.table["certified"].to_numpy()[: calibration.table["certified"].sum()].all()


def test_pareto_keeps_no_candidate_that_another_beats_in_both_risk_and_cost():
    data = several_coordinates()
    calibration = riskcal.calibrate(data, delta=0.1, procedure="pareto")
    pilot = data.losses("textual")[: len(calibration.pilot)].mean(0)
    layers = data.values["layers"][: len(calibration.pilot)].mean(0)
    kept = {tuple(r) for r in calibration.table[["threshold", "measure"]].itertuples(index=False)}
    for j, row in enumerate(data.candidates[["threshold", "measure"]].itertuples(index=False)):
        beaten = (
            (pilot <= pilot[j])
            & (layers <= layers[j])
            & ((pilot < pilot[j]) | (layers < layers[j]))
        ).any()
        assert not (beaten and tuple(row) in kept)


def test_pareto_keeps_every_candidate_that_none_beats():
    data = several_coordinates()
    calibration = riskcal.calibrate(data, delta=0.1, procedure="pareto")
    pilot = data.losses("textual")[: len(calibration.pilot)].mean(0)
    layers = data.values["layers"][: len(calibration.pilot)].mean(0)
    kept = {tuple(r) for r in calibration.table[["threshold", "measure"]].itertuples(index=False)}
    assert len(kept) > 1
    for j, row in enumerate(data.candidates[["threshold", "measure"]].itertuples(index=False)):
        others = np.arange(data.k) != j
        if not ((pilot <= pilot[j]) & (layers <= layers[j]) & others).any():
            assert tuple(row) in kept


@pytest.mark.parametrize("procedure", ["pilot_order", "pareto", "holm", "hochberg", "fallback"])
def test_family_wise_error_on_a_curve_that_rises_and_falls(procedure):
    """300 draws with a bump above delta among safe candidates: false certificates at most .05 + 3 SE = .088."""
    mean = np.array([0.02, 0.05, 0.13, 0.06, 0.101, 0.08, 0.12, 0.2, 0.101, 0.3, 0.3])[::-1]
    false = 0
    for draw in range(300):
        losses = zero_inflated(np.random.default_rng([7, draw]), mean, 250)
        table = riskcal.calibrate(losses, thresholds=GRID, delta=0.1, procedure=procedure).table
        risk = dict(zip(GRID, mean, strict=True))
        false += any(risk[t] > 0.1 for t in table.loc[table["certified"], "threshold"])
    assert false / 300 <= 0.088


def test_a_graph_that_is_a_chain_is_the_fixed_sequence():
    chain = {"weights": np.eye(len(GRID))[0], "transitions": np.eye(len(GRID), k=1)}
    graph = riskcal.calibrate(runs(), delta=0.1, procedure="graphical", **chain)
    assert graph.threshold == riskcal.calibrate(runs(), delta=0.1).threshold


def test_strata_share_epsilon_and_each_is_calibrated_on_its_own_prompts():
    group = np.where(np.arange(800) % 4 == 0, "rare", "common")
    found = riskcal.calibrate_groups(runs(group=group), delta=0.1)
    assert {name: c.n for name, c in found.items()} == {"common": 600, "rare": 200}
    assert all(c.epsilon == 0.025 for c in found.values())
    apart = riskcal.calibrate_groups(runs(group=group), delta=0.1, joint=False)
    assert all(c.epsilon == 0.05 for c in apart.values())


def test_a_risk_that_rises_with_the_threshold_is_reported():
    rng = np.random.default_rng(3)
    losses = zero_inflated(rng, np.where(GRID == 0.8, 0.3, 0.02), 500)
    assert "does not fall steadily" in riskcal.calibrate(losses, thresholds=GRID, delta=0.1).message
    assert "does not fall steadily" not in riskcal.calibrate(runs(), delta=0.1).message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"delta": []}, "delta"),
        ({"delta": {}}, "delta"),
        ({"delta": {"textual": 0.1, "speed": 0.1}}, "objective"),
        ({"delta": [0.1, 2.0]}, "delta"),
        ({"delta": [0.1], "procedure": "holm"}, "procedure"),
        ({"delta": 0.1, "procedure": "pilot_order", "pilot_fraction": 0.999}, "pilot_fraction"),
        ({"delta": 0.1, "procedure": "pareto", "order": list(range(11))}, "order"),
        ({"delta": 0.1, "procedure": "graphical"}, "transitions"),
        ({"delta": 0.1, "procedure": "fallback", "weights": np.full(11, 0.2)}, "weights"),
        ({"delta": 0.1, "starts": 2, "procedure": "holm"}, "starts"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(RiskcalError, match=named):
        riskcal.calibrate(runs(n=100), **options)


def test_groups_need_a_group_column():
    with pytest.raises(RiskcalError, match="group"):
        riskcal.calibrate_groups(runs(n=100), delta=0.1)


@pytest.mark.parametrize("test", ["betting", "convex_order", "empirical_bernstein", "hoeffding"])
def test_a_hopeless_and_a_hopeful_failure_are_told_apart_whatever_the_test(test):
    losses = np.zeros((8, 2))
    few = riskcal.calibrate(losses, thresholds=[0.5, 0.9], delta=0.05, test=test)
    assert not few.certified
    assert "fresh sample" in few.message
    assert (
        "will not help"
        in riskcal.calibrate(losses + 0.5, thresholds=[0.5, 0.9], delta=0.05, test=test).message
    )


def test_a_delta_read_from_a_file_is_one_number():
    alone = riskcal.calibrate(runs(n=100), delta=0.1)
    assert riskcal.calibrate(runs(n=100), delta=np.array(0.1)).threshold == alone.threshold


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cost": "tokens"}, "cost: 'tokens' was not recorded; there is layers"),
        (
            {"weights": [1.0] + [0.0] * 10},
            "weights: procedure 'fixed_sequence' does not use it, only fallback and graphical",
        ),
        (
            {"transitions": np.zeros((11, 11)), "procedure": "fallback"},
            "transitions: procedure 'fallback' does not use it",
        ),
        (
            {"pilot_fraction": 0.2},
            "pilot_fraction: procedure 'fixed_sequence' does not use it, only pilot_order and pareto",
        ),
        (
            {"starts": 2, "procedure": "holm"},
            "starts: procedure 'holm' does not use it, only fixed_sequence",
        ),
        (
            {"order": list(range(11)), "procedure": "holm"},
            "order: procedure 'holm' does not use it",
        ),
        ({"delta": [0.1, 0.2], "starts": 2}, "starts: a list of deltas does not use it"),
        (
            {"delta": [0.1, 0.2], "order": list(range(11))},
            "order: a list of deltas does not use it",
        ),
        (
            {"delta": {"textual": 0.1}, "objective": "risk"},
            "objective: a mapping of deltas names the objectives",
        ),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(options, named):
    with pytest.raises(RiskcalError) as refusal:
        riskcal.calibrate(runs(n=100), **({"delta": 0.1} | options))
    assert str(refusal.value).startswith(named)


def test_an_array_has_no_objective():
    with pytest.raises(RiskcalError, match=r"^objective: an array is the losses itself"):
        riskcal.calibrate(np.zeros((50, 1)), thresholds=[0.5], delta=0.1, objective="risk")


def test_options_that_are_used_are_not_refused():
    recorded = runs(n=200)
    for options in (
        {"procedure": "pareto", "cost": "layers", "pilot_fraction": 0.2},
        {"procedure": "fallback", "weights": np.full(11, 1 / 11), "order": list(range(11))},
        {"procedure": "fixed_sequence", "starts": 2},
    ):
        assert riskcal.calibrate(recorded, delta=0.2, **options).procedure == options["procedure"]


def test_comparing_gives_an_option_to_the_procedures_that_use_it_and_trials_refuse_what_theirs_does_not():
    recorded = runs(n=200)
    table = riskcal.compare(recorded, 0.2, procedures=("fixed_sequence", "holm"), starts=2)
    assert set(table["procedure"]) == {"fixed_sequence", "holm"}
    with pytest.raises(RiskcalError, match=r"^pilot_fraction: "):
        riskcal.compare(recorded, 0.2, procedures=("fixed_sequence", "holm"), pilot_fraction=0.2)
    with pytest.raises(RiskcalError, match=r"^cost: 'tokens' was not recorded"):
        riskcal.run_trials(recorded, 0.2, n_trials=2, cost="tokens")


def test_the_certificate_tells_an_order_from_another_and_from_none():
    losses, thresholds = np.zeros((200, 3)), [0.9, 0.5, 0.1]
    digests = [
        riskcal.calibrate(losses, thresholds=thresholds, delta=0.1, **options)
        .policy()
        .certificate.preregistered
        for options in (
            {},
            {"order": [0, 1, 2]},
            {"order": [1, 0, 2]},
            {"order": np.array([1, 0, 2])},
            {"procedure": "fallback", "weights": [0.5, 0.25, 0.25]},
        )
    ]
    assert digests[0] is None
    assert digests[2] == digests[3]
    assert len(set(digests)) == 4


def test_a_path_is_told_to_be_read_first(tmp_path):
    with pytest.raises(RiskcalError, match=r"is a path; read it first, with Runs.read"):
        riskcal.calibrate(str(tmp_path / "runs.parquet"), delta=0.1)


def test_the_excess_that_orders_a_pilot_is_the_same_in_any_unit():
    losses = np.random.default_rng(5).random((40, 3))
    plain = excess(pose(losses, 0.3, thresholds=[0.9, 0.6, 0.3]))
    assert plain == pytest.approx(losses.mean(0) - 0.3)
    known = {"thresholds": [0.9, 0.6, 0.3], "lower": -1.0, "upper": 7.0}
    assert excess(pose(8 * losses - 1, 8 * 0.3 - 1, **known)) == pytest.approx(plain)


def test_a_pilot_of_several_risks_begins_where_the_worst_share_of_a_range_is_the_least():
    """Differences of risks reach from -1 to 1, distances from 0 to 1: .3 of the first is .15 of its range."""
    n = 40
    both = riskcal.Runs.from_arrays(
        thresholds=[math.inf, 0.9, 0.3],
        dissimilarity=np.tile([0.0, 0.4, 0.2], (n, 1)),
        risk=np.tile([0.5, 0.2, 0.38], (n, 1)),
        prompts=[f"p{i}" for i in range(n)],
    )
    problem = pose(both, {"textual": 0.5, "risk": 0.0})
    assert problem.candidates["threshold"].tolist() == [0.9, 0.3]
    assert excess(problem) == pytest.approx([-0.1, -0.06])


@pytest.mark.parametrize("procedure", ["pilot_order", "pareto"])
def test_costs_in_the_table_are_means_over_the_units_that_were_tested(procedure):
    rng = np.random.default_rng(2)
    ids, grid = [f"p{i}" for i in range(80)], [0.9, 0.5]
    layers = rng.integers(1, 9, (80, 2)).astype(float)
    runs = riskcal.Runs.from_arrays(
        thresholds=grid, dissimilarity=0.1 * rng.random((80, 2)), layers=layers, prompts=ids
    )
    found = riskcal.calibrate(runs, delta=0.4, procedure=procedure)
    tested = ~np.isin(ids, found.pilot)
    expected = dict(zip(grid, layers[tested].mean(0), strict=True))
    for row in found.table.itertuples():
        assert row.layers == pytest.approx(expected[row.threshold])


@pytest.mark.parametrize("name", [*pvalues.BY_NAME])
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 3.0)])
def test_the_band_of_a_plot_is_the_inversion_of_the_test_in_the_losses_units(name, lower, upper):
    if name == "binomial" and lower < 0:
        return
    wrong = np.random.default_rng(3).random((50, 2)) < [0.1, 0.3]
    losses = lower + (upper - lower) * wrong
    if name != "binomial":
        losses[0, 0] += 0.25 * (upper - lower) * (1 - 2 * wrong[0, 0])  # of more than two values
    found = riskcal.calibrate(
        losses,
        thresholds=[0.9, 0.5],
        delta=0.5 * (lower + upper),
        test=name,
        lower=lower,
        upper=upper,
    )
    bounds = {} if name == "binomial" else {"lower": lower, "upper": upper}
    band = found._bounds(found._problem.risks[0])
    rows = found._problem.risks[0].losses
    own = getattr(riskcal.bounds, pvalues.BY_NAME[name].bound)(rows, epsilon=0.05, **bounds)
    assert band[0] == pytest.approx(own[0])
    assert (band >= own - 1e-12).all()
    assert (band <= upper).all()


def test_the_order_of_rows_without_ids_is_the_same_on_any_range():
    wrong = np.random.default_rng(4).integers(0, 9, (60, 2)) / 8
    units = [
        pose(4 * s * wrong - t, delta, thresholds=[0.9, 0.5], lower=-t, upper=4 * s - t).units
        for s, t, delta in ((0.25, 0.0, 0.5), (0.5, 1.0, 0.0), (1.0, 8.0, -6.0))
    ]
    assert units[0].tolist() == units[1].tolist() == units[2].tolist() != list(range(60))


@pytest.mark.parametrize(
    "options",
    [
        {"procedure": "holm"},
        {"procedure": "bonferroni"},
        {"procedure": "pareto"},
        {"starts": 2},
        {"order": [1, 0]},
        {"delta": [0.3, 0.4]},
    ],
)
def test_a_grid_that_the_losses_cut_is_for_one_sequence_from_the_top_alone(options):
    runs = riskcal.Runs.from_arrays(
        thresholds=[0.9, 0.5],
        dissimilarity=np.zeros((60, 2)),
        layers=np.tile([5.0, 3.0], (60, 1)),
        prompts=[f"p{i}" for i in range(60)],
    )
    cut = replace(runs, stopped=riskcal.Stop(delta=0.3))
    assert riskcal.calibrate(cut, delta=0.3).threshold == 0.5
    assert riskcal.calibrate(runs, **{"delta": 0.3} | options)
    with pytest.raises(RiskcalError, match="procedure: the recording stopped where a fixed"):
        riskcal.calibrate(cut, **{"delta": 0.3} | options)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_what_a_cut_grid_leaves_open_is_said_as_its_last_threshold_came_out(last):
    losses = np.tile([0.0, 0.0, last], (60, 1))
    runs = riskcal.Runs.from_arrays(
        thresholds=[0.9, 0.7, 0.5], dissimilarity=losses, prompts=[f"p{i}" for i in range(60)]
    )
    cut = replace(runs, stopped=riskcal.Stop(delta=0.3))
    message = riskcal.calibrate(cut, delta=0.3).message
    assert "Thresholds below 0.5 were never run" in message
    assert ("Here it did not fail, so that a lower one might do." in message) == (last == 0.0)
    assert "were never run" not in riskcal.calibrate(runs, delta=0.3).message


def test_a_pilot_that_is_too_small_is_refused_with_both_sizes():
    with pytest.raises(
        RiskcalError, match=r"0.6 of 3 rows leaves 2 for the pilot and 1 for the test"
    ):
        riskcal.calibrate(
            np.zeros((3, 1)),
            thresholds=[0.5],
            delta=0.3,
            procedure="pilot_order",
            pilot_fraction=0.6,
        )


@pytest.mark.parametrize(
    ("procedure", "first"),
    [(fwer.Pareto(0.3), [0.5, 0.1, 0.9]), (fwer.PilotOrder(0.3), [0.9, 0.5, 0.1])],
)
def test_a_fresh_pilot_breaks_ties_as_the_procedure_does(procedure, first):
    """Pareto by cost; who foretells a size draws from candidates in that order."""
    made = riskcal.Runs.from_arrays(
        thresholds=[0.9, 0.5, 0.1],
        dissimilarity=np.zeros((20, 3)),
        layers=np.tile([5.0, 3.0, 4.0], (20, 1)),
        prompts=[f"p{i}" for i in range(20)],
    )
    whole = with_candidates_in_order(pose(made, 0.3), procedure, None).whole
    assert whole.candidates["threshold"].tolist() == first


@pytest.mark.parametrize("lower_is_stricter", [False, True])
def test_of_two_thresholds_a_risk_that_rises_on_the_way_up_is_reported_as_well(lower_is_stricter):
    """Told in the direction in which the thresholds are stricter."""
    losses = np.tile([1.0, 0.0] if lower_is_stricter else [0.0, 1.0], (200, 1))
    found = riskcal.calibrate(
        losses, thresholds=[0.1, 0.9], delta=0.3, lower_is_stricter=lower_is_stricter
    )
    way = "falls" if lower_is_stricter else "rises"
    assert f"does not fall steadily as the threshold {way} (1 pairs of" in found.message
    one = riskcal.calibrate(losses[:, :1], thresholds=[0.1], delta=0.3)
    assert "does not fall steadily" not in one.message


def test_the_lowest_bound_of_several_losses_is_in_the_certificate():
    found = riskcal.calibrate(runs(), delta={"textual": 0.1, "risk": 0.01}).policy().certificate
    assert (found.lower, found.upper) == (-1.0, 1.0)


def test_one_sequence_is_what_a_list_of_deltas_is_said_to_have():
    found = riskcal.calibrate(runs(n=50), delta=[0.1, 0.2])
    assert [one.starts for one in found] == [1, 1]


def test_a_certificate_names_the_columns_and_costs_that_were_not_known_beforehand():
    rows = [
        {
            "prompt": f"p{i}",
            "threshold": t,
            "beam": b,
            "dissimilarity": 0.0,
            "layers": 2.0,
            "price": b,
        }
        for i in range(9)
        for t in (0.9, 0.5)
        for b in (1, 2)
    ]
    read = riskcal.Runs.from_frame(pd.DataFrame(rows), candidate_columns=["beam"], costs=["price"])
    asked = riskcal.calibrate(read, delta=0.5).asked
    assert (asked.candidate_columns, asked.costs) == (["beam"], ["price"])


@pytest.mark.parametrize(
    ("test", "named", "counted"),
    [
        ("betting", False, True),
        ("betting", True, False),
        ("convex_order", False, False),
        ("convex_order", True, False),
    ],
)
def test_of_rows_without_ids_a_bound_by_walking_is_no_lower_than_that_of_the_count(
    test, named, counted, monkeypatch
):
    """Were the walk to find nothing at all: at each candidate's share of epsilon, and nowhere else."""
    monkeypatch.setattr(riskcal.bounds, "simultaneous", lambda rows, **_: np.zeros(rows.shape[1]))
    losses = (np.random.default_rng(0).random((60, 3)) < [0.05, 0.1, 0.3]).astype(float)
    given = {"thresholds": [0.9, 0.5, 0.1], "delta": [0.3, 0.5], "test": test}
    if named:
        given["prompts"] = [f"p{i}" for i in range(60)]
    own = riskcal.bounds.clopper_pearson(losses, epsilon=0.05 / 3)
    expected = own if counted else np.zeros(3)
    for one in riskcal.calibrate(losses, **given):
        assert one.table["bound"].tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("test", "named", "counted"),
    [("betting", False, True), ("betting", True, False), ("convex_order", False, False)],
)
def test_the_band_is_held_up_by_counts_where_the_p_values_are(test, named, counted, monkeypatch):
    losses = (np.random.default_rng(0).random((60, 2)) < [0.05, 0.3]).astype(float)
    ids = {"prompts": [f"p{i}" for i in range(60)]} if named else {}
    found = riskcal.calibrate(losses, thresholds=[0.9, 0.5], delta=0.2, test=test, **ids)
    monkeypatch.setattr(riskcal.bounds, test, lambda rows, **_: np.zeros(rows.shape[1]))
    own = riskcal.bounds.clopper_pearson(losses, epsilon=0.05)
    band = found._bounds(found._problem.risks[0])
    assert band.tolist() == pytest.approx(own.tolist() if counted else [0.0, 0.0])
