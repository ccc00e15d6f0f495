"""What a decoder generated: position by position while it goes on, then as one table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Table(NamedTuple):
    """What was generated for some rows, each part (2, B, T)."""

    whole: NDArray[np.int64]  #: tokens, and the layers that they left at
    real: NDArray[np.float32]  #: their confidences, and the largest that were refused

    @classmethod
    def of(cls, steps: list[Step]) -> "Table":
        """Of successive positions."""
        said = [(step.tokens, step.exits, step.confidence, step.refused) for step in steps]
        read = np.array(said, dtype=np.float64).transpose(1, 2, 0)  # ids are exact in it
        return cls(read[:2].astype(np.int64), read[2:].astype(np.float32))


def assembled(
    rows: list[list[int]],
    parts: list[Table],
    batch: int,
    pad: int,
    as_tensor: Callable[[NDArray[Any]], Tensor],
) -> Generation:
    """The generation of a batch from those of groups of its rows."""
    if len(parts) == 1:
        whole, real = map(np.ascontiguousarray, parts[0])
    else:
        length = max(part.whole.shape[2] for part in parts)
        whole, real = (
            np.zeros((2, batch, length), np.int64),
            np.empty((2, batch, length), np.float32),
        )
        whole[0], real[0], real[1] = pad, math.nan, -math.inf
        for some, part in zip(rows, parts, strict=True):
            size = part.whole.shape[2]
            whole[:, some, :size], real[:, some, :size] = part
    return Generation(*map(as_tensor, (*whole, *real)))
