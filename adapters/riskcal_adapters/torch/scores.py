"""Logits after a layer, over the whole vocabulary or over some of it."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Scores(NamedTuple):
    """Logits of the tokens that were compared."""

    logits: Tensor  #: (B, V), or (B, k) over some tokens
    ids: Tensor | None = None  #: (B, k) the ids of these; None: all, in order
    known_best: NDArray[np.int64] | None = None  #: `best`, read, where it is known already

    def best(self) -> Tensor:
        """(B,) the id of the largest logit, the lowest of equals."""
        if self.ids is None:
            return self.logits.argmax(-1)
        # a NaN is the largest, as argmax has it
        first = (self.logits == self.logits.amax(-1, keepdim=True)) | self.logits.isnan()
        return self.ids.masked_fill(~first, torch.iinfo(self.ids.dtype).max).amin(-1)

    def tokens(self) -> NDArray[np.int64]:
        """`best`, read."""
        return self.best().cpu().numpy() if self.known_best is None else self.known_best


def likeliest(logits: Tensor, k: int) -> Tensor:
    """(B, k) the ids of the k largest logits of (B, V), in order, the lowest id first among equals.

    ``topk`` says nothing of equals, and among 32,000 float32 numbers there nearly always are some; a stable sort is several
    times slower. So logits are read as whole numbers of the same order, with the id in the lower half.
    """
    # + 0.0: -0 and 0 are equal
    bits = (logits.float().nan_to_num(nan=math.inf) + 0.0).view(torch.int32)
    ascending = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits).long()
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((ascending << 32) - ids).topk(k).indices
