"""What drifted: alarms with a stated error, named features, states that go on exactly."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from riskcal import RiskcalError, RiskMonitor, cli
from riskcal.serving import Drift, EventLog, EventWatch
from riskcal.serving.drift import features

EPSILON = 0.2


def traffic(rng, n, *, length=30.0, confidence=0.9):
    """Requests of three features, tied and not."""
    return {
        "prompt length": rng.poisson(length, n).tolist(),
        "confidence": rng.beta(10 * confidence, 10 * (1 - confidence), n).tolist(),
        "share of string": (rng.integers(0, 3, n) / 2).tolist(),
    }


@pytest.mark.parametrize("length", [-5, 0.5, float("inf"), "long"])
def test_an_average_run_length_is_refused_as_it_was_given(length):
    with pytest.raises(RiskcalError, match=f"^average_run_length: '?{length}'? is not a"):
        Drift({"confidence": [0.1, 0.9]}, average_run_length=length)


def test_while_nothing_changes_any_feature_alarms_in_at_most_epsilon_of_streams():
    """120 streams of 300 requests after a reference of 100: at .2, three standard errors are .11."""
    false = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        drift = Drift(traffic(rng, 100), epsilon=EPSILON).update(traffic(rng, 300))
        false.append(bool(drift.drifted))
    assert np.mean(false) <= EPSILON + 0.11


@pytest.mark.parametrize(
    ("changed", "feature", "way"),
    [
        ({"length": 40.0}, "prompt length", "higher"),
        ({"length": 22.0}, "prompt length", "lower"),
        ({"confidence": 0.75}, "confidence", "lower"),
    ],
)
def test_a_shift_alarms_soon_and_names_what_drifted_and_how(changed, feature, way):
    """At a temperature or with prompts of another kind; after 500 requests without a change."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        drift = Drift(traffic(rng, 400)).update(traffic(rng, 500))
        assert drift.drifted == ()
        drift.update(traffic(rng, 250, **changed))
        assert (feature, way) in [(one.feature, one.way) for one in drift.drifted]
        assert {one.feature for one in drift.drifted} == {feature}
        assert 500 < drift.drifted[0].at <= 750


def test_a_spread_that_changes_is_a_drift_though_no_mean_does():
    rng = np.random.default_rng(0)
    drift = Drift({"confidence": rng.uniform(0.4, 0.6, 500)})
    wide = drift.update({"confidence": rng.choice([0.38, 0.62], 200)})
    assert wide.drifted[0][:2] == ("confidence", "more spread")


def test_a_run_length_is_that_of_all_features_together():
    """At least 60 requests on average; 100 streams cut off at 400, which lowers the mean."""
    lengths = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        drift = Drift(traffic(rng, 100), average_run_length=60).update(traffic(rng, 400))
        lengths.append(drift.drifted[0].at if drift.drifted else 400)
    assert np.mean(lengths) >= 60


@pytest.mark.parametrize(("features_watched", "least"), [(1, 4 * 50), (3, 2 * 12 * 50)])
def test_of_several_features_run_lengths_are_shared_by_a_union_bound(features_watched, least):
    """As the ranks of one may depend on the past of another: any alarm within m requests then has at most m / (2 * 50)."""
    reference = {f"feature {i}": range(20) for i in range(features_watched)}
    state = Drift(reference, average_run_length=50).to_json()["features"]
    for known in state.values():
        monitors = map(RiskMonitor.from_json, known["monitors"].values())
        assert {monitor.average_run_length for monitor in monitors} == {least}


def test_other_weights_are_told_as_others_within_a_few_requests():
    def values(weights, count):
        event = {"name": "riskcal.request.served", "attributes": {"riskcal.weights": weights}}
        return {"weights": [features(event)["weights"]] * count}

    drift = Drift(values("a", 300)).update(values("a", 200))
    assert drift.drifted == ()
    assert "weights other (at request 2" in drift.update(values("b", 40)).verdict


def test_any_cut_goes_on_exactly():
    rng = np.random.default_rng(3)
    whole, cut, given = Drift(traffic(rng, 50)), None, traffic(rng, 200, length=35.0)
    cut = Drift.from_json(json.loads(json.dumps(whole.to_json())))
    whole.update(given)
    for start in range(0, 200, 7):
        cut.update({name: values[start : start + 7] for name, values in given.items()})
        cut = Drift.from_json(json.loads(json.dumps(cut.to_json())))
    assert cut.to_json() == whole.to_json()
    assert cut.drifted == whole.drifted


def test_over_nothing_it_says_that_nothing_can_be_said_and_bad_references_are_refused(tmp_path):
    assert "nothing can be said" in Drift({"depth": [1.0]}).verdict
    assert "nothing can be said" in Drift({"depth": [1.0]}).update({"other": [1.0]}).verdict
    for given, message in [
        ({}, "names no feature"),
        (None, "names no feature"),
        ({"depth": []}, "reference: depth: is empty"),
        ({"depth": [float("nan")]}, "reference: depth"),
    ]:
        with pytest.raises(RiskcalError, match=message):
            Drift(given)
    (tmp_path / "events.jsonl").write_text("")
    with pytest.raises(RiskcalError, match="tells nothing of requests"):
        Drift.from_log(tmp_path / "events.jsonl")


