"""Thresholds by class under error budgets: the cheapest books against enumeration, false certificates, shipped records."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import riskcal
from helpers import allowed
from riskcal import RiskcalError, Runs, calibrate_classes, pvalues, records
from riskcal.calibration import books
from riskcal.fwer.procedures import pilot_size
from riskcal.serving import PolicyBook


def seconds_of(thresholds):
    """Faster at lower thresholds; the full model takes 1."""
    return 0.2 + 0.5 * np.asarray(thresholds)


def world(seed, means, n=300, costs=None, thresholds=(0.9, 0.6, 0.3)):
    """Losses of 0 or 1 whose means (classes, k) are known, of classes that are equally frequent."""
    rng = np.random.default_rng(seed)
    classes = sorted(means)
    group = np.array(classes)[rng.integers(0, len(classes), n)]
    of = np.array([means[name] for name in group])
    k = of.shape[1]
    spent = (
        seconds_of(thresholds[:k]) if costs is None else np.array([costs[name] for name in group])
    )
    loss = (rng.random((n, k)) < of).astype(float)
    return Runs.from_arrays(
        thresholds=[math.inf, *thresholds[:k]],
        prompts=[f"{seed}-{i}" for i in range(n)],
        group=group,
        dissimilarity=np.c_[np.zeros(n), loss],
        seconds=np.c_[np.ones(n), np.broadcast_to(spent, (n, k))],
    )


@st.composite
def pilots(draw):
    """Losses and costs (n, k) of a few classes on a pilot, with their budgets."""
    grid = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    found = {}
    k = draw(st.integers(1, 3))
    for name in "abc"[: draw(st.integers(1, 3))]:
        n = draw(st.integers(2, 5))
        losses = np.array(
            draw(st.lists(st.lists(grid, min_size=k, max_size=k), min_size=n, max_size=n))
        )
        costs = np.array(draw(st.lists(st.integers(1, 4), min_size=k, max_size=k)), float)
        found[name] = losses, np.r_[costs, 4.0], draw(st.sampled_from([0.1, 0.3, 0.7]))
    return found, draw(st.none() | st.sampled_from([0.2, 0.5]))


def excess_of(rows, delta, n_pilot, n_rest):
    """In standard errors; rows are (loss, weight)."""
    mean = sum(w * x for x, w in rows)
    variance = sum(w * x * x for x, w in rows) - mean**2
    error = math.sqrt(max(variance, 0.0) * (1 / n_pilot + 1 / n_rest))
    if error < 1e-12:
        return math.inf if mean > delta else -math.inf
    return (mean - delta) / error


def enumerated(classes, joint, n_rest):
    """Every book's excess and cost, from single losses."""
    n = sum(len(losses) for losses, _, _ in classes.values())
    k = next(iter(classes.values()))[0].shape[1]
    told = {}
    for book in itertools.product(range(k + 1), repeat=len(classes)):
        worst, cost, pooled = -math.inf, 0.0, []
        for j, (losses, costs, delta) in zip(book, classes.values(), strict=True):
            size, share = len(losses), len(losses) / n
            cost += share * costs[j]
            # one request more, of the worst loss
            column = [0.0] if j == k else [*losses[:, j], 1.0]
            rows = [(x, 1 / len(column)) for x in column]
            pooled += [(x, share * w) for x, w in rows]
            if j < k:
                worst = max(worst, excess_of(rows, delta, size, n_rest))
        if joint is not None and min(book) < k:
            worst = max(worst, excess_of(pooled, joint, n, len(classes) * n_rest))
        told[book] = worst, cost
    return told


COSTS_OF_TWO = np.array([1.0, 2.0, 4.0])
#: Two books whose worst risks differ in the last bit.
ALIKE = {
    "a": (np.array([[0.0, 0.0], [0.25, 0.0], [0.25, 0.0], [0.5, 0.0]]), COSTS_OF_TWO, 0.1),
    "b": (np.array([[0.25, 0.0], [0.25, 0.0], [0.5, 0.0], [1.0, 0.0]]), COSTS_OF_TWO, 0.3),
}


