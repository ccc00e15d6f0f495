"""Logs, states and policies in production: kills, odd lines, edits by hand, and alarms when they were foretold."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from riskcal import ExitPolicy, RiskcalError, RiskMonitor, calibrate, cli
from riskcal.serving import (
    EventLog,
    EventWatch,
    MetricsCollector,
    Shadow,
    alarm_delays,
    read_events,
)
from riskcal.serving.reader import parsed

SHADOWED = "riskcal.shadow.evaluated"

#: Writes events, reads them and saves; a child is killed at each of 20 random events, before it, within it, or while it saves.
KILLED = """
import os, random, signal, sys
from riskcal import RiskMonitor
from riskcal.serving import Drift, EventLog, EventWatch
from riskcal.serving.watch import _replacing
log, state = EventLog(sys.argv[1], max_bytes=4000), sys.argv[2]
EventWatch(RiskMonitor(0.2), drift=Drift({"agreement": [0.5, 1.0] * 20})).save(state)
RiskMonitor(0.2).update([0.0])  # what is compiled is loaded here once, for all children
rng = random.Random(0)
kills = sorted(rng.sample(range(100), 20))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def work(first, kill, stage):
    for index in range(first, 100):
        if index == kill and stage == 0:
            die()
        told = {"gen_ai.response.id": f"r{index}", "riskcal.loss": float(index % 9 == 0)}
        log.write("riskcal.shadow.evaluated", told | {"riskcal.token.disagreement": index % 5 / 10})
        if index == kill and stage == 1:
            die()
        watch = EventWatch.load(state).read(log.path)
        if index == kill and stage == 2:
            os.replace = lambda *_: die()
        watch.save(state)
    os._exit(0)

first, deaths = 0, 0
for kill in [*kills, None]:
    stage = rng.randrange(3)
    child = os.fork()
    if not child:
        work(first, kill, stage)
    deaths += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    # whoever asks again asks for what was not written
    first = kill if stage == 0 else None if kill is None else kill + 1
