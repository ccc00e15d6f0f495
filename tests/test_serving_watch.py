"""The monitor of an event log: it goes on exactly after being killed, and says nothing over no losses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from riskcal import RiskcalError, RiskMonitor, cli
from riskcal.serving import EventLog, EventWatch, place
from riskcal.serving.events import rotated


def write(log, index, loss):
    attributes = {"gen_ai.response.id": f"r{index}", "riskcal.task": "ab"[index % 2]}
    log.write("riskcal.request.served", attributes | {"riskcal.exit.layers": {"2": 3, "6": 1}})
    log.write("riskcal.shadow.evaluated", attributes | {"riskcal.loss": loss})


LOSSES = np.random.default_rng(0).binomial(1, 0.1, 200).astype(float)


def test_over_no_losses_it_never_says_no_alarm(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("riskcal.request.served", {})
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert "no alarm" not in watch.verdict


def test_any_cut_resumes_exactly_over_rotations(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", max_bytes=6000)
    watch, state = EventWatch(RiskMonitor(0.2)), tmp_path / "state.json"
    for index, loss in enumerate(LOSSES):
        write(log, index, loss)
        if index % 17 == 0:
            watch.read(log.path).save(state)
            watch = EventWatch.load(state)
    watch.read(log.path)
    assert watch.monitor.to_json() == RiskMonitor(0.2).update(LOSSES).to_json()
    assert sum(n for n, _ in watch.losses.values()) == 200
    assert watch.losses["a"] == (100, LOSSES[::2].sum())
    assert watch.layers["b"] == {"2": 300, "6": 100}


def test_killed_while_it_saves_it_goes_on_exactly(tmp_path):
    log, state = EventLog(tmp_path / "events.jsonl"), tmp_path / "state.json"
    for index, loss in enumerate(LOSSES):
        write(log, index, loss)
    EventWatch(RiskMonitor(0.2)).save(state)
    code = (
        "import sys; from riskcal.serving import EventWatch; s, p = sys.argv[1:]\n"
        "print(1, flush=True)\nwhile True: EventWatch.load(s).read(p).save(s)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, state, log.path], stdout=-1)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    watch = EventWatch.load(state).read(log.path)
    assert watch.monitor.to_json() == RiskMonitor(0.2).update(LOSSES).to_json()


def test_repeats_are_counted_once_and_what_failed_has_the_worst_loss(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for index, loss in [(0, 0.0), (0, 1.0), (1, None), (2, 7.0), (3, True)]:
        write(log, index, loss)
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert (watch.counts["repeated"], watch.counts["failed"], watch.monitor.n) == (1, 3, 4)
    assert watch.monitor.mean_loss == 0.75
    assert watch.losses["b"] == (2, 2.0)


def test_losses_nobody_knows_are_counted_once_and_never_hidden(tmp_path):
    log, state = EventLog(tmp_path / "events.jsonl"), tmp_path / "state.json"
    absent = [{"gen_ai.response.id": f"r{i}", "riskcal.task": "ab"[i % 2]} for i in range(5)]
    for told in [*absent, absent[0]]:
        log.write("riskcal.shadow.missing", told | {"riskcal.reason": "timed out"})
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert watch.verdict == "no losses, and 5 that nobody knows, so that nothing can be said"
    watch.save(state)
    watch = EventWatch.load(state)
    log.write("riskcal.shadow.evaluated", absent[2] | {"riskcal.loss": 0.0})  # asked again
    log.write("riskcal.shadow.missing", absent[2])
    log.write("riskcal.shadow.missing", absent[1])
    assert watch.read(log.path).missing == {"a": 2, "b": 2}
    assert watch.monitor.n == 1
    assert watch.verdict == "no alarm over 1 losses, and 4 that nobody knows"
    said = CliRunner().invoke(cli.app, ["monitor", str(log.path), "--delta", "0.2"])
    assert "task a: 2 requests ended without an output" in said.output
    assert "were each the worst, mean loss 0.6667" in said.output
    assert "task b: 2 requests ended" in said.output


def test_a_file_that_is_gone_or_a_state_that_is_none_is_refused(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", max_bytes=300)
    write(log, 0, 0.0)
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    log.path.rename(tmp_path / "elsewhere")
    write(log, 1, 0.0)
    with pytest.raises(RiskcalError, match="is gone"):
        watch.read(log.path)
    (tmp_path / "state.json").write_text(json.dumps({"kind": "other"}))
    with pytest.raises(RiskcalError, match="no state"):
        EventWatch.load(tmp_path / "state.json")


@pytest.mark.parametrize("how", ["emptied", "deleted", "shorter"])
def test_a_log_begun_anew_in_the_place_of_the_one_that_was_read_is_never_skipped(tmp_path, how):
    """A deleted file's number is given to the next one."""
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    write(log, 0, 0.0)
    state = tmp_path / "state.json"
    EventWatch(RiskMonitor(0.2)).read(path).save(state)
    inode = path.stat().st_ino
    if how == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"")
    for index in range(1, 2 if how == "shorter" else 9):
        write(log, index, 1.0)
    if path.stat().st_ino != inode:
        pytest.skip("this file system gives another number")
    if how == "shorter":
        path.write_bytes(path.read_bytes()[-40:])
    with pytest.raises(
        RiskcalError, match=r"is not the file that was read last.*begin a new state"
    ):
        EventWatch.load(state).read(path)


