"""One decoder layer at a time: what every architecture has in common, and the caches that its layers read.

An architecture (`t5_backbone`, `causal_backbone`) says how a prompt is read, how a layer makes queries, keys and values of
states, and what follows attention. When a layer runs, for which rows, and how it makes up for the positions that skipped it,
stands here once.

Tokens that exited early left gaps above their exit; a layer that is run again first makes up for the positions that skipped
it. There are three ways to do so, and with each, a layer that is never reached costs nothing:

- `Backbone.layer`: keys and values of skipped positions are projected from the states at which they exited, all in one
  product with the position at hand.
- `Backbone.layer_of_rows`: the same for some rows of the batch, each with gaps and a position of its own.
- `Backbone.layer_exact`: skipped positions run the layer together with the one at hand, so that keys and values are those of
  a model that never exited.
"""

import abc
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from riskcal_adapters.torch.scores import Scores

Ints = NDArray[np.int64]


class ExitScores(Protocol):
    """A layer's own head."""

    @property
    def ids(self) -> Tensor | None:
        """(k,) the ids of the tokens that it scores; None: all, in order."""

    def logits(self, state: Tensor) -> Tensor:
        """Of raw states: (B, d) to (B, k)."""


class Memory(NamedTuple):
    """What a layer reads of an encoded prompt beside its own keys and values."""

    keys: Tensor  # (B, heads, S, d_kv)
    values: Tensor
    bias: Tensor | None  # (B, 1, 1, S), -inf at padding; None without padding

    def of(self, rows: Tensor) -> "Memory":
        """Some rows of the batch."""
        bias = None if self.bias is None else self.bias.index_select(0, rows)
        return Memory(self.keys.index_select(0, rows), self.values.index_select(0, rows), bias)


@dataclass(eq=False)
class LayerCache:
    """Keys and values of one decoder layer, of the ``filled`` first positions."""

    rows: Tensor  # (C * B, w), column by column: what one product writes
    keys: Tensor  # (B, heads, C, d_kv), as are values: views of rows
    values: Tensor
    memory: Memory | None
    filled_rows: Ints  # (B,), where rows have gaps of their own
    filled: int = 0
    #: (B,) rows whose part of the memory is still an earlier prompt's, where prompts take turns.
    stale: NDArray[np.bool_] | None = None

    @classmethod
    def on(
        cls, rows: Tensor, batch: int, heads: int, width: int, memory: Memory | None
    ) -> "LayerCache":
        """An empty one on ``rows``' memory; keys and values are the last two parts of a row."""
        *_, keys, values = rows.view(
            -1, batch, rows.shape[1] // (heads * width), heads, width
        ).permute(2, 1, 3, 0, 4)
        return cls(rows, keys, values, memory, filled_rows=np.zeros(batch, dtype=np.int64))

    def of(self, kept: Tensor, batch: int, offset: int) -> "LayerCache":
        """The same for some rows of the batch."""
        all_rows = self.rows.view(-1, batch, self.rows.shape[1])
        # columns beyond what any row has filled hold nothing yet: the length limit may be far away
        filled = offset + max(self.filled, int(self.filled_rows.max()))
        rows = self.rows.new_empty(len(all_rows) * len(kept), self.rows.shape[1])
        chosen = rows.view(-1, len(kept), self.rows.shape[1])
        torch.index_select(all_rows[:filled], 1, kept, out=chosen[:filled])
        memory = None if self.memory is None else self.memory.of(kept)
        part = LayerCache.on(rows, len(kept), self.keys.shape[1], self.keys.shape[3], memory)
        part.filled, part.filled_rows = self.filled, self.filled_rows[kept.cpu().numpy()]
        return part


