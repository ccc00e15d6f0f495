import math

import numpy as np
import pandas as pd
import pytest

from laboratory import worlds
from riskcal import RiskcalError, Runs, calibrate, pvalues, trials
from riskcal.calibration.posing import pose
from riskcal.trials import deciding, run
from riskcal.trials.compare import of_units

THRESHOLDS = np.array([0.9, 0.7, 0.5, 0.3, 0.1])


def make_runs(n=80, seed=0, *, thresholds=THRESHOLDS, kind="mixed", full=True, **columns):
    """Losses that rise as the threshold falls, layers that fall."""
    rng = np.random.default_rng(seed)
    mean = 0.3 * (1 - thresholds) ** 1.5
    u = rng.random((n, 1))
    losses = (
        (u < mean) * 1.0 if kind == "binary" else np.where(u < 2 * mean, rng.random((n, 1)), 0.0)
    )
    layers = 8 * thresholds + rng.random((n, thresholds.size)) * 0.5
    risk = np.clip(losses * 0.6 + rng.random((n, 1)) * 0.2, 0, 1)
    if full:
        thresholds = np.r_[math.inf, thresholds]
        losses, layers = np.c_[np.zeros(n), losses], np.c_[np.full(n, 8.0), layers]
        risk = np.c_[rng.random((n, 1)) * 0.2, risk]
    return Runs.from_arrays(
        thresholds=thresholds, dissimilarity=losses, risk=risk, layers=layers, **columns
    )


def split(runs, row):
    """The calibration runs of a trial, from the splits that `run_trials` makes."""
    heldout = run.splits(runs.n, 6, 0.75, 3)
    kept = deciding.kept_rows(heldout, runs.n)[row]
    return of_units(runs, kept), of_units(runs, np.sort(heldout[row]))


@pytest.mark.parametrize(
    ("test", "procedure", "kind", "objective"),
    [
        ("betting", "fixed_sequence", "mixed", "textual"),
        ("betting", "fixed_sequence", "mixed", "risk"),
        ("betting", "holm", "mixed", "risk"),
        ("convex_order", "fixed_sequence", "mixed", "risk_clipped"),
        ("convex_order", "fallback", "mixed", "textual"),
        ("hoeffding_bentkus", "bonferroni", "mixed", "risk"),
        ("hoeffding", "fixed_sequence", "mixed", "textual"),
        ("empirical_bernstein", "fixed_sequence", "mixed", "risk"),
        ("binomial", "hochberg", "binary", "textual"),
        ("bentkus", "holm", "binary", "textual"),
    ],
)
def test_trials_are_calibrations_of_their_splits(test, procedure, kind, objective):
    runs = make_runs(n=400, kind=kind)
    deltas = [0.12, 0.2]
    table = trials.run_trials(
        runs,
        deltas,
        n_trials=6,
        calibration_fraction=0.75,
        seed=3,
        objective=objective,
        test=test,
        procedure=procedure,
    )
    assert len(table) == 12
    assert table["certified"].any()
    for _, row in table.iterrows():
        calibrated, heldout = split(runs, int(row["trial"]))
        expected = calibrate(
            calibrated, delta=row["delta"], objective=objective, test=test, procedure=procedure
        )
        assert row["threshold"] == expected.threshold
        assert row["certified"] == expected.certified
        if not expected.certified:
            assert row["calibration_loss"] == row["heldout_loss"] == 0
            assert row["layers"] == row["full_layers"] == 8
            continue
        j = int(np.flatnonzero(runs.thresholds == expected.threshold)[0])
        assert row["calibration_loss"] == pytest.approx(expected.chosen["loss"], abs=1e-12)
        assert row["heldout_loss"] == pytest.approx(
            heldout.losses(objective)[:, j].mean(), abs=1e-12
        )
        assert row["layers"] == pytest.approx(heldout.values["layers"][:, j].mean())
        assert row["full_layers"] == pytest.approx(heldout.full["layers"].mean())


