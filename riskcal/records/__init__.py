"""What decoders write down: `Runs` (one row per prompt and candidate) and `Traces` (one row per generated token)."""

import hashlib
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _tables, _validate
from riskcal._tables import plain
from riskcal._validate import Floats, RiskcalError

#: Range of each loss that an objective can ask for.
OBJECTIVES = {"textual": (0.0, 1.0), "risk": (-1.0, 1.0), "risk_clipped": (0.0, 1.0)}
COSTS = ("layers", "tokens", "seconds", "flops")
#: Columns of a candidate's coordinates that an `ExitPolicy` has fields for.
_SCHEDULE = ("temperature", "max_length", "form")
COORDINATES = (*_SCHEDULE, "min_layer", "measure", "policy")
#: Columns that say who a prompt is, or what came of it.
_NO_COORDINATES = (
    "prompt",
    "cluster",
    "group",
    "text",
    "dissimilarity",
    "risk",
    "full_risk",
    "failed",
    "source",
    "exact",
    "stopped",
)
_ORDER_SALT = b"riskcal: order of prompts, version 1\x00"
_MIXERS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], dtype=np.uint64)
_CONTENT_SALT = b"riskcal: order of rows without ids, version 1\x00"

_R = TypeVar("_R", bound="Runs")
Objective = Literal["textual", "risk", "risk_clipped"]


def tested_order(identifiers: ArrayLike) -> NDArray[np.intp]:
    """The order in which units are tested: ascending BLAKE2b hash of a fixed salt and the unit's id.

    Content-free and not the user's to choose. A betting test in an order that depends on the prompts' content (sorted by
    difficulty, say) is wrong about as often as not. For ids that only number the rows see `numbered`.
    """
    digests = [
        hashlib.blake2b(_ORDER_SALT + str(i).encode(), digest_size=16).digest()
        for i in np.asarray(identifiers)
    ]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), dtype=np.intp)


def only_threshold(candidates: pd.DataFrame) -> bool:
    """Whether candidates differ in their thresholds alone, which have an order of their own."""
    return varying(candidates) == ["threshold"]


def numbered(identifiers: ArrayLike) -> bool:
    """Whether ids are but the numbers of rows, 0 to n - 1 or 1 to n in any order: as good as no ids.

    Whoever numbered the rows may have sorted them by outcome first, and then `tested_order` is one fixed arrangement of the
    sorted rows. Such units are tested in `content_order`.
    """
    ids = {str(i) for i in np.asarray(identifiers).tolist()}
    return any(ids == {str(i) for i in range(first, first + len(ids))} for first in (0, 1))


def content_order(*columns: ArrayLike) -> NDArray[np.intp]:
    """The order in which units without ids are tested: a permutation drawn from a digest of all rows as a multiset.

    Parameters
    ----------
    *columns : (n,) or (n, k)
        The losses of each unit, on the unit interval; differences below a billionth do not count.

    Returns
    -------
    (n,)
        To be applied to the rows as they stand. It is the same for any order of the rows, which makes it harmless: given the
        multiset, i.i.d. rows are equally likely to stand in any order, and a permutation that the multiset fixes leaves them
        so. Rows that somebody sorted are put into an arrangement that is drawn afresh for each data set, as far as data sets
        differ as multisets. (Losses of two values differ in their count alone: see `riskcal.calibrate`.)
    """
    return order_by_content(
        column
        for matrix in columns
        for column in np.asarray(matrix, dtype=np.float64).reshape(len(np.asarray(matrix)), -1).T
    )


def order_by_content(columns: Iterable[Floats]) -> NDArray[np.intp]:
    """`content_order` of columns (n,) that are made one at a time."""
    return order_by_prints(
        row_prints(np.rint(column * 2.0**30).astype(np.int64) for column in columns)
    )


def row_prints(columns: Iterable[NDArray[np.int64]]) -> NDArray[np.uint64]:
    """A fingerprint (n,) of each row of columns (n,): a multiply-and-shift mix."""
    prints = np.zeros(1, dtype=np.uint64)
    for column in columns:
        prints = (prints ^ column.view(np.uint64)) * _MIXERS[0]
        prints = (prints ^ (prints >> np.uint64(32))) * _MIXERS[1]
        prints ^= prints >> np.uint64(29)
    return prints