@settings(max_examples=120, deadline=None)
@given(pilots())
@example((ALIKE, None))
def test_the_tested_books_are_the_pareto_front_of_all_books(given_):
    classes, joint = given_
    n, n_rest = sum(len(losses) for losses, _, _ in classes.values()), 7
    told = [
        books.of_class(losses, costs, delta, 1.0, share=len(losses) / n, n_rest=n_rest)
        for losses, costs, delta in classes.values()
    ]
    path = [
        tuple(int(j) for j in book) for book in books.path(told, joint, n, len(classes) * n_rest)
    ]
    every = enumerated(classes, joint, n_rest)
    before = min(cost for worst, cost in every.values() if worst == -math.inf)  # nothing is risked
    worsts = [*(every[book][0] for book in path), math.inf]
    for book, following in zip(path, worsts[1:], strict=True):
        worst, cost = every[book]
        allowed_ = [c for w, c in every.values() if w <= worst + 1e-9]
        if following > worst + 1e-9:  # of books alike but for rounding, the last is on the front
            assert cost == pytest.approx(min(allowed_))
        assert cost < before + 1e-9
        before = cost
    within = [c for w, c in every.values() if w <= 1e-9]
    reached = [every[book][1] for book in path if every[book][0] <= 1e-9]
    # the last book that keeps all budgets on the pilot is the fastest of all that do
    assert min([*reached, 4.0]) == pytest.approx(min(within))


@pytest.mark.parametrize("joint", [None, 0.2])
def test_a_book_is_tested_by_the_largest_pvalue_of_its_budgets(joint):
    means = {"code": [0.01, 0.05, 0.3], "news": [0.02, 0.1, 0.2]}
    runs = world(3, means, n=900)
    found = calibrate_classes(runs, budgets={"code": 0.1, "news": 0.25}, joint=joint, epsilon=0.1)
    pilot = set(found.pilot)
    rest = np.array([p not in pilot for p in runs.prompts])
    assert len(pilot) == 180
    level = 0.05 if joint is None else 0.1
    losses = runs.losses()
    thresholds = runs.thresholds.tolist()
    books_ = found.table.groupby(["class", "step"] if joint is None else "step", sort=False)
    for _, book in books_:
        p, mixed = [], np.zeros(len(losses))
        for row in book.itertuples():
            own = rest & (runs.group == book.loc[row.Index, "class"])
            if math.isinf(row.threshold):
                assert row.loss == 0
                continue
            column = losses[:, thresholds.index(row.threshold)]
            delta = found.budgets[book.loc[row.Index, "class"]]
            p.append(pvalues.betting(column[own], delta, level=level))
            mixed[own] = column[own]
            assert row.loss == pytest.approx(column[own].mean())
            assert row.n == own.sum()
        if joint is not None:
            p.append(pvalues.betting(mixed[rest], joint, level=level))
        assert book["pvalue"].to_numpy() == pytest.approx(max(p))
    for _, own in found.table.groupby("class"):
        assert own["certified"].tolist() == sorted(own["certified"], reverse=True)
    policies = found.policies(measure="softmax")
    assert {name: policy.threshold for name, policy in policies.items()} == found.thresholds
    assert policies["code"].certificate.epsilon_spent == level
    assert found.costs[0] < found.costs[1] == 1.0
    spent = np.array([found.thresholds[name] for name in runs.group[rest]])
    assert found.costs[0] == pytest.approx(np.where(spent < 1, seconds_of(spent), 1.0).mean())
    assert PolicyBook(policies).route("code").known


