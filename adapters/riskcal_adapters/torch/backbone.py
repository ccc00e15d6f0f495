"""One decoder layer at a time: a T5's weights, what a layer does with a position's state, and the caches it reads.

Layers are asked for in turn, for the position at hand. Tokens that exited early left gaps above their exit; a layer that is
run again first makes up for the positions that skipped it. There are three ways to do so, and with each, a layer that is
never reached costs nothing:

- `Backbone.layer`: keys and values of skipped positions are projected from the states at which they exited, all in one
  product with the position at hand.
- `Backbone.layer_of_rows`: the same for some rows of the batch, each with gaps of its own.
- `Backbone.layer_exact`: skipped positions run the layer together with the one at hand, so that keys and values are those of
  a model that never exited.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from riskcal_adapters.torch import weights
from riskcal_adapters.torch.weights import T5, Layer, PositionBias, rms_norm


@dataclass(eq=False)
class LayerCache:
    """Keys and values of one decoder layer: its own, of ``filled`` positions, and those of the encoded prompt."""

    rows: Tensor  # (T * B, 3h), position by position: what one product writes
    queries: Tensor  # (B, heads, T, d_kv), as are keys and values: views of rows
    keys: Tensor
    values: Tensor
    prompt_keys: Tensor  # (B, heads, S, d_kv)
    prompt_values: Tensor
    filled_rows: NDArray[np.int64]  # (B,), where rows have gaps of their own
    filled: int = 0

    @classmethod
    def on(cls, rows: Tensor, prompt_keys: Tensor, prompt_values: Tensor) -> "LayerCache":
        """An empty one on ``rows``' memory."""
        batch, heads, _, width = prompt_keys.shape
        own = rows.view(-1, batch, 3, heads, width).permute(2, 1, 3, 0, 4).unbind(0)
        return cls(
            rows, *own, prompt_keys, prompt_values, filled_rows=np.zeros(batch, dtype=np.int64)
        )

    def of(self, kept: Tensor, batch: int) -> "LayerCache":
        """The same for some rows of the batch."""
        all_rows = self.rows.view(-1, batch, self.rows.shape[1])
        # positions beyond what any row has filled hold nothing yet: the length limit may be far away
        filled = max(self.filled, int(self.filled_rows.max()))
        rows = self.rows.new_empty(len(all_rows) * len(kept), self.rows.shape[1])
        chosen = rows.view(-1, len(kept), self.rows.shape[1])
        torch.index_select(all_rows[:filled], 1, kept, out=chosen[:filled])
        part = LayerCache.on(
            rows, self.prompt_keys.index_select(0, kept), self.prompt_values.index_select(0, kept)
        )
        part.filled, part.filled_rows = self.filled, self.filled_rows[kept.cpu().numpy()]
        return part


