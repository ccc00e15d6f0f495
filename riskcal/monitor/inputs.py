"""What a `RiskMonitor` is given, checked."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError


def series(values: ArrayLike, name: str) -> Floats:
    """Finite numbers, one or several, or none, as (n,)."""
    given = _validate.as_given(values, name, "an array of numbers")
    return (
        np.zeros(0)
        if given.shape == (0,)
        else _validate.array(given[None] if given.ndim == 0 else given, name, ndim=(1,))
    )


def run_length(value: Any) -> float | None:
    """A mean number of losses until a false alarm."""
    if value is None:
        return None
    result = _validate.number(value, "average_run_length")
    if not 1.0 <= result < math.inf:
        raise RiskcalError(
            f"average_run_length: {result:g} is not a finite number of losses of at least 1."
        )
    return result


def rate(value: Any) -> float:
    """A probability of being sampled."""
    result = _validate.number(value, "sampling_rate")
    if not 0.0 < result <= 1.0:
        raise RiskcalError(
            f"sampling_rate: {result:g} is not in (0, 1]; give the share of requests that are evaluated."
        )
    return result


def clipping(value: Any) -> tuple[float, float] | None:
    """The range that proxies are clipped to."""
    if value is None:
        return None
    pair = _validate.array(value, "proxy", ndim=(1,))
    if pair.size != 2 or not pair[0] < pair[1] or math.isinf(pair[1] - pair[0]):
        raise RiskcalError(
            f"proxy: {_validate.shown(value)} is no range; give the lowest and the highest proxy that matter, (low, high)."
        )
    return float(pair[0]), float(pair[1])


def stream(losses: ArrayLike, proxies: ArrayLike | None) -> tuple[Floats, Floats]:
    """Losses (n,), NaN where a request was not sampled, and the proxies (n,) of all."""
    given = np.atleast_1d(_validate.as_given(losses, "losses", "an array of numbers"))
    values = (
        given
        if given.shape == (0,)
        else np.atleast_1d(_validate.shaped(given, "losses", ndim=(1,)))
    )
    if proxies is None:
        raise RiskcalError(
            "proxies: this monitor has a proxy=; give that of every request, sampled or not, with losses that are NaN where "
            "it was not."
        )
    known = series(proxies, "proxies")
    if known.size != values.size:
        raise RiskcalError(
            f"proxies: {known.size} given for {values.size} requests; give one for each, and a loss of NaN where none was "
            "measured."
        )
    return values.astype(np.float64), known


def refuse_left_out(left_out: NDArray[np.bool_]) -> None:
    """Refuse requests that were not sampled although their coin has the rate 1: the proof with a proxy is about the coin."""
    if left_out.any():
        raise RiskcalError(
            f"losses: nan at index {_validate.first(left_out)}, a request that is sampled with probability 1; construct the "
            "monitor with the sampling_rate of the coin."
        )
