"""Tests and procedures are objects with their own options; their names are accepted wherever they are."""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest

from riskcal import (
    RiskcalError,
    Runs,
    bounds,
    calibrate,
    compare,
    fwer,
    load_example,
    monotone,
    pvalues,
    run_trials,
)
from riskcal.calibration.posing import pose
from riskcal.fwer import procedures
from riskcal.pvalues.methods import BY_BOUND, inverted
from riskcal.trials import deciding, run

K = 5
OPTIONS = {
    "fixed_sequence": {"starts": 2},
    "fallback": {"weights": [0.6, 0.1, 0.1, 0.1, 0.1]},
    "graphical": {"transitions": np.eye(K, k=1)},
    "pilot_order": {"pilot_fraction": 0.2},
    "pareto": {"pilot_fraction": 0.2},
}


def losses():
    rng = np.random.default_rng(3)
    return (rng.random((400, 1)) < np.linspace(0.02, 0.15, K)) * rng.random((400, 1))


GRID = np.linspace(0.9, 0.1, K)


@pytest.mark.parametrize("name", fwer.BY_NAME)
@pytest.mark.parametrize("given", [True, False])
def test_a_name_with_options_is_the_object(name, given):
    options = OPTIONS.get(name, {}) if given or name == "graphical" else {}
    known = {"thresholds": GRID, "delta": 0.06}
    by_name = calibrate(losses(), procedure=name, **options, **known)
    by_object = calibrate(losses(), procedure=fwer.BY_NAME[name](**options), **known)
    pd.testing.assert_frame_equal(by_name.table, by_object.table)
    assert by_name.policy() == by_object.policy()
    assert by_name.message == by_object.message
    assert by_object.procedure == name


@pytest.mark.parametrize("name", [n for n in pvalues.BY_NAME if n != "binomial"])
def test_a_test_by_name_is_the_object(name):
    known = {"thresholds": GRID, "delta": 0.06}
    by_name = calibrate(losses(), test=name, **known)
    by_object = calibrate(losses(), test=pvalues.BY_NAME[name], **known)
    pd.testing.assert_frame_equal(by_name.table, by_object.table)
    assert by_object.test == name


@dataclass(frozen=True)
class Mine(pvalues.Method):
    """Hoeffding's test, with what a test of one's own must have and no more."""

    name: ClassVar[str] = "mine"

    def pvalues(self, losses, delta, *, level, lower, upper):
        return np.atleast_1d(pvalues.hoeffding(losses, delta, lower=lower, upper=upper))


@dataclass(frozen=True)
class Never(Mine):
    """Looks at the rows in their order, as betting does, and rejects nothing."""

    name: ClassVar[str] = "never"
    walks: ClassVar[bool] = True

    def pvalues(self, losses, delta, *, level, lower, upper):
        return np.ones(losses.shape[1])


@dataclass(frozen=True)
class Bolder(pvalues.Betting):
    """Of betting's kind, but another test: what is known of betting does not hold for it."""

    name: ClassVar[str] = "bolder"

    def pvalues(self, losses, delta, *, level, lower, upper):
        return np.ones(losses.shape[1])


