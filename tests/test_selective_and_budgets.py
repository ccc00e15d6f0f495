"""The pooled risk among requests that stopped early, and budgets: certified, with the guarantee, beside a loss."""

import math
import re

import numpy as np
import pytest

from riskcal import RiskcalError, Runs, calibrate, calibrate_groups
from riskcal.calibration.posing import pose
from riskcal.fwer import FixedSequence

GRID = [0.9, 0.6, 0.3]
SHARE = np.array([0.2, 0.5, 0.8])  # of requests that stop early


def world(n, rng, risk, *, layers=8, cluster=None):
    """Requests stop early with probability `SHARE`, and only then lose: with probability ``risk`` (k,)."""
    early = rng.random((n, 1)) < SHARE
    lost = early & (rng.random((n, 1)) < risk)
    depth = np.where(early, rng.integers(1, layers, (n, 1)), layers)
    return Runs.from_arrays(
        thresholds=[math.inf, *GRID],
        dissimilarity=np.c_[np.zeros(n), lost],
        layers=np.c_[np.full(n, layers), depth],
        prompts=[f"p{i}" for i in range(n)],
        cluster=cluster,
    )


def test_the_observed_selective_risk_is_the_mean_over_those_that_stopped():
    runs = world(900, np.random.default_rng(0), np.array([0.01, 0.02, 0.03]))
    found = calibrate(runs, delta=0.1, objective="selective")
    early = runs.values["layers"] < 8
    losses = np.where(early, runs.losses(), np.nan)
    assert found.table["loss"].to_numpy() == pytest.approx(np.nanmean(losses, axis=0))
    assert found.procedure == "holm"
    assert found.certified
    assert "among the requests that stopped early" in found.message
    certificate = found.policy().certificate
    assert (certificate.objective, certificate.delta, certificate.upper) == ("selective", 0.1, 1.0)


def test_a_loss_that_full_requests_dilute_is_certified_but_not_its_selective_risk():
    """A fifth of the requests stop early, and lose one in four: .05 over all, .25 among those that stopped."""
    runs = world(2000, np.random.default_rng(1), np.array([0.25, 0.25, 0.25]))
    assert calibrate(runs, delta=0.1).threshold == 0.9
    assert not calibrate(runs, delta=0.1, objective="selective").certified


def test_false_selective_certificates_at_the_boundary():
    """400 draws at a pooled risk of exactly delta: at most .05 + three standard errors (.033)."""
    rng = np.random.default_rng(2)
    delta, false = 0.1, 0
    for _ in range(400):
        runs = world(300, rng, np.full(3, delta))
        false += calibrate(runs, delta=delta, objective="selective").certified
    assert false / 400 <= 0.05 + 0.033


def test_false_selective_certificates_of_requests_in_clusters():
    """Sizes 1 to 4, larger clusters lose more; the pooled risk is exactly delta. 300 draws, standard error .0126."""
    rng = np.random.default_rng(3)
    false = 0
    rate = {1: 0.05, 4: 0.1125}  # 1 * .05 + 4 * .1125 = .5 = 5 * .1
    for _ in range(300):
        sizes = rng.choice([1, 4], 120)
        cluster = np.repeat(np.arange(120), sizes)
        risk = np.array([rate[size] for size in sizes])[cluster][:, None]
        runs = world(len(cluster), rng, risk, cluster=[f"c{i}" for i in cluster])
        found = calibrate(
            runs, delta=0.1, objective="selective", weighting="requests", max_cluster=4
        )
        false += found.certified
    assert false / 300 <= 0.05 + 0.038


def test_a_budget_is_certified_beside_the_loss():
    runs = world(1500, np.random.default_rng(4), np.array([0.02, 0.03, 0.04]))
    found = calibrate(runs, delta=0.1, budget={"layers": 6.5})
    mean = runs.values["layers"].mean(0)
    assert found.table["loss_layers"].to_numpy() == pytest.approx(mean)
    assert found.table["certified"].tolist() == [False, True, True]  # 7.2, 6.0 and 4.8 layers
    assert "cost in layers is at most 6.5" in found.message
    assert found.policy().certificate.delta == {"textual": 0.1, "layers": 6.5}
    assert not calibrate(runs, delta=0.1, budget={"layers": 4.0}).certified