def test_budgets_are_kept_class_by_class_where_one_threshold_would_break_one():
    means = {"code": [0.05, 0.3, 0.6], "talk": [0.0, 0.01, 0.02]}
    runs = world(0, means, n=2000)
    found = calibrate_classes(runs, budgets=0.1)
    assert found.thresholds == {"code": 0.9, "talk": 0.3}
    assert "code at 0.9, talk at 0.3" in found.message
    worst = {"code": [0.5, 0.6, 0.7], "talk": [0.0, 0.01, 0.02]}
    found = calibrate_classes(world(0, worst, n=2000), budgets=0.1)
    assert found.thresholds == {"code": math.inf, "talk": 0.3}
    assert found.policies()["code"].is_full_model
    assert found.policies()["code"].certificate.pvalue is None
    assert "code at the full model" in found.message
    assert "code" in found._repr_html_()
    nothing = calibrate_classes(world(0, dict.fromkeys(worst, worst["code"]), n=200), budgets=0.1)
    assert not nothing.certified
    assert nothing.message.startswith("Nothing was certified for the budgets code 0.1, talk 0.1")
    assert nothing.costs[0] == nothing.costs[1]


def test_policies_by_class_exit_on_the_side_that_was_recorded():
    """Where low thresholds are the strict ones, each policy says so, but for the full model, which has no direction."""
    worst = {"code": [0.7, 0.6, 0.5], "talk": [0.02, 0.01, 0.0]}
    found = calibrate_classes(world(0, worst, n=2000).directed(True), budgets=0.1)
    assert found.thresholds["code"] == math.inf
    assert found.thresholds["talk"] < math.inf
    policies = found.policies()
    assert policies["talk"].lower_is_stricter
    assert policies["talk"].threshold == found.thresholds["talk"]
    assert policies["code"].is_full_model
    assert not policies["code"].lower_is_stricter
    upright = calibrate_classes(world(0, worst, n=2000), budgets=0.1)
    for calibration, other in ((found, False), (upright, True)):
        with pytest.raises(RiskcalError, match=f"^lower_is_stricter: {other} is not the recorded"):
            calibration.policies(lower_is_stricter=other)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budgets": {"easy": 0.05, "hard": -0.1}}, r"^budgets: 'hard': -0.1 is below 0, the loss"),
        ({"budgets": 0.05, "joint": -0.01}, r"^joint: -0.01 is below 0, the loss"),
    ],
)
def test_a_budget_that_the_full_model_exceeds_is_refused(asked, message):
    """A class may be left with the full model, whose increase in risk is 0."""
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.5, np.inf],
        prompts=[f"p{i}" for i in range(1000)],
        group=np.repeat(["easy", "hard"], 500),
        risk=np.column_stack([np.full(1000, 0.5), np.repeat([0.5, 0.6], 500), np.full(1000, 0.5)]),
        layers=np.tile([4.0, 2.0, 8.0], (1000, 1)),
    )
    with pytest.raises(RiskcalError, match=message):
        calibrate_classes(runs, objective="risk", cost="layers", **asked)
    none = calibrate_classes(runs, objective="risk", cost="layers", budgets=0.0)
    assert none.thresholds == {"easy": np.inf, "hard": np.inf}


def test_a_joint_budget_goes_to_the_class_that_gains_most_by_it():
    means = {"dear": [0.05, 0.1, 0.2], "cheap": [0.05, 0.1, 0.2]}
    costs = {"dear": [0.9, 0.5, 0.1], "cheap": [0.99, 0.98, 0.97]}
    found = calibrate_classes(world(1, means, n=3000, costs=costs), budgets=0.3, joint=0.13)
    assert found.thresholds["dear"] == 0.3
    assert found.thresholds["cheap"] > 0.6
    assert "and 0.13 over all requests" in found.message