@pytest.mark.parametrize("procedure", ["pilot_order", "pareto", "graphical"])
def test_procedures_with_choices_of_their_own_go_through_calibrate(procedure):
    runs = make_runs(n=400)
    options = {}
    if procedure == "graphical":
        options = {"weights": np.full(5, 0.2), "transitions": np.eye(5, k=1)}
    table = trials.run_trials(
        runs, 0.2, n_trials=6, calibration_fraction=0.75, seed=3, procedure=procedure, **options
    )
    assert table["certified"].all()
    for _, row in table.iterrows():
        calibrated, heldout = split(runs, int(row["trial"]))
        expected = calibrate(calibrated, delta=0.2, procedure=procedure, **options)
        j = int(np.flatnonzero(runs.thresholds == expected.threshold)[0])
        assert row["threshold"] == expected.threshold
        assert row["calibration_loss"] == pytest.approx(expected.chosen["loss"])
        assert row["heldout_loss"] == pytest.approx(heldout.losses()[:, j].mean())


def test_several_starts_are_passed_on():
    runs = make_runs(n=400)
    table = trials.run_trials(runs, 0.2, n_trials=6, calibration_fraction=0.75, seed=3, starts=2)
    for _, row in table.iterrows():
        calibrated, _ = split(runs, int(row["trial"]))
        assert row["threshold"] == calibrate(calibrated, delta=0.2, starts=2).threshold


@pytest.mark.parametrize("procedure", ["holm", "pilot_order", "fixed_sequence"])
def test_candidates_of_several_coordinates_are_chosen_by_cost(procedure):
    one, two = make_runs(n=300, seed=0).to_frame(), make_runs(n=300, seed=1).to_frame()
    two["layers"] *= 0.9
    one["measure"], two["measure"] = "softmax", "state"
    frame = pd.concat([one, two[two["threshold"] < 1]])
    runs = Runs.from_frame(frame)
    options = (
        {"order": np.argsort(-runs.candidates["threshold"].to_numpy())}
        if procedure == "fixed_sequence"
        else {}
    )
    settings = {"delta": 0.2, "procedure": procedure} | options
    table = trials.run_trials(
        runs, 0.2, n_trials=6, calibration_fraction=0.75, seed=3, procedure=procedure, **options
    )
    assert set(table["measure"]) <= {"softmax", "state"}
    for _, row in table.iterrows():
        calibrated, _ = split(runs, int(row["trial"]))
        chosen = calibrate(calibrated, **settings).chosen
        assert (row["threshold"], row["measure"]) == (chosen["threshold"], chosen["measure"])


def test_clusters_are_split_whole():
    runs = make_runs(n=240, cluster=np.repeat(np.arange(60), 4))
    table = trials.run_trials(runs, 0.25, n_trials=6, calibration_fraction=0.75, seed=3)
    for _, row in table.iterrows():
        calibrated, heldout = split(runs, int(row["trial"]))
        assert set(calibrated.units).isdisjoint(heldout.units)
        assert (calibrated.n, heldout.n) == (45, 15)
        expected = calibrate(calibrated, delta=0.25)
        assert row["threshold"] == expected.threshold
        j = int(np.flatnonzero(runs.thresholds == expected.threshold)[0])
        assert row["heldout_loss"] == pytest.approx(heldout.losses()[:, j].mean())


def test_trials_are_reproducible_and_share_their_splits():
    runs = make_runs(n=200)
    first = trials.run_trials(runs, [0.1, 0.2], n_trials=5, seed=7)
    pd.testing.assert_frame_equal(first, trials.run_trials(runs, [0.1, 0.2], n_trials=5, seed=7))
    assert not first.equals(trials.run_trials(runs, [0.1, 0.2], n_trials=5, seed=8))
    alone = trials.run_trials(runs, 0.2, n_trials=5, seed=7)
    pd.testing.assert_frame_equal(alone, first[first["delta"] == 0.2].reset_index(drop=True))


def test_the_split_sizes_are_exact_and_the_units_all_there():
    heldout = run.splits(103, 40, 0.8, 0)
    kept = deciding.kept_rows(heldout, 103)
    assert heldout.shape == (40, 21)
    assert (np.diff(kept, axis=1) > 0).all()
    assert (np.sort(np.c_[heldout, kept], axis=1) == np.arange(103)).all()
    counts = np.bincount(run.splits(20, 20_000, 0.8, 0).ravel(), minlength=20)
    assert abs(counts - 4000).max() < 4 * math.sqrt(20_000 * 0.2 * 0.8)


