"""Confidence measures: what tells, after some layer, how sure its next token is.

Policies ask for them by the names in `riskcal_adapters.torch.confidence`.

Each is a function of a batch's logits (B, V) or raw states (B, d), and gives (B,) float32, computed in float32, where these
are; `read` brings them to the host. Higher is surer for all of them, and a token exits where the value reaches its threshold.
A NaN never does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from riskcal_adapters import request_checks
from riskcal_adapters.torch import kernels

Confidences = NDArray[np.float32]

#: Measures of a layer's states, which need no logits.
OF_STATES = ("state", "classifier")


class Classifier(Protocol):
    """A linear exit classifier, shared by all layers: d + 1 parameters."""

    @property
    def weight(self) -> Tensor:
        """(d,)."""

    @property
    def bias(self) -> Tensor:
        """One number."""


@dataclass(frozen=True, eq=False)
class Linear:
    """An exit classifier's weights, on the model's device."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, classifier: Classifier, width: int, device: torch.device) -> "Linear":
        weight, bias = map(torch.from_numpy, request_checks.classifier_parts(classifier, width))
        return cls(weight.to(device), bias.to(device))


def read(confidence: Tensor) -> Confidences:
    """On the host, which waits for it."""
    return np.asarray(confidence.cpu().numpy())


def read_both(confidence: Tensor, tokens: Tensor) -> tuple[Confidences, NDArray[np.int64]]:
    """Confidences with tokens (B,): one wait, and exactly."""
    both = torch.stack([confidence.double(), tokens.double()]).cpu().numpy()
    return both[0].astype(np.float32), both[1].astype(np.int64)


def margin(logits: Tensor) -> Tensor:
    """How far the most probable token is ahead of the next, in [0, 1] (CALM, section 3.4). Ties have margin 0."""
    top = torch.softmax(logits, -1, dtype=torch.float32).topk(2).values
    return top[:, 0] - top[:, 1]


def softmax_margin(logits: Tensor) -> Confidences:
    """`margin`, read."""
    return surest("softmax", logits)[0] if kernels.take(logits) else read(margin(logits))


def surest(name: str, logits: Tensor) -> tuple[Confidences, NDArray[np.int64]]:
    """A measure of `OF_LOGITS`, and the most probable tokens, the lowest of equals, read: two looks at the logits, not five."""
    if not kernels.take(logits):
        return read_both(OF_LOGITS[name](logits), logits.argmax(-1))
    found: tuple[Confidences, NDArray[np.int64]] = kernels.surest(
        kernels.OF_LOGITS.index(name), logits.contiguous().numpy()
    )
    return found


def max_probability(logits: Tensor) -> Tensor:
    """Probability of the most probable token, in [0, 1]."""
    return torch.softmax(logits, -1, dtype=torch.float32).amax(-1)


def negative_entropy(logits: Tensor) -> Tensor:
    """Minus the entropy of the next token, in nats: from -ln V to 0."""
    entropies: Tensor = torch.special.entr(torch.softmax(logits, -1, dtype=torch.float32))
    return entropies.sum(-1).neg()


#: Measures of a layer's logits alone; `kernels.OF_LOGITS` has their names.
OF_LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": margin,
    "max": max_probability,
    "entropy": negative_entropy,
}


def saturation(state: Tensor, before: Tensor | None) -> Tensor:
    """Cosine between a layer's state and the layer's before, in [-1, 1] (CALM, section 3.4).

    After the first layer there is none before: 0, as for a state of length zero.
    """
    if before is None:
        return torch.zeros(len(state), dtype=torch.float32, device=state.device)
    state, before = state.float(), before.float()
    lengths = torch.linalg.vector_norm(state, dim=-1) * torch.linalg.vector_norm(before, dim=-1)
    cosine = (state * before).sum(-1) / lengths
    return torch.where(lengths == 0, 0.0, cosine)


def classifier_probability(state: Tensor, classifier: Classifier) -> Tensor:
    """Probability, by a linear classifier on the raw state, that the layer's token is the last layer's (CALM, section 3.4)."""
    score = torch.mv(state.float(), classifier.weight.float()) + classifier.bias.float()
    return torch.sigmoid(score)


def plausible(probabilities: Tensor, alpha: float | Tensor) -> Tensor:
    """(B, V) bool: the tokens of at least ``alpha`` times the largest probability."""
    return probabilities >= alpha * probabilities.amax(-1, keepdim=True)


def doubt(probabilities: Tensor) -> Tensor:
    """(B,): 1 less the softmax margin, of which a subtraction from 1 would leave no digit where a layer is nearly certain."""
    top = probabilities.topk(2)
    others = probabilities.scatter(-1, top.indices[:, :1], 0.0)
    return others.sum(-1) + top.values[:, 1]


def alpha_at(alpha: float, decay: float, layer: int, doubt: Tensor) -> Tensor:
    """(B, 1): the hyperbolic share ``alpha / (1 + r i) * (1 - c)`` at layer i; surer layers have more plausible tokens."""
    return (alpha / (1.0 + decay * layer) * doubt)[:, None]


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of nonnegative (B, V), not normalised; 0 log 0 is 0."""
    mean = (p + q) / 2
    return (torch.xlogy(p, p / mean).nan_to_num() + torch.xlogy(q, q / mean).nan_to_num()).sum(
        -1
    ) / 2


def contrasted(expert: Tensor, amateur: Tensor, head: Tensor, *, tail: bool, mass: bool) -> Tensor:
    """The margin between the two largest scores of contrastive decoding.

    On the plausible tokens H (``head``) the expert's lead over the amateur is a softmax g, scaled by the probability that
    the expert gives to H (``mass``; the authors' code scales by 1). Off H a score is the expert's probability with ``tail``,
    else 0.

    Parameters
    ----------
    expert, amateur : (B, V)
        Logits of the layer and of an earlier one.
    head : (B, V) bool
    """
    log = torch.log_softmax(expert, -1, dtype=torch.float32)
    # what the amateur rules out altogether is a very large lead, not an infinite one
    lead = log - torch.log_softmax(amateur, -1, dtype=torch.float32).clamp_min(
        torch.finfo(torch.float32).min
    )
    share = torch.softmax(lead.masked_fill(~head, -torch.inf), -1)
    probabilities = log.exp()
    scale = probabilities.masked_fill(~head, 0.0).sum(-1, keepdim=True) if mass else 1.0
    # 0, but a NaN stays one
    scores = torch.where(head, share * scale, probabilities if tail else 0.0 * probabilities)
    top = scores.topk(2).values
    return top[:, 0] - top[:, 1]
