"""The learned exit measure: one linear classifier for all layers, d + 1 parameters, on the state before the final norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from riskcal_adapters.torch.training.confidence import Confidence


class ExitClassifier(torch.nn.Module):
    """Confidence ``sigmoid(weight . state + bias)`` that a layer's token is the last layer's (CALM, section 3.5).

    Parameters
    ----------
    d_model : int
        Width d of the decoder's states.

    Attributes
    ----------
    weight : (d,)
    bias : ()
        Both start at 0: confidence one half everywhere.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(d_model))
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``(...)`` of the confidence for raw states ``(..., d)``."""
        return states.float() @ self.weight + self.bias


def classifier_confidence(classifier: ExitClassifier) -> Confidence:
    """The classifier as an exit rule of `decoder_pass`."""

    @torch.no_grad()
    def confidence(states: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        return torch.sigmoid(classifier(states[-1]))

    return confidence
