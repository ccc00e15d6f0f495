"""Exit heads in the decoder: whose tokens are emitted, a head after the last layer, what is bound and refused."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from causal_models import LENGTH, VOCABULARY, assert_rows_as_alone, decoder, model, prompts

from riskcal import ExitPolicy, RiskcalError, Sampling
from riskcal_adapters.torch import EarlyExitCausalLM, Engine, ExitHead, Request

KINDS = ("llama-grouped", "gpt2")
every_kind = pytest.mark.parametrize("kind", KINDS)
LAST = 5
#: Of layer 4 and of the last: a head of all tokens would leave nothing to the final one.
FEW, SOME = tuple(range(3, 41, 2)), tuple(range(2, 38))
ALWAYS = ExitPolicy.static(1).thresholds[1]


def heads(kind):
    """Of three sizes: all tokens after layer 2, a few after 4, and most of them after the last."""
    return {
        2: ExitHead.copied(model(kind)),
        4: ExitHead.small(model(kind), FEW),
        LAST: ExitHead.small(model(kind), SOME),
    }


@functools.cache
def headed(kind):
    return EarlyExitCausalLM(model(kind), heads=heads(kind))


def middling(kind, **fields):
    """A policy under which tokens leave at every head, and some at the final one."""
    return ExitPolicy(thresholds=thresholds(kind), **fields)


@functools.cache
def thresholds(kind):
    traces = headed(kind).trace(*prompts(6), max_new_tokens=LENGTH)
    return {
        layer: float(np.nanquantile(traces.confidence[:, layer - 1], share))
        for layer, share in ((2, 0.8), (4, 0.8), (LAST, 0.7))
    }


def states_after(kind, tokens):
    """Hugging Face's states (L + 1, d) of the last token, the last layer's before the final norm."""
    of = model(kind)
    kept = []
    blocks = of.transformer.h if kind == "gpt2" else of.model.layers
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in blocks
    ]
    try:
        with torch.no_grad():
            logits = of(tokens).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return [state[0, -1:] for state in kept], logits


@every_kind
def test_a_token_is_that_of_the_first_head_that_is_sure_else_the_models(kind):
    """One token after each prompt, by the definition, from Hugging Face's own states."""
    wanted = middling(kind)
    seen = set()
    for seed in range(16):
        input_ids, _ = prompts(1, seed=seed)
        input_ids = input_ids[:, : 3 + seed % 6]
        states, logits = states_after(kind, input_ids)
        said, layer = int(logits.argmax()), LAST
        place = "final"
        for at, head in heads(kind).items():
            top = head.logits(states[at - 1]).softmax(-1).topk(2).values[0]
            if top[0] - top[1] >= wanted.thresholds[at]:
                said, layer, place = int(head.said(states[at - 1])), at, at
                break
        got = headed(kind).generate(input_ids, policy=wanted, max_new_tokens=1)
        assert (int(got.tokens), int(got.exit_layers)) == (said, layer)
        seen.add(place)
    assert {LAST, "final"} <= seen
    assert len(seen) >= 3


@every_kind
def test_a_small_head_emits_the_ids_that_it_names(kind):
    for layer, ids in ((4, FEW), (LAST, SOME)):
        policy = ExitPolicy(thresholds={layer: ALWAYS})
        got = headed(kind).generate(*prompts(5), policy=policy, max_new_tokens=LENGTH)
        out = got.tokens[got.exit_layers > 0]
        assert set(got.exit_layers.unique().tolist()) <= {0, layer}
        assert set(out.tolist()) <= set(ids)
        assert len(out.unique()) > 3


@every_kind
def test_the_full_policy_asks_no_head(kind):
    full = decoder(kind).generate(*prompts(5), max_new_tokens=LENGTH)
    for policy in (ExitPolicy(), ExitPolicy(thresholds={LAST: math.inf})):
        got = headed(kind).generate(*prompts(5), policy=policy, max_new_tokens=LENGTH)
        assert got.tokens.equal(full.tokens)
        assert got.exit_layers.equal(full.exit_layers)
    drafted = headed(kind).speculate(*prompts(3), draft_layer=4, max_new_tokens=LENGTH)
    assert drafted.tokens.equal(headed(kind).generate(*prompts(3), max_new_tokens=LENGTH).tokens)


def test_one_threshold_is_for_every_head_and_a_head_after_the_last_layer_is_one():
    """Above all confidences that were refused before, the same tokens; below, others leave."""
    own = headed("llama-grouped")
    got = own.generate(*prompts(4), policy=ExitPolicy(threshold=0.3), max_new_tokens=LENGTH)
    layers = set(got.exit_layers.unique().tolist())
    assert layers <= {0, 2, 4, LAST}
    assert (got.confidence[(got.exit_layers > 0) & (got.exit_layers < LAST)] >= 0.3).all()
    alone = ExitPolicy(threshold=0.0, min_layer=LAST)
    got = own.generate(*prompts(4), policy=alone, max_new_tokens=LENGTH)
    assert set(got.tokens[got.exit_layers > 0].tolist()) <= set(SOME)


@every_kind
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"batching": "regroup"},
        {"batching": "regroup", "measure": "state"},
        {"cache": "deferred", "max_pending": 2},
        {"measure": "entropy"},
        {"sampling": Sampling(seed=2)},
        {"emits": "last"},
    ],
    ids=str,
)
def test_rows_are_as_alone(kind, fields):
    if "measure" in fields:
        policy = ExitPolicy(threshold={"state": 0.6, "entropy": -0.8}[fields["measure"]], **fields)
    else:
        policy = middling(kind, **fields)
    together = assert_rows_as_alone(headed(kind), policy, batch=4)
    assert len(together.exit_layers[together.exit_layers > 0].unique()) >= 2


