"""How the exit threshold changes along a generation: constant, or decaying with the token's position (CALM, Eq. 5)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats

_LARGEST = np.finfo(np.float64).max


@dataclass(frozen=True)
class Constant:
    """The same threshold at every position.

    Examples
    --------
    >>> riskcal.Constant().local_threshold(0.8, position=[0, 50]).tolist()
    [0.8, 0.8]
    """

    kind: Literal["constant"] = "constant"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def local_threshold(self, threshold: ArrayLike, position: ArrayLike) -> Floats:
        """The confidence needed at a position: ``threshold`` itself, broadcast against ``position``."""
        return np.broadcast_arrays(np.asarray(threshold, dtype=np.float64), position)[0]

    def critical_threshold(self, confidence: ArrayLike, position: ArrayLike) -> Floats:
        """The largest finite threshold at which a token of this confidence exits (see `Decaying.critical_threshold`)."""
        value = np.broadcast_arrays(np.asarray(confidence, dtype=np.float64), position)[0]
        return np.where(np.isnan(value), -math.inf, np.minimum(value, _LARGEST))


@dataclass(frozen=True)
class Decaying:
    """A threshold that grows more permissive as the generation proceeds: for measures from 0 to 1.

    Parameters
    ----------
    temperature : float
        Decay temperature tau, at least 0.
    max_length : int
        N, the length at which the decay is complete. Changing it changes every local threshold.
    form : {"paper", "t5x"}
        ``"paper"``: ``clip(0.9 threshold + 0.1 exp(-tau t / N), 0, 1)`` (CALM, Eq. 5). ``"t5x"``: the formula in the
        authors' code, ``threshold (0.9 + 0.1 exp(-tau t / N))``. They agree at threshold 1 only. Neither is constant at
        ``temperature=0`` in the paper's form (it gives ``0.9 threshold + 0.1``); use `Constant` for no decay.

    Notes
    -----
    Positions count generated tokens from 0; the prompt is excluded. A threshold of 1 decays below 1, so it is not the
    full model; ``inf`` is, and stays infinite.

    Examples
    --------
    >>> schedule = riskcal.Decaying(temperature=4.0, max_length=128)
    >>> schedule.local_threshold(0.8, position=[0, 32, 128]).round(3).tolist()
    [0.82, 0.757, 0.722]
    >>> riskcal.ExitPolicy(threshold=0.8, schedule=schedule).schedule.kind
    'decaying'
    """

    temperature: float = 4.0
    max_length: int = 128
    form: Literal["paper", "t5x"] = "paper"
    kind: Literal["decaying"] = "decaying"
    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        temperature = _validate.number(self.temperature, "temperature")
        if not 0 <= temperature < math.inf:
            raise _validate.RiskcalError(
                f"temperature: {temperature:g} is not a finite number of at least 0."
            )
        _validate.count(self.max_length, "max_length", least=1)
        _validate.choice(self.form, "form", ("paper", "t5x"))

    def local_threshold(self, threshold: ArrayLike, position: ArrayLike) -> Floats:
        """The confidence needed to exit at a position.

        Parameters
        ----------
        threshold : array_like
            The policy's threshold; ``inf`` is the full model and stays ``inf``.
        position : array_like
            Index of the generated token, from 0; broadcast against ``threshold``.
        """
        value, decay = np.broadcast_arrays(
            np.asarray(threshold, dtype=np.float64), self._decay(position)
        )
        if self.form == "t5x":
            return value * (0.9 + 0.1 * decay)
        return np.where(np.isposinf(value), math.inf, np.clip(0.9 * value + 0.1 * decay, 0.0, 1.0))

    def critical_threshold(self, confidence: ArrayLike, position: ArrayLike) -> Floats:
        """The largest finite threshold at which a token of this confidence exits at this position.

        Exact in floating point: ``confidence >= local_threshold(threshold, position)`` holds if and only if ``threshold <=
        critical_threshold(confidence, position)``, for every finite threshold. Where none exits (a NaN, a negative
        confidence in the paper's form) it is ``-inf``.
        """
        value, where = np.broadcast_arrays(np.asarray(confidence, dtype=np.float64), position)
        decay = self._decay(where)
        if self.form == "t5x":
            guess = np.asarray(value / (0.9 + 0.1 * decay))
            never, always = np.isnan(value), value >= _LARGEST
        else:
            guess = np.asarray((value - 0.1 * decay) / 0.9)
            never, always = np.isnan(value) | (value < 0), value >= 1
        result = np.where(always, _LARGEST, -math.inf)
        open_ = ~(never | always | np.isneginf(value))
        result[open_] = self._bisect(value[open_], where[open_], guess[open_])
        return result

    def _decay(self, position: ArrayLike) -> Floats:
        return np.exp(-self.temperature * np.asarray(position, dtype=np.float64) / self.max_length)

    def _bisect(self, confidence: Floats, position: Floats, guess: Floats) -> Floats:
        """Sharpen a guess that is off by rounding alone: the local threshold is nondecreasing in the threshold."""
        margin = 8 * np.spacing(np.maximum(np.maximum(np.abs(guess), np.abs(confidence)), 1.0))
        low: Floats = guess - margin
        high: Floats = guess + margin
        while True:
            middle = low + (high - low) / 2
            open_ = (middle > low) & (middle < high)
            if not open_.any():
                return low
            exits = self.local_threshold(middle, position) <= confidence
            low = np.where(open_ & exits, middle, low)
            high = np.where(open_ & ~exits, middle, high)


Schedule = Constant | Decaying
