"""The learned exit measure: one linear classifier for all layers, d + 1 parameters, on the state before the final norm."""

import os
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from riskcal import internal
from riskcal_adapters import _checkpoints
from riskcal_adapters.torch import replacing
from riskcal_adapters.torch.training.confidence import Confidence


class ExitClassifier(torch.nn.Module):
    """Linear confidence that a layer's token is the last layer's: ``sigmoid(dot(weight, state) + bias)`` (CALM, section 3.5).

    Parameters
    ----------
    d_model : int
        Width d of the decoder's states.

    Attributes
    ----------
    weight : (d,)
    bias : ()
        Both start at 0: confidence one half everywhere.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch.training import ExitClassifier
    >>> classifier = ExitClassifier(d_model=128)
    >>> classifier.weight.shape, classifier(torch.randn(2, 128)).shape
    (torch.Size([128]), torch.Size([2]))
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(d_model))
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, states: Tensor) -> Tensor:
        """Logits ``(...)`` of the confidence for raw states ``(..., d)``."""
        return states.float() @ self.weight + self.bias


def save_classifier(classifier: ExitClassifier, path: str | os.PathLike[str]) -> None:
    """Write ``weight`` and ``bias`` as safetensors; an existing file is replaced whole or not at all.

    Examples
    --------
    >>> from riskcal_adapters.torch.training import ExitClassifier, load_classifier, save_classifier
    >>> save_classifier(ExitClassifier(d_model=128), "classifier.safetensors")
    >>> load_classifier("classifier.safetensors").weight.shape
    torch.Size([128])
    """
    with replacing.written(internal.a_path(path)), internal.replacing(path) as partial:
        save_file(
            {name: value.detach().contiguous() for name, value in classifier.state_dict().items()},
            partial,
        )


def load_classifier(path: str | os.PathLike[str]) -> ExitClassifier:
    """Read a classifier that `save_classifier` wrote.

    Raises
    ------
    RiskcalError
        If the file cannot be read or does not hold exactly ``weight`` (d,) and ``bias`` ().

    Examples
    --------
    >>> from importlib import resources
    >>> from riskcal_adapters.torch.training import load_classifier
    >>> folder = resources.files("riskcal_adapters") / "g2p" / "checkpoint"
    >>> load_classifier(folder / "classifier-independent.safetensors").weight.shape
    torch.Size([128])
    """
    found = _checkpoints.read_classifier(internal.a_path(path), load_file)
    classifier = ExitClassifier(len(found["weight"]))
    classifier.load_state_dict(found)
    return classifier


def classifier_confidence(classifier: ExitClassifier) -> Confidence:
    """The classifier as an exit rule of `decoder_pass`.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> classifier = training.ExitClassifier(d_model=4)
    >>> training.classifier_confidence(classifier)([torch.randn(3, 4)], []).tolist()  # untrained
    [0.5, 0.5, 0.5]
    """

    @torch.no_grad()
    def confidence(states: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        return torch.sigmoid(classifier(states[-1]))

    return confidence
