"""`Engine`: every request as if alone, whatever shares the slots; what fails, is late or cancelled ends alone."""

import math
import signal
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import toy_decoder
from causal_models import VOCABULARY
from causal_models import decoder as causal

import riskcal
from riskcal import ExitPolicy, RiskcalError, Runs, Sampling, efficiency
from riskcal.efficiency.kernels import nothing_ran
from riskcal.serving import EventLog, KillSwitch, PolicyBook, Shadow, read_events
from riskcal_adapters import record
from riskcal_adapters.torch import EarlyExitT5, Engine, Request, load_example
from riskcal_adapters.torch.engine import bookkeeping

LENGTH = 12
KINDS = ("t5", "llama-grouped", "gpt2")


@pytest.fixture(scope="module")
def g2p():
    torch.set_num_threads(1)
    return load_example("g2p")


@pytest.fixture
def own(request, tiny_t5):
    return EarlyExitT5(tiny_t5) if request.param == "t5" else causal(request.param)


def prompts(count, seed=0, longest=9):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCABULARY, rng.integers(1, longest + 1)) for _ in range(count)]


def middling(own, quantile=0.7, **fields):
    ids = torch.from_numpy(np.stack([p for p in prompts(60) if len(p) == 9][:3]))
    traces = own.trace(ids, max_new_tokens=LENGTH, policy=ExitPolicy(**fields))
    return ExitPolicy(
        threshold=float(np.nanquantile(traces.confidence[:, :-1], quantile)), **fields
    )


def assert_as_alone(own, policies, given, done):
    for one, prompt in zip(done, given, strict=True):
        policy = policies[one.task]
        alone = own.generate(
            torch.from_numpy(prompt)[None],
            policy=policy,
            max_new_tokens=LENGTH,
        )
        assert one.error is None
        assert one.tokens.tolist() == alone.tokens[0].tolist()
        assert one.exit_layers.tolist() == alone.exit_layers[0].tolist()
        np.testing.assert_allclose(one.confidence, alone.confidence[0], atol=2e-5)
        np.testing.assert_allclose(one.refused, alone.refused[0], atol=2e-5)


def in_order(engine, given, **fields):
    requests = [Request(id=str(i), input_ids=prompt, **fields) for i, prompt in enumerate(given)]
    return sorted(engine.run(requests), key=lambda done: int(done.id))


@pytest.mark.parametrize("own", KINDS, indirect=True)
@pytest.mark.parametrize(
    "fields",
    [{}, {"measure": "state"}, {"measure": "entropy"}, {"sampling": Sampling(seed=2)}],
    ids=str,
)
@pytest.mark.parametrize(("slots", "least"), [(1, 1), (5, 2)])
def test_tokens_and_exits_are_those_of_the_row_alone(own, fields, slots, least):
    policy, given = middling(own, **fields), prompts(14)
    with Engine(
        own, policy, slots=slots, least=least, max_prompt=9, max_new_tokens=LENGTH
    ) as engine:
        done = in_order(engine, given)
        stats = engine.stats
    assert_as_alone(own, {None: policy}, given, done)
    assert len(np.unique(np.concatenate([one.exit_layers for one in done]))) >= 3
    assert stats.requests == 14
    assert stats.tokens == sum(len(one.tokens) for one in done)
    assert 1 <= stats.rows_per_call <= slots


@pytest.mark.parametrize("own", KINDS, indirect=True)
def test_a_batch_mixes_the_policies_of_its_tasks(own):
    policies = {
        "deep": ExitPolicy.full_model(),
        "shallow": ExitPolicy.static(2),
        "sure": middling(own, measure="state"),
        "unknown": ExitPolicy.full_model(),
    }
    book = PolicyBook({task: one for task, one in policies.items() if task != "unknown"})
    given, tasks = prompts(12, seed=3), list(policies) * 3
    with Engine(own, book, slots=6, max_prompt=9, max_new_tokens=LENGTH) as engine:
        requests = [
            Request(id=str(i), task=task, input_ids=prompt)
            for i, (prompt, task) in enumerate(zip(given, tasks, strict=True))
        ]
        done = sorted(engine.run(requests), key=lambda one: int(one.id))
    assert [one.task for one in done] == tasks
    assert_as_alone(own, policies, given, done)


def test_requests_are_read_as_slots_become_free(g2p):
    read = []

    def words():
        for i in range(40):
            read.append(i)
            yield "banana"

    with Engine(g2p, ExitPolicy(threshold=0.9), slots=4, max_prompt=32) as engine:
        ahead = [len(read) - i for i, _ in enumerate(engine.run(words()))]
    assert len(ahead) == 40
    assert max(ahead) <= 8


def test_text_in_and_text_out_of_many_threads_and_each_is_answered_once(g2p):
    words = ["banana", "calibrate", "risk", "layer", "exit", "token"]
    expected = g2p.decode(g2p.generate(*g2p.encode(words)).tokens)
    answers = {}

    def ask(thread):
        for i in range(30):
            answers[thread, i] = engine.submit(words[(thread + i) % 6])

    with Engine(g2p, ExitPolicy.full_model(), slots=16, max_prompt=32) as engine:
        threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = {key: future.result(timeout=120) for key, future in answers.items()}
    assert len(done) == 90
    assert all(one.text == expected[(t + i) % 6] for (t, i), one in done.items())
    assert len({one.id for one in done.values()}) == 90


