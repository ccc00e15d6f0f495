"""What goes wrong around an engine: odd requests, logs and losses that fail, sources that raise. Each request has one answer."""

import logging
import math
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from causal_models import VOCABULARY
from causal_models import decoder as causal

from riskcal import ExitPolicy, RiskcalError, RiskMonitor, Sampling, calibrate
from riskcal.serving import EventLog, EventWatch, KillSwitch, PolicyBook, Shadow, read_events
from riskcal_adapters import record
from riskcal_adapters.torch import Engine, Request, load_example

SHALLOW, FULL = ExitPolicy.static(1), ExitPolicy.full_model()


@pytest.fixture(scope="module")
def g2p():
    torch.set_num_threads(1)
    return load_example("g2p")


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    return causal("llama-grouped")


@pytest.fixture
def log(tmp_path):
    return EventLog(tmp_path / "events.jsonl")


def named(log, name):
    events = read_events(log.path).events
    return [event["attributes"] for event in events if event["name"] == name]


def an_engine(decoder, policy=SHALLOW, **options):
    return Engine(decoder, policy, **{"slots": 2, "max_prompt": 16, "max_new_tokens": 8} | options)


def many(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Request(input_ids=rng.integers(3, VOCABULARY, 4)) for _ in range(count)]


# -- shadows ---------------------------------------------------------------------------------------------------------------


def test_requests_served_at_full_depth_feed_no_loss_to_the_monitor(tiny, log):
    book = PolicyBook(
        {
            "early": SHALLOW,
            "other": ExitPolicy(threshold=0.1, weights="0" * 32, dtype="float32"),
            "full": ExitPolicy.full_model(),
        }
    )
    tasks = ["early", "other", "full", "unknown", None, 7, ["a"]]
    requests = [
        Request(task=tasks[i % 7], id=f"r{i}", input_ids=request.input_ids)
        for i, request in enumerate(many(14))
    ]
    with an_engine(tiny, book, shadow=Shadow(1.0), events=log) as engine:
        done = {one.id: one for one in engine.run(requests)}
        stats = engine.stats
    assert all(one.error is None for one in done.values())
    assert set(done["r0"].exit_layers) == {1}
    assert all(set(done[f"r{i}"].exit_layers) == {tiny.n_layers} for i in range(1, 7))
    assert {told["riskcal.task"] for told in named(log, "riskcal.shadow.evaluated")} == {"early"}
    assert (stats.shadows, stats.shadows_at_full_depth) == (2, 12)
    why = Counter(one.get("riskcal.full_depth") for one in named(log, "riskcal.request.served"))
    assert why == {None: 2, "policy refused": 2, "full model": 2, "unknown route": 8}
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert (watch.monitor.n, watch.counts["full_depth"]) == (2, 12)


def test_once_the_switch_is_pulled_nothing_more_is_fed(tiny, log):
    switch = KillSwitch()

    def requests():
        for i, request in enumerate(many(12)):
            if i == 6:
                switch.pull("drill")
            yield request

    options = {"kill_switch": switch, "shadow": Shadow(1.0), "events": log}
    with an_engine(tiny, **options) as engine:
        done = list(engine.run(requests()))
    early = [one.id for one in done if set(one.exit_layers.tolist()) == {1}]
    # one that was under way is the policy's in part, which certifies nothing
    assert 4 <= len(early) < 12
    fed = [told["gen_ai.response.id"] for told in named(log, "riskcal.shadow.evaluated")]
    assert sorted(fed) == sorted(early)
    [told] = named(log, "riskcal.kill_switch.pulled")
    assert told["riskcal.reason"] == "drill"
    assert told["riskcal.pulled_unix_nano"] == switch.state.time_unix_nano


def test_a_shadow_that_says_it_is_at_full_depth_is_not_counted(log):
    for i in range(50):
        told = {"gen_ai.response.id": f"r{i}", "riskcal.loss": 0.0}
        log.write("riskcal.shadow.evaluated", told | {"riskcal.full_depth": "kill switch"})
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert watch.monitor.n == 0
    assert "no losses" in watch.verdict


