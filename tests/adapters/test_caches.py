"""What later tokens see of a token in the layers that it skipped: exact caches, the projection, and the negative controls."""

import numpy as np
import pytest
import torch
from exit_reference import CLASSIFIER, assert_agrees, middling
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_reference import FULL, LENGTH, hugging_face, margin64, prompts
from transformers import DynamicCache, EncoderDecoderCache

from riskcal import ExitPolicy
from riskcal_adapters.torch import EarlyExitT5

EXACT = ("deferred", "recompute")


def generated(model, policy, input_ids, mask, length=LENGTH):
    """A generation, and the cache that it leaves; its ``rows`` are those of the batch that it still holds."""
    decoder, caches = EarlyExitT5(model, classifier=CLASSIFIER), []
    make = decoder.loop.run

    def run(*given):
        made = make(*given)
        cache, keep = made.cache, made.cache.keep
        cache.rows = torch.arange(cache.batch)

        def keeping(rows, numbers):
            cache.rows = cache.rows[rows]
            keep(rows, numbers)

        cache.keep = keeping
        caches.append(cache)
        return made

    decoder.loop.run = run
    return decoder.generate(input_ids, mask, policy=policy, max_new_tokens=length), caches[0]


@torch.inference_mode()
def full_pass(model, input_ids, mask, tokens):
    """Hugging Face's keys and values (per layer) of a pass over tokens that are given, and all its states and logits."""
    return model(
        input_ids=input_ids,
        attention_mask=mask,
        decoder_input_ids=torch.nn.functional.pad(tokens[:, :-1], (1, 0)),
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        use_cache=True,
        output_hidden_states=True,
    )


