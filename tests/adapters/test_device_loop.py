"""The loop of accelerators gives what the host's loop gives, row by row: tokens, exits, confidences, and what was refused.

It is chosen by the device, so that the tests say that a CPU is one to wait for.
"""

import copy
import functools

import causal_models
import numpy as np
import pytest
import t5_reference
import torch
from exit_reference import CLASSIFIER

from riskcal import ExitPolicy
from riskcal.forbidden import Tokens
from riskcal.policy import Contrast, Sampling
from riskcal.pruning import Pruning
from riskcal.schedules import Decaying
from riskcal_adapters.torch import (
    EarlyExitCausalLM,
    EarlyExitT5,
    ExitHead,
    device_loop,
    kernels,
    measures,
)
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.confidence import CONTRASTIVE
from riskcal_adapters.torch.device_loop import Notes
from riskcal_adapters.torch.measures import Linear
from riskcal_adapters.torch.run import Run

LENGTH = 12
FEW = list(range(1, 30))
KINDS = ("t5", "t5-ending", "llama-grouped", "llama-heads", "gpt2")


@functools.cache
def decoder(kind):
    if kind.startswith("t5"):
        t5 = t5_reference.tiny(gated=True)
        return EarlyExitT5(several_ends(t5) if kind == "t5-ending" else t5, classifier=CLASSIFIER)
    if kind == "gpt2":
        return causal_models.decoder(kind)
    of = causal_models.model("llama-grouped")
    weight = np.random.default_rng(2).normal(size=48).astype(np.float32)
    named = {"classifier": Linear(torch.from_numpy(weight), torch.tensor(0.1))}
    if kind == "llama-heads":  # the last layer has one of its own, and then the final head
        few = ExitHead.small(of, FEW)
        named["heads"] = {2: few, 3: ExitHead.copied(of), 5: few}
    if kind == "llama-ending":
        of = copy.deepcopy(of)
        of.generation_config.eos_token_id = [1, 7, 11, 20]
    return EarlyExitCausalLM(of, **named)


def several_ends(model):
    """Rows end at several tokens, and not all at once."""
    ending = t5_reference.ending_early(model)
    said = t5_reference.hugging_face(model, *t5_reference.prompts(7))[:, 3:].unique().tolist()
    first = ending.generation_config.eos_token_id
    ending.generation_config.eos_token_id = [first, *(t for t in said if t != first)][:4]
    return ending


def prompts(kind, batch, seed=0):
    of = t5_reference if kind.startswith("t5") else causal_models
    return of.prompts(batch, "left", seed)


class Generating:
    """Generate by one loop or the other; how often the device's own did."""

    def __init__(self, patch, apart):
        self._patch, self._apart, self.served = patch, apart, 0

    def __call__(self, own, *given, **named):
        self.served, generate = 0, device_loop.generate

        def counted(*asked):
            self.served += 1
            return generate(*asked)

        with self._patch.context() as patch:
            patch.setattr(device_loop, "apart", lambda device: self._apart)
            patch.setattr(device_loop, "generate", counted)
            return own.generate(*given, **named)


@pytest.fixture
def device(monkeypatch):
    return Generating(monkeypatch, True)


@pytest.fixture
def host(monkeypatch):
    return Generating(monkeypatch, False)


def assert_equal(found, expected):
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.exit_layers.tolist() == expected.exit_layers.tolist()
    for name in ("confidence", "refused"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0, atol=2e-5, equal_nan=True
        )


@functools.cache
def middling(kind, share, measure, pruning=None, contrast=None):
    """A confidence that this share of tokens and layers does not reach, and none has: loops that round otherwise agree on it."""
    fields = {"pruning": pruning, "contrast": contrast}
    policy = ExitPolicy(measure=measure, **{name: one for name, one in fields.items() if one})
    traces = decoder(kind).trace(*prompts(kind, 7), policy=policy, max_new_tokens=LENGTH)
    found = np.unique(traces.confidence[:, :-1])
    found = found[np.isfinite(found)]
    reached = int(share * (len(found) - 1))
    return float(found[reached : reached + 2].mean())


def policy_of(kind, name):
    fields = SETTINGS[name]
    if fields.get("measure") == "oracle":
        return ExitPolicy(threshold=0.5, **fields)
    share = 0.3 if fields.get("batching") == "deepest" else 0.7
    known = {key: fields[key] for key in ("pruning", "contrast") if key in fields}
    threshold = middling(kind, share, fields.get("measure", "softmax"), **known)
    return ExitPolicy(threshold=threshold, **fields)