def test_false_budget_certificates_at_the_boundary():
    """400 draws; layers have mean 5 exactly, budget 5: at most .05 + .033."""
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(400):
        depth = rng.choice([2.0, 8.0], (200, 1))
        runs = Runs.from_arrays(
            thresholds=[math.inf, 0.5],
            dissimilarity=np.zeros((200, 2)),
            layers=np.c_[np.full(200, 8.0), depth],
            prompts=[f"p{i}" for i in range(200)],
        )
        false += calibrate(runs, delta=0.1, budget={"layers": 5.0}).certified
    assert false / 400 <= 0.05 + 0.033


def test_seconds_need_a_largest_value_and_get_it():
    n = 300
    rng = np.random.default_rng(6)
    runs = Runs.from_arrays(
        thresholds=[0.5],
        dissimilarity=np.zeros((n, 1)),
        seconds=rng.random((n, 1)),
        prompts=[f"p{i}" for i in range(n)],
    )
    with pytest.raises(
        RiskcalError, match=r"budget: give 'seconds' with the largest cost.*largest"
    ):
        calibrate(runs, delta=0.1, budget={"seconds": 0.7})
    assert calibrate(runs, delta=0.1, budget={"seconds": (0.7, 1.0)}).certified
    with pytest.raises(RiskcalError, match=r"budget: seconds of .* outside \[0, 0.9\]"):
        calibrate(runs, delta=0.1, budget={"seconds": (0.7, 0.9)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"price": 1}}, "budget: 'price' is no recorded cost; there is layers"),
        ({"budget": {"layers": 9}}, "budget: 'layers' of 9 is not between 0 and its largest, 8"),
        ({"budget": {"layers": float("nan")}}, "budget: layers"),
        ({"budget": {"layers": 5}, "delta": [0.1, 0.2]}, "one delta at a time"),
        ({"objective": "selective", "delta": [0.1, 0.2]}, "one delta at a time"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, message):
    runs = world(100, np.random.default_rng(7), np.full(3, 0.02))
    with pytest.raises(RiskcalError, match=message):
        calibrate(runs, **({"delta": 0.1} | options))


def test_who_stopped_early_is_known_only_beside_the_full_model():
    """The layers of candidates alone, or of nobody, do not say it."""
    runs = world(50, np.random.default_rng(7), np.full(3, 0.02))
    known = {"thresholds": GRID, "dissimilarity": runs.losses()}
    for more in ({"layers": runs.values["layers"]}, {}):
        lacking = Runs.from_arrays(**known, **more)
        with pytest.raises(RiskcalError, match=r"layers: objective 'selective' .*threshold inf"):
            calibrate(lacking, delta=0.1, objective="selective")


def test_in_clusters_the_observed_selective_risk_is_that_of_all_requests_pooled():
    """Large clusters lose more, so that a mean of the clusters' own risks would be another number."""
    rng = np.random.default_rng(11)
    sizes = np.tile([1, 4], 60)
    cluster = np.repeat(np.arange(120), sizes)
    risk = np.where(sizes == 4, 0.3, 0.05)[cluster][:, None]
    runs = world(len(cluster), rng, risk, cluster=[f"c{i}" for i in cluster])
    early = runs.values["layers"] < 8
    pooled = (runs.prompt_losses("textual") * early).sum(0) / early.sum(0)
    for most in (4, 9):
        found = calibrate(
            runs, delta=0.1, objective="selective", weighting="requests", max_cluster=most
        )
        assert found.table["loss"].to_numpy() == pytest.approx(pooled)