print(deaths)
"""


def test_killed_at_20_random_events_the_state_goes_on_exactly_and_no_event_is_lost(tmp_path):
    log, state = tmp_path / "events.jsonl", tmp_path / "state.json"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, log, state], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "20"
    watch = EventWatch.load(state).read(log)
    losses = [float(index % 9 == 0) for index in range(100)]
    assert watch.monitor.to_json() == RiskMonitor(0.2).update(losses).to_json()
    assert watch.drift.seen == {"agreement": 100}
    assert watch.counts.total() == 0
    whole = type(watch.drift)({"agreement": [0.5, 1.0] * 20})
    whole.update({"agreement": [1 - index % 5 / 10 for index in range(100)]})
    assert watch.drift.to_json() == whole.to_json()


def event(name, index, clock, **told):
    told = {"gen_ai.response.id": f"r{index}"} | {f"riskcal.{k}": v for k, v in told.items()}
    return json.dumps({"name": name, "time_unix_nano": clock, "attributes": told}) + "\n"


def test_a_log_with_every_fault_at_once_is_read_to_its_end_and_each_is_counted(tmp_path):
    path = tmp_path / "events.jsonl"
    lines = [event(SHADOWED, index, 1000 + index, loss=0.0) for index in range(30)]
    lines.insert(3, event(SHADOWED, 1, 900, loss=1.0))  # an id again, and an earlier clock
    lines.insert(5, event("of.tomorrow", 99, 2000))
    lines.insert(9, '{"name": "riskcal.sha\n')
    lines.insert(12, "\x00\xff\n")
    lines.insert(15, event(SHADOWED, 77, 3000, loss="0.5"))
    path.write_text("".join(lines) + '{"name": "riskcal.shadow.evalu', encoding="utf-8")
    watch = EventWatch(RiskMonitor(0.2)).read(path)
    assert watch.monitor.n == 31
    assert watch.monitor.mean_loss == pytest.approx(1 / 31)
    expected = {"backwards": 3, "repeated": 1, "unknown": 1, "damaged": 2, "failed": 1}
    assert {name: n for name, n in watch.counts.items() if n} == expected
    with path.open("a") as file:  # the torn line is ended by whoever wrote it
        file.write('ated", "attributes": {"riskcal.loss": 0.0}}\n')
    assert watch.read(path).monitor.n == 32
    assert watch.counts["damaged"] == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        event("riskcal.request.served", 0, 1),
        event("riskcal.shadow.dropped", 0, 1),
        event(SHADOWED, 0, 1, loss=0.0, full_depth="kill switch"),
        event(SHADOWED, 0, 1, loss=0.0)[:-5],
    ],
)
def test_over_zero_losses_there_is_never_an_all_clear(tmp_path, text):
    path = tmp_path / "events.jsonl"
    path.write_text(event("riskcal.request.served", 0, 0) + text)
    watch = EventWatch(RiskMonitor(0.2)).read(path)
    assert watch.monitor.n == 0
    assert watch.verdict == "no losses, so that nothing can be said"
    said = CliRunner().invoke(cli.app, ["monitor", str(path), "--delta", "0.2"])
    assert "holds no loss" in str(said.exception)
    assert "no alarm" not in said.output


def test_a_policy_edited_by_hand_watches_nothing(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write(SHADOWED, {"riskcal.loss": 0.0})
    losses = np.random.default_rng(0).random((300, 2)) < 0.02
    policy = calibrate(losses.astype(float), thresholds=[0.9, 0.8], delta=0.1).policy()
    policy.save(tmp_path / "policy.json")
    arguments = ["monitor", str(log.path), "--policy", str(tmp_path / "policy.json")]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    text = (tmp_path / "policy.json").read_text()
    written = json.loads(text)
    for field, value in {"threshold": 0.1, "min_layer": 3, "weights": "0" * 32, "extra": 1}.items():
        (tmp_path / "policy.json").write_text(json.dumps(written | {field: value}))
        with pytest.raises(RiskcalError):
            ExitPolicy.load(tmp_path / "policy.json")
        refused = CliRunner().invoke(cli.app, arguments)
        assert isinstance(refused.exception, RiskcalError)
        assert "no alarm" not in refused.output


@pytest.mark.parametrize("mean", [0.15, 0.25, 0.5])
def test_alarms_come_within_a_tenth_of_the_simulated_delay(tmp_path, mean):
    """Mean requests to the alarm at 3, 5 and 10 times delta, a fifth shadowed by their ids' hash: 250 logs, SE about 3%."""
    fresh, rng, found = RiskMonitor(0.05, average_run_length=1000), np.random.default_rng(1), []
    shadow = Shadow(0.2)
    for day in range(250):
        watch, request = EventWatch(RiskMonitor(0.05, average_run_length=1000)), 0
        while not watch.monitor.alarm:
            request += 1
            if shadow.takes(f"{mean}/{day}/{request}"):
                watch.follow([event(SHADOWED, request, request, loss=float(rng.random() < mean))])
        found.append(request)
    losses = np.repeat([1.0, 0.0], [round(1000 * mean), round(1000 * (1 - mean))])
    foretold = alarm_delays(fresh, losses, rate=0.2, draws=3000, seed=2).mean()
    assert abs(np.mean(found) / foretold - 1) < 0.1


def test_delays_after_good_losses_are_longer_and_none_is_told_of_an_alarm_that_was():
    good = RiskMonitor(0.05).update(np.zeros(500))
    bad = [1.0] * 15 + [0.0] * 85
    assert np.median(alarm_delays(good, bad, draws=100)) > 2 * np.median(
        alarm_delays(RiskMonitor(0.05), bad, draws=100)
    )
    assert np.isinf(alarm_delays(good, [0.0], draws=3, most=1000)).all()
    soon = alarm_delays(RiskMonitor(0.05), bad, draws=100, most=40)
    assert soon.min() <= 40
    assert soon[np.isfinite(soon)].max() <= 40  # not to the end of a block
    assert good.n == 500  # it is left as it is
    with pytest.raises(RiskcalError, match="has alarmed already"):
        alarm_delays(RiskMonitor(0.05).update(np.ones(50)), bad)
    for rate in (0.0, 1.5):
        with pytest.raises(RiskcalError, match="rate"):
            alarm_delays(good, bad, rate=rate)
    with pytest.raises(RiskcalError, match="losses"):
        alarm_delays(good, [3.0])


