"""The weights of a causal language model, Llama's family or GPT-2's, in one form.

Projections of one input are one product; the other matrices are the model's own, transposed without a copy. Norms keep
their gains: folded into bfloat16 weights they would round otherwise than Hugging Face's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from riskcal import RiskcalError
from riskcal_adapters.torch.weights import numbers_of

#: Root mean square norms, rotary positions, grouped heads, gated feed-forward.
LlamaFamily = LlamaForCausalLM | MistralForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM
CausalLM = LlamaFamily | GPT2LMHeadModel

#: Kinds of rotary positions whose angles depend on how long a sequence is.
_CHANGING_ANGLES = ("dynamic", "longrope")


class Norm(NamedTuple):
    """Layer norm, or without a bias root mean square norm."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float

    def __call__(self, state: Tensor) -> Tensor:
        if self.bias is None:
            return F.rms_norm(state, self.weight.shape, self.weight, self.epsilon)
        return F.layer_norm(state, self.weight.shape, self.weight, self.bias, self.epsilon)


class Product(NamedTuple):
    """A matrix (inputs, outputs), and perhaps a bias."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, values: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(values, self.weight)
        return torch.addmm(self.bias, values, self.weight)


class Layer(NamedTuple):
    """One block: h queries' heads, k keys' heads, each d_kv wide; f the feed-forward's width."""

    norm: Norm
    self_in: Product  #: (d, (h + 2k) d_kv): queries, keys, values
    self_out: Product  #: (h d_kv, d)
    ff_norm: Norm
    ff_in: Product  #: (d, f), or (d, 2f): gate and linear part
    ff_out: Product  #: (f, d)
    query_norm: Norm | None = None  #: Qwen3's, of each head
    key_norm: Norm | None = None


class Read(NamedTuple):
    """A model's weights."""

    layers: list[Layer]
    embedding: Tensor  #: (V, d)
    positions: Tensor | None  #: (C, d) of GPT-2; None where keys are rotated
    norm: Norm
    head: Tensor  #: (d, V)
    activation: Callable[[Tensor], Tensor]
    gated: bool
    heads: int
    kv_heads: int
    head_width: int
    scale: float
    most: (
        int | None
    )  #: tokens of prompt and output that the model, as it is read here, is right for


def refuse_other(model: object) -> None:
    """Refuse what is neither Llama's family nor GPT-2."""
    if type(model) not in CausalLM.__args__:
        raise RiskcalError(
            f"model: a {type(model).__name__} is none of "
            f"{', '.join(kind.__name__ for kind in CausalLM.__args__)}. Take the model out of what wraps it; adapters are "
            "merged first (peft: merge_and_unload())."
        )


def read(model: CausalLM) -> Read:
    """Its weights, in its own type."""
    return _gpt2(model) if isinstance(model, GPT2LMHeadModel) else _llama(model)


def _llama(model: LlamaFamily) -> Read:
    config = model.config
    rotation = (config.rope_parameters or {}).get("rope_type", "default")
    windows = [getattr(block.self_attn, "sliding_window", None) for block in model.model.layers]
    if not hasattr(model.model.layers[0].self_attn, "sliding_window"):  # Mistral's is in its config
        windows = [getattr(config, "sliding_window", None)]
    limits = [window for window in windows if window is not None]
    if rotation in _CHANGING_ANGLES:
        limits.append(model.model.rotary_emb.original_max_seq_len)
    layers = []
    for block in model.model.layers:
        attention, dense = block.self_attn, block.mlp
        layers.append(
            Layer(
                norm=_norm(block.input_layernorm),
                self_in=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
                self_out=_joined(attention.o_proj),
                ff_norm=_norm(block.post_attention_layernorm),
                ff_in=_joined(dense.gate_proj, dense.up_proj),
                ff_out=_joined(dense.down_proj),
                query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
                key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            )
        )
    width = model.model.layers[0].self_attn.head_dim
    return Read(
        layers=layers,
        embedding=numbers_of(model.model.embed_tokens),
        positions=None,
        norm=_norm(model.model.norm),
        head=numbers_of(model.lm_head).t(),
        activation=model.model.layers[0].mlp.act_fn,
        gated=True,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_width=width,
        scale=width**-0.5,
        most=min(limits, default=None),
    )


def _gpt2(model: GPT2LMHeadModel) -> Read:
    config, stack = model.config, model.transformer
    blocks: Any = stack.h  # to torch whatever a module holds is a Tensor or a Module
    if config.add_cross_attention:
        raise RiskcalError("model: a GPT-2 with cross-attention is no causal language model.")
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise RiskcalError(
            "model: a GPT-2 whose attention is scaled by layer, or not at all, is not known here; "
            "the published checkpoints have scale_attn_weights=True and scale_attn_by_inverse_layer_idx=False."
        )
    width = config.hidden_size // config.num_attention_heads
    return Read(
        layers=[
            Layer(
                norm=_norm(block.ln_1),
                self_in=_joined(block.attn.c_attn),
                self_out=_joined(block.attn.c_proj),
                ff_norm=_norm(block.ln_2),
                ff_in=_joined(block.mlp.c_fc),
                ff_out=_joined(block.mlp.c_proj),
            )
            for block in blocks
        ],
        embedding=numbers_of(stack.wte),
        positions=numbers_of(stack.wpe),
        norm=_norm(stack.ln_f),
        head=numbers_of(model.lm_head).t(),
        activation=blocks[0].mlp.act,
        gated=False,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_width=width,
        scale=1 / math.sqrt(width),
        most=config.n_positions,
    )


def _joined(*linears: nn.Module) -> Product:
    """Of one input; ``Conv1D`` stores (inputs, outputs), ``Linear`` (outputs, inputs)."""
    parts = [numbers_of(one) if isinstance(one, Conv1D) else numbers_of(one).t() for one in linears]
    biases = [getattr(one, "bias", None) for one in linears]
    held = [bias.detach() for bias in biases if bias is not None]
    if len(parts) == 1:
        return Product(parts[0], held[0] if held else None)
    return Product(torch.cat(parts, 1), torch.cat(held) if held else None)


def _norm(module: Any) -> Norm:
    bias = getattr(module, "bias", None)
    epsilon = module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon
    return Norm(numbers_of(module), None if bias is None else bias.detach(), float(epsilon))