def test_numbers_of_a_restarted_engine_are_other_requests(tiny, log):
    for _ in range(2):
        with an_engine(tiny, shadow=Shadow(1.0), events=log) as engine:
            assert [one.id for one in engine.run(many(3))] == ["0", "1", "2"]
    watch = EventWatch(RiskMonitor(0.9)).read(log.path)
    assert (watch.monitor.n, watch.counts["repeated"]) == (6, 0)
    assert read_events(log.path).repeated == 0


def test_shadowed_requests_that_time_out_are_counted_as_losses_nobody_knows(tiny, log):
    with slow(tiny, policy=SHALLOW, shadow=Shadow(1.0), events=log) as engine:
        [prompt, other] = [one.input_ids for one in many(2)]
        late = engine.submit(Request(input_ids=prompt, id="late", task="chat", timeout=0.05))
        waits = engine.submit(Request(input_ids=prompt, id="waits", timeout=0.0))
        assert late.result(timeout=60).error == waits.result(timeout=60).error == "timed out"
        assert engine.submit(Request(input_ids=other, id="whole")).result(timeout=60).error is None
    assert (engine.stats.shadows, engine.stats.shadows_missing) == (1, 1)
    [told] = named(log, "riskcal.shadow.missing")
    assert (told["gen_ai.response.id"], told["riskcal.reason"]) == ("late", "timed out")
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert watch.missing == {"chat": 1}
    assert watch.verdict == "no alarm over 1 losses, and 1 that nobody knows"


def test_without_early_exit_a_time_out_hides_no_loss(tiny, log):
    switch = KillSwitch()
    switch.pull("a test")
    with slow(tiny, policy=SHALLOW, shadow=Shadow(1.0), events=log, kill_switch=switch) as engine:
        requests = [Request(input_ids=one.input_ids, timeout=0.05) for one in many(3)]
        assert [one.error for one in engine.run(requests)] == ["timed out"] * 3
    assert engine.stats.shadows_missing == engine.stats.shadows_at_full_depth == 0
    assert named(log, "riskcal.shadow.missing") == []


def test_shadows_of_a_run_that_is_abandoned_are_counted_as_dropped(tiny, log):
    engine = an_engine(tiny, shadow=Shadow(1.0), events=log)
    running = engine.run(many(6))
    next(running)
    running.close()
    stats = engine.stats
    assert stats.shadows_dropped == len(named(log, "riskcal.shadow.dropped")) > 0
    assert stats.requests == stats.shadows + stats.shadows_dropped


