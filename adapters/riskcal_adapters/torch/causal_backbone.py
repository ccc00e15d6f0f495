"""A causal language model's layers: prompts are read by all of them, and attended to as what was generated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from riskcal import RiskcalError
from riskcal_adapters.torch import causal_weights, weights
from riskcal_adapters.torch.backbone import Backbone, ExitHeadLike
from riskcal_adapters.torch.caches import Cache, Ints, LayerCache, Memory, Packed
from riskcal_adapters.torch.causal_weights import CausalLM

#: Cosines and sines (m, 1, d_kv) of the angles that positions are rotated by, the first half of the sines negative.
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Prompt:
    """Where the prompts of a batch stand: each ends in the column before the first generated one."""

    padding: Ints  # (B,) columns before a row's first token
    first: Tensor  # (B,) on the device: the place of the first position among a row's tokens
    bias: Tensor | None  # (B, 1, 1, C), -inf at padding; None without padding

    def of(self, rows: Tensor, numbers: Ints) -> "Prompt":
        """Some rows of the batch."""
        return Prompt(
            self.padding[numbers],
            self.first.index_select(0, rows),
            None if self.bias is None else self.bias.index_select(0, rows),
        )


class CausalBackbone(Backbone):
    """A causal language model's weights.

    Parameters
    ----------
    model : LlamaForCausalLM, Mistral's, Qwen2's, Qwen3's, or GPT2LMHeadModel
        On one device; not modified.
    exit_heads : mapping of int to head
        Heads of exits by their layer.
    """

    def __init__(self, model: CausalLM, exit_heads: Mapping[int, ExitHeadLike]) -> None:
        self.device = weights.device(model)
        self.dtype = model.dtype
        read = causal_weights.read(model)
        self._layers, self._final_norm = read.layers, read.norm
        self._embedding, self._positions, self._head = read.embedding, read.positions, read.head
        self._activation, self._gated, self._heads = read.activation, read.gated, read.heads
        self.kv_heads, self.head_width, self.scale = read.kv_heads, read.head_width, read.scale
        self.row_width = 2 * self.kv_heads * self.head_width
        self.n_layers = len(read.layers)
        self.vocabulary, self.width = read.embedding.shape
        #: Tokens of prompt and output together, at most; None: any number.
        self.most = read.most
        self.exit_heads = exit_heads
        self._rotary = None if read.positions is not None else model.model.rotary_emb
        self._table: Rotation | None = None

    @property
    def head(self) -> Tensor:
        return self._head

    def normed(self, state: Tensor) -> Tensor:
        return self._final_norm(state)

    def start(self, tokens: Tensor, mask: NDArray[np.bool_], length: int) -> Cache:
        """Run all but the last token of the prompts through all layers; the last is the first that may exit."""
        batch, lengths = len(tokens), mask.sum(1)
        read = tokens.cpu().numpy()
        aligned = [row[real] for row, real in zip(read, mask, strict=True)]  # without padding
        width = int(lengths.max())
        offset = width - 1
        self.refuse_longer(width, length)
        padding = width - lengths
        bias = None
        if padding.any():
            columns = weights.whole_pieces(offset + length)
            hidden = np.arange(columns) < padding[:, None]
            additive = np.where(hidden, -math.inf, 0.0)[:, None, None, :]
            bias = self.tensor(additive).to(self.dtype)
        cache = Cache(
            Prompt(padding, self.tensor(lengths - 1), bias),
            [int(row[-1]) for row in aligned],
            self._embedding.new_empty(length, batch, self.width),
            offsets=np.full(batch, offset),
            begins=padding,
        )
        if offset:
            # column c of a row holds its token c - padding; what stands before it is masked
            moved = np.maximum(np.arange(offset) - padding[:, None], 0)
            rows = self.tensor((np.arange(batch)[:, None] * offset + moved).T.ravel())
            for index, read_rows in enumerate(self.prefill(aligned)):
                own = self.open(index, cache)
                torch.index_select(read_rows, 0, rows, out=own.rows[: offset * batch])
        return cache

    def pool(self, slots: int, prompt: int, length: int) -> Cache:
        self.refuse_longer(prompt, length)
        nothing = np.zeros(slots, dtype=np.int64)
        cache = Cache(
            Prompt(nothing, self.tensor(nothing), None),  # rows are asked for with their positions
            [0] * slots,
            self._embedding.new_zeros(length, slots, self.width),
            offsets=np.full(slots, prompt - 1),
            begins=nothing.copy(),
        )
        for index in range(self.n_layers):
            self.open(index, cache, by_row=True)
        return cache

    def admit(self, cache: Cache, rows: Ints, prompts: list[Ints]) -> list[int]:
        behind = np.array([len(prompt) - 1 for prompt in prompts])
        cache.offsets[rows] = behind
        if not self.lean:
            chosen = self.tensor(rows)
            for own in cache.layers.values():
                own.clear(chosen)
        if behind.any():
            real = np.arange(behind.max()) < behind[:, None]
            read, columns = self.tensor(np.flatnonzero(real)), real.nonzero()[1]
            all_rows = np.repeat(rows, behind)
            for own, read_rows in zip(cache.layers.values(), self.prefill(prompts), strict=True):
                written = self.tensor(own.places(all_rows, columns))
                own.rows.index_copy_(0, written, read_rows.index_select(0, read))
        for own in cache.layers.values():
            own.filled_rows[rows] = 0
        return [int(prompt[-1]) for prompt in prompts]

    def refuse_longer(self, prompt: int, length: int) -> None:
        """Refuse more tokens than the model can attend to."""
        if self.most is not None and prompt + length - 1 > self.most:
            raise RiskcalError(
                f"max_new_tokens: a prompt of {prompt} tokens and {length} more do not fit into the {self.most} positions that "
                f"this model attends to; give at most {max(self.most - prompt + 1, 0)}, or a shorter prompt."
            )

    def prefill(self, prompts: list[NDArray[np.int64]]) -> list[Tensor]:
        """Keys and values (A * P, w), row by row, of each layer for all tokens of prompts but the last of each.

        P is one less than the longest; what stands behind a shorter one is to be ignored.
        """
        count, longest = len(prompts), max(map(len, prompts)) - 1
        ids = np.zeros((count, longest), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt) - 1] = prompt[:-1]
        state = self._embedding.index_select(0, self.tensor(ids.ravel()))
        places = self.tensor(np.tile(np.arange(longest), count))
        if self._positions is not None:
            state = state + self._positions.index_select(0, places)
        at = self._rotation(longest, places)
        columns = []
        for index in range(self.n_layers):
            out = state.new_empty(len(state), self.row_width)
            queries = self.project(index, state, at, out)
            columns.append(out)
            if index + 1 == self.n_layers:
                break
            keys, values = out.view(count, longest, 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)
            attended = scaled_dot_product_attention(
                queries.view(count, longest, self._heads, -1).transpose(1, 2),
                keys,
                values,
                is_causal=True,
                scale=self.scale,
                enable_gqa=self._heads != self.kv_heads,
            )
            state = self.finish(
                index, state, attended.transpose(1, 2).reshape(len(state), -1), None
            )
        return columns

    def embed(self, tokens: list[int], cache: Cache) -> Tensor:
        return self.embed_on_device(self.tensor(np.array(tokens)), cache)

    def embed_on_device(self, tokens: Tensor, cache: Cache) -> Tensor:
        state = self._embedding.index_select(0, tokens)
        if self._positions is None:
            return state
        return state + self._positions.index_select(0, cache.prompt.first + cache.position)

    def embed_at(self, tokens: list[int], rows: Ints, positions: Ints, cache: Cache) -> Tensor:
        state = self._embedding.index_select(0, self.tensor(np.array(tokens)))
        if self._positions is None:
            return state
        places = cache.offsets[rows] + positions - cache.prompt.padding[rows]
        return state + self._positions.index_select(0, self.tensor(places))

    def open(self, index: int, cache: Cache, *, by_row: bool = False) -> LayerCache:
        columns = (int(cache.offsets.max()) + cache.length) * cache.batch
        rows = self._embedding.new_zeros(columns, self.row_width)
        own = LayerCache.on(rows, cache.batch, self.kv_heads, self.head_width, None, by_row=by_row)
        cache.layers[index] = own
        return own

    def project(self, index: int, states: Tensor, at: Rotation | None, out: Tensor) -> Tensor:
        layer, count = self._layers[index], len(states)
        projected = layer.self_in(layer.norm(states))
        queries, own = self._heads * self.head_width, self.kv_heads * self.head_width
        out[:, own:] = projected[:, queries + own :]
        if at is None:
            out[:, :own] = projected[:, queries : queries + own]
            return projected[:, :queries]
        heads = projected[:, : queries + own].view(count, -1, self.head_width)
        if layer.query_norm is not None and layer.key_norm is not None:
            parts = heads.split([self._heads, self.kv_heads], 1)
            heads = torch.cat([layer.query_norm(parts[0]), layer.key_norm(parts[1])], 1)
        cosines, sines = at
        rotated = (heads * cosines + heads.roll(self.head_width // 2, -1) * sines).flatten(1)
        out[:, :own] = rotated[:, queries:]
        return rotated[:, :queries]

    def finish(
        self, index: int, state: Tensor, attended: Tensor, memory: Memory | Packed | None
    ) -> Tensor:
        layer = self._layers[index]
        state = state + layer.self_out(attended)
        hidden = layer.ff_in(layer.ff_norm(state))
        if self._gated:
            gate, linear = hidden.chunk(2, -1)
            hidden = self._activation(gate) * linear
        else:
            hidden = self._activation(hidden)
        return state + layer.ff_out(hidden)

    def places(self, cache: Cache, first: int, end: int) -> Rotation | None:
        columns = np.arange(cache.offset + first, cache.offset + end)
        if cache.prompt.bias is None and (len(columns) == 1 or cache.batch == 1):
            return self._rotation(cache.offset + end, slice(columns[0], columns[-1] + 1))
        own = cache.prompt.first
        if len(columns) == 1:
            return self._rotation(cache.offset + end, own + first)
        ahead = torch.arange(first, end, device=self.device)[:, None]
        return self._rotation(cache.offset + end, (own + ahead).flatten())

    def places_of(self, cache: Cache, rows: Ints, positions: Ints) -> Rotation | None:
        places = cache.offsets[rows] + positions - cache.prompt.padding[rows]
        return self._rotation(int(places.max()) + 1, self.tensor(places))

    def bias(self, index: int, cache: Cache) -> Tensor | None:
        bias: Tensor | None = cache.prompt.bias
        return None if bias is None else bias[..., : cache.offset + cache.position + 1]

    def bias_of(
        self, index: int, cache: Cache, rows: Ints, positions: Ints, columns: int
    ) -> Tensor | None:
        last = cache.offsets[rows] + positions
        if cache.prompt.bias is None and (last == columns - 1).all():
            return None
        at = np.arange(columns)
        hidden = (at > last[:, None]) | (at < cache.prompt.padding[rows, None])
        additive = np.where(hidden, -math.inf, 0.0)[:, None, None, :]
        return self.tensor(additive).to(self.dtype)

    def bias_square(self, index: int, cache: Cache, first: int) -> Tensor:
        end = cache.offset + cache.position + 1
        own = torch.arange(cache.offset + first, end, device=self.device)[:, None]
        ahead = torch.arange(end, device=self.device) > own
        square = torch.zeros_like(ahead, dtype=self.dtype).masked_fill(ahead, -math.inf)[None, None]
        bias: Tensor | None = cache.prompt.bias
        return square if bias is None else square + bias[..., :end]

    def _rotation(self, length: int, places: Tensor | slice) -> Rotation | None:
        """Of these positions, all below ``length``. Threads may share a decoder: the table is read once."""
        if self._rotary is None:
            return None
        table = self._table
        if table is None or len(table[0]) < length:
            positions = torch.arange(max(length, 256), device=self.device)[None]
            with torch.no_grad():
                cosines, sines = self._rotary(self._embedding, positions)
            half = self.head_width // 2
            signed = torch.cat([-sines[0, :, :half], sines[0, :, half:]], -1)
            self._table = table = cosines[0, :, None], signed[:, None]
        return table[0][places], table[1][places]
