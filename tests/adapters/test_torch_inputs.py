"""What the PyTorch decoder refuses, the checkpoints it reads, and the one that ships with it."""

import copy
import json
import math
from importlib import resources

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from t5_reference import FULL, assert_row, hugging_face, prompts

from riskcal import Decaying, ExitPolicy, RiskcalError
from riskcal_adapters.torch import EarlyExitT5, load_example, load_t5

# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(3, dtype=torch.long)}, r"input_ids: has shape \(3,\)"),
        ({"input_ids": torch.ones(0, 3, dtype=torch.long)}, r"input_ids: has shape \(0, 3\)"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, r"input_ids: has shape \(2, 0\)"),
        ({"input_ids": torch.ones(2, 3)}, "input_ids: holds float32"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids: not an array"),
        (
            {"input_ids": torch.tensor([[5, 6], [7, 41]])},
            r"input_ids: 41 at index \[1, 1\].*vocabulary of 41",
        ),
        ({"input_ids": torch.tensor([[5, 6], [0, 0]])}, "input_ids: row 1 holds only padding"),
        (
            {"attention_mask": torch.ones(2, 4)},
            r"attention_mask: has shape \(2, 4\), but input_ids \(2, 3\)",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            "attention_mask: row 1 is 0 throughout",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 1]])},
            r"attention_mask: 2 at index \[0, 2\]",
        ),
        ({"policy": [FULL] * 3}, "policy: 3 policies for 2 prompts"),
        ({"policy": 0.9}, "policy: 0.9 is neither"),
        ({"policy": [FULL, 0.9]}, "policy: .* is neither"),
        ({"policy": ExitPolicy(measure="distance")}, "measure: 'distance' is not known"),
        (
            {"policy": [FULL, ExitPolicy(measure="distance")]},
            "measure: 'distance' of row 1 is not known",
        ),
        ({"policy": ExitPolicy(threshold=0.5, min_layer=9)}, "min_layer: 9 exceeds"),
        ({"policy": ExitPolicy(thresholds={9: 0.5})}, "thresholds: layer 9 exceeds"),
        (
            {"policy": ExitPolicy(max_new_tokens=8), "max_new_tokens": 9},
            "max_new_tokens: 9, but .* calibrated for 8",
        ),
        (
            {"policy": [ExitPolicy(max_new_tokens=8), ExitPolicy(max_new_tokens=9)]},
            "max_new_tokens: 8, but .* for 9",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5"),
    ],
)
def test_requests_that_make_no_sense_are_refused(tiny_t5, arguments, message):
    with pytest.raises(RiskcalError, match=message):
        EarlyExitT5(tiny_t5).generate(**{"input_ids": torch.full((2, 3), 7)} | arguments)


def test_the_policys_length_is_the_default(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    assert decoder.generate(*prompts(1), policy=ExitPolicy(max_new_tokens=5)).tokens.shape == (1, 5)
    assert decoder.generate(*prompts(1)).tokens.shape == (1, 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 4), ("do_sample", True), ("repetition_penalty", 1.2), ("no_repeat_ngram_size", 3), ("min_length", 5),
     ("forced_eos_token_id", 1), ("pad_token_id", None), ("eos_token_id", None), ("decoder_start_token_id", None)],
)  # fmt: skip
def test_models_that_do_not_decode_greedily_are_refused(tiny_t5, name, value):
    model = copy.deepcopy(tiny_t5)
    setattr(model.generation_config, name, value)
    with pytest.raises(RiskcalError, match=rf"generation_config.{name}"):
        EarlyExitT5(model)


def test_other_models_are_refused(tiny_t5):
    with pytest.raises(RiskcalError, match="model: T5Stack"):
        EarlyExitT5(tiny_t5.encoder)
    with pytest.raises(RiskcalError, match="model: weights on meta"):
        EarlyExitT5(copy.deepcopy(tiny_t5).to("meta"))


def test_what_is_never_above_0_does_not_decay(tiny_t5):
    decaying = ExitPolicy(threshold=-0.3, measure="entropy", schedule=Decaying(4.0, 8))
    with pytest.raises(
        RiskcalError, match="schedule: decays thresholds from 0 to 1, but the measure 'entropy'"
    ):
        EarlyExitT5(tiny_t5).generate(*prompts(2), policy=decaying)
    full = decaying.model_copy(update={"threshold": math.inf})
    EarlyExitT5(tiny_t5).generate(*prompts(2), policy=full, max_new_tokens=2)