@dataclass(eq=False)
class Cache:
    """What a batch's generation remembers; layers are opened when a token first reaches them."""

    memory: Tensor  # (B * S, d), the encoder's normed output
    prompt_bias: Tensor | None  # (B, 1, 1, S), -inf at padding; None without padding
    position_bias: list[list[Tensor]]  # of each layer, or one of all: (1, heads, 1, n) for n = 1..T
    batch: int
    length: int
    layers: dict[int, LayerCache] = field(default_factory=dict)
    states: list[Tensor] = field(
        default_factory=list
    )  # (B, d) each, by position: the state that later layers build on
    causal_bias: dict[PositionBias, Tensor] = field(
        default_factory=dict
    )  # (1, heads, T, T), -inf ahead; where needed

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch, (A,) in this order."""
        self.memory = (
            self.memory.view(self.batch, -1, self.memory.shape[1])
            .index_select(0, rows)
            .flatten(0, 1)
        )
        if self.prompt_bias is not None:
            self.prompt_bias = self.prompt_bias.index_select(0, rows)
        self.states[:] = [state.index_select(0, rows) for state in self.states]
        for index, own in self.layers.items():
            self.layers[index] = own.of(rows, self.batch)
        self.batch = len(rows)

    def rewind(self, position: int) -> None:
        """Forget what layers hold from this position on."""
        for own in self.layers.values():
            own.filled = min(own.filled, position)


class Backbone:
    """A T5's weights, read once and rearranged for decoding a token with few operations.

    Parameters
    ----------
    model : T5ForConditionalGeneration, or MT5's or UMT5's
        On one device; not modified.

    Attributes
    ----------
    n_layers : int
        Decoder layers L.
    vocabulary : int
        V.
    dtype : torch.dtype
        The type of states.
    """

    def __init__(self, model: T5) -> None:
        self.device = weights.device(model)
        self.dtype = dtype = weights.compute_dtype(model)
        self.n_layers: int = model.config.num_decoder_layers
        self._embedding = model.shared.weight.detach().to(dtype)
        self.vocabulary = len(self._embedding)
        self._encoder, self._decoder = weights.layers(model, dtype)
        self.head = weights.head(model, dtype)  # (d, V)
        self._norm_offset = weights.norm_offset(model, dtype)
        self._activation = weights.activation(model)
        self._gated: bool = model.config.is_gated_act
        self._heads: int = model.config.num_heads
        self._encoder_bias = PositionBias(model.encoder, dtype)
        self._decoder_bias = PositionBias(model.decoder, dtype)

    @functools.cached_property
    def head_by_token(self) -> Tensor:
        """(V, d): the head again, so that a token's weights stand together."""
        return self.head.t().contiguous()

    def start(self, tokens: Tensor, mask: NDArray[np.bool_], length: int) -> Cache:
        """Encode prompts (B, S) for generations of up to ``length`` tokens."""
        batch, width = tokens.shape
        biases = [bias.square(width) for bias in self._encoder_bias.layers]
        prompt_bias = None
        if not mask.all():
            additive = np.where(mask, 0.0, -math.inf)[:, None, None, :]
            prompt_bias = torch.as_tensor(additive, dtype=self.dtype, device=self.device)
            biases = [bias + prompt_bias for bias in biases]
        state = self._embedding.index_select(0, tokens.flatten())
        for index, layer in enumerate(self._encoder):
            projected = torch.mm(self._norm(state), layer.self_in)
            queries, keys, values = self._split_heads(projected, batch, 3).unbind(0)
            attended = scaled_dot_product_attention(
                queries, keys, values, attn_mask=_of_layer(biases, index), scale=1.0
            )
            state = torch.addmm(
                state, attended.transpose(1, 2).reshape(len(state), -1), layer.self_out
            )
            state = self._feed_forward(layer, state)
        rows = [bias.rows(length) for bias in self._decoder_bias.layers]
        return Cache(self._norm(state), prompt_bias, rows, batch, length)

    def embed(self, tokens: list[int]) -> Tensor:
        """(B, d), not to be written to: of one token it is the weights themselves, since looking it up takes longer."""
        if len(tokens) == 1:
            return self._embedding.narrow(0, tokens[0], 1)
        return self._embedding.index_select(0, self.tensor(np.array(tokens)))

    def logits(self, state: Tensor) -> Tensor:
        """The shared final norm and head on any layer's states, (B, d) to (B, V)."""
        return torch.mm(self._norm(state), self.head)

    def normed(self, state: Tensor) -> Tensor:
        """What `head` is multiplied with: the norm's gain, and its division by sqrt(d), are in the head."""
        return self._norm(state)

    def layer(self, index: int, state: Tensor, cache: Cache) -> Tensor:
        """One decoder layer for the position at hand, (B, d) to (B, d); first projects positions that skipped it."""
        layer = self._decoder[index]
        own = cache.layers.get(index) or self._open(index, cache)
        batch, position = cache.batch, len(cache.states)
        skipped = cache.states[own.filled :]
        entering = torch.cat([*skipped, state]) if skipped else state
        slots = own.rows[own.filled * batch : (position + 1) * batch]
        torch.mm(self._norm(entering), layer.self_in, out=slots)
        own.filled = position + 1
        attended = scaled_dot_product_attention(
            own.queries.narrow(2, position, 1),
            own.keys.narrow(2, 0, position + 1),
            own.values.narrow(2, 0, position + 1),
            attn_mask=_of_layer(cache.position_bias, index)[position],
            scale=1.0,
        )
        state = torch.addmm(state, attended.flatten(1), layer.self_out)
        query = torch.mm(self._norm(state), layer.cross_query).view(batch, self._heads, 1, -1)
        attended = scaled_dot_product_attention(
            query, own.prompt_keys, own.prompt_values, attn_mask=cache.prompt_bias, scale=1.0
        )
        state = torch.addmm(state, attended.flatten(1), layer.cross_out)
        return self._feed_forward(layer, state)

    def layer_of_rows(self, index: int, state: Tensor, rows: list[int], cache: Cache) -> Tensor:
        """As `layer`, for some rows of the batch: (A, d) to (A, d). The others' gaps stay, and grow."""
        layer = self._decoder[index]
        own = cache.layers.get(index) or self._open(index, cache)
        batch, position = cache.batch, len(cache.states)
        gaps = [(p, row) for row in rows for p in range(own.filled_rows[row], position)]
        slots = [p * batch + row for p, row in gaps] + [position * batch + row for row in rows]
        entering = (
            torch.cat([torch.stack([cache.states[p][row] for p, row in gaps]), state])
            if gaps
            else state
        )
        projected = torch.mm(self._norm(entering), layer.self_in)
        own.rows.index_copy_(0, self.tensor(np.array(slots)), projected)
        own.filled_rows[rows] = position + 1

        def of_rows(kept: Tensor) -> Tensor:
            return kept if len(rows) == batch else kept.index_select(0, chosen)

        chosen = self.tensor(np.array(rows))
        queries = projected[len(gaps) :, : projected.shape[1] // 3].view(
            len(rows), self._heads, 1, -1
        )
        attended = scaled_dot_product_attention(
            queries,
            of_rows(own.keys.narrow(2, 0, position + 1)),
            of_rows(own.values.narrow(2, 0, position + 1)),
            attn_mask=_of_layer(cache.position_bias, index)[position],
            scale=1.0,
        )
        state = torch.addmm(state, attended.flatten(1), layer.self_out)
        query = torch.mm(self._norm(state), layer.cross_query).view(len(rows), self._heads, 1, -1)
        bias = None if cache.prompt_bias is None else of_rows(cache.prompt_bias)
        attended = scaled_dot_product_attention(
            query, of_rows(own.prompt_keys), of_rows(own.prompt_values), attn_mask=bias, scale=1.0
        )
        state = torch.addmm(state, attended.flatten(1), layer.cross_out)
        return self._feed_forward(layer, state)

    def layer_exact(self, index: int, state: Tensor, cache: Cache) -> Tensor:
        """As `layer`, but positions that skipped this layer run it too, in parallel; ``cache.states`` moves on with them.

        The states of all positions that the layer lacks must be those that enter it: run layers one after the other.
        """
        own = cache.layers.get(index) or self._open(index, cache)
        first, position = own.filled, len(cache.states)
        if first == position:
            return self.layer(index, state, cache)
        layer = self._decoder[index]
        batch, m = cache.batch, position + 1 - first
        states = torch.cat([*cache.states[first:], state])  # (m * B, d), position by position
        torch.mm(
            self._norm(states), layer.self_in, out=own.rows[first * batch : (position + 1) * batch]
        )
        own.filled = position + 1
        bias = self._causal_bias(cache, index)[:, :, first : position + 1, : position + 1]
        attended = scaled_dot_product_attention(
            own.queries.narrow(2, first, m),
            own.keys.narrow(2, 0, position + 1),
            own.values.narrow(2, 0, position + 1),
            attn_mask=bias.clone(
                memory_format=torch.contiguous_format
            ),  # a part may begin anywhere: weights.ALIGNMENT
            scale=1.0,
        )
        states = torch.addmm(
            states, attended.permute(2, 0, 1, 3).reshape(m * batch, -1), layer.self_out
        )
        query = (
            torch.mm(self._norm(states), layer.cross_query)
            .view(m, batch, self._heads, -1)
            .permute(1, 2, 0, 3)
        )
        attended = scaled_dot_product_attention(
            query, own.prompt_keys, own.prompt_values, attn_mask=cache.prompt_bias, scale=1.0
        )
        states = torch.addmm(
            states, attended.permute(2, 0, 1, 3).reshape(m * batch, -1), layer.cross_out
        )
        *earlier, state = self._feed_forward(layer, states).split(batch)
        cache.states[first:] = earlier
        return state

    def copy_upwards(self, cache: Cache, layer: int) -> None:
        """The newest position's keys and values in the layers above ``layer`` are those of that layer: a negative control."""
        last = slice((len(cache.states) - 1) * cache.batch, len(cache.states) * cache.batch)
        for index in range(layer, self.n_layers):
            own = cache.layers.get(index) or self._open(index, cache)
            own.rows[last] = cache.layers[layer - 1].rows[last]
            own.filled = len(cache.states)

    def tensor(self, values: NDArray[Any]) -> Tensor:
        """On the model's device, by way of numpy: torch reads lists slowly."""
        return torch.from_numpy(values).to(self.device)

    def _open(self, index: int, cache: Cache) -> LayerCache:
        """Memory for a layer's keys and values, and the prompt's projected for it."""
        layer = self._decoder[index]
        rows = cache.memory.new_empty(cache.length * cache.batch, layer.self_in.shape[1])
        prompt = self._split_heads(
            torch.mm(cache.memory, layer.cross_memory), cache.batch, 2
        ).unbind(0)
        cache.layers[index] = LayerCache.on(rows, *prompt)
        return cache.layers[index]

    def _causal_bias(self, cache: Cache, index: int) -> Tensor:
        own = _of_layer(self._decoder_bias.layers, index)
        if own not in cache.causal_bias:
            bias = own.square(cache.length)
            ahead = torch.ones_like(bias[0, 0], dtype=torch.bool).triu(1)
            cache.causal_bias[own] = bias.masked_fill(ahead, -math.inf)
        return cache.causal_bias[own]

    def _feed_forward(self, layer: Layer, state: Tensor) -> Tensor:
        hidden = torch.mm(self._norm(state), layer.ff_in)
        if self._gated:
            gate, linear = hidden.chunk(2, -1)
            hidden = self._activation(gate) * linear
        else:
            hidden = self._activation(hidden)
        return torch.addmm(state, hidden, layer.ff_out)

    def _norm(self, state: Tensor) -> Tensor:
        return rms_norm(state, self._norm_offset)

    def _split_heads(self, projected: Tensor, batch: int, parts: int) -> Tensor:
        """(B * S, parts * h) to (parts, B, heads, S, d_kv)."""
        width = projected.shape[1] // (parts * self._heads)
        return projected.view(batch, -1, parts, self._heads, width).permute(2, 0, 3, 1, 4)


def _of_layer(biases: list[Any], index: int) -> Any:
    """A layer's own, or the one that all share."""
    return biases[index if len(biases) > 1 else 0]
