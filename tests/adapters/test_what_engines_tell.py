"""What an engine's events tell of requests: classes of tokens, what may drift, and the strata that are made of it."""

import json
import math
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from riskcal import ExitPolicy, RiskcalError, RiskMonitor, Sampling
from riskcal.serving import Drift, EventLog, EventWatch, Pattern, Shadow, Tokens, read_events
from riskcal_adapters.torch import Engine, Request, load_example
from riskcal_adapters.torch.engine import telling

WORDS = ["banana", "calibrate", "risk", "abracadabra", "exit", "zyzzyva"] * 3
CLASSES = {"vowel": Pattern("^ ?[AEIOU]"), "stop": Pattern("^ ?[PTKBDG]$")}


@pytest.fixture(scope="module")
def g2p():
    torch.set_num_threads(1)
    return load_example("g2p")


def served(own, path, policy, *, classes=CLASSES, words=WORDS, rate=1.0, **fields):
    requests = [
        Request(word, id=f"r{i}", difficulty="ab"[i % 2], **fields) for i, word in enumerate(words)
    ]
    options = {"slots": 4, "max_prompt": 32, "shadow": Shadow(rate), "classes": classes}
    with Engine(own, policy, events=EventLog(path), **options) as engine:
        return {done.id: done for done in engine.run(requests)}


def told(path, name):
    events = [event["attributes"] for event in read_events(path).events if event["name"] == name]
    return {one["gen_ai.response.id"]: one for one in events}


def test_every_token_is_of_one_class_and_told_with_its_exit_and_whether_it_is_the_full_models(
    g2p, tmp_path
):
    path = tmp_path / "events.jsonl"
    done = served(g2p, path, ExitPolicy.static(1, max_new_tokens=16))
    full = g2p.generate(*g2p.encode(WORDS), max_new_tokens=16).tokens.numpy()
    requests, shadows = told(path, "riskcal.request.served"), told(path, "riskcal.shadow.evaluated")
    assert len(requests) == len(shadows) == len(WORDS)
    for i, (name, one) in enumerate(sorted(done.items(), key=lambda item: int(item[0][1:]))):
        texts = [g2p.decode([[token]])[0] for token in one.tokens.tolist()]
        vowel = np.array([text[:1] in tuple("AEIOU") for text in texts])
        stop = np.array([text in tuple("PTKBDG") for text in texts])
        marks = {"vowel": vowel, "stop": stop, "other": ~vowel & ~stop}
        layers = requests[name]["riskcal.exit.classes"]
        assert {c: sum(n.values()) for c, n in layers.items()} == {
            c: m.sum() for c, m in marks.items()
        }
        apart = one.tokens != np.pad(full[i], (0, 99))[: len(one.tokens)]
        pairs = {c: [apart[m].sum(), m.sum()] for c, m in marks.items() if m.any()}
        assert shadows[name]["riskcal.token.classes"] == pairs
        assert requests[name]["riskcal.confidence"] == pytest.approx(one.confidence.mean())
        assert requests[name]["gen_ai.usage.input_tokens"] == len(g2p.encode([WORDS[i]])[0][0])
        assert requests[name]["riskcal.weights"] == g2p.weights
        assert requests[name]["gen_ai.request.temperature"] == 0
    watch = EventWatch(RiskMonitor(0.9)).read(path)
    assert {one.name for one in watch.estimates() if one.kind == "class"} == {*CLASSES, "other"}
    assert [one.n for one in watch.estimates() if one.kind == "difficulty"] == [9, 9]