def test_where_nobody_stops_early_nothing_is_certified_and_the_message_says_so():
    full = np.full((50, 1), 8.0)
    known = {"thresholds": [math.inf, 0.9, 0.1]}
    still = Runs.from_arrays(
        **known, dissimilarity=np.zeros((50, 3)), layers=np.tile(full, 3), group=["a"] * 50
    )
    found = calibrate(still, delta=0.1, objective="selective")
    assert (found.certified, found.threshold) == (False, math.inf)
    assert "No request stopped early under any candidate" in found.message
    one = Runs.from_arrays(
        **known,
        dissimilarity=np.c_[np.zeros((50, 2)), np.ones(50)],
        layers=np.c_[full, full, np.ones(50)],
    )
    found = calibrate(one, delta=0.1, objective="selective", procedure=FixedSequence())
    assert not found.certified
    assert "nan" not in found.message
    assert "threshold 0.9, where testing begins, no request stopped early" in found.message


def test_a_stratum_where_nobody_stops_early_does_not_stand_in_the_way_of_the_others():
    runs = world(800, np.random.default_rng(8), np.full(3, 0.01))
    layers = np.c_[runs.full["layers"], runs.values["layers"]]
    hard = np.arange(800) % 4 == 0
    layers[hard] = 8.0
    losses = np.where(hard[:, None], 0.0, np.c_[np.zeros(800), runs.losses()])
    mixed = Runs.from_arrays(
        thresholds=[math.inf, *GRID],
        dissimilarity=losses,
        layers=layers,
        prompts=runs.prompts,
        group=np.where(hard, "hard", "easy"),
    )
    found = calibrate_groups(mixed, delta=0.1, objective="selective")
    assert found["easy"].certified
    assert not found["hard"].certified


def test_an_output_that_failed_counts_among_those_that_stopped_early():
    """A time-out after all layers is the worst loss, not a request that ran in full."""
    n = 400
    failed = np.zeros((n, 2), dtype=bool)
    failed[:60, 1] = True
    early = np.r_[np.zeros(60), np.ones(200), np.zeros(140)].astype(bool)
    runs = Runs.from_arrays(
        thresholds=[math.inf, 0.5],
        dissimilarity=np.zeros((n, 2)),
        failed=failed,
        layers=np.c_[np.full(n, 8.0), np.where(early, 3.0, 8.0)],
        prompts=[f"p{i}" for i in range(n)],
    )
    found = calibrate(runs, delta=0.1, objective="selective")
    assert found.table["loss"].tolist() == pytest.approx([60 / 260])
    assert not found.certified