def test_no_shadow_of_an_abandoned_run_is_a_request_or_is_told_in_another_run(tiny, log):
    """They wait, or hold slots that no request wants any more, when the run is left."""

    def told(name):
        found = named(log, name) if log.path.exists() else []
        return Counter(one["gen_ai.response.id"] for one in found if "riskcal.error" not in one)

    engine, ids, held = an_engine(tiny, shadow=Shadow(1.0), events=log, slots=4), [], False
    for run in range(6):
        own = [f"{run}-{i}" for i in range(6)]
        requests = [
            Request(input_ids=one.input_ids, id=i) for one, i in zip(many(6), own, strict=True)
        ]
        running = engine.run(requests)
        for _ in range(run + 1):
            next(running)
        held |= any(flight.shadows is not None for flight in engine._flights.values())
        running.close()
        ids += own
        shadowed = told("riskcal.shadow.evaluated") + told("riskcal.shadow.dropped")
        served = told("riskcal.request.served")
        assert shadowed == served
        assert set(served.values()) == {1}
        assert set(served) <= set(ids)
    assert held
    everything = Counter(one["gen_ai.response.id"] for one in named(log, "riskcal.request.served"))
    assert set(everything.values()) == {1}
    assert set(everything) <= set(ids)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_shadows_that_wait_for_an_engine_that_fails_are_dropped(tiny, log):
    engine = an_engine(tiny, shadow=Shadow(1.0), events=log, slots=1)
    advance, asked = engine._slots.advance, threading.Event()

    def failing():
        asked.wait()
        if len(engine._waiting_shadows) == 2:
            raise RuntimeError("out of memory")
        return advance()

    engine._slots.advance = failing
    futures = [engine.submit(request) for request in many(4)]
    asked.set()
    errors = [future.exception(timeout=60) for future in futures]
    engine.close()
    assert errors[0] is None
    assert engine.stats.shadows_dropped == len(named(log, "riskcal.shadow.dropped")) == 2
    served = Counter(one["gen_ai.response.id"] for one in named(log, "riskcal.request.served"))
    assert sorted(served.values()) == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_was_answered_when_the_engine_failed_is_told_once(tiny, log):
    class Odd(BaseException):
        pass

    def odd(_):
        raise Odd

    engine, asked = an_engine(tiny, events=log, slots=8), threading.Event()
    advance = engine._slots.advance
    engine._slots.advance = lambda: asked.wait() and advance()
    prompt = many(1)[0].input_ids
    futures = [engine.submit(Request(input_ids=prompt, id=str(i))) for i in range(6)]
    futures[2].add_done_callback(odd)
    asked.set()
    for future in futures:
        future.exception(timeout=60)
    engine.close()
    served = Counter(one["gen_ai.response.id"] for one in named(log, "riskcal.request.served"))
    assert served == Counter(map(str, range(6)))
    assert engine.stats.requests == 6


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda served, full: math.nan, "loss: is NaN"),
        (lambda served, full: 2.0, r"loss: 2 is outside [0, 1]"),
        (lambda served, full: "much", "loss: 'much' is not a number"),
        (lambda served, full: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_loss_that_fails_is_the_worst_and_counted_and_told(tiny, log, caplog, loss, why):
    with (
        caplog.at_level(logging.ERROR, "riskcal"),
        an_engine(tiny, shadow=Shadow(1.0), events=log, loss=loss) as engine,
    ):
        assert [one.error for one in engine.run(many(5))] == [None] * 5
        stats = engine.stats
    assert stats.losses_failed == 5
    assert why in stats.fault
    assert why in caplog.text
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert (watch.counts["failed"], watch.monitor.mean_loss) == (5, 1.0)


def test_the_bounds_of_losses_are_the_certificates(tiny, log):
    rng = np.random.default_rng(0)
    made = calibrate(
        rng.uniform(-0.2, 0.1, (60, 2)), delta=0.5, lower=-1.0, upper=1.0, thresholds=[0.9, 0.1]
    )
    policy = made.policy(measure="softmax", cache="project", batching="diverge")
    with an_engine(
        tiny, policy, shadow=Shadow(1.0), events=log, loss=lambda served, full: -0.5
    ) as engine:
        list(engine.run(many(3)))
        assert engine.stats.losses_failed == 0
    assert {told["riskcal.loss"] for told in named(log, "riskcal.shadow.evaluated")} == {-0.5}


# -- odd requests ----------------------------------------------------------------------------------------------------------

ODD = {
    "none": (Request(None), "text: None is no text"),
    "bytes": (Request(b"risk"), "text: b'risk' is no text"),
    "whole": (Request(7), "text: 7 is no text"),
    "halves": (Request("\ud800"), ""),
    "outside": (Request(input_ids=[3, 10_000_000]), "is not in the model's vocabulary"),
    "negative": (Request(input_ids=[3, -1]), "is not in the model's vocabulary"),
    "ragged": (Request(input_ids=[[3], [4, 5]]), "input_ids: is no array of ids"),
    "two": (Request(input_ids=[[3, 4], [4, 5]]), r"input_ids: has shape (2, 2); give the ids of"),
    "no ids": (Request(input_ids=[]), "input_ids:"),
    "fractions": (Request(input_ids=[3.5]), "input_ids: holds float64"),
    "nan": (Request("risk", timeout=math.nan), "timeout: is NaN"),
    "soon": (Request("risk", timeout="soon"), "timeout: 'soon' is not a number"),
    "past": (Request("risk", timeout=-1), "timed out"),
    "for ever": (Request("risk", timeout=math.inf), None),
    "numpy": (Request("risk", max_new_tokens=np.int64(3), timeout=np.float32(60)), None),
    "true": (Request("risk", max_new_tokens=True), "max_new_tokens: True is not a whole number"),
    "half": (Request("risk", max_new_tokens=1.5), "max_new_tokens: 1.5 is not a whole number"),
    "too many": (Request("risk", max_new_tokens=99), "has room for 8"),
    "id": (Request("risk", id=12), "id: 12 is no text"),
    "no id": (Request("risk", id=""), "id: '' is no text"),
    "bytes id": (Request("risk", id=b"x"), "id: b'x' is no text"),
    "task": (Request("risk", task=["chat"]), None),
    "long": (Request("x" * 500), "a slot of this engine has room for 16"),
}


@pytest.mark.parametrize("by_threads", [False, True])
def test_odd_requests_are_answered_once_and_stop_no_others(g2p, log, by_threads):
    requests = [request for odd, _ in ODD.values() for request in (odd, Request("risk"))]
    with an_engine(g2p, shadow=Shadow(1.0), events=log, slots=3) as engine:
        if by_threads:
            futures = [engine.submit(request) for request in requests]
            done = [future.result(timeout=120) for future in futures]
        else:
            done = list(engine.run(requests))
        stats = engine.stats
    errors = [one.error for one in done]
    whys = [why for _, why in ODD.values() if why is not None]
    if by_threads:  # in their order
        assert errors[1::2] == [None] * len(ODD)
        for (name, (_, why)), error in zip(ODD.items(), errors[::2], strict=True):
            assert (error is None) if why is None else (error is not None and why in error), name
    assert all(any(why in error for error in errors if error is not None) for why in whys)
    assert errors.count(None) == len(requests) - len(whys)
    assert stats.requests + stats.failed == len(requests)
    assert len(named(log, "riskcal.request.served")) == len(requests)
    assert stats.events_lost == 0


def test_a_text_without_tokens_is_refused_alone_and_so_is_an_output_without_a_text(
    tiny, monkeypatch
):
    class Empty:
        """A tokenizer that adds no token of its own, and writes no long outputs."""

        def __call__(self, text):
            return {"input_ids": [5] * len(text)}

        def batch_decode(self, tokens, **options):
            if any(len(row) > 5 for row in tokens):
                raise ValueError("cannot be read")
            return ["" for _ in tokens]

    monkeypatch.setattr(tiny, "tokenizer", Empty())
    given = ["abc", "", Request("ab", max_new_tokens=2), ""]
    with an_engine(tiny, slots=4) as engine:
        done = {one.id: one.error for one in engine.run(given)}
        assert engine.stats.failed == 3
    assert "has no token" in done["1"]
    assert "has no token" in done["3"]
    assert done["2"] is None
    assert "the output cannot be read (ValueError: cannot be read)" in done["0"]


def test_a_prompt_that_is_changed_while_it_runs_changes_nothing(tiny, log):
    ids = np.array([5, 9, 11])
    engine = an_engine(tiny, ExitPolicy.full_model(), shadow=Shadow(1.0))
    [before] = engine.run([Request(input_ids=ids.copy())])
    seen = []
    with an_engine(
        tiny, ExitPolicy(threshold=2.0), shadow=Shadow(1.0), events=log, slots=1
    ) as other:
        for done in other.run([Request(input_ids=ids), *many(2)]):
            ids[:] = 3
            seen.append(done)
    assert seen[0].tokens.tolist() == before.tokens.tolist()
    assert {told["riskcal.loss"] for told in named(log, "riskcal.shadow.evaluated")} == {0.0}


# -- logs and sources that fail --------------------------------------------------------------------------------------------


class Failing(EventLog):
    """A log whose disk is full at some of its writes."""

    writes = 0

    def write_all(self, events):
        self.writes += 1
        if 3 <= self.writes <= 5:
            raise OSError(28, "No space left on device")
        super().write_all(events)


def test_a_log_that_fails_is_counted_and_ends_no_request(tiny, tmp_path, caplog):
    failing = Failing(tmp_path / "events.jsonl")
    with an_engine(tiny, events=failing, slots=1) as engine:
        futures = [engine.submit(request) for request in many(12)]
        assert all(future.result(timeout=60).error is None for future in futures)
        stats = engine.stats
    assert (stats.requests, stats.events_lost) == (12, 3)
    assert "No space left" in stats.fault
    assert caplog.text.count("No space left") == 1  # of a stretch of them, the first
    events = read_events(failing.path).events
    assert len(events) == 9
    assert events[2]["attributes"]["riskcal.events.lost"] == 3
    assert EventWatch(RiskMonitor(0.2)).read(failing.path).counts["lost"] == 3


def test_a_log_that_can_never_be_written_stops_no_service(tiny, tmp_path):
    refused = ExitPolicy(threshold=0.1, weights="0" * 32, dtype="float32")
    nowhere = EventLog(tmp_path / "no such folder" / "events.jsonl")
    switch = KillSwitch()
    switch.pull("drill")
    options = {"events": nowhere, "kill_switch": switch, "shadow": Shadow(1.0)}
    with an_engine(tiny, refused, **options) as engine:
        assert [one.error for one in engine.run(many(4))] == [None] * 4
        assert engine.stats.events_lost == 6


def test_an_iterable_that_raises_ends_there_and_what_it_gave_is_answered(tiny):
    def requests():
        yield from many(5)
        raise OSError("the queue is gone")

    engine = an_engine(tiny, slots=8)
    done = []
    with pytest.raises(OSError, match="the queue is gone"):
        done.extend(engine.run(requests()))
    assert [one.error for one in done] == [None] * 5
    assert len(list(engine.run(many(9)))) == 9  # no slot is lost


def test_a_single_text_is_no_list_of_requests(g2p):
    with an_engine(g2p) as engine, pytest.raises(RiskcalError, match="requests: is a single one"):
        next(engine.run("risk"))
    with pytest.raises(RiskcalError, match="task, timeout: stand in the Request"):
        an_engine(g2p).submit(Request("risk"), task="chat")
    with pytest.raises(RiskcalError, match="loss: a float cannot be called"):
        an_engine(g2p, loss=0.5)


# -- limits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [None, 12])
def test_each_tasks_own_length_limit_holds(tiny, most):
    policies = {
        "short": ExitPolicy.static(2, max_new_tokens=3),
        "long": ExitPolicy(threshold=0.1, max_new_tokens=9, sampling=Sampling(seed=1)),
        "full": ExitPolicy.full_model().model_copy(update={"max_new_tokens": 5}),
        "refused": ExitPolicy(threshold=0.1, n_layers=77, max_new_tokens=4),
    }
    prompt = np.array([5, 9, 11, 4])
    requests = [Request(task=task, input_ids=prompt) for task in [*policies, "unknown"]]
    with an_engine(tiny, PolicyBook(policies), slots=5, max_new_tokens=most) as engine:
        done = {one.task: one for one in engine.run(requests)}
    for task, one in policies.items():
        policy = ExitPolicy(max_new_tokens=4) if task == "refused" else one
        alone = tiny.generate(torch.from_numpy(prompt)[None], policy=policy)
        assert done[task].tokens.tolist() == alone.tokens[0].tolist(), task
        assert done[task].exit_layers.tolist() == alone.exit_layers[0].tolist()
    assert len(done["unknown"].tokens) == (most or 9)


def test_a_limit_beyond_the_engines_is_refused_by_task(tiny):
    book = PolicyBook({"long": ExitPolicy.static(1, max_new_tokens=9)})
    with pytest.raises(RiskcalError, match="policy of task 'long' was calibrated for 9; give at"):
        an_engine(tiny, book, max_new_tokens=8)
    with pytest.raises(RiskcalError, match="calibrated for 9; generate with the limit"):
        an_engine(tiny, ExitPolicy.static(1, max_new_tokens=9), max_new_tokens=12)


def test_a_request_for_another_length_than_was_calibrated_is_full_depth_and_an_event(tiny, log):
    policy = ExitPolicy.static(1, max_new_tokens=6)
    own = {"input_ids": np.array([5, 9, 11])}
    asked = [Request(**own), Request(**own, max_new_tokens=6), Request(**own, max_new_tokens=4)]
    with an_engine(tiny, policy, max_new_tokens=None, events=log) as engine:
        done = sorted(engine.run(asked), key=lambda one: one.id)
    assert [set(one.exit_layers.tolist()) for one in done] == [{1}, {1}, {tiny.n_layers}]
    assert len(done[2].tokens) == 4
    [told] = named(log, "riskcal.policy.refused")
    assert "the policy was made for 6, the request asks for 4" in told["riskcal.reason"]


# -- waiting, cancelling, closing ------------------------------------------------------------------------------------------


def slow(decoder, seconds=0.02, policy=FULL, **options):
    """An engine of one slot, each of whose turns takes its time."""
    engine = an_engine(decoder, policy, slots=1, **options)
    advance = engine._slots.advance

    def turn():
        time.sleep(seconds)
        return advance()

    engine._slots.advance = turn
    return engine


def test_a_request_that_waits_longer_than_its_time_out_is_told_while_it_waits(tiny):
    with slow(tiny) as engine:
        first = engine.submit(many(1)[0])
        waiting = [engine.submit(Request(input_ids=one.input_ids, timeout=0.05)) for one in many(3)]
        waiting[2].cancel()
        answers = [future.result(timeout=60) for future in waiting[:2]]
        assert not first.done()  # it holds the only slot still
        assert [one.error for one in answers] == ["timed out"] * 2
        assert all(one.seconds < 8 * tiny.n_layers * 0.02 for one in answers)
        assert first.result(timeout=60).error is None
    assert (engine.stats.requests, engine.stats.failed) == (1, 3)


def test_closing_answers_what_was_asked_and_may_come_from_an_answer(tiny):
    engine = an_engine(tiny)
    futures = [engine.submit(request) for request in many(7)]
    futures[2].add_done_callback(lambda _: engine.close())
    assert all(future.result(timeout=60).error is None for future in futures)
    engine.close()
    with pytest.raises(RiskcalError, match="engine: is closed; make another one"):
        engine.submit(many(1)[0])


def test_closing_ends_a_run_over_an_endless_iterable(tiny):
    engine = an_engine(tiny)

    def endless():
        while True:
            yield many(1)[0]

    done = 0
    for one in engine.run(endless()):
        assert one.error is None
        done += 1
        if done == 3:
            engine.close()
    assert 3 <= done <= 3 + 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_answers_all_and_says_why_from_then_on(tiny, log):
    engine = slow(tiny, 0.01, events=log)
    advance, turns = engine._slots.advance, []

    def failing():
        turns.append(1)
        if len(turns) == 3:
            raise RuntimeError("out of memory")
        return advance()

    engine._slots.advance = failing
    futures = [engine.submit(request) for request in many(5)]
    for future in futures:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(timeout=60)
    for late in (lambda: engine.submit(many(1)[0]), lambda: next(engine.run(many(1)))):
        with pytest.raises(RiskcalError, match=r"failed \(RuntimeError: out of memory\); make"):
            late()
    engine.close()
    told = named(log, "riskcal.request.served")
    assert len(told) == engine.stats.failed == 5
    assert all("out of memory" in one["riskcal.error"] for one in told)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_between_the_queue_and_the_slots_is_told_to_those_who_wait(tiny):
    engine = an_engine(tiny)

    def broken(newcomers):
        time.sleep(0.05)
        raise RuntimeError("no room")

    engine._slots.admit = broken
    futures = [engine.submit(request) for request in many(3)]
    assert {f"{future.exception(timeout=60)}" for future in futures} == {"no room"}
    engine.close()  # the worker has said all before another test listens


@pytest.mark.parametrize("slots", [1, 3])
def test_no_slot_is_lost_by_runs_that_are_abandoned(tiny, slots):
    engine = an_engine(tiny, slots=slots, shadow=Shadow(1.0))
    for count in range(4):
        running = engine.run([Request(input_ids=[5, 9], timeout=30.0), *many(6)])
        for _ in range(count):
            next(running)
        running.close()
    assert len(engine._slots.free) == slots
    assert not engine._flights
    running = engine.run(many(5))
    next(running)
    with pytest.raises(RiskcalError, match="serves others"):
        next(engine.run(many(1)))
    assert len(list(running)) == 4
    assert len(list(engine.run(many(5)))) == 5


def test_whoever_was_refused_in_a_run_that_is_abandoned_is_counted_and_told(tiny, log):
    """Of three that are refused at once the first answer is all that the caller reads."""
    engine = an_engine(tiny, slots=4, events=log)
    running = engine.run([*[Request(input_ids=[]) for _ in range(3)], *many(1)])
    assert next(running).error is not None
    running.close()
    assert len(named(log, "riskcal.request.served")) == engine.stats.failed == 4


def test_one_id_twice_is_answered_twice(tiny, log):
    twice = [Request(id="same", input_ids=one.input_ids) for one in many(4)]
    with an_engine(tiny, shadow=Shadow(1.0), events=log) as engine:
        futures = [engine.submit(one) for one in twice]
        assert len({id(future.result(timeout=60)) for future in futures}) == 4
    watch = EventWatch(RiskMonitor(0.2)).read(log.path)
    assert (watch.monitor.n, watch.counts["repeated"]) == (1, 3)


def test_cancels_and_time_outs_of_two_threads_leave_nothing_behind(tiny):
    answers = []

    def ask(thread):
        for i, one in enumerate(many(60, seed=thread)):
            timeout = (0.0, 0.02, 30.0, None)[i % 4]
            future = engine.submit(Request(input_ids=one.input_ids, timeout=timeout))
            if i % 5 == 0:
                future.cancel()
            answers.append(future)

    with an_engine(tiny, slots=3) as engine:
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(future.done() for future in answers)
    assert engine.stats.requests + engine.stats.failed == 120
    assert not engine._open
    assert not engine._flights


# -- recordings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"batching": "deepest"},
        {"cache": "deferred", "max_pending": 2},
        {"cache": "copy"},
        {"emits": "last"},
        {"measure": "jsd"},
        {"measure": "oracle"},
    ],
    ids=str,
)
def test_a_recording_by_the_engine_of_what_it_cannot_decode_is_refused_before_it_begins(
    fields, tmp_path
):
    loaded = []
    name = next(iter(fields))
    with pytest.raises(RiskcalError, match=f"^{name}: .* record without engine=True") as refused:
        record(
            ["risk", "exit"],
            lambda: loaded.append(1),
            [0.9],
            tmp_path / "runs",
            policy=ExitPolicy(**fields),
            engine=True,
            progress=False,
        )
    assert not loaded
    assert not (tmp_path / "runs").exists()
    assert "--engine" in str(refused.value)


def test_a_recording_by_the_engine_refuses_what_does_not_fit_the_model(g2p, tmp_path):
    with pytest.raises(RiskcalError, match="min_layer: 9 exceeds the model's 8 layers"):
        record(
            ["risk", "exit"],
            lambda: g2p,
            [0.9],
            tmp_path / "runs",
            policy=ExitPolicy(min_layer=9, max_new_tokens=8),
            engine=True,
            progress=False,
        )
    assert not (tmp_path / "runs").exists()