def order_by_prints(prints: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The permutation that the fingerprints (n,) of all units fix, however they stand."""
    digest = hashlib.blake2b(
        _CONTENT_SALT + np.sort(prints).astype("<u8").tobytes(), digest_size=16
    ).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(prints))


def varying(candidates: pd.DataFrame) -> list[str]:
    """The columns that tell candidates apart; the threshold, if there is but one candidate."""
    names = [str(name) for name in candidates.columns if candidates[name].nunique(dropna=False) > 1]
    return names or ["threshold"]


class TokenLosses(np.ndarray):
    """An array whose rows are tokens, not independent prompts; `riskcal.calibrate` refuses it without ``prompts=``.

    What numpy makes of it is still one: slices, arithmetic, copies by its method, ``np.where`` and so on. A plain view of it
    (``np.asarray``) is known by the memory that it shares. A copy into a plain array or a list (``np.array``, ``tolist``, a
    DataFrame's values) is just numbers, of which nobody can tell where they came from.
    """

    __array_priority__ = 1.0  # concatenated with anything, they are still tokens

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        made = super().__array_function__(func, types, args, kwargs)
        return made.view(TokenLosses) if type(made) is np.ndarray else made


def holds_tokens(losses: Any) -> bool:
    """Whether an array is one of `TokenLosses`, or a view of one."""
    while isinstance(
        losses, np.ndarray
    ):  # a base of other objects means something else, and may have no end
        if isinstance(losses, TokenLosses):
            return True
        losses = losses.base
    return False


@dataclass(frozen=True, eq=False, repr=False)
class Runs:
    """Losses and costs of real generations, for each of n prompts and k candidates.

    Build it with `read`, `from_frame` or `from_arrays`; each validates. Prompts stand in the order in which they are
    tested (`tested_order`; prompts that are only `numbered`: `content_order`), candidates from the highest threshold down,
    whatever the order of rows in the source.

    Attributes
    ----------
    prompts : (n,) array
        Ids, integers or strings.
    candidates : DataFrame, k rows
        ``threshold`` and every further coordinate that was recorded.
    values : mapping of name to (n, k) array
        ``dissimilarity`` in [0, 1], ``risk`` in [0, 1], and costs (``layers``, ``tokens``, ``seconds``, ``flops``).
    full : mapping of name to (n,) array
        The same for the full model's rows; empty if none were recorded.
    full_risk : (n,) array or None
        Risk of the full model's output.
    labels : mapping of name to (n,) array
        ``cluster``, ``group``, ``text`` where given.
    source : {"generated", "replayed"}
        Whether each candidate really ran, or was read off one teacher-forced path.
    exact : bool
        Declares that replay is exact: the exit has no memory (classifiers, cascades of models).
    stopped : str or None
        The `riskcal.Stop` by which lower thresholds were left out, as JSON; None if the grid is whole.
    """

    prompts: NDArray[Any]
    candidates: pd.DataFrame
    values: Mapping[str, Floats]
    full: Mapping[str, Floats] = field(default_factory=dict)
    full_risk: Floats | None = None
    labels: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    source: Literal["generated", "replayed"] = "generated"
    exact: bool = False
    stopped: str | None = None

    @classmethod
    def read(cls, path: _tables.Source, *, candidate_columns: Sequence[str] = ()) -> Self:
        """Read a Parquet, CSV or JSON-lines file (the last two also ``.gz`` or ``.zst``), or several.

        A folder is read to its depth, and names such as ``threshold=0.9`` of folders below become columns; every file in it is
        read, or named in the refusal. A list of files and a pattern (``logs/**/*.jsonl``) are read in the order of their names.

        Raises
        ------
        RiskcalError
            Naming the file, the column, the first offending row (counted from 0) and the remedy.
        """
        frame = _tables.read(path)
        try:
            return cls.from_frame(frame, candidate_columns=candidate_columns)
        except RiskcalError as error:
            raise RiskcalError(f"{path}: {error}") from None

    @classmethod
    def from_frame(cls, table: Any, *, candidate_columns: Sequence[str] = ()) -> Self:
        """Validate a long table: one row per prompt and candidate.

        Parameters
        ----------
        table : DataFrame or any object with the Arrow PyCapsule interface
            Columns ``prompt``, ``threshold`` and at least one of ``dissimilarity`` and ``risk``; optional ``cluster``,
            ``group``, ``text``, ``temperature`` (of a decaying schedule, with its ``max_length`` and ``form``),
            ``min_layer``, ``measure``, ``policy`` (further fields of its `ExitPolicy`, as a JSON object), ``full_risk``,
            ``source``, ``exact``, ``failed`` (an output that failed has the worst loss, whatever stands there), ``stopped``
            (where a recording ended before its lowest threshold) and the costs ``layers``, ``tokens``, ``seconds``,
            ``flops``. Other columns are left out.
        candidate_columns : sequence of str
            Further columns that tell candidates apart.

        Raises
        ------
        RiskcalError
            For missing columns, an empty table, fewer than two prompts, NaN or infinite or out-of-range values, a NaN
            threshold, a prompt that lacks a candidate, a duplicated (prompt, candidate), a full-model row with nonzero
            dissimilarity, or a label that changes within a prompt.

        Warns
        -----
        UserWarning
            If one prompt text stands under two ids, which breaks independence.
        """
        return _runs_from_frame(cls, _tables.from_object(table), candidate_columns)

    @classmethod
    def from_arrays(
        cls,
        *,
        thresholds: ArrayLike,
        prompts: ArrayLike | None = None,
        full_risk: ArrayLike | None = None,
        cluster: ArrayLike | None = None,
        group: ArrayLike | None = None,
        text: ArrayLike | None = None,
        source: Literal["generated", "replayed"] = "generated",
        exact: bool = False,
        **values: ArrayLike,
    ) -> Self:
        """Build from matrices instead of a long table.

        Parameters
        ----------
        thresholds : (k,)
            One per column, in any order; an ``inf`` column holds the full model.
        prompts : (n,), optional
            Ids; default 0 to n - 1, which count as none (`riskcal.records.numbered`).
        full_risk, cluster, group, text : (n,), optional
        **values : (n, k)
            ``dissimilarity``, ``risk``, ``failed``, ``layers``, ``tokens``, ``seconds``, ``flops``.
        """
        grid = _validate.threshold_grid(thresholds, allow_full=True)
        _validate.choice(source, "source", ("generated", "replayed"))
        if not isinstance(exact, bool | np.bool_):
            raise RiskcalError(f"exact: {_validate.shown(exact)} is neither True nor False.")
        known = ("dissimilarity", "risk", "failed", *COSTS)
        columns: dict[str, Any] = {}
        shape: tuple[int, ...] | None = None
        for name, value in values.items():
            _validate.choice(name, "argument", known)
            if source == "generated" and holds_tokens(value):
                raise RiskcalError(
                    f"{name}: these rows were replayed, and after a first early exit a real decoder's states differ. Record real "
                    "generations, or give source='replayed', and exact=True where the exit has no memory; rows that share a "
                    "prompt share a cluster=."
                )
            matrix = _validate.shaped(value, name, ndim=(2,))
            if (
                matrix.ndim != 2
                or matrix.shape[1] != grid.size
                or (shape is not None and matrix.shape != shape)
            ):
                wanted = shape or ("n", grid.size)
                raise RiskcalError(
                    f"{name}: has shape {matrix.shape}; expected {wanted}, one column per threshold."
                )
            shape = matrix.shape
            columns[name] = matrix.ravel()
            if name == "failed":
                if not ((matrix == 0) | (matrix == 1)).all():
                    where = _validate.first((matrix != 0) & (matrix != 1))
                    raise RiskcalError(
                        f"failed: index {where} is neither true nor false; say it of every output."
                    )
                columns[name] = matrix.ravel().astype(bool)
            if "failed" in values:
                continue  # an output that failed may have no loss; `from_frame` looks at the others
            _validate.finite(matrix, name)
            if name not in COSTS:
                _validate.in_range(matrix, name, 0.0, 1.0)
        if shape is None or not {"dissimilarity", "risk"} & set(columns):
            raise RiskcalError(
                "dissimilarity, risk: neither is given; give at least one (n, k) matrix."
            )
        labels = {"prompt": np.arange(shape[0]) if prompts is None else prompts}
        labels |= {"cluster": cluster, "group": group, "text": text, "full_risk": full_risk}  # type: ignore[dict-item]
        for name, label in labels.items():
            if label is not None:
                entries = _tables.series(label, name)
                if len(entries) != shape[0]:
                    raise RiskcalError(
                        f"{name}: has shape ({len(entries)},); expected ({shape[0]},), one entry per row."
                    )
                columns[name] = np.repeat(entries.to_numpy(), grid.size)
        columns["threshold"] = np.tile(grid, shape[0])
        columns["source"] = source
        columns["exact"] = exact
        return cls.from_frame(pd.DataFrame(columns))

    @property
    def thresholds(self) -> Floats:
        """The distinct finite thresholds, descending."""
        return np.unique(self.candidates["threshold"].to_numpy(dtype=np.float64))[::-1]

    @property
    def n(self) -> int:
        """Independent units: clusters if given, else prompts."""
        return len(self.units)

    @property
    def k(self) -> int:
        """Candidates, the full model not counted."""
        return len(self.candidates)

    @property
    def coordinates(self) -> list[str]:
        """The columns of ``candidates`` that take more than one value: what a candidate is told apart by."""
        return varying(self.candidates)

    @property
    def units(self) -> NDArray[Any]:
        """Ids of the independent units in tested order: the rows of `losses`."""
        if "cluster" not in self.labels:
            return self.prompts
        distinct = np.unique(self.labels["cluster"])
        return distinct[tested_order(distinct)]

    @property
    def unit_sizes(self) -> NDArray[np.intp]:
        """Prompts of each independent unit, in tested order: ones, where there are no clusters."""
        if "cluster" not in self.labels:
            return np.ones(len(self.prompts), dtype=np.intp)
        return np.bincount(self._unit_of_prompt(), minlength=self.n)

    @property
    def group(self) -> NDArray[Any]:
        """The stratum of each prompt, (n,)."""
        if "group" not in self.labels:
            raise RiskcalError("group: the column was not recorded; strata need one per prompt.")
        return self.labels["group"]

    def of_group(self, name: Any) -> Self:
        """The runs of one stratum's prompts."""
        kept = self.group == name
        if not kept.any():
            raise RiskcalError(
                f"group: no prompt is of {name!r}; choose one of {', '.join(map(repr, np.unique(self.group).tolist()))}."
            )
        return self._take(np.flatnonzero(kept))

    def _take(self, rows: NDArray[np.intp]) -> Self:
        """Some of the prompts, or all in another order."""
        return replace(
            self,
            prompts=self.prompts[rows],
            values={key: value[rows] for key, value in self.values.items()},
            full={key: value[rows] for key, value in self.full.items()},
            full_risk=None if self.full_risk is None else self.full_risk[rows],
            labels={key: value[rows] for key, value in self.labels.items()},
        )

    @property
    def nameless(self) -> bool:
        """Whether units have no ids but their numbers, which somebody may have given them by outcome.

        Recordings of `riskcal_adapters.record`, known by their column ``policy``, are not among them: there prompts are
        numbered before they are run.
        """
        recorded = self.stopped is not None or "policy" in self.candidates.columns
        return not recorded and numbered(self.units)

    def in_content_order(self) -> Self:
        """The same runs with prompts in their `content_order` if they are `nameless`.

        Where clusters are the units, the order of prompts is of no account, and `riskcal.calibrate` sees to that of clusters.
        """
        if "cluster" in self.labels or not self.nameless:
            return self
        content = [self.values[name] for name in ("dissimilarity", "risk") if name in self.values]
        content += [] if self.full_risk is None else [self.full_risk]
        ascending = np.argsort(self.prompts.astype(np.int64))
        return self._take(ascending[content_order(*(column[ascending] for column in content))])

    def losses(self, objective: str = "textual") -> Floats:
        """The loss matrix that an objective tests.

        Parameters
        ----------
        objective : {"textual", "risk", "risk_clipped"}
            ``dissimilarity`` in [0, 1]; ``risk - full_risk`` in [-1, 1] (CALM, Definition 2); its positive part (Eq. 11).

        Returns
        -------
        (n, k) float64
            Rows are the independent units in tested order: prompts, or the means over each cluster.

        Raises
        ------
        RiskcalError
            If the objective is unknown or its columns were not recorded.
        """
        return self.unit_means(self.prompt_losses(objective))

    def prompt_losses(self, objective: str = "textual") -> Floats:
        """As `losses`, one row for each prompt, (n prompts, k), whatever its cluster."""
        _validate.choice(objective, "objective", OBJECTIVES)
        if objective == "textual":
            return self._recorded("dissimilarity", objective)
        risk = self._recorded("risk", objective)
        if self.full_risk is None:
            raise RiskcalError(
                f"full_risk: objective {objective!r} needs the full model's risk; record a row with threshold inf "
                "for every prompt, or a full_risk column."
            )
        difference = risk - self.full_risk[:, None]
        return np.maximum(difference, 0.0) if objective == "risk_clipped" else difference

    def unit_means(self, per_prompt: Floats) -> Floats:
        """Average rows (n prompts, ...) within each independent unit; a copy of nothing where there are no clusters."""
        if "cluster" not in self.labels:
            return per_prompt
        code = self._unit_of_prompt()
        counts = np.bincount(code)
        sums = np.zeros((len(counts), *per_prompt.shape[1:]))
        np.add.at(sums, code, per_prompt)
        return sums / counts.reshape(-1, *[1] * (per_prompt.ndim - 1))

    def _unit_of_prompt(self) -> NDArray[np.intp]:
        """The row in `units` of each prompt's cluster."""
        units = self.units
        sorter = np.argsort(units)
        return sorter[np.searchsorted(units, self.labels["cluster"], sorter=sorter)]

    def digest(self) -> str:
        """A hash of everything recorded, the same for any order of rows and any file format."""
        order = tested_order(self.prompts)
        if not np.array_equal(order, np.arange(len(order))):  # numbered prompts stand in another
            return self._take(order).digest()
        hasher = hashlib.blake2b(digest_size=16)
        rows = len(self.prompts) * (self.k + bool(self.full))
        for name, value in self._columns():
            column = np.broadcast_to(value, rows)
            hasher.update(name.encode() + b"\x00")
            if column.dtype.kind in "biuf" and name not in ("prompt", *self.labels):
                hasher.update(np.ascontiguousarray(column, dtype=np.float64).data)
                continue
            for first in range(
                0, rows, 4096
            ):  # in parts: the text of a long table is many times its size
                text = "\x1f".join(map(str, column[first : first + 4096].tolist()))
                hasher.update((("\x1f" if first else "") + text).encode())
        return hasher.hexdigest()

    def to_frame(self) -> pd.DataFrame:
        """The long table of the contract, prompts in tested order, the full model's row first in each."""
        return pd.DataFrame(dict(self._columns()))

    def _columns(self) -> Iterator[tuple[str, Any]]:
        """The long table's columns, made one at a time."""
        n, k, has_full = len(self.prompts), self.k, bool(self.full)
        yield "prompt", np.repeat(self.prompts, k + has_full)
        for name, label in self.labels.items():
            yield name, np.repeat(label, k + has_full)
        coordinates = self.candidates
        if has_full:
            reference = self.candidates.iloc[[0]].assign(threshold=math.inf)
            coordinates = pd.concat([reference, self.candidates], ignore_index=True)
        for name in coordinates.columns:
            yield name, np.tile(coordinates[name].to_numpy(), n)
        for name, value in self.values.items():
            whole = np.column_stack([self.full[name], value]) if has_full else value
            whole = whole.astype(np.int64) if name == "tokens" and not (whole % 1).any() else whole
            whole = whole.astype(bool) if name == "failed" else whole
            yield name, whole.ravel()
        if not has_full and self.full_risk is not None:
            yield "full_risk", np.repeat(self.full_risk, k)
        yield "source", self.source
        if self.exact:
            yield "exact", True
        if self.stopped is not None:
            yield "stopped", self.stopped

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `to_frame` as Parquet, CSV or JSON lines, by the path's ending; replaced whole or not at all."""
        _tables.write(self.to_frame(), path)

    def mean_costs(self) -> pd.DataFrame:
        """Mean recorded costs of each candidate, one row per candidate."""
        return pd.DataFrame(
            {
                name: self.unit_means(self.values[name]).mean(0)
                for name in COSTS
                if name in self.values
            }
        )

    def _recorded(self, column: str, objective: str) -> Floats:
        if column not in self.values:
            raise RiskcalError(
                f"{column}: objective {objective!r} needs this column, which was not recorded."
            )
        return self.values[column]

    def __repr__(self) -> str:
        grid = self.thresholds
        unit = "clusters" if "cluster" in self.labels else "prompts"
        measured = ", ".join(self.values)
        return (
            f"Runs: {self.n} {unit} x {self.k} candidates ({self.source}), thresholds {grid[0]:g} to {grid[-1]:g}; "
            f"{measured}; full model {'recorded' if self.full else 'not recorded'}"
        )


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
    def read(cls, path: _tables.Source) -> Self:
        """Read a Parquet, CSV or JSON-lines file, or several, as `Runs.read` does."""
        frame = _tables.read(path)
        try:
            return cls.from_frame(frame)
        except RiskcalError as error:
            raise RiskcalError(f"{path}: {error}") from None

    @classmethod
    def from_frame(cls, table: Any) -> Self:
        """Validate a table with ``prompt``, ``position``, ``confidence`` and ``agrees`` or ``loss``, one row per token.

        The last three hold one list per row, or are spread over columns ``confidence_1`` ... ``confidence_L``.
        """
        frame = _tables.from_object(table)
        _tables.require(frame, ["prompt", "position"])
        given = {name: _exit_columns(frame, name) for name in ("confidence", "agrees", "loss")}
        group = frame["group"].to_numpy() if "group" in frame.columns else None
        return cls.from_arrays(
            prompt=_tables.identifiers(frame["prompt"], "prompt").to_numpy(),
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
        ids = _tables.identifiers(_tables.series(prompt, "prompt"), "prompt").to_numpy()
        levels = _validate.float_matrix(confidence, "confidence")
        outcome_name = "agrees" if loss is None else "loss"
        outcome: Any = _validate.as_given(agrees, outcome_name)
        if loss is not None or outcome.dtype != bool or outcome.ndim != 2:
            outcome = _validate.float_matrix(agrees if loss is None else loss, outcome_name)
        if outcome.shape != levels.shape:
            raise RiskcalError(
                f"confidence: has shape {levels.shape}, but the outcomes have {outcome.shape}."
            )
        where = _tables.series(position, "position").to_numpy()
        classes = None if group is None else _tables.series(group, "group").to_numpy()
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
        columns: dict[str, Any] = {"prompt": self.prompt, "position": self.position}
        if self.group is not None:
            columns["group"] = self.group
        for name in ("confidence", "agrees", "loss"):
            value = getattr(self, name)
            if value is not None:
                columns[name] = list(value)
        return pd.DataFrame(columns)

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
        _tables.write(frame, path)

    def __repr__(self) -> str:
        kind = "agrees" if self.agrees is not None else "loss"
        prompts = len(np.unique(self.prompt))
        return f"Traces: {len(self.prompt)} tokens of {prompts} prompts x {self.n_layers} exits; confidence, {kind}"


def _runs_from_frame(cls: type[_R], frame: pd.DataFrame, candidate_columns: Sequence[str]) -> _R:
    if isinstance(candidate_columns, str) or not all(
        isinstance(name, str) for name in candidate_columns or ()
    ):
        raise RiskcalError(
            f"candidate_columns: {candidate_columns!r} is no list of names of columns."
        )
    candidate_columns = list(candidate_columns or ())
    outcomes = [name for name in candidate_columns if name in _NO_COORDINATES]
    if outcomes:
        raise RiskcalError(
            f"candidate_columns: {outcomes[0]!r} is no setting of the decoder; leave it out."
        )
    _tables.require(frame, ["prompt", "threshold", *candidate_columns])
    read_cell_by_cell = (
        "threshold",
        *COORDINATES,
        *candidate_columns,
        "failed",
        "source",
        "exact",
        "stopped",
    )
    frame = frame.assign(
        **{
            name: _tables.as_numpy(frame[name], name)
            for name in read_cell_by_cell
            if name in frame.columns
        }
    )
    frame = frame.assign(threshold=_thresholds(frame["threshold"]))
    prompt = _tables.identifiers(frame["prompt"], "prompt")
    coordinates = [
        "threshold",
        *(c for c in (*COORDINATES, *candidate_columns) if c in frame.columns),
    ]
    coordinates = list(dict.fromkeys(coordinates))
    measured = [name for name in ("dissimilarity", "risk") if name in frame.columns]
    if not measured:
        raise RiskcalError("dissimilarity, risk: both columns are missing; record at least one.")
    costs = [name for name in COSTS if name in frame.columns]
    is_full = np.isposinf(frame["threshold"].to_numpy())
    failed = (
        _tables.truths(frame["failed"], "failed")
        if "failed" in frame.columns
        else np.zeros(len(frame), dtype=bool)
    )
    values = {
        name: _tables.numbers(frame[name], name, 0.0, 1.0, failed, is_full) for name in measured
    }
    if "dissimilarity" in values:
        values["dissimilarity"][failed & is_full] = 0.0
    values |= {name: _tables.numbers(frame[name], name, 0.0, math.inf) for name in costs}
    if "dissimilarity" in values:
        nonzero = is_full & (values["dissimilarity"] > _validate.TOLERANCE)
        if nonzero.any():
            row = int(nonzero.argmax())
            raise RiskcalError(
                f"dissimilarity: {values['dissimilarity'][row]:g} at row {row}, a full-model row; the full model is at "
                "distance 0 from itself. Is the decoder deterministic? Compare against the very same generation."
            )
    code, ids = pd.factorize(prompt)
    n = len(ids)
    if n < 2:
        raise RiskcalError(
            f"prompt: only {n} prompt ({plain(ids[0])!r}, row 0); at least two are needed."
        )
    labels = {
        name: _label(frame, name, code, n)
        for name in ("cluster", "group", "text")
        if name in frame.columns
    }
    order = tested_order(ids)
    rank = np.empty(n, dtype=np.intp)
    rank[order] = np.arange(n)
    row_of_prompt = rank[code]
    if failed.any():
        _count_failed_references(values, failed & is_full, is_full, code, n)
    if "failed" in frame.columns:
        values["failed"] = failed.astype(np.float64)

    for name in coordinates[1:]:
        _refuse_coordinate(frame.loc[~is_full, name], name)
    candidates = frame.loc[~is_full, coordinates].drop_duplicates()
    if candidates.empty:
        raise RiskcalError(
            "threshold: every row is the full model (inf); record at least one finite threshold."
        )
    ascending = [name != "threshold" for name in coordinates]
    candidates = candidates.sort_values(coordinates, ascending=ascending, ignore_index=True)
    column = _candidate_code(frame, candidates, coordinates, is_full)
    sweep = not only_threshold(candidates)
    _refuse_duplicates(
        prompt,
        frame["threshold"],
        row_of_prompt,
        column,
        is_full,
        sweep=sweep,
        failed="failed" in frame,
    )
    present = np.zeros((n, len(candidates)), dtype=bool)
    present[row_of_prompt[~is_full], column[~is_full]] = True
    _refuse_gaps(present[rank], ids, code, candidates)

    def matrix(name: str) -> Floats:
        result = np.empty((n, len(candidates)))
        result[row_of_prompt[~is_full], column[~is_full]] = values[name][~is_full]
        return result

    full: dict[str, Floats] = {}
    if is_full.any():
        lacking = np.bincount(code[is_full], minlength=n) == 0
        if lacking.any():
            which = int(lacking.argmax())
            raise RiskcalError(
                f"prompt: {plain(ids[which])!r} (row {int((code == which).argmax())}) lacks the full model's row (threshold "
                "inf), which other prompts have; record it for all or for none."
            )
        full = {
            name: _reference(value[is_full], row_of_prompt[is_full], n, name, ids[order])
            for name, value in values.items()
        }
    source, exact = _provenance(frame)
    return cls(
        prompts=np.asarray(ids)[order],
        candidates=candidates,
        values={name: matrix(name) for name in values},
        full=full,
        full_risk=_full_risk(frame, full, code, n, order),
        labels={name: label[order] for name, label in labels.items()},
        source=source,
        exact=exact,
        stopped=_stopped(frame),
    ).in_content_order()


def _count_failed_references(
    values: Mapping[str, Floats],
    failed: NDArray[np.bool_],
    is_full: NDArray[np.bool_],
    code: NDArray[np.intp],
    n: int,
) -> None:
    """Where the full model's own output failed, nothing can be near it, and no candidate is credited for its risk."""
    without = np.bincount(code[failed], minlength=n) > 0
    if "dissimilarity" in values:
        values["dissimilarity"][~is_full & without[code]] = 1.0
    if "risk" in values:
        values["risk"][failed] = 0.0


def _reference(value: Floats, row: NDArray[np.intp], n: int, name: str, ids: Any) -> Floats:
    """The full model's (n,): it may stand in every cell of a sweep, with one risk; costs measured again are averaged."""
    together = np.lexsort(
        (value, row)
    )  # a sum of floats depends on its order, which must not be that of the rows
    value, row = value[together], row[together]
    first = np.searchsorted(row, np.arange(n))
    count = np.diff(np.r_[first, len(row)])
    lowest, highest = value[first], value[first + count - 1]
    differs = highest - lowest > _validate.TOLERANCE
    if name in ("dissimilarity", "risk", "failed") and differs.any():
        which = int(differs.argmax())
        raise RiskcalError(
            f"{name}: the full model's rows of prompt {plain(ids[which])!r} differ ({lowest[which]:g} and {highest[which]:g}; "
            f"{int(differs.sum())} such prompts); it has one output for a prompt. Is the decoder deterministic? Settings with "
            "a full model each: calibrate each by itself, from a table of its own."
        )
    return np.where(highest > lowest, np.add.reduceat(value, first) / count, lowest)


def _thresholds(column: pd.Series) -> Floats:
    """Numbers, with ``"full"`` read as ``inf``; NaN and minus infinity are refused."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        values = _tables.floats(column)
    else:
        given = [
            math.inf if isinstance(v, str) and v.strip().lower() == "full" else v for v in column
        ]
        values = _tables.floats(
            pd.Series([None if isinstance(v, bool) else v for v in given], dtype=object)
        )
    bad = np.isnan(values) | np.isneginf(values)
    if bad.any():
        row = int(bad.argmax())
        raise RiskcalError(
            f"threshold: {plain(column.iloc[row])!r} at row {row} is not a threshold; give a number, or 'full' for the full "
            "model."
        )
    return values


def _label(frame: pd.DataFrame, name: str, code: NDArray[np.intp], n: int) -> NDArray[Any]:
    """A prompt's label, (n,) in order of first appearance; it may not change within a prompt."""
    column = _tables.identifiers(frame[name], name).to_numpy()
    first_row = np.full(n, -1, dtype=np.intp)
    first_row[code[::-1]] = np.arange(len(code))[::-1]
    changed = column != column[first_row[code]]
    if np.any(changed):
        row = int(np.argmax(changed))
        raise RiskcalError(
            f"{name}: {plain(column[row])!r} at row {row}, but {plain(column[first_row[code[row]]])!r} earlier for the same "
            f"prompt {plain(frame['prompt'].iloc[row])!r}; a {name} belongs to the prompt and is constant within it."
        )
    label = column[first_row]
    if name == "text":
        again = pd.Series(label).duplicated()
        if "cluster" in frame.columns:  # the remedy: one text, one cluster
            unit = pd.DataFrame(
                {"text": label, "cluster": frame["cluster"].to_numpy()[first_row]}
            ).drop_duplicates()
            again &= pd.Series(label).isin(unit["text"][unit["text"].duplicated()])
        if again.any():
            warnings.warn(
                f"text: prompt {plain(frame['prompt'].iloc[first_row[int(again.argmax())]])!r} repeats an earlier prompt's text; "
                "identical prompts under two ids are not independent. Drop one, or give both the same cluster.",
                stacklevel=4,
            )
    return label


def _refuse_coordinate(column: pd.Series, name: str) -> None:
    """Refuse what cannot tell candidates apart, or would be rounded on its way into a policy; rows keep their numbers.

    A schedule's columns alone may be empty: such a candidate's threshold does not decay. An empty text is a CSV's null.
    """
    empty = np.array([isinstance(value, str) and not value for value in column], dtype=bool)
    with _validate.reading(name, "a column of numbers or texts"):
        missing = column.isna().to_numpy() | empty
    if missing.any() and name not in _SCHEDULE:
        raise RiskcalError(
            f"{name}: missing at row {column.index[int(missing.argmax())]} ({int(missing.sum())} such rows); every candidate "
            f"has one. Fill it in, or leave the column {name} out if nothing is known of it."
        )
    given = column[~missing]
    with suppress(TypeError):  # a list has no hash, and is refused below
        given = given.drop_duplicates()
    for row, value in given.items():
        if not isinstance(
            value, str | bool | int | float | np.bool_ | np.integer | np.floating
        ) or isinstance(value, np.timedelta64):  # which numpy calls an integer
            raise RiskcalError(
                f"{name}: {value!r} at row {row}; a coordinate of a candidate is a number, a text or a truth value. Give each "
                "of several a column of its own, and name it in candidate_columns."
            )
        if name in ("measure", "form", "policy") and not isinstance(value, str):
            raise RiskcalError(
                f"{name}: {plain(value)!r} at row {row} is not a text; write its name."
            )
        _refuse_what_no_policy_can_hold(value, name, row)
        if name in ("min_layer", "max_length") and (
            isinstance(value, str | bool | np.bool_) or value % 1 or value < 1
        ):
            raise RiskcalError(
                f"{name}: {plain(value)!r} at row {row} is not a whole number of at least 1; repair it."
            )
    kinds = [
        str if isinstance(value, str) else bool if isinstance(value, bool | np.bool_) else float
        for value in given
    ]
    other = [row for row, kind in zip(given.index, kinds, strict=True) if kind is not kinds[0]]
    if other:
        raise RiskcalError(
            f"{name}: {plain(given[other[0]])!r} at row {other[0]} is of another type than {plain(given.iloc[0])!r} at row "
            f"{given.index[0]}; give numbers throughout, texts, or truth values."
        )


def _refuse_what_no_policy_can_hold(value: Any, name: str, row: Any) -> None:
    """Values of a coordinate that could be recorded, and neither written nor decoded with."""
    if isinstance(value, str):
        if name == "temperature":
            raise RiskcalError(f"{name}: {value!r} at row {row} is a text; write a number.")
        if not value.isascii() and value.encode(errors="ignore").decode() != value:
            raise RiskcalError(
                f"{name}: {value!r} at row {row} is not valid Unicode (a lone surrogate); repair it."
            )
        return
    if isinstance(value, int | np.integer) and not -(2**63) <= int(value) < 2**63:
        raise RiskcalError(
            f"{name}: {plain(value)!r} at row {row} is not a number of 64 bits; give another, or a text."
        )
    if name == "temperature" and (isinstance(value, bool | np.bool_) or not 0 < value < math.inf):
        raise RiskcalError(
            f"{name}: {plain(value)!r} at row {row} is no finite number above 0; leave it empty where nothing decays."
        )


def _candidate_code(
    frame: pd.DataFrame,
    candidates: pd.DataFrame,
    coordinates: list[str],
    is_full: NDArray[np.bool_],
) -> NDArray[np.intp]:
    """Which candidate each row is; -1 for the full model, whose other coordinates mean nothing."""
    code = np.full(len(frame), -1, dtype=np.intp)
    ran = pd.MultiIndex.from_frame(frame.loc[~is_full, coordinates])
    code[~is_full] = pd.MultiIndex.from_frame(candidates).get_indexer(ran)
    return code


def _refuse_duplicates(
    prompt: pd.Series,
    threshold: pd.Series,
    row_of_prompt: NDArray[np.intp],
    column: NDArray[np.intp],
    is_full: NDArray[np.bool_],
    *,
    sweep: bool,
    failed: bool,
) -> None:
    again = pd.DataFrame({"prompt": row_of_prompt, "candidate": column}).duplicated().to_numpy()
    if sweep:  # there the reference may stand in every cell
        again = again & ~is_full
    if again.any():
        row = int(again.argmax())
        value = "full" if math.isinf(threshold.iloc[row]) else f"{threshold.iloc[row]:g}"
        # a truth has no average; a source or a cluster that an average lost would be believed to be the default
        average = "" if failed else ", or average them (their numbers; keep all other columns)"
        raise RiskcalError(
            f"prompt: {plain(prompt.iloc[row])!r} with threshold {value} stands twice, again at row {row} "
            f"({int(again.sum())} such rows). The very same rows again: keep one of each, with drop_duplicates(). Several "
            "samples of one prompt: give each a prompt of its own, and name the prompt they share in a column cluster"
            f"{average}. Retries: keep the one that was served, by a rule fixed beforehand. Other settings: name the column that "
            "tells them apart in candidate_columns."
        )


def _refuse_gaps(
    present: NDArray[np.bool_], ids: Any, code: NDArray[np.intp], candidates: pd.DataFrame
) -> None:
    incomplete = ~present.all(1)
    if incomplete.any():
        which = int(incomplete.argmax())
        missing = candidates.iloc[int((~present[which]).argmax())]
        named = ", ".join(f"{name} {missing[name]}" for name in candidates.columns)
        raise RiskcalError(
            f"prompt: {plain(ids[which])!r} (row {int((code == which).argmax())}) lacks the candidate {named} "
            f"({int(incomplete.sum())} prompts lack one); every prompt needs every candidate. Record it; if it was tried and "
            "failed, add its row with failed true. To leave out what failed would select on the outcome."
        )


def _full_risk(
    frame: pd.DataFrame,
    full: Mapping[str, Floats],
    code: NDArray[np.intp],
    n: int,
    order: NDArray[np.intp],
) -> Floats | None:
    if "full_risk" not in frame.columns:
        return full.get("risk")
    given = frame["full_risk"]
    if "failed" in full:  # there no candidate is credited, whatever is stated
        given = given.mask(full["failed"][np.argsort(order)][code] > 0, 0.0)
    column = _tables.numbers(given, "full_risk", 0.0, 1.0)
    per_prompt = np.empty(n)
    per_prompt[code] = column
    changed = column != per_prompt[code]
    if changed.any():
        row = int(changed.argmax())
        raise RiskcalError(
            f"full_risk: {column[row]:g} at row {row} differs within prompt {plain(frame['prompt'].iloc[row])!r}."
        )
    stated = per_prompt[order]
    if "risk" in full and not np.allclose(stated, full["risk"], rtol=0, atol=_validate.TOLERANCE):
        raise RiskcalError(
            "full_risk: differs from the risk in the full model's rows; keep one of the two."
        )
    return stated


def _provenance(frame: pd.DataFrame) -> tuple[Any, bool]:
    kinds = frame["source"].tolist() if "source" in frame.columns else ["generated"]
    for row, kind in enumerate(kinds):
        if kind is kinds[0] and row > 0:
            continue
        if not isinstance(kind, str) or kind not in ("generated", "replayed"):
            raise RiskcalError(f"source: {kind!r} at row {row}; it is 'generated' or 'replayed'.")
        if kind != kinds[0]:
            raise RiskcalError(
                f"source: {kind!r} at row {row}, but {kinds[0]!r} at row 0; keep replayed and generated "
                "rows in separate tables."
            )
    stated = frame["exact"].tolist() if "exact" in frame.columns else [False]
    for row, value in enumerate(stated):
        if not isinstance(value, bool) or value != stated[0]:
            raise RiskcalError(
                f"exact: {value!r} at row {row}; it is true throughout or false throughout."
            )
    return kinds[0], bool(stated[0])


def _stopped(frame: pd.DataFrame) -> str | None:
    if "stopped" not in frame.columns:
        return None
    for row, value in enumerate(frame["stopped"]):
        if not isinstance(value, str) or value != frame["stopped"].iloc[0]:
            raise RiskcalError(
                f"stopped: {plain(value)!r} at row {row}; it says how the recording of all rows ended. Keep recordings that "
                "ended differently in separate tables."
            )
    return str(frame["stopped"].iloc[0])


def _exit_columns(frame: pd.DataFrame, name: str) -> Any:
    """One (N, L) array from a column of lists or from columns name_1 ... name_L; None if neither is there."""
    if name in frame.columns:
        _tables.as_numpy(frame[name], name)  # refuses what has no cells to look at
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
