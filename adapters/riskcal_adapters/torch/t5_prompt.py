"""What a T5's decoder knows of prompts: their encoding, and the biases on attention to it."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from riskcal_adapters.torch import kernels
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.weights import PositionBias


@dataclass(eq=False)
class Prompt:
    """Encoded prompts."""

    #: The encoder's normed output: (B * S, d); or, where there are ``starts``, each prompt from its own on.
    memory: Tensor
    bias: Tensor | None  # (B, 1, 1, S), -inf at padding; None without padding
    batch: int
    lengths: Ints  # (B,)
    starts: Ints  # (B,) rows of memory; of a pool each slot's; empty where prompts are padded to one length
    position_bias: list[list[Tensor]]  # of each layer, or one of all: (1, heads, 1, n) for n = 1..T
    causal_bias: dict[PositionBias, Tensor] = field(default_factory=dict)  # where needed

    def causal(self, bias: PositionBias, length: int) -> Tensor:
        """(1, heads, T, T) of all positions to all, -inf ahead of each."""
        if bias not in self.causal_bias:
            square = bias.square(length)
            ahead = torch.ones_like(square[0, 0], dtype=torch.bool).triu(1)
            self.causal_bias[bias] = square.masked_fill(ahead, -math.inf)
        return self.causal_bias[bias]

    def of(self, rows: Tensor, numbers: Ints) -> "Prompt":
        """Some rows of the batch."""
        lengths, starts, bias = self.lengths[numbers], self.starts, self.bias
        if len(starts):
            chosen = kernels.ranges(starts[numbers], lengths)
            memory = self.memory.index_select(0, torch.from_numpy(chosen))
            starts = np.cumsum(lengths) - lengths
        else:
            padded = self.memory.view(self.batch, -1, self.memory.shape[1])
            memory = padded.index_select(0, rows).flatten(0, 1)
            bias = None if bias is None else bias.index_select(0, rows)
        return replace(
            self, memory=memory, bias=bias, batch=len(rows), lengths=lengths, starts=starts
        )


@njit(cache=True)
def have_holes(mask: Any) -> bool:
    """Whether any row's real tokens (B, S) do not stand together."""
    for row in mask:
        begins, before = 0, False
        for real in row:
            begins += real and not before
            before = real
        if begins > 1:
            return True
    return False