# -- exact caches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", EXACT)
@pytest.mark.parametrize("measure", ["softmax", "state", "oracle"])
def test_row_31_exact_caches_hold_the_full_passes_keys_and_values(ending, cache, measure):
    input_ids, mask = prompts(4, "left")
    policy = middling(ending, measure=measure, cache=cache)
    generation, kept = generated(ending, policy, input_ids, mask)
    assert len(generation.exit_layers.unique()) > 2
    exact = full_pass(
        ending, input_ids, mask, generation.tokens
    ).past_key_values.self_attention_cache
    assert 0 in kept.layers
    for index, own in kept.layers.items():
        assert own.filled > 0
        for mine, theirs in (
            (own.keys, exact.layers[index].keys),
            (own.values, exact.layers[index].values),
        ):
            theirs = theirs[kept.rows, :, : own.filled]
            torch.testing.assert_close(mine[:, :, : own.filled], theirs, rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    measure=st.sampled_from(["softmax", "max", "entropy", "state", "classifier", "jsd"]),
    seed=st.integers(0, 99),
    max_pending=st.sampled_from([None, 1, 3]),
    side=st.sampled_from(["left", "right"]),
)
def test_row_31_recomputing_and_deferring_generate_the_same(
    ending, measure, seed, max_pending, side
):
    policy = middling(ending, measure=measure, max_pending=max_pending, cache="deferred")
    decoder = EarlyExitT5(ending, classifier=CLASSIFIER)
    given_ = prompts(3, side, seed)
    one, other = (
        decoder.generate(
            *given_, policy=policy.model_copy(update={"cache": cache}), max_new_tokens=8
        )
        for cache in EXACT
    )
    assert one.tokens.equal(other.tokens)
    assert one.exit_layers.equal(other.exit_layers)
    torch.testing.assert_close(one.confidence, other.confidence, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("cache", EXACT)
def test_row_31_decoding_with_exact_caches_is_the_definition(ending, cache):
    assert len(set(assert_agrees(ending, middling(ending, cache=cache)))) > 2


@pytest.mark.parametrize("cache", EXACT)
def test_row_24_layers_that_nothing_reached_are_not_run(tiny_t5, cache):
    _, kept = generated(tiny_t5, ExitPolicy.static(2, cache=cache), *prompts(3), length=5)
    assert set(kept.layers) == {0, 1}
    assert kept.layers[1].filled == 5


@pytest.mark.parametrize("shallow", [1, 2])
def test_row_24_shallow_deep_decoding_is_frees_law(ending, shallow):
    """FREE, section 3.2: one exit; its deep layers see exact states of all earlier tokens. Naively: a full pass per token."""
    margins = EarlyExitT5(ending).trace(*prompts(3), max_new_tokens=6).confidence[:, shallow - 1]
    threshold = float(np.median(margins)) + 1e-4
    policy = ExitPolicy(thresholds={shallow: threshold}, cache="deferred")
    exits = set()
    for seed in range(3):
        input_ids, _ = prompts(1, seed=seed)
        generation = EarlyExitT5(ending).generate(input_ids, policy=policy, max_new_tokens=8)
        tokens, layers = [], []
        for _ in range(generation.tokens.shape[1]):
            passed = full_pass(ending, input_ids, None, torch.tensor([[*tokens, 0]]))
            config = ending.config
            normed = ending.decoder.final_layer_norm(passed.decoder_hidden_states[shallow][0, -1])
            early = ending.lm_head(
                normed * config.d_model**-0.5 if config.scale_decoder_outputs else normed
            ).detach()
            leaves = margin64(early) >= threshold
            tokens.append(int((early if leaves else passed.logits[0, -1]).argmax()))
            layers.append(shallow if leaves else config.num_decoder_layers)
        assert generation.tokens[0].tolist() == tokens
        assert generation.exit_layers[0].tolist() == layers
        exits.update(layers)
    assert len(exits) == 2


@pytest.mark.parametrize("cache", EXACT)
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_row_24_a_full_pass_after_so_many_exits_in_a_row(tiny_t5, cache, limit):
    policy = ExitPolicy(threshold=-9.0, cache=cache, max_pending=limit)
    generation, kept = generated(tiny_t5, policy, *prompts(3))
    n_layers = tiny_t5.config.num_decoder_layers
    pattern = ([1] * limit + [n_layers]) * LENGTH
    assert generation.exit_layers.tolist() == [pattern[:LENGTH]] * 3
    assert kept.layers[n_layers - 1].filled == LENGTH - LENGTH % (limit + 1)
    forced = generation.exit_layers == n_layers
    assert generation.refused[forced].isneginf().all(), "a forced pass looks at nothing"


@pytest.mark.parametrize("cache", EXACT)
def test_row_24_full_passes_are_each_rows_own(ending, cache):
    policy = middling(ending, cache=cache, max_pending=2)
    assert len(set(assert_agrees(ending, policy, batch=4, length=8))) > 2


# -- the projection and its negative controls ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_row_6_copies_are_the_exit_layers_own_keys_and_values(tiny_t5, depth):
    n_layers = tiny_t5.config.num_decoder_layers
    policy = ExitPolicy.static(depth, cache="copy")
    _, kept = generated(tiny_t5, policy, *prompts(1), length=4)
    for index in range(depth, n_layers):
        own, source = kept.layers[index], kept.layers[depth - 1]
        assert own.filled == 4
        assert own.keys[:, :, :4].equal(source.keys[:, :, :4])
        assert own.values[:, :, :4].equal(source.values[:, :, :4])


@pytest.mark.parametrize("cache", ["project", "copy", "first"])
def test_row_6_decoding_with_each_cache_is_its_definition(ending, cache):
    policy = middling(ending, cache=cache)
    assert len(set(assert_agrees(ending, policy, length=10))) > 2


def test_row_6_the_controls_differ_from_the_projection(tiny_t5):
    """Depths 2 and L in turn, so that the last layer looks back at positions that left at 2."""
    policy = ExitPolicy(thresholds={2: -9.0}, cache="project")
    confidences = {}
    for cache in ("project", "copy", "first", "deferred"):
        decoder = EarlyExitT5(tiny_t5)
        input_ids, mask = prompts(1)
        with torch.inference_mode():
            run = decoder.loop.run(
                policy.model_copy(update={"cache": cache}), input_ids, mask.bool().numpy(), 4
            )
            table = policy.exit_thresholds(decoder.n_layers, 1)[0, :, None]
            for token in (5, 9, 17):
                assert decoder.loop.step(run, [token], [0], table).exits == [2]
            step = decoder.loop.step(
                run, [3], [0], FULL.exit_thresholds(decoder.n_layers, 1)[0, :, None]
            )
        confidences[cache] = step.confidence[0]
    values = list(confidences.values())
    apart = np.abs(np.subtract.outer(values, values))[np.triu_indices(4, 1)]
    assert apart.min() > 1e-4, confidences


def test_row_6_caches_do_not_matter_where_nothing_exits(ending):
    expected = hugging_face(ending, *prompts(3))
    for cache in ("project", "deferred", "recompute", "copy", "first"):
        never = ExitPolicy(threshold=9.0, cache=cache)
        generation = EarlyExitT5(ending).generate(*prompts(3), policy=never, max_new_tokens=LENGTH)
        assert generation.tokens.equal(expected)
