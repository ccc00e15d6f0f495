import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from riskcal._validate import RiskcalError
from riskcal.monitor import RiskMonitor

VILLE, DETECTOR = {}, {"average_run_length": 5000.0}
KINDS = pytest.mark.parametrize("kind", [VILLE, DETECTOR], ids=["ville", "e-detector"])


def stream(n, mean=0.1, seed=0):
    return np.random.default_rng(seed).beta(0.3, 0.3 * (1 - mean) / mean, n)


def by_definition(losses, delta, restarts, weights=None):
    """The class's formulas, word by word: the value after every loss (for runs of at least 5000)."""
    bets = np.geomspace(max(0.2 * delta, 2 / 5000 if restarts else 0), 0.5, 6) / delta
    capital = np.zeros(6) if restarts else np.ones(6)
    fresh, values = 1.0, []
    for loss, weight in zip(
        losses, np.ones(len(losses)) if weights is None else weights, strict=True
    ):
        capital = (capital + restarts * fresh) * (1 + bets * weight * (loss - delta))
        fresh = weight
        values.append(capital.mean() + restarts * (fresh - 1))
    return np.array(values)


@KINDS
@pytest.mark.parametrize(("delta", "bad"), [(0.001, 20), (0.1, 60), (0.5, 200), (0.95, 3000)])
def test_evalue_and_alarm_by_definition(kind, delta, bad):
    losses = np.r_[stream(100, delta / 2), np.ones(bad)]
    values = by_definition(losses, delta, restarts=bool(kind))
    monitor = RiskMonitor(delta, **kind)
    for loss, value in zip(losses[:60], values[:60], strict=True):
        assert monitor.update(loss).evalue == pytest.approx(value, rel=1e-9, abs=1e-12)
    monitor.update(losses[60:])
    assert monitor.evalue == pytest.approx(values[-1], rel=1e-9)
    assert monitor.alarm
    assert monitor.alarm_at == np.flatnonzero(values >= monitor.limit)[0] + 1
    assert monitor.limit == (5000.0 if kind else 20.0)
    assert monitor.n == 100 + bad
    assert monitor.mean_loss == pytest.approx(losses.mean())


@KINDS
@pytest.mark.parametrize(
    "losses",
    [[], [0.0, 0.2, 0.6] * 20, np.zeros(30_000)],
    ids=["before the first", "some", "none, for long"],
)
def test_the_picture_says_what_the_sentence_does(kind, losses):
    monitor = RiskMonitor(0.1, **kind).update(losses)
    bets, mean, limit = monitor.plot(Figure().subplots()).lines
    foot = 1e-9 * monitor.limit  # nothing is drawn below it
    assert np.mean(bets.get_ydata()) == pytest.approx(monitor.evalue, rel=1e-6, abs=foot)
    assert mean.get_ydata()[0] == pytest.approx(monitor.evalue, rel=1e-6, abs=foot)
    assert (np.asarray(bets.get_ydata()) >= foot).all()
    assert limit.get_ydata()[0] == monitor.limit


@KINDS
def test_the_alarm_stays(kind):
    monitor = RiskMonitor(0.1, **kind).update(np.ones(30))
    at = monitor.alarm_at
    assert not RiskMonitor(0.1, **kind).update(np.ones(at - 1)).alarm
    monitor.update(np.zeros(10_000))
    assert monitor.evalue < monitor.limit
    assert monitor.alarm
    assert monitor.alarm_at == at


@KINDS
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), saved=st.integers(0, 200))
def test_pieces_and_json_change_no_bit(kind, cuts, saved):
    losses = stream(200, 0.2)
    monitor = RiskMonitor(0.1, sampling_rate=0.25, **kind)
    for piece in np.split(losses[:saved], sorted(c for c in cuts if c < saved)):
        monitor.update(piece)
    text = monitor.to_json()
    restored = RiskMonitor.from_json(text)
    assert restored.to_json() == text
    for loss in losses[saved:]:
        restored.update(float(loss))
    whole = RiskMonitor(0.1, sampling_rate=0.25, **kind).update(losses)
    assert restored.to_json() == whole.to_json()
    assert restored.evalue == whole.evalue


