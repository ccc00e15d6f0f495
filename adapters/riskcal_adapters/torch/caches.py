"""What is remembered of a batch's generations: keys and values by layer, states by position, and what is known of the prompts.

A T5's layers read an encoded prompt beside what they generated: padded to one length (`Memory`), or, where `kernels` do the
reading, token after token without padding (`Packed`).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from riskcal_adapters.torch import kernels

Ints = NDArray[np.int64]

_ONE = np.float32(1)
_NO_BIAS = np.zeros((0, 0), dtype=np.float32)


class Memory(NamedTuple):
    """What a layer reads of an encoded prompt beside its own keys and values."""

    keys: Tensor  # (B, heads, S, d_kv)
    values: Tensor
    bias: Tensor | None  # (B, 1, 1, S), -inf at padding; None without padding

    def of(self, rows: Tensor) -> "Memory":
        """Some rows of the batch."""
        bias = None if self.bias is None else self.bias.index_select(0, rows)
        return Memory(self.keys.index_select(0, rows), self.values.index_select(0, rows), bias)

    def attend(self, queries: Tensor) -> Tensor:
        """Unscaled attention of (m * B, heads * d_kv), position by position, each to its row's prompt."""
        batch, heads, _, width = self.keys.shape
        several = queries.shape[0] > batch  # positions; of one there is nothing to move
        by_head = (
            queries.view(-1, batch, heads, width).permute(1, 2, 0, 3)
            if several
            else queries.view(batch, heads, 1, width)
        )
        found = scaled_dot_product_attention(
            by_head, self.keys, self.values, attn_mask=self.bias, scale=1.0
        )
        return found.permute(2, 0, 1, 3).reshape(len(queries), -1) if several else found.flatten(1)

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()


class Packed(NamedTuple):
    """The same of prompts that stand one after the other."""

    rows: Tensor  # (N, 2 * heads * d_kv): keys and values of each token
    starts: Ints  # (B,): where each prompt's tokens begin
    counts: Ints  # (B,)
    width: int  # d_kv

    def of(self, rows: Ints) -> "Packed":
        """Some rows of the batch."""
        return self._replace(starts=self.starts[rows], counts=self.counts[rows])

    def attend(self, queries: Tensor) -> Tensor:
        """As `Memory.attend`."""
        starts, counts, (count, columns) = self.starts, self.counts, queries.shape
        if count > len(starts):
            several = count // len(starts)
            starts, counts = np.tile(starts, several), np.tile(counts, several)
        attended = kernels.attend(
            queries.numpy(),
            self.rows.numpy(),
            starts,
            1,
            counts,
            _NO_BIAS,
            counts,
            (0, columns, 1),
            columns,
            self.width,
            _ONE,
        )
        return torch.from_numpy(attended)

    @property
    def bytes(self) -> int:
        """Of keys and values."""
        return self.rows.numel() * self.rows.element_size()


