"""The output head at an exit: over the whole vocabulary, or over the tokens that pruning keeps."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from riskcal.policy.pruning import Pruning
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.measures import Confidences


class Scores(NamedTuple):
    """Logits of the tokens that were compared."""

    logits: Tensor  #: (B, V), or (B, k) over the kept ones
    ids: Tensor | None = (
        None  #: (B, k) their ids, the likeliest at the first exit first; None: all, in order
    )

    def best(self) -> Tensor:
        """(B,) the id of the largest logit, the lowest of equals."""
        if self.ids is None:
            return self.logits.argmax(-1)
        # a NaN is the largest, as argmax has it
        first = (self.logits == self.logits.amax(-1, keepdim=True)) | self.logits.isnan()
        return self.ids.masked_fill(~first, torch.iinfo(self.ids.dtype).max).amin(-1)


class FullHead:
    """Every token at every layer."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def begin(self) -> None:
        """Start a new position."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch."""

    def scores(self, layer: int, state: Tensor, confidence: Confidences | None) -> Scores:
        """Logits after a layer; ``confidence`` is that of the exit before."""
        return Scores(self._backbone.logits(state))


class PrunedHead:
    """Every token at the first exit; after that only rows of the head that belong to kept tokens, gathered once."""

    def __init__(self, backbone: Backbone, pruning: Pruning) -> None:
        self._backbone, self._pruning = backbone, pruning
        self.begin()

    def begin(self) -> None:
        """Start a new position."""
        self._start = 0
        self._ids: Tensor | None = None  # (B, k(s)) by rank
        self._rows: Tensor | None = None  # (B, k(s), d)
        self._looked: Scores | None = None

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch."""
        if self._ids is not None:
            self._ids = self._ids.index_select(0, rows)
        if self._rows is not None:
            self._rows = self._rows.index_select(0, rows)

    def scores(self, layer: int, state: Tensor, confidence: Confidences | None) -> Scores:
        """Logits after a layer; ``confidence`` is that of the exit before."""
        backbone, pruning = self._backbone, self._pruning
        if self._ids is None:
            self._start = layer
            k = int(pruning.kept(layer, backbone.n_layers, backbone.vocabulary, start=layer))
            self._looked = Scores(backbone.logits(state))
            self._ids = likeliest(self._looked.logits, k)
            return self._looked
        kept = pruning.kept(
            layer, backbone.n_layers, backbone.vocabulary, start=self._start, confidence=confidence
        )
        widest = int(kept.max())
        logits = self._kept_logits(state, widest)
        if kept.min() < widest:
            beyond = np.arange(widest) >= kept.reshape(-1, 1)
            logits = logits.masked_fill(backbone.tensor(beyond), -torch.inf)
        self._looked = Scores(logits, self._ids[:, :widest])
        return self._looked

    def again(self, state: Tensor) -> Scores:
        """Logits of another state over the kept tokens of the last `scores`."""
        assert self._looked is not None
        logits = self._kept_logits(state, self._looked.logits.shape[1])
        return Scores(
            logits.masked_fill(self._looked.logits.isneginf(), -torch.inf), self._looked.ids
        )

    def _kept_logits(self, state: Tensor, k: int) -> Tensor:
        assert self._ids is not None
        if self._rows is None:
            rows = self._backbone.head_by_token.index_select(0, self._ids.flatten())
            self._rows = rows.view(*self._ids.shape, -1)
        return torch.matmul(self._rows[:, :k], self._backbone.normed(state)[:, :, None])[:, :, 0]


def likeliest(logits: Tensor, k: int) -> Tensor:
    """(B, k) the ids of the k largest logits of (B, V), in order, the lowest id first among equals.

    ``topk`` says nothing of equals, and among 32,000 float32 numbers there nearly always are some; a stable sort is several
    times slower. So logits are read as whole numbers of the same order, with the id in the lower half.
    """
    bits = (logits.float().nan_to_num(nan=math.inf) + 0.0).view(
        torch.int32
    )  # + 0.0: -0 and 0 are equal
    ascending = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits).long()
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((ascending << 32) - ids).topk(k).indices
