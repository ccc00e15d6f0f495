"""The loop of accelerators gives what the host's loop gives, row by row: tokens, exits, confidences, and what was refused.

It is chosen by the device, so that the tests say that a CPU is one to wait for.
"""

import copy
import dataclasses

import causal_models
import numpy as np
import pytest
import t5_reference
import torch
from exit_reference import CLASSIFIER

from riskcal import Contrast, Decaying, ExitPolicy, Pruning, Sampling
from riskcal.forbidden import Tokens
from riskcal_adapters.torch import EarlyExitCausalLM, EarlyExitT5, ExitHead, device_loop
from riskcal_adapters.torch.confidence import CONTRASTIVE
from riskcal_adapters.torch.measures import Linear

LENGTH = 12
FEW = list(range(1, 30))
KINDS = ("t5", "t5-ending", "llama-grouped", "llama-heads", "gpt2")


@pytest.fixture(scope="module")
def decoders():
    t5 = t5_reference.tiny(gated=True)
    causal = causal_models.model("llama-grouped")
    classifier = Linear(torch.from_numpy(np.random.default_rng(2).normal(size=48).astype(np.float32)), torch.tensor(0.1))
    heads = {2: ExitHead.small(causal, FEW), 3: ExitHead.copied(causal), 5: ExitHead.small(causal, FEW)}
    return {
        "t5": EarlyExitT5(t5, classifier=CLASSIFIER),
        "t5-ending": EarlyExitT5(several_ends(t5), classifier=CLASSIFIER),
        "llama-grouped": EarlyExitCausalLM(causal, classifier=classifier),
        "llama-heads": EarlyExitCausalLM(causal, heads=heads, classifier=classifier),
        "gpt2": causal_models.decoder("gpt2"),
    }


def several_ends(model):
    """Rows end at several tokens, and not all at once."""
    ending = t5_reference.ending_early(model)
    said = t5_reference.hugging_face(model, *t5_reference.prompts(7))[:, 3:].unique().tolist()
    first = ending.generation_config.eos_token_id
    ending.generation_config.eos_token_id = [first, next(t for t in said if t != first)]
    return ending


def prompts(kind, batch, seed=0):
    of = t5_reference if kind.startswith("t5") else causal_models
    return of.prompts(batch, "left", seed)


@pytest.fixture
def device(monkeypatch):
    """Generate as on a device; whether its own loop did."""
    served = []
    generate = device_loop.generate
    monkeypatch.setattr(device_loop, "apart", lambda device: True)

    def watched(*given):
        served.append(True)
        return generate(*given)

    monkeypatch.setattr(device_loop, "generate", watched)

    def run(decoder, *given, **named):
        served.clear()
        return decoder.generate(*given, **named), bool(served)

    return run


@pytest.fixture
def host(monkeypatch):
    def run(decoder, *given, **named):
        with monkeypatch.context() as patch:
            patch.setattr(device_loop, "apart", lambda device: False)
            return decoder.generate(*given, **named)

    return run


def assert_equal(found, expected):
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.exit_layers.tolist() == expected.exit_layers.tolist()
    for name in ("confidence", "refused"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=0, atol=2e-5, equal_nan=True
        )


def middling(decoder, kind, share=0.7, **fields):
    """A threshold that some tokens pass at some layers."""
    traces = decoder.trace(*prompts(kind, 7), policy=ExitPolicy(**fields), max_new_tokens=LENGTH)
    return float(np.nanquantile(traces.confidence[:, :-1], share))


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
    "pending, projected": {"max_pending": 1},
    "last": {"emits": "last"},
    "last of deferred": {"emits": "last", "cache": "deferred"},
    "deepest": {"batching": "deepest"},
    "deepest state": {"batching": "deepest", "measure": "state", "min_layer": 2},
    "deepest deferred": {"batching": "deepest", "cache": "deferred"},
    "schedule": {"schedule": Decaying(temperature=4.0, max_length=LENGTH)},
}  # fmt: skip


def served_by(kind, name):
    """Heads of layers are not contrasted, nor pruned; GPT-2 has no classifier here."""
    fields = SETTINGS[name]
    if kind == "llama-heads":
        return fields.get("measure") not in CONTRASTIVE and "pruning" not in fields
    return not (kind == "gpt2" and fields.get("measure") == "classifier")


@pytest.mark.parametrize("batch", [2, 7])
@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in KINDS for n in SETTINGS if served_by(k, n)]
)
def test_rows_are_those_of_the_hosts_loop(decoders, device, host, kind, name, batch):
    decoder, fields = decoders[kind], SETTINGS[name]
    measured = {"measure": fields.get("measure", "softmax")} | {
        key: fields[key] for key in ("pruning", "contrast") if key in fields
    }
    threshold = 0.5 if "oracle" in measured.values() else middling(decoder, kind, **measured)
    policy = ExitPolicy(threshold=threshold, **fields)
    depths = set()
    for seed in range(3):
        prompt = prompts(kind, batch, seed)
        found, served = device(decoder, *prompt, policy=policy, max_new_tokens=LENGTH)
        assert served
        assert_equal(found, host(decoder, *prompt, policy=policy, max_new_tokens=LENGTH))
        depths |= set(found.exit_layers.unique().tolist()) - {0}
    assert len(depths) > 1
