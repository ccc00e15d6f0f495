"""What a T5's decoder knows of prompts: their encoding, and the biases on attention to it."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
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
    # (1, heads, T, T), -inf ahead; where needed
    causal_bias: dict[PositionBias, Tensor] = field(default_factory=dict)
    last_bias: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # where needed

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


def around(square: Tensor) -> NDArray[np.float32]:
    """(heads, 2 S - 1): the bias by how far ahead a position is, from 1 - S on, of that between all (1, heads, S, S)."""
    around = torch.cat([square[0, :, 1:, 0].flip(1), square[0, :, 0]], 1)
    return np.asarray(around.contiguous().numpy())


def have_holes(mask: NDArray[np.bool_]) -> bool:
    """Whether any row's real tokens do not stand together."""
    begins = mask.copy()
    begins[:, 1:] &= ~mask[:, :-1]
    return bool((begins.sum(1) > 1).any())
