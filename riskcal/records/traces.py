"""`Traces`: confidence and correctness of every exit along the full model's own path, one row per decision."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import (
    alignment,
    columns,
    costs,
    exits,
    files,
    joining,
    prompt_labels,
    renaming,
    showing,
)
from riskcal.records.columns import plain
from riskcal.records.exits import Lengths, PerExit
from riskcal.records.order import tested_order

_PER_EXIT = ("confidence", "agrees", "loss")


@dataclass(frozen=True, eq=False, repr=False)
class Traces:
    """Confidence and correctness of every exit, for each decision along the full model's own path.

    A decision is a generated token, or a whole request of a classifier, a cascade or a reasoning model. Its last exit is the
    full model. Decisions may have unequal numbers of exits: then what is (N, L) below is (M,), the exits of the first row,
    then those of the second and so on, with no padding anywhere, and ``lengths`` says how many each row has.

    Build them with `read`, `from_frame` or `from_arrays`, which put rows by prompt in tested order, then by position; the
    replay relies on it. Exactly one of ``agrees`` and ``loss`` is given.

    Attributes
    ----------
    prompt, position : (N,)
        The prompt's id, and the index of the decision (of the generated token) in it from 0.
    confidence : (N, L)
        One column per exit layer 1..L; NaN never exits.
    agrees : (N, L) bool, or None
        Whether that exit's token equals the last layer's.
    loss : (N, L) in [0, 1], or None
        The loss of that exit's token.
    group : (N,) or None
        Optional token class.
    lengths : (N,) or None
        Exits of each row where these differ; None where every row has L.
    costs : mapping of name to (N, L) or (L,)
        What a decision has cost in all if it stops at that exit, everything before it included.
    labels : mapping of name to (N,)
        ``cluster`` and ``text`` of the prompt, and ``failed``, where given: the runs of a replay have them, too.

    Examples
    --------
    >>> traces = riskcal.Traces.from_arrays(
    ...     prompt=["a", "a", "b"],
    ...     position=[0, 1, 0],
    ...     confidence=[[0.9, 1.0], [0.4, 1.0], [0.7, 1.0]],
    ...     agrees=[[True, True], [False, True], [True, True]],
    ... )
    >>> traces
    Traces: 3 tokens of 2 prompts x 2 exits; confidence, agrees
    >>> traces.write("traces.parquet")  # and riskcal.Traces.read
    """

    prompt: NDArray[Any]
    position: NDArray[np.int64]
    confidence: NDArray[np.floating[Any]]
    agrees: NDArray[np.bool_] | None = None
    loss: NDArray[np.floating[Any]] | None = None
    group: NDArray[Any] | None = None
    lengths: Lengths | None = None
    costs: Mapping[str, NDArray[np.floating[Any]]] = field(default_factory=dict)
    labels: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: files.Source, *, columns: renaming.Columns | None = None) -> Self:
        """Read a Parquet, CSV or JSON-lines file, or several, as `Runs.read` does; ``columns`` as in `from_frame`."""
        path = files.listed(path)
        frame, places = files.read_placed(path, renaming.only_renamed(columns))
        try:
            return cls.from_frame(frame, columns=columns)
        except RiskcalError as error:
            told = places.told(str(error), joining.ROW_OR_INDEX)
            raise RiskcalError(f"{files.named(path)}: {told}") from None

    @classmethod
    def from_frame(cls, table: Any, *, columns: renaming.Columns | None = None) -> Self:
        """Validate a table with ``prompt``, ``position``, ``confidence`` and ``agrees`` or ``loss``, one row per decision.

        The last three hold one list per row, or are spread over columns ``confidence_1`` ... ``confidence_L``. So does
        ``cost``, and ``cost_price`` of a cost named ``price``. Lists may be of unequal length: a row's last entry is the full
        model's. A column ``lengths`` says how many exits each row has where columns are spread, or lists padded. Columns
        ``cluster``, ``text`` and ``failed`` mean what they mean in `Runs`.

        Parameters
        ----------
        table : DataFrame or any object with the Arrow PyCapsule interface
        columns : mapping, optional
            The table's own names, as in `Runs.from_frame`: ``{"prompt": "request_id", "confidence": ("entropy", "1 - x")}``.
            A name such as ``entropy`` also stands for columns ``entropy_1`` ... ``entropy_L``.
        """
        return cls._of_frame(renaming.of_table(table, columns))

    @classmethod
    def _of_frame(cls, frame: pd.DataFrame) -> Self:
        columns.require(frame, ["prompt", "position"])
        given = {name: _exit_columns(frame, name) for name in _PER_EXIT}
        spent = {
            name.removeprefix("cost_"): _exit_columns(frame, name) for name in _cost_columns(frame)
        }
        group = frame["group"].to_numpy() if "group" in frame.columns else None
        return cls.from_arrays(
            prompt=columns.identifiers(frame["prompt"], "prompt").to_numpy(),
            position=frame["position"].to_numpy(),
            group=group,
            lengths=frame["lengths"].to_numpy() if "lengths" in frame.columns else None,
            cost=spent,
            **{name: frame[name] for name in prompt_labels.NAMES if name in frame.columns},
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
        lengths: ArrayLike | None = None,
        cost: ArrayLike | Mapping[str, ArrayLike] | None = None,
        cluster: ArrayLike | None = None,
        text: ArrayLike | None = None,
        failed: ArrayLike | None = None,
    ) -> Self:
        """Validate arrays: ``prompt`` and ``position`` (N,), ``confidence`` and ``agrees`` or ``loss`` (N, L).

        Parameters
        ----------
        prompt, position, group : (N,)
        confidence, agrees, loss : (N, L)
            Or a list of N lists of unequal length: a row's last entry is the full model's.
        lengths : (N,), optional
            Exits of each row of an (N, L) array. What stands behind them is padding, and is not looked at.
        cost : (N, L) or (L,), or a mapping of names to such, optional
            What a decision has cost in all if it stops at that exit: the exits before it, this one, and all other work for
            it. So the FLOPs of stages are given as ``np.cumsum(stages)``. An (L,) holds for all rows.
        cluster, text, failed : (N,), optional
            Of the row's prompt, as in `Runs`. One that failed in any row has the worst loss at every threshold. A text that
            changes within a prompt is left out with a warning, and columns of nulls are none.
        """
        if confidence is None:
            raise RiskcalError("confidence: the column is missing.")
        if (agrees is None) == (loss is None):
            raise RiskcalError("agrees, loss: give exactly one of the two.")
        ids = columns.identifiers(columns.series(prompt, "prompt"), "prompt").to_numpy()
        counts = exits.given_lengths(lengths)
        levels = PerExit.read(confidence, "confidence", counts).as_numbers()
        outcome_name = "agrees" if loss is None else "loss"
        outcome = PerExit.read(agrees if loss is None else loss, outcome_name, counts)
        outcome = outcome if loss is None else outcome.as_numbers()
        exits.refuse_other_lengths(levels, outcome, "confidence", outcome_name)
        alignment.refuse_other_exits(
            confidence, agrees if loss is None else loss, "confidence", outcome_name
        )
        given = {"prompt": prompt, "position": position, "confidence": confidence, "group": group}
        own = {"cluster": cluster, "text": text, "failed": failed}
        alignment.refuse_other_rows(
            {**given, outcome_name: agrees if loss is None else loss, **own}
        )
        where = columns.series(position, "position").to_numpy()
        classes = None if group is None else columns.series(group, "group").to_numpy()
        n = len(levels.counts)
        for name, column in (("prompt", ids), ("position", where), ("group", classes)):
            if column is not None and np.shape(column) != (n,):
                raise RiskcalError(
                    f"{name}: has shape {np.shape(column)}; expected ({n},), one entry per token."
                )
        spent = {
            name: costs.per_exit(value, name, counts, levels)
            for name, value in costs.named(cost).items()
        }
        _refuse_outcomes(outcome, outcome_name)
        if not np.issubdtype(where.dtype, np.integer) or (where < 0).any():
            raise RiskcalError(
                "position: give whole numbers from 0, the index of the generated token."
            )
        distinct, code = np.unique(ids, return_inverse=True)
        labels = prompt_labels.of_rows(own, ids, code)
        rank = np.empty(len(distinct), dtype=np.intp)
        rank[tested_order(distinct)] = np.arange(len(distinct))
        order = np.lexsort((where, rank[code]))
        repeated = (np.diff(rank[code][order]) == 0) & (np.diff(where[order]) == 0)
        if repeated.any():
            row = int(order[1:][repeated].min())
            raise RiskcalError(
                f"position: {where[row]} of prompt {plain(ids[row])!r} stands twice, again at row {row}; one row per token."
            )
        ordered = levels.take(order)
        seen = outcome.take(order).values
        return cls(
            prompt=ids[order],
            position=where[order].astype(np.int64),
            confidence=ordered.values,
            agrees=seen.astype(bool, copy=False) if loss is None else None,
            loss=seen if loss is not None else None,
            group=None if classes is None else classes[order],
            lengths=ordered.lengths,
            costs={
                name: value.take(order).values if isinstance(value, PerExit) else value
                for name, value in spent.items()
            },
            labels={name: label[order] for name, label in labels.items()},
        )

    @property
    def n_layers(self) -> int:
        """Exit layers L; where rows have unequal numbers of exits, the most that a row has."""
        return int(self.confidence.shape[1] if self.lengths is None else self.lengths.max())

    @property
    def counts(self) -> Lengths:
        """Exits of each row, (N,), equal or not."""
        return PerExit(self.confidence, self.lengths).counts

    def to_frame(self) -> pd.DataFrame:
        """One row per decision, the per-exit arrays as lists."""
        table: dict[str, Any] = {"prompt": self.prompt, "position": self.position}
        if self.group is not None:
            table["group"] = self.group
        table |= self.labels
        return pd.DataFrame(table | {name: self._rows(v) for name, v in self._per_exit().items()})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write as Parquet or JSON lines (lists per row) or CSV (one column per exit), by the path's ending."""
        frame = self.to_frame()
        if str(path).lower().endswith((".csv", ".csv.gz", ".csv.zst")):
            if self.lengths is not None:
                frame["lengths"] = self.lengths
            for name in self._per_exit():
                frame = frame.join(_spread(frame.pop(name), name))
        files.write(frame, path)

    def _per_exit(self) -> dict[str, NDArray[Any]]:
        """Every array per exit, by its column's name."""
        given = {name: getattr(self, name) for name in _PER_EXIT}
        spent = {
            name if name == costs.UNNAMED else f"cost_{name}": value
            for name, value in self.costs.items()
        }
        return {name: value for name, value in given.items() if value is not None} | spent

    def _rows(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """An array per exit as one array per row."""
        if values.shape == self.confidence.shape:
            if self.lengths is None:
                return list(values)
            return np.split(values, np.cumsum(self.lengths)[:-1])
        return [values[:count] for count in self.counts]  # the same for all rows

    def plot(self, ax: Any = None) -> Any:
        """Mean confidence of each exit beside its mean agreement or loss, if all stopped there; returns the axes."""
        return showing.traces_plot(self, ax)

    def __repr__(self) -> str:
        return showing.traces_sentence(self)

    def _repr_html_(self) -> str:
        return showing.traces_html(self)


def _refuse_outcomes(outcome: PerExit, name: str) -> None:
    """Refuse outcomes that are unknown or impossible."""
    values = outcome.values
    unknown = np.isnan(values)
    if unknown.any():
        raise RiskcalError(
            f"{name}: NaN at index {outcome.where(unknown)} ({int(unknown.sum())} such values); every outcome must be known. "
            "Rows with fewer exits than others: say how many in lengths, or give lists of unequal length."
        )
    if values.dtype != bool:
        _validate.in_range(values, name, 0.0, 1.0)
    if name == "loss":
        return
    fractional = np.zeros(0, dtype=bool) if values.dtype == bool else (values != 0) & (values != 1)
    if fractional.any():
        raise RiskcalError(
            f"agrees: {values[fractional][0]:g} at index {outcome.where(fractional)}; it is true or false. "
            "Give anything in between as loss."
        )
    if not outcome.last().all():
        _validate.warn(
            f"agrees: false at row {int(outcome.last().argmin())} for the last exit, which is the full model itself. "
            "It will count as a loss there; outcomes against references should be given as loss.",
        )


def _spread(column: pd.Series, name: str) -> pd.DataFrame:
    """Lists as one column per exit, empty behind a row's own."""
    rows = column.to_list()
    counts = np.array([len(row) for row in rows])
    if (counts == counts[0]).all():
        matrix = np.vstack(rows)
        # float32 as it is: its own shortest text would be read back as another float64
        spread = pd.DataFrame(matrix if matrix.dtype == bool else matrix.astype(np.float64))
    else:
        flat = np.concatenate(rows)
        matrix = np.full((len(rows), counts.max()), None, dtype=object)
        held = np.arange(counts.max()) < counts[:, None]
        matrix[held] = flat if flat.dtype == bool else flat.astype(np.float64)
        spread = pd.DataFrame(matrix)
    spread.columns = pd.Index([f"{name}_{i + 1}" for i in range(spread.shape[1])])
    return spread


def _cost_columns(frame: pd.DataFrame) -> list[str]:
    """The names of costs per exit, ``cost`` and ``cost_price``, without the numbers of exits."""
    pattern = re.compile(r"(cost(?:_.*?[^\d_].*?)?)(?:_\d+)?")
    found = [
        (str(name), match) for name in frame.columns if (match := pattern.fullmatch(str(name)))
    ]
    # a column of lists is whole: digits at its end are its name's
    return list(
        dict.fromkeys(
            name if _is_list(next(iter(frame[name]), None)) else match[1] for name, match in found
        )
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _how_to_list(cell: Any, name: str) -> str:
    if isinstance(cell, str):
        return (
            f"A CSV file has no lists: spread them over columns {name}_1, {name}_2 and so on, as Traces.write does, or write "
            "Parquet or JSON lines."
        )
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return "Every row has at least one, the full model's own."
    return f"A row holds all exits of a decision: collect them, [0.4, 0.9, 1.0], or spread them over {name}_1, {name}_2 ..."


def _exit_columns(frame: pd.DataFrame, name: str) -> Any:
    """Numbers per exit from a column of lists or from columns name_1 ... name_L; None if neither is there."""
    if name in frame.columns:
        columns.as_numpy(frame[name], name)  # refuses what has no cells to look at
        if (matrix := exits.of_equal_rows(frame[name])) is not None:
            return matrix
        rows = [exits.as_row(value) for value in frame[name]]
        lengths = np.array([-1 if row is None else len(row) for row in rows])
        if (lengths < 0).any():
            row = int((lengths < 0).argmax())
            raise RiskcalError(
                f"{name}: {plain(frame[name].iloc[row])!r} at row {row} ({int((lengths < 0).sum())} such rows) is not a list of "
                f"one number per exit. {_how_to_list(frame[name].iloc[row], name)}"
            )
        if (lengths == 0).any():
            row = int((lengths == 0).argmax())
            raise RiskcalError(
                f"{name}: row {row} holds no exit ({int((lengths == 0).sum())} such rows); every row has at least one, the full "
                "model's own."
            )
        return rows
    numbered = re.compile(rf"{re.escape(name)}_(\d+)")
    matches = [(numbered.fullmatch(str(column)), column) for column in frame.columns]
    found = sorted((int(match[1]), str(column)) for match, column in matches if match)
    places = [place for place, _ in found]
    if len(set(places)) < len(places):
        again = next(n for n in range(1, len(found)) if places[n] == places[n - 1])
        raise RiskcalError(
            f"{name}: {found[again - 1][1]} and {found[again][1]} are of one exit; rename or drop one."
        )
    if places and places != list(range(1, len(places) + 1)):
        of_layers = (
            " Layers that have no exit are told by what it costs to reach the others, replay_traces(..., costs={'layers': "
            f"{places}}}) for instance."
        )
        raise RiskcalError(
            f"{name}: columns for the exits {places}; number them from {name}_1 on, with no gap."
            f"{of_layers if places[0] else ''}"
        )
    # by the names that they have, such as confidence_01
    return frame[[column for _, column in found]].to_numpy() if places else None