@dataclass(eq=False)
class Cache:
    """What a batch's generation remembers; layers are opened when a token first reaches them.

    Positions count generated tokens from 0. Keys and values stand in columns: those of the prompt, where layers attend to it
    as to what was generated, are before ``offset``.
    """

    prompt: Any  # what the architecture knows of the prompts
    first: list[int]  # the token before the first generated one, of each row
    states: Tensor  # (T, B, d): by position, the state that later layers build on
    offsets: Ints  # (B,): the column of each row's first position
    position: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    batch: int = field(init=False)
    offset: int = field(init=False)  # of all rows, where they have one in common

    def __post_init__(self) -> None:
        self.batch, self.offset = self.states.shape[1], int(self.offsets[0])

    @property
    def length(self) -> int:
        """Positions T that there is room for."""
        return self.states.shape[0]

    def append(self, state: Tensor) -> None:
        """Go on to the next position; ``state`` (B, d) is what layers that skipped this one will read."""
        self.states.select(0, self.position).copy_(state)
        self.position += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch, (A,) in this order."""
        for index, own in self.layers.items():
            self.layers[index] = own.of(rows, self.batch, self.offset)
        self.prompt, self.offsets = self.prompt.of(rows), self.offsets[rows.cpu().numpy()]
        states = self.states.new_empty(self.length, len(rows), self.states.shape[2])
        torch.index_select(self.states[: self.position], 1, rows, out=states[: self.position])
        self.states, self.batch = states, len(rows)

    def rewind(self, position: int) -> None:
        """Forget everything from this position on."""
        for own in self.layers.values():
            own.filled = min(own.filled, position)
        self.position = position


class Backbone(abc.ABC):
    """A decoder's weights, read once and rearranged for decoding a token with few operations.

    Attributes
    ----------
    device : torch.device
    dtype : torch.dtype
        The type of states.
    n_layers : int
        Decoder layers L.
    vocabulary : int
        V.
    width : int
        Entries d of a state.
    kv_heads : int
        Heads of keys and values; as many queries share each as there are times more heads of queries.
    head_width : int
        Entries d_kv of a head's keys.
    scale : float
        What attention multiplies products of queries and keys with.
    exit_heads : dict of int to head
        Heads of exits by their layer, 1 to L; other layers share the final one. One after the last layer speaks before the
        final head does, which is then an exit of its own, the (L + 1)th: no more layers, a larger head.
    """

    device: torch.device
    dtype: torch.dtype
    n_layers: int
    vocabulary: int
    width: int
    kv_heads: int
    head_width: int
    scale: float
    exit_heads: Mapping[int, ExitScores]

    @abc.abstractmethod
    def start(self, tokens: Tensor, mask: NDArray[np.bool_], length: int) -> Cache:
        """Read prompts (B, S) for generations of up to ``length`` tokens."""

    @abc.abstractmethod
    def pool(self, slots: int, prompt: int, length: int) -> Cache:
        """Room for as many generations at a time, of up to so many tokens after prompts of up to ``prompt`` ones."""

    @abc.abstractmethod
    def admit(self, cache: Cache, rows: Ints, prompts: list[Ints]) -> list[int]:
        """Read prompts into these rows of a `pool`, and give the tokens that their generations begin after."""

    @abc.abstractmethod
    def embed(self, tokens: list[int], cache: Cache) -> Tensor:
        """(B, d) of the tokens before the position at hand, not to be written to."""

    @abc.abstractmethod
    def embed_at(self, tokens: list[int], rows: Ints, positions: Ints, cache: Cache) -> Tensor:
        """The same of some rows (A, d), each at a position of its own."""

    @abc.abstractmethod
    def normed(self, state: Tensor) -> Tensor:
        """What `head` is multiplied with. A T5's other norms are the same: each one's gain is in the matrices after it."""

    @property
    @abc.abstractmethod
    def head(self) -> Tensor:
        """(d, V): the output head after the decoder's final norm."""

    @abc.abstractmethod
    def open(self, index: int, cache: Cache) -> LayerCache:
        """Memory for a layer's keys and values, with what it knows of the prompt."""

    @abc.abstractmethod
    def project(self, index: int, states: Tensor, at: Any, out: Tensor) -> Tensor:
        """Queries (m, heads * d_kv) of states (m, d); their keys and values are the end of ``out`` (m, w)."""

    @abc.abstractmethod
    def finish(self, index: int, state: Tensor, attended: Tensor, memory: Memory | None) -> Tensor:
        """What a layer does after attention to itself: (m * B, d), position by position, to the next layer's states."""

    def places(self, cache: Cache, first: int, end: int) -> Any:
        """What `project` needs to know of where positions are; None where it needs nothing."""
        return None

    def places_of(self, cache: Cache, rows: Ints, positions: Ints) -> Any:
        """The same of some rows, each at a position of its own."""
        return None

    @abc.abstractmethod
    def bias(self, index: int, cache: Cache) -> Tensor | None:
        """On attention (B or 1, heads or 1, 1, n) from the position at hand to the n columns up to its own."""

    @abc.abstractmethod
    def bias_of(
        self, index: int, cache: Cache, rows: Ints, positions: Ints, columns: int
    ) -> Tensor | None:
        """The same (A or 1, heads or 1, 1, columns) of some rows, each at a position of its own."""

    @abc.abstractmethod
    def bias_square(self, index: int, cache: Cache, first: int) -> Tensor:
        """The same (B or 1, heads or 1, m, n) of all positions from ``first`` to the one at hand, -inf ahead of each."""

    @functools.cached_property
    def head_by_token(self) -> Tensor:
        """(V, d): the head again, so that a token's weights stand together."""
        return self.head.t().contiguous()

    def logits(self, state: Tensor) -> Tensor:
        """The final norm and head on any layer's states: (B, d) to (B, V)."""
        return torch.mm(self.normed(state), self.head)

    def scores(self, layer: int, state: Tensor) -> Scores:
        """What the layer's own exit head says of its states, or the final norm and head where it has none."""
        own = self.exit_heads.get(layer)
        if own is None:
            return Scores(self.logits(state))
        ids = own.ids
        return Scores(own.logits(state), None if ids is None else ids.expand(len(state), -1))

    def exits_at(self, layer: int) -> bool:
        """Whether tokens may leave after this layer: everywhere, or where there are exit heads, at these and the last."""
        return not self.exit_heads or layer in self.exit_heads or layer >= self.n_layers

    @property
    def n_exits(self) -> int:
        """Exits in turn: one a layer, and the final head where the last layer has one of its own beside it."""
        return self.n_layers + (self.n_layers in self.exit_heads)

    def layer(self, index: int, state: Tensor, cache: Cache) -> Tensor:
        """One decoder layer for the position at hand, (B, d) to (B, d); first projects positions that skipped it."""
        own = cache.layers.get(index) or self.open(index, cache)
        batch, position, first = cache.batch, cache.position, own.filled
        offset = cache.offset
        end = offset + position + 1
        slots = own.rows[(offset + first) * batch : end * batch]
        at = self.places(cache, first, position + 1)
        if first == position:
            queries = self.project(index, state, at, slots)
        else:
            skipped = cache.states[first:position].flatten(0, 1)
            queries = self.project(index, torch.cat([skipped, state]), at, slots)[-batch:]
        own.filled = position + 1
        attended = scaled_dot_product_attention(
            queries.view(batch, self.kv_heads, -1, self.head_width),
            own.keys.narrow(2, 0, end),
            own.values.narrow(2, 0, end),
            attn_mask=self.bias(index, cache),
            scale=self.scale,
        )
        return self.finish(index, state, attended.flatten(1), own.memory)

    def layer_of_rows(
        self, index: int, state: Tensor, rows: Ints, positions: Ints, cache: Cache
    ) -> Tensor:
        """As `layer`, for some rows of the batch, each at its own position: (A, d) to (A, d). The others' gaps stay, and grow.

        Rows are ascending, so that as many as the batch has are all of them, in order.
        """
        own = cache.layers.get(index) or self.open(index, cache)
        batch = cache.batch
        memory = self.recall(index, own, cache, rows)
        entering, all_rows, all_positions = state, rows, positions
        gaps = positions - own.filled_rows[rows]
        if gaps.any():
            behind = np.repeat(rows, gaps)
            started = np.cumsum(gaps) - gaps
            skipped = np.arange(len(behind)) - np.repeat(started - own.filled_rows[rows], gaps)
            held = self.tensor(skipped * batch + behind)
            entering = torch.cat([cache.states.flatten(0, 1).index_select(0, held), state])
            all_rows, all_positions = (
                np.concatenate([behind, rows]),
                np.concatenate([skipped, positions]),
            )
        out = own.rows.new_empty(len(entering), own.rows.shape[1])
        queries = self.project(index, entering, self.places_of(cache, all_rows, all_positions), out)
        slots = self.tensor((cache.offsets[all_rows] + all_positions) * batch + all_rows)
        own.rows.index_copy_(0, slots, out)
        own.filled_rows[rows] = positions + 1

        chosen = None if len(rows) == batch else self.tensor(rows)

        def of_rows(kept: Tensor) -> Tensor:
            return kept if chosen is None else kept.index_select(0, chosen)

        columns = int((cache.offsets[rows] + positions).max()) + 1
        attended = scaled_dot_product_attention(
            queries[-len(rows) :].view(len(rows), self.kv_heads, -1, self.head_width),
            of_rows(own.keys.narrow(2, 0, columns)),
            of_rows(own.values.narrow(2, 0, columns)),
            attn_mask=self.bias_of(index, cache, rows, positions, columns),
            scale=self.scale,
        )
        return self.finish(index, state, attended.flatten(1), memory)

    def recall(self, index: int, own: LayerCache, cache: Cache, rows: Ints) -> Memory | None:
        """What a layer remembers of these rows' prompts."""
        return None

    def layer_exact(self, index: int, state: Tensor, cache: Cache) -> Tensor:
        """As `layer`, but positions that skipped this layer run it too, in parallel; ``cache.states`` moves on with them.

        The states of all positions that the layer lacks must be those that enter it: run layers one after the other.
        """
        own = cache.layers.get(index) or self.open(index, cache)
        first, position, batch = own.filled, cache.position, cache.batch
        if first == position:
            return self.layer(index, state, cache)
        m, end = position + 1 - first, cache.offset + position + 1
        states = torch.cat([cache.states[first:position].flatten(0, 1), state])
        slots = own.rows[(cache.offset + first) * batch : end * batch]
        at = self.places(cache, first, position + 1)
        queries = self.project(index, states, at, slots)
        own.filled = position + 1
        # (m * B, heads * d_kv) to (B, kv_heads, group * m, d_kv)
        asked = queries.view(m, batch, self.kv_heads, -1, self.head_width).permute(1, 2, 3, 0, 4)
        group = asked.shape[2]
        bias = self.bias_square(index, cache, first)
        attended = scaled_dot_product_attention(
            asked.flatten(2, 3),
            own.keys.narrow(2, 0, end),
            own.values.narrow(2, 0, end),
            attn_mask=bias if group == 1 else bias.repeat(1, 1, group, 1),
            scale=self.scale,
        )
        attended = attended.unflatten(2, (group, m)).permute(3, 0, 1, 2, 4).reshape(m * batch, -1)
        moved = self.finish(index, states, attended, own.memory).view(m, batch, -1)
        cache.states[first:position] = moved[:-1]
        return moved[-1]

    def copy_upwards(self, cache: Cache, layer: int) -> None:
        """The newest position's keys and values in the layers above ``layer`` are those of that layer: a negative control."""
        column = cache.offset + cache.position
        last = slice((column - 1) * cache.batch, column * cache.batch)
        for index in range(layer, self.n_layers):
            own = cache.layers.get(index) or self.open(index, cache)
            own.rows[last] = cache.layers[layer - 1].rows[last]
            own.filled = cache.position

    def tensor(self, values: NDArray[Any]) -> Tensor:
        """On the model's device, by way of numpy: torch reads lists slowly."""
        return torch.from_numpy(values).to(self.device)