def test_states_from_before_places_were_known_again_go_on(tmp_path):
    log, state = EventLog(tmp_path / "events.jsonl"), tmp_path / "state.json"
    write(log, 0, 0.0)
    EventWatch(RiskMonitor(0.2)).read(log.path).save(state)
    saved = json.loads(state.read_text())
    del saved["known_by"]
    state.write_text(json.dumps(saved))
    write(log, 1, 1.0)
    assert EventWatch.load(state).read(log.path).monitor.n == 2


def test_a_state_from_before_refuses_a_log_that_is_shorter_than_its_place(tmp_path):
    log, state = EventLog(tmp_path / "events.jsonl"), tmp_path / "state.json"
    for index in range(9):
        write(log, index, 0.0)
    EventWatch(RiskMonitor(0.2)).read(log.path).save(state)
    saved = json.loads(state.read_text())
    del saved["known_by"]
    state.write_text(json.dumps(saved))
    log.path.write_bytes(b"")
    write(log, 9, 1.0)
    with pytest.raises(RiskcalError, match="is not the file that was read last"):
        EventWatch.load(state).read(log.path)


def test_a_log_renamed_while_it_is_read_is_found_by_the_next_reading(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events.jsonl")
    write(log, 0, 0.0)
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    write(log, 1, 1.0)
    looked = place.files_of

    def then_renamed(path):
        found = looked(path)
        log.path.rename(f"{log.path}.1")  # as a writer does before it begins the next
        return found

    monkeypatch.setattr("riskcal.serving.watch.files_of", then_renamed)
    watch.read(log.path)
    monkeypatch.undo()
    write(log, 2, 1.0)
    assert watch.read(log.path).monitor.n == 3


def test_a_log_that_rotates_without_pause_is_read_as_it_was_last_seen(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events.jsonl")
    write(log, 0, 0.0)
    names = iter(range(1, 10_000))
    found = place.rotated

    def restless(path):
        shown = found(path)
        write(log, next(names), 0.0)
        log.path.rename(f"{log.path}.{next(names)}")
        write(log, next(names), 0.0)
        return shown

    monkeypatch.setattr(place, "rotated", restless)
    assert place.files_of(log.path)[-1][0] == log.path


@pytest.mark.parametrize("moment", ["listed", "looked at", "opened"])
def test_a_rotation_at_any_moment_of_reading_skips_no_event(tmp_path, monkeypatch, moment):
    log = EventLog(tmp_path / "events.jsonl", max_bytes=700)
    written = 0
    for _ in range(6):
        write(log, written, LOSSES[written])
        written += 1
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)

    def rotate():
        nonlocal written
        before = len(rotated(log.path))
        while len(rotated(log.path)) == before:
            write(log, written, LOSSES[written])
            written += 1

    rotate()
    turns = [1]
    of = {"listed": (place, "rotated"), "looked at": (Path, "stat"), "opened": (Path, "open")}
    where, name = of[moment]
    was = getattr(where, name)

    def meanwhile(*args, **options):
        ours = moment == "listed" or args[0] == log.path
        found = was(*args, **options) if moment == "listed" else None
        if ours and turns and turns.pop():
            rotate()
        return was(*args, **options) if found is None else found

    with monkeypatch.context() as patch:
        patch.setattr(where, name, meanwhile)
        watch.read(log.path)
    watch.read(log.path)
    assert watch.monitor.n == written
    assert watch.monitor.to_json() == RiskMonitor(0.2).update(LOSSES[:written]).to_json()


def test_the_example_of_the_operations_page_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert "no" in capsys.readouterr().out


def test_the_command_says_what_was_seen_by_task_and_never_no_alarm_over_nothing(tmp_path):
    log, state = EventLog(tmp_path / "events.jsonl"), tmp_path / "state.json"
    arguments = ["monitor", str(log.path), "--delta", "0.2", "--state", str(state)]
    log.write("riskcal.request.served", {})
    silent = CliRunner().invoke(cli.app, arguments)
    assert "holds no loss" in str(silent.exception)
    assert "no alarm" not in silent.output
    for index in range(40):
        write(log, index, 0.0)
    good = CliRunner().invoke(cli.app, arguments)
    assert good.exit_code == 0
    assert "no alarm over 40 losses" in good.output
    assert "task a: mean loss 0.0000 over 20 requests" in good.output
    assert "task b: tokens by exit layer 2: 60, 6: 20" in good.output
    for index in range(40, 140):
        write(log, index, 1.0)
    bad = CliRunner().invoke(cli.app, arguments)
    assert bad.exit_code == 3
    assert "alarm at loss" in bad.output
