import json
import math

import numpy as np
import pytest

from helpers import rows_to_certify
from riskcal import pvalues, records
from riskcal._validate import RiskcalError
from riskcal.adaptive import AdaptiveCalibration
from riskcal.policy import ExitPolicy

BETS = pytest.mark.parametrize("bets", ["combined", "mixture", "hedged"])
THRESHOLDS = [0.2, 0.8, 0.5]  # in no order


def draw(n, means=(0.2, 0.01, 0.05), seed=0):
    """Losses (n, k): 0, or Beta(2, 3) with the probability that gives the mean; comonotone."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, 1)) < np.array(means) / 0.4, rng.beta(2, 3, (n, 1)), 0.0)


def start(n=400, **arguments):
    return AdaptiveCalibration(range(n), THRESHOLDS, **({"delta": 0.1} | arguments))


def feed(calibration, losses, prompts=10**9):
    """Losses by prompt id, until done or that many prompts."""
    for prompt in calibration:
        calibration.update(prompt, losses[prompt])
        if calibration.prompts_used >= prompts:
            break
    return calibration


# the capital


def test_mixture_by_definition():
    losses, delta = draw(300)[:, 2], 0.1
    capital = np.cumprod(
        1 + np.array([[0.1, 0.2, 0.45, 0.95]]) / (1 - delta) * (delta - losses[:, None]), axis=0
    ).mean(1)
    expected = np.flatnonzero(capital >= 20)[0] + 1
    assert rows_to_certify(losses, delta, level=0.05, bets="mixture").tolist() == [expected]


@pytest.mark.parametrize("lower", [0.0, -1.0])
def test_hedged_agrees_with_the_betting_pvalue(lower):
    rng = np.random.default_rng(5)
    means = rng.uniform(0.05, 0.12, 400)
    losses = np.where(rng.random((500, 400)) < means / 0.4, rng.beta(2, 3, (500, 400)), 0.0)
    losses = np.where(losses == 0.0, rng.choice([0.0, lower], losses.shape, p=[0.98, 0.02]), losses)
    certified = rows_to_certify(losses, 0.1, level=0.05, bets="hedged", lower=lower) > 0
    fixed = pvalues.betting(losses, 0.1, level=0.05, lower=lower) <= 0.05
    assert 0.3 < fixed.mean() < 0.7
    assert (certified == fixed).mean() > 0.95  # the p-value's bets are renewed less often


@BETS
def test_scale_and_shift_change_nothing(bets):
    losses = draw(500)
    # a range below zero: a range that straddles it would make the hedger assume ties
    shifted = rows_to_certify(
        4 * losses - 5, 4 * 0.1 - 5, level=0.05, bets=bets, lower=-5, upper=-1
    )
    assert rows_to_certify(losses, 0.1, level=0.05, bets=bets).tolist() == shifted.tolist()


@BETS
@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_long_runs_neither_overflow_nor_underflow(bets, loss):
    rows = rows_to_certify(np.full(5_000, loss), 0.5, level=0.05, bets=bets)
    assert (rows > 0).tolist() == [loss == 0.0]
    worst_then_best = np.r_[np.ones(300), np.zeros(5_000)]
    assert rows_to_certify(worst_then_best, 0.5, level=0.05, bets=bets)[0] > 300


def test_the_horizon_steers_the_hedger_only():
    losses = draw(300)[:, 2]
    near, far = (
        rows_to_certify(losses, 0.1, level=0.05, bets="hedged", n_max=n)[0] for n in (300, 3000)
    )
    assert 0 < near < far or far == 0
    mixed = [
        rows_to_certify(losses, 0.1, level=0.05, bets="mixture", n_max=n).tolist()
        for n in (300, 3000)
    ]
    assert mixed[0] == mixed[1]


# the class


@BETS
def test_class_agrees_with_the_arrays(bets):
    n = 400
    losses = draw(n)
    ordered = losses[records.tested_order(range(n))]
    rows = rows_to_certify(ordered, 0.1, level=0.05, bets=bets)
    calibration = feed(start(n, bets=bets), losses)
    table = calibration.table
    assert table["threshold"].tolist() == [0.8, 0.5, 0.2]
    assert table["certified"].tolist() == [True, True, False]
    assert table["n"].tolist() == [rows[1], rows[2], n]
    assert table["loss"].tolist() == pytest.approx(
        [ordered[: rows[1], 1].mean(), ordered[: rows[2], 2].mean(), losses[:, 0].mean()]
    )
    assert (calibration.certified, calibration.threshold, calibration.done) == (True, 0.5, True)
    assert calibration.prompts_used == n
    at_target = feed(start(n, bets=bets, target=0.5), losses)
    assert at_target.prompts_used == max(rows[1:]) == n - at_target.prompts_saved


def test_order_of_thresholds_is_the_users_and_tests_go_from_the_highest():
    # the highest threshold is bad: nothing may be certified
    losses = draw(400, means=(0.01, 0.2, 0.01))
    calibration = feed(start(), losses)
    assert not calibration.certified
    assert calibration.threshold == math.inf
    assert calibration.needed.tolist() == [False, True, False]
    assert "Nothing was certified at delta 0.1 after 400 of 400 prompts" in calibration.message
    policy = calibration.policy()
    assert policy.is_full_model
    assert policy.certificate.pvalue is None


def test_order_of_prompts_is_dictated():
    ids = [f"prompt {i}" for i in range(50)]
    calibration = AdaptiveCalibration(ids, [0.5], delta=0.1)
    expected = [ids[i] for i in records.tested_order(ids)]
    asked = []
    for prompt in calibration:
        assert calibration.next_prompt() == prompt
        asked.append(prompt)
        calibration.update(prompt, [0.5])
    assert asked == expected
    assert AdaptiveCalibration(ids[::-1], [0.5], delta=0.1).prompts == expected
    assert AdaptiveCalibration(ids, [0.5], delta=0.1, n_max=20).prompts == expected[:20]


def test_candidates_that_arrived_need_not_be_run():
    losses = draw(400)
    calibration, lazy = start(), start()
    for prompt in calibration:
        calibration.update(prompt, losses[prompt])
        lazy.update(prompt, np.where(lazy.needed, losses[prompt], math.nan))
    assert lazy.to_json() == calibration.to_json()
    assert lazy.needed.tolist() == [True, False, False]


def test_done_when_all_are_certified():
    calibration = feed(start(), np.zeros((400, 3)))
    assert calibration.done
    assert calibration.threshold == 0.2
    assert 40 < calibration.prompts_used < 80
    with pytest.raises(RiskcalError, match=r"no further prompt is needed\. Certified after"):
        calibration.next_prompt()
    before = calibration.to_json()
    with pytest.raises(RiskcalError, match="no further prompt"):
        calibration.update(calibration.prompts[calibration.prompts_used], [0, 0, 0])
    assert calibration.to_json() == before


@BETS
@pytest.mark.parametrize("stop", [0, 1, 57, 399])
def test_json_resumes_exactly(bets, stop):
    losses = draw(400)
    interrupted = start(bets=bets, lower=-0.5, objective="risk", attempt=2, target=0.2)
    if stop:
        feed(interrupted, losses, stop)
    text = interrupted.to_json()
    resumed = AdaptiveCalibration.from_json(text)
    assert resumed.to_json() == text
    whole = feed(start(bets=bets, lower=-0.5, objective="risk", attempt=2, target=0.2), losses)
    assert feed(resumed, losses).to_json() == whole.to_json()
    assert resumed.policy() == whole.policy()


@BETS
@pytest.mark.parametrize("stop", [0, 57, 200])
def test_a_state_of_before_sums_were_kept_resumes_to_the_same(bets, stop):
    """Also where a threshold that is certified already has no losses for the later rows."""
    losses, arguments = draw(400), {"bets": bets, "lower": -0.5, "objective": "risk"}
    interrupted = start(**arguments)
    if stop:
        feed(interrupted, losses, stop)
    kept = json.loads(interrupted.to_json())
    old = AdaptiveCalibration.from_json(json.dumps({k: v for k, v in kept.items() if k != "total"}))
    again = json.loads(old.to_json())
    assert again.pop("total") == pytest.approx(kept.pop("total"))
    assert again == kept
    whole = feed(start(**arguments), losses)
    feed(old, losses)
    assert (old.threshold, old.prompts_used) == (whole.threshold, whole.prompts_used)
    assert old.certified == whole.certified


def test_json_of_string_ids():
    calibration = AdaptiveCalibration(["a", "b", "7"], [0.5], delta=0.1)
    assert AdaptiveCalibration.from_json(calibration.to_json()).prompts == calibration.prompts


def test_policy_carries_the_certificate(tmp_path):
    calibration = feed(start(objective="textual", attempt=1), draw(400))
    policy = calibration.policy(measure="state", min_layer=2)
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy
    assert (policy.threshold, policy.measure, policy.min_layer) == (0.5, "state", 2)
    certificate = policy.certificate
    assert certificate.epsilon_spent == pytest.approx(0.05 * 6 / math.pi**2)
    assert certificate.pvalue <= certificate.epsilon_spent
    assert (certificate.n, certificate.k, certificate.objective) == (400, 3, "textual")
    assert certificate.test == "adaptive betting, combined, n_max 400"
    other = feed(start(objective="textual", attempt=1), draw(400, seed=1)).policy()
    assert other.certificate.records_digest != certificate.records_digest


def test_attempts_spend_less():
    losses = draw(400)
    used = [
        feed(start(target=0.5, attempt=attempt), losses).prompts_used for attempt in (None, 1, 3)
    ]
    assert used[0] < used[1] < used[2]


def test_it_says_how_it_stands():
    calibration = start()
    assert "Nothing certified yet after 0 of 400 prompts." in repr(calibration)
    feed(calibration, draw(400))
    assert "Certified after 400 of 400 prompts: with probability at least 0.95" in repr(calibration)
    assert "expected loss at threshold 0.5 is at most 0.1" in calibration._repr_html_()
    assert "<table" in calibration._repr_html_()


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 0.0}, "delta: 0 is not"),
        ({"delta": math.nan}, "delta: is NaN"),
        ({"delta": -0.5, "lower": -0.2}, "delta: -0.5"),
        ({"epsilon": 1.0}, "epsilon: 1"),
        ({"bets": "kelly"}, "bets: 'kelly' is unknown"),
        ({"n_max": 401}, "n_max: 401 exceeds the 400 prompts"),
        ({"n_max": 1}, "n_max: 1 is not"),
        ({"attempt": 0}, "attempt: 0"),
        ({"objective": "speed"}, "objective: 'speed'"),
        ({"target": math.nan}, "target: is NaN"),
        ({"thresholds": [0.5, 0.5]}, "thresholds: 0.5 is given more than once"),
        ({"thresholds": [0.5, math.inf]}, "thresholds: inf at index 1"),
        ({"thresholds": [math.nan]}, "thresholds: nan at index 0"),
        ({"prompts": [3, 4, 3]}, "prompts: 3 stands twice, again at index 2"),
        ({"prompts": ["a"]}, "prompts: 1 given"),
        ({"prompts": [0.5, 1.5]}, "prompts: 0.5 at row 0"),
        ({"prompts": ["a", 1]}, "prompts: 1 at row 1"),
        ({"prompts": ["a", None]}, "prompts: missing at row 1"),
    ],
)
def test_arguments_are_checked(arguments, message):
    given = {"prompts": range(400), "thresholds": THRESHOLDS, "delta": 0.1} | arguments
    with pytest.raises(RiskcalError, match=message):
        AdaptiveCalibration(given.pop("prompts"), given.pop("thresholds"), **given)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([0.1, math.nan, 0.1], "losses: nan at index 1"),
        ([0.1, 0.1, -0.1], r"losses: -0.1 at index 2 is outside \[0, 1\]"),
        ([0.1, 0.1], r"losses: has shape \(2,\); give \(3,\)"),
        ([[0.1, 0.1, 0.1]], r"losses: has shape \(1, 3\)"),
        (["a", 0, 0], "losses: not an array of numbers"),
        (0.5, r"losses: has shape \(\)"),
        (["0.1", "0.1", "0.1"], "losses: not an array of numbers"),
        (np.ma.masked_greater([0.1, 0.2, 0.1], 0.15), "losses: masked at index 1"),
    ],
)
def test_a_refused_update_changes_nothing(losses, message):
    calibration = feed(start(), draw(400), 20)
    before = calibration.to_json()
    with pytest.raises(RiskcalError, match=message):
        calibration.update(calibration.next_prompt(), losses)
    assert calibration.to_json() == before


def test_another_prompt_is_refused():
    calibration = feed(start(), draw(400), 20)
    before, turn = calibration.to_json(), calibration.next_prompt()
    for wrong in (turn + 1, str(turn), calibration.prompts[0], None, -1):
        with pytest.raises(RiskcalError, match=f"it is {turn}'s turn"):
            calibration.update(wrong, [0, 0, 0])
    assert calibration.to_json() == before
    assert calibration.update(np.int64(turn), [0, 0, 0]).prompts_used == 21


def test_a_prompt_without_an_answer_is_noticed():
    with pytest.raises(RiskcalError, match="no losses were handed in for"):
        list(start())


def test_no_policy_from_less_than_two_prompts():
    with pytest.raises(RiskcalError, match="only 1 handed in"):
        feed(start(), draw(400), 1).policy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra: is not a field"),
        ({"schema_version": 2}, "schema_version"),
        ({"kind": "riskcal.RiskMonitor"}, "kind"),
        ({"used": 401}, "used: more prompts"),
        ({"used": 3}, "used: more prompts"),
        ({"best": [0.0]}, r"best: does not have shape \(3,\)"),
        ({"best": [-1.0] * 3}, "best.0"),
        ({"accounts": [[0.0] * 3] * 4}, r"accounts: does not have shape \(5, 3\)"),
        ({"accounts": [[0.0] * 2] * 5}, r"accounts: does not have shape \(5, 3\)"),
        ({"accounts": [[math.nan] * 3] * 5}, "accounts.0.0"),
        ({"spread": [0.0] * 3}, "spread.0"),
        ({"prompts": list(range(400))}, "prompts: they do not stand in tested order"),
        ({"parameters": {}}, "parameters.thresholds"),
        ({"digest": "x"}, "digest"),
    ],
)
def test_states_are_checked(change, message):
    fields = json.loads(feed(start(), draw(400), 20).to_json())
    with pytest.raises(RiskcalError, match=f"^state: {message}|^{message}"):
        AdaptiveCalibration.from_json(json.dumps(fields | change))


@pytest.mark.parametrize("text", ["", "{", "[]", b"\xff"])
def test_what_is_no_state_is_refused(text):
    with pytest.raises(RiskcalError, match=r"^state: "):
        AdaptiveCalibration.from_json(text)


@pytest.mark.parametrize(
    "name", ["threshold", "thresholds", "learned", "coordinates", "certificate"]
)
def test_what_was_calibrated_is_not_overridden(name):
    calibration = AdaptiveCalibration(range(50), [0.5], delta=0.5)
    for prompt in calibration:
        calibration.update(prompt, [0.0])
    with pytest.raises(RiskcalError, match=f"{name}: is what was calibrated"):
        calibration.policy(**{name: 0.1})


def test_where_too_few_prompts_were_given_the_message_advises_more_which_help():
    """Losses of 0 need no higher thresholds: a longer list of fresh prompts does it, as the message says."""
    short, long = start(5), start(60)
    for calibration in (short, long):
        feed(calibration, np.zeros((60, 3)))
    assert not short.certified
    assert "a longer list of fresh prompts" in short.message
    assert "is not covered by this epsilon" in short.message
    assert long.certified


def test_a_threshold_is_told_to_as_many_digits_as_it_has():
    calibration = AdaptiveCalibration(range(60), [0.99999999, 0.5], delta=0.1, target=0.99999999)
    for prompt in calibration:
        calibration.update(prompt, [0.0, 1.0])
    assert "at threshold 0.99999999 is at most 0.1" in calibration.message