SETTINGS = {
    "softmax": {},
    "max": {"measure": "max"},
    "entropy": {"measure": "entropy"},
    "state": {"measure": "state", "min_layer": 2},
    "classifier": {"measure": "classifier"},
    "oracle": {"measure": "oracle"},
    **{name: {"measure": name} for name in CONTRASTIVE},
    "kept": {"measure": "jsd", "contrast": Contrast(plausible="kept"), "pruning": Pruning("fixed", 20, 5)},
    "decaying alpha": {"measure": "contrastive", "contrast": Contrast(alpha_decay=0.5)},
    "fixed": {"pruning": Pruning("fixed", 20, 5)},
    "decaying": {"pruning": Pruning("decaying", 20, 5), "min_layer": 2},
    "deferred": {"cache": "deferred"},
    "deferred state": {"cache": "deferred", "measure": "state", "min_layer": 2},
    "recompute": {"cache": "recompute"},
    "pending": {"cache": "deferred", "max_pending": 2},
    "last": {"emits": "last"},
    "last of deferred": {"emits": "last", "cache": "deferred"},
    "deepest": {"batching": "deepest"},
    "deepest state": {"batching": "deepest", "measure": "state", "min_layer": 2},
    "deepest deferred": {"batching": "deepest", "cache": "deferred"},
    "schedule": {"schedule": Decaying(temperature=4.0, max_length=LENGTH)},
}  # fmt: skip


def known_to(kind, name):
    """Heads of layers are not contrasted, nor pruned; GPT-2 has no classifier here."""
    fields = SETTINGS[name]
    if kind == "llama-heads":
        return fields.get("measure") not in CONTRASTIVE and "pruning" not in fields
    return not (kind == "gpt2" and fields.get("measure") == "classifier")


ALL = [(kind, name) for kind in KINDS for name in SETTINGS if known_to(kind, name)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_rows_are_those_of_the_hosts_loop(device, host, kind, name):
    policy, depths = policy_of(kind, name), set()
    for batch, seed in ((7, 0), (2, 1)):
        asked = prompts(kind, batch, seed)
        found = device(decoder(kind), *asked, policy=policy, max_new_tokens=LENGTH)
        assert device.served == 1
        assert_equal(found, host(decoder(kind), *asked, policy=policy, max_new_tokens=LENGTH))
        depths |= set(found.exit_layers.unique().tolist()) - {0}
    assert len(depths) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_policies_of_their_own_are_those_of_the_hosts_loop(device, host, kind):
    low, high = (middling(kind, share, "softmax") for share in (0.4, 0.8))
    rows = [
        ExitPolicy(threshold=low),
        ExitPolicy(threshold=high, min_layer=2),
        ExitPolicy(threshold=high, schedule=Decaying(temperature=4.0, max_length=LENGTH)),
        ExitPolicy.full_model(),
        ExitPolicy(threshold=middling(kind, 0.5, "max"), measure="max"),
        ExitPolicy(threshold=low, cache="deferred"),
        ExitPolicy(threshold=low, cache="deferred", min_layer=3),
        ExitPolicy.full_model(),
        ExitPolicy(threshold=middling(kind, 0.5, "max"), measure="max"),
    ]
    asked = prompts(kind, len(rows))
    found = device(decoder(kind), *asked, policy=rows, max_new_tokens=LENGTH)
    assert device.served == 3
    assert_equal(found, host(decoder(kind), *asked, policy=rows, max_new_tokens=LENGTH))


@pytest.mark.parametrize("kind", ["t5-ending", "llama-ending"])
@pytest.mark.parametrize("name", ["softmax", "deferred", "recompute", "deepest"])
def test_rows_that_ended_make_room(device, host, kind, name, monkeypatch):
    """Once, or several times in one batch; the others go on as they would have."""
    left, keep = [], device_loop._Generation._keep
    monkeypatch.setattr(
        device_loop._Generation,
        "_keep",
        lambda self, rows: left.append(len(rows)) or keep(self, rows),
    )
    policy, asked = policy_of(kind, name), prompts(kind, 24)
    found = device(decoder(kind), *asked, policy=policy, max_new_tokens=3 * LENGTH)
    assert len(left) >= (2 if kind == "llama-ending" else 1), left
    assert left == sorted(left, reverse=True)
    expected = host(decoder(kind), *asked, policy=policy, max_new_tokens=3 * LENGTH)
    lengths = (found.exit_layers > 0).sum(1)
    assert len(set(lengths.tolist())) > 2
    assert_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5])
