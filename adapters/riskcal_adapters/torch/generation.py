"""What a decoder generated: position by position while it goes on, then as one table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for B prompts; T is the longest of the generations.

    Attributes
    ----------
    tokens : (B, T) int64
        Token ids, the end token included, the padding id after it.
    exit_layers : (B, T) int64
        Layer at which each token left the decoder, 1..L; 0 where padded.
    confidence : (B, T) float32
        Confidence at that layer; NaN where padded.
    refused : (B, T) float32
        The largest confidence at which the token might have exited earlier and did not; ``-inf`` where there was none. A
        threshold above all of a row's would have generated the very same.

    Examples
    --------
    >>> from riskcal_adapters.torch import load_example
    >>> decoder = load_example("g2p")
    >>> policy = riskcal.ExitPolicy(threshold=0.9)
    >>> generation = decoder.generate(*decoder.encode(["calm", "guarantee"]), policy=policy, max_new_tokens=24)
    >>> generation.tokens.shape == generation.exit_layers.shape == generation.confidence.shape
    True
    >>> (generation.confidence >= 0.9)[(generation.exit_layers > 0) & (generation.exit_layers < 8)].all().item()
    True
    """

    tokens: Tensor
    exit_layers: Tensor
    confidence: Tensor
    refused: Tensor


@dataclass(eq=False)
class Step:
    """One position of a batch, row by row."""

    tokens: list[int]
    exits: list[int]
    confidence: list[float]
    refused: list[float]

    @classmethod
    def blank(cls, batch: int, pad: int) -> "Step":
        return cls([pad] * batch, [0] * batch, [math.nan] * batch, [-math.inf] * batch)

    def spread(self, rows: list[int], blank: "Step") -> "Step":
        """``blank``, of a larger batch, with this at its ``rows``."""
        for place, row in enumerate(rows):
            blank.tokens[row], blank.exits[row] = self.tokens[place], self.exits[place]
            blank.confidence[row], blank.refused[row] = self.confidence[place], self.refused[place]
        return blank


def assembled(
    rows: list[list[int]],
    parts: list[list[Step]],
    batch: int,
    pad: int,
    as_tensor: Callable[[NDArray[Any]], Tensor],
) -> Generation:
    """The generation of a batch from the positions of groups of its rows."""
    length = max(len(steps) for steps in parts)
    tokens = np.full((batch, length), pad)
    exits = np.zeros((batch, length), dtype=np.int64)
    confidence = np.full((batch, length), math.nan, dtype=np.float32)
    refused = np.full((batch, length), -math.inf, dtype=np.float32)
    for some, steps in zip(rows, parts, strict=True):
        own, size = slice(None) if len(some) == batch else some, len(steps)
        tokens[own, :size] = np.array([step.tokens for step in steps]).T
        exits[own, :size] = np.array([step.exits for step in steps]).T
        confidence[own, :size] = np.array([step.confidence for step in steps], dtype=np.float32).T
        refused[own, :size] = np.array([step.refused for step in steps], dtype=np.float32).T
    return Generation(
        as_tensor(tokens), as_tensor(exits), as_tensor(confidence), as_tensor(refused)
    )