def test_rows_sent_to_the_last_layer_may_still_leave_at_its_own_head():
    policy = ExitPolicy(thresholds={2: ALWAYS, LAST: ALWAYS}, cache="deferred", max_pending=1)
    got = headed("gpt2").generate(*prompts(1), policy=policy, max_new_tokens=8)
    layers = got.exit_layers[0].tolist()
    assert layers == ([2, LAST] * 4)[: len(layers)]
    assert set(got.tokens[0, 1::2].tolist()) <= set(SOME)


@every_kind
def test_an_engine_gives_rows_as_alone(kind):
    own = headed(kind)
    input_ids, mask = prompts(9)
    given = [row[real].tolist() for row, real in zip(input_ids, mask.bool(), strict=True)]
    for policy in (middling(kind), middling(kind, measure="max"), ExitPolicy()):
        with Engine(own, policy, slots=3, max_prompt=9, max_new_tokens=LENGTH) as engine:
            requests = [Request(id=str(row), input_ids=ids) for row, ids in enumerate(given)]
            done = {int(one.id): one for one in engine.run(requests)}
        depths = set()
        for row, ids in enumerate(given):
            alone = own.generate(torch.tensor([ids]), policy=policy, max_new_tokens=LENGTH)
            assert list(done[row].tokens) == alone.tokens[0].tolist()
            assert list(done[row].exit_layers) == alone.exit_layers[0].tolist()
            depths |= set(alone.exit_layers[0].tolist())
        assert len(depths) > 1 or policy.is_full_model


@every_kind
def test_traces_have_the_final_head_after_the_last_layers_own(kind):
    input_ids, mask = prompts(1)
    traces = headed(kind).trace(input_ids, mask, max_new_tokens=LENGTH)
    assert traces.confidence.shape[1] == LAST + 1
    there = ~np.isnan(traces.confidence).all(0)
    assert (np.flatnonzero(there) + 1).tolist() == [2, 4, LAST, LAST + 1]
    assert traces.agrees[:, -1].all()
    full = decoder(kind).generate(input_ids, mask, max_new_tokens=LENGTH).tokens[0]
    for row in range(len(full)):
        states, _ = states_after(kind, torch.cat([input_ids, full[None, :row]], 1))
        head = heads(kind)[LAST]
        top = head.logits(states[-1]).softmax(-1).topk(2).values[0]
        assert traces.confidence[row, LAST - 1] == pytest.approx(float(top[0] - top[1]), abs=2e-5)
        assert traces.agrees[row, LAST - 1] == (int(head.said(states[-1])) == int(full[row]))


def test_thresholds_of_a_policy_with_a_last_head():
    policy = ExitPolicy(thresholds={2: 0.5, 3: 0.25}, min_layer=3)
    assert policy.exit_thresholds(3, 1).tolist() == [[math.inf, math.inf, -math.inf]]
    assert policy.exit_thresholds(3, 1, own_last=True).tolist() == [
        [math.inf, math.inf, 0.25, -math.inf]
    ]
    assert policy.exit_thresholds(3, 0, own_last=True).shape == (0, 4)


def test_a_head_laid_out_for_one_state_is_the_same_head():
    for head in (ExitHead.small(model("gpt2"), FEW), ExitHead.low_rank(model("gpt2"), 5)):
        state = torch.randn(3, head.width, generator=torch.Generator().manual_seed(0))
        turned = head.across()
        torch.testing.assert_close(turned.logits(state), head.logits(state))
        assert turned.fingerprint == head.fingerprint
        assert turned.weight.stride() == (1, len(head.weight))


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_a_policy_is_bound_to_the_heads():
    own = headed("gpt2")
    policy = middling("gpt2", head_weights=own.head_weights)
    own.generate(*prompts(1), policy=policy, max_new_tokens=2)
    fewer = EarlyExitCausalLM(model("gpt2"), heads={2: heads("gpt2")[2]})
    with pytest.raises(RiskcalError, match=r"head_weights: .*the decoder's exit heads has"):
        fewer.generate(*prompts(1), policy=policy, max_new_tokens=2)
    with pytest.raises(RiskcalError, match="head_weights: "):
        decoder("gpt2").generate(*prompts(1), policy=policy, max_new_tokens=2)


def test_thresholds_of_layers_without_a_head_are_refused():
    with pytest.raises(RiskcalError, match="layer 3 has no exit head in this decoder"):
        headed("gpt2").generate(*prompts(1), policy=ExitPolicy(thresholds={2: 0.5, 3: 0.5}))
    with pytest.raises(RiskcalError, match="layer 6 exceeds the model's 5 layers"):
        headed("gpt2").generate(*prompts(1), policy=ExitPolicy(thresholds={6: 0.5}))


def test_heads_of_other_models_are_refused():
    of = model("gpt2")
    for heads_, told in (
        ({3: ExitHead.copied(model("qwen2"))}, r"heads\[3\]: reads states of width 48.*have 32"),
        ({0: ExitHead.copied(of)}, "heads: 0 is no layer of this model; .* 1 to 5"),
        ({6: ExitHead.copied(of)}, "heads: 6 is no layer of this model"),
        (
            {3: dataclasses.replace(ExitHead.copied(of), backbone="0" * 32)},
            "trained for a model with",
        ),
        ({3: _Other(7)}, r"heads: that of layer 3 scores 7 tokens, .* vocabulary of 41"),
        ({9: _Other(VOCABULARY)}, "heads: there is one for layer 9, but .* 1 to 5"),
    ):
        with pytest.raises(RiskcalError, match=told):
            EarlyExitCausalLM(of, heads=heads_)


class _Other:
    """A head of somebody else's making."""

    ids = None

    def __init__(self, size):
        self.size = size

    def logits(self, state):
        return torch.zeros(len(state), self.size)