def test_the_full_model_is_the_hosts_at_any_batch_size(device, host, kind, batch):
    for length in (1, LENGTH):
        asked = prompts(kind, batch)
        found = device(decoder(kind), *asked, max_new_tokens=length)
        assert device.served == 1
        assert_equal(found, host(decoder(kind), *asked, max_new_tokens=length))


@pytest.mark.parametrize("lag", [0, 1, 2, 9])
def test_no_more_layers_run_than_the_lag_beyond_the_deepest_exit(device, lag, monkeypatch):
    """And what the host looks at was said so many layers before, whatever the device has got to."""
    monkeypatch.setattr(device_loop, "LAG", lag)
    ran, sent = [], {}
    layer, send, look = Run.layer, Notes.send, Notes.look

    def run(self, index, state, active):
        ran.append(index)
        return layer(self, index, state, active)

    def sends(self, kind, note):
        sent[kind] = len(ran)
        send(self, kind, note)

    def looks(self, kind, size=1):
        assert len(ran) >= sent[kind] + min(lag, 4)
        return look(self, kind, size)

    monkeypatch.setattr(Run, "layer", run)
    monkeypatch.setattr(Notes, "send", sends)
    monkeypatch.setattr(Notes, "look", looks)
    policy = ExitPolicy(threshold=middling("t5", 0.2, "softmax"))
    found = device(decoder("t5"), *prompts("t5", 3), policy=policy, max_new_tokens=LENGTH)
    starts = [*np.flatnonzero(np.array(ran) == 0), len(ran)]
    deepest = found.exit_layers.amax(0).tolist()
    assert min(deepest) < 5
    assert np.diff(starts).tolist() == [min(one + lag, 5) for one in deepest]


def test_whatever_the_lag_the_generation_is_the_same(device, host, monkeypatch):
    policy, asked = policy_of("t5-ending", "softmax"), prompts("t5-ending", 7)
    expected = host(decoder("t5-ending"), *asked, policy=policy, max_new_tokens=LENGTH)
    for lag in (0, 2, 9):
        monkeypatch.setattr(device_loop, "LAG", lag)
        assert_equal(
            device(decoder("t5-ending"), *asked, policy=policy, max_new_tokens=LENGTH), expected
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": Sampling(seed=1)},
        {"forbidden": [Tokens([5])]},
        {"batching": "regroup"},
        {"pruning": Pruning("adaptive", 20, 5)},
        {"cache": "first"},
        {"cache": "copy"},
        {"measure": "jsd", "cache": "deferred", "max_pending": 2},
    ],
    ids=str,
)
def test_what_must_ask_the_host_is_left_to_its_loop(device, host, fields):
    policy, asked = ExitPolicy(threshold=0.3, **fields), prompts("t5", 3)
    found = device(decoder("t5"), *asked, policy=policy, max_new_tokens=LENGTH)
    assert not device.served
    assert_equal(found, host(decoder("t5"), *asked, policy=policy, max_new_tokens=LENGTH))


def test_a_single_row_that_may_leave_early_waits_for_each_answer(device):
    for batch, served in ((1, 0), (2, 1)):
        device(
            decoder("t5"), *prompts("t5", batch), policy=ExitPolicy(threshold=0.3), max_new_tokens=3
        )
        assert device.served == served
    rows = [ExitPolicy(threshold=0.3), ExitPolicy(threshold=0.3, measure="max")]
    device(decoder("t5"), *prompts("t5", 2), policy=rows, max_new_tokens=3)
    assert not device.served


def test_a_confidence_that_is_no_number_never_leaves_and_refuses_nothing(device, host, monkeypatch):
    margin = measures.margin
    nan = lambda logits: margin(logits).masked_fill(logits.argmax(-1) % 2 == 0, torch.nan)  # noqa: E731
    monkeypatch.setattr(measures, "margin", nan)
    monkeypatch.setitem(measures.OF_LOGITS, "softmax", nan)
    monkeypatch.setattr(kernels, "take", lambda values: False)
    monkeypatch.setattr(Backbone, "lean", False)
    own = EarlyExitT5(t5_reference.tiny(gated=True))
    policy, asked = ExitPolicy(threshold=0.2), prompts("t5", 7)
    found = device(own, *asked, policy=policy, max_new_tokens=LENGTH)
    assert device.served == 1
    assert found.confidence.isnan().any()
    assert not found.confidence[(found.exit_layers > 0) & (found.exit_layers < 5)].isnan().any()
    assert not found.refused.isnan().any()
    assert_equal(found, host(own, *asked, policy=policy, max_new_tokens=LENGTH))


def test_a_cpu_is_not_waited_for():
    assert not device_loop.apart(torch.device("cpu"))
    assert device_loop.apart(torch.device("cuda"))
