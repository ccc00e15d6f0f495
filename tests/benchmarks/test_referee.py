"""The referee knows the truth of its cases, judges by it, and says of each method why it does not take a case."""

import json
import math

import numpy as np
import pytest

import referee
from helpers import allowed
from laboratory import published, refereed
from riskcal import pvalues

CASES = {case.name: case for case in refereed.cases()}
SOME = ("coins, few", "clusters", "heads", "nothing to find")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What ``--quick`` writes of some cases."""
    path = tmp_path_factory.mktemp("referee") / "referee.json"
    options = [word for name in SOME for word in ("--case", name)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["referee.py", "--quick", "--json", str(path), *options])
        referee.main()
    return json.loads(path.read_text())


def of(figures, case, method):
    return next(r for r in figures["rows"] if r["case"] == case and r["method"] == method)


@pytest.mark.parametrize("name", ["coins, few", "clusters", "sorted rows", "cascade"])
def test_the_stated_risk_is_the_mean_of_many_samples(name):
    """Standard errors over independent samples, so that what rows share is counted."""
    case, rng = CASES[name], np.random.default_rng(1)
    means = np.array([case.sample(rng).losses.mean(0) for _ in range(200)])
    error = means.std(axis=0, ddof=1) / math.sqrt(len(means))
    assert (np.abs(means.mean(0) - case.risk) <= 4 * error + 1e-9).all()


def test_what_a_cascade_saves_is_what_its_requests_paid_less():
    case = CASES["cascade"]
    sample = case.sample(np.random.default_rng(2))
    error = sample.costs.std(axis=0) / math.sqrt(case.n) / 20
    assert (np.abs(1 - sample.costs.mean(0) / 20 - case.saving) <= 4 * error).all()


def test_ids_come_with_prompts_and_paragraphs_and_not_with_sorted_rows():
    rng = np.random.default_rng(3)
    assert len(np.unique(CASES["coins, few"].sample(rng).prompts)) == 50
    assert (
        np.bincount(
            np.unique(CASES["clusters"].sample(rng).prompts, return_inverse=True)[1]
        ).tolist()
        == [10] * 60
    )
    sample = CASES["sorted rows"].sample(rng)
    assert sample.prompts is None
    assert (np.diff(sample.losses.sum(1)) >= 0).all()


def test_a_verdict_counts_false_certificates_and_caps_what_they_save():
    case = CASES["coins, few"]
    good = case.risk <= case.delta
    assert good.sum() == 9
    assert case.judge(np.zeros(case.risk.size, dtype=bool)) == (False, 0.0, 0.0, 0.0)
    assert case.judge(good) == (False, 1.0, 1.0, pytest.approx(0.09))
    everything = case.judge(np.ones(case.risk.size, dtype=bool))
    assert everything == (True, 1.0, 1.0, pytest.approx(0.2))
    assert np.isnan(CASES["nothing to find"].judge(np.zeros(6, dtype=bool)).saving)


def test_heads_are_judged_in_the_cascade():
    case = CASES["related heads"]
    assert case.judge(np.full(4, np.inf)) == (False, 0.0, 0.0, 0.0)
    assert case.judge(np.zeros(4)).wrong
    first = np.r_[0.9, np.inf, np.inf, np.inf]
    stops = case.confidence[:, 0] >= 0.9
    verdict = case.judge(first)
    assert verdict.risk == pytest.approx(1 - case.right[stops, 0].mean())
    assert verdict.saving == pytest.approx(stops.mean() * 4 / 5 / case.best)


def test_every_method_has_a_row_or_a_reason_in_every_case(figures):
    names = [method.name for method in referee.methods()]
    assert len(set(names)) == len(names)
    assert [case["case"] for case in figures["cases"]] == list(SOME)
    for case in figures["cases"]:
        rows = [r for r in figures["rows"] if r["case"] == case["case"]]
        assert sorted(r["method"] for r in rows) == sorted(names)
        for row in rows:
            assert row.get("refused") or row["draws"] == referee.QUICK
    assert "riskcal, binomial" in referee.printed(figures)


def test_riskcal_keeps_its_word_where_habits_do_not(figures):
    """So few draws tell only what is gross; the committed table has 1,000."""
    for case in figures["cases"]:
        assert of(figures, case["case"], "riskcal")["violations"] <= allowed(0.05, referee.QUICK)
    assert (
        of(figures, "nothing to find", "the cheapest whose mean is at most delta")["violations"]
        > 0.5
    )
    assert of(figures, "heads", "Valade: observed agreement")["violations"] > 0.5
    assert of(figures, "nothing to find", "riskcal")["saving"] is None
    assert of(figures, "clusters", "riskcal")["power"] > 0.2


def test_a_package_that_is_absent_is_said_to_be(monkeypatch):
    monkeypatch.setattr(published, "versions", lambda: dict.fromkeys(published.PEERS))
    rows = referee.referee(2, ["small variance"])["rows"]
    for row in rows:
        if row["source"] == "package":
            assert "refused" in row
    assert {r.get("refused") for r in rows} >= {"not installed", "for losses of 0 or 1"}


def test_the_published_test_is_the_one_of_riskcal_but_for_its_rounding():
    losses = (np.arange(200)[:, None] < np.arange(0, 40)) * 1.0
    theirs = published.hoeffding_bentkus(losses.mean(0), 200, 0.15)
    ours = pvalues.hoeffding_bentkus(losses, 0.15)
    assert (theirs >= ours * (1 - 1e-9)).all()
    assert np.isclose(theirs, ours).mean() > 0.8


def test_the_finder_mistakes_thresholds_for_prompts():
    """The same ten losses of 0 under more columns: more of them are no more evidence."""
    few, many = np.zeros((10, 5)), np.zeros((10, 500))
    assert not published.number_of_thresholds(few, 0.1, 0.05).any()
    assert published.number_of_thresholds(many, 0.1, 0.05).all()
    assert 0.9**10 > 0.05


@pytest.mark.parametrize("rule", ["adaptive_bets", "pareto_testing"])
def test_rules_that_were_written_down_from_papers_keep_their_level(rule):
    """1,000 draws at a mean of delta; what fails in a case is then the case's fault, not the writing's."""
    rng, draws, n = np.random.default_rng(4), 1000, 100
    losses = (rng.random((n, draws)) < 0.1) * 1.0
    if rule == "adaptive_bets":
        wrong = published.adaptive_bets(losses, 0.1, 0.1) <= 0.1
    else:
        parts = (losses.reshape(n, draws // 4, 4)[:, i] for i in range(draws // 4))
        wrong = np.array(
            [
                published.pareto_testing(part, np.tile(np.arange(4.0), (n, 1)), 0.1, 0.1).any()
                for part in parts
            ]
        )
    assert wrong.mean() <= allowed(0.1, len(wrong))