def test_a_test_of_ones_own_is_of_use_wherever_one_by_name_is():
    known = {"thresholds": GRID}
    mine, theirs = (calibrate(losses(), test=t, delta=0.1, **known) for t in (Mine(), "hoeffding"))
    pd.testing.assert_frame_equal(mine.table, theirs.table)
    few = losses()[:60]
    mine, theirs = (calibrate(few, test=t, delta=0.1, **known) for t in (Mine(), "hoeffding"))
    sizes = [int(re.search(r"about (\d+) rows", one.message)[1]) for one in (mine, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)  # of 250 draws at the least each
    lists = [calibrate(losses(), test=t, delta=[0.08, 0.1], **known) for t in (Mine(), "hoeffding")]
    for one, other in zip(*lists, strict=True):
        assert one.table["certified"].tolist() == other.table["certified"].tolist()
    found, exact = (bounds.simultaneous(losses(), method=m) for m in (Mine(), "hoeffding"))
    assert (found >= exact).all()
    assert found == pytest.approx(exact, abs=0.005)
    grid = [0.07, 0.1, 0.2]
    coarse = bounds.simultaneous(losses(), method=Mine(), grid=grid)
    assert coarse.tolist() == [min(p for p in [*grid, 1.0] if p >= bound) for bound in exact]
    np.testing.assert_array_equal(
        *(
            monotone.rcps(np.maximum.accumulate(losses(), 1), GRID, 0.1, bound=m)
            for m in (Mine(), "hoeffding")
        )
    )
    runs = load_example("g2p")
    pd.testing.assert_frame_equal(
        *(run_trials(runs, [0.1], n_trials=3, test=t) for t in (Mine(), "hoeffding"))
    )


@dataclass(frozen=True)
class Own(pvalues.Hoeffding):
    """Hoeffding's under another name."""

    name: ClassVar[str] = "own"


@dataclass(frozen=True)
class Coin(pvalues.Binomial):
    name: ClassVar[str] = "coin"


@dataclass(frozen=True)
class Shyer(pvalues.Hoeffding):
    """Of Hoeffding's kind, but another test."""

    name: ClassVar[str] = "shyer"

    def pvalues(self, losses, delta, *, level, lower, upper):
        return np.ones(losses.shape[1])


@pytest.mark.parametrize(("own", "theirs"), [(Own(), "hoeffding"), (Coin(), "binomial")])
def test_a_test_that_comes_of_one_of_riskcals_is_that_one(own, theirs):
    wrong = np.rint(losses())
    for rows in (wrong, wrong[:25]):
        one, other = (calibrate(rows, test=t, thresholds=GRID, delta=0.1) for t in (own, theirs))
        pd.testing.assert_frame_equal(one.table, other.table)
        assert one.message == other.message
    runs = Runs.from_arrays(thresholds=GRID, dissimilarity=wrong)
    pd.testing.assert_frame_equal(
        *(run_trials(runs, [0.05, 0.1], n_trials=3, test=t) for t in (own, theirs))
    )


def test_trials_ask_a_test_of_ones_own_for_its_p_values():
    runs = load_example("g2p")
    assert calibrate(runs, delta=0.1, test="hoeffding").certified
    assert not calibrate(runs, delta=0.1, test=Shyer()).certified
    assert not run_trials(runs, [0.1], n_trials=3, test=Shyer())["certified"].any()


def test_a_report_tells_of_a_test_of_ones_own_what_can_be_told(tmp_path):
    found = calibrate(losses(), test=Mine(), thresholds=GRID, delta=0.1)
    found.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "There is no slider here: &#x27;mine&#x27; is known here by its name alone." in page


@pytest.mark.parametrize("test", [Never(), Bolder()])
def test_a_test_of_ones_own_is_not_betting_wherever_it_looks_at_rows_in_their_order(test):
    runs = load_example("g2p")
    assert not calibrate(runs, delta=0.1, test=test).certified
    assert not run_trials(runs, [0.1], n_trials=3, test=test)["certified"].any()
    assert not calibrate(runs, delta=[0.1], test=test)[0].certified
    assert (bounds.simultaneous(losses(), method=test, grid=[0.5]) == 1.0).all()


def test_the_bound_of_a_test_that_is_only_for_that_has_a_message_too():
    test = BY_BOUND["predictable_bernstein"]
    found = calibrate(np.full((20, 1), 0.09), test=test, thresholds=[0.5], delta=0.1)
    assert re.search(r"a fresh sample of about \d+ rows", found.message)


def test_a_test_that_bears_anothers_name_is_refused_and_with_a_name_of_its_own_is_not():
    @dataclass(frozen=True)
    class Lax(Mine):
        name: ClassVar[str] = "betting"

    with pytest.raises(RiskcalError, match="test: Lax bears the name of another test, 'betting'"):
        calibrate(losses(), test=Lax(), thresholds=GRID, delta=0.1)
    Lax.name = "lax"
    assert calibrate(losses(), test=Lax(), thresholds=GRID, delta=0.1).test == "lax"


@pytest.mark.parametrize("name", bounds.METHODS)
def test_a_bound_by_name_is_the_test_that_it_inverts(name):
    falling = np.round(losses()) if name == "clopper_pearson" else losses()
    falling = np.maximum.accumulate(falling, axis=1)
    method = inverted(name, "method")
    assert method.bound == name
    for call in (
        functools.partial(bounds.simultaneous, falling, epsilon=0.1),
        functools.partial(monotone.rcps, falling, GRID, 0.12, 0.1),
    ):
        option = "method" if call.func is bounds.simultaneous else "bound"
        by_name, by_object = call(**{option: name}), call(**{option: method})
        np.testing.assert_array_equal(by_name, by_object)
    assert np.isfinite(by_name)


@pytest.mark.parametrize("name", fwer.BY_NAME)
def test_what_certifies_first_is_what_the_procedure_rejects_alone(name):
    """One p-value at what `begins` says, all others 1: rejected; a little above it: not."""
    procedure = procedures.named(name, **OPTIONS.get(name, {}))
    begins = procedure.begins(0.05, K)
    for j in range(K):
        p = np.ones(K)
        p[j] = begins[j] if begins[j] > 0 else 0.04
        first = j == 0 or name not in ("pilot_order", "pareto")  # a pilot puts any candidate first
        assert procedure.rejected(p, 0.05)[j] == (begins[j] > 0 and first)
        p[j] = begins[j] * 1.001 + 1e-9
        assert not procedure.rejected(p, 0.05).any()
    assert (procedure.levels(0.05, K) >= begins - 1e-15).all()


def test_options_beside_an_object_or_for_another_procedure_are_refused():
    known = {"thresholds": GRID, "delta": 0.06}
    with pytest.raises(RiskcalError, match=r"starts: procedure 'holm' carries its own options"):
        calibrate(losses(), procedure=fwer.Holm(), starts=2, **known)
    with pytest.raises(RiskcalError, match=r"weights: procedure 'holm' does not use it, only fall"):
        calibrate(losses(), procedure="holm", weights=[1, 0, 0, 0, 0], **known)
    with pytest.raises(RiskcalError, match="starts"):
        fwer.FixedSequence(starts=0)
    with pytest.raises(RiskcalError, match="pilot_fraction"):
        fwer.Pareto(pilot_fraction=1.5)
    with pytest.raises(RiskcalError, match="transitions"):
        fwer.Graphical()
    with pytest.raises(TypeError, match="strats"):
        calibrate(losses(), strats=2, **known)


def test_trials_and_comparisons_take_objects():
    runs = load_example("g2p")
    three = {"n_trials": 3}
    by_name = run_trials(runs, [0.1], procedure="fixed_sequence", starts=3, **three)
    by_object = run_trials(runs, [0.1], procedure=fwer.FixedSequence(starts=3), **three)
    pd.testing.assert_frame_equal(by_name, by_object)
    table = compare(
        runs,
        [0.1],
        tests=[pvalues.ConvexOrder()],
        procedures=[fwer.FixedSequence(starts=3), "holm"],
    )
    assert table["procedure"].tolist() == ["fixed_sequence", "holm"]
    assert table["test"].tolist() == ["convex_order"] * 2


def test_trials_of_numbered_rows_of_two_values_never_certify_what_the_count_does_not():
    """Betting alone would in some of these splits: sorting numbered rows by outcome must not help in trials either."""
    rng = np.random.default_rng(1)
    binary = (rng.random((40, 1)) < [0.12, 0.18, 0.3]).astype(float)
    numbered = Runs.from_arrays(thresholds=[0.9, 0.6, 0.3], dissimilarity=np.sort(binary, axis=0))
    given = {"deltas": 0.3, "n_trials": 200, "calibration_fraction": 0.8}
    table = run_trials(numbered, **given)
    exact = run_trials(numbered, **given, test="binomial")
    assert (table["threshold"] >= exact["threshold"]).all()
    problem = pose(numbered, 0.3)
    heldout = run.splits(40, 200, 0.8, 0)
    alone = deciding._decide_by_walking(problem, [0.3], heldout, 0.05)[0]
    bounded = deciding.decide(
        problem, [0.3], heldout, pvalues.Betting(), fwer.FixedSequence(), 0.05, None
    )[0]
    assert (alone > bounded).any()
    assert (bounded <= alone).all()
