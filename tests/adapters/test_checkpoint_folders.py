"""Folders are read alike in both frameworks: generation configs, parts and their index, pickles, lengths, and tokenizers."""

import copy
import json
import threading
from importlib import resources
from types import SimpleNamespace

import jax_models
import numpy as np
import pytest
import torch
from frameworks import FRAMEWORKS
from safetensors.torch import save_file
from t5_reference import FULL, LENGTH, family, hugging_face, prompts
from tokenizers import Tokenizer
from transformers import (
    ByT5Tokenizer,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

import riskcal_adapters.jax
import riskcal_adapters.torch
from riskcal import ExitPolicy, RiskcalError
from riskcal_adapters import generation_config, record

pytestmark = pytest.mark.usefixtures("barely_optimized")

TOKENIZER = resources.files("riskcal_adapters") / "g2p" / "checkpoint" / "tokenizer.json"


def decoder_of(framework, folder, tokenizer=None):
    adapter = getattr(riskcal_adapters, framework)
    return adapter.EarlyExitT5(
        adapter.load_t5(folder), tokenizer, **({"stacked": True} if framework == "jax" else {})
    )


def generated(decoder, rows=3, **settings):
    ids, mask = (array.numpy() for array in prompts(rows))
    return np.asarray(
        decoder.generate(ids, mask, **{"policy": FULL, "max_new_tokens": LENGTH} | settings).tokens
    )


def weights_of(model):
    shared = model.shared.weight.data_ptr()
    return {
        name: weight.clone()
        for name, weight in model.state_dict().items()
        if name == "shared.weight" or weight.data_ptr() != shared
    }


def saved(model, folder, generation=None, **config):
    folder.mkdir(exist_ok=True, parents=True)
    save_file(weights_of(model), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def in_parts(model, folder, count, index=True, noise=0.0):
    """Weights in ``count`` parts, as large models are stored."""
    saved(model, folder)
    (folder / "model.safetensors").unlink()
    weights = weights_of(model)
    placed = {
        name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors"
        for i, name in enumerate(sorted(weights))
    }
    for file in set(placed.values()):
        save_file(
            {name: weights[name] + noise for name, place in placed.items() if place == file},
            folder / file,
        )
    if index:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": placed})
        )
    return folder


# -- generation configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_generation_config_counts_and_the_models_where_it_is_silent(
    tiny_t5, tmp_path, framework
):
    end = int(hugging_face(tiny_t5, *prompts(3))[0, 4])
    folder = saved(
        tiny_t5,
        tmp_path,
        {"eos_token_id": [end], "decoder_start_token_id": 5, "_from_model_config": True},
    )
    decoder = decoder_of(framework, folder)
    assert decoder.settings["eos_token_id"] == [end]
    assert (decoder.settings["decoder_start_token_id"], decoder.settings["pad_token_id"]) == (5, 0)
    model = copy.deepcopy(tiny_t5)
    model.generation_config.eos_token_id, model.generation_config.decoder_start_token_id = end, 5
    assert generated(decoder).tolist() == hugging_face(model, *prompts(3)).tolist()


ASKED = [("num_beams", 4), ("no_repeat_ngram_size", 3), ("repetition_penalty", 1.3), ("forced_eos_token_id", 1),
         ("suppress_tokens", [5]), ("max_time", 2.5), ("force_words_ids", [[4]]), ("do_sample", True)]  # fmt: skip


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("name", "value"), ASKED)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_is_not_plain_greedy_decoding_is_refused_wherever_it_stands(
    tiny_t5, tmp_path, framework, name, value, file
):
    if file == "config.json":
        folder = saved(tiny_t5, tmp_path, **{name: value})
    else:
        folder = saved(tiny_t5, tmp_path, {name: value})
    with pytest.raises(
        RiskcalError, match=rf"^generation_config.{name}: .*set model.generation_config.{name} = "
    ):
        decoder_of(framework, folder)
    adapter = getattr(riskcal_adapters, framework)
    model = adapter.load_t5(folder)  # the remedy
    neutral = {
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "repetition_penalty": 1.0,
        "do_sample": False,
    }
    setattr(model.generation_config, name, neutral.get(name))
    adapter.EarlyExitT5(model)


