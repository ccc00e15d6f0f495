"""What scores states at an exit: the layer's own head or the model's final one, or that over the tokens that pruning keeps."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from riskcal.policy import ExitPolicy
from riskcal.policy.pruning import Pruning
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.measures import OF_STATES, Confidences
from riskcal_adapters.torch.scores import Scores, likeliest


class Head(Protocol):
    """What a layer's states are scored with, one position after the other."""

    def begin(self) -> None:
        """Start a new position."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch."""

    def scores(self, layer: int, state: Tensor, confidence: Confidences | None) -> Scores:
        """Logits after a layer; ``confidence`` is that of the exit before."""

    def again(self, layer: int, state: Tensor) -> Tensor:
        """Logits of an earlier layer's state over the tokens of the last `scores`."""


def of(policy: ExitPolicy, backbone: Backbone) -> Head:
    """The head that a policy asks for; measures of states need it at the exit only, which is the first that it is asked for."""
    if policy.pruning is None or policy.named().measure in OF_STATES:
        return FullHead(backbone)
    return PrunedHead(backbone, policy.pruning)


class FullHead:
    """At every layer all tokens of its exit head, or of the final head where it has none (`Backbone.scores`)."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def begin(self) -> None:
        """Start a new position."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows of the batch."""

    def scores(self, layer: int, state: Tensor, confidence: Confidences | None) -> Scores:
        """Logits after a layer; ``confidence`` is that of the exit before."""
        return self._backbone.scores(layer, state)

    def again(self, layer: int, state: Tensor) -> Tensor:
        """Logits of an earlier layer's state over the tokens of the last `scores`."""
        return self._backbone.scores(layer, state).logits


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

    def again(self, layer: int, state: Tensor) -> Tensor:
        """Logits of an earlier layer's state over the tokens of the last `scores`."""
        assert self._looked is not None
        if self._looked.ids is None:
            return self._backbone.logits(state)
        logits = self._kept_logits(state, self._looked.logits.shape[1])
        return logits.masked_fill(self._looked.logits.isneginf(), -torch.inf)

    def _kept_logits(self, state: Tensor, k: int) -> Tensor:
        assert self._ids is not None
        if self._rows is None:
            rows = self._backbone.head_by_token.index_select(0, self._ids.flatten())
            self._rows = rows.view(*self._ids.shape, -1)
        return torch.matmul(self._rows[:, :k], self._backbone.normed(state)[:, :, None])[:, :, 0]
