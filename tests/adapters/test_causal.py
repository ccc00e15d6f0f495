"""`EarlyExitCausalLM`: the full model token for token, exits by the definition, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from causal_models import (
    END,
    KINDS,
    LENGTH,
    VOCABULARY,
    assert_rows_as_alone,
    decoder,
    hugging_face,
    model,
    prompts,
)

from riskcal import Decaying, ExitPolicy, RiskcalError, Sampling
from riskcal_adapters.torch import EarlyExitCausalLM

every_kind = pytest.mark.parametrize("kind", KINDS)


def middling(kind, quantile=0.7, **fields):
    """A policy under which some tokens exit, and at many layers."""
    traces = decoder(kind).trace(*prompts(4), max_new_tokens=LENGTH, policy=ExitPolicy(**fields))
    return ExitPolicy(
        threshold=float(np.nanquantile(traces.confidence[:, :-1], quantile)), **fields
    )


@every_kind
@pytest.mark.parametrize("batch", [1, 7])
def test_the_full_policy_is_generate(kind, batch):
    input_ids, mask = prompts(batch)
    generation = decoder(kind).generate(input_ids, mask, max_new_tokens=LENGTH)
    assert generation.tokens.tolist() == hugging_face(model(kind), input_ids, mask).tolist()
    right, right_mask = prompts(batch, "right")
    assert (
        decoder(kind)
        .generate(right, right_mask, max_new_tokens=LENGTH)
        .tokens.equal(generation.tokens)
    )
    assert len(generation.tokens.unique()) > 3


@every_kind
def test_rows_end_at_any_of_several_end_tokens(kind):
    ending = copy.deepcopy(model(kind))
    said = hugging_face(ending, *prompts(7))
    ends = [END, *said[:, 2:5].flatten().unique().tolist()[:2]]
    ending.generation_config.eos_token_id = ends
    generation = EarlyExitCausalLM(ending).generate(*prompts(7), max_new_tokens=LENGTH)
    assert generation.tokens.tolist() == hugging_face(ending, *prompts(7)).tolist()
    assert (generation.exit_layers == 0).any()


@every_kind
@pytest.mark.parametrize("batching", ["diverge", "regroup"])
def test_rows_of_a_batch_are_as_alone(kind, batching):
    generation = assert_rows_as_alone(decoder(kind), middling(kind, batching=batching), batch=5)
    assert len(generation.exit_layers.unique()) >= 4


@every_kind
def test_exits_at_a_layer_are_the_lens_on_its_state(kind):
    """Static depth 2 from the start: the token is the final norm and head on the second block's output."""
    own, of = decoder(kind), model(kind)
    input_ids, mask = prompts(1)
    first = own.generate(input_ids, mask, policy=ExitPolicy.static(2), max_new_tokens=1)
    with torch.no_grad():
        state = of(input_ids, output_hidden_states=True).hidden_states[2][:, -1]
        norm = of.transformer.ln_f if kind == "gpt2" else of.model.norm
        logits = of.lm_head(norm(state))
    assert first.tokens.tolist() == [[int(logits.argmax())]]
    top = torch.softmax(logits, -1).topk(2).values[0]
    np.testing.assert_allclose(first.confidence, [[top[0] - top[1]]], atol=1e-5)


@every_kind
def test_keys_and_values_of_skipped_layers_are_projections_of_the_exit_state(kind):
    own, of = decoder(kind), model(kind)
    input_ids, mask = prompts(3)
    never = np.full((own.n_layers, 3), np.inf, dtype=np.float32)
    with torch.inference_mode():
        run = own.loop.run(ExitPolicy(threshold=0.5), input_ids, mask.bool().numpy(), LENGTH)
        chosen = run.cache.first
        depths = [1, 3, 2, own.n_layers]
        for depth in depths:
            thresholds = never.copy()
            thresholds[depth - 1] = -1.0
            step = own.loop.step(run, chosen, [0, 1, 2], thresholds)
            assert step.exits == [depth] * 3
            chosen = step.tokens
        cache = run.cache
        for index in range(own.n_layers):
            layer = cache.layers[index]
            for position, depth in enumerate(depths):
                if depth > index:
                    continue
                column = cache.offset + position
                places = torch.tensor(column - cache.prompt.padding)
                keys, values = projected(of, kind, index, cache.states[position], places)
                torch.testing.assert_close(layer.keys[:, :, column], keys, rtol=0, atol=1e-5)
                torch.testing.assert_close(layer.values[:, :, column], values, rtol=0, atol=1e-5)


def projected(of, kind, index, state, places):
    """Keys and values (B, heads, d_kv) by Hugging Face's modules."""
    if kind == "gpt2":
        block = of.transformer.h[index]
        _, keys, values = block.attn.c_attn(block.ln_1(state)).split(32, -1)
        return keys.view(3, 4, -1), values.view(3, 4, -1)
    block = of.model.layers[index]
    normed, attention = block.input_layernorm(state), block.self_attn
    keys, values = (
        linear(normed).view(3, -1, 8) for linear in (attention.k_proj, attention.v_proj)
    )
    if kind == "qwen3":
        keys = attention.k_norm(keys)
    cosines, sines = of.model.rotary_emb(keys, places[:, None])
    turned = torch.cat([-keys[..., 4:], keys[..., :4]], -1)
    return keys * cosines + turned * sines, values


