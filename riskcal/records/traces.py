"""`Traces`: confidence and correctness of every exit along the full model's own path, one row per decision."""

import os
import re
import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import columns, files
from riskcal.records.columns import plain
from riskcal.records.order import tested_order


@dataclass(frozen=True, eq=False, repr=False)
class Traces:
    """Confidence and correctness of every exit, for each token of the full model's own path.

    Build them with `read`, `from_frame` or `from_arrays`, which put rows by prompt in tested order, then by position; the
    replay relies on it. Exactly one of ``agrees`` and ``loss`` is given.

    Attributes
    ----------
    prompt, position : (N,)
        The prompt's id, and the index of the generated token from 0.
    confidence : (N, L)
        One column per exit layer 1..L; NaN never exits.
    agrees : (N, L) bool, or None
        Whether that exit's token equals the last layer's.
    loss : (N, L) in [0, 1], or None
        The loss of that exit's token.
    group : (N,) or None
        Optional token class.
    """

    prompt: NDArray[Any]
    position: NDArray[np.int64]
    confidence: NDArray[np.floating[Any]]
    agrees: NDArray[np.bool_] | None = None
    loss: NDArray[np.floating[Any]] | None = None
    group: NDArray[Any] | None = None

    @classmethod
    def read(cls, path: files.Source) -> Self:
        """Read a Parquet, CSV or JSON-lines file, or several, as `Runs.read` does."""
        frame = files.read(path)
        try:
            return cls.from_frame(frame)
        except RiskcalError as error:
            raise RiskcalError(f"{path}: {error}") from None

    @classmethod
    def from_frame(cls, table: Any) -> Self:
        """Validate a table with ``prompt``, ``position``, ``confidence`` and ``agrees`` or ``loss``, one row per token.

        The last three hold one list per row, or are spread over columns ``confidence_1`` ... ``confidence_L``.
        """
        frame = columns.from_object(table)
        columns.require(frame, ["prompt", "position"])
        given = {name: _exit_columns(frame, name) for name in ("confidence", "agrees", "loss")}
        group = frame["group"].to_numpy() if "group" in frame.columns else None
        return cls.from_arrays(
            prompt=columns.identifiers(frame["prompt"], "prompt").to_numpy(),
            position=frame["position"].to_numpy(),
            group=group,
            **given,
        )

    @classmethod
    def from_arrays(
        cls,
        *,
        prompt: ArrayLike,
        position: ArrayLike,
        confidence: ArrayLike | None,
        agrees: ArrayLike | None = None,
        loss: ArrayLike | None = None,
        group: ArrayLike | None = None,
    ) -> Self:
        """Validate arrays: ``prompt`` and ``position`` (N,), ``confidence`` and ``agrees`` or ``loss`` (N, L)."""
        if confidence is None:
            raise RiskcalError("confidence: the column is missing.")
        if (agrees is None) == (loss is None):
            raise RiskcalError("agrees, loss: give exactly one of the two.")
        ids = columns.identifiers(columns.series(prompt, "prompt"), "prompt").to_numpy()
        levels = _validate.float_matrix(confidence, "confidence")
        outcome_name = "agrees" if loss is None else "loss"
        outcome: Any = _validate.as_given(agrees, outcome_name)
        if loss is not None or outcome.dtype != bool or outcome.ndim != 2:
            outcome = _validate.float_matrix(agrees if loss is None else loss, outcome_name)
        if outcome.shape != levels.shape:
            raise RiskcalError(
                f"confidence: has shape {levels.shape}, but the outcomes have {outcome.shape}."
            )
        where = columns.series(position, "position").to_numpy()
        classes = None if group is None else columns.series(group, "group").to_numpy()
        for name, column in (("prompt", ids), ("position", where), ("group", classes)):
            if column is not None and np.shape(column) != (len(levels),):
                raise RiskcalError(
                    f"{name}: has shape {np.shape(column)}; expected ({len(levels)},), one entry per token."
                )
        if np.isnan(outcome).any():
            raise RiskcalError(
                f"{outcome_name}: NaN at index {_validate.first(np.isnan(outcome))}; every outcome must be known."
            )
        if outcome.dtype != bool:
            _validate.in_range(outcome, outcome_name, 0.0, 1.0)
        if loss is None:
            fractional = (
                np.zeros(0, dtype=bool)
                if outcome.dtype == bool
                else (outcome != 0) & (outcome != 1)
            )
            if fractional.any():
                raise RiskcalError(
                    f"agrees: {outcome[fractional][0]:g} at index {_validate.first(fractional)}; it is true or false. "
                    "Give anything in between as loss."
                )
            if not outcome[:, -1].all():
                warnings.warn(
                    f"agrees: false at row {int(outcome[:, -1].argmin())} for the last exit, which is the full model itself. "
                    "It will count as a loss there; outcomes against references should be given as loss.",
                    stacklevel=2,
                )
        if not np.issubdtype(where.dtype, np.integer) or (where < 0).any():
            raise RiskcalError(
                "position: give whole numbers from 0, the index of the generated token."
            )
        distinct, code = np.unique(ids, return_inverse=True)
        rank = np.empty(len(distinct), dtype=np.intp)
        rank[tested_order(distinct)] = np.arange(len(distinct))
        order = np.lexsort((where, rank[code]))
        repeated = (np.diff(rank[code][order]) == 0) & (np.diff(where[order]) == 0)
        if repeated.any():
            row = int(order[1:][repeated].min())
            raise RiskcalError(
                f"position: {where[row]} of prompt {plain(ids[row])!r} stands twice, again at row {row}; one row per token."
            )
        return cls(
            prompt=ids[order],
            position=where[order].astype(np.int64),
            confidence=levels[order],
            agrees=outcome[order].astype(bool, copy=False) if loss is None else None,
            loss=outcome[order] if loss is not None else None,
            group=None if classes is None else classes[order],
        )

    @property
    def n_layers(self) -> int:
        """Exit layers L."""
        return int(self.confidence.shape[1])

    def to_frame(self) -> pd.DataFrame:
        """One row per token, the per-exit arrays as lists."""
        table: dict[str, Any] = {"prompt": self.prompt, "position": self.position}
        if self.group is not None:
            table["group"] = self.group
        for name in ("confidence", "agrees", "loss"):
            value = getattr(self, name)
            if value is not None:
                table[name] = list(value)
        return pd.DataFrame(table)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write as Parquet or JSON lines (lists per row) or CSV (one column per exit), by the path's ending."""
        frame = self.to_frame()
        if str(path).lower().endswith(".csv"):
            for name in ("confidence", "agrees", "loss"):
                if name in frame.columns:
                    matrix = np.vstack(frame.pop(name).to_list())
                    # float32 as it is: its own shortest text would be read back as another float64
                    spread = pd.DataFrame(
                        matrix if matrix.dtype == bool else matrix.astype(np.float64)
                    )
                    spread.columns = pd.Index([f"{name}_{i + 1}" for i in range(spread.shape[1])])
                    frame = frame.join(spread)
        files.write(frame, path)

    def __repr__(self) -> str:
        kind = "agrees" if self.agrees is not None else "loss"
        prompts = len(np.unique(self.prompt))
        return f"Traces: {len(self.prompt)} tokens of {prompts} prompts x {self.n_layers} exits; confidence, {kind}"