def test_of_a_log_that_was_torn_by_a_crash_every_other_event_is_read(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", max_bytes=2000)
    for index in range(60):
        log.write(SHADOWED, {"gen_ai.response.id": f"r{index}", "riskcal.loss": 0.0})
        if index % 20 == 10:
            with log.path.open("ab") as file:
                file.write(b'{"name": "riskcal.shadow.ev')
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert (watch.monitor.n, watch.counts["damaged"]) == (60, 3)
    assert len(read_events(log.path).events) < 60  # it was rotated


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (SHADOWED, {"riskcal.loss": 10**400}),
        ("riskcal.request.served", {"riskcal.exit.layers": {"9" * 400: 3}}),
        ("riskcal.request.served", {"riskcal.exit.layers": {"9" * 5000: 3}}),
        ("riskcal.request.served", {"riskcal.draft.tokens": 1, "riskcal.draft.rejected": 10**400}),
    ],
)
def test_numbers_beyond_all_floats_in_a_log_are_no_reason_to_stop_watching(tmp_path, event, told):
    log, reference = EventLog(tmp_path / "events.jsonl"), EventLog(tmp_path / "reference.jsonl")
    log.write(event, told)
    log.write(SHADOWED, {"riskcal.loss": 0.5})
    for n in range(20):
        reference.write("riskcal.request.served", {"riskcal.exit.layers": {"1": n, "8": 5}})
    done = CliRunner().invoke(
        cli.app, ["monitor", str(log.path), "--delta", "0.6", "--reference", str(reference.path)]
    )
    assert done.exit_code == 0, done.output
    assert ("failed: 1" in done.output) == ("riskcal.loss" in told)  # the worst loss


#: As a client may name its task: a line that reads like the verdict, and half of a surrogate pair, which UTF-8 has not.
HOSTILE = "\ud800\nx: no alarm over 9 losses"


def test_names_that_no_file_can_hold_are_told_by_every_face_on_their_own_line(tmp_path):
    prometheus = pytest.importorskip("prometheus_client")
    log = EventLog(tmp_path / "e.jsonl")
    for i in range(3):
        known = {"gen_ai.response.id": f"{HOSTILE}{i}", "riskcal.task": HOSTILE}
        depths = {"riskcal.exit.layers": {HOSTILE: 3}, "riskcal.exit.classes": {HOSTILE: {"1": 1}}}
        weights = {"riskcal.weights": f"{HOSTILE}{i}"}
        log.write("riskcal.request.served", known | depths | weights)
        classes = {"riskcal.difficulty": HOSTILE, "riskcal.token.classes": {HOSTILE: [1, 3]}}
        log.write(SHADOWED, known | classes | {"riskcal.loss": 0.0})
    log.write(HOSTILE)
    options = ["--delta", "0.1", "--reference", str(log.path)]
    said = CliRunner().invoke(cli.app, ["monitor", str(log.path), *options])
    assert said.exit_code == 0
    assert said.output.encode()
    assert not any(line.startswith("x: no alarm") for line in said.output.splitlines())
    page = tmp_path / "page.html"
    CliRunner().invoke(cli.app, ["report", str(log.path), "--delta", "0.1", "--out", str(page)])
    assert "ud800" in page.read_text(encoding="utf-8")
    watch = EventWatch(RiskMonitor(0.1)).read(log.path)
    registry = prometheus.CollectorRegistry()
    registry.register(MetricsCollector(watch=lambda: watch))
    assert b"ud800" in prometheus.generate_latest(registry)


@given(st.text(st.sampled_from('\\u\ud800\udc00dD8a0\U0001f600"')), st.booleans())
def test_only_halves_of_pairs_are_told_otherwise(text, ascii_only):
    line = json.dumps({"name": "n", "attributes": {"a": text}}, ensure_ascii=ascii_only)
    # two halves that meet are a pair, to JSON
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    expected = whole.encode("utf-8", "backslashreplace").decode()
    assert parsed(line)["attributes"]["a"] == expected
