"""What a service needs around a certified policy, each part by itself."""

import json
import multiprocessing
import os
import pickle
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskcal import ExitPolicy, RiskcalError, Sampling
from riskcal.serving import (
    EventLog,
    Inside,
    KillSwitch,
    ModelFacts,
    Pattern,
    PolicyBook,
    Shadow,
    Tokens,
    check_policy,
    read_events,
)
from riskcal.serving.events import rotated

SHADOWED = "riskcal.shadow.evaluated"


@pytest.mark.parametrize("task", [None, "chat", "", 3, ["news"]])
def test_an_unknown_or_missing_task_is_the_full_model(task):
    route = PolicyBook({"news": ExitPolicy(threshold=0.5)}).route(task)
    assert route.policy.is_full_model
    assert not route.known


def test_a_book_keeps_what_it_was_given_and_refuses_what_is_no_policy():
    policies = {"news": ExitPolicy(threshold=0.5)}
    book = PolicyBook(policies)
    policies["news"] = ExitPolicy(threshold=0.1)
    assert book.route("news").policy.threshold == 0.5
    with pytest.raises(RiskcalError, match="index 0"):
        PolicyBook({"news": 0.5})
    with pytest.raises(RiskcalError, match="names no task"):
        PolicyBook({3: ExitPolicy()})


