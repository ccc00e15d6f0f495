"""Candidates of more than one threshold: one per exit, or two, "confident enough" and "give up"."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.records.exits import Lengths


@dataclass(frozen=True, eq=False)
class Stages:
    """Exit at the first layer whose confidence is at least that layer's threshold, or at most what it gives up at.

    Attributes
    ----------
    needed, given_up : (k, E)
        For each exit but the last, as values are ``seen``: ``inf`` and ``-inf`` where it is never taken so.
    candidates : DataFrame, k rows
        What tells candidates apart, as `riskcal.Runs.candidates` has it.
    min_layer : int
    lower_is_stricter : bool
        Whether values and thresholds are looked at negated.
    """

    needed: Floats
    given_up: Floats
    candidates: pd.DataFrame
    min_layer: int = 1
    lower_is_stricter: bool = False

    @property
    def k(self) -> int:
        """Candidates."""
        return len(self.candidates)

    @property
    def grid(self) -> Floats:
        """A threshold of each candidate (k,), the first that it has."""
        first = np.isfinite(self.needed).argmax(1)
        values: Floats = self.needed[np.arange(self.k), first]
        return -values if self.lower_is_stricter else values

    def from_the_strictest(self) -> Self:
        """The same rule with candidates in the order in which `riskcal.Runs` has them."""
        names = list(self.candidates.columns)
        ascending = [name != "threshold" or self.lower_is_stricter for name in names]
        ordered = self.candidates.sort_values(names, ascending=ascending)
        order = ordered.index.to_numpy()
        return replace(
            self,
            needed=self.needed[order],
            given_up=self.given_up[order],
            candidates=ordered.reset_index(drop=True),
        )

    def seen(self, confidence: NDArray[Any]) -> NDArray[Any]:
        """Confidences, or what is one negated."""
        return -confidence if self.lower_is_stricter else confidence

    def exits(
        self, confidence: NDArray[Any], begin: Lengths, lengths: Lengths, position: NDArray[Any]
    ) -> NDArray[np.int64]:
        """Exits (rows, k), from 1, of rows of which each has ``lengths`` confidences from ``begin`` on."""
        from riskcal.replay import kernels

        exits = np.empty((len(begin), self.k), dtype=np.int64)
        kernels.exit_stages(
            self.seen(confidence),
            begin,
            lengths,
            self.needed,
            self.given_up,
            self.min_layer,
            exits,
        )
        return exits

    def met(
        self,
        confidence: NDArray[Any],
        exits: NDArray[np.int64],
        lengths: Lengths,
        position: NDArray[Any],
    ) -> NDArray[np.bool_]:
        """Which candidates (k,) need exactly the ``confidence`` (rows, k) at which some row exits."""
        which, stage = np.arange(self.k), np.minimum(exits, self.needed.shape[1]) - 1
        value, early = self.seen(confidence), exits < lengths[:, None]
        same = (value == self.needed[which, stage]) | (value == self.given_up[which, stage])
        found: NDArray[np.bool_] = (same & early).any(0)
        return found


def of(
    thresholds: ArrayLike,
    give_up: ArrayLike | None,
    *,
    n_layers: int,
    min_layer: int,
    lower_is_stricter: bool,
) -> Stages:
    """The rule of thresholds (k,) or (k, L - 1), and of what is given up at, of either shape.

    A vector may name the last exit too, which takes whatever is left.
    """
    stages = max(n_layers - 1, 1)
    upper = _per_stage(thresholds, "thresholds", stages)
    vectors = np.ndim(_validate.as_given(thresholds, "thresholds")) == 2
    k = len(upper)
    if np.isneginf(upper).any() or (not vectors and np.isposinf(upper).any()):
        bad = np.isneginf(upper) if np.isneginf(upper).any() else np.isposinf(upper)
        raise RiskcalError(
            f"thresholds: {upper[bad][0]} at index {_validate.first(bad)}; give a number (of a vector also inf, where an exit is "
            "never taken); the full model is never a hypothesis: leave it out."
        )
    nowhere = np.isposinf(upper).all(1)
    if nowhere.any():
        raise RiskcalError(
            f"thresholds: candidate {int(nowhere.argmax())} exits nowhere; the full model is never a hypothesis: leave it out."
        )
    columns: dict[str, Any] = {"threshold": upper[:, 0]}
    if vectors:
        columns = {"threshold": np.arange(k, 0, -1.0), "thresholds": [*map(text, upper)]}
    lower = np.full(upper.shape, math.inf if lower_is_stricter else -math.inf)
    if give_up is not None:
        lower = _per_stage(give_up, "give_up", stages)
        columns |= _given_up(lower, upper, lower_is_stricter)
    candidates = pd.DataFrame(columns)
    again = candidates.drop(columns="threshold" if vectors else []).duplicated()
    if again.any():
        raise RiskcalError(
            f"thresholds: candidate {int(again.argmax())} is given more than once; list each once."
        )
    sign = -1.0 if lower_is_stricter else 1.0
    needed = np.where(np.isposinf(upper), math.inf, sign * upper)
    return Stages(needed, sign * lower, candidates, min_layer, lower_is_stricter)


def text(thresholds: Floats) -> str:
    """One candidate's thresholds, by the number of the exit, as a column ``thresholds`` of runs holds them."""
    named = enumerate(thresholds.tolist(), start=1)
    return json.dumps({str(stage): value for stage, value in named if value < math.inf})


def _per_stage(given: ArrayLike, name: str, stages: int) -> Floats:
    """(k, E) of (k,), (k, E) or (k, E + 1), whose last column is the last exit's."""
    values = _validate.shaped(given, name, ndim=(1, 2))
    if np.isnan(values).any():
        raise RiskcalError(
            f"{name}: nan at index {_validate.first(np.isnan(values))}; give a number."
        )
    if values.ndim == 1:
        return np.repeat(values[:, None], stages, axis=1)
    if values.shape[1] not in (stages, stages + 1):
        raise RiskcalError(
            f"{name}: has shape {values.shape}; give (k,), or (k, {stages}): one for each exit before the last."
        )
    return np.ascontiguousarray(values[:, :stages])


def _given_up(lower: Floats, upper: Floats, lower_is_stricter: bool) -> dict[str, Any]:
    """Columns of what is given up at, which must lie beyond the threshold on its other side."""
    if lower.shape != upper.shape:
        raise RiskcalError(
            f"give_up: {len(lower)} candidates, but thresholds {len(upper)}; give one for each."
        )
    if not np.isfinite(lower).all():
        bad = ~np.isfinite(lower)
        raise RiskcalError(
            f"give_up: {lower[bad][0]} at index {_validate.first(bad)}; give a finite number."
        )
    crossed = np.isfinite(upper) & (lower <= upper if lower_is_stricter else lower >= upper)
    if crossed.any():
        row, stage = (int(i) for i in np.argwhere(crossed)[0])
        side = "above" if lower_is_stricter else "below"
        raise RiskcalError(
            f"give_up: {lower[row, stage]:g} of candidate {row} is not {side} its threshold {upper[row, stage]:g}, so that every "
            "request would leave at once."
        )
    if (lower == lower[:, :1]).all():
        return {"give_up": lower[:, 0]}
    return {f"give_up_{stage + 1}": column for stage, column in enumerate(lower.T)}