def test_what_shadows_estimate_covers_the_truth_over_all_requests(g2p, tmp_path):
    """Of 60 requests all are compared once; each of 20 salts then samples its own third of them."""
    path = tmp_path / "events.jsonl"
    words = [
        f"{word}{end}"
        for word in WORDS[:6]
        for end in ("", "s", "ed", "er", "ing", "ly", "ful", "ness", "or", "ist")
    ]
    served(g2p, path, ExitPolicy.static(2, max_new_tokens=12), words=words, classes=None)
    losses = {
        name: one["riskcal.loss"] for name, one in told(path, "riskcal.shadow.evaluated").items()
    }
    truth = np.mean(list(losses.values()))
    assert 0.1 < truth < 0.9
    for salt in range(20):
        shadow, watch = Shadow(1 / 3, salt=f"{salt}"), EventWatch(RiskMonitor(0.95))
        lines = [
            json.dumps({"name": "riskcal.shadow.evaluated", "attributes": {"riskcal.loss": loss}})
            for name, loss in losses.items()
            if shadow.takes(name)
        ]
        low, high = watch.follow(lines).interval("")
        assert 8 <= watch.monitor.n <= 34
        assert low <= truth <= high


def test_a_temperature_and_longer_prompts_are_drifts_by_name(g2p, tmp_path):
    """An injected temperature and longer words are told by name; the reference's own traffic shows nothing."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghilmnoprstu"))

    def words(count, longest):
        return ["".join(rng.choice(letters, rng.integers(4, longest + 1))) for _ in range(count)]

    def serve(name, policy, longest=8, count=160):
        served(g2p, tmp_path / name, policy, words=words(count, longest), rate=0.0, classes=None)
        return tmp_path / name

    greedy = ExitPolicy(threshold=0.8, max_new_tokens=12)
    hot = ExitPolicy(threshold=0.8, max_new_tokens=12, sampling=Sampling(temperature=1.5))
    reference = serve("reference", greedy, count=240)

    def drifted(*paths):
        drift = Drift.from_log(reference)
        for path in paths:
            watch = EventWatch(RiskMonitor(0.5), drift=drift).read(path)
        return {one.feature for one in watch.drift.drifted}, watch.strata.temperatures

    assert drifted(serve("same", greedy)) == (set(), {"0": 160})
    features, temperatures = drifted(serve("hot", hot))
    assert "temperature" in features
    assert "prompt length" not in features
    assert temperatures == {"1.5": 160}
    assert "prompt length" in drifted(serve("long", greedy, longest=14))[0]


@given(
    st.lists(
        st.tuples(*[st.text(st.sampled_from('"\\{}, \n\x00\x7f\ud800\u2028\U0001f600a'))] * 3),
        min_size=1,
        max_size=4,
    )
)
def test_names_of_requests_are_told_as_they_are(g2p, names):
    """Lines are put together from parts, of which no name may be taken for another."""
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(f"{folder}/events.jsonl")
        requests = [
            Request("exit" if i % 2 else "", id=f"{i}{one}", task=task, difficulty=difficulty)
            for i, (one, task, difficulty) in enumerate(names)
        ]
        with Engine(g2p, ExitPolicy.static(1, max_new_tokens=4), slots=2, events=log) as engine:
            failed = {done.id: done.error for done in engine.run(requests)}
        lines = log.path.read_text().splitlines()
    found = {one["gen_ai.response.id"]: one for one in (json.loads(x)["attributes"] for x in lines)}
    assert len(found) == len(lines) == len(requests)
    for one in requests:
        told = found[one.id]
        assert told["riskcal.task"] == one.task
        assert told["riskcal.difficulty"] == one.difficulty
        assert told.get("riskcal.error") == failed[one.id]
        assert ("riskcal.exit.layers" in told) == (failed[one.id] is None)


@pytest.mark.parametrize(
    ("confidence", "told"),
    [([0.5, 1.0], 0.75), ([0.5, math.nan, math.inf, -math.inf, 0.25], 0.375), ([math.inf], None)],
)
def test_confidence_is_the_mean_of_what_is_a_number(confidence, told):
    assert telling._mean(np.array(confidence, dtype=np.float32)) == told


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"other": Tokens([3])}, "classes: 'other' is no name"),
        ({3: Tokens([3])}, "classes: 3 is no name"),
        ({"x": "string"}, "of 'x' is no class of tokens"),
    ],
)
def test_classes_that_are_none_are_refused(g2p, tmp_path, classes, message):
    with pytest.raises(RiskcalError, match=message):
        Engine(g2p, ExitPolicy(), events=EventLog(tmp_path / "events.jsonl"), classes=classes)