def _exit_columns(frame: pd.DataFrame, name: str) -> Any:
    """One (N, L) array from a column of lists or from columns name_1 ... name_L; None if neither is there."""
    if name in frame.columns:
        columns.as_numpy(frame[name], name)  # refuses what has no cells to look at
        lists = [
            isinstance(v, list | tuple) or (isinstance(v, np.ndarray) and v.ndim > 0)
            for v in frame[name]
        ]
        lengths = np.array(
            [len(v) if held else -1 for v, held in zip(frame[name], lists, strict=True)]
        )
        if (lengths < 0).any():
            row = int((lengths < 0).argmax())
            raise RiskcalError(
                f"{name}: {plain(frame[name].iloc[row])!r} at row {row} ({int((lengths < 0).sum())} such rows) is not a list of "
                f"one number per exit. A CSV file has no lists: spread them over columns {name}_1, {name}_2 and so on, as "
                "Traces.write does, or write Parquet or JSON lines."
            )
        if lengths[0] == 0 or (lengths != lengths[0]).any():
            row = int((lengths != lengths[0]).argmax())
            raise RiskcalError(
                f"{name}: row {row} holds {lengths[row]} exits, row 0 {lengths[0]}; every row needs one number per exit."
            )
        return frame[name].to_list()
    numbered = re.compile(rf"{name}_(\d+)")
    exits = sorted(
        int(match[1]) for column in frame.columns if (match := numbered.fullmatch(str(column)))
    )
    if exits and exits != list(range(1, len(exits) + 1)):
        raise RiskcalError(
            f"{name}: columns for the exits {exits}; number them from {name}_1 on, with no gap."
        )
    return frame[[f"{name}_{i}" for i in exits]].to_numpy() if exits else None
