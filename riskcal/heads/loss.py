"""A request's loss: what its tokens that left early were wrong by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.heads.inputs import _agreement, _most


def request_loss(
    exits: ArrayLike, errors: ArrayLike, *, agreement: float, max_tokens: int
) -> float | Floats:
    """The loss of a request that `certified` controls: feed it to `riskcal.RiskMonitor` with ``delta = 1 - agreement``.

    Parameters
    ----------
    exits : float or (n,)
        Tokens of each request that left at a head (or at one head, to watch that one), 0 to ``max_tokens``.
    errors : float or (n,)
        Those of them that are not the full model's token.
    agreement, max_tokens
        As certified: ``1 - certificate.delta`` and ``certificate.max_tokens``.

    Returns
    -------
    float or (n,)
        ``1 - agreement + (errors - (1 - agreement) exits) / max_tokens``, in [0, 1]. Its mean is at most ``1 - agreement``
        exactly where the pooled agreement, agreeing over exited tokens of all requests, is at least ``agreement``. A mean of
        each request's own share of errors would count a short request's tokens for more.

    Raises
    ------
    RiskcalError
        For counts that cannot be: negative, more errors than exits, more exits than ``max_tokens``.

    Examples
    --------
    >>> loss = riskcal.heads.request_loss([10, 4], [1, 0], agreement=0.9, max_tokens=24)
    >>> loss.round(3).tolist()
    [0.1, 0.083]
    >>> riskcal.RiskMonitor(delta=0.1).update(loss).alarm
    False
    """
    tolerated, most_tokens = 1.0 - _agreement(agreement), _most(max_tokens)
    left = np.atleast_1d(_validate.array(exits, "exits", ndim=(0, 1)))
    wrong = np.atleast_1d(_validate.array(errors, "errors", ndim=(0, 1)))
    if left.shape != wrong.shape:
        raise RiskcalError(
            f"errors: {wrong.size} given for {left.size} exits; give one per request."
        )
    for name, values, most, why in (
        ("exits", left, float(most_tokens), f"0 to max_tokens ({most_tokens})"),
        ("errors", wrong, left, "0 to the request's exits"),
    ):
        bad = (values < 0) | (values > most) | (values % 1 != 0)
        if bad.any():
            raise RiskcalError(
                f"{name}: {values[bad][0]:g} at index {_validate.first(bad)}; give a whole number of tokens, {why}."
            )
    losses = _loss(left, wrong, tolerated, most_tokens)
    return float(losses[0]) if np.ndim(exits) == 0 else losses


def _loss(exits: NDArray[Any], errors: NDArray[Any], tolerated: float, max_tokens: int) -> Floats:
    # rounding may end a hair beyond the bounds
    losses: Floats = np.clip(tolerated + (errors - tolerated * exits) / max_tokens, 0.0, 1.0)
    return losses
