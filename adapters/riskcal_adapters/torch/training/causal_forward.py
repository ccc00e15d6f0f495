"""One pass over known text through all layers of a causal language model, plain or exit-aware.

Exit-aware as in `forward`: a position that reached the threshold at an exit has left, and at all later layers the *other*
positions see the keys and values of its state there, which is what decoding leaves in the cache.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from riskcal import RiskcalError
from riskcal_adapters.torch.causal_weights import LlamaFamily
from riskcal_adapters.torch.exit_head_checks import check_layer
from riskcal_adapters.torch.training.confidence import softmax_margin
from riskcal_adapters.torch.training.self_generated import causal_lm

#: Cosines and sines of rotary positions.
_Rotation = tuple[Tensor, Tensor]


def causal_pass(
    model: Any,
    input_ids: Tensor,
    may_exit: Tensor,
    layers: Sequence[int],
    threshold: float = math.inf,
) -> dict[int, Tensor]:
    """Logits after some layers and the last, through the model's own final norm and head.

    Parameters
    ----------
    model : PreTrainedModel or decoder
        Of the Llama family.
    input_ids : (B, T)
        Prompts with what followed, padded on the right with anything: no position sees what is behind it.
    may_exit : (B, T) bool
        The N positions that logits are wanted for: the last of each prompt, and those of generated tokens. A decoder reads
        all others by all layers.
    layers
        After which there are exits, 1 to L.
    threshold
        A position whose softmax margin at an exit reaches it has left there: the later layers of all other positions see the
        keys and values of its state after that exit. Its own further path stays true. ``inf``: nothing leaves.

    Returns
    -------
    dict of int to (N, V)
        By layer, in the order of ``input_ids[may_exit]``; L is among them. Gradients do not flow through the decision to exit.

    Raises
    ------
    RiskcalError
        If the model is of another family, or a layer does not exist.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> ids = torch.tensor([[5, 9, 33, 7]])
    >>> may_exit = torch.tensor([[False, True, True, True]])  # a prompt of two tokens
    >>> logits = training.causal_pass(model, ids, may_exit, layers=[2], threshold=0.0)  # all leave after layer 2
    >>> {layer: tuple(found.shape) for layer, found in logits.items()}
    {2: (3, 60), 4: (3, 60)}
    """
    whole = causal_lm(model)
    if not isinstance(whole, LlamaFamily):
        raise RiskcalError(
            f"model: {type(whole).__name__} is not of the Llama family (Llama, Mistral, Qwen2, Qwen3), whose layers this pass "
            "knows; give one that is."
        )
    base: Any = whole.model
    last = len(base.layers)
    for layer in layers:
        check_layer(layer, last)
    state = base.embed_tokens(input_ids)
    length = input_ids.shape[1]
    at = base.rotary_emb(state, torch.arange(length, device=state.device)[None])
    exited, frozen = torch.zeros_like(may_exit), state
    leaves = not math.isinf(threshold)
    first = min(layers, default=last)
    found: dict[int, Tensor] = {}
    for layer, block in enumerate(base.layers, 1):
        seen = torch.where(exited[..., None], frozen, state) if leaves and layer > first else None
        state = state + _attention(block.self_attn, block.input_layernorm, state, seen, at)
        state = state + block.mlp(block.post_attention_layernorm(state))
        if layer not in layers and layer != last:
            continue
        found[layer] = whole.lm_head(base.norm(state[may_exit]))
        if leaves:
            over = softmax_margin([], [found[layer]]) >= threshold
            leaving = torch.zeros_like(exited).masked_scatter(may_exit, over) & ~exited
            frozen, exited = torch.where(leaving[..., None], state, frozen), exited | leaving
    return found


def _attention(
    attention: Any, norm: Any, state: Tensor, seen: Tensor | None, at: _Rotation
) -> Tensor:
    """What attention adds: every position sees itself as it is, and those before it as ``seen``; None: as they are."""
    normed = norm(state)
    queries = _rotated(_heads(attention, "q", normed), at)
    keys = _rotated(_heads(attention, "k", normed), at)
    values = _heads(attention, "v", normed)
    mask = None
    if seen is not None:
        before = norm(seen)
        keys = torch.cat([_rotated(_heads(attention, "k", before), at), keys], 2)
        values = torch.cat([_heads(attention, "v", before), values], 2)
        itself = torch.eye(state.shape[1], dtype=torch.bool, device=state.device)
        mask = torch.cat([torch.ones_like(itself).tril(-1), itself], 1)
    # keys are repeated here: with a mask, not every kernel takes grouped heads
    groups = queries.shape[1] // keys.shape[1]
    attended = scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(groups, 1),
        values.repeat_interleave(groups, 1),
        attn_mask=mask,
        is_causal=mask is None,
        scale=attention.scaling,
    )
    added: Tensor = attention.o_proj(attended.transpose(1, 2).flatten(2))
    return added


def _heads(attention: Any, kind: str, normed: Tensor) -> Tensor:
    """(B, heads, T, d_kv) of queries, keys or values."""
    projected = getattr(attention, f"{kind}_proj")(normed)
    heads = projected.view(*normed.shape[:2], -1, attention.head_dim)
    own_norm = getattr(attention, f"{kind}_norm", None)  # Qwen3's
    heads = heads if own_norm is None else own_norm(heads)
    found: Tensor = heads.transpose(1, 2)
    return found


def _rotated(heads: Tensor, at: _Rotation) -> Tensor:
    cosines, sines = (part[:, None].to(heads.dtype) for part in at)
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
    return heads * cosines + turned * sines