def test_classes_by_other_names_and_rows_in_another_order_give_the_same():
    means = {"a": [0.01, 0.1, 0.3], "b": [0.05, 0.1, 0.2]}
    runs = world(5, means, n=600)
    table = runs.to_frame()
    first = calibrate_classes(runs, budgets={"a": 0.1, "b": 0.2})
    again = calibrate_classes(
        Runs.from_frame(
            table.assign(group=table["group"].map({"a": "z", "b": "y"})).sample(
                frac=1, random_state=0
            )
        ),
        budgets={"z": 0.1, "y": 0.2},
    )
    assert (first.thresholds["a"], first.thresholds["b"]) == (
        again.thresholds["z"],
        again.thresholds["y"],
    )
    numbered = table.assign(prompt=np.unique(table["prompt"], return_inverse=True)[1])
    known = calibrate_classes(Runs.from_frame(numbered), budgets=0.2)
    shuffled = calibrate_classes(
        Runs.from_frame(numbered.sample(frac=1, random_state=1)), budgets=0.2
    )
    assert known.table.equals(shuffled.table)


@pytest.mark.parametrize(
    ("means", "joint"),
    [
        ({"a": [0.1001] * 3, "b": [0.1001] * 3}, None),
        ({"a": [0.1001] * 3, "b": [0.01, 0.02, 0.03]}, None),
        ({"a": [0.02, 0.04, 0.06], "b": [0.05, 0.07, 0.0901]}, 0.03),
    ],
    ids=["all at the boundary", "one class at the boundary", "classes fine, together too many"],
)
def test_false_certificates_stay_within_epsilon(means, joint):
    draws, epsilon, wrong = 120, 0.1, 0
    true = {
        name: dict(zip((0.9, 0.6, 0.3), of, strict=True)) | {math.inf: 0.0}
        for name, of in means.items()
    }
    for seed in range(draws):
        found = calibrate_classes(
            world(seed, means, n=240), budgets=0.1, joint=joint, epsilon=epsilon, pilot_fraction=0.3
        )
        loss = {name: true[name][t] for name, t in found.thresholds.items()}
        wrong += max(loss.values()) > 0.1 or (
            joint is not None and np.mean(list(loss.values())) > joint
        )
    assert wrong / draws <= allowed(epsilon, draws)


def test_where_nothing_is_cheaper_than_the_full_model_nothing_is_tested():
    dear = {"a": [1.0, 2.0], "b": [1.5, 1.0]}
    found = calibrate_classes(
        world(0, {"a": [0.0, 0.0], "b": [0.0, 0.0]}, costs=dear), budgets=0.1, joint=0.1
    )
    assert (len(found.table), found.certified) == (0, False)
    assert all(policy.is_full_model for policy in found.policies().values())
    assert "ClassCalibration" in repr(found)


def test_shipped_records_are_served_faster_by_class_than_by_one_threshold():
    runs = riskcal.load_example("g2p")
    words = np.array(["long" if len(word) > 8 else "short" for word in runs.prompts])
    runs = replace(runs, labels={"group": words})
    found = calibrate_classes(runs, budgets={"long": 0.2, "short": 0.05})
    assert found.certified
    single = riskcal.calibrate_groups(runs, delta=0.05)
    assert found.thresholds["long"] < single["long"].threshold
    policy = found.policies()["long"]
    assert policy.measure == "softmax"
    assert policy.certificate.delta == 0.2
    assert policy.certificate.n + found.n["short"] + len(found.pilot) == runs.n
    assert riskcal.verify(policy, runs).differences == ()
    with pytest.raises(RiskcalError, match="runs: none are of class 'short'"):
        riskcal.verify(policy, runs.take(np.flatnonzero(words == "long")))


