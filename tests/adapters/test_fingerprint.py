"""The name of a model's weights: of their values, whatever their file's type, order and copies."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_reference import LENGTH, prompts
from transformers import T5ForConditionalGeneration

from riskcal import ExitPolicy, RiskcalError
from riskcal_adapters import fingerprint
from riskcal_adapters.torch import EarlyExitT5


def entries(model):
    return {name: weight.float().numpy() for name, weight in model.state_dict().items()}


def test_it_is_32_hexadecimal_digits_of_the_decoders_weights(tiny_t5):
    name = EarlyExitT5(tiny_t5).weights
    assert len(name) == 32
    assert int(name, 16) > 0
    assert name == fingerprint.of_weights(entries(tiny_t5).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_short_file_has_the_name_of_its_values_in_float32(tiny_t5, dtype):
    short = copy.deepcopy(tiny_t5).to(dtype)
    widened = copy.deepcopy(short).float()
    assert EarlyExitT5(short).weights == EarlyExitT5(widened).weights
    assert EarlyExitT5(short).weights != EarlyExitT5(tiny_t5).weights, (
        "rounded weights are other weights"
    )
    wide = copy.deepcopy(tiny_t5).double()
    assert EarlyExitT5(wide).weights == EarlyExitT5(tiny_t5).weights


def test_it_survives_a_file(tiny_t5, tmp_path):
    tiny_t5.save_pretrained(tmp_path)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path)
    # the library ties heads on loading whatever the config says
    if not tiny_t5.config.tie_word_embeddings:
        again.lm_head.weight = torch.nn.Parameter(tiny_t5.lm_head.weight.clone())
    assert EarlyExitT5(again).weights == EarlyExitT5(tiny_t5).weights


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_one_weight_changes_it_and_order_does_not(tiny_t5, data):
    weights = entries(tiny_t5)
    before = fingerprint.of_weights(weights.items())
    shuffled = data.draw(st.permutations(sorted(weights)))
    assert fingerprint.of_weights([(name, weights[name]) for name in shuffled]) == before
    name = data.draw(st.sampled_from(sorted(weights)))
    changed = dict(weights) | {name: weights[name].copy()}
    place = data.draw(st.integers(0, weights[name].size - 1))
    flat = changed[name].reshape(-1)
    flat[place] = np.nextafter(flat[place], np.float32(np.inf))
    assert fingerprint.of_weights(changed.items()) != before


def test_copies_of_the_embedding_may_be_there_or_not():
    generator = np.random.default_rng(0)
    weights = {
        name: generator.normal(size=(3, 4)).astype("<f4")
        for name in ("shared.weight", "decoder.x.weight")
    }
    before = fingerprint.of_weights(weights.items())
    names = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    copies = dict.fromkeys(names, weights["shared.weight"])
    assert fingerprint.of_weights((weights | copies).items()) == before
    untied = {"lm_head.weight": weights["shared.weight"] + np.float32(1e-3)}
    assert fingerprint.of_weights((weights | copies | untied).items()) != before
    elsewhere = {"decoder.y.weight": weights["shared.weight"]}
    assert fingerprint.of_weights((weights | elsewhere).items()) != before


def test_names_and_shapes_are_part_of_it():
    values = np.arange(6, dtype=np.float32)
    named = {
        fingerprint.of_weights([(name, values.reshape(shape))])
        for name in ("a", "b")
        for shape in ((6,), (2, 3), (3, 2))
    }
    assert len(named) == 6
    square = values[:4].reshape(2, 2)
    assert fingerprint.of_weights([("a", square)]) != fingerprint.of_weights([("a", square.T)])
    assert fingerprint.of_weights([("a", square.T)]) == fingerprint.of_weights(
        [("a", square.T.copy())]
    )
    joined = [("a", values[:2]), ("b", values[2:4])]
    assert fingerprint.of_weights(joined) != fingerprint.of_weights(
        [("a", values[2:4]), ("b", values[:2])]
    )


def test_row_32_a_policy_calibrated_on_other_weights_is_refused(tiny_t5):
    other = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        other.decoder.block[-1].layer[-1].DenseReluDense.wo.weight[0, 0] += 1e-3
    policy = ExitPolicy(threshold=0.5, weights=EarlyExitT5(tiny_t5).weights)
    EarlyExitT5(tiny_t5).generate(*prompts(2), policy=policy, max_new_tokens=LENGTH)
    with pytest.raises(
        RiskcalError,
        match=r"^weights: the policy was made for weights \w{32}, the model has \w{32}",
    ):
        EarlyExitT5(other).generate(*prompts(2), policy=policy, max_new_tokens=LENGTH)


def test_a_policy_calibrated_on_another_classifier_is_refused(tiny_t5):
    own, other = (torch.nn.Linear(tiny_t5.config.d_model, 1) for _ in range(2))
    decoder = EarlyExitT5(tiny_t5, classifier=own)
    assert decoder.classifier_weights == fingerprint.of_classifier(
        own.weight.detach(), own.bias.detach()
    )
    assert EarlyExitT5(tiny_t5).classifier_weights is None
    policy = ExitPolicy(
        threshold=0.5, measure="classifier", classifier_weights=decoder.classifier_weights
    )
    decoder.generate(*prompts(2), policy=policy, max_new_tokens=LENGTH)
    with pytest.raises(
        RiskcalError,
        match=r"^classifier_weights: the policy was made for weights \w{32}, the classifier",
    ):
        EarlyExitT5(tiny_t5, classifier=other).generate(
            *prompts(2), policy=policy, max_new_tokens=LENGTH
        )


@pytest.mark.parametrize("change", ["written to", "replaced"])
def test_a_model_that_changed_since_has_no_name(tiny_t5, change):
    model = copy.deepcopy(tiny_t5)
    decoder, unasked = EarlyExitT5(model), EarlyExitT5(model)
    name = decoder.weights
    with torch.no_grad():
        if change == "written to":
            model.shared.weight[3] += 1
        else:
            model.decoder.block[2] = copy.deepcopy(model.decoder.block[1])
    assert decoder.weights == name, "it decodes with what it read"
    with pytest.raises(
        RiskcalError, match="model: its weights changed after this decoder read them"
    ):
        _ = unasked.weights
    assert EarlyExitT5(model).weights != name
