"""What an early-exit T5 is, in PyTorch and in JAX by the same tests: the loop, its threshold, measures, heads and cache."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from exit_reference import (
    CLASSIFIER,
    OF_LOGITS,
    Reference,
    assert_same,
    cosine,
    expected,
    truncated,
)
from frameworks import FRAMEWORKS, confidence_of_logits, cosine_of_states, decoder
from t5_reference import DECAYING, FULL, LENGTH, hugging_face, margin64, prompts

from riskcal import Constant, Decaying, ExitPolicy

pytestmark = pytest.mark.usefixtures("barely_optimized")

#: A threshold for each measure at which some tokens of the tiny models exit early and some late.
THRESHOLDS = {
    "softmax": 0.3,
    "max": 0.4,
    "entropy": -1.7,
    "state": 0.8,
    "classifier": 0.5,
    "oracle": 1.0,
}
#: Rows of all batches here: few sizes, few programs to compile.
ROWS = 4


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture(scope="module")
def defined(ending):
    """Rows by the definition, decoded once for both frameworks."""
    known = {}

    def rows(policy):
        key = policy.model_dump_json()
        if key not in known:
            known[key] = expected(ending, policy, CLASSIFIER, ROWS)
        return known[key]

    return rows


def generate(framework, model, policy, rows=ROWS, side="right", seed=0):
    return decoder(framework, model).generate(
        *prompts(rows, side, seed), policy=policy, max_new_tokens=LENGTH
    )


def array(values):
    return np.asarray(values)


def differs(generation, rows, least=1e-3):
    """Whether a generation is not what these rows of a reference are."""
    for i, row in enumerate(rows):
        size = len(row.tokens)
        if array(generation.tokens)[i, :size].tolist() != row.tokens:
            return True
        if np.abs(array(generation.confidence)[i, :size] - row.confidences).max() > least:
            return True
    return False


# -- 1: the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_row_1_disabled_it_is_plain_generation(framework, ending, side):
    generation = generate(framework, ending, FULL, side=side)
    np.testing.assert_array_equal(generation.tokens, hugging_face(ending, *prompts(ROWS, side)))
    real = array(generation.exit_layers) > 0
    assert (array(generation.exit_layers)[real] == ending.config.num_decoder_layers).all()
    assert np.isnan(array(generation.confidence)[~real]).all()
    # whatever else the policy says
    state = generate(framework, ending, ExitPolicy(measure="state", min_layer=2), side=side)
    np.testing.assert_array_equal(state.confidence, generation.confidence)


@pytest.mark.parametrize("min_layer", [1, 3])
def test_row_1_at_threshold_0_all_exit_at_the_first_allowed_layer(framework, tiny_t5, min_layer):
    exits = array(
        generate(framework, tiny_t5, ExitPolicy(threshold=0.0, min_layer=min_layer)).exit_layers
    )
    assert (exits == min_layer).all()


def test_row_1_exits_per_layer_sum_to_the_tokens(framework, ending):
    generation = generate(framework, ending, ExitPolicy(threshold=0.1))
    ends = array(generation.tokens) == ending.generation_config.eos_token_id
    after_end = ends.cumsum(1) - ends
    histogram = np.bincount(
        array(generation.exit_layers).ravel(), minlength=ending.config.num_decoder_layers + 1
    )
    assert histogram[1:].sum() == (after_end == 0).sum()
    assert histogram[0] == (after_end > 0).sum()


# -- 2: the threshold --------------------------------------------------------------------------------------------------


def test_row_2_a_confidence_equal_to_the_threshold_exits(framework, tiny_t5):
    at_first = float(array(generate(framework, tiny_t5, ExitPolicy.static(1)).confidence)[0, 0])
    exactly = generate(framework, tiny_t5, ExitPolicy(thresholds={1: at_first}))
    above = generate(framework, tiny_t5, ExitPolicy(thresholds={1: math.nextafter(at_first, 1.0)}))
    assert int(exactly.exit_layers[0, 0]) == 1
    assert int(above.exit_layers[0, 0]) == tiny_t5.config.num_decoder_layers
    assert float(above.refused[0, 0]) == at_first


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_row_2_nan_never_exits(framework, tiny_t5, threshold):
    broken = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    generation = generate(framework, broken, ExitPolicy(threshold=threshold))
    assert (array(generation.exit_layers)[:, 0] == broken.config.num_decoder_layers).all()
    assert np.isnan(array(generation.confidence)[:, 0]).all()
    assert np.isneginf(array(generation.refused)[:, 0]).all()


def test_row_2_threshold_1_is_not_the_full_model(framework, tiny_t5):
    certain = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        certain.decoder.final_layer_norm.weight *= 1e5
    one = generate(framework, certain, ExitPolicy(threshold=1.0))
    assert (array(one.confidence) == 1.0).all()
    assert (array(one.exit_layers) == 1).all()
    full = generate(framework, certain, FULL)
    assert (array(full.exit_layers) == certain.config.num_decoder_layers).all()


# -- 3: measures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_LOGITS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 60.0])
def test_row_3_measures_of_logits_are_the_float64_formulas(framework, name, scale):
    logits = np.random.default_rng(0).normal(size=(60, 68)).astype(np.float32) * np.float32(scale)
    logits[::3, 5:40] = -math.inf
    logits[1::3, 3] = logits[1::3].max(1)  # ties
    exact = [OF_LOGITS[name](row) for row in logits]
    measured = confidence_of_logits(framework, name, logits)
    assert measured.dtype == np.float32
    np.testing.assert_allclose(measured, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e5])
def test_row_3_the_state_measure_is_each_rows_own_cosine(framework, scale):
    rng = np.random.default_rng(0)
    # rows of very different lengths: a norm over the whole batch would give the short ones 0
    before, state = rng.normal(size=(2, 30, 64)) * scale * np.logspace(-4, 4, 30)[:, None]
    before[10:20] = state[10:20] + 0.01 * before[10:20]
    before[25], state[26] = 0.0, 0.0
    before, state = before.astype(np.float32), state.astype(np.float32)
    exact = [cosine(a, b) for a, b in zip(state, before, strict=True)]
    np.testing.assert_allclose(cosine_of_states(framework, before, state), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("measure", THRESHOLDS)
def test_row_3_every_measure_decodes_as_by_the_definition(framework, ending, measure, defined):
    policy = ExitPolicy(threshold=THRESHOLDS[measure], measure=measure)
    exits = assert_same(generate(framework, ending, policy), defined(policy))
    assert len(set(exits)) > 1, "every token exited at one layer: the threshold tests nothing"


def test_row_3_the_state_measure_is_0_at_layer_1(framework, tiny_t5):
    assert (
        array(generate(framework, tiny_t5, ExitPolicy.static(1, measure="state")).confidence) == 0
    ).all()


def test_row_3_rows_of_a_batch_are_as_if_alone(framework, ending):
    asked = [
        ExitPolicy(threshold=THRESHOLDS[name], measure=name)
        for name in ("softmax", "entropy", "state", "classifier")
    ]
    made = decoder(framework, ending)
    input_ids, mask = prompts(ROWS)
    together = made.generate(input_ids, mask, policy=asked, max_new_tokens=LENGTH)
    for row, policy in enumerate(asked):
        alone = made.generate(
            input_ids[row : row + 1, mask[row].bool()], policy=policy, max_new_tokens=LENGTH
        )
        size = alone.tokens.shape[1]
        np.testing.assert_array_equal(together.tokens[row, :size], alone.tokens[0])
        np.testing.assert_array_equal(together.exit_layers[row, :size], alone.exit_layers[0])
        np.testing.assert_allclose(
            together.confidence[row, :size], alone.confidence[0], rtol=0, atol=1e-5
        )
        assert not array(together.exit_layers)[row, size:].any()


# -- 4: the head -------------------------------------------------------------------------------------------------------


def test_row_4_the_last_logits_are_the_models(framework, ending):
    generation = generate(framework, ending, FULL)
    tokens, real = torch.as_tensor(array(generation.tokens)), array(generation.exit_layers) > 0
    input_ids, mask = prompts(ROWS)
    with torch.inference_mode():
        shifted = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
        logits = ending(input_ids=input_ids, attention_mask=mask, decoder_input_ids=shifted).logits
    exact = [margin64(row) for row in logits[torch.as_tensor(real)]]
    np.testing.assert_allclose(array(generation.confidence)[real], exact, rtol=0, atol=1e-5)


class WithoutNorm(Reference):
    def logits(self, state):
        return self.model.lm_head(state)[0, 0].numpy()


class OtherScale(Reference):
    def logits(self, state):
        width = self.model.config.d_model
        return super().logits(state) * (
            width**0.5 if self.model.config.scale_decoder_outputs else width**-0.5
        )


@pytest.mark.parametrize("control", [WithoutNorm, OtherScale])
def test_row_4_heads_of_early_layers_have_the_norm_and_the_scale(framework, ending, control):
    policy = ExitPolicy.static(2)
    generation = generate(framework, ending, policy)
    input_ids, mask = prompts(ROWS)
    real = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
    assert_same(generation, Reference(ending).generate(real, policy))
    assert differs(generation, control(ending).generate(real, policy))


# -- 5: decay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["paper", "t5x"])
def test_row_5_thresholds_decay_with_the_position(framework, ending, form, defined):
    min_layer = 2
    policy = ExitPolicy(
        threshold=0.3, schedule=dataclasses.replace(DECAYING, form=form), min_layer=min_layer
    )
    generation = generate(framework, ending, policy)
    exits = assert_same(generation, defined(policy))
    assert len(set(exits)) > 1
    needed = policy.exit_thresholds(ending.config.num_decoder_layers, LENGTH)
    assert (np.diff(needed[:, min_layer - 1]) < 0).all()
    for row, position in zip(*np.nonzero(array(generation.exit_layers)), strict=True):
        assert (
            generation.confidence[row, position]
            >= needed[position, int(generation.exit_layers[row, position]) - 1]
        )
        assert generation.refused[row, position] < needed[position, min_layer - 1]


def test_row_5_at_tau_0_only_the_released_code_has_the_constant_threshold(framework, ending):
    threshold = 0.2
    flat, code, paper = (
        generate(framework, ending, ExitPolicy(threshold=threshold, schedule=schedule))
        for schedule in (Constant(), Decaying(0.0, LENGTH, form="t5x"), Decaying(0.0, LENGTH))
    )
    np.testing.assert_array_equal(code.exit_layers, flat.exit_layers)
    assert array(paper.exit_layers).tolist() != array(flat.exit_layers).tolist()


# -- 6: what skipped layers are given ----------------------------------------------------------------------------------


def test_row_6_skipped_layers_get_projections_of_the_exit_state(framework, ending, defined):
    policy = ExitPolicy(threshold=0.25, min_layer=2)
    generation = generate(framework, ending, policy)
    exits = assert_same(generation, defined(policy))
    assert len(set(exits)) > 1
    for wrong in ("copy", "first"):
        assert differs(generation, defined(policy.model_copy(update={"cache": wrong})))


# -- 7: the oracle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_layer", [1, 2])
def test_row_7_the_oracle_exits_at_the_first_layer_that_says_what_the_last_would(
    framework, ending, min_layer, defined
):
    policy = ExitPolicy(threshold=1.0, measure="oracle", min_layer=min_layer)
    generation = generate(framework, ending, policy)
    exits = assert_same(generation, defined(policy))
    assert len(set(exits)) > 1
    # the last layer's token on the very cache that the exits left behind
    last = defined(policy.model_copy(update={"emits": "last"}))
    for i, row in enumerate(last):
        assert array(generation.tokens)[i, : len(row.tokens)].tolist() == row.tokens


# -- 8: static depth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 3])
def test_row_8_a_static_exit_is_the_truncated_model(framework, ending, layer):
    generation = generate(framework, ending, ExitPolicy.static(layer))
    np.testing.assert_array_equal(
        generation.tokens, hugging_face(truncated(ending, layer), *prompts(ROWS))
    )
    exits = array(generation.exit_layers)
    assert set(exits[exits > 0].tolist()) == {layer}
