"""A network with an exit after each of five stages, which are unequal, and what each exit costs."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recipes.classifier import data

#: Width of the letters' embedding, and of every convolution of each stage.
EMBEDDED = 16
STAGES = ((24,), (48,), (96, 96), (128, 128), (160, 160, 160))
#: Stages that halve the number of places.
HALVING = (3,)
#: Places that a head looks at.
POOLED = 5


class Conv(nn.Module):
    """A convolution over three places, normalised; what has the shape of its input is added to it."""

    def __init__(self, width_in: int, width_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width_in, places) -> (n, width_out, places / stride)."""
        y = torch.relu(self.norm(self.conv(x)))
        return x + y if x.shape == y.shape else y


class Answer(NamedTuple):
    """What a request leaves with: a class, the exit from 1, and the probability that it gave the class."""

    label: int
    exit: int
    confidence: float


class MultiExit(nn.Module):
    """Stages one after another, each with a linear head on what it found (BranchyNet, Teerapittayanon et al. 2016)."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(data.LETTERS) + 1, EMBEDDED)
        stages, heads, width = [], [], EMBEDDED
        for number, widths in enumerate(STAGES):
            blocks = []
            for place, wider in enumerate(widths):
                halved = number in HALVING and place == 0
                blocks.append(Conv(width, wider, stride=2 if halved else 1))
                width = wider
            stages.append(nn.Sequential(*blocks))
            heads.append(
                nn.Sequential(
                    nn.AdaptiveAvgPool1d(POOLED), nn.Flatten(), nn.Linear(width * POOLED, n_classes)
                )
            )
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)

    def exits(self, letters: Tensor) -> Iterator[Tensor]:
        """Logits (n, classes) of one exit after another; a stage is computed when its exit is asked for."""
        x = self.embedding(letters).transpose(1, 2)
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            yield head(x)

    def forward(self, letters: Tensor) -> list[Tensor]:
        """Logits of all exits."""
        return list(self.exits(letters))

    @torch.no_grad()
    def answer(self, letters: Tensor, threshold: float) -> Answer:
        """Run the stages for one request, (20,), until a head is confident: what serving does."""
        number = 0
        for logits in self.exits(letters[None]):
            number += 1
            confidence, label = logits.softmax(-1).max(-1)
            if confidence.item() >= threshold:
                break
        return Answer(int(label), number, confidence.item())

    def flops(self) -> NDArray[np.float64]:
        """What a request has cost in all if it stops at each exit, (5,): its stages, and the heads that were asked.

        Two for each multiply-add of convolutions and linear layers, counted from their shapes. Normalisation (which can be folded
        into the convolution before it), pooling, activations and the embedding's look-up are left out.
        """
        places, spent = data.LONGEST, []
        for stage, head in zip(self.stages, self.heads, strict=True):
            operations = 2 * head[-1].in_features * head[-1].out_features
            for block in stage:
                conv = block.conv
                places //= conv.stride[0]
                size = conv.in_channels * conv.out_channels * conv.kernel_size[0]
                operations += 2 * places * size
            spent.append(operations)
        return np.cumsum(spent, dtype=np.float64)