def test_what_fails_ends_alone(g2p):
    given = ["banana", None, "x" * 500, "risk", Request("exit", timeout=0.0), ""]
    with Engine(g2p, ExitPolicy(threshold=0.9), slots=3, max_prompt=32) as engine:
        done = {one.id: one for one in engine.run(given)}
    assert [done[str(i)].error is None for i in range(5)] == [True, False, False, True, False]
    assert done["1"].error == "text: None is no text; give a string, or input_ids."
    assert (
        "a slot of this engine has room for 32; make the engine with max_prompt=" in done["2"].error
    )
    assert done["4"].error == "timed out"
    assert engine.stats.failed == sum(one.error is not None for one in done.values())


def test_cancelled_futures_free_their_slots(g2p):
    with Engine(g2p, ExitPolicy.full_model(), slots=2, max_prompt=32) as engine:
        futures = [engine.submit("calibration") for _ in range(20)]
        cancelled = [future.cancel() for future in futures[10:]]
        kept = [future for future in futures if not future.cancelled()]
        texts = {future.result(timeout=60).text for future in kept}
    assert len(texts) == 1
    assert any(cancelled)


@pytest.mark.parametrize("how", ["call", "thread", "signal", "file"])
def test_full_depth_from_the_next_token_on_once_the_switch_is_pulled(g2p, tmp_path, how):
    switch = KillSwitch(tmp_path / "off")
    shallow = ExitPolicy.static(1)

    def pull():
        if how == "signal":
            before = signal.signal(signal.SIGUSR1, lambda *_: switch.pull("drill"))
            signal.raise_signal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, before)
        elif how == "thread":
            thread = threading.Thread(target=switch.pull, args=("drill",))
            thread.start()
            thread.join()
        elif how == "file":
            (tmp_path / "off").write_text("drill\n")
        else:
            switch.pull("drill")

    def words():
        for i in range(30):
            if i == 20:
                pull()
            yield Request("abracadabra", id=str(i), max_new_tokens=8)

    with Engine(g2p, shallow, slots=4, max_prompt=32, kill_switch=switch) as engine:
        done = {int(one.id): one.exit_layers.tolist() for one in engine.run(words())}
    assert set(done[0]) == {1}
    assert set(done[29]) == {8}
    mixed = [layers for layers in done.values() if len(set(layers)) == 2]
    assert switch.state.why == "drill"
    # what was under way goes on at full depth, and never back
    assert all(layers == sorted(layers) for layers in mixed)


def test_a_policy_made_for_another_model_is_full_depth_and_an_event(g2p, tmp_path):
    events = EventLog(tmp_path / "events.jsonl")
    other = ExitPolicy(threshold=0.1, weights="0" * 32, dtype="float32")
    with Engine(g2p, other, slots=2, max_prompt=32, events=events) as engine:
        [done] = engine.run(["risk"])
    assert set(done.exit_layers.tolist()) == {8}
    names = [event["name"] for event in read_events(tmp_path / "events.jsonl").events]
    assert names == ["riskcal.policy.refused", "riskcal.request.served"]
    with Engine(g2p, ExitPolicy(threshold=0.1, n_layers=3), slots=2, max_prompt=32) as engine:
        assert set(next(iter(engine.run(["risk"]))).exit_layers.tolist()) == {8}


def test_shadows_run_the_full_model_and_change_nothing_that_is_served(g2p, tmp_path):
    words = ["banana", "calibrate", "risk", "abracadabra", "exit", "zyzzyva"] * 4
    policy = ExitPolicy.static(1, max_new_tokens=16)
    plain = Engine(g2p, policy, slots=4, max_prompt=32)
    served = {one.id: one.text for one in plain.run(words)}
    events = EventLog(tmp_path / "events.jsonl")
    with Engine(g2p, policy, slots=4, max_prompt=32, shadow=Shadow(0.5), events=events) as engine:
        watched = {one.id: one.text for one in engine.run(words)}
        stats = engine.stats
    assert watched == served
    full = g2p.decode(g2p.generate(*g2p.encode(words), max_new_tokens=16).tokens)
    found = read_events(tmp_path / "events.jsonl").events
    losses = {
        event["attributes"]["gen_ai.response.id"]: event["attributes"]["riskcal.loss"]
        for event in found
        if event["name"] == "riskcal.shadow.evaluated"
    }
    taken = [str(i) for i in range(24) if Shadow(0.5).takes(str(i))]
    assert sorted(losses) == sorted(taken)
    assert losses == {i: float(served[i] != full[int(i)]) for i in taken}
    assert sum(losses.values()) > 0
    assert (stats.shadows, stats.shadows_dropped) == (len(taken), 0)


