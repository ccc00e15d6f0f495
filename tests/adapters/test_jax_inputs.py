"""What the JAX decoder refuses, as the PyTorch one does, and the checkpoints that it reads."""

import json
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from jax_models import CONFIG, prompts, random_t5, random_weights
from safetensors.numpy import save_file

from riskcal import ExitPolicy, RiskcalError
from riskcal.policy import Sampling
from riskcal.pruning import Pruning
from riskcal.serving import Pattern, Tokens
from riskcal_adapters import cli, fingerprint
from riskcal_adapters.jax import EarlyExitT5, from_torch, load_classifier, load_example, load_t5
from riskcal_adapters.jax.given import round_rows, round_tokens
from riskcal_adapters.jax.weights import arrange
from riskcal_adapters.recording.runs import _kind

FULL = ExitPolicy.full_model()


@pytest.fixture(scope="module")
def decoder():
    return EarlyExitT5(random_t5())


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": np.ones(3, int)}, r"input_ids: has shape \(3,\)"),
        ({"input_ids": np.ones((0, 3), int)}, r"input_ids: has shape \(0, 3\)"),
        ({"input_ids": np.ones((2, 3))}, "input_ids: holds float64"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids: not an array"),
        ({"input_ids": np.array([[5, 6], [7, 29]])}, r"input_ids: 29 at index \[1, 1\].*vocabulary of 29"),
        ({"input_ids": np.array([[5, 6], [0, 0]])}, "input_ids: row 1 holds only padding"),
        ({"attention_mask": np.ones((2, 4))}, r"attention_mask: has shape \(2, 4\), but input_ids \(2, 3\)"),
        ({"attention_mask": np.array([[1, 1, 1], [0, 0, 0]])}, "attention_mask: row 1 is 0 throughout"),
        ({"attention_mask": np.array([[1, 1, 2], [1, 1, 1]])}, r"attention_mask: 2 at index \[0, 2\]"),
        ({"policy": [FULL] * 3}, "policy: 3 policies for 2 prompts"),
        ({"policy": 0.9}, "policy: 0.9 is neither"),
        ({"policy": ExitPolicy(measure="guess")}, "measure: 'guess' is not known"),
        ({"policy": [FULL, ExitPolicy(measure="guess")]}, "measure: 'guess' of row 1 is not known"),
        ({"policy": ExitPolicy(measure="classifier", threshold=0.5)}, "needs a decoder made with classifier="),
        ({"policy": ExitPolicy(measure="jsd", threshold=0.5)}, "measure: 'jsd' is not known"),
        ({"policy": ExitPolicy(threshold=0.5, min_layer=9)}, "min_layer: 9 exceeds"),
        ({"policy": ExitPolicy(thresholds={9: 0.5})}, "thresholds: layer 9 exceeds"),
        ({"policy": ExitPolicy(threshold=0.5, n_layers=4)}, "n_layers: the policy was made for 4 layers"),
        ({"policy": ExitPolicy(threshold=0.5, weights="abc")}, "weights: the policy was made for weights abc"),
        ({"policy": ExitPolicy(threshold=0.5, cache="copy")}, "cache: 'copy' is not known to this decoder"),
        (
            {"policy": ExitPolicy(threshold=0.5, forbidden=[Tokens([3]), Pattern("a")])},
            r"forbidden: Pattern.* no tokenizer; .*Tokens\(ids\)",
        ),
        ({"policy": ExitPolicy(threshold=0.5, batching="deepest")}, "batching: 'deepest' is not known"),
        ({"policy": [FULL, ExitPolicy(threshold=0.5, emits="last")]}, "emits: 'last' of row 1 is not known"),
        ({"policy": ExitPolicy(threshold=0.5, pruning=Pruning("fixed", 9, 9))}, "pruning: .* is not known"),
        ({"policy": ExitPolicy(sampling=Sampling())}, "sampling: .* is not known"),
        ({"policy": ExitPolicy(max_new_tokens=8), "max_new_tokens": 9}, "max_new_tokens: 9, but .* calibrated for 8"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
    ],
)  # fmt: skip
def test_requests_that_make_no_sense_are_refused(decoder, arguments, message):
    with pytest.raises(RiskcalError, match=message):
        decoder.generate(**{"input_ids": np.full((2, 3), 7)} | arguments)