def test_what_cannot_be_budgeted_is_refused_by_name():
    runs = world(0, {"a": [0.1], "b": [0.1]}, n=40)
    for arguments, message in (
        ({"budgets": {"a": 0.1}}, "budgets: no budget for 'b'"),
        ({"budgets": {"a": 0.1, "b": 0.1, "c": 0.1}}, "budgets: no prompt is of 'c'"),
        ({"budgets": 2.0}, "delta"),
        ({"budgets": 0.1, "joint": -1.0}, "delta"),
        ({"budgets": 0.1, "cost": "joules"}, "cost: 'joules'"),
        ({"budgets": 0.1, "pilot_fraction": 0.001}, "pilot_fraction"),
        ({"budgets": 0.1, "objective": "selective"}, "objective"),
    ):
        with pytest.raises(RiskcalError, match=message):
            calibrate_classes(runs, **arguments)
    with pytest.raises(RiskcalError, match="group: the column was not recorded"):
        calibrate_classes(replace(runs, labels={}), budgets=0.1)
    with pytest.raises(RiskcalError, match="cluster: budgets by class"):
        calibrate_classes(
            replace(runs, labels=dict(runs.labels) | {"cluster": runs.prompts}), budgets=0.1
        )
    with pytest.raises(RiskcalError, match="of the full model was not recorded"):
        calibrate_classes(replace(runs, full={}), budgets=0.1)
    cut = riskcal.Stop(delta=0.1)
    with pytest.raises(RiskcalError, match="the recording stopped where a fixed sequence failed"):
        calibrate_classes(replace(runs, stopped=cut), budgets=0.1)
    rare = replace(runs, labels={"group": np.where(np.arange(40) == 0, "rare", "usual")})
    with pytest.raises(RiskcalError, match="group: 'rare' has"):
        calibrate_classes(rare, budgets=0.1)
    many = books.Pilot(0.1, *(np.zeros(40) for _ in range(4)))
    with pytest.raises(RiskcalError, match="joint: ties 4 classes together"):
        books.path([many] * 4, 0.1, 10, 10)


@pytest.mark.parametrize("name", ["class", "step"])
def test_a_setting_of_the_name_of_a_column_of_the_table_is_refused(name):
    """The table would hold it in place of the order of testing."""
    rows = [
        {
            "prompt": f"p{i}",
            "threshold": t,
            name: s,
            "dissimilarity": 0.0,
            "layers": 8,
            "group": "g",
        }
        for i in range(20)
        for t, s in ((0.2, 1), (0.2, 2), (np.inf, 1))
    ]
    runs = riskcal.Runs.from_frame(pd.DataFrame(rows), candidate_columns=[name])
    with pytest.raises(RiskcalError, match=f"the setting '{name}' has the name of a column"):
        riskcal.calibrate_classes(runs, budgets=0.2, cost="layers")


@pytest.mark.parametrize(("aside", "left"), [(2, 2), (2, 5), (1, 2), (2, 1)])
def test_two_prompts_of_a_class_on_each_side_are_enough_and_one_is_not(aside, left):
    """Which prompts are the pilot depends on their ids alone, so that a class can be put there."""
    n, size = 40, pilot_size(40, 0.2)
    runs = world(5, {"usual": [0.0, 0.1]}, n=n, thresholds=(0.9, 0.5))
    place = np.argsort(
        records.tested_order(runs.prompts)
    )  # of each prompt among those that are tested
    rare = (place < aside) | ((place >= size) & (place < size + left))
    runs = replace(runs, labels={"group": np.where(rare, "rare", "usual")})
    if min(aside, left) < 2:
        with pytest.raises(
            RiskcalError, match=f"'rare' has {aside} prompts in the pilot and {left} to test"
        ):
            calibrate_classes(runs, budgets=0.3)
        return
    found = calibrate_classes(runs, budgets=0.3)
    assert found.n == {"rare": left, "usual": n - size - left}
    assert set(found.pilot) == set(runs.prompts[place < size].tolist())


@pytest.mark.parametrize("joint", [None, 0.3])
def test_what_is_tested_is_chosen_by_the_pilot_alone(joint):
    """The other prompts' losses turned round: were they looked at, other books would be tested, by data that chose them."""
    means = {"code": [0.05, 0.2, 0.4], "news": [0.02, 0.3, 0.6]}
    runs = world(6, means, n=400)
    given = {"budgets": {"code": 0.3, "news": 0.4}, "joint": joint}
    found = calibrate_classes(runs, **given)
    rest = ~np.isin(runs.prompts, found.pilot)
    losses = runs.values["dissimilarity"].copy()
    losses[rest] = 1.0 - losses[rest]
    turned = replace(runs, values={**runs.values, "dissimilarity": losses})
    again = calibrate_classes(turned, **given)
    told = ["class", "step", "threshold", "n"]
    assert again.table[told].equals(found.table[told])
    assert not again.table["pvalue"].equals(found.table["pvalue"])
    assert len(found.table) > 3