def test_without_the_full_model_nothing_is_made_up():
    table = trials.run_trials(make_runs(full=False), [0.001, 0.3], n_trials=4)
    assert "full_layers" not in table
    nothing = table[table["delta"] == 0.001]
    assert (nothing["threshold"] == math.inf).all()
    assert nothing["layers"].isna().all()
    assert "saving_mean" not in trials.summary(table)


def test_summary_is_the_mean_and_deviation_of_each_delta():
    table = trials.run_trials(make_runs(n=300), [0.2, 0.05], n_trials=8)
    found = trials.summary(table)
    assert found["delta"].tolist() == [0.05, 0.2]
    assert found["n_trials"].tolist() == [8, 8]
    rows = table[table["delta"] == 0.2]
    assert found["certified"].iloc[1] == rows["certified"].mean()
    assert found["layers_sd"].iloc[1] == pytest.approx(rows["layers"].std())
    saving = 1 - rows["layers"] / rows["full_layers"]
    assert found["saving_mean"].iloc[1] == pytest.approx(saving.mean())
    assert found["saving_sd"].iloc[1] == pytest.approx(saving.std())


def test_single_precision_is_used_only_where_it_counts_exactly():
    assert deciding.exact_type(np.array([[0.0, 1.0], [-1.0, 0.0]])) is np.float32
    assert deciding.exact_type(np.array([[0.0, 0.5]])) is np.float64
    assert deciding.exact_type(np.array([[0.0, 3.0]])) is np.float64