def test_padding_without_a_mask_is_warned_of(decoder):
    with pytest.warns(UserWarning, match="attention_mask: none is given, but row 1"):
        decoder._checked(np.array([[5, 6], [7, 0]]), None)


def test_texts_need_a_tokenizer(decoder):
    with pytest.raises(RiskcalError, match="tokenizer: none was given"):
        decoder.encode(["a"])
    with pytest.raises(RiskcalError, match="texts: give a list"):
        decoder.encode("a")
    with pytest.raises(RiskcalError, match="tokenizer: none was given"):
        decoder.decode([[3]])
    with pytest.raises(RiskcalError, match="prompts: has shape"):
        decoder.trace(*prompts(2), prompts=[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("do_sample", True),
        ("min_length", 5),
        ("pad_token_id", None),
        ("decoder_start_token_id", None),
    ],
)
def test_models_that_do_not_decode_greedily_are_refused(name, value):
    model = random_t5()
    setattr(model.generation_config, name, value)
    with pytest.raises(RiskcalError, match=rf"generation_config.{name}"):
        EarlyExitT5(model)


def test_other_arguments_are_refused():
    with pytest.raises(RiskcalError, match=r"model: str is no riskcal_adapters\.jax\.T5"):
        EarlyExitT5("t5-small")
    with pytest.raises(
        RiskcalError, match="dtype: 'float16' is unknown; choose one of 'float32', 'bfloat16'"
    ):
        EarlyExitT5(random_t5(), dtype="float16")
    with pytest.raises(
        RiskcalError,
        match="classifier: has 5 weights and 1 biases; this model's states need 32 and 1",
    ):
        EarlyExitT5(random_t5(), classifier=SimpleNamespace(weight=np.ones(5), bias=0.0))
    with pytest.raises(RiskcalError, match="devices: is empty"):
        EarlyExitT5(random_t5(), devices=[])
    with pytest.raises(RiskcalError, match="name: 'poems' is unknown"):
        load_example("poems")
    with pytest.raises(RiskcalError, match="model: dict is not a T5ForConditionalGeneration"):
        from_torch({})


def test_a_policy_calibrated_on_another_classifier_is_refused():
    own, other = (
        SimpleNamespace(weight=np.full(CONFIG["d_model"], value), bias=[0.0])
        for value in (0.1, 0.2)
    )
    decoder = EarlyExitT5(random_t5(), classifier=own)
    assert decoder.classifier_weights == fingerprint.of_classifier(own.weight, own.bias)
    policy = ExitPolicy(
        threshold=0.5, measure="classifier", classifier_weights=decoder.classifier_weights
    )
    decoder.generate(*prompts(2), policy=policy, max_new_tokens=2)
    with pytest.raises(RiskcalError, match="classifier_weights: the policy was made for weights"):
        EarlyExitT5(random_t5(), classifier=other).generate(
            *prompts(2), policy=policy, max_new_tokens=2
        )


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved(folder, weights=None, **changes):
    save_file(random_weights() if weights is None else weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def test_checkpoints_read_back_as_they_were(tmp_path):
    weights = random_weights()
    parts = tmp_path / "parts"
    parts.mkdir()
    (saved(parts) / "model.safetensors").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:9], names[9:])):
        save_file(
            {name: weights[name] for name in part},
            parts / f"model-0000{i + 1}-of-00002.safetensors",
        )
    for folder in (saved(tmp_path), parts):
        loaded = load_t5(folder)
        assert loaded.shape == random_t5().shape
        assert set(loaded.weights) == set(weights)
        assert all(np.array_equal(loaded.weights[name], weights[name]) for name in names)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_types_are_computed_in_float32(tmp_path, dtype):
    weights = {name: values.astype(dtype) for name, values in random_weights().items()}
    params = arrange(load_t5(saved(tmp_path, weights)), "float32", stacked=True)
    assert params.embedding.dtype == np.float32
    np.testing.assert_array_equal(params.embedding, weights["shared.weight"].astype(np.float32))


