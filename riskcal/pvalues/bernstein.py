"""Tests that look at the variance, and the asymptotic one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats
from riskcal.pvalues.losses import TINY, matrix_and_sums, unit_moments


def empirical_bernstein(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Maurer and Pontil's empirical Bernstein bound (2009, Theorem 4), inverted: ``2 exp(-x)``.

    The x is the root of ``mean + sqrt(2 variance x / n) + 7 x / (3 (n - 1)) = delta``, on losses mapped to the unit
    interval, with the sample variance (n - 1 in the denominator): the smallest level at which their bound rejects. Free
    of the rows' order, but not monotone in the single losses. Worth it only where n is large and the variance small.
    Parameters, returns and errors as in `hoeffding`.

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")
    >>> riskcal.pvalues.empirical_bernstein(losses[:, 9:12], delta=0.1).round(3).tolist()
    [0.0, 0.012, 0.419]
    """
    pvalues = of_moments(*unit_moments(losses, delta, lower, upper))
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def predictable_bernstein(
    losses: ArrayLike, delta: float, *, level: float, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Predictable plug-in empirical Bernstein: one over the largest value of a supermartingale, in the order given.

    Parameters
    ----------
    losses : (n,) or (n, k)
        Rows in an order that does not depend on their content, as for `betting`.
    delta, lower, upper
        As in `hoeffding`.
    level : float
        The level at which this hypothesis will be tested, which the plug-in weights aim at.

    Returns
    -------
    float or (k,)
        Valid for any stopping whenever each row's mean given the earlier rows exceeds delta under H. Almost always above
        `betting`; its inversion is a closed form (`riskcal.bounds.predictable_bernstein`).

    Notes
    -----
    The process is ``exp(sum of b (delta - loss) + (loss - m)^2 (log(1 - b) + b))`` with the weight ``b = min(sqrt(2
    log(1 / level) / (n s2)), 1/2)`` and the mean m and variance s2 taken from the earlier rows (Waudby-Smith and Ramdas
    2024, Theorem 2, one-sided and for fixed n).

    Examples
    --------
    >>> losses = riskcal.load_example("g2p").losses("textual")
    >>> p = riskcal.pvalues.predictable_bernstein(losses[:, 9:12], delta=0.1, level=0.05)
    >>> (p <= 0.05).tolist()
    [True, True, False]
    """
    level = _validate.level(level, "level")
    low, high = _validate.bounds(lower, upper)
    matrix, _ = matrix_and_sums(losses, low, high)
    tolerated = _validate.tolerance(delta, low, high)
    from riskcal.pvalues import kernels

    unit = matrix if (low, high) == (0.0, 1.0) else (matrix - low) / (high - low)
    log_capital, _ = kernels.predictable_bernstein(
        unit, (tolerated - low) / (high - low), level=level
    )
    pvalues = np.maximum(np.exp(-log_capital), TINY)
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def clt(
    losses: ArrayLike, delta: float, *, lower: float = 0.0, upper: float = 1.0
) -> float | Floats:
    """Asymptotic, without any finite-sample guarantee: the one-sided z-test with the sample's standard deviation.

    ``Phi(sqrt(n) (mean - delta) / deviation)``, but never below ``((upper - delta) / (upper - lower))^n``, which is what
    the exact test of 0/1 losses answers to n zeros: nothing else keeps p from being 0 where the losses seen do not vary
    (five zeros at delta .01 give .951). It is wrong all the same where losses are rare: 30 losses that are 1 with
    probability .1 are rejected at delta .1 in .18 of draws at a nominal .05, losses just below delta but for a rare 1
    nearly always. For comparison; nothing in riskcal uses it by default. Parameters and errors as in `hoeffding`.

    Returns
    -------
    float or (k,)
        Super-uniform under H only in the limit of many rows.

    Examples
    --------
    >>> round(riskcal.pvalues.clt(np.zeros(5), delta=0.01), 3)  # five perfect answers show next to nothing
    0.951
    """
    mean, deviation, tolerated, n = unit_moments(losses, delta, lower, upper)
    z = math.sqrt(n) * (mean - tolerated) / np.maximum(deviation, 1e-200)
    pvalues = np.maximum(special.ndtr(z), (1.0 - tolerated) ** n)
    pvalues = np.maximum(pvalues, TINY)
    return float(pvalues[0]) if np.ndim(losses) == 1 else pvalues


def of_moments(mean: Floats, deviation: Floats, delta: float, n: int) -> Floats:
    """`empirical_bernstein` of n losses in [0, 1], of which these are known."""
    gap = np.maximum(delta - mean, 0.0)
    linear, slope = deviation * math.sqrt(2.0 / n), 7.0 / (3.0 * (n - 1))
    root = 2.0 * gap / np.maximum(linear + np.sqrt(linear**2 + 4.0 * slope * gap), TINY)
    return np.clip(2.0 * np.exp(-(root**2)), TINY, 1.0)