def test_features_are_those_of_the_policy_only_where_it_was_served():
    told = {
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.usage.output_tokens": 4,
        "riskcal.confidence": 0.75,
        "riskcal.exit.layers": {"2": 3, "6": 1},
        "riskcal.exit.classes": {"string": {"6": 1}, "other": {"2": 3}},
    }
    event = {"name": "riskcal.request.served", "attributes": told}
    assert features(event) == {
        "prompt length": 12,
        "output length": 4,
        "temperature": 0.0,
        "confidence": 0.75,
        "depth": 3.0,
        "share of string": 0.25,
        "share of other": 0.75,
    }
    told["riskcal.full_depth"] = "kill switch"
    assert set(features(event)) == {
        "prompt length",
        "output length",
        "temperature",
        "share of string",
        "share of other",
    }
    shadow = {"riskcal.token.disagreement": 0.25}
    assert features({"name": "riskcal.shadow.evaluated", "attributes": shadow}) == {
        "agreement": 0.75
    }
    for odd in (None, {}, {"riskcal.confidence": None, "riskcal.exit.layers": {"a": 1, "b": -2}}):
        assert features({"name": "riskcal.request.served", "attributes": odd}) == {}


def lines(rng, count, first, length, *, loss=0.0):
    for index, tokens in enumerate(rng.poisson(length, count).tolist(), start=first):
        told = {"gen_ai.response.id": f"r{index}", "gen_ai.usage.input_tokens": tokens}
        yield json.dumps({"name": "riskcal.request.served", "attributes": told}) + "\n"
        if index % 10 == 0:
            told = {"gen_ai.response.id": f"r{index}", "riskcal.loss": loss}
            yield json.dumps({"name": "riskcal.shadow.evaluated", "attributes": told}) + "\n"


def test_the_command_alarms_with_what_drifted_and_goes_on_from_its_state(tmp_path):
    rng = np.random.default_rng(0)
    reference, log, state = (tmp_path / name for name in ("reference.jsonl", "log.jsonl", "state"))
    reference.write_text("".join(lines(rng, 300, 0, 30.0)))
    text = [*lines(rng, 200, 0, 30.0), *lines(rng, 150, 200, 45.0)]
    arguments = ["monitor", str(log), "--delta", "0.2", "--state", str(state)]
    log.write_text("".join(text[:220]))
    good = CliRunner().invoke(cli.app, [*arguments, "--reference", str(reference)])
    assert good.exit_code == 0, good.exception
    assert "drifted: none of prompt length over 200 requests" in good.output
    log.write_text("".join(text))
    bad = CliRunner().invoke(cli.app, [*arguments, "--reference", str(reference)])
    assert bad.exit_code == 3
    assert "no alarm over 35 losses" in bad.output
    assert re.search(
        "^drifted: prompt length .*prompt length higher .at request 2", bad.output, re.M
    )
    once = EventWatch(RiskMonitor(0.2), drift=Drift.from_log(reference)).read(log)
    assert EventWatch.load(state).drift.to_json() == once.drift.to_json()
    streamed = EventWatch(RiskMonitor(0.2), drift=Drift.from_log(reference)).follow(text)
    assert streamed.drift.to_json() == once.drift.to_json()
    again = streamed.follow(text[:50]).drift.to_json()  # a stream that began again
    assert again == once.drift.to_json()
    other = CliRunner().invoke(cli.app, arguments)
    assert "was begun with --reference" in str(other.exception)
    (tmp_path / "losses.csv").write_text("loss\n0.1\n")
    plain = ["monitor", str(tmp_path / "losses.csv"), "--delta", "0.2"]
    refused = CliRunner().invoke(cli.app, [*plain, "--reference", str(reference)])
    assert "reference: is for event logs" in str(refused.exception)


def test_a_state_goes_on_with_the_reference_that_it_was_begun_with(tmp_path):
    """It has ranks among that one; another would be given, and not be looked at."""
    log, state = EventLog(tmp_path / "events.jsonl"), tmp_path / "state.json"
    log.write("riskcal.shadow.evaluated", {"riskcal.loss": 0.0})
    references = [EventLog(tmp_path / name) for name in ("first.jsonl", "second.jsonl")]
    for scale, reference in enumerate(references, start=1):
        for n in range(20):
            reference.write("riskcal.request.served", {"gen_ai.usage.input_tokens": scale * n})

    def watch(reference):
        options = ["--delta", "0.5", "--state", str(state), "--reference", str(reference.path)]
        return CliRunner().invoke(cli.app, ["monitor", str(log.path), *options])

    assert watch(references[0]).exit_code == 0
    assert watch(references[0]).exit_code == 0
    refused = watch(references[1])
    assert isinstance(refused.exception, RiskcalError) or refused.exit_code == 2
    assert "reference" in str(refused.exception) + refused.output