def test_texts_need_a_tokenizer(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    with pytest.raises(RiskcalError, match="tokenizer: none was given"):
        decoder.encode(["a"])
    with pytest.raises(RiskcalError, match="tokenizer: none was given"):
        decoder.decode(torch.tensor([[3]]))
    with pytest.raises(RiskcalError, match="prompts: has shape"):
        decoder.trace(*prompts(2), prompts=[1])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved(model, folder, drop=(), dtype=torch.float32):
    """Weights stored once each, as the recipe stores them."""
    shared = model.shared.weight.data_ptr()
    weights = {
        name: weight.to(dtype)
        for name, weight in model.state_dict().items()
        if name not in drop and (name == "shared.weight" or weight.data_ptr() != shared)
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def test_checkpoints_read_back_as_they_were(tiny_t5, tmp_path):
    own_head = not tiny_t5.config.scale_decoder_outputs
    loaded = load_t5(saved(tiny_t5, tmp_path))
    assert not loaded.training
    assert loaded.config.scale_decoder_outputs is tiny_t5.config.scale_decoder_outputs
    assert (loaded.lm_head.weight is loaded.shared.weight) is not own_head
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight
    assert (
        EarlyExitT5(loaded)
        .generate(*prompts(3))
        .tokens.equal(EarlyExitT5(tiny_t5).generate(*prompts(3)).tokens)
    )


def test_half_precision_is_read_as_float32(tiny_t5, tmp_path):
    loaded = load_t5(saved(tiny_t5, tmp_path, dtype=torch.float16))
    assert {weight.dtype for weight in loaded.state_dict().values()} == {torch.float32}
    assert loaded.shared.weight.equal(tiny_t5.shared.weight.half().float())


def test_checkpoints_that_are_not_whole_are_refused(tiny_t5, tmp_path):
    with pytest.raises(RiskcalError, match=r"model.safetensors: cannot be read"):
        load_t5(tmp_path / "nowhere")
    saved(tiny_t5, tmp_path, drop=["decoder.final_layer_norm.weight"])
    with pytest.raises(RiskcalError, match=r"lacks decoder.final_layer_norm.weight"):
        load_t5(tmp_path)
    saved(tiny_t5, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_ff": 50}))
    with pytest.raises(RiskcalError, match=r"do not fit the config"):
        load_t5(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RiskcalError, match=r"config.json: does not describe a T5"):
        load_t5(tmp_path)


# -- the model that ships ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def g2p() -> EarlyExitT5:
    folder = resources.files("riskcal_adapters") / "g2p" / "checkpoint"
    assert folder.is_dir(), f"the checkpoint that ships with the package is missing: {folder}"
    return load_example("g2p")


def test_g2p_full_policy_is_hugging_face_generate_on_200_words(g2p):
    words = made_up_words(200)
    alone, expected_alone = [], []
    for word in words:
        input_ids, mask = g2p.encode([word])
        alone.append(g2p.generate(input_ids, mask, policy=FULL).tokens[0].tolist())
        expected_alone.append(
            hugging_face(g2p.model, input_ids, mask, max_new_tokens=64)[0].tolist()
        )
    assert alone == expected_alone
    for start in range(0, 200, 8):
        input_ids, mask = g2p.encode(words[start : start + 8])
        together = g2p.generate(input_ids, mask, policy=FULL).tokens
        assert together.equal(hugging_face(g2p.model, input_ids, mask, max_new_tokens=64))
        assert g2p.decode(together) == [
            g2p.decode(torch.tensor([t]))[0] for t in alone[start : start + 8]
        ]


def test_g2p_batches_equal_single_words_when_exiting(g2p):
    policy = ExitPolicy(threshold=0.8)
    words = made_up_words(40)
    input_ids, mask = g2p.encode(words)
    together = g2p.generate(input_ids, mask, policy=policy)
    for row, word in enumerate(words):
        assert_row(together, row, g2p.generate(*g2p.encode([word]), policy=policy), tolerance=1e-3)
    assert together.exit_layers.unique().numel() > 3


def test_g2p_knows_how_words_sound(g2p):
    words = ["phoneme", "risk", "calibration"]
    spoken = g2p.decode(g2p.generate(*g2p.encode(words)).tokens)
    assert spoken[1] == "R IH S K"
    assert (
        g2p.decode(g2p.generate(*g2p.encode(words), policy=ExitPolicy(threshold=0.9)).tokens)[1]
        == "R IH S K"
    )


def test_examples_are_known_by_name():
    with pytest.raises(RiskcalError, match="name: 'poems' is unknown"):
        load_example("poems")


def made_up_words(count: int) -> list[str]:
    """Words of two to four syllables, pronounceable and in no dictionary's order."""
    rng = np.random.default_rng(7)
    onsets, nuclei, codas = (
        ["b", "str", "k", "m", "ph", "th", "gr", ""],
        ["a", "e", "ou", "i", "oa"],
        ["", "n", "ck", "st"],
    )
    return [
        "w"
        + "".join(
            rng.choice(onsets) + rng.choice(nuclei) + rng.choice(codas)
            for _ in range(rng.integers(1, 4))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", ["eos_token_id", "decoder_start_token_id", "pad_token_id"])
def test_special_tokens_outside_the_vocabulary_are_refused(tiny_t5, name):
    model = copy.deepcopy(tiny_t5)
    setattr(model.generation_config, name, 5000)
    with pytest.raises(
        RiskcalError, match=rf"generation_config.{name}: 5000 is not in the model's vocabulary"
    ):
        EarlyExitT5(model)


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (
            "classifier.safetensors",
            r"classifier: a str without .weight; read a file with load_classifier",
        ),
        (torch.nn.Linear(3, 1), r"classifier: has 3 weights"),
    ],
)
def test_what_is_no_classifier_of_this_model_is_refused(tiny_t5, classifier, message):
    with pytest.raises(RiskcalError, match=message):
        EarlyExitT5(tiny_t5, classifier=classifier)


def test_a_classifier_that_is_not_a_number_is_refused(tiny_t5):
    broken = torch.nn.Linear(tiny_t5.config.d_model, 1)
    torch.nn.init.constant_(broken.weight, math.nan)
    with pytest.raises(RiskcalError, match="classifier: has weights that are not finite"):
        EarlyExitT5(tiny_t5, classifier=broken)


def test_settings_of_generate_that_change_tokens_are_refused_also_the_rare_ones(tiny_t5):
    model = copy.deepcopy(tiny_t5)
    model.generation_config.dola_layers = "high"
    with pytest.raises(RiskcalError, match=r"generation_config.dola_layers: 'high'"):
        EarlyExitT5(model)
