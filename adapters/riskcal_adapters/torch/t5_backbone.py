"""A T5's decoder: its prompt is encoded once, and every layer attends to it apart from what was generated."""

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from riskcal_adapters.torch import kernels, t5_kernels, weights
from riskcal_adapters.torch.backbone import FEW_COLUMNS, Backbone
from riskcal_adapters.torch.caches import Cache, Ints, LayerCache, Memory, Packed
from riskcal_adapters.torch.kernels import Floats
from riskcal_adapters.torch.t5_prompt import Prompt, have_holes
from riskcal_adapters.torch.weights import T5, Layer, PositionBias, rms_norm

#: Prompts up to so many tokens are attended to quicker by `kernels`.
_SHORT = 64


class T5Backbone(Backbone):
    """A T5's weights.

    Parameters
    ----------
    model : T5ForConditionalGeneration, or MT5's or UMT5's
        On one device; not modified.
    start : int
        The token that generations begin after.
    """

    scale = 1.0

    def __init__(self, model: T5, start: int) -> None:
        self.device = weights.device(model)
        self.dtype = dtype = weights.compute_dtype(model)
        self.width = model.config.d_model
        self.kv_heads, self.head_width = model.config.num_heads, model.config.d_kv
        self.exit_heads = {}
        self._start = start
        self._embedding = model.shared.weight.detach().to(dtype)
        self.vocabulary = len(self._embedding)
        encoder = weights.encoder_layers(model, dtype)
        decoder, cross = weights.decoder_layers(model, dtype)
        self._stacks: tuple[Any, ...] = encoder, decoder, cross
        self._encoder = weights.layer_by_layer(encoder)
        self._decoder, self._cross = weights.layer_by_layer(decoder), weights.layer_by_layer(cross)
        self.n_layers = len(self._decoder)
        self._head = weights.head(model, dtype)
        self._norm_offset = weights.norm_offset(model, dtype)
        self._activation = weights.activation(model)
        self._gated: bool = model.config.is_gated_act
        self._gated_gelu = self.lean and self._gated and model.config.dense_act_fn == "gelu_new"
        self._offset = np.float32(self._norm_offset.item())
        self._decoder_arrays, self._cross_arrays = (
            [t5_kernels.arrays(one) for one in held] if self._gated_gelu else []
            for held in (self._decoder, self._cross)
        )
        self.row_width = self._decoder[0].self_in.shape[1]
        self._encoder_bias = PositionBias(model.encoder, dtype)
        self._decoder_bias = PositionBias(model.decoder, dtype)

    @property
    def head(self) -> Tensor:
        """The final norm's gain, and its division by sqrt(d), are in it."""
        return self._head

    def start(self, tokens: Tensor, mask: NDArray[np.bool_], length: int) -> Cache:
        memory, prompt_bias = self._encode(tokens, mask)
        batch = len(tokens)
        rows = [bias.rows(length) for bias in self._decoder_bias.layers]
        nothing = np.zeros(batch, dtype=np.int64)
        lengths = mask.sum(1) if self.lean else np.full(batch, tokens.shape[1])
        starts = np.cumsum(lengths) - lengths if self.lean else nothing[:0]
        prompt = Prompt(memory, prompt_bias, batch, lengths, starts, rows)
        states = memory.new_empty(length, batch, self.width)
        return Cache(prompt, [self._start] * batch, states, offsets=nothing, begins=nothing)

    def pool(self, slots: int, prompt: int, length: int) -> Cache:
        empty, prompt = self._embedding.new_zeros, weights.whole_pieces(prompt)
        rows = [bias.rows(length) for bias in self._decoder_bias.layers]
        nothing, starts = np.zeros(slots, dtype=np.int64), np.arange(slots) * prompt
        bias = None if self.lean else torch.full_like(empty(slots, 1, 1, prompt), -math.inf)
        read = Prompt(empty(slots * prompt, self.width), bias, slots, nothing.copy(), starts, rows)
        states = empty(length, slots, self.width)
        cache = Cache(read, [self._start] * slots, states, offsets=nothing, begins=nothing)
        both = 2 * self.kv_heads * self.head_width
        held = (slots, self.kv_heads, prompt, self.head_width)
        for index in range(self.n_layers):
            memory: Memory | Packed = (
                Packed(empty(slots * prompt, both), starts, read.lengths, self.head_width)
                if self.lean
                else Memory(empty(*held), empty(*held), bias)
            )
            own = LayerCache.on(
                empty(length * slots, both),
                slots,
                self.kv_heads,
                self.head_width,
                memory,
                by_row=True,
            )
            own.stale = np.ones(slots, dtype=bool)
            cache.layers[index] = own
        return cache

    def admit(self, cache: Cache, rows: Ints, prompts: list[Ints]) -> list[int]:
        read: Prompt = cache.prompt
        lengths = np.array([len(prompt) for prompt in prompts])
        mask, tokens = np.arange(lengths.max()) < lengths[:, None], np.concatenate(prompts)
        if self.lean and mask.shape[1] <= _SHORT:
            memory = self._encode_short(tokens, lengths)
        else:
            ids = np.zeros(mask.shape, dtype=np.int64)
            ids[mask] = tokens
            memory, _ = self._encode(self.tensor(ids), mask)
        read.lengths[rows] = lengths
        if self.lean:
            kernels.put(
                memory.numpy(), kernels.ranges(read.starts[rows], lengths), read.memory.numpy()
            )
        else:
            chosen, width = self.tensor(rows), mask.shape[1]
            slots = read.memory.view(len(read.lengths), -1, self.width)
            slots[chosen, :width] = memory.view(len(rows), width, self.width)
            slots[chosen, width:] = 0.0
            assert read.bias is not None
            hidden = self.tensor(np.where(mask, 0.0, -math.inf)).to(self.dtype)
            read.bias[chosen, :, :, :width] = hidden[:, None, None]
            read.bias[chosen, :, :, width:] = -math.inf
            for own in cache.layers.values():
                own.clear(chosen)
        for own in cache.layers.values():
            own.filled_rows[rows] = 0
            assert own.stale is not None
            own.stale[rows] = True
        return [self._start] * len(rows)

    def recall(
        self, index: int, own: LayerCache, cache: Cache, rows: Ints
    ) -> Memory | Packed | None:
        read: Prompt = cache.prompt
        memory = own.memory
        if isinstance(memory, Packed):
            self._remember(index, own, read, rows)
            return memory if len(rows) == cache.batch else memory.of(rows)
        assert memory is not None
        if own.stale is not None and (fresh := rows[own.stale[rows]]).size:
            width, chosen = int(read.lengths[fresh].max()), self.tensor(fresh)
            of_slots = read.memory.view(len(read.lengths), -1, self.width)
            entering = of_slots[:, :width].index_select(0, chosen).flatten(0, 1)
            projected = torch.mm(entering, self._cross[index].memory)
            keys, values = self._split_heads(projected, len(fresh), 2)
            for held, projected in ((memory.keys, keys), (memory.values, values)):
                held[chosen, :, :width] = projected
                held[chosen, :, width:] = 0.0  # see `LayerCache.clear`
            own.stale[fresh] = False
        if own.stale is not None:  # slots have room for longer prompts than these
            width = int(read.lengths[rows].max())
            bias = None if memory.bias is None else memory.bias[..., :width]
            memory = Memory(memory.keys[:, :, :width], memory.values[:, :, :width], bias)
        return memory if len(rows) == cache.batch else memory.of(self.tensor(rows))

    def _remember(self, index: int, own: LayerCache, read: Prompt, rows: Ints) -> None:
        """Keys and values of these rows' prompts, where a layer still has those of earlier ones."""
        memory = own.memory
        assert isinstance(memory, Packed)
        if own.stale is not None and (fresh := rows[own.stale[rows]]).size:
            t5_kernels.recall(
                fresh,
                read.memory.numpy(),
                read.starts,
                read.lengths,
                self._cross[index].memory.numpy(),
                memory.rows.numpy(),
            )
            own.stale[fresh] = False

    def _encode(self, tokens: Tensor, mask: NDArray[np.bool_]) -> tuple[Tensor, Tensor | None]:
        """The encoder's normed output, and what hides padding from those who read it.

        (B * S, d), or where it is `lean`, of the real tokens alone; these alone are multiplied there.
        """
        batch, width = tokens.shape
        if self.lean and width <= _SHORT and not have_holes(mask):
            return self._encode_short(tokens.numpy()[mask], mask.sum(1)), None
        biases = [bias.square(width) for bias in self._encoder_bias.layers]
        prompt_bias = real = spread = None
        if not mask.all():
            additive = np.where(mask, 0.0, -math.inf)[:, None, None, :]
            prompt_bias = self.tensor(additive).to(self.dtype)
            biases = [bias + prompt_bias for bias in biases]
            if self.lean:
                real = self.tensor(np.flatnonzero(mask))
                spread = self.tensor((np.cumsum(mask) - 1).clip(0))  # padding is any token
        tokens = tokens.flatten()
        state = self._embedding.index_select(0, tokens if real is None else tokens[real])
        for index, layer in enumerate(self._encoder):
            projected = torch.mm(self.normed(state), layer.self_in)
            if spread is not None:
                projected = projected.index_select(0, spread)
            queries, keys, values = self._split_heads(projected, batch, 3)
            attended = scaled_dot_product_attention(
                queries, keys, values, attn_mask=_of_layer(biases, index), scale=1.0
            )
            attended = attended.transpose(1, 2).reshape(batch * width, -1)
            if real is not None:
                attended = attended.index_select(0, real)
            state = torch.addmm(state, attended, layer.self_out)
            state = self._feed_forward(layer, state)
        return self.normed(state), prompt_bias

    def _encode_short(self, tokens: Ints, lengths: Ints) -> Tensor:
        """The encoder's normed output of prompts that stand one after the other, each token attending to its own."""
        tables = self._encoder_bias.around(int(lengths.max()))
        if self.compiled:
            return torch.from_numpy(t5_kernels.encode(self._stack, tokens, lengths, tables))
        begins, counts, shifts = kernels.whole_prompts(lengths)
        state = self._embedding.index_select(0, torch.from_numpy(tokens))
        inside = self.kv_heads * self.head_width
        for index, layer in enumerate(self._encoder):
            bias = _of_layer(tables, index)
            projected = torch.mm(self.normed(state), layer.self_in).numpy()
            attended = kernels.attend(
                projected,
                projected,
                begins,
                1,
                counts,
                bias,
                shifts,
                (inside, 2 * inside, 1),
                inside,
                self.head_width,
                np.float32(1),
            )
            state = torch.addmm(state, torch.from_numpy(attended), layer.self_out)
            state = self._feed_forward(layer, state)
        return self.normed(state)

    def embed(self, tokens: list[int], cache: Cache) -> Tensor:
        if len(tokens) == 1:  # the weights themselves, since looking them up takes longer
            return self._embedding.narrow(0, tokens[0], 1)
        return self.embed_on_device(self.tensor(np.array(tokens)), cache)

    def embed_on_device(self, tokens: Tensor, cache: Cache) -> Tensor:
        return self._embedding.index_select(0, tokens)

    def embed_into(
        self, state: Tensor, tokens: Ints, rows: Ints, positions: Ints, cache: Cache
    ) -> None:
        self.put(self._embedding, tokens, state, rows)

    def embed_at(self, tokens: list[int], rows: Ints, positions: Ints, cache: Cache) -> Tensor:
        return self._embedding.index_select(0, self.tensor(np.array(tokens)))

    def normed(self, state: Tensor) -> Tensor:
        if not self.lean:
            return rms_norm(state, self._norm_offset)
        return torch.from_numpy(kernels.rms_norm(state.numpy(), self._offset))

    def open(self, index: int, cache: Cache) -> LayerCache:
        layer, prompt, batch = self._decoder[index], cache.prompt, cache.batch
        rows = prompt.memory.new_empty(cache.length * batch, layer.self_in.shape[1])
        projected = torch.mm(prompt.memory, self._cross[index].memory)
        memory: Memory | Packed
        if self.lean:
            memory = Packed(projected, prompt.starts, prompt.lengths, self.head_width)
        else:
            keys, values = self._split_heads(projected, batch, 2)
            memory = Memory(keys, values, prompt.bias)
        own = LayerCache.on(rows, batch, self.kv_heads, self.head_width, memory)
        cache.layers[index] = own
        return own

    def project(self, index: int, states: Tensor, at: None, out: Tensor) -> Tensor:
        torch.mm(self.normed(states), self._decoder[index].self_in, out=out)
        return out.narrow(1, 0, self.kv_heads * self.head_width)

    def finish(
        self, index: int, state: Tensor, attended: Tensor, memory: Memory | Packed | None
    ) -> Tensor:
        layer, cross = self._decoder[index], self._cross[index]
        assert memory is not None
        state = torch.addmm(state, attended, layer.self_out)
        attended = memory.attend(torch.mm(self.normed(state), cross.query))
        state = torch.addmm(state, attended, cross.out)
        return self._feed_forward(layer, state)

    @property
    def compiled(self) -> bool:
        return self.lean and self._gated_gelu

    @property
    def embedding(self) -> Tensor:
        return self._embedding

    def layer_and_surest(
        self, measure: int, index: int, entering: Tensor, at: tuple[Ints, Ints, Ints], cache: Cache
    ) -> tuple[Floats, Floats, Ints]:
        rows, positions, places = at
        given = self._given(index, rows, positions, cache)
        found: tuple[Floats, Floats, Ints] = t5_kernels.layer_and_surest(
            self._head.numpy(), measure, places, entering.numpy(), rows, given
        )
        return found

    def layer(self, index: int, state: Tensor, cache: Cache) -> Tensor:
        if not self.compiled or cache.position >= FEW_COLUMNS:
            return super().layer(index, state, cache)
        positions = np.full(cache.batch, cache.position)
        return self.layer_of_rows(index, state, cache.everyone, positions, cache)

    @functools.cached_property
    def _stack(self) -> t5_kernels.Stack:
        encoder, decoder, cross = map(t5_kernels.arrays, self._stacks)
        ends = self._embedding.numpy(), self._head.numpy()
        return t5_kernels.Stack(encoder, decoder, cross, *ends, self._offset, self.head_width)

    def alone(
        self, tokens: Tensor, mask: NDArray[np.bool_], measure: int, needed: Floats, ends: Ints
    ) -> tuple[Ints, Floats]:
        memory, _ = self._encode(tokens, mask)
        stack, bias = self._stack, self._decoder_bias.last(len(needed))
        room = t5_kernels.room(stack, memory.numpy(), measure, needed, bias, self._start)
        return t5_kernels.generate(stack, room, ends)

    def layer_of_rows(
        self, index: int, state: Tensor, rows: Ints, positions: Ints, cache: Cache
    ) -> Tensor:
        if not self.compiled:
            return super().layer_of_rows(index, state, rows, positions, cache)
        given = self._given(index, rows, positions, cache)
        return torch.from_numpy(t5_kernels.decoder_layer(given, state.numpy()))

    def _given(self, index: int, rows: Ints, positions: Ints, cache: Cache) -> t5_kernels.Given:
        own = cache.layers.get(index) or self.open(index, cache)
        memory = own.memory
        assert isinstance(memory, Packed)
        self._remember(index, own, cache.prompt, rows)
        layer, cross = self._decoder_arrays[index], self._cross_arrays[index]
        return t5_kernels.Given(
            *(layer, cross, self._offset, self.head_width, rows, positions, own.filled_rows),
            *(cache.states.numpy(), cache.begins, own.row_step, own.step, own.held),
            *(self.bias_of_last(index, cache), memory.rows.numpy(), memory.starts, memory.counts),
        )

    def bias_of_last(self, index: int, cache: Cache) -> NDArray[np.float32]:
        return np.asarray(_of_layer(self._decoder_bias.last(cache.length), index))

    def bias(self, index: int, cache: Cache) -> Tensor:
        bias: Tensor = _of_layer(cache.prompt.position_bias, index)[cache.position]
        return bias

    def bias_of(
        self, index: int, cache: Cache, rows: Ints, positions: Ints, columns: int
    ) -> Tensor:
        if (positions == positions[0]).all():
            bias: Tensor = _of_layer(cache.prompt.position_bias, index)[positions[0]]
            return bias
        square = self._causal(index, cache)
        return (
            square[0, :, self.tensor(positions), :columns].transpose(0, 1).unsqueeze(2).contiguous()
        )

    def _causal(self, index: int, cache: Cache) -> Tensor:
        read: Prompt = cache.prompt
        return read.causal(_of_layer(self._decoder_bias.layers, index), cache.length)

    def bias_square(self, index: int, cache: Cache, first: int) -> Tensor:
        end = cache.position + 1
        square = self._causal(index, cache)[:, :, first:end, :end]
        # a part may begin anywhere: weights.ALIGNMENT
        return square.clone(memory_format=torch.contiguous_format)

    def _feed_forward(self, layer: Layer, state: Tensor) -> Tensor:
        hidden = torch.mm(self.normed(state), layer.ff_in)
        if self._gated_gelu:
            hidden = torch.from_numpy(kernels.gated_gelu(hidden.numpy()))
        elif self._gated:
            gate, linear = hidden.chunk(2, -1)
            hidden = self._activation(gate) * linear
        else:
            hidden = self._activation(hidden)
        return torch.addmm(state, hidden, layer.ff_out)

    def _split_heads(self, projected: Tensor, batch: int, parts: int) -> tuple[Tensor, ...]:
        """(B * S, parts * h) to as many (B, heads, S, d_kv)."""
        heads = projected.view(batch, -1, parts, self.kv_heads, self.head_width)
        return heads.permute(2, 0, 3, 1, 4).unbind(0)


def _of_layer(biases: Any, index: int) -> Any:
    """A layer's own, or the one that all share."""
    return biases[index if len(biases) > 1 else 0]
