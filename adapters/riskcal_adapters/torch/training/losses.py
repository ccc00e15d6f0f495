"""Losses of models that can exit at every layer, and of the classifier that decides when.

All are means over the positions that are not padding; logits are ``(L, B, T, V)``, labels ``(B, T)`` with -100 as padding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from riskcal import RiskcalError, internal


def layer_weights(n_layers: int, kind: str = "linear") -> Tensor:
    """Weights ``(L,)`` of the layers' losses; they sum to 1.

    Parameters
    ----------
    n_layers
        Decoder layers L.
    kind : {"linear", "uniform", "geometric"}
        Proportional to i (CALM's Eq. 6), to 1, or to 2 to the power of i.

    Examples
    --------
    >>> from riskcal_adapters.torch import training
    >>> training.layer_weights(4).tolist()
    [0.1, 0.2, 0.3, 0.4]
    """
    internal.choice(kind, "kind", ("linear", "uniform", "geometric"))
    internal.count(n_layers, "n_layers", least=1)
    layer = torch.arange(1, n_layers + 1, dtype=torch.float64)
    weights = {
        "linear": layer,
        "uniform": torch.ones_like(layer),
        "geometric": 2 ** (layer - n_layers),
    }[kind]
    return weights / weights.sum()


def layer_weighted_loss(logits: Tensor, labels: Tensor, kind: str = "linear") -> Tensor:
    """The mean token loss of each layer, weighted by `layer_weights` and summed (CALM, equation 6).

    Parameters
    ----------
    logits : (L, B, T, V)
    labels : (B, T)
        Token ids, -100 where padded.
    kind : {"linear", "uniform", "geometric"}
        The weights.

    Raises
    ------
    RiskcalError
        If every position is padding.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> logits = torch.zeros(4, 1, 3, 10)  # of 4 layers that know nothing of 10 tokens
    >>> round(training.layer_weighted_loss(logits, torch.tensor([[7, 2, -100]])).item(), 3), round(np.log(10).item(), 3)
    (2.303, 2.303)
    """
    n_layers, vocabulary = logits.shape[0], logits.shape[-1]
    losses = F.cross_entropy(
        logits.float().reshape(-1, vocabulary),
        labels.expand(n_layers, *labels.shape).reshape(-1),
        reduction="none",
    )
    per_layer = losses.view(n_layers, -1).sum(1) / _tokens(labels)
    return (per_layer * layer_weights(n_layers, kind).to(per_layer)).sum()


def consistency_labels(logits: Tensor) -> Tensor:
    """Whether layers 1 to L - 1 say what layer L says: ``(L - 1, B, T)`` bool. The last layer has no label: it must exit.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> logits = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]]).reshape(3, 1, 1, 2)  # 3 layers, 1 position
    >>> training.consistency_labels(logits).flatten().tolist()
    [False, True]
    """
    said = logits.argmax(-1)
    return said[:-1] == said[-1]


def independent_loss(
    scores: Tensor, consistent: Tensor, labels: Tensor, *, balanced: bool = False
) -> Tensor:
    """Binary cross-entropy of every layer's exit decision, averaged over layers (CALM, section 3.5).

    Parameters
    ----------
    scores : (L - 1, B, T)
        Logits of the classifier's confidence.
    consistent : (L - 1, B, T) bool
        From `consistency_labels`.
    labels : (B, T)
        Only where they are -100, padding, matters.
    balanced
        Weigh each class of each layer by one minus its frequency there, as CALM's released code does and its text does not.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> scores = torch.zeros(2, 1, 3)  # a classifier that says one half everywhere
    >>> consistent = torch.tensor([[[True, False, True]], [[True, True, True]]])
    >>> round(training.independent_loss(scores, consistent, labels=torch.tensor([[7, 2, 1]])).item(), 3)
    0.693
    """
    real = labels != -100
    count = _tokens(labels)
    target = consistent.to(scores.dtype)
    losses = F.binary_cross_entropy_with_logits(scores, target, reduction="none") * real
    if not balanced:
        return losses.sum((1, 2)).mean() / count
    positive = ((target * real).sum((1, 2)) / count)[:, None, None]
    weight = torch.where(consistent, 1 - positive, positive) * real
    return ((losses * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1e-9)).mean()


def geometric_loss(scores: Tensor, consistent: Tensor, labels: Tensor) -> Tensor:
    """Minus the log-probability of leaving exactly at the first consistent layer (Elbayad et al. 2020; CALM, section 3.5).

    The classifier stays below that layer i*, ``log(1 - c_j)`` for j < i*, and leaves there, ``log c_i*``, which is free where
    i* is the last layer. Layers above i* get no gradient. Arguments as in `independent_loss`.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> scores = torch.zeros(2, 1, 3)
    >>> consistent = torch.tensor([[[True, False, False]], [[True, True, False]]])  # first at layers 1, 2 and 3
    >>> loss = training.geometric_loss(scores, consistent, labels=torch.tensor([[7, 2, 1]]))
    >>> round((loss / np.log(2)).item(), 3)  # factors of one half, on average
    1.667
    """
    real = labels != -100
    earlier = consistent.cumsum(0) - consistent.long()  # consistent layers strictly below
    first = consistent & (earlier == 0)
    below = ~consistent & (earlier == 0)
    losses = torch.where(first, -F.logsigmoid(scores), 0) + torch.where(
        below, -F.logsigmoid(-scores), 0
    )
    return (losses * real).sum() / _tokens(labels)


def do_not_exit_f1(
    scores: Tensor, consistent: Tensor, labels: Tensor, threshold: float = 0.5
) -> Tensor:
    """F1 of "do not exit" at each layer, ``(L - 1,)``: a position is kept where confidence is below the threshold.

    NaN at a layer that is always consistent and never kept. Arguments as in `independent_loss`.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> scores = torch.tensor([[[2.0, -2.0, -2.0]]])  # exits at the first position alone
    >>> consistent = torch.tensor([[[True, False, True]]])
    >>> f1 = training.do_not_exit_f1(scores, consistent, labels=torch.tensor([[7, 2, 1]]))
    >>> round(f1.item(), 2)
    0.67
    """
    real = labels != -100
    kept, wanted = (torch.sigmoid(scores) < threshold) & real, ~consistent & real
    hits = (kept & wanted).sum((1, 2))
    return 2 * hits / (kept.sum((1, 2)) + wanted.sum((1, 2)))


def _tokens(labels: Tensor) -> Tensor:
    count = (labels != -100).sum()
    if not count:
        raise RiskcalError(
            "labels: every position is padding (-100); give at least one target token."
        )
    return count