@pytest.mark.parametrize("length", [2, 10, 100, 10_000])
@pytest.mark.parametrize("delta", [1e-6, 0.001, 0.1, 0.9])
def test_perfect_losses_never_drift_to_an_alarm(length, delta):
    assert not RiskMonitor(delta, average_run_length=length).update(np.zeros(100_000)).alarm


@pytest.mark.parametrize(
    "rates",
    [
        1.0,
        np.r_[np.full(20_000, 0.01), np.ones(20_000)],
        np.random.default_rng(1).uniform(0.01, 1, 40_000),
    ],
)
@pytest.mark.parametrize(
    ("delta", "length"), [(0.02, 5000), (0.1, 20), (1e-6, 300), (0.9, 1), (0.3, 1.5)]
)
def test_perfect_losses_never_drift_to_an_alarm_at_any_rates(rates, delta, length):
    monitor = RiskMonitor(delta, average_run_length=length, sampling_rate=0.01).update(
        np.zeros(40_000), rates=rates
    )
    assert not monitor.alarm
    assert monitor.evalue <= max(length / 2, 1 / 3)


@KINDS
@pytest.mark.parametrize("delta", [1e-6, 0.1, 0.999])
@pytest.mark.parametrize("loss", [0.0, 1.0])
def test_a_million_losses_neither_overflow_nor_underflow(kind, delta, loss):
    monitor = RiskMonitor(delta, **kind).update(np.full(1_000_000, loss))
    state = json.loads(monitor.to_json())
    assert np.isfinite(state["growth"]).all()
    assert 0 <= monitor.evalue < math.inf
    assert monitor.alarm == (loss == 1.0)
    restored = RiskMonitor.from_json(monitor.to_json())
    assert restored.update([loss]).to_json() == monitor.update([loss]).to_json()


def test_the_detector_stays_quick_where_ville_does_not():
    good, bad = np.zeros(1_000_000), np.ones(2000)
    detector = RiskMonitor(0.1, **DETECTOR).update(good).update(bad)
    assert detector.alarm_at - len(good) == RiskMonitor(0.1, **DETECTOR).update(bad).alarm_at
    assert not RiskMonitor(0.1).update(good).update(bad).alarm


@KINDS
def test_scale_and_shift_of_losses_change_nothing(kind):
    losses = stream(2000, 0.13)
    unit = RiskMonitor(0.1, **kind).update(losses)
    other = RiskMonitor(-1 + 4 * 0.1, lower=-1, upper=3, **kind).update(-1 + 4 * losses)
    assert other.evalue == pytest.approx(unit.evalue, rel=1e-8)
    assert other.alarm_at == unit.alarm_at
    assert other.mean_loss == pytest.approx(-1 + 4 * unit.mean_loss)


@KINDS
@settings(max_examples=50, deadline=None)
@given(
    losses=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    index=st.integers(0, 29),
    rise=st.floats(0, 1),
)
def test_a_larger_loss_is_more_evidence(kind, losses, index, rise):
    larger = list(losses)
    larger[index % len(losses)] += rise * (1 - larger[index % len(losses)])
    before, after = (RiskMonitor(0.2, **kind).update(x).evalue for x in (losses, larger))
    assert after >= before * (1 - 1e-12)


def test_rates():
    losses = stream(400, 0.2)
    rates = np.where(losses > 0.1, 1.0, 0.2)
    monitor = RiskMonitor(0.1, sampling_rate=0.2).update(losses, rates=rates)
    assert monitor.evalue == pytest.approx(by_definition(losses, 0.1, False, 0.2 / rates)[-1])
    assert monitor.mean_loss == pytest.approx((losses / rates).sum() / (1 / rates).sum())
    assert monitor.requests == pytest.approx((1 / rates).sum())
    constant = RiskMonitor(0.1, sampling_rate=0.2).update(losses)
    assert (
        RiskMonitor(0.1, sampling_rate=0.2).update(losses, rates=0.2).to_json()
        == constant.to_json()
    )
    # a constant rate changes no decision
    assert constant.evalue == RiskMonitor(0.1).update(losses).evalue
    assert constant.requests == 2000


