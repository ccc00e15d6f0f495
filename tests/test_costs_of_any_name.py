"""What a candidate costs may be counted in anything: FLOPs of unequal stages, prices, joules."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import riskcal
import riskcal.cli
from riskcal import RiskcalError, Runs, Traces, calibrate, replay_arrays, replay_traces

STAGES = np.array([1.0, 9.0, 90.0])  # of an MSDNet-like classifier, one by one
FLOPS = np.cumsum(STAGES)
GRID = [0.903, 0.507]


def classifier(n: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = rng.random((n, 3))
    agrees = rng.random((n, 3)) < 0.97
    agrees[:, -1] = True
    return {"confidence": confidence, "agrees": agrees}


def traces(**more: object) -> Traces:
    arrays = classifier()
    n = len(arrays["agrees"])
    return Traces.from_arrays(prompt=np.arange(n) + 7, position=np.zeros(n, int), **arrays, **more)


def by_a_plain_loop(threshold: float) -> list[float]:
    spent = []
    for row in classifier()["confidence"]:
        flops = 0.0
        for stage, confidence in zip(STAGES, row, strict=True):
            flops += stage
            if confidence >= threshold:
                break
        spent.append(flops)
    return spent


def test_the_mean_flops_of_unequal_stages_are_those_of_a_plain_loop():
    expected = [np.mean(by_a_plain_loop(threshold)) for threshold in GRID]
    named = replay_traces(traces(), GRID, exact=True, costs={"flops": FLOPS})
    assert named.values["flops"].mean(0) == pytest.approx(expected, rel=1e-14)
    assert named.full["flops"].tolist() == [100.0] * 400
    of_traces = replay_traces(traces(cost={"flops": FLOPS}), GRID, exact=True)
    of_rows = replay_traces(traces(cost={"flops": np.tile(FLOPS, (400, 1))}), GRID, exact=True)
    for runs in (of_traces, of_rows):
        assert np.array_equal(runs.values["flops"], named.values["flops"])
    arrays = classifier()
    loss = 1.0 - arrays["agrees"]
    _, _, costs = replay_arrays(arrays["confidence"], loss, GRID, costs={"flops": FLOPS})
    assert costs["flops"].mean(0) == pytest.approx(expected, rel=1e-14)
    unnamed = replay_traces(traces(), GRID, exact=True, costs=FLOPS)
    assert np.array_equal(unnamed.values["cost"], named.values["flops"])


def test_the_cheapest_by_any_cost_is_chosen():
    """The price of the two candidates runs against their layers."""
    rows = [
        {
            "prompt": i,
            "threshold": t,
            "min_layer": m,
            "dissimilarity": 0.0,
            "layers": layers,
            "price": price,
        }
        for i in range(80)
        for t, m, layers, price in ((0.9, 1, 3.0, 0.2), (0.5, 2, 2.0, 0.7))
    ]
    runs = Runs.from_frame(pd.DataFrame(rows), costs=["price"])
    assert runs.costs == ["layers", "price"]
    assert calibrate(runs, delta=0.1).threshold == 0.5
    cheap = calibrate(runs, delta=0.1, cost="price")
    assert (cheap.threshold, cheap.chosen["price"]) == (0.9, pytest.approx(0.2))
    with pytest.raises(
        RiskcalError, match=r"cost: 'joules' was not recorded; there is layers, price"
    ):
        calibrate(runs, delta=0.1, cost="joules")


def test_a_calibration_names_the_recorded_costs_and_nothing_else():
    runs = replay_traces(traces(), GRID, exact=True, costs={"price": [0.1, 0.2, 1.0]})
    assert calibrate(runs, delta=0.1).costs == runs.costs == ["layers", "tokens", "price"]
    assert calibrate(np.zeros((50, 2)), thresholds=GRID, delta=0.1).costs == []


@pytest.mark.parametrize("test", ["betting", "convex_order"])
def test_with_one_coordinate_a_named_cost_chooses_too(test):
    losses = np.zeros((100, 3))
    price = np.array([0.3, 0.1, 0.2])
    given = {
        "thresholds": [0.9, 0.7, 0.5],
        "delta": 0.1,
        "test": test,
        "prompts": np.arange(100) + 7,
    }
    for costs in (price, np.tile(price, (100, 1))):
        assert calibrate(losses, costs={"price": costs}, **given).threshold == 0.5
        chosen = calibrate(losses, costs={"price": costs}, cost="price", **given)
        assert (chosen.threshold, chosen.chosen["price"]) == (0.7, pytest.approx(0.1))
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.7, 0.5], dissimilarity=losses, costs={"price": price}
    )
    assert calibrate(runs, delta=0.1, cost="price", test=test).threshold == 0.7
    trials = riskcal.run_trials(runs, 0.1, n_trials=3, cost="price", test=test)
    assert trials["threshold"].tolist() == [0.7] * 3
    assert trials["price"].tolist() == pytest.approx([0.1] * 3)
    assert "price_mean" in riskcal.trials.summary(trials)


def test_costs_of_arrays_stay_with_their_rows_and_columns():
    rng = np.random.default_rng(1)
    prompts = rng.permutation(np.repeat(np.arange(50), 2))
    losses, price = np.zeros((100, 2)), rng.random((100, 2))
    table = calibrate(
        losses, thresholds=[0.5, 0.9], delta=0.2, prompts=prompts, costs={"price": price}
    ).table
    of = table.set_index("threshold")["price"]
    assert [of[0.5], of[0.9]] == pytest.approx(price.mean(0).tolist())


def test_a_mean_of_any_cost_is_certified():
    runs = replay_traces(traces(), GRID, exact=True, costs={"price": [0.1, 0.2, 1.0]})
    kept = calibrate(runs, delta=0.1, budget={"price": (0.5, 1.0)})
    assert kept.chosen["price"] < 0.5
    with pytest.raises(
        RiskcalError, match=r"budget: 'joules' is no recorded cost; there is layers, tokens, price"
    ):
        calibrate(runs, delta=0.1, budget={"joules": (0.5, 1.0)})


def test_they_are_in_tables_pictures_and_files(tmp_path):
    runs = replay_traces(traces(), GRID, exact=True, costs={"price": [0.1, 0.2, 1.0]})
    calibration = calibrate(runs, delta=0.1)
    assert calibration.full_costs["price"] == pytest.approx(1.0)
    ax = calibration.plot(cost="price")
    drawn = ax.lines[0].get_ydata()
    assert sorted(drawn) == pytest.approx(sorted(calibration.table["price"]))
    assert ax.get_ylabel() == "price"
    with pytest.raises(RiskcalError, match=r"cost: 'joules' is unknown"):
        calibration.plot(cost="joules")
    for ending in ("parquet", "csv", "jsonl"):
        path = tmp_path / f"runs.{ending}"
        runs.write(path)
        again = Runs.read(path, costs=["price"])
        assert again.digest() == runs.digest()


def test_the_command_line_reads_the_costs_that_it_is_told_to_choose_by(tmp_path):
    path = tmp_path / "runs.csv"
    replay_traces(traces(), GRID, exact=True, costs={"price": [0.1, 0.2, 1.0]}).write(path)
    command = [sys.executable, "-m", "riskcal", "calibrate", str(path), "--delta", "0.1"]
    done = subprocess.run(
        [*command, "--cost", "price"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "price" in done.stdout


N = len(classifier()["agrees"])
WRONG_OF_EXITS = {
    "of other exits": (
        {"flops": [1.0, 2.0]},
        r"costs: 'flops' must have one number for each of the 3 exits",
    ),
    "of rows": (
        {"price": np.ones((N, 3))},
        r"Costs that differ from row to row belong into the traces",
    ),
    "negative": ({"price": [0.1, -0.2, 1.0]}, r"costs: price: -0.2 at index 1"),
    "not finite": ({"price": [0.1, np.nan, 1.0]}, r"costs: price: nan at index 1"),
    "a name with a meaning": ({"risk": FLOPS}, r"costs: 'risk' has a meaning of its own"),
    "a setting's name": ({"learned": FLOPS}, r"costs: 'learned' has a meaning of its own"),
    "a result's name": (
        {"variance_left": FLOPS},
        r"costs: 'variance_left' has a meaning of its own",
    ),
    "no name": ({3: FLOPS}, r"costs: 3 is no name"),
}


@pytest.mark.parametrize(("costs", "named"), WRONG_OF_EXITS.values(), ids=WRONG_OF_EXITS)
def test_costs_that_cannot_be_are_refused_where_traces_are_replayed(costs, named):
    with pytest.raises(RiskcalError, match=named):
        replay_traces(traces(), GRID, exact=True, costs=costs)


WRONG_OF_ARRAYS = {
    "of other shape": (
        {"price": np.ones((3, 3))},
        r"costs: 'price' has shape \(3, 3\); expected \(50, 2\), or \(2,\)",
    ),
    "negative": ({"price": [0.1, -0.2]}, r"costs: price: -0.2 at index 1"),
    "not finite": ({"price": [0.1, np.inf]}, r"costs: price: inf at index 1"),
}


@pytest.mark.parametrize(("costs", "named"), WRONG_OF_ARRAYS.values(), ids=WRONG_OF_ARRAYS)
def test_costs_that_cannot_be_are_refused_beside_arrays(costs, named):
    losses = np.zeros((50, 2))
    with pytest.raises(RiskcalError, match=named):
        calibrate(losses, thresholds=[0.9, 0.5], delta=0.1, costs=costs)
    with pytest.raises(RiskcalError, match=named):
        Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=losses, costs=costs)
    with pytest.raises(RiskcalError, match="costs: Runs carry their own"):
        calibrate(
            Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=losses), delta=0.1, costs=costs
        )


def test_a_table_has_the_costs_that_are_named():
    frame = pd.DataFrame(
        [
            {"prompt": i, "threshold": t, "dissimilarity": 0.0, "price": -1.0}
            for i in range(3)
            for t in (0.9, 0.5)
        ]
    )
    with pytest.raises(RiskcalError, match=r"price: -1.0 at row 0"):
        Runs.from_frame(frame, costs=["price"])
    with pytest.raises(RiskcalError, match=r"joules: the column is missing"):
        Runs.from_frame(frame, costs=["joules"])
    with pytest.raises(RiskcalError, match=r"costs: 'price' tells candidates apart"):
        Runs.from_frame(frame, costs=["price"], candidate_columns=["price"])
    with pytest.raises(RiskcalError, match=r"costs: 'price' is no list"):
        Runs.from_frame(frame, costs="price")


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_cost_whose_name_ends_in_digits_comes_back(tmp_path, ending):
    of = {name: np.arange(1.0, 13.0).reshape(4, 3) for name in ("h100_80", "gpu_1", "gpu_2")}
    held = Traces.from_arrays(
        prompt=np.arange(4),
        position=np.zeros(4, dtype=int),
        confidence=np.full((4, 3), 0.5),
        agrees=np.ones((4, 3), dtype=bool),
        cost=of,
    )
    held.write(tmp_path / f"traces.{ending}")
    again = Traces.read(tmp_path / f"traces.{ending}")
    assert again.costs.keys() == of.keys()
    for name, values in held.costs.items():
        assert np.array_equal(again.costs[name], values)


def dearer_below() -> Runs:
    """All are certified at delta .1; the fewest layers are those of the middle threshold, the FLOPs the same numbers."""
    spent = np.tile([5.0, 2.0, 4.0], (400, 1))
    return Runs.from_arrays(
        thresholds=[0.9, 0.7, 0.5],
        prompts=[f"p{i}" for i in range(400)],
        dissimilarity=np.zeros((400, 3)),
        layers=spent,
        flops=spent,
    )


@pytest.mark.parametrize("test", ["betting", "convex_order", "empirical_bernstein"])
@pytest.mark.parametrize("cost", ["layers", "flops"])
def test_a_cost_that_is_named_is_minimised_whatever_its_name_is(cost: str, test: str) -> None:
    runs = dearer_below()
    assert calibrate(runs, delta=0.1, test=test, cost=cost).threshold == 0.7
    assert calibrate(runs, delta=0.1, test=test).threshold == 0.5
    trials = riskcal.run_trials(runs, [0.1], n_trials=3, test=test, cost=cost)
    assert set(trials["threshold"]) == {0.7}
    assert set(riskcal.run_trials(runs, [0.1], n_trials=3, test=test)["threshold"]) == {0.5}
    [one] = calibrate(runs, delta=[0.1], test=test, cost=cost)
    assert one.threshold == 0.7


def test_the_cost_by_which_was_chosen_is_verified_and_that_of_older_certificates_too() -> None:
    runs = dearer_below()
    for cost in (None, "layers", "flops"):
        policy = calibrate(runs, delta=0.1, cost=cost).policy()
        assert riskcal.verify(policy, runs).agrees
        certificate = policy.certificate
        assert certificate is not None
        assert certificate.asked is not None
        assert certificate.asked.wanted_cost == cost
    policy = calibrate(runs, delta=0.1).policy()
    written = policy.model_dump(mode="json", exclude_defaults=True)
    written["certificate"]["asked"].pop(
        "cost_named"
    )  # as versions wrote it that took "layers" for no word
    older = riskcal.ExitPolicy(**written)
    assert older.certificate is not None
    assert older.certificate.asked is not None
    assert older.certificate.asked.cost == "layers"
    assert riskcal.verify(older, runs).agrees


def test_a_named_cost_that_was_not_recorded_is_refused_and_none_is_needed_for_one_coordinate() -> (
    None
):
    losses = np.zeros((400, 2))
    with pytest.raises(
        RiskcalError, match=r"cost: 'layers' was not recorded; there is none.* without"
    ):
        calibrate(losses, thresholds=[0.9, 0.5], delta=0.1, cost="layers")
    assert calibrate(losses, thresholds=[0.9, 0.5], delta=0.1).threshold == 0.5
    for runs in (losses, replay_traces(traces(), GRID, exact=True)):  # without layers and with
        given = {"thresholds": [0.9, 0.5]} if runs is losses else {}
        front = calibrate(runs, delta=0.1, procedure="pareto", pilot_fraction=0.2, **given)
        assert front.threshold == min(front.table["threshold"])


def test_the_command_line_minimises_layers_where_they_are_named(tmp_path) -> None:
    path = tmp_path / "runs.parquet"
    dearer_below().write(path)
    for said, expected in (((), 0.5), (("--cost", "layers"), 0.7)):
        asked = ["calibrate", path, "--delta", "0.1", *said, "--out", tmp_path / "policy.json"]
        outcome = CliRunner().invoke(riskcal.cli.app, list(map(str, asked)))
        assert outcome.exit_code == 0
        assert riskcal.ExitPolicy.load(tmp_path / "policy.json").threshold == expected


@pytest.mark.parametrize("form", ["of all rows", "of each row", "ragged"])
def test_prices_of_stages_are_no_costs_in_all(form):
    """Taken for totals, the exit after the dearest stage would be the one that saves most."""
    arrays, prices = classifier(4), [90.0, 9.0, 1.0]
    loss, n = 1.0 - arrays["agrees"], 4
    if form != "of all rows":
        prices = [prices] * n
    if form == "ragged":
        confidence, loss, prices = (
            [[0.5], *[[0.1, 0.2, 0.3]] * 3],
            [[0], *[[0, 0, 0]] * 3],
            [[5], *prices[1:]],
        )
    else:
        confidence = arrays["confidence"]

    def uses(cost):
        with_costs = Traces.from_arrays(
            prompt=np.arange(n) + 7,
            position=np.zeros(n, int),
            confidence=confidence,
            loss=loss,
            cost={"price": cost},
        )
        yield with_costs.costs["price"]
        yield replay_arrays(confidence, loss, GRID, costs={"price": cost})
        if form == "of all rows":
            yield replay_traces(traces(), GRID, costs={"price": cost})

    told = r"price: 9 at index .* is less than 90 at the exit before; .* their sums, (.*)\. If .* so far, (.*)\.$"
    with pytest.raises(RiskcalError, match=told) as refusal:
        next(uses(prices))
    sums, largest = (
        eval(call, {"np": np, "prices": prices}) for call in re.findall(told, str(refusal.value))[0]
    )
    for totals in (sums, largest):  # of stages; of measurements that fall by noise
        assert len(list(uses(totals))) == 2 + (form == "of all rows")
    for call in (lambda: replay_arrays(confidence, loss, GRID, costs={"price": prices}),):
        with pytest.raises(RiskcalError, match=told):
            call()
    if form == "of all rows":
        with pytest.raises(RiskcalError, match="costs: " + told):
            replay_traces(traces(), GRID, costs={"price": prices})
    assert len(list(uses(np.float32(sums) if form != "ragged" else sums))) >= 2


@pytest.mark.parametrize("little", [-1e-12, -1e-10])
def test_rounding_below_nothing_is_nothing_wherever_it_is_given(little):
    n, grid = 4, [0.9, 0.5]
    losses, price = np.zeros((n, 2)), np.full((n, 2), little)
    arrays = {"thresholds": grid, "dissimilarity": losses}
    runs = [
        Runs.from_arrays(**arrays, tokens=price),
        Runs.from_arrays(**arrays, costs={"tokens": price}),
        Runs.from_arrays(**arrays, costs={"tokens": price[0]}),
    ]
    frame = runs[0].to_frame().assign(tokens=little)
    for one in (*runs, Runs.from_frame(frame)):
        assert one.values["tokens"].tolist() == [[0.0, 0.0]] * n
    with pytest.raises(RiskcalError, match=r"tokens: -0.001 at index \[0, 0\]"):
        Runs.from_arrays(**arrays, tokens=price * 0 - 1e-3)
    base = {"prompt": np.arange(n), "position": [0] * n, "confidence": [[0.5, 0.9]] * n}
    costs = {"a": [0.0, little], "b": [[0.0, little]] * n}
    found = Traces.from_arrays(**base, loss=losses, cost=costs)
    assert all(cost.min() == cost.max() == 0 for cost in found.costs.values())