def test_costs_by_class_are_means_over_its_prompts_that_were_tested():
    rng = np.random.default_rng(7)
    runs = world(7, {"a": [0.02, 0.1], "b": [0.05, 0.2]}, n=200)
    seconds = rng.random((200, 2)) * [0.8, 0.4]
    runs = replace(runs, values={**runs.values, "seconds": seconds})
    found = calibrate_classes(runs, budgets=0.4)
    rest = ~np.isin(runs.prompts, found.pilot)
    thresholds = runs.thresholds.tolist()
    assert (found.table["threshold"] < 1).any()
    for row in found.table.itertuples(index=False):
        own = rest & (runs.group == row[0])
        full = math.isinf(row.threshold)
        spent = runs.full["seconds"] if full else seconds[:, thresholds.index(row.threshold)]
        assert row.seconds == pytest.approx(spent[own].mean())
    assert found.table.index.tolist() == list(range(len(found.table)))
    chosen = [found.thresholds[name] for name in runs.group]
    own = [
        runs.full["seconds"][i] if math.isinf(t) else seconds[i, thresholds.index(t)]
        for i, t in enumerate(chosen)
    ]
    assert found.costs[0] == pytest.approx(np.array(own)[rest].mean())
    assert found.costs[1] == pytest.approx(runs.full["seconds"][rest].mean())


@pytest.mark.parametrize("joint", [None, 0.3, 0.1])
def test_books_of_two_classes_are_those_of_enumeration(joint):
    rng = np.random.default_rng(0)
    classes = {
        name: (
            (rng.random((n, 3)) < [0.1, 0.3, 0.8]) * rng.choice([0.5, 1.0], (n, 3)),
            costs,
            delta,
        )
        for name, n, costs, delta in (
            ("a", 12, np.array([3.1, 1.2, 0.4, 4.0]), 0.3),
            ("b", 20, np.array([2.7, 1.9, 0.8, 4.0]), 0.5),
        )
    }
    classes["b"][0][:, 2] = 1.0  # no spread, and above its budget
    told = [
        books.of_class(losses, costs, delta, 1.0, share=len(losses) / 32, n_rest=7)
        for losses, costs, delta in classes.values()
    ]
    found = [tuple(one) for one in books.path(told, joint, 32, 14).tolist()]
    every = {b: one for b, one in enumerated(classes, joint, 7).items() if one[0] > -math.inf}
    front = [
        book
        for book, (worst, cost) in every.items()
        if not any(w <= worst and c <= cost and (w, c) != (worst, cost) for w, c in every.values())
    ]
    assert found == sorted(front, key=lambda book: every[book][0])
    for one, (losses, _, delta) in zip(told, classes.values(), strict=True):
        whole = np.vstack([losses, np.ones(3)])
        assert one.loss == pytest.approx(np.r_[whole.mean(0), 0.0])
        assert one.square == pytest.approx(np.r_[(whole**2).mean(0), 0.0])
        spread = [excess_of([(x, 1 / len(c)) for x in c], delta, len(losses), 7) for c in whole.T]
        assert one.excess == pytest.approx([*spread, -math.inf])
    assert told[1].excess[2] == math.inf


def test_a_class_is_certified_at_a_twentieth_in_one_sequence_unless_it_is_asked_for_otherwise():
    found = calibrate_classes(world(3, {"a": [0.0, 0.1], "b": [0.1, 0.2]}), budgets=0.3)
    assert found.epsilon == 0.05
    for policy in found.policies().values():
        assert (policy.certificate.starts, policy.certificate.epsilon_spent) == (1, 0.025)
