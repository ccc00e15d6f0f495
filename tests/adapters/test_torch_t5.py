"""The PyTorch decoder: equal to Hugging Face when nothing exits, and to a naive early-exit decoder when something does."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_reference import (
    DECAYING,
    FULL,
    LENGTH,
    assert_row,
    ending_early,
    hugging_face,
    margin64,
    naive,
    prompts,
)

from riskcal import Constant, ExitPolicy
from riskcal_adapters.torch import EarlyExitT5
from riskcal_adapters.torch.measures import softmax_margin
from riskcal_adapters.torch.training import layer_weighted_loss, teacher_forced

# -- the full model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["at the limit", "at the end token"])
@pytest.mark.parametrize(("batch", "side"), [(1, "right"), (7, "right"), (7, "left")])
def test_full_policy_is_hugging_face_generate(tiny_t5, batch, side, ends):
    model = tiny_t5 if ends == "at the limit" else ending_early(tiny_t5)
    input_ids, mask = prompts(batch, side)
    generation = EarlyExitT5(model).generate(input_ids, mask, policy=FULL, max_new_tokens=LENGTH)
    expected = hugging_face(model, input_ids, mask)
    assert generation.tokens.equal(expected)
    real = generation.exit_layers > 0
    assert (generation.exit_layers[real] == model.config.num_decoder_layers).all()
    assert generation.confidence[real].isfinite().all()
    assert generation.confidence[~real].isnan().all()
    if ends == "at the end token" and batch > 1:
        ended = (expected == model.generation_config.eos_token_id).any(1)
        assert ended.any()
        assert not ended.all()
        assert real.sum(1).tolist() == [LENGTH if not e else row.tolist().index(model.generation_config.eos_token_id) + 1
                                        for e, row in zip(ended, expected, strict=True)]  # fmt: skip


def test_without_a_mask_all_tokens_are_real_as_for_hugging_face(tiny_t5):
    input_ids, _ = prompts(7)
    with pytest.warns(
        UserWarning, match="attention_mask: none is given, but row 1 of input_ids holds padding"
    ):
        generation = EarlyExitT5(tiny_t5).generate(input_ids, max_new_tokens=LENGTH)
    assert generation.tokens.equal(hugging_face(tiny_t5, input_ids))


def test_all_end_tokens_of_a_list_end(tiny_t5):
    ending = ending_early(tiny_t5)
    first = ending.generation_config.eos_token_id
    ending.generation_config.eos_token_id = [first, int(hugging_face(ending, *prompts(7))[1, 1])]
    generation = EarlyExitT5(ending).generate(*prompts(7), max_new_tokens=LENGTH)
    assert generation.tokens.equal(hugging_face(ending, *prompts(7)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_stay_close_to_float32(tiny_t5, dtype):
    input_ids, mask = prompts(7)
    expected = EarlyExitT5(tiny_t5).generate(input_ids, mask, max_new_tokens=1)
    other = EarlyExitT5(copy.deepcopy(tiny_t5).to(dtype)).generate(
        input_ids, mask, max_new_tokens=1
    )
    assert other.confidence.dtype == torch.float32
    tolerance = {torch.bfloat16: 0.15, torch.float16: 0.02, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(other.confidence, expected.confidence, rtol=0, atol=tolerance)


def test_the_model_is_left_as_it_was(tiny_t5):
    before = {name: weight.clone() for name, weight in tiny_t5.state_dict().items()}
    settings_before = tiny_t5.generation_config.to_dict(), tiny_t5.config.to_dict()
    decoder = EarlyExitT5(tiny_t5)
    decoder.generate(*prompts(3), policy=ExitPolicy(threshold=0.1), max_new_tokens=3)
    assert decoder.model is tiny_t5
    assert all(weight.equal(before[name]) for name, weight in tiny_t5.state_dict().items())
    assert (tiny_t5.generation_config.to_dict(), tiny_t5.config.to_dict()) == settings_before


def test_lengths_beyond_the_largest_relative_distance(tiny_t5):
    input_ids = torch.randint(2, 41, (2, 40), generator=torch.Generator().manual_seed(3))
    decoder = EarlyExitT5(tiny_t5)
    for length in (20, 40, 30):  # what is kept for one length serves the others
        generation = decoder.generate(input_ids[:, :length], max_new_tokens=length)
        assert generation.tokens.equal(
            hugging_face(tiny_t5, input_ids[:, :length], max_new_tokens=length)
        )


# -- early exits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_layer", [1, 3])
def test_threshold_zero_exits_at_the_first_allowed_layer(tiny_t5, min_layer):
    policy = ExitPolicy(threshold=0.0, min_layer=min_layer)
    generation = EarlyExitT5(tiny_t5).generate(*prompts(7), policy=policy, max_new_tokens=LENGTH)
    assert (generation.exit_layers[generation.exit_layers > 0] == min_layer).all()


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("schedule", [Constant(), DECAYING], ids=["constant", "decaying"])
@pytest.mark.parametrize("min_layer", [1, 2])
def test_agrees_with_a_naive_decoder(tiny_t5, threshold, schedule, min_layer):
    model = ending_early(tiny_t5)
    policy = ExitPolicy(threshold=threshold, schedule=schedule, min_layer=min_layer)
    decoder = EarlyExitT5(model)
    seen = set()
    for seed in range(4):
        input_ids, _ = prompts(1, seed=seed)
        generation = decoder.generate(input_ids, policy=policy, max_new_tokens=LENGTH)
        tokens, exits, confidences = naive(model, input_ids, policy)
        assert generation.tokens[0].tolist() == tokens
        assert generation.exit_layers[0].tolist() == exits
        np.testing.assert_allclose(generation.confidence[0], confidences, rtol=0, atol=1e-5)
        seen.update(exits)
    assert len(seen) > 1, "every token exited at one layer: the thresholds test nothing"


policies = st.builds(
    ExitPolicy,
    threshold=st.sampled_from([0.0, 0.03, 0.07, 0.13, 0.27, 0.55]),
    schedule=st.sampled_from([Constant(), DECAYING, dataclasses.replace(DECAYING, form="t5x")]),
    min_layer=st.integers(1, 4),
) | st.just(FULL)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.lists(policies, min_size=2, max_size=8),
    side=st.sampled_from(["left", "right"]),
    data=st.data(),
)
def test_a_row_of_a_batch_is_its_run_alone(tiny_t5, rows, side, data):
    decoder = EarlyExitT5(ending_early(tiny_t5))
    policy = rows if data.draw(st.booleans(), label="one policy per row") else rows[0]
    input_ids, mask = prompts(len(rows), side)
    together = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=LENGTH)
    assert together.tokens.shape == together.exit_layers.shape == together.confidence.shape
    for row, real in enumerate(mask.bool()):
        own = policy[row] if isinstance(policy, list) else policy
        assert_row(
            together,
            row,
            decoder.generate(input_ids[row : row + 1, real], policy=own, max_new_tokens=LENGTH),
        )


def test_exits_per_layer_sum_to_the_tokens(tiny_t5):
    model = ending_early(tiny_t5)
    generation = EarlyExitT5(model).generate(
        *prompts(8), policy=ExitPolicy(threshold=0.1), max_new_tokens=LENGTH
    )
    histogram = torch.bincount(
        generation.exit_layers.flatten(), minlength=model.config.num_decoder_layers + 1
    )
    ends = generation.tokens == model.generation_config.eos_token_id
    after_end = ends.cumsum(1) - ends.long()
    assert histogram[1:].sum() == (after_end == 0).sum()
    assert len(histogram) == model.config.num_decoder_layers + 1


def test_per_layer_thresholds_use_only_their_layers(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    static = decoder.generate(
        *prompts(5), policy=ExitPolicy(thresholds={2: 0.0}), max_new_tokens=LENGTH
    )
    assert (static.exit_layers == 2).all()
    mixed = decoder.generate(
        *prompts(5), policy=ExitPolicy(thresholds={1: 0.2, 3: 0.1}), max_new_tokens=LENGTH
    )
    assert set(mixed.exit_layers.unique().tolist()) <= {1, 3, decoder.n_layers}


def test_no_head_is_computed_where_no_exit_is_possible(tiny_t5, monkeypatch):
    decoder = EarlyExitT5(tiny_t5)
    computed = []
    head = decoder._backbone.logits
    monkeypatch.setattr(
        decoder._backbone, "logits", lambda state: computed.append(1) or head(state)
    )
    decoder.generate(*prompts(3), max_new_tokens=4)
    assert len(computed) == 4
    computed.clear()
    decoder.generate(*prompts(3), policy=ExitPolicy(thresholds={2: 5.0}), max_new_tokens=4)
    assert len(computed) == 8


# -- the copied states -------------------------------------------------------------------------------------------------


def test_keys_and_values_of_skipped_layers_are_projections_of_the_exit_state(tiny_t5):
    model, decoder = tiny_t5, EarlyExitT5(tiny_t5)
    input_ids, mask = prompts(3)
    n_layers = decoder.n_layers
    exits_at = [1, 3, 2, 1]  # whole steps at different depths; rows differ in the last one
    never = np.full((n_layers, 3), np.inf, dtype=np.float32)
    with torch.inference_mode():
        run = decoder.loop.run(ExitPolicy(threshold=0.5), input_ids, mask.bool().numpy(), LENGTH)
        cache, chosen = run.cache, [0, 0, 0]
        for depth in exits_at:
            thresholds = never.copy()
            thresholds[depth - 1] = -1.0
            step = decoder.loop.step(run, chosen, [0, 1, 2], thresholds)
            chosen, exits = step.tokens, step.exits
            assert exits == [depth] * 3
        thresholds = never.copy()
        thresholds[0, 1] = thresholds[2, 2] = -1.0
        exits = decoder.loop.step(run, chosen, [0, 1, 2], thresholds).exits
        assert exits == [n_layers, 1, 3]
        for index, block in enumerate(model.decoder.block):
            own, layer = block.layer[0].SelfAttention, cache.layers[index]
            assert layer.filled == len(exits_at) + 1
            for position, depth in enumerate(exits_at):
                if depth > index:
                    continue  # it ran this layer: its state there was another
                normed = block.layer[0].layer_norm(cache.states[position])
                keys, values = (
                    linear(normed).view(3, model.config.num_heads, -1) for linear in (own.k, own.v)
                )
                torch.testing.assert_close(layer.keys[:, :, position], keys, rtol=0, atol=1e-5)
                torch.testing.assert_close(layer.values[:, :, position], values, rtol=0, atol=1e-5)
            for row, depth in enumerate(exits):
                if depth > index:
                    continue
                normed = block.layer[0].layer_norm(cache.states[cache.position - 1][row])
                keys = own.k(normed).view(model.config.num_heads, -1)
                torch.testing.assert_close(
                    layer.keys[row, :, len(exits_at)], keys, rtol=0, atol=1e-5
                )


def test_layers_that_were_never_reached_are_never_opened(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    input_ids, mask = prompts(2)
    with torch.inference_mode():
        run = decoder.loop.run(ExitPolicy(threshold=0.5), input_ids, mask.bool().numpy(), LENGTH)
        always = np.full((decoder.n_layers, 2), -1.0, dtype=np.float32)
        decoder.loop.step(run, [0, 0], [0, 1], always)
    assert set(run.cache.layers) == {0}


# -- confidences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 50.0])
def test_confidence_is_the_float64_formula(scale):
    logits = torch.randn(200, 68, generator=torch.Generator().manual_seed(0)) * scale
    np.testing.assert_allclose(
        softmax_margin(logits), [margin64(row) for row in logits], rtol=0, atol=1e-6
    )
    assert softmax_margin(logits.double()).dtype == np.float32
    tied = torch.zeros(1, 5)
    tied[0, [1, 3]] = 4.0
    assert softmax_margin(tied).tolist() == [0.0]


def test_a_confidence_equal_to_the_threshold_exits(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    input_ids, _ = prompts(1)
    at_first = decoder.generate(
        input_ids, policy=ExitPolicy(threshold=0.0), max_new_tokens=1
    ).confidence.item()
    exactly = decoder.generate(
        input_ids, policy=ExitPolicy(thresholds={1: at_first}), max_new_tokens=1
    )
    just_above = ExitPolicy(thresholds={1: math.nextafter(at_first, 1.0)})
    assert exactly.exit_layers.item() == 1
    assert (
        decoder.generate(input_ids, policy=just_above, max_new_tokens=1).exit_layers.item()
        == decoder.n_layers
    )


def test_nan_never_exits(tiny_t5):
    broken = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    for threshold in (0.0, -1.0):
        generation = EarlyExitT5(broken).generate(
            *prompts(2), policy=ExitPolicy(threshold=threshold), max_new_tokens=3
        )
        assert (generation.exit_layers == broken.config.num_decoder_layers).all()
        assert generation.confidence.isnan().all()


def test_threshold_one_is_not_the_full_model(tiny_t5):
    certain = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        certain.decoder.final_layer_norm.weight *= 1e5
    decoder = EarlyExitT5(certain)
    one = decoder.generate(*prompts(3), policy=ExitPolicy(threshold=1.0), max_new_tokens=4)
    assert (one.confidence == 1.0).all()
    assert (one.exit_layers == 1).all()
    full = decoder.generate(*prompts(3), policy=FULL, max_new_tokens=4)
    assert (full.exit_layers == decoder.n_layers).all()


def test_ties_go_to_the_lowest_id(tiny_t5):
    tied = copy.deepcopy(tiny_t5)
    tied.lm_head.weight = torch.nn.Parameter(torch.zeros_like(tied.lm_head.weight))
    for policy in (FULL, ExitPolicy(threshold=0.0)):
        generation = EarlyExitT5(tied).generate(*prompts(3), policy=policy, max_new_tokens=3)
        assert (generation.tokens == 0).all()
        assert (generation.confidence == 0).all()


# -- traces and training -----------------------------------------------------------------------------------------------


def test_trace_is_teacher_forcing_along_the_full_path(tiny_t5):
    model = ending_early(tiny_t5)
    decoder = EarlyExitT5(model)
    input_ids, mask = prompts(5)
    names = ["e", "a", "d", "c", "b"]
    traces = decoder.trace(input_ids, mask, max_new_tokens=LENGTH, prompts=names)
    generation = decoder.generate(input_ids, mask, max_new_tokens=LENGTH)
    lengths = (generation.exit_layers > 0).sum(1).tolist()
    assert len(traces.prompt) == sum(lengths)
    with torch.inference_mode():
        shifted = torch.nn.functional.pad(generation.tokens[:, :-1], (1, 0))
        logits = teacher_forced(model, input_ids, mask, shifted)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        mine = np.flatnonzero(np.asarray(traces.prompt) == name)
        mine = mine[np.argsort(traces.position[mine])]
        assert traces.position[mine].tolist() == list(range(length))
        expected = np.array(
            [[margin64(logits[i, row, t]) for i in range(decoder.n_layers)] for t in range(length)]
        )
        np.testing.assert_allclose(traces.confidence[mine], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            traces.confidence[mine, -1], generation.confidence[row, :length], rtol=0, atol=1e-6
        )
        best = logits[:, row, :length].argmax(-1).T
        np.testing.assert_array_equal(
            traces.agrees[mine], best == generation.tokens[row, :length, None]
        )


def test_threshold_never_reached_trains_as_the_plain_loss(tiny_t5):
    input_ids, mask = prompts(4)
    targets = torch.randint(2, 41, (4, 6), generator=torch.Generator().manual_seed(1))
    shifted = torch.nn.functional.pad(targets[:, :-1], (1, 0))
    with torch.inference_mode():
        plain = teacher_forced(tiny_t5, input_ids, mask, shifted)
        aware = teacher_forced(tiny_t5, input_ids, mask, shifted, threshold=2.0)
        loss = tiny_t5(input_ids=input_ids, attention_mask=mask, labels=targets)
    torch.testing.assert_close(plain[-1], loss.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        layer_weighted_loss(aware, targets), layer_weighted_loss(plain, targets), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        layer_weighted_loss(plain[-1:], targets), loss.loss, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_exit_aware_training_sees_what_decoding_sees(tiny_t5, threshold):
    decoder = EarlyExitT5(tiny_t5)
    input_ids, mask = prompts(5)
    generation = decoder.generate(
        input_ids, mask, policy=ExitPolicy(threshold=threshold), max_new_tokens=LENGTH
    )
    with torch.inference_mode():
        shifted = torch.nn.functional.pad(generation.tokens[:, :-1], (1, 0))
        logits = teacher_forced(tiny_t5, input_ids, mask, shifted, threshold=threshold)
    margins = softmax_margin(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape[:3])
    margins[-1] = np.inf  # the last layer always accepts
    first = (margins >= threshold).argmax(0)
    assert (generation.exit_layers.numpy() == first + 1).all()
    at_exit = np.take_along_axis(logits.numpy(), first[None, ..., None], 0)[0]
    assert (generation.tokens.numpy() == at_exit.argmax(-1)).all()
    assert len(np.unique(first)) > 1


# -- other devices -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_decodes_as_the_cpu(tiny_t5):
    on_gpu = EarlyExitT5(copy.deepcopy(tiny_t5).cuda())
    for policy in (FULL, ExitPolicy(threshold=0.1)):
        expected = EarlyExitT5(tiny_t5).generate(*prompts(7), policy=policy, max_new_tokens=LENGTH)
        generation = on_gpu.generate(*prompts(7), policy=policy, max_new_tokens=LENGTH)
        assert generation.tokens.is_cuda
        assert generation.tokens.cpu().equal(expected.tokens)
        assert generation.exit_layers.cpu().equal(expected.exit_layers)
