"""Training a T5 whose every decoder layer can be the last.

The loss is the layer-weighted one of CALM (Eq. 6). A finite exit threshold makes the same pass *exit-aware*: states are
copied to the layers above an exit exactly as decoding copies them, so that the model learns to read copied states.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5ForConditionalGeneration


def teacher_forced(
    model: T5ForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
    threshold: float = math.inf,
) -> Tensor:
    """Logits of every decoder layer, for the tokens of known targets.

    Parameters
    ----------
    model
        A Hugging Face T5, v1.0 or v1.1.
    input_ids, attention_mask : (B, S)
        Prompts and their mask.
    decoder_input_ids : (B, T)
        Targets, shifted right.
    threshold
        A position whose softmax margin at layer i reaches it has *exited* at i: the later layers of all other positions
        see the keys and values of its state after layer i. Its own further path stays true, as it would be had it not
        exited. ``inf`` is plain teacher forcing.

    Returns
    -------
    Tensor (L, B, T, V)
        Through the shared final norm and head, as at decoding time.
    """
    encoded = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    decoder = model.decoder
    length = decoder_input_ids.shape[1]
    state = decoder.embed_tokens(decoder_input_ids)
    bias = decoder.block[0].layer[0].SelfAttention.compute_bias(length, length)
    causal = torch.ones(length, length, dtype=torch.bool, device=bias.device).tril()
    self_bias = bias.masked_fill(~causal, -math.inf)
    cross_mask = attention_mask[:, None, None, :].bool()
    exited = torch.zeros(decoder_input_ids.shape, dtype=torch.bool, device=bias.device)
    frozen = state
    logits = []
    for block in decoder.block:
        seen = state if math.isinf(threshold) else torch.where(exited[..., None], frozen, state)
        self_layer, cross_layer, feed_forward = block.layer
        state = state + _self_attention(self_layer, state, seen, self_bias)
        state = state + _cross_attention(cross_layer, state, encoded, cross_mask)
        state = feed_forward(state)
        logits.append(_head(model, state))
        if not math.isinf(threshold):
            top = logits[-1].detach().float().softmax(-1).topk(2).values
            leaving = (top[..., 0] - top[..., 1] >= threshold) & ~exited
            frozen = torch.where(leaving[..., None], state, frozen)
            exited = exited | leaving
    return torch.stack(logits)


def layer_weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """CALM's Eq. 6: the mean token loss of each layer, weighted by ``i / sum(i)``.

    Parameters
    ----------
    logits : (L, B, T, V)
    labels : (B, T)
        Token ids, -100 where padded.
    """
    n_layers, vocabulary = logits.shape[0], logits.shape[-1]
    losses = F.cross_entropy(
        logits.float().reshape(-1, vocabulary), labels.expand(n_layers, *labels.shape).reshape(-1), reduction="none"
    )
    per_layer = losses.view(n_layers, -1).sum(1) / (labels != -100).sum()
    weights = torch.arange(1, n_layers + 1, device=per_layer.device, dtype=per_layer.dtype)
    return (per_layer * weights).sum() / weights.sum()


def _head(model: T5ForConditionalGeneration, state: Tensor) -> Tensor:
    normed = model.decoder.final_layer_norm(state)
    if model.config.scale_decoder_outputs:
        normed = normed * model.config.d_model**-0.5
    return model.lm_head(normed)


def _heads(projected: Tensor, attention: torch.nn.Module) -> Tensor:
    return projected.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)


def _self_attention(layer: torch.nn.Module, state: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
    attention = layer.SelfAttention
    normed = layer.layer_norm(state)
    query = _heads(attention.q(normed), attention)
    if seen is state:
        key, value = _heads(attention.k(normed), attention), _heads(attention.v(normed), attention)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=1.0)
    else:
        own_key, own_value = _heads(attention.k(normed), attention), _heads(attention.v(normed), attention)
        seen_normed = layer.layer_norm(seen)
        key, value = _heads(attention.k(seen_normed), attention), _heads(attention.v(seen_normed), attention)
        diagonal = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
        scores = query @ key.transpose(-1, -2)
        own_scores = (query * own_key).sum(-1, keepdim=True)
        weights = (torch.where(diagonal, own_scores, scores) + bias).float().softmax(-1).to(value.dtype)
        own_weights = weights.diagonal(dim1=-2, dim2=-1)[..., None]
        attended = weights.masked_fill(diagonal, 0) @ value + own_weights * own_value
    return attention.o(attended.transpose(1, 2).flatten(2))


def _cross_attention(layer: torch.nn.Module, state: Tensor, encoded: Tensor, mask: Tensor) -> Tensor:
    attention = layer.EncDecAttention
    query = _heads(attention.q(layer.layer_norm(state)), attention)
    key, value = _heads(attention.k(encoded), attention), _heads(attention.v(encoded), attention)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    return attention.o(attended.transpose(1, 2).flatten(2))