def test_a_kill_switch_is_pulled_from_another_thread_and_keeps_the_first_reason():
    switch = KillSwitch()
    assert not switch.pulled
    assert switch.state is None
    threads = [threading.Thread(target=switch.pull, args=(f"reason {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = switch.state
    switch.pull("later")
    assert switch.pulled
    assert switch.state is first
    assert first.time_unix_nano > 0
    with pytest.raises(RiskcalError, match="why"):
        switch.pull(" ")


def test_a_kill_switch_is_pulled_by_a_file_that_appears_and_stays_so(tmp_path):
    path = tmp_path / "off"
    switch = KillSwitch(path=path)
    assert not switch.pulled
    path.write_text("schema failures\nmore\n")
    assert switch.pulled
    path.unlink()
    assert switch.pulled
    assert (switch.state.why, switch.state.source) == ("schema failures", "file")


def test_a_kill_switch_waits_for_the_reason_that_is_still_being_written(tmp_path, monkeypatch):
    """``echo why > off`` makes the file first and writes into it afterwards."""
    path, slept = tmp_path / "off", []
    path.touch()

    def written_meanwhile(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            path.write_text("schema failures\n")

    monkeypatch.setattr(time, "sleep", written_meanwhile)
    switch = KillSwitch(path=path)
    assert switch.pulled
    assert switch.state.why == "schema failures"
    assert sum(slept) <= 0.05

    bare = tmp_path / "bare"
    bare.touch()
    del slept[:]
    switch = KillSwitch(path=bare)
    assert switch.pulled
    assert switch.state.why == f"{bare} appeared"
    assert sum(slept) <= 0.051


def test_a_kill_switch_that_cannot_look_is_pulled(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert KillSwitch(path=loop).pulled


def test_shadows_are_the_same_in_a_rerun_and_as_many_as_the_rate_says():
    ids = [f"request-{i}" for i in range(20_000)]
    taken = np.array([Shadow(0.02).takes(name) for name in ids])
    assert taken.tolist() == [Shadow(0.02).takes(name) for name in ids]
    assert abs(taken.mean() - 0.02) < 4 * np.sqrt(0.02 * 0.98 / len(ids))
    more = np.array([Shadow(0.1).takes(name) for name in ids])
    assert more[taken].all()
    other = np.array([Shadow(0.02, salt="b").takes(name) for name in ids])
    assert (other & taken).mean() < 0.002
    assert all(Shadow(1.0).takes(name) for name in ids[:1000])
    assert not any(Shadow(0.0).takes(name) for name in ids[:1000])
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(RiskcalError, match="rate"):
            Shadow(rate)


def test_each_fact_that_differs_is_a_reason_and_what_is_not_known_is_one():
    settings = {
        "weights": "w",
        "tokenizer": "t",
        "dtype": "float32",
        "n_layers": 6,
        "max_new_tokens": 20,
    }
    policy = ExitPolicy(threshold=0.5, classifier_weights="c", config={"eos": 1}, **settings)
    same = dict(settings, classifier_weights="c", config={"eos": 1})
    assert check_policy(policy, ModelFacts(**same)) == ()
    others = {
        "weights": "x",
        "tokenizer": "x",
        "dtype": "bfloat16",
        "n_layers": 8,
        "max_new_tokens": 30,
    }
    others |= {"classifier_weights": "x", "config": {"eos": 2}, "temperature": 0.7}
    for name, value in others.items():
        (reason,) = check_policy(policy, ModelFacts(**(same | {name: value})))
        assert reason.startswith(name)
    assert len(check_policy(policy, ModelFacts())) == 7
    assert check_policy(ExitPolicy.full_model(), ModelFacts(**others)) == ()
    elsewhere = ExitPolicy(threshold=0.5, coordinates={"arm": "a", "threshold_2": 0.3})
    reasons = check_policy(elsewhere, ModelFacts())  # which no decoder of riskcal's runs either
    assert [one.split(":")[0] for one in reasons] == ["coordinates.arm", "coordinates.threshold_2"]
    drawn = ExitPolicy(threshold=0.5, sampling=Sampling(temperature=0.7))
    assert check_policy(drawn, ModelFacts(temperature=0.7)) == ()
    assert "temperature" in check_policy(drawn, ModelFacts())[0]


def _write(path, writer, count):
    log = EventLog(path, max_bytes=4000)
    for i in range(count):
        log.write("riskcal.request.served", {"gen_ai.response.id": f"{writer}-{i}"})


def test_several_processes_and_threads_lose_no_event_over_rotations(tmp_path):
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, f"p{i}", 100)) for i in range(2)]
    workers += [threading.Thread(target=_write, args=(path, f"t{i}", 100)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    files = [*rotated(path), path]
    assert len(files) > 3
    ids = [e["attributes"]["gen_ai.response.id"] for f in files for e in read_events(f).events]
    assert len(ids) == len(set(ids)) == 500
    assert all(file.stat().st_size <= 4000 for file in files)


def _copied(log, count):
    for i in range(count):
        log.write(SHADOWED, {"gen_ai.response.id": f"{os.getpid()}-{i}"})


def test_a_log_a_switch_and_shadows_go_to_other_processes_as_they_are(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", max_bytes=5000)
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_copied, args=(log, 30)) for _ in range(2)]
    for worker in workers:
        worker.start()
    _copied(log, 30)
    for worker in workers:
        worker.join()
    files = [*rotated(log.path), log.path]
    ids = {e["attributes"]["gen_ai.response.id"] for f in files for e in read_events(f).events}
    assert len(ids) == 90
    assert all(file.stat().st_size <= 5000 for file in files)

    shadow = Shadow(rate=0.3, salt="2026")
    copy = pickle.loads(pickle.dumps(shadow))
    assert copy.rate == 0.3
    assert all(copy.takes(f"r{i}") == shadow.takes(f"r{i}") for i in range(200))

    switch = KillSwitch(path=tmp_path / "off")
    other = pickle.loads(pickle.dumps(switch))
    (tmp_path / "off").write_text("schema failures\n")
    assert switch.pulled
    assert other.pulled
    assert pickle.loads(pickle.dumps(other)).state == other.state


def test_what_goes_to_a_process_in_another_folder_means_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, switch = EventLog("events.jsonl"), KillSwitch(path="off")
    sent = pickle.dumps((log, switch))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log, switch = pickle.loads(sent)
    log.write(SHADOWED)
    assert len(read_events(tmp_path / "events.jsonl").events) == 1
    (tmp_path / "off").touch()
    assert switch.pulled


def test_rotation_never_replaces_a_file_though_older_ones_were_moved_away(tmp_path):
    path = tmp_path / "events.jsonl"
    _write(path, "a", 100)
    files = rotated(path)
    files[0].unlink()
    _write(path, "b", 100)
    left = [e for f in [*rotated(path), path] for e in read_events(f).events]
    assert len(left) >= 200 - 4000 // 80
    assert rotated(path)[0] == files[1]


def test_a_torn_line_is_left_for_later_and_then_ended_so_that_no_event_is_lost(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write(SHADOWED, {"gen_ai.response.id": "a"})
    with path.open("ab") as file:
        file.write(b'{"name": "riskcal.sha')
    first = read_events(path)
    assert (len(first.events), first.torn_bytes) == (1, 21)
    log.write(SHADOWED, {"gen_ai.response.id": "b"})
    rest = read_events(path, offset=first.offset)
    assert [e["attributes"]["gen_ai.response.id"] for e in rest.events] == ["b"]
    assert rest.damaged == [first.offset]
    with pytest.raises(RiskcalError, match="beyond"):
        read_events(path, offset=10_000)


def test_clocks_ids_and_unknown_names_are_counted_and_the_events_kept(tmp_path):
    path = tmp_path / "events.jsonl"
    events = [(SHADOWED, 5, "a"), (SHADOWED, 3, "a"), ("of.tomorrow", 4, "b")]
    path.write_text(
        "".join(
            json.dumps({"name": n, "time_unix_nano": t, "attributes": {"gen_ai.response.id": i}})
            + "\n"
            for n, t, i in events
        )
        + "[1]\n"
    )
    found = read_events(path)
    assert len(found.events) == 3
    assert (found.backwards, found.repeated, found.unknown["of.tomorrow"]) == (1, 1, 1)
    assert len(found.damaged) == 1
    assert str(found) == (
        "3 events, 1 damaged lines, 1 clocks going backwards, 1 repeated ids, 1 unknown events"
    )


def test_what_json_cannot_hold_is_refused_and_nothing_written(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(RiskcalError, match="attributes"):
        log.write(SHADOWED, {"loss": float("nan")})
    assert not log.path.exists()


@given(
    st.lists(st.text('a"\\` 1', max_size=4), max_size=12),
    st.sampled_from(["json_string", "code_block", "number"]),
)
def test_contexts_do_not_depend_on_how_text_is_cut_into_tokens(tokens, context):
    rule = Inside(context)
    state = rule.start()
    for text in tokens:
        state = rule.after(state, text)
    assert state == rule.after(rule.start(), "".join(tokens))


@given(st.text(max_size=8), st.text(max_size=8))
def test_json_strings_are_those_of_json(before, value):
    rule = Inside("json_string")
    text = json.dumps({before: value})
    assert rule.after(rule.start(), text) == rule.start()
    opened = rule.after(rule.start(), text[:-2])  # without the last quote and bracket
    assert rule.forbids(opened, 0, "x")
    assert not rule.forbids(rule.start(), 0, "{")


def test_code_blocks_numbers_sets_and_patterns():
    code = Inside("code_block")
    state = code.after(code.start(), "see `x` and ``")
    assert not code.forbids(state, 0, "y")
    assert code.forbids(state, 0, "`py")
    assert not code.forbids(code.after(state, "`py\n```"), 0, "y")
    number = Inside("number")
    assert number.forbids(number.after(number.start(), "a 1"), 0, "x")
    assert Tokens((3, 1, 3)) == Tokens((1, 3))
    assert [Tokens((1, 3)).forbids((False, 0), i, "") for i in range(5)] == [0, 1, 0, 1, 0]
    assert Pattern(r"\d").forbids((False, 0), 0, " 42")
    for make in (lambda: Inside("prose"), lambda: Tokens((1, -2)), lambda: Pattern("(")):
        with pytest.raises(RiskcalError):
            make()


def test_events_written_together_are_all_there_or_none(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("riskcal.request.served", {"n": 0})
    before = log.path.read_bytes()
    with pytest.raises(RiskcalError, match="attributes"):
        log.write_all([("riskcal.request.served", {"n": 1}), ("riskcal.request.served", {2: {3}})])
    write = os.write

    def full(descriptor, data):
        if len(data) < 100:  # what is left of them
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:-50])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RiskcalError, match=r"cannot be written \(No space left on device\)"):
            log.write_all([("riskcal.request.served", {"n": n}) for n in range(5)])
    assert log.path.read_bytes() == before
    log.write_all([("riskcal.request.served", {"n": n}) for n in (1, 2)])
    log.write_all([])
    found = read_events(log.path)
    assert [event["attributes"]["n"] for event in found.events] == [0, 1, 2]
    assert (found.damaged, found.torn_bytes) == ([], 0)