def test_lazy_betting_agrees_with_the_test_on_every_kind_of_loss():
    """The walk that stops early certifies the same prefix as `pvalues.betting` on the split, for every world."""
    rng = np.random.default_rng(5)
    for make in worlds.WORLDS.values():
        world = make()
        losses = world.sample(240, rng)
        known = {"lower": world.lower, "upper": world.upper}
        grid = np.arange(world.k, 0, -1.0)
        problem = pose(losses, world.delta, thresholds=grid, **known)
        order = problem.units
        heldout = run.splits(240, 25, 0.75, 1)
        kept = [order[rows] for rows in deciding.kept_rows(heldout, 240)]
        deltas = [world.delta, world.delta * 1.2]
        counts = deciding._decide_by_walking(problem, deltas, heldout, 0.05)[0] + 1
        for d, delta in enumerate(deltas):
            for t, rows in enumerate(kept):
                p = pvalues.betting(
                    losses[rows], delta, level=0.05, lower=world.lower, upper=world.upper
                )
                assert counts[d, t] == np.logical_and.accumulate(p <= 0.05).sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_fraction": 1.0}, "calibration_fraction"),
        ({"calibration_fraction": 0.999}, "calibration_fraction: 0.999 of 80 units leaves 80"),
        ({"calibration_fraction": 0.01}, "calibration_fraction"),
        ({"n_trials": 0}, "n_trials"),
        ({"seed": math.nan}, "seed"),
        ({"epsilon": 0}, "epsilon"),
        ({"deltas": []}, "deltas"),
        ({"deltas": [0.1, 1.5]}, "delta"),
        ({"deltas": [0.1, math.nan]}, "delta"),
        ({"test": "wald"}, "test"),
        ({"test": "binomial"}, "neither 0 nor 1"),
        ({"test": "binomial", "objective": "risk"}, "binomial"),
        ({"procedure": "none"}, "procedure"),
        ({"procedure": "graphical"}, "transitions"),
        ({"objective": "happiness"}, "objective"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    given = {"deltas": [0.1]} | arguments
    with pytest.raises(RiskcalError, match=message):
        trials.run_trials(make_runs(), **given)


def test_replayed_runs_are_refused_unless_exact():
    with pytest.raises(RiskcalError, match="replayed"):
        trials.run_trials(make_runs(source="replayed"), 0.1)
    assert len(trials.run_trials(make_runs(source="replayed", exact=True), 0.1, n_trials=2)) == 2


def test_compare_sets_tests_and_procedures_side_by_side_and_returns_no_policy():
    runs = make_runs(n=200)
    table = trials.compare(
        runs, [0.1, 0.2], tests=["betting", "hoeffding"], procedures=["fixed_sequence", "pareto"]
    )
    assert type(table) is pd.DataFrame
    assert len(table) == 8
    assert not any(
        "policy" in name or "certificate" in name
        for name in (*table.columns, *vars(table), *table.attrs)
    )
    assert all(np.isscalar(value) or value is None for value in table.to_numpy().ravel())
    row = table.set_index(["delta", "test", "procedure"]).loc[(0.2, "betting", "fixed_sequence")]
    calibration = calibrate(runs, delta=0.2)
    assert row["threshold"] == calibration.threshold
    assert row["certified"] == calibration.table["certified"].mean()
    assert row["loss"] == calibration.chosen["loss"]
    assert row["layers"] == calibration.chosen["layers"]
    assert row["full_layers"] == 8


def test_compare_says_what_the_full_model_costs_where_nothing_is_certified():
    table = trials.compare(make_runs(), 0.001)
    assert set(table["procedure"]) == {"fixed_sequence", "holm", "bonferroni"}
    assert (table["threshold"] == math.inf).all()
    assert (table[["certified", "loss"]] == 0).all(axis=None)
    assert (table["layers"] == 8).all()


def test_a_pilot_shares_no_unit_with_the_rest_and_follows_from_the_ids():
    runs = make_runs(n=90, cluster=np.repeat(np.arange(30), 3))
    pilot, rest = trials.split_pilot(runs, 0.2)
    assert (pilot.n, rest.n) == (6, 24)
    assert set(pilot.units) | set(rest.units) == set(runs.units)
    assert set(pilot.prompts).isdisjoint(rest.prompts)
    assert list(pilot.units) == list(runs.units[:6])
    np.testing.assert_array_equal(rest.losses(), runs.losses()[6:])
    np.testing.assert_array_equal(
        Runs.from_frame(rest.to_frame()).losses("risk"), rest.losses("risk")
    )
    with pytest.raises(RiskcalError, match="fraction"):
        trials.split_pilot(runs, 0.99)


@pytest.mark.parametrize(
    "options", [{"procedure": "holm"}, {"procedure": "bonferroni"}, {"starts": 2}]
)
def test_a_recording_that_stopped_is_split_for_one_fixed_sequence_only(options):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        [
            {
                "prompt": i,
                "threshold": t,
                "dissimilarity": float(rng.random() < 0.05),
                "layers": 4 * t,
            }
            for i in range(60)
            for t in (0.9, 0.5)
        ]
    )
    whole = Runs.from_frame(table)
    cut = Runs.from_frame(table.assign(stopped='{"delta": 0.2}'))
    trials.run_trials(whole, [0.3], n_trials=2, **options)
    with pytest.raises(
        RiskcalError, match="procedure: the recording stopped where a fixed sequence failed"
    ):
        trials.run_trials(cut, [0.3], n_trials=2, **options)
    assert len(trials.run_trials(cut, [0.3], n_trials=2)) == 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"proxy": "layers", "unlabelled": make_runs(n=900, seed=1).values["layers"]}, "proxy"),
        ({"budget": {"layers": 5}}, "budget"),
    ],
)
def test_what_trials_do_not_hold_is_refused_by_name_and_the_remedy_works(options, name):
    runs = make_runs(n=300)
    named = (
        rf"^{name}: .*leave .* out, or calibrate splits of your own .*calibrate\(runs.take\(rows\)"
    )
    for given in (options, dict(list(options.items())[:1])):
        with pytest.raises(RiskcalError, match=named):
            trials.run_trials(runs, 0.2, n_trials=2, **given)
    rows = np.random.default_rng(0).permutation(runs.n)[:240]
    assert calibrate(runs.take(rows), delta=0.25, **options).n == 240


def test_compare_holds_budgets_and_tells_each_loss():
    runs = make_runs(n=300)
    table = trials.compare(
        runs, [0.001, 0.3], budget={"layers": 7}, tests=["betting"], procedures=["holm"]
    )
    full, cheap = table.iloc[0], table.iloc[1]
    assert (full["threshold"], full["loss_textual"], full["loss_layers"]) == (math.inf, 0.0, 8.0)
    found = calibrate(runs, delta=0.3, budget={"layers": 7}, procedure="holm")
    assert found.certified
    assert cheap["loss_textual"] == found.chosen["loss_textual"]
    assert cheap["loss_layers"] == pytest.approx(cheap["layers"])