NEUTRAL = {
    "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {}, "stop_strings": [],
    "num_beams": 1, "do_sample": False, "max_time": None, "min_length": 0, "force_words_ids": [], "constraints": [],
}  # fmt: skip


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_neutral_values_are_no_rules(tiny_t5, tmp_path, framework):
    assert (
        generated(decoder_of(framework, saved(tiny_t5, tmp_path, NEUTRAL))).tolist()
        == hugging_face(tiny_t5, *prompts(3)).tolist()
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["decoder_start_token_id", "pad_token_id"])
def test_start_and_padding_are_one_id(tiny_t5, tmp_path, framework, name):
    with pytest.raises(
        RiskcalError,
        match=rf"^generation_config.{name}: \[3, 4\], but all rows of this decoder have one",
    ):
        decoder_of(framework, saved(tiny_t5, tmp_path, {name: [3, 4]}))
    decoder = decoder_of(framework, saved(tiny_t5, tmp_path, {name: [3, 3]}))
    assert decoder.settings[name] == 3
    assert generation_config.special_tokens(
        SimpleNamespace(
            pad_token_id=0, eos_token_id=torch.tensor([1, 2]), decoder_start_token_id=np.int64(4)
        ),
        9,
    ) == (0, (1, 2), 4)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("asked", "length"),
    [({}, 64), ({"max_new_tokens": 7}, 7), ({"max_length": 7}, 6), ({"max_length": 90}, 89),
     ({"max_length": 7, "max_new_tokens": 9}, 9)],
)  # fmt: skip
def test_the_configs_length_limit_is_kept_where_nothing_else_says(
    gated_t5, tmp_path, framework, asked, length
):
    for place in ({"generation": asked}, asked):  # in either file
        decoder = decoder_of(framework, saved(gated_t5, tmp_path / str(len(place)), **place))
        assert generated(decoder, max_new_tokens=None).shape == (3, length)
    if asked:
        model = copy.deepcopy(gated_t5)
        for name, value in asked.items():
            setattr(model.generation_config, name, value)
        ids, mask = prompts(3)
        # the default is sized by the encoder's depth
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        theirs = model.generate(
            ids, attention_mask=mask, do_sample=False, num_beams=1, past_key_values=caches
        )
        assert generated(decoder, max_new_tokens=None).tolist() == theirs[:, 1:].tolist()
    ids, mask = (array.numpy() for array in prompts(2))
    assert decoder.trace(ids, mask).position.max() == length - 1
    assert generated(decoder, max_new_tokens=3).shape == (3, 3)
    assert generated(decoder, policy=ExitPolicy(max_new_tokens=4), max_new_tokens=None).shape == (
        3,
        4,
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "asked", [{"max_length": 1}, {"max_new_tokens": 0}, {"max_new_tokens": 2.5}]
)
def test_limits_that_leave_nothing_are_refused(tiny_t5, tmp_path, framework, asked):
    with pytest.raises(RiskcalError, match=rf"^generation_config.{next(iter(asked))}"):
        decoder_of(framework, saved(tiny_t5, tmp_path, asked))


