"""The procedures as functions of p-values (k,) in tested order, which return a boolean (k,): rejected, that is, certified.

All but `hochberg` hold for any dependence between the p-values. Orders, weights and graphs must not depend on the data that
are tested.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.fwer import inputs

#: Relative slack on a level that was summed up along a graph: rounding, not evidence.
_ROUNDING = 1e-12


def bonferroni(pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
    """Reject every p-value of at most ``epsilon / k``.

    Examples
    --------
    >>> riskcal.fwer.bonferroni([0.001, 0.015, 0.2, 0.02], 0.05).tolist()
    [True, False, False, False]
    """
    p, level = inputs.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    return p <= level / p.size


def holm(pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
    """Holm's step-down (1979): ascending, the i-th p-value against ``epsilon / (k - i)``, until the first failure.

    Examples
    --------
    >>> riskcal.fwer.holm([0.001, 0.015, 0.2, 0.02], 0.05).tolist()
    [True, True, False, True]
    """
    p, level = inputs.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    order = np.argsort(p, kind="stable")
    passes = p[order] <= level / (p.size - np.arange(p.size))
    rejected = np.zeros(p.size, dtype=bool)
    rejected[order] = np.logical_and.accumulate(passes)
    return rejected


def fixed_sequence(pvalues: ArrayLike, epsilon: float, starts: int = 1) -> NDArray[np.bool_]:
    """Test in the given order and stop at the first failure.

    Parameters
    ----------
    pvalues : (k,)
        In an order fixed before the data were seen.
    epsilon : float
        Family-wise error level.
    starts : int
        Number of evenly spaced starting points; each walks on, at ``epsilon / starts``, until its own first failure.

    Returns
    -------
    (k,) bool
        With one start, a prefix.

    Examples
    --------
    >>> riskcal.fwer.fixed_sequence([0.001, 0.2, 0.01, 0.3], 0.05).tolist()
    [True, False, False, False]
    >>> riskcal.fwer.fixed_sequence([0.001, 0.2, 0.01, 0.3], 0.05, starts=2).tolist()
    [True, False, True, False]
    """
    p, level = inputs.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    starts = _validate.count(starts, "starts", least=1)
    if starts > p.size:
        raise RiskcalError(
            f"starts: {starts} exceeds the {p.size} p-values; give at most one start per p-value."
        )
    passes = p <= level / starts
    rejected = np.zeros(p.size, dtype=bool)
    for start in np.arange(starts) * p.size // starts:
        rejected[start:] |= np.logical_and.accumulate(passes[start:])
    return rejected


def hochberg(pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
    """Hochberg's step-up (1988), which needs p-values that satisfy Simes' inequality: under PRDS, not in general.

    From the largest p-value down, the first that is at most ``epsilon / (number of p-values at least as large)`` is
    rejected with all smaller ones; never fewer than `holm` rejects.

    Notes
    -----
    Simes' inequality holds for independent p-values and under positive regression dependence on the true nulls (PRDS,
    Sarkar 1998). Losses of one prompt under neighbouring thresholds are positively dependent in practice, but nobody
    checks PRDS for `riskcal.pvalues.betting`, and negative dependence can break the level. Prefer `holm`: the gain in
    certified candidates was nil wherever it was measured.

    Examples
    --------
    >>> riskcal.fwer.hochberg([0.04, 0.03, 0.045], 0.05).tolist(), riskcal.fwer.holm([0.04, 0.03, 0.045], 0.05).tolist()
    ([True, True, True], [False, False, False])
    """
    p, level = inputs.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    order = np.argsort(p, kind="stable")
    passes = p[order] <= level / (p.size - np.arange(p.size))
    rejected = np.zeros(p.size, dtype=bool)
    rejected[order] = np.logical_or.accumulate(passes[::-1])[::-1]
    return rejected


def fallback(pvalues: ArrayLike, epsilon: float, weights: ArrayLike) -> NDArray[np.bool_]:
    """The fallback procedure (Wiens 2003; Wiens and Dmitrienko 2005): a fixed sequence that survives a failure.

    Parameters
    ----------
    pvalues : (k,)
        In an order fixed before the data were seen.
    epsilon : float
        Family-wise error level.
    weights : (k,)
        Each hypothesis's own share of epsilon, in the same order; one in total. ``(1, 0, ..., 0)`` is the fixed sequence.

    Returns
    -------
    (k,) bool
        Each p-value is tested at its own share and, if the hypothesis before it was rejected, that one's level too.

    Raises
    ------
    RiskcalError
        For weights that are negative, that do not sum to one within 1e-9, or that are not one per p-value.

    Examples
    --------
    >>> riskcal.fwer.fallback([0.001, 0.2, 0.012], 0.05, weights=[0.5, 0.25, 0.25]).tolist()
    [True, False, True]
    """
    p, level = inputs.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    rejected = np.zeros(p.size, dtype=bool)
    passed_on = 0.0
    for j, share in enumerate(inputs.weights(weights, p.size)):
        local = level * share + passed_on
        rejected[j] = local > 0.0 and p[j] <= local * (1.0 + _ROUNDING)
        passed_on = local if rejected[j] else 0.0
    return rejected


def graphical(
    pvalues: ArrayLike, epsilon: float, weights: ArrayLike, transitions: ArrayLike
) -> NDArray[np.bool_]:
    """Sequentially rejective graph (Bretz, Maurer, Brannath and Posch 2009, Algorithm 1).

    Parameters
    ----------
    pvalues : (k,)
    epsilon : float
        Family-wise error level.
    weights : (k,)
        Each hypothesis's initial share of epsilon; one in total.
    transitions : (k, k)
        Row i says which fractions of its level hypothesis i hands to the others once it is rejected: nonnegative, zero on
        the diagonal, at most one in total. Equal weights with ``1 / (k - 1)`` everywhere are Holm's procedure, the chain
        ``i -> i + 1`` is the fixed sequence or `fallback`.

    Returns
    -------
    (k,) bool
        The same set in whatever order the hypotheses are visited.

    Raises
    ------
    RiskcalError
        For weights or transitions of the wrong shape, negative ones, weights that do not sum to one within 1e-9, a row
        that sums to more than one, or an edge from a hypothesis to itself.

    Notes
    -----
    A shortcut of the closed test with weighted Bonferroni tests, hence valid for any dependence. An edge that is meant as
    infinitesimal in the literature may be a small number such as 1e-6.

    Examples
    --------
    >>> ring = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]  # each hands all its level to the next
    >>> riskcal.fwer.graphical([0.03, 0.001, 0.012], 0.05, weights=[0.5, 0.25, 0.25], transitions=ring).tolist()
    [True, True, True]
    """
    p, level = inputs.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    share = inputs.weights(weights, p.size).copy()
    edges = inputs.transitions(transitions, p.size).copy()
    rejected = np.zeros(p.size, dtype=bool)
    while (passes := ~rejected & (share > 0.0) & (p <= level * share * (1.0 + _ROUNDING))).any():
        j = int(passes.argmax())
        rejected[j] = True
        into, out = edges[:, j].copy(), edges[j].copy()
        share += share[j] * out
        loop = 1.0 - into * out
        edges += np.outer(into, out)
        edges = np.divide(
            edges, loop[:, None], out=np.zeros_like(edges), where=loop[:, None] > _ROUNDING
        )
        share[j], edges[j], edges[:, j] = 0.0, 0.0, 0.0
    return rejected


def initial_levels(
    epsilon: float, weights: ArrayLike, transitions: ArrayLike | None = None
) -> Floats:
    """The level at which each hypothesis of `fallback` or `graphical` is first tested: where to tune `betting`.

    Parameters
    ----------
    epsilon : float
        Family-wise error level.
    weights : (k,)
        As in `graphical`.
    transitions : (k, k), optional
        As in `graphical`; the default is the chain of `fallback`.

    Returns
    -------
    (k,)
        ``epsilon`` times the hypothesis's own weight, or, where that is zero, the level that reaches it along the most
        generous single path of rejections; 0 if none does. Tuning decides the power alone: the p-value is valid at every
        level, including the higher ones that rejections elsewhere bring.

    Examples
    --------
    >>> riskcal.fwer.initial_levels(0.05, weights=[0.5, 0.5, 0]).round(4).tolist()
    [0.025, 0.025, 0.025]
    """
    level = _validate.level(epsilon, "epsilon")
    k = _validate.array(weights, "weights", ndim=(1,)).size
    share = inputs.weights(weights, k)
    edges = np.eye(k, k=1) if transitions is None else inputs.transitions(transitions, k)
    reached, before = share, np.zeros(k)
    while (reached != before).any():
        reached, before = np.where(share > 0.0, share, (reached[:, None] * edges).max(0)), reached
    return level * reached