def test_rates_of_the_detector():
    losses = stream(400, 0.15)
    rates = np.where(losses > 0.1, 1.0, 0.2)
    monitor = RiskMonitor(0.1, sampling_rate=0.2, **DETECTOR).update(losses, rates=rates)
    assert monitor.evalue == pytest.approx(by_definition(losses, 0.1, True, 0.2 / rates)[-1])
    constant = RiskMonitor(0.1, sampling_rate=0.2, **DETECTOR).update(losses)
    same = RiskMonitor(0.1, sampling_rate=0.2, **DETECTOR).update(losses, rates=0.2)
    assert same.to_json() == constant.to_json()
    assert constant.evalue == RiskMonitor(0.1, **DETECTOR).update(losses).evalue


@pytest.mark.parametrize("sampled_more", ["hard", "easy"])
def test_the_run_length_is_kept_where_rates_follow_the_losses(sampled_more):
    """At a mean of delta over all requests. 400 streams; the standard error of each mean is about a twentieth of it."""
    rng, length, rate = np.random.default_rng(5), 100.0, 0.1
    requests, seen = [], []
    for _ in range(400):
        hard = rng.random(40_000) < 0.2
        losses = (rng.random(40_000) < np.where(hard, 0.4, 0.025)).astype(float)
        rates = np.where(hard == (sampled_more == "hard"), 1.0, rate)
        taken = np.flatnonzero(rng.random(40_000) < rates)
        monitor = RiskMonitor(0.1, average_run_length=length, sampling_rate=rate).update(
            losses[taken], rates=rates[taken]
        )
        requests.append(taken[monitor.alarm_at - 1] + 1 if monitor.alarm else 40_000)
        seen.append(monitor.alarm_at or taken.size)
    for lengths, promise in ((requests, length / rate), (seen, length)):
        assert np.mean(lengths) >= promise - 3 * np.std(lengths) / math.sqrt(400)


def test_states_of_older_monitors_go_on():
    """Written before restarts had weights, after 200 losses at a constant rate."""
    text = (
        '{"kind":"riskcal.RiskMonitor","schema_version":1,"parameters":{"delta":0.1,"epsilon":0.05,"average_run_length":5000.0,"lower":0.0,"upper":1.0,"sampling_rate":0.25},"n":200,"alarm_at":40,'
        '"growth":[8.879149433418856,12.569277651569257,18.896407564817824,28.27317791996485,39.176122396162675,42.95914706413059],"totals":[48.24693872628411,200.0]}'
    )
    old = RiskMonitor.from_json(text)
    new = RiskMonitor(0.1, sampling_rate=0.25, **DETECTOR).update(stream(200, 0.2))
    assert old.evalue == pytest.approx(new.evalue, rel=1e-12)
    assert (old.n, old.alarm_at) == (200, new.alarm_at)


def test_nothing_and_rounding_are_accepted():
    monitor = RiskMonitor(0.1)
    assert math.isnan(monitor.mean_loss)
    untouched = monitor.to_json()
    for nothing in ([], (), np.zeros(0)):
        assert monitor.update(nothing).to_json() == untouched
    assert (
        monitor.update([1 + 1e-12, -1e-12]).to_json() == RiskMonitor(0.1).update([1, 0]).to_json()
    )


# merging


def test_product_is_the_monitor_that_saw_everything():
    parts = [stream(n, 0.12, seed) for seed, n in enumerate((500, 0, 300, 700))]
    monitors = [RiskMonitor(0.1).update(part) for part in parts]
    merged, whole = RiskMonitor.merge(monitors), RiskMonitor(0.1).update(np.concatenate(parts))
    assert merged.evalue == pytest.approx(whole.evalue, rel=1e-9)
    assert (merged.n, merged.mean_loss) == (1500, pytest.approx(whole.mean_loss))
    more = stream(50, 0.5)
    assert merged.update(more).evalue == pytest.approx(whole.update(more).evalue, rel=1e-9)


def test_mean_and_sum():
    parts = [stream(500, 0.12, seed) for seed in range(3)]
    ville = RiskMonitor.merge([RiskMonitor(0.1).update(part) for part in parts], how="mean")
    assert ville.evalue == pytest.approx(
        np.mean([by_definition(part, 0.1, False)[-1] for part in parts])
    )
    detector = RiskMonitor.merge(
        [RiskMonitor(0.1, average_run_length=1e9).update(part) for part in parts]
    )
    assert detector.evalue == pytest.approx(
        sum(by_definition(part, 0.1, True)[-1] for part in parts)
    )
    fresh = RiskMonitor.merge([RiskMonitor(0.1, **DETECTOR) for _ in range(1000)])
    assert fresh.evalue == 0.0
    assert not fresh.alarm


