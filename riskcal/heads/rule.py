"""The rule of Valade (2024): a threshold per head by the observed agreement."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.heads.inputs import _tokens
from riskcal.heads.path import _lowest_feasible
from riskcal.records.alignment import refuse_other_exits


def self_supervised(confidence: ArrayLike, agrees: ArrayLike, agreement: float = 0.9) -> Floats:
    """Valade's rule (2024): each head's lowest observed confidence from which on the observed agreement is high enough.

    Parameters
    ----------
    confidence : (N, K)
        Of each token at each head; NaN never exits, so such a token does not count for that head.
    agrees : (N, K)
        Whether that head's token is the full model's: booleans, or 0 and 1.
    agreement : float
        The share of the tokens at or above the threshold that must agree, in (0, 1].

    Returns
    -------
    (K,)
        With the confidences sorted ascending, the first one whose suffix has a mean of ``agrees`` of at least ``agreement``;
        ``inf`` where there is none. Equal confidences leave together, so only the first of them is tried. Non-decreasing in
        ``agreement``.

    Raises
    ------
    RiskcalError
        For arrays of different or wrong shape, infinite confidences, ``agrees`` other than 0 and 1, and ``agreement``
        outside (0, 1].

    Notes
    -----
    There is no finite-sample guarantee. The rule takes the best of many observed means on the very tokens it is judged by,
    so out of sample a head misses its target about as often as not, and one of four heads nearly always does. It also
    looks at all tokens, though the later heads of a cascade see only those that no earlier head took. Use `certified` where
    the agreement is a promise. Source: Valade, Accelerating Large Language Model Inference with Self-Supervised Early Exits
    (2024), section 3.

    Examples
    --------
    >>> traces = riskcal.load_example("g2p-traces")
    >>> riskcal.heads.self_supervised(traces.confidence[:, :4], traces.agrees[:, :4], agreement=0.99).round(2).tolist()
    [0.92, 0.47, 0.29, 0.16]
    """
    levels, right = _tokens(confidence, agrees)
    refuse_other_exits(confidence, agrees, "confidence", "agrees")
    target = _validate.number(agreement, "agreement")
    if not 0.0 < target <= 1.0:
        raise RiskcalError(
            f"agreement: {target:g} is not in (0, 1]; give the share of exited tokens that must agree."
        )
    return np.array(
        [_lowest_feasible(levels[:, k], right[:, k], target) for k in range(levels.shape[1])]
    )