def test_events_that_a_reference_repeats_count_once(tmp_path):
    """Told five times, 30 requests raised a false alarm in 25 of 100 draws at an epsilon of .05."""
    once, often = EventLog(tmp_path / "once.jsonl"), EventLog(tmp_path / "often.jsonl")
    for n in range(20):
        told = {"gen_ai.response.id": f"r{n}", "gen_ai.usage.input_tokens": n}
        for log, copies in ((once, 1), (often, 5)):
            for _ in range(copies):
                log.write("riskcal.request.served", told)
                log.write("riskcal.shadow.evaluated", told | {"riskcal.token.disagreement": 0.1})
    assert Drift.from_log(often.path).to_json() == Drift.from_log(once.path).to_json()


ENDLESS = """
import sys
from riskcal import cli
cli.app(sys.argv[1:])
"""


def piped(*arguments):
    command = [
        sys.executable,
        "-c",
        ENDLESS,
        "monitor",
        "-",
        "--delta",
        "0.2",
        *map(str, arguments),
    ]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_drift_of_an_endless_stream_is_told_while_it_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    reference, state = tmp_path / "reference.jsonl", tmp_path / "state.json"
    reference.write_text("".join(lines(rng, 300, 0, 30.0)))
    told = [*lines(rng, 200, 0, 30.0), *lines(rng, 150, 200, 45.0)]
    with piped("--reference", reference, "--state", state) as child:
        child.stdin.write("".join(told))
        child.stdin.flush()
        while "prompt length higher" not in (line := child.stdout.readline()):
            assert line, "the stream ended first"
        child.stdin.write(told[-1])  # it is open still
        child.stdin.close()
        rest = child.stdout.read()
        assert child.wait() == 3
    whole = EventWatch(RiskMonitor(0.2), drift=Drift.from_log(reference)).follow(told)
    [first] = [one for one in whole.drift.drifted if one.way == "higher"]
    assert line == f"-: drifted: {first}\n"
    assert "drifted: " in rest
    assert "no alarm over 35 losses" in rest
    assert EventWatch.load(state).drift.to_json() == whole.drift.to_json()


def test_a_stream_that_is_killed_anywhere_goes_on_exactly_and_counts_nothing_twice(tmp_path):
    rng = np.random.default_rng(1)
    reference, state = tmp_path / "reference.jsonl", tmp_path / "state.json"
    reference.write_text("".join(lines(rng, 200, 0, 30.0)))
    told = list(lines(rng, 120, 0, 33.0, loss=0.1))
    whole = EventWatch(RiskMonitor(0.2), drift=Drift.from_log(reference)).follow(told)
    for cut in sorted(rng.choice(len(told), 4, replace=False).tolist()):
        with piped("--reference", reference, "--state", state) as child:
            child.stdin.write("".join(told[:cut]))  # from its beginning each time
            child.stdin.flush()
            time.sleep(rng.random() * 2)
            child.kill()
    with piped("--reference", reference, "--state", state) as child:
        child.communicate("".join(told))
    found = EventWatch.load(state)
    assert found.drift.to_json() == whole.drift.to_json()
    assert found.monitor.to_json() == whole.monitor.to_json()


def test_a_stream_ends_with_the_line_that_raises_the_alarm():
    def shadows():
        for index in range(10_000):
            read.append(index)
            told = {"gen_ai.response.id": f"r{index}", "riskcal.loss": 1.0}
            yield json.dumps({"name": "riskcal.shadow.evaluated", "attributes": told})

    read = []
    watch = EventWatch(RiskMonitor(0.2)).follow(shadows())
    assert len(read) == watch.monitor.alarm_at < 10_000  # nothing is waited for after it
    assert watch.follow(shadows()) is watch
    assert len(read) == watch.monitor.alarm_at


def test_a_damaged_line_ends_no_stream(tmp_path):
    good = b"".join(line.encode() for line in lines(np.random.default_rng(0), 60, 0, 30.0))
    state = tmp_path / "state.json"
    done = CliRunner().invoke(
        cli.app,
        ["monitor", "-", "--delta", "0.2", "--state", str(state)],
        input=good + b"\xff\xfe\n" + good.replace(b'id": "r', b'id": "s') + b'{"name": "\xff"}\n',
    )
    assert done.exit_code == 0, done.exception
    watch = EventWatch.load(state)
    assert watch.monitor.n == 12
    assert watch.counts["damaged"] == 2
    losses = CliRunner().invoke(
        cli.app, ["monitor", "-", "--delta", "0.2"], input=b"loss\n0.1\n\xff\n"
    )
    assert "is not UTF-8 text" in str(losses.exception)


def test_a_file_whose_first_line_was_torn_is_a_log_of_events_still(tmp_path):
    log = tmp_path / "events.jsonl"
    log.write_text('attributes": {}}\n' + "".join(lines(np.random.default_rng(0), 60, 0, 30.0)))
    done = CliRunner().invoke(cli.app, ["monitor", str(log), "--delta", "0.2"])
    assert done.exit_code == 0, done.exception
    assert "no alarm over 6 losses" in done.output
    assert "damaged: 1" in done.output
