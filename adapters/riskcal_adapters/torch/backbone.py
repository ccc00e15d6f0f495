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
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from riskcal_adapters.torch import kernels
from riskcal_adapters.torch.caches import Cache, Ints, LayerCache, Memory, Packed
from riskcal_adapters.torch.kernels import Floats
from riskcal_adapters.torch.scores import Scores

#: Up to so many columns `kernels` attend quicker than torch does, if all rows stand in the same one.
FEW_COLUMNS = 128


class ExitHeadLike(Protocol):
    """A layer's own head: an `exit_heads.ExitHead`, or whatever scores states as one does."""

    @property
    def ids(self) -> Tensor | None:
        """(k,) the ids of the tokens that it scores; None: all, in order."""

    def logits(self, state: Tensor) -> Tensor:
        """Of raw states: (B, d) to (B, k)."""


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
        Heads of keys and values. Where there are more heads of queries, each is shared by an equal number of them.
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
    exit_heads: Mapping[int, ExitHeadLike]
    #: Columns of what `project` writes.
    row_width: int

    @functools.cached_property
    def lean(self) -> bool:
        """Whether rows read what they have where it is, by `kernels`, instead of gathered, padded and masked together."""
        return self.device.type == "cpu" and self.dtype is torch.float32

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
    def embed_on_device(self, tokens: Tensor, cache: Cache) -> Tensor:
        """The same of tokens (B,) that the host need not know."""

    @abc.abstractmethod
    def embed_at(self, tokens: list[int], rows: Ints, positions: Ints, cache: Cache) -> Tensor:
        """The same of some rows (A, d), each at a position of its own."""

    def embed_into(
        self, state: Tensor, tokens: Ints, rows: Ints, positions: Ints, cache: Cache
    ) -> None:
        """Write them to these rows of ``state``."""
        entering = self.embed_at(tokens.tolist(), rows, positions, cache)
        state.index_copy_(0, self.tensor(rows), entering)

    def of(self, values: Tensor, rows: Ints) -> Tensor:
        """Some rows of values."""
        if self.lean:
            return torch.from_numpy(kernels.of(values.numpy(), rows))
        return values.index_select(0, self.tensor(rows))

    def put(self, values: Tensor, places: Ints, targets: Tensor, rows: Ints) -> None:
        """Some of the values to rows of ``targets``."""
        if self.lean:
            kernels.copy(values.numpy(), places, targets.numpy(), rows)
        else:
            chosen = values.index_select(0, self.tensor(places))
            targets.index_copy_(0, self.tensor(rows), chosen)

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
    def finish(
        self, index: int, state: Tensor, attended: Tensor, memory: Memory | Packed | None
    ) -> Tensor:
        """What a layer does after attention to itself: (m * B, d), position by position, to the next layer's states."""

    def places(self, cache: Cache, first: int, end: int) -> Any:
        """What `project` needs to know of positions (of rotary ones, how far they turn queries and keys); None: nothing."""
        return None

    def places_of(self, cache: Cache, rows: Ints, positions: Ints) -> Any:
        """The same of some rows, each at a position of its own."""
        return None

    def bias_of_last(self, index: int, cache: Cache) -> NDArray[np.float32] | None:
        """Where it is `lean`: the bias (heads, n) on attention from the last of n positions to all; None where there is none."""
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
        written = own.rows[(offset + first) * batch : end * batch]
        at = self.places(cache, first, position + 1)
        if first == position:
            queries = self.project(index, state, at, written)
        else:
            skipped = cache.states[first:position].flatten(0, 1)
            queries = self.project(index, torch.cat([skipped, state]), at, written)[-batch:]
        own.filled = position + 1
        if self.lean and end <= FEW_COLUMNS:
            counts, bias = end - cache.begins, self.bias_of_last(index, cache)
            attended = own.attend(queries, own.starts_of(cache), counts, bias, self.scale)
            return self.finish(index, state, attended, own.memory)
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
        all_rows, all_positions = kernels.catch_up(rows, positions, own.filled_rows)
        entering, gaps = state, len(all_rows) - len(rows)
        if gaps:
            entering = self._entering(cache, all_rows, all_positions, state)
        out = state.new_empty(len(all_rows), self.row_width)
        queries = self.project(index, entering, self.places_of(cache, all_rows, all_positions), out)
        queries = queries[gaps:] if gaps else queries
        written, starts, counts = kernels.place(
            all_rows, all_positions, len(rows), cache.offsets, cache.begins, own.row_step, own.step
        )
        if self.lean:
            kernels.put(out.numpy(), written, own.held)
            bias = self.bias_of_last(index, cache)
            attended = own.attend(queries, starts, counts, bias, self.scale)
            return self.finish(index, state, attended, memory)
        own.rows.index_copy_(0, self.tensor(written), out[:, -own.rows.shape[1] :])
        chosen = None if len(rows) == batch else self.tensor(rows)

        def of_rows(kept: Tensor) -> Tensor:
            return kept if chosen is None else kept.index_select(0, chosen)

        columns = int((cache.offsets[rows] + positions).max()) + 1
        attended = scaled_dot_product_attention(
            queries.view(len(rows), self.kv_heads, -1, self.head_width),
            of_rows(own.keys.narrow(2, 0, columns)),
            of_rows(own.values.narrow(2, 0, columns)),
            attn_mask=self.bias_of(index, cache, rows, positions, columns),
            scale=self.scale,
        )
        return self.finish(index, state, attended.flatten(1), memory)

    @property
    def compiled(self) -> bool:
        """Whether there are `layer_and_surest` and `alone`; ``embedding`` (V, d) is then all that enters the first layer."""
        return False

    @property
    def embedding(self) -> Tensor:
        """(V, d): of tokens."""
        raise NotImplementedError

    def layer_and_surest(
        self, measure: int, index: int, entering: Tensor, at: tuple[Ints, Ints, Ints], cache: Cache
    ) -> tuple[Floats, Floats, Ints]:
        """`layer_of_rows`, and in the same compiled loop how sure rows are by a measure, its place in `kernels.OF_LOGITS`.

        Parameters
        ----------
        entering : (B, d)
            States before the layer, of all rows.
        at : (A,), (A,), (n,)
            Rows, their positions, and the places among them that are looked at.

        Returns
        -------
        (A, d), (n,), (n,)
            States after the layer; of the places, the confidence, and the final head's most probable token.
        """
        raise NotImplementedError

    def alone(
        self, tokens: Tensor, mask: NDArray[np.bool_], measure: int, needed: Floats, ends: Ints
    ) -> tuple[Ints, Floats]:
        """Generate from one prompt (1, S), each token the likeliest of the first layer that is sure enough of it.

        Parameters
        ----------
        needed : (T, L)
            Confidence to leave with by the measure, by position and layer; of the last it is not asked.
        ends : (E,)
            Tokens after which there are no more.

        Returns
        -------
        (2, n), (2, n)
            Tokens and the layers that they left at, from 1; their confidences there, and the largest that were not enough.
        """
        raise NotImplementedError

    def _entering(self, cache: Cache, rows: Ints, positions: Ints, state: Tensor) -> Tensor:
        """States that skipped a layer, and those that stand before it now, the last ones."""
        if self.lean:
            found = kernels.entering(cache.states.numpy(), rows, positions, state.numpy())
            return torch.from_numpy(found)
        skipped = (positions * cache.batch + rows)[: len(rows) - len(state)]
        held = cache.states.flatten(0, 1).index_select(0, self.tensor(skipped))
        return torch.cat([held, state])

    def recall(
        self, index: int, own: LayerCache, cache: Cache, rows: Ints
    ) -> Memory | Packed | None:
        """What a layer remembers of these rows' prompts, made first where it still has that of earlier ones."""
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
        written = own.rows[(cache.offset + first) * batch : end * batch]
        at = self.places(cache, first, position + 1)
        queries = self.project(index, states, at, written)
        own.filled = position + 1
        if self.lean and end <= FEW_COLUMNS:
            bias = self.bias_of_last(index, cache)
            counts = (np.arange(end - m + 1, end + 1)[:, None] - cache.begins).ravel()
            starts = np.tile(own.starts_of(cache), m)
            attended = own.attend(queries, starts, counts, bias, self.scale)
        else:
            attended = self._attend_square(index, queries, own, cache, first)
        moved = self.finish(index, states, attended, own.memory).view(m, batch, -1)
        cache.states[first:position] = moved[:-1]
        return moved[-1]

    def _attend_square(
        self, index: int, queries: Tensor, own: LayerCache, cache: Cache, first: int
    ) -> Tensor:
        """Of all positions from ``first`` to the one at hand."""
        m, batch, end = cache.position + 1 - first, cache.batch, cache.offset + cache.position + 1
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
        by_query: Tensor = attended.unflatten(2, (group, m))
        return by_query.permute(3, 0, 1, 2, 4).reshape(m * batch, -1)

    def copy_upwards(self, cache: Cache, layer: int) -> None:
        """The newest position's keys and values in the layers above ``layer`` are those of that layer: a negative control."""
        column = cache.offset + cache.position
        last = slice((column - 1) * cache.batch, column * cache.batch)
        for index in range(layer, self.n_layers):
            own = cache.layers.get(index) or self.open(index, cache)
            own.rows[last] = cache.layers[layer - 1].rows[last]
            own.filled = cache.position

    def tensor(self, values: NDArray[Any]) -> Tensor:
        """On the model's device, by way of numpy: torch reads lists slowly. What was queued there is not waited for."""
        held = torch.from_numpy(values)
        if self.device.type == "cuda":  # from a copy that stays where it is until the device has it
            return held.pin_memory().to(self.device, non_blocking=True)
        return held if self.device.type == "cpu" else held.to(self.device)
