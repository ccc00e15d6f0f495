"""Which hypotheses may be rejected together, so that a false rejection happens with probability at most epsilon.

Each function takes p-values (k,) in the order in which they are to be tested and returns a boolean (k,): rejected, that
is, certified. All hold for any dependence between the p-values. An order must not depend on the data that are tested.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError


def bonferroni(pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
    """Reject every p-value of at most ``epsilon / k``."""
    p, level = _validate.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    return p <= level / p.size


def holm(pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
    """Holm's step-down (1979): ascending, the i-th p-value against ``epsilon / (k - i)``, until the first failure."""
    p, level = _validate.pvalues(pvalues), _validate.level(epsilon, "epsilon")
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
    """
    p, level = _validate.pvalues(pvalues), _validate.level(epsilon, "epsilon")
    starts = _validate.count(starts, "starts", least=1)
    if starts > p.size:
        raise RiskcalError(f"starts: {starts} exceeds the {p.size} p-values; give at most one start per p-value.")
    passes = p <= level / starts
    rejected = np.zeros(p.size, dtype=bool)
    for start in np.arange(starts) * p.size // starts:
        rejected[start:] |= np.logical_and.accumulate(passes[start:])
    return rejected