@every_kind
@pytest.mark.parametrize(
    "fields",
    [
        {"cache": "deferred"},
        {"cache": "recompute"},
        {"cache": "deferred", "max_pending": 2},
        {"measure": "entropy"},
        {"measure": "state"},
        {"measure": "jsd"},
        {"measure": "oracle"},
        {"emits": "last"},
        {"sampling": Sampling(seed=3)},
        {"schedule": Decaying(temperature=4.0, max_length=LENGTH)},
    ],
    ids=str,
)
def test_every_mechanism_gives_rows_as_alone(kind, fields):
    policy = (
        middling(kind, **fields)
        if "schedule" not in fields
        else ExitPolicy(threshold=0.3, **fields)
    )
    assert_rows_as_alone(decoder(kind), policy, batch=3)


@every_kind
def test_exact_caches_are_those_of_a_model_that_never_exits(kind):
    """With the last layer's tokens emitted whatever the exits, exact caches give the full model's tokens."""
    policy = middling(kind, cache="deferred", emits="last")
    own = decoder(kind)
    generation = own.generate(*prompts(5), policy=policy, max_new_tokens=LENGTH)
    assert generation.tokens.equal(own.generate(*prompts(5), max_new_tokens=LENGTH).tokens)
    assert (generation.exit_layers < own.n_layers).any()


@every_kind
def test_speculation_is_the_full_model(kind):
    own = decoder(kind)
    for length in ("adaptive", 3):
        drafted = own.speculate(
            *prompts(4), draft_layer=3, draft_length=length, max_new_tokens=LENGTH
        )
        assert drafted.tokens.equal(own.generate(*prompts(4), max_new_tokens=LENGTH).tokens)


@every_kind
def test_traces_hold_what_every_layer_says_along_the_full_models_path(kind):
    own = decoder(kind)
    input_ids, mask = prompts(3)
    traces = own.trace(input_ids, mask, max_new_tokens=6)
    assert traces.confidence.shape == (18, own.n_layers)
    of = model(kind)
    whole = torch.cat(
        [input_ids[:1], own.generate(input_ids, mask, max_new_tokens=6).tokens[:1]], 1
    )
    with torch.no_grad():
        hidden = of(whole, output_hidden_states=True).hidden_states
        norm = of.transformer.ln_f if kind == "gpt2" else of.model.norm
        for layer in range(1, own.n_layers):
            logits = of.lm_head(norm(hidden[layer][0, 8:14]))
            top = torch.softmax(logits, -1).topk(2)
            rows = traces.prompt == 0
            np.testing.assert_allclose(
                traces.confidence[rows, layer - 1],
                top.values[:, 0] - top.values[:, 1],
                atol=2e-5,
            )
            agrees = (logits.argmax(-1) == whole[0, 9:]).numpy()
            assert traces.agrees[rows, layer - 1].tolist() == agrees.tolist()


def test_prompts_of_one_token_and_policies_per_row():
    own = decoder("llama-grouped")
    policies = [ExitPolicy.static(layer) for layer in (1, 3, 2)]
    tokens = torch.tensor([[5], [6], [7]])
    generation = own.generate(tokens, policy=policies, max_new_tokens=4)
    assert generation.exit_layers.tolist() == [[1] * 4, [3] * 4, [2] * 4]
    for row in range(3):
        alone = own.generate(tokens[row : row + 1], policy=policies[row], max_new_tokens=4)
        assert generation.tokens[row].tolist() == alone.tokens[0].tolist()


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_sliding_windows_and_learned_positions_limit_the_length():
    of, config, sizes = KINDS["mistral"]
    windowed = EarlyExitCausalLM(of(config(**sizes | {"sliding_window": 16})).eval())
    tokens = torch.randint(2, VOCABULARY, (1, 10))
    windowed.generate(tokens, max_new_tokens=7)
    with pytest.raises(
        RiskcalError, match=r"10 tokens and 8 more do not fit into the 16.*at most 7"
    ):
        windowed.generate(tokens, max_new_tokens=8)
    with pytest.raises(RiskcalError, match="64 positions"):
        decoder("gpt2").generate(tokens, max_new_tokens=60)


def test_a_changed_forward_is_refused():
    hooked = copy.deepcopy(model("qwen2"))
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out * 1.1)
    with pytest.raises(RiskcalError, match=r"other logits .*model.layers.1.mlp has a forward hook"):
        EarlyExitCausalLM(hooked)


def test_other_models_and_generation_configs_are_refused():
    with pytest.raises(RiskcalError, match="GPT2LMHeadModel"):
        EarlyExitCausalLM(torch.nn.Linear(2, 2))
    penalised = copy.deepcopy(model("gpt2"))
    penalised.generation_config.repetition_penalty = 1.1
    with pytest.raises(RiskcalError, match="repetition_penalty"):
        EarlyExitCausalLM(penalised)
    drawn = copy.deepcopy(model("gpt2"))
    drawn.generation_config.do_sample = True
    assert EarlyExitCausalLM(drawn).n_layers == 5


def test_a_policy_is_bound_to_the_weights_and_settings():
    one, other = decoder("llama-grouped"), decoder("llama-tied")
    policy = ExitPolicy(threshold=0.5, weights=one.weights, dtype=one.dtype)
    one.generate(*prompts(2), policy=policy, max_new_tokens=2)
    with pytest.raises(RiskcalError, match="made for weights"):
        other.generate(*prompts(2), policy=policy, max_new_tokens=2)
    bound = ExitPolicy(threshold=0.5, config=one.settings)
    with pytest.raises(RiskcalError, match="config: "):
        other.generate(*prompts(2), policy=bound, max_new_tokens=2)