@pytest.mark.parametrize("full", [12.0, 12.000004])
def test_rounding_is_no_early_stop_but_where_something_was_lost(full):
    """A mean of float32 below the full model's by its last digits: 400 requests diluted what 60 that stopped had lost."""
    n, stops = 460, 60
    depth = np.r_[np.full(n - stops, 11.999991), np.full(stops, 3.0)]
    loss = np.r_[np.zeros(n - stops), np.tile([1.0, 0.0], stops // 2)]

    def found(loss):
        runs = Runs.from_arrays(
            thresholds=[math.inf, 0.5],
            dissimilarity=np.c_[np.zeros(n), loss],
            layers=np.c_[np.full(n, full), depth],
            prompts=[f"p{i}" for i in range(n)],
        )
        return calibrate(runs, delta=0.1, objective="selective")

    plain = found(loss)
    assert not plain.certified
    assert plain.table["loss"].tolist() == [0.5]
    loss[0] = 1.0  # who lost something did not run in full
    assert found(loss).table["loss"].tolist() == pytest.approx([31 / 61])


def test_the_number_of_layers_is_a_bound_only_where_it_is_one_number():
    """What the full model took at most in these data is no bound for others, where it differs from prompt to prompt."""
    n = 100
    layers = np.c_[np.linspace(6, 8, n), np.full(n, 3.0)]
    runs = Runs.from_arrays(
        thresholds=[math.inf, 0.5], dissimilarity=np.zeros((n, 2)), layers=layers
    )
    with pytest.raises(RiskcalError, match="budget: give 'layers' with the largest cost"):
        calibrate(runs, delta=0.1, budget={"layers": 5})
    assert calibrate(runs, delta=0.1, budget={"layers": (5, 12)}).certified


def test_rows_without_ids_may_be_sorted_by_their_costs():
    """Losses all 0, so that they fix no order; layers have mean 5, the budget. 400 draws, at most .05 + .033."""
    rng = np.random.default_rng(9)
    false = 0
    for _ in range(400):
        depth = np.sort(rng.choice([2.0, 5.0, 8.0], 150))[::-1]
        runs = Runs.from_arrays(
            thresholds=[math.inf, 0.5],
            dissimilarity=np.zeros((150, 2)),
            layers=np.c_[np.full(150, 8.0), depth],
        )
        false += calibrate(runs, delta=0.1, budget={"layers": 5.0}).certified
    assert false / 400 <= 0.05 + 0.033


def test_the_order_of_rows_without_ids_is_drawn_from_what_is_tested():
    """Two samples whose losses are alike and whose layers are not are put into different orders."""

    def order(depth):
        runs = Runs.from_arrays(
            thresholds=[math.inf, 0.5],
            dissimilarity=np.zeros((60, 2)),
            layers=np.c_[np.full(60, 8.0), depth],
        )
        return pose(runs, 0.1, budget={"layers": 5.0}).units.tolist()

    depth = np.repeat([2.0, 5.0, 8.0], 20)
    other = depth.copy()
    other[0] = 5.0
    assert order(depth) != order(other)
    assert order(depth) == order(depth.copy())


@pytest.mark.parametrize("asked", [{"objective": "selective"}, {"budget": {"layers": 6.0}}])
def test_the_sample_size_that_a_message_foretells_certifies_as_often_as_it_says(asked):
    """200 fresh samples, drawn as the message supposes: from the rows seen. The share is four in five, within .12."""
    rng = np.random.default_rng(10)
    runs = world(60, rng, np.array([0.02, 0.03, 0.04]))
    asked = {"delta": 0.12} | asked
    found = calibrate(runs, **asked)
    assert not found.certified
    size = int(re.search(r"fresh sample of about (\d+) prompts", found.message).group(1))
    certified = 0
    for _ in range(200):
        rows = rng.integers(0, 60, size)
        fresh = Runs.from_arrays(
            thresholds=[math.inf, *GRID],
            dissimilarity=np.c_[np.zeros(size), runs.losses()[rows]],
            layers=np.c_[np.full(size, 8.0), runs.values["layers"][rows]],
            prompts=[f"p{i}" for i in range(size)],
        )
        certified += calibrate(fresh, **asked).certified
    assert abs(certified / 200 - 0.8) <= 0.12


@pytest.mark.parametrize("budget", [2.0, 0.5])
def test_a_budget_that_fails_is_named_and_stricter_thresholds_are_no_remedy(budget):
    """Stricter ones cost more; raising the budget is what helps, and does."""
    rng = np.random.default_rng(0)
    runs = world(300, rng, np.array([0.02, 0.03, 0.04]))
    found = calibrate(runs, delta=0.12, budget={"layers": budget})
    assert not found.certified
    assert f"at delta 0.12 and a budget of {budget:g} for layers" in found.message
    assert "cost in layers is" in found.message
    assert "raise the budget, record other candidates" in found.message
    assert "stricter" not in found.message
    assert f"a budget of {budget:g} for layers" in str(found.policy())
    assert calibrate(runs, delta=0.12, budget={"layers": 7.5}).certified


def test_only_what_is_not_held_is_to_be_raised():
    rng = np.random.default_rng(0)
    both = calibrate(world(300, rng, np.ones(3)), delta=0.1, budget={"layers": 0.5})
    assert "raise delta and raise the budget" in both.message
    lost = calibrate(world(300, rng, np.ones(3)), delta=0.1, budget={"layers": 7.9})
    assert "raise delta," in lost.message
    assert "raise the budget" not in lost.message


def test_a_cost_that_equals_its_budget_is_not_said_to_be_below_delta():
    n = 60
    runs = Runs.from_arrays(
        thresholds=[math.inf, 0.5],
        dissimilarity=np.zeros((n, 2)),
        layers=np.c_[np.full(n, 8.0), np.full(n, 4.0)],
        prompts=[f"p{i}" for i in range(n)],
    )
    message = calibrate(runs, delta=0.1, budget={"layers": 4.0}).message
    assert "observed cost in layers is 4: not below its budget" in message
    assert "true mean may lie below its budget" in message


def test_a_selective_risk_of_nothing_is_nothing_and_no_rounding_error():
    runs = Runs.from_arrays(
        thresholds=[math.inf, 0.5],
        dissimilarity=np.zeros((60, 2)),
        layers=np.tile([8.0, 3.0], (60, 1)),
    )
    found = calibrate(runs, delta=0.1, objective="selective")
    assert "(observed 0)" in found.message
    assert found.table["loss"].tolist() == [0.0]


def test_a_cost_may_be_its_largest_and_the_first_beyond_is_named():
    seconds = np.full((60, 2), 0.25)
    seconds[7] = 1.0
    made = {"thresholds": [0.9, 0.5], "dissimilarity": np.zeros((60, 2))}
    ids = [f"p{i:02}" for i in range(60)]
    runs = Runs.from_arrays(seconds=seconds, prompts=ids, **made)
    given = {"delta": 0.3, "budget": {"seconds": (0.8, 1.0)}}
    assert calibrate(runs, **given).certified
    first, then = (int(unit[1:]) for unit in runs.units if unit in ("p07", "p09"))  # as tested
    seconds[first, 1], seconds[then] = 1.5, 2.0
    over = Runs.from_arrays(seconds=seconds, prompts=ids, **made)
    named = rf"of 'p0{first}' is 1.5, outside \[0, 1\] \(3 values are\)"
    with pytest.raises(RiskcalError, match=named):
        calibrate(over, **given)


@pytest.mark.parametrize(
    ("options", "procedure"),
    [
        ({}, "fixed_sequence"),
        ({"objective": "selective"}, "holm"),
        ({"budget": {"layers": 5.0}}, "holm"),
        ({"delta": {"textual": 0.12, "selective": 0.3}}, "holm"),
    ],
)
def test_no_sequence_begins_where_few_stop_or_where_it_costs_most_unless_it_is_asked_for(
    options, procedure
):
    runs = world(100, np.random.default_rng(8), np.array([0.02, 0.03, 0.04]))
    assert calibrate(runs, **({"delta": 0.12} | options)).procedure == procedure


@pytest.mark.parametrize("asked", [(0.0, 8.0), (8.0, 8.0), (-1.0, 8.0)])
def test_a_budget_lies_between_nothing_and_the_largest_cost(asked):
    runs = world(60, np.random.default_rng(0), np.zeros(3))
    with pytest.raises(
        RiskcalError, match=f"budget: 'layers' of {asked[0]:g} is not between 0 and"
    ):
        calibrate(runs, delta=0.3, budget={"layers": asked})


def test_what_costs_nothing_keeps_a_budget():
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.5],
        dissimilarity=np.zeros((80, 2)),
        prompts=[f"p{i}" for i in range(80)],
        costs={"price": np.zeros((80, 2))},
    )
    assert calibrate(runs, delta=0.3, budget={"price": (0.5, 1.0)}).threshold == 0.5


