"""When a recorded decision would have stopped: thresholds of many candidates at once, over rows of any number of exits."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy.schedules import Constant, Schedule
from riskcal.records import direction
from riskcal.records.exits import Lengths
from riskcal.replay import stages
from riskcal.replay.stages import Stages

Positions = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rule:
    """Exit at the first layer, from ``min_layer`` on, whose confidence is at least the threshold; else at the last.

    Where lower thresholds are the stricter ones, its value is at most the threshold: both are then looked at negated.

    Attributes
    ----------
    grid : (k,)
        In the order that was given; ``inf`` is the full model.
    schedule : Constant or Decaying
    min_layer : int
    positions : int
        One more than the largest position of a row.
    lower_is_stricter : bool
    """

    grid: Floats
    schedule: Schedule = Constant()
    min_layer: int = 1
    positions: int = 1
    lower_is_stricter: bool = False

    @property
    def candidates(self) -> pd.DataFrame:
        """What tells candidates apart."""
        return pd.DataFrame({"threshold": self.grid})

    @property
    def k(self) -> int:
        """Candidates."""
        return len(self.grid)

    @cached_property
    def strictness(self) -> Floats:
        """Thresholds (k,) that a value, ``seen`` as it is, must reach."""
        if not self.lower_is_stricter:
            return self.grid
        return np.where(np.isinf(self.grid), math.inf, -self.grid)

    @cached_property
    def order(self) -> NDArray[np.intp]:
        """Candidates from the most lenient on."""
        return np.argsort(self.strictness)

    def seen(self, confidence: NDArray[Any]) -> NDArray[Any]:
        """Confidences, or what is one negated."""
        return -confidence if self.lower_is_stricter else confidence

    @cached_property
    def local(self) -> Floats:
        """The confidence needed at every position (T, finite thresholds), ascending."""
        ascending = self.strictness[self.order]
        finite = ascending[np.isfinite(ascending)]
        where = np.arange(self.positions)[:, None]
        return np.ascontiguousarray(self.schedule.local_threshold(finite[None, :], where))

    def from_the_strictest(self) -> Self:
        """The same rule with candidates from the strictest threshold on."""
        return replace(self, grid=self.grid[self.order[::-1]])

    def exits(
        self, confidence: NDArray[Any], begin: Lengths, lengths: Lengths, position: Positions
    ) -> NDArray[np.int64]:
        """Exits (rows, k), from 1, of rows of which each has ``lengths`` confidences from ``begin`` on."""
        from riskcal.replay import kernels

        position = self._place(position)
        ascending = np.empty((len(begin), self.k), dtype=np.int64)
        ascending[:] = lengths[:, None]
        finite = ascending[:, : self.local.shape[1]]
        kernels.exit_layers(
            self.seen(confidence), begin, lengths, self.local, position, self.min_layer, finite
        )
        exits = np.empty_like(ascending)
        exits[:, self.order] = ascending
        return exits

    def met(
        self,
        confidence: NDArray[Any],
        exits: NDArray[np.int64],
        lengths: Lengths,
        position: Positions,
    ) -> NDArray[np.bool_]:
        """Which candidates (k,) need exactly the ``confidence`` (rows, k) at which some row exits."""
        needed = np.full((len(self.local), self.k), math.nan)
        needed[:, self.order[: self.local.shape[1]]] = self.local
        early = exits < lengths[:, None]
        found: NDArray[np.bool_] = (
            (self.seen(confidence) == needed[self._place(position)]) & early
        ).any(0)
        return found

    def _place(self, position: Positions) -> Positions:
        """The row of ``local`` for each position."""
        return position if self.positions > 1 else np.zeros_like(position)


def as_schedule(schedule: Any) -> Schedule:
    """A schedule, which is an object rather than a name."""
    if isinstance(schedule, type) or not hasattr(schedule, "local_threshold"):
        raise RiskcalError(
            f"schedule: {_validate.shown(schedule)} is none; give riskcal.Constant() or riskcal.Decaying(...)."
        )
    return cast(Schedule, schedule)


def of(
    thresholds: ArrayLike,
    *,
    schedule: Schedule,
    min_layer: int,
    n_layers: int,
    position: Positions,
    allow_full: bool,
    lower_is_stricter: bool,
    give_up: ArrayLike | None,
) -> Rule | Stages:
    """The rule that these arguments of a replay ask for."""
    schedule = as_schedule(schedule)
    several = give_up is not None or np.ndim(_validate.as_given(thresholds, "thresholds")) == 2
    grid = np.empty(0) if several else _validate.threshold_grid(thresholds, allow_full=allow_full)
    least = _validate.count(min_layer, "min_layer", least=1)
    if least > n_layers:
        raise RiskcalError(f"min_layer: {least} exceeds the {n_layers} recorded layers.")
    lower = direction.given(lower_is_stricter)
    if lower and not isinstance(schedule, Constant):
        raise RiskcalError(
            "lower_is_stricter: decay is for confidences from 0 to 1, of which high ones are sure; leave the schedule out."
        )
    if several:
        if not isinstance(schedule, Constant):
            raise RiskcalError(
                "schedule: decay is for candidates of one threshold; leave the schedule out."
            )
        return stages.of(
            thresholds, give_up, n_layers=n_layers, min_layer=least, lower_is_stricter=lower
        )
    positions = 1 if isinstance(schedule, Constant) else int(position.max()) + 1
    if positions > 1 and position.min() == 1:
        _validate.warn(
            "position: no token stands at 0, and a decaying schedule counts generated tokens from 0. If 1 is the first of them, "
            "give position - 1 (of a table: table.assign(position=table['position'] - 1)): a decoder would exit elsewhere.",
        )
    return Rule(grid, schedule, least, positions, lower)