def test_record_asks_which_limit_is_meant(tmp_path):
    decoder = riskcal_adapters.torch.load_example()
    model = copy.deepcopy(decoder.model)
    model.generation_config.max_length = 11
    short = riskcal_adapters.torch.EarlyExitT5(model, decoder.tokenizer)
    settings = {"progress": False, "batch_size": 2}
    with pytest.raises(
        RiskcalError,
        match=r"^max_new_tokens: none is given, and 64 .* config says 10; give max_new_tokens=10",
    ):
        record(["calm", "exit"], lambda: short, [0.5], tmp_path / "a", **settings)
    record(["calm", "exit"], lambda: short, [0.5], tmp_path / "a", max_new_tokens=10, **settings)
    record(
        ["calm", "exit"],
        lambda: short,
        [0.5],
        tmp_path / "b",
        policy=ExitPolicy(max_new_tokens=10),
        **settings,
    )
    record(["calm", "exit"], lambda: decoder, [0.5], tmp_path / "c", **settings)
    record(
        ["calm", "exit"],
        lambda: short,
        [0.5],
        tmp_path / "d",
        policy=ExitPolicy(max_new_tokens=12),
        **settings,
    )
    held = [
        json.loads((tmp_path / name / "recording.json").read_text())["max_new_tokens"]
        for name in "abcd"
    ]
    assert held == [10, 10, 64, 12]


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [None, "{", "[]"], ids=["none", "no JSON", "no object"])
def test_a_folder_without_a_config_is_refused_by_its_name(tmp_path, written):
    if written is not None:
        (tmp_path / "config.json").write_text(written)
    with pytest.raises(RiskcalError, match=r"config\.json: .*; give a folder as Hugging Face"):
        riskcal_adapters.torch.load(tmp_path)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_index_decides_which_parts_are_read(tiny_t5, tmp_path, framework):
    whole = decoder_of(framework, saved(tiny_t5, tmp_path / "whole"))
    folder = in_parts(tiny_t5, tmp_path / "parts", 3, noise=1.0)  # of an older state of the model
    in_parts(tiny_t5, folder, 2)
    assert len(list(folder.glob("*.safetensors"))) == 5
    assert decoder_of(framework, folder).weights == whole.weights
    bare = in_parts(tiny_t5, tmp_path / "bare", 2, index=False)  # a whole set speaks for itself
    assert decoder_of(framework, bare).weights == whole.weights
    in_parts(tiny_t5, saved(tiny_t5, tmp_path / "both"), 3, noise=1.0)
    saved(tiny_t5, tmp_path / "both")  # the single file counts, as for Hugging Face
    assert decoder_of(framework, tmp_path / "both").weights == whole.weights


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_parts_that_do_not_fit_together_are_refused(tiny_t5, tmp_path, framework):
    load = getattr(riskcal_adapters, framework).load_t5
    stale = in_parts(tiny_t5, in_parts(tiny_t5, tmp_path / "stale", 3, index=False), 2, index=False)
    with pytest.raises(
        RiskcalError,
        match=r"4 other parts that are not one whole set, and no model.safetensors.index.json",
    ):
        load(stale)
    folder = in_parts(tiny_t5, tmp_path / "a", 2)
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RiskcalError, match=r"model-00002-of-00002.safetensors: cannot be read"):
        load(folder)
    folder = in_parts(tiny_t5, tmp_path / "b", 2)
    for content, message in (
        (
            {"weight_map": placed | {"lm_head.more": "model-00001-of-00002.safetensors"}},
            r"lacks lm_head.more, which model",
        ),
        (
            {"weight_map": placed | {"shared.weight": "../elsewhere.safetensors"}},
            r"places shared.weight in '../elsewhere",
        ),
        ({}, "has no weight_map"),
    ):
        (folder / index.name).write_text(json.dumps(content))
        with pytest.raises(RiskcalError, match=message):
            load(folder)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_pickles_are_not_read_and_the_message_says_how_to_convert_them(
    tiny_t5, tmp_path, framework
):
    folder = saved(tiny_t5, tmp_path / "old")
    (folder / "model.safetensors").unlink()
    torch.save(
        {name: weight.clone() for name, weight in tiny_t5.state_dict().items()},
        folder / "pytorch_model.bin",
    )
    load = getattr(riskcal_adapters, framework).load_t5
    with pytest.raises(
        RiskcalError,
        match=r"pytorch_model.bin, a pickle, .*from_pretrained\(folder\).save_pretrained",
    ):
        load(folder)
    T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "new")
    assert len(load(tmp_path / "new").generation_config.__dict__) > 2


@pytest.mark.parametrize(
    ("framework", "kind"), [("torch", "mt5"), ("jax", "mt5"), ("torch", "umt5"), ("jax", "umt5")]
)
def test_the_rest_of_the_family_is_read(tmp_path, framework, kind):
    model = family(kind)
    decoder = decoder_of(framework, saved(model, tmp_path))
    assert generated(decoder, 5).tolist() == hugging_face(model, *prompts(5)).tolist()
    in_torch = riskcal_adapters.torch.EarlyExitT5(model)
    assert (decoder.weights, decoder.settings) == (in_torch.weights, in_torch.settings)
    if framework == "jax":
        policy = ExitPolicy(threshold=0.05)
        ids, mask = prompts(5)
        expected = in_torch.generate(ids, mask, policy=policy, max_new_tokens=LENGTH)
        assert len(expected.exit_layers.unique()) > 2
        for stacked in (True, False):
            over = riskcal_adapters.jax.EarlyExitT5(
                riskcal_adapters.jax.from_torch(model), stacked=stacked
            )
            assert over.settings == decoder.settings
            made = over.generate(ids.numpy(), mask.numpy(), policy=policy, max_new_tokens=LENGTH)
            assert made.tokens.tolist() == expected.tokens.tolist()
            assert made.exit_layers.tolist() == expected.exit_layers.tolist()
        assert over.trace(ids.numpy(), mask.numpy(), max_new_tokens=LENGTH).agrees.any()