def test_a_head_of_its_own_counts_whatever_the_config_says(tmp_path):
    own = arrange(load_t5(saved(tmp_path, tie_word_embeddings=True)), "float32", stacked=True)
    weights = random_weights()
    gain = weights["decoder.final_layer_norm.weight"][:, None]
    np.testing.assert_allclose(own.head, gain * weights["lm_head.weight"].T, rtol=1e-6)
    tied = {name: values for name, values in weights.items() if name != "lm_head.weight"}
    shared = arrange(
        load_t5(saved(tmp_path, tied, scale_decoder_outputs=True)), "float32", stacked=True
    )
    np.testing.assert_allclose(shared.head, gain * weights["shared.weight"].T * 32**-0.5, rtol=1e-5)
    # older configs say only whether embeddings are tied, and by default they are
    for config, scaled in (({}, True), ({"tie_word_embeddings": False}, False)):
        old = {
            key: value for key, value in (CONFIG | config).items() if key != "scale_decoder_outputs"
        }
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert load_t5(tmp_path).shape.tied is scaled


def test_the_checkpoints_own_generation_config_is_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load_t5(tmp_path).generation_config.eos_token_id == [1, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("decoder.block.2.layer.1.EncDecAttention.k.weight"),
         r"model.safetensors: lacks decoder.block.2.layer.1.EncDecAttention.k.weight"),
        (lambda weights: weights.pop("shared.weight"), r"lacks shared.weight"),
        (lambda weights: weights.update({"lm_head.bias": np.ones(29, np.float32)}), "holds lm_head.bias, which is no weight"),
        (lambda weights: weights.update({"lm_head.weight": np.ones((28, 32), np.float32)}),
         r"lm_head.weight has shape \(28, 32\), but the config asks for \(29, 32\)"),
        (lambda weights: weights.update({"shared.weight": np.ones((29, 32), np.int8)}), "shared.weight holds int8"),
    ],
)  # fmt: skip
def test_weights_are_refused_by_their_key(tmp_path, change, message):
    weights = random_weights()
    change(weights)
    with pytest.raises(RiskcalError, match=message):
        load_t5(saved(tmp_path, weights))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", r"config.json: does not describe a T5"),
        ("[]", r"config.json: is not one JSON object"),
        ("{", r"config.json: cannot be read"),
        (json.dumps(CONFIG | {"d_ff": 0}), r"config.json: d_ff is 0"),
        (
            json.dumps(CONFIG | {"feed_forward_proj": "gated-tanh"}),
            "feed_forward_proj 'gated-tanh' is not known",
        ),
        (
            json.dumps(CONFIG | {"num_decoder_layers": 4}),
            r"lacks decoder.block.3.layer.0.layer_norm.weight",
        ),
    ],
)
def test_configs_that_make_no_sense_are_refused(tmp_path, config, message):
    saved(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RiskcalError, match=message):
        load_t5(tmp_path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RiskcalError, match=r"config.json: cannot be read"):
        load_t5(tmp_path / "nowhere")
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RiskcalError, match=r"model.safetensors: cannot be read"):
        load_t5(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RiskcalError, match=r"model.safetensors: cannot be read"):
        load_t5(tmp_path)


def test_classifiers_are_read(tmp_path):
    weight, path = np.linspace(-1, 1, 32, dtype=np.float32), tmp_path / "classifier.safetensors"
    save_file({"weight": weight, "bias": np.array(0.5, dtype=np.float32)}, path)
    made = EarlyExitT5(random_t5(), classifier=load_classifier(path)).params.classifier
    np.testing.assert_array_equal(made.weight, weight)
    assert made.bias == 0.5
    save_file({"weight": weight}, path)
    with pytest.raises(RiskcalError, match="does not hold weight"):
        load_classifier(path)
    with pytest.raises(RiskcalError, match="cannot be read"):
        load_classifier(tmp_path / "nowhere")


def test_the_command_line_knows_the_shipped_model_in_both_frameworks():
    for text, module in (("g2p", "torch"), ("torch:g2p", "torch"), ("jax:g2p", "jax")):
        assert cli.parse_decoder(text) == cli.NamedDecoder(
            f"riskcal_adapters.{module}", "load_example", ("g2p",)
        )


def test_record_generates_before_its_clock_counts_whatever_is_compiled_anew():
    for rows in range(1, 70):
        for tokens in (1, 15, 16, 17, 32, 33, 200):
            expected = (round_rows(rows, 1), round_tokens(tokens))
            assert _kind(np.zeros((rows, tokens)), rows) == expected
