"""What exit heads are trained on: to say what the model says, as unsure of it as they can be (Valade 2024, Eq. 1)."""

import math

import torch
from scipy import optimize
from torch import Tensor

from riskcal import RiskcalError, internal


def head_loss(logits: Tensor, target: Tensor, entropy_penalty: float) -> Tensor:
    """``(1 - w) * cross-entropy - w * entropy`` of one head, the mean over positions, w the penalty.

    Parameters
    ----------
    logits : (N, V)
        Of the head.
    target : (N, V)
        What the model says: probabilities, or 1 at its likeliest token.
    entropy_penalty : float
        w, in [0, 1). Above about .5 a head that is always right says so with little probability (see `confidence_ceiling`);
        its confidences then rank as before, but thresholds are tiny, and no other w's.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> logits, target = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> [round(training.head_loss(logits, target, entropy_penalty=w).item(), 3) for w in (0.0, 0.5)]
    [0.036, -0.071]
    """
    log_probability = logits.float().log_softmax(-1)
    cross_entropy = -(target * log_probability).sum(-1)
    entropy = -(log_probability.exp() * log_probability).sum(-1)
    return ((1 - entropy_penalty) * cross_entropy - entropy_penalty * entropy).mean()


def head_targets(
    probabilities: Tensor, said: Tensor, ids: Tensor | None, kind: str = "soft"
) -> Tensor:
    """(N, V) what a head over the tokens ``ids`` should say where the model says something.

    What the model gives to tokens that the head lacks is spread evenly over those it has: it learns to be unsure there.

    Parameters
    ----------
    probabilities : (N, V)
        The model's, of the tokens that the head has.
    said : (N,)
        Ids of the model's likeliest tokens.
    ids : (V,) int64 or None
        The head's tokens; None: all.
    kind : {"soft", "hard"}
        The model's distribution, or its likeliest token alone.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> probabilities = torch.tensor([[0.7, 0.2]])  # of tokens 5 and 9; a tenth goes to others
    >>> training.head_targets(probabilities, said=torch.tensor([5]), ids=torch.tensor([5, 9])).round(decimals=2).tolist()
    [[0.75, 0.25]]
    """
    internal.choice(kind, "target", ("hard", "soft"))
    width = probabilities.shape[-1]
    if kind == "hard":
        tokens = torch.arange(width, device=said.device) if ids is None else ids
        probabilities = (said[:, None] == tokens).to(probabilities.dtype)
    if ids is None:
        return probabilities
    return probabilities + (1 - probabilities.sum(-1, keepdim=True)).clamp(min=0) / width


def confidence_ceiling(vocabulary: int, entropy_penalty: float) -> float:
    """The probability that a perfect head gives to its token under hard targets: no threshold above it is ever reached.

    The minimiser of `head_loss` has mass a on the target and spreads the rest, with
    ``(1 - w) / a = w * log(a * (V - 1) / (1 - a))``.

    Parameters
    ----------
    vocabulary
        V, at least 2.
    entropy_penalty
        w, in [0, 1).

    Examples
    --------
    >>> from riskcal_adapters.torch import training
    >>> round(training.confidence_ceiling(51_200, 0.95), 4)
    0.0086
    """
    internal.count(vocabulary, "vocabulary", least=2)
    weight = checked_penalty(entropy_penalty)
    if weight == 0:
        return 1.0

    def excess(
        logit: float,
    ) -> float:  # falls in the logit of a: (1 - w) / a falls, the right side rises
        mass = 1 / (1 + math.exp(-logit))
        return (1 - weight) / mass - weight * (logit + math.log(vocabulary - 1))

    even = -math.log(vocabulary - 1)  # a = 1 / V, where the right side is 0
    return 1 / (1 + math.exp(-optimize.brentq(excess, even, 700.0, xtol=1e-12)))


def checked_penalty(value: float) -> float:
    """An entropy penalty in [0, 1)."""
    weight = internal.number(value, "entropy_penalty")
    if not 0 <= weight < 1:
        raise RiskcalError(f"entropy_penalty: {weight:g} is not in [0, 1); the paper has .95.")
    return weight