def test_biases_of_a_umt5_are_not_lost_unseen(tmp_path):
    folder = saved(family("umt5"), tmp_path, model_type="t5")
    for framework in FRAMEWORKS:
        with pytest.raises(
            RiskcalError, match=r"relative_attention_bias.weight, which is no weight of a T5"
        ):
            getattr(riskcal_adapters, framework).load_t5(folder)


def test_a_bias_that_old_checkpoints_hold_and_nothing_reads_is_left_aside(tiny_t5, tmp_path):
    folder = saved(tiny_t5, tmp_path)
    unused = {
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 3)
    }
    save_file(weights_of(tiny_t5) | unused, folder / "model.safetensors")
    tokens = [generated(decoder_of(framework, folder)).tolist() for framework in FRAMEWORKS]
    assert tokens[0] == tokens[1] == hugging_face(tiny_t5, *prompts(3)).tolist()


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_texts_are_read_whole_whatever_the_tokenizer_was_asked_before():
    plain = Tokenizer.from_file(str(TOKENIZER))
    stored = Tokenizer.from_file(str(TOKENIZER))
    stored.enable_truncation(3)
    stored.enable_padding(length=40, direction="left", pad_id=0, pad_token="<pad>")
    fast = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    fast(["guarantee"], truncation=True, max_length=2, padding="max_length")
    words = ["guarantee", "a", "risk"]
    model = jax_models.random_t5()
    expected = riskcal_adapters.jax.EarlyExitT5(model, plain, stacked=True).encode(words)
    assert expected[1].sum(1).tolist() == [10, 2, 5]
    for tokenizer in (stored, fast):
        ids, mask = riskcal_adapters.jax.EarlyExitT5(model, tokenizer, stacked=True).encode(words)
        assert ids.tolist() == expected[0].tolist()
        assert mask.tolist() == expected[1].tolist()
    assert stored.truncation["max_length"] == 3, "the tokenizer is not ours to change"
    decoder = riskcal_adapters.torch.EarlyExitT5(riskcal_adapters.torch.load_example().model, fast)
    ids, mask = decoder.encode(words)
    assert ids.tolist() == expected[0].tolist()


def test_a_tokenizer_that_jax_cannot_call_is_refused_and_its_ids_are_welcome():
    slow = ByT5Tokenizer()
    model = jax_models.random_t5()
    with pytest.raises(
        RiskcalError, match=r"^tokenizer: a ByT5Tokenizer has no fast tokenizer .* leave it out"
    ):
        riskcal_adapters.jax.EarlyExitT5(model, slow)
    read = slow(["ab", "c"], padding=True, return_tensors="np")
    decoder = riskcal_adapters.jax.EarlyExitT5(model, stacked=True)
    ids = read["input_ids"] % model.shape.vocabulary
    assert decoder.generate(ids, read["attention_mask"], max_new_tokens=2).tokens.shape == (2, 2)


def test_threads_may_encode_with_one_decoder():
    decoder = riskcal_adapters.torch.load_example()
    texts = [["risk" * n, "a"] for n in range(1, 9)]
    expected = [decoder.encode(some)[0].tolist() for some in texts]
    wrong = []

    def work():
        for _ in range(20):
            for some, ids in zip(texts, expected, strict=True):
                if decoder.encode(some)[0].tolist() != ids:
                    wrong.append(some)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_decoder_stands_on_the_device_that_is_asked_for_and_one_that_is_not_there_is_refused():
    torch = pytest.importorskip("torch")
    from riskcal_adapters.torch import load

    folder = resources.files("riskcal_adapters") / "g2p" / "checkpoint"
    decoder = load(folder, device=torch.device("cpu"))
    assert decoder.decode(decoder.generate(*decoder.encode(["calm"])).tokens) == ["K AA M"]
    with pytest.raises(RiskcalError, match="meta"):  # it was moved there
        load(folder, device="meta")
    with pytest.raises(RiskcalError, match="device: 'gpu7' cannot be used here"):
        load(folder, device="gpu7")