def test_a_budgets_cost_that_rises_with_the_threshold_is_no_risk_that_should_fall():
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.5],
        dissimilarity=np.tile([0.0, 0.1], (200, 1)),
        layers=np.tile([7.0, 2.0], (200, 1)),
        prompts=[f"p{i}" for i in range(200)],
    )
    found = calibrate(runs, delta=0.3, budget={"layers": (7.5, 8.0)})
    assert found.certified
    assert "does not fall steadily" not in found.message


@pytest.mark.parametrize("asked", [{"objective": "selective"}, {"budget": {"layers": 5.0}}])
def test_rows_without_ids_are_so_for_a_loss_that_no_column_holds_too(asked):
    given = world(60, np.random.default_rng(0), np.zeros(3))
    numbers = Runs.from_arrays(
        thresholds=[math.inf, *GRID],
        dissimilarity=np.c_[np.zeros(60), given.losses()],
        layers=np.c_[np.full(60, 8.0), given.values["layers"]],
    )
    assert pose(numbers, 0.3, **asked).nameless
    assert not pose(given, 0.3, **asked).nameless
    [*_, last] = pose(given, 0.3, **asked).risks
    assert (last.lower, last.upper) == (0.0, 8.0 * (1 + 1e-9) if last.is_cost else 1.0)
