"""What a T5 of Hugging Face's is made of, with types: to torch whatever a module holds is a ``Tensor | Module``.

T5, mT5 and UMT5 have classes of their own, alike in all that stands here. What is quantized or adapted has other modules in
these places; `weights` and `selfcheck` look at what is there before they believe it.
"""

from collections.abc import Callable, Iterable
from typing import Literal, Protocol, cast, overload

import torch
from torch import Tensor

#: A module that makes of states (..., inputs) states (..., outputs).
Map = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """Projections, and in a stack's first layer (a UMT5's every layer) the bias on positions."""

    q: Map
    k: Map
    v: Map
    o: Map
    n_heads: int
    dropout: float
    training: bool
    has_relative_attention_bias: bool
    relative_attention_max_distance: int

    def compute_bias(
        self, query_length: int, key_length: int, *, past_seen_tokens: int = 0
    ) -> Tensor: ...


class SelfLayer(Protocol):
    """Self-attention with its norm."""

    SelfAttention: Attention
    layer_norm: Map
    dropout: Map


class CrossLayer(Protocol):
    """Attention to the encoded prompt with its norm."""

    EncDecAttention: Attention
    layer_norm: Map
    dropout: Map


class Dense(Protocol):
    """A feed-forward layer's matrices: ``wi``, or ``wi_0`` and ``wi_1`` where it is gated, and ``wo``."""

    wi: Map
    wi_0: Map
    wi_1: Map
    wo: Map
    act: Map


class FeedForwardLayer(Protocol):
    """A feed-forward layer with its norm."""

    DenseReluDense: Dense
    layer_norm: Map

    def __call__(self, states: Tensor, /) -> Tensor: ...


class Parts(Protocol):
    """Of one block: cross-attention, in the middle, has the decoder's alone."""

    @overload
    def __getitem__(self, place: Literal[0], /) -> SelfLayer: ...
    @overload
    def __getitem__(self, place: Literal[1], /) -> CrossLayer: ...
    @overload
    def __getitem__(self, place: Literal[-1], /) -> FeedForwardLayer: ...


class Block(Protocol):
    """One layer of a stack."""

    layer: Parts


def blocks(stack: torch.nn.Module) -> list[Block]:
    """The blocks of an encoder or a decoder."""
    return list(cast(Iterable[Block], stack.block))
