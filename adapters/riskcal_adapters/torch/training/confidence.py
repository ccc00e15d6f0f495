"""What an exit is decided by during exit-aware training: functions of the layers run so far.

Each takes the states ``(B, T, d)`` and logits ``(B, T, V)`` of layers 1 to i and gives the confidence ``(B, T)`` at layer i.
They are the decoder's measures, on all positions at once. No gradient flows through them: an exit is a decision.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from riskcal import RiskcalError

Confidence = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@torch.no_grad()
def softmax_margin(states: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """How far the most probable token is ahead of the next, in [0, 1].

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> logits = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.4, 0.2]]).log()
    >>> [round(margin, 3) for margin in training.softmax_margin([], [logits]).tolist()]
    [0.3, 0.0]
    """
    return _margin(logits[-1])


@torch.no_grad()
def state_saturation(states: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
    """Cosine of the raw states of this layer and the one below; 0 at the first layer and for states of length zero.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> below, here = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    >>> round(training.state_saturation([below, here], []).item(), 3)
    0.6
    """
    if len(states) == 1:
        return torch.zeros(states[0].shape[:-1], device=states[0].device)
    return torch.cosine_similarity(states[-1].float(), states[-2].float(), dim=-1)


def pruned_margin(kept: int) -> Confidence:
    """The softmax margin over the ``kept`` tokens that the first layer ranks highest; over all of them at that layer.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import training
    >>> first, here = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.5, 0.3, 0.2]]).log()
    >>> round(training.pruned_margin(kept=2)([], [first, here]).item(), 3)  # of the first two alone
    0.25
    """
    if kept < 2:
        raise RiskcalError(f"kept: {kept}; a margin needs at least 2 tokens.")

    @torch.no_grad()
    def confidence(states: Sequence[Tensor], logits: Sequence[Tensor]) -> Tensor:
        if len(logits) == 1:
            return _margin(logits[0])
        return _margin(logits[-1].gather(-1, logits[0].topk(kept).indices))

    return confidence


def _margin(logits: Tensor) -> Tensor:
    top = logits.float().softmax(-1).topk(2).values
    return top[..., 0] - top[..., 1]