@dataclass(eq=False)
class LayerCache:
    """Keys and values of one decoder layer.

    What is stored, ``rows``, has a row for each column of each row of the batch.
    """

    rows: Tensor  # (C * B, w), column by column, what one product writes; or row by row
    keys: Tensor  # (B, heads, C, d_kv), as are values: views of rows
    values: Tensor
    memory: Memory | Packed | None
    filled_rows: Ints  # (B,) how many of its first positions each row has
    by_row: bool = False
    held: NDArray[np.float32] | None = None  # `rows` as numpy, where `kernels` read it
    starts: Ints | None = None  # (B,) where each row's keys begin, once that was asked
    #: (B,) rows whose part of the memory is still an earlier prompt's, where slots are used again.
    stale: NDArray[np.bool_] | None = None

    @classmethod
    def on(
        cls,
        rows: Tensor,
        batch: int,
        heads: int,
        width: int,
        memory: Memory | Packed | None,
        *,
        by_row: bool = False,
    ) -> "LayerCache":
        """An empty one on ``rows``' memory; keys and values are the last two parts of a row."""
        parts = rows.shape[1] // (heads * width)
        if by_row:
            *_, keys, values = rows.view(batch, -1, parts, heads, width).permute(2, 0, 3, 1, 4)
        else:
            *_, keys, values = rows.view(-1, batch, parts, heads, width).permute(2, 1, 3, 0, 4)
        nothing = np.zeros(batch, dtype=np.int64)
        held = rows.numpy() if kernels.take(rows) else None
        return cls(rows, keys, values, memory, filled_rows=nothing, by_row=by_row, held=held)

    def __post_init__(self) -> None:
        # column c of row b is rows[b * row_step + c * step]
        self.row_step, self.step = (
            (self.keys.shape[2], 1) if self.by_row else (1, self.keys.shape[0])
        )
        heads, width = self.keys.shape[1], self.keys.shape[3]
        self._own, self._width = heads * width, width

    @property
    def filled(self) -> int:
        """How many of its first positions each row has, where all have as many."""
        return int(self.filled_rows[0])

    @filled.setter
    def filled(self, positions: int) -> None:
        self.filled_rows.fill(positions)

    def places(self, rows: Ints, columns: Ints) -> Ints:
        """Which of ``self.rows`` hold these columns of these rows of the batch."""
        return rows * self.row_step + columns * self.step

    def clear(self, rows: Tensor) -> None:
        """Nothing of earlier generations in these rows: where one overflowed, a mask would not hide it (0 times NaN is NaN)."""
        assert self.by_row
        self.rows.view(self.keys.shape[0], -1, self.rows.shape[1]).index_fill_(0, rows, 0.0)

    def starts_of(self, cache: "Cache") -> Ints:
        """Where the keys of each row of the batch begin."""
        if self.starts is None:
            self.starts = self.places(cache.everyone, cache.begins)
        return self.starts

    def of(self, kept: Tensor, numbers: Ints, batch: int, offset: int) -> "LayerCache":
        """The same for some rows of the batch; ``numbers`` are those of ``kept``, which would have to be read."""
        all_rows = self.rows.view(-1, batch, self.rows.shape[1])
        # columns beyond what any row has filled hold nothing yet: the length limit may be far away
        filled = offset + int(self.filled_rows.max())
        rows = self.rows.new_empty(len(all_rows) * len(kept), self.rows.shape[1])
        chosen = rows.view(-1, len(kept), self.rows.shape[1])
        torch.index_select(all_rows[:filled], 1, kept, out=chosen[:filled])
        memory = self.memory
        if memory is not None:
            memory = memory.of(numbers) if isinstance(memory, Packed) else memory.of(kept)
        part = LayerCache.on(rows, len(kept), self.keys.shape[1], self.keys.shape[3], memory)
        part.filled_rows = self.filled_rows[numbers]
        return part

    def attend(
        self,
        queries: Tensor,
        starts: Ints,
        counts: Ints,
        bias: NDArray[np.float32] | None,
        scale: float,
    ) -> Tensor:
        """Attention of (A, H * d_kv), each to so many keys from its place in ``rows`` on, by `kernels.attend`.

        ``bias`` (H, n) is that of the last of n positions.
        """
        own, held = self._own, self.held
        assert held is not None
        columns, keys = queries.shape[1], held.shape[1] - 2 * own
        bias = _NO_BIAS if bias is None else bias
        attended = kernels.attend(
            queries.contiguous().numpy(),
            held,
            starts,
            self.step,
            counts,
            bias,
            bias.shape[1] - counts,
            (keys, keys + own, columns // own),
            columns,
            self._width,
            np.float32(scale),
        )
        return torch.from_numpy(attended)


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
    begins: Ints  # (B,): the column of each row's first key
    position: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    batch: int = field(init=False)
    offset: int = field(init=False)  # of all rows, where they have one in common
    everyone: Ints = field(init=False)  # (B,) all rows

    def __post_init__(self) -> None:
        self.batch, self.offset = self.states.shape[1], int(self.offsets[0])
        self.everyone = np.arange(self.batch)

    @property
    def length(self) -> int:
        """Positions T that there is room for."""
        return self.states.shape[0]

    def append(self, state: Tensor) -> None:
        """Go on to the next position; ``state`` (B, d) is what layers that skipped this one will read."""
        self.states.select(0, self.position).copy_(state)
        self.position += 1

    def keep(self, rows: Tensor, numbers: Ints) -> None:
        """Go on with some rows of the batch, (A,) in this order, which the host knows as ``numbers``."""
        for index, own in self.layers.items():
            self.layers[index] = own.of(rows, numbers, self.batch, self.offset)
        self.prompt, self.offsets = self.prompt.of(rows, numbers), self.offsets[numbers]
        self.begins = self.begins[numbers]
        states = self.states.new_empty(self.length, len(rows), self.states.shape[2])
        torch.index_select(self.states[: self.position], 1, rows, out=states[: self.position])
        self.states, self.batch, self.everyone = states, len(rows), np.arange(len(rows))

    def rewind(self, position: int) -> None:
        """Forget everything from this position on."""
        for own in self.layers.values():
            np.minimum(own.filled_rows, position, out=own.filled_rows)
        self.position = position