def test_shards_see_together_what_none_sees_alone():
    losses = [0.0, 0.0, 0.5, 0.0, 0.4] * 10
    shards = [RiskMonitor(0.1).update(losses) for _ in range(12)]
    assert not any(shard.alarm for shard in shards)
    assert RiskMonitor.merge(shards).alarm
    assert not RiskMonitor.merge(shards, how="mean").alarm
    detectors = [RiskMonitor(0.1, average_run_length=1000).update(losses) for _ in range(12)]
    assert not any(detector.alarm for detector in detectors)
    assert RiskMonitor.merge(detectors).alarm


def test_alarms_of_shards():
    loud = [
        RiskMonitor(0.1, **kind).update(np.r_[np.ones(20), np.zeros(3000)])
        for kind in (VILLE, DETECTOR)
    ]
    quiet = [RiskMonitor(0.1, **kind) for kind in (VILLE, DETECTOR)]
    ville, detector = (RiskMonitor.merge(pair) for pair in zip(loud, quiet, strict=True))
    assert loud[0].alarm
    assert not ville.alarm  # the shard's own alarm spent an epsilon of its own
    assert detector.alarm_at == 3020


@pytest.mark.parametrize(
    ("monitors", "how", "message"),
    [
        ([], None, "monitors: none"),
        ([RiskMonitor(0.1), 3], None, "a int at index 1"),
        ([RiskMonitor(0.1)] * 2, None, "stands twice, again at index 1"),
        ([RiskMonitor(0.1), RiskMonitor(0.2)], None, "delta: 0.2 at index 1"),
        ([RiskMonitor(0.1), RiskMonitor(0.1, epsilon=0.1)], None, "epsilon: 0.1 at index 1"),
        (
            [RiskMonitor(0.1), RiskMonitor(0.1, **DETECTOR)],
            None,
            "average_run_length: 5000.0 at index 1",
        ),
        ([RiskMonitor(0.1), RiskMonitor(0.1)], "sum", "how: a sum of capitals"),
        (
            [RiskMonitor(0.1, **DETECTOR), RiskMonitor(0.1, **DETECTOR)],
            "product",
            "how: 'product' is not for e-detectors",
        ),
        (
            [RiskMonitor(0.1, **DETECTOR), RiskMonitor(0.1, **DETECTOR)],
            "mean",
            "how: 'mean' is not for e-detectors",
        ),
        ([RiskMonitor(0.1)], "max", "how: 'max' is unknown"),
    ],
)
def test_merges_that_prove_nothing_are_refused(monitors, how, message):
    with pytest.raises(RiskcalError, match=f"^.*{message}"):
        RiskMonitor.merge(monitors, how=how)


# refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delta": 0.0}, "delta: 0 is not strictly between"),
        ({"delta": 1.0}, "delta: 1 is not strictly between"),
        ({"delta": math.nan}, "delta: is NaN"),
        ({"delta": 0.1, "lower": 0.2}, "delta: 0.1 is not strictly between"),
        ({"delta": 0.1, "lower": 1.0, "upper": 0.0}, "lower, upper"),
        ({"delta": 0.1, "epsilon": 0.0}, "epsilon: 0"),
        ({"delta": 0.1, "average_run_length": 0.5}, "average_run_length: 0.5"),
        ({"delta": 0.1, "average_run_length": math.inf}, "average_run_length: inf"),
        ({"delta": 0.1, "average_run_length": math.nan}, "average_run_length: is NaN"),
        ({"delta": 0.1, "sampling_rate": 0.0}, "sampling_rate: 0 is"),
        ({"delta": 0.1, "sampling_rate": 1.5}, "sampling_rate: 1.5"),
        ({"delta": "much"}, "delta: 'much' is not a number"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(RiskcalError, match=message):
        RiskMonitor(**arguments)


@KINDS
@pytest.mark.parametrize(
    ("losses", "rates", "message"),
    [
        ([0.1, math.nan], None, "losses: nan at index 1"),
        ([0.1, 0.2, math.inf], None, "losses: inf at index 2"),
        ([0.1, -0.2, 3], None, r"losses: -0.2 at index 1 is outside \[0, 1\]"),
        ([[0.1]], None, r"losses: has shape \(1, 1\)"),
        (["a"], None, "losses: not an array of numbers"),
        ([[0.1], [0.1, 0.2]], None, "losses: not an array of numbers"),
        (None, None, "losses: "),
        ([0.1, 0.2], [0.5, 0.4], r"rates: 0.4 at index 1 is outside \[0.5, 1\]"),
        ([0.1, 0.2], [0.5, 1.1], "rates: 1.1 at index 1"),
        ([0.1, 0.2], [0.5, math.nan], "rates: nan at index 1"),
        ([0.1, 0.2], [0.5, 0.5, 0.5], "rates: 3 given for 2 losses"),
    ],
)
def test_a_refused_update_changes_nothing(kind, losses, rates, message):
    monitor = RiskMonitor(0.1, sampling_rate=0.5, **kind).update(stream(20))
    before = monitor.to_json()
    with pytest.raises(RiskcalError, match=message):
        monitor.update(losses, rates=rates)
    assert monitor.to_json() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra: is not a field"),
        ({"schema_version": 2}, "schema_version"),
        ({"kind": "riskcal.AdaptiveCalibration"}, "kind"),
        ({"n": -1}, "n: "),
        ({"n": 2.5}, "n: "),
        ({"alarm_at": 99}, "alarm_at: 99 exceeds the 20 losses"),
        ({"growth": [0.0]}, "growth"),
        ({"growth": [None] * 6}, "growth.0"),
        ({"growth": [math.nan] * 6}, "growth.0"),
        ({"totals": [-1.0, 2.0]}, "totals.0"),
        ({"parameters": {"delta": 0.1}}, "parameters.epsilon"),
    ],
)
def test_states_are_checked(change, message):
    fields = json.loads(RiskMonitor(0.1).update(stream(20)).to_json())
    with pytest.raises(RiskcalError, match=f"^state: {message}|^{message}"):
        RiskMonitor.from_json(json.dumps(fields | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', b"\xff"])
def test_what_is_no_state_is_refused(text):
    with pytest.raises(RiskcalError, match=r"^state: "):
        RiskMonitor.from_json(text)


def test_states_with_edited_parameters_are_checked_like_arguments():
    fields = json.loads(RiskMonitor(0.1).to_json())
    fields["parameters"]["delta"] = 1.5
    with pytest.raises(RiskcalError, match=r"delta: 1.5"):
        RiskMonitor.from_json(json.dumps(fields))


def test_json_is_exact_for_every_float():
    fields = json.loads(RiskMonitor(0.1).to_json())
    rng = np.random.default_rng(3)
    for _ in range(500):
        growth = (rng.standard_normal(6) * 10.0 ** rng.uniform(-300, 300, 6)).tolist()
        monitor = RiskMonitor.from_json(json.dumps(fields | {"growth": growth}))
        assert json.loads(RiskMonitor.from_json(monitor.to_json()).to_json())["growth"] == growth


def test_memory_is_constant():
    monitor = RiskMonitor(0.1)
    lengths = [len(monitor.update(stream(1000, seed=seed)).to_json()) for seed in range(20)]
    assert max(lengths) < 500


def test_it_says_how_it_stands():
    quiet = RiskMonitor(0.1, average_run_length=5000, sampling_rate=0.01).update(
        np.full(1500, 0.05)
    )
    assert repr(quiet).startswith(
        "RiskMonitor: no alarm; 1,500 losses seen (about 150,000 requests), mean 0.05;"
    )
    assert "after 5,000 losses (500,000 requests) or more on average" in repr(quiet)
    loud = RiskMonitor(0.1).update(np.ones(100))
    assert f"ALARM, raised after {loud.alarm_at} losses; 100 losses seen, mean 1;" in repr(loud)
    assert "probability at most 0.05" in repr(loud)
    assert "ALARM" in loud._repr_html_()
    assert "bold" not in quiet._repr_html_()


@KINDS
def test_no_losses_are_not_an_all_clear(kind):
    for untouched in (RiskMonitor(0.1, **kind), RiskMonitor(0.1, **kind).update([])):
        assert "no losses yet" in repr(untouched)
        assert "no alarm" not in repr(untouched) + untouched._repr_html_()
    assert "no alarm; 1 losses seen" in repr(RiskMonitor(0.1, **kind).update(0.0))
