"""One teacher-forced pass through every decoder layer: plain, exit-aware, or with layers dropped.

Exit-aware: a position that reaches a threshold has exited, and from there on the *other* positions see its state at that
layer, projected by each later layer, which is what decoding leaves in the cache. The model so learns to read copied states.

In training mode dropout acts wherever Hugging Face's own forward has it. The final norm's output is dropped out anew for
every layer's head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from riskcal import RiskcalError, internal
from riskcal_adapters.torch.modules import Attention, CrossLayer, Map, SelfLayer, blocks
from riskcal_adapters.torch.training.confidence import Confidence, softmax_margin
from riskcal_adapters.torch.weights import T5, scales_outputs

#: Drawn once per batch in exit-aware training; ``inf`` is a batch in which nothing exits.
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, math.inf)


def decoder_pass(
    model: T5,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
    threshold: float = math.inf,
    *,
    confidence: Confidence = softmax_margin,
    dropped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """States and logits of every decoder layer, for the tokens of known targets.

    Parameters
    ----------
    model
        A Hugging Face T5, v1.0 or v1.1, mT5 or UMT5.
    input_ids, attention_mask : (B, S)
        Prompts and their mask.
    decoder_input_ids : (B, T)
        Targets, shifted right.
    threshold
        A position whose confidence at layer i reaches it has *exited* at i: the later layers of all other positions
        see the keys and values of its state after layer i. Its own further path stays true, as it would be had it not
        exited. ``inf`` is plain teacher forcing. A decoder that recomputes the skipped layers leaves true states in its
        cache, so plain teacher forcing is also the exit-aware training of that decoder, whatever the threshold.
    confidence
        What is compared with the threshold.
    dropped : (L, B) bool, optional
        Layers that a row passes over, its state unchanged (see `dropout_rates`).

    Returns
    -------
    states : (L, B, T, d)
        Raw, before the final norm.
    logits : (L, B, T, V)
        Through the shared final norm and head, as at decoding time.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import load_example, training
    >>> model, inputs = load_example("g2p").model, load_example("g2p").encode(["calm", "exit"])
    >>> targets = torch.zeros(2, 5, dtype=torch.long)  # shifted right
    >>> states, logits = training.decoder_pass(model, *inputs, targets, threshold=0.9)
    >>> states.shape, logits.shape[:3]
    (torch.Size([8, 2, 5, 128]), torch.Size([8, 2, 5]))
    """
    encoded = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    decoder = model.decoder
    length = decoder_input_ids.shape[1]
    state = decoder.dropout(decoder.embed_tokens(decoder_input_ids))
    layers = blocks(decoder)
    self_bias = _bias(layers[0].layer[0].SelfAttention, length)
    cross_bias = torch.where(attention_mask[:, None, None, :].bool(), 0.0, -math.inf)
    exited = torch.zeros(decoder_input_ids.shape, dtype=torch.bool, device=state.device)
    frozen = state
    states: list[Tensor] = []
    logits: list[Tensor] = []
    for index, block in enumerate(layers):
        seen = state if math.isinf(threshold) else torch.where(exited[..., None], frozen, state)
        entering = state
        attention = block.layer[0].SelfAttention
        if index and attention.has_relative_attention_bias:  # as in a UMT5; others share the first
            self_bias = _bias(attention, length)
        state = state + _self_attention(block.layer[0], state, seen, self_bias)
        state = state + _cross_attention(block.layer[1], state, encoded, cross_bias)
        state = block.layer[-1](state)
        if dropped is not None:
            state = torch.where(dropped[index, :, None, None], entering, state)
        states.append(state)
        logits.append(_head(model, state))
        if not math.isinf(threshold):
            leaving = (confidence(states, logits) >= threshold) & ~exited
            frozen = torch.where(leaving[..., None], state, frozen)
            exited = exited | leaving
    return torch.stack(states), torch.stack(logits)


def teacher_forced(
    model: T5,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoder_input_ids: Tensor,
    threshold: float = math.inf,
) -> Tensor:
    """Logits ``(L, B, T, V)`` of `decoder_pass` with the softmax margin as the confidence.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import load_example, training
    >>> model, inputs = load_example("g2p").model, load_example("g2p").encode(["calm", "exit"])
    >>> training.teacher_forced(model, *inputs, torch.zeros(2, 5, dtype=torch.long)).shape[:3]
    torch.Size([8, 2, 5])
    """
    return decoder_pass(model, input_ids, attention_mask, decoder_input_ids, threshold)[1]


def dropout_rates(n_layers: int, largest: float, progress: float = 1.0) -> Tensor:
    """LayerSkip's probability ``(L,)`` of dropping each layer: 0 at the first, rising exponentially to ``largest`` at the last.

    Parameters
    ----------
    n_layers
        Decoder layers L, at least 2.
    largest
        Rate of the last layer, in [0, 1].
    progress
        The curriculum's factor S(t), in [0, 1]: 1 for fine-tuning.

    Notes
    -----
    ``progress * (exp(l ln 2 / (L - 1)) - 1) * largest`` for l = 0 to L - 1 (Elhoushi et al. 2024, section 4.1).

    Examples
    --------
    >>> from riskcal_adapters.torch import training
    >>> [round(rate, 3) for rate in training.dropout_rates(5, largest=0.2).tolist()]
    [0.0, 0.038, 0.083, 0.136, 0.2]
    """
    internal.count(n_layers, "n_layers", least=2)
    for value, name in ((largest, "largest"), (progress, "progress")):
        if not 0 <= internal.number(value, name) <= 1:
            raise RiskcalError(f"{name}: {value:g} is not in [0, 1].")
    layer = torch.arange(n_layers, dtype=torch.float64)
    return progress * (torch.exp2(layer / (n_layers - 1)) - 1) * largest


def _bias(attention: Attention, length: int) -> Tensor:
    """What is added to the scores (1, heads, T, T) of a layer that has its own bias on positions; none looks ahead."""
    bias = attention.compute_bias(length, length)
    ahead = torch.ones(length, length, dtype=torch.bool, device=bias.device).triu(1)
    return bias.masked_fill(ahead, -math.inf)


def _head(model: T5, state: Tensor) -> Tensor:
    normed = model.decoder.dropout(model.decoder.final_layer_norm(state))
    if scales_outputs(model):
        normed = normed * model.config.d_model**-0.5
    logits: Tensor = model.lm_head(normed)
    return logits


def _heads(projection: Map, states: Tensor, attention: Attention) -> Tensor:
    """(B, heads, T, d_kv) of states (B, T, d)."""
    batch, length, _ = states.shape
    return projection(states).view(batch, length, attention.n_heads, -1).transpose(1, 2)


def _self_attention(layer: SelfLayer, state: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
    attention = layer.SelfAttention
    normed = layer.layer_norm(state)
    query = _heads(attention.q, normed, attention)
    own_key, own_value = (_heads(part, normed, attention) for part in (attention.k, attention.v))
    if seen is state:
        attended = _attend(attention, query, own_key, own_value, bias)
    else:
        seen_normed = layer.layer_norm(seen)
        key, value = (_heads(part, seen_normed, attention) for part in (attention.k, attention.v))
        diagonal = torch.eye(query.shape[2], dtype=torch.bool, device=query.device)
        scores = query @ key.transpose(-1, -2)
        own_scores = (query * own_key).sum(-1, keepdim=True)
        weights = _weights(attention, torch.where(diagonal, own_scores, scores) + bias).to(
            value.dtype
        )
        own_weights = weights.diagonal(dim1=-2, dim2=-1)[..., None]
        attended = weights.masked_fill(diagonal, 0) @ value + own_weights * own_value
    return layer.dropout(attention.o(attended.transpose(1, 2).flatten(2)))


def _cross_attention(layer: CrossLayer, state: Tensor, encoded: Tensor, bias: Tensor) -> Tensor:
    attention = layer.EncDecAttention
    query = _heads(attention.q, layer.layer_norm(state), attention)
    key, value = (_heads(part, encoded, attention) for part in (attention.k, attention.v))
    attended = _attend(attention, query, key, value, bias)
    return layer.dropout(attention.o(attended.transpose(1, 2).flatten(2)))


def _attend(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> Tensor:
    if attention.training and attention.dropout:
        return _weights(attention, query @ key.transpose(-1, -2) + bias).to(value.dtype) @ value
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.to(query.dtype), scale=1.0
    )


def _weights(attention: Attention, scores: Tensor) -> Tensor:
    return F.dropout(scores.float().softmax(-1), p=attention.dropout, training=attention.training)
