"""The capitals of several monitors as that of one, by bettor: rows of ``growth`` (m, bets) become one."""

import math

import numpy as np
from scipy import special

from riskcal._validate import Floats


def _product(growth: Floats) -> Floats:
    result: Floats = growth.sum(0)
    return result


def _mean(growth: Floats) -> Floats:
    result: Floats = special.logsumexp(growth, axis=0) - math.log(len(growth))
    return result


def _sum(growth: Floats) -> Floats:
    """log(1 + sum of M) from rows of log(1 + M)."""
    largest = growth.max(0)
    result: Floats = largest + np.log(
        np.exp(growth - largest).sum(0) - (len(growth) - 1) * np.exp(-largest)
    )
    return result


MERGERS = {"product": _product, "mean": _mean, "sum": _sum}