def test_memory_is_known_beforehand_and_does_not_grow(g2p):
    engine = Engine(g2p, ExitPolicy(threshold=0.9), slots=8, max_prompt=16, max_new_tokens=10)
    before = engine.memory_bytes
    backbone = g2p._backbone
    width = 3 * backbone.kv_heads * backbone.head_width
    assert before >= 4 * 8 * 10 * width * g2p.n_layers
    list(engine.run(["banana"] * 20))
    assert engine.memory_bytes == before


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (ExitPolicy(threshold=0.5, cache="deferred"), "cache: 'deferred' of the policy"),
        (ExitPolicy(threshold=0.5, measure="oracle"), "measure: 'oracle'"),
        (ExitPolicy(threshold=0.5, measure="jsd"), "measure: 'jsd'"),
        (ExitPolicy(threshold=0.5, batching="deepest"), "batching: 'deepest'"),
        (ExitPolicy(threshold=0.5, emits="last"), "emits: 'last'"),
    ],
)
def test_policies_that_need_what_the_engine_has_not_are_refused(g2p, policy, complaint):
    with pytest.raises(RiskcalError, match=complaint):
        Engine(g2p, policy, slots=2)


def test_a_closed_engine_and_one_that_serves_others_refuse(g2p):
    engine = Engine(g2p, ExitPolicy.full_model(), slots=2, max_prompt=32)
    running = engine.run(["risk", "exit"])
    next(running)
    with pytest.raises(RiskcalError, match="serves others"):
        next(engine.run(["risk"]))
    running.close()
    assert engine.submit("risk").result(timeout=60).text == "R IH S K"
    engine.close()
    with pytest.raises(RiskcalError, match="is closed"):
        engine.submit("risk")


def test_a_recording_driven_by_the_engine_is_the_same_table(g2p, tmp_path):
    words = ["banana", "calibrate", "risk", "abracadabra", "exit", "zyzzyva", "layer"]
    frames = []
    for name, options in {"one": {}, "engine": {"engine": True, "batch_size": 5}}.items():
        out = record(
            words,
            lambda: g2p,
            [0.9, 0.5],
            tmp_path / name,
            max_new_tokens=12,
            traces=True,
            progress=False,
            **options,
        )
        frames.append(Runs.read(out).to_frame().drop(columns="seconds"))
    pd.testing.assert_frame_equal(*frames)


def test_a_recording_of_other_decoders_has_no_engine(tmp_path):
    with pytest.raises(RiskcalError, match=r"engine: drives decoders of riskcal_adapters\.torch"):
        record(["a"], toy_decoder.load, [0.5], tmp_path / "runs", engine=True, progress=False)


@pytest.mark.parametrize("threshold", [0.45, 0.85, np.inf])
def test_calls_rows_and_memory_are_those_that_were_planned(g2p, threshold):
    words = list(dict.fromkeys(riskcal.load_example("g2p-traces").prompt.tolist()))[:150]
    policy = ExitPolicy(threshold=threshold)
    engine = Engine(g2p, policy, slots=24, max_prompt=24, max_new_tokens=24, max_wait=600.0)
    done = list(engine.run(Request(word, id=word) for word in words))
    exits = {one.id: one.exit_layers for one in done}
    table = np.zeros((len(words), 24), dtype=int)
    for row, word in zip(table, words, strict=True):
        row[: len(exits[word])] = exits[word]
    work = efficiency.engine_work(table, 24)
    assert (work.calls, work.rows_per_call) == (engine.stats.calls, engine.stats.rows_per_call)
    size = efficiency.DecoderDimensions.from_config(g2p.model.config)
    held = efficiency.memory(size, rows=24, max_prompt=24, max_new_tokens=24)
    assert held.total == engine.memory_bytes
    order = [words.index(one.id) for one in done]
    assert work.ended[order].tolist() == sorted(work.ended.tolist())


@pytest.mark.parametrize("slots", [1, 2, 8, 64])
@pytest.mark.parametrize("deep", [1, 3, 25])
@pytest.mark.parametrize("shallow", [1, 2])
def test_no_row_waits_for_ever_whatever_others_do(slots, deep, shallow):
    """Some rows go through all layers, and the others, which never end, leave at a layer below: the clock stands still."""
    deep, n_layers = min(deep, slots), 8
    active, turn = np.ones(slots, dtype=bool), nothing_ran()
    layers, positions, ran = (np.zeros(slots, dtype=np.int64) for _ in range(3))
    for call in range(1, 3000):
        index, rows, _ = bookkeeping.next_rows(
            active, layers, positions, np.zeros(slots), -math.inf, 4, turn, n_layers
        )
        assert len(rows)
        assert (layers[rows] == index).all()
        ends = np.where(rows < deep, n_layers, shallow)
        layers[rows] = np.where(index + 1 == ends, 0, index + 1)
        ran[rows] = call
        assert (call - ran <= 64 + 2 * n_layers).all()


def test_an_engine_without_rows_calls_nothing():
    nothing = np.zeros(4, dtype=bool), *(np.zeros(4, dtype=np.int64) for _ in range(2)), np.zeros(4)
    index, rows, _ = bookkeeping.next_rows(*nothing, -math.inf, 4, nothing_ran(), 8)
    assert (index, len(rows)) == (0, 0)
