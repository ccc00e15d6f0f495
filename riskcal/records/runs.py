"""`Runs`: one row per prompt and candidate, of generations that really ran."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import Stop
from riskcal.records import arrays, direction, files, long_table, renaming, retries, tables
from riskcal.records import costs as costs_
from riskcal.records.averages import means_within
from riskcal.records.candidates import varying
from riskcal.records.order import content_prints, numbered, numbered_order, taken, tested_order
from riskcal.records.showing import runs_html, runs_plot, runs_sentence

#: Range of each loss that an objective can ask for.
OBJECTIVES = {"textual": (0.0, 1.0), "risk": (-1.0, 1.0), "risk_clipped": (0.0, 1.0)}


@dataclass(frozen=True, eq=False, repr=False)
class Runs:
    """Losses and costs of real generations, for each of P prompts and k candidates.

    Build it with `read`, `from_frame` or `from_arrays`; each validates. Prompts stand in `tested_order` (those that are only
    `numbered` in `content_order`), candidates from the highest threshold down, whatever the order of rows in the source. Of
    the losses that are tested there are n rows, one for each independent unit: a prompt, or a cluster of them.

    Attributes
    ----------
    prompts : (P,) array
        Ids, integers or strings.
    candidates : DataFrame, k rows
        ``threshold`` and every further coordinate that was recorded.
    values : mapping of name to (P, k) array
        ``dissimilarity`` and ``risk`` in [0, 1], ``failed`` (0 or 1), ``layers`` and other costs, as far as recorded.
    full : mapping of name to (P,) array
        The same for the full model's rows; empty if none were recorded.
    full_risk : (P,) array or None
        Risk of the full model's output.
    labels : mapping of name to (P,) array
        ``cluster``, ``group``, ``text`` where given.
    source : {"generated", "replayed"}
        Whether each candidate really ran, or was read off one teacher-forced path.
    exact : bool
        Declares that replay is exact: the exit has no memory (classifiers, cascades of models).
    stopped : Stop or None
        By what lower thresholds were left out; None if the grid is whole.
    lower_is_stricter : bool
        Whether a request exits where its value is at most the threshold (an entropy): candidates then stand from the lowest up.

    Examples
    --------
    >>> table = {"prompt": ["a", "a", "b", "b"], "threshold": [0.5, 0.9, 0.5, 0.9], "dissimilarity": [0.4, 0.0, 0.2, 0.1]}
    >>> runs = riskcal.Runs.from_frame(table)  # or riskcal.Runs.read("runs.parquet")
    >>> runs.thresholds.tolist(), runs.losses("textual").tolist()
    ([0.9, 0.5], [[0.1, 0.2], [0.0, 0.4]])
    """

    prompts: NDArray[Any]
    candidates: pd.DataFrame
    values: Mapping[str, Floats]
    full: Mapping[str, Floats] = field(default_factory=dict)
    full_risk: Floats | None = None
    labels: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    source: Literal["generated", "replayed"] = "generated"
    exact: bool = False
    stopped: Stop | None = None
    lower_is_stricter: bool = False

    @classmethod
    def read(
        cls,
        path: files.Source,
        *,
        candidate_columns: Sequence[str] = (),
        costs: Sequence[str] = (),
        lower_is_stricter: bool = False,
        columns: renaming.Columns | None = None,
        keep: retries.Keep | None = None,
    ) -> Self:
        """Read a Parquet, CSV or JSON-lines file (the last two also ``.gz`` or ``.zst``), or several.

        A folder is read to its depth, and names such as ``threshold=0.9`` of folders below become columns; every file in it is
        read, or named in the refusal. A list of files is read in its order, a pattern (``logs/**/*.jsonl``) by their names.
        Large Parquet files are read a part of the prompts at a time, where the rows of each stand together (as `write` and
        `riskcal.records.reduce` leave them). All else is as in `from_frame`, but that a null threshold in JSON lines, which
        have no infinity, is the full model's where it can be nothing else: no row says ``full``, every prompt has one null,
        and its dissimilarity is 0, null or of a failure.

        Raises
        ------
        RiskcalError
            Naming the file, the column, the first offending row (counted from 0) and the remedy.
        """
        options = tables.TableOptions(candidate_columns, costs, lower_is_stricter, columns, keep)
        return tables.of_files(cls, path, options)

    @classmethod
    def from_frame(
        cls,
        table: Any,
        *,
        candidate_columns: Sequence[str] = (),
        costs: Sequence[str] = (),
        lower_is_stricter: bool = False,
        columns: renaming.Columns | None = None,
        keep: retries.Keep | None = None,
    ) -> Self:
        """Validate a long table: one row per prompt and candidate.

        Parameters
        ----------
        table : DataFrame or any object with the Arrow PyCapsule interface
            Columns ``prompt``, ``threshold`` and at least one of ``dissimilarity`` and ``risk``; optional ``cluster``,
            ``group``, ``text``, ``temperature`` (of a decaying schedule, with its ``max_length`` and ``form``),
            ``min_layer``, ``measure``, ``policy`` (further fields of its `ExitPolicy`, as a JSON object), ``full_risk``,
            ``source``, ``exact``, ``failed`` (an output that failed has the worst loss, whatever stands there), ``stopped``
            (where a recording ended before its lowest threshold) and the costs ``layers``, ``tokens``, ``seconds``,
            ``flops``. Other columns are left out, those that hold numbers with a warning.
        candidate_columns : sequence of str
            Further columns that tell candidates apart.
        costs : sequence of str
            Further columns of what a run took, ``price`` or ``joules``: numbers of at least 0.
        lower_is_stricter : bool
            Whether low thresholds are the strict ones, as where an entropy must be at most the threshold; a column of that
            name says it too. The full model is ``inf`` or ``"full"`` in either case.
        columns : mapping, optional
            The table's own names, and how its scores become losses: ``{"prompt": "request_id", "dissimilarity": ("rougeL",
            "1 - x")}``. A formula is a number minus x, x times or over a number, or both (``1 - x / 100``).
            What stands in objects is named by its path, ``metrics.rougeL``.
        keep : (str, str), optional
            Which attempt was served, where a request was tried again: ``("last", "attempt")`` or ``("first", "attempt")``, with
            the column (numbers or times) that puts the attempts of a prompt and candidate in order. Without it rows that stand
            twice are refused; ties, nulls and columns of results are too. The loss is that of the attempt that was served. Of the
            last attempt all costs but ``layers`` (a mean, its own) are the sum over all attempts, since the user waits and pays
            for each; the first costs what it took, since there was no other.

        Raises
        ------
        RiskcalError
            For missing columns, an empty table, fewer than two prompts, NaN or infinite or out-of-range values, a NaN
            threshold, a prompt that lacks a candidate, a duplicated (prompt, candidate), a full-model row with nonzero
            dissimilarity, or a label that changes within a prompt.

        Warns
        -----
        UserWarning
            If one prompt text stands under two ids, which breaks independence, and for columns of numbers that are neither
            known nor named, which are not read.
        """
        options = tables.TableOptions(candidate_columns, costs, lower_is_stricter, columns, keep)
        return tables.of_frame(cls, table, options)

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
        costs: Mapping[str, ArrayLike] | None = None,
        lower_is_stricter: bool = False,
        **values: ArrayLike,
    ) -> Self:
        """Build from matrices instead of a long table.

        Parameters
        ----------
        thresholds : (k,)
            One per column, in any order; an ``inf`` column holds the full model.
        prompts : (P,), optional
            Ids; default 0 to P - 1, which count as none (`riskcal.records.numbered`).
        full_risk, cluster, group, text : (P,), optional
        costs : mapping of name to (P, k) or (k,), optional
            Further costs, of any name: of each prompt and candidate, or of each candidate.
        lower_is_stricter : bool
            As in `from_frame`.
        **values : (P, k)
            ``dissimilarity``, ``risk``, ``failed``, ``layers``, ``tokens``, ``seconds``, ``flops``.
        """
        labels = {"prompt": prompts, "cluster": cluster, "group": group, "text": text}
        labels["full_risk"] = full_risk
        lower = direction.given(lower_is_stricter)
        fields = arrays.fields_of(thresholds, values, costs, labels, source, exact)
        return cls(**fields).in_content_order().directed(lower)

    @property
    def thresholds(self) -> Floats:
        """The distinct finite thresholds, from the strictest on: descending, or ascending where low ones are strict."""
        ascending = np.unique(self.candidates["threshold"].to_numpy(dtype=np.float64))
        return ascending if self.lower_is_stricter else ascending[::-1]

    @property
    def n(self) -> int:
        """Independent units: clusters if given, else prompts."""
        return len(self.units)

    @property
    def k(self) -> int:
        """Candidates, the full model not counted."""
        return len(self.candidates)

    @property
    def costs(self) -> list[str]:
        """The names of the recorded costs."""
        return costs_.among(self.values)

    @property
    def coordinates(self) -> list[str]:
        """The columns of ``candidates`` that take more than one value: what a candidate is told apart by."""
        return varying(self.candidates)

    @cached_property
    def units(self) -> NDArray[Any]:
        """Ids of the independent units: ``prompts`` as they stand, or clusters in `tested_order`. The rows of `losses`."""
        if "cluster" not in self.labels:
            return self.prompts
        distinct = np.unique(self.labels["cluster"])
        return distinct[tested_order(distinct)]

    @property
    def unit_sizes(self) -> NDArray[np.intp]:
        """Prompts of each independent unit, as in `units`: ones, where there are no clusters."""
        if "cluster" not in self.labels:
            return np.ones(len(self.prompts), dtype=np.intp)
        return np.bincount(self._unit_of_prompt, minlength=self.n)

    @property
    def group(self) -> NDArray[Any]:
        """The stratum of each prompt, (P,)."""
        if "group" not in self.labels:
            raise RiskcalError("group: the column was not recorded; strata need one per prompt.")
        return self.labels["group"]

    def of_group(self, name: Any) -> Self:
        """The runs of one stratum's prompts."""
        kept = np.array([one == name for one in self.group.tolist()] if np.isscalar(name) else [])
        if not kept.any():
            there = ", ".join(map(repr, np.unique(self.group).tolist()))
            raise RiskcalError(
                f"group: no prompt is of {_validate.shown(name)}; choose one of {there}."
            )
        return self.take(np.flatnonzero(kept))

    def take(self, rows: ArrayLike | slice) -> Self:
        """Some of the prompts, or all in another order, none twice; by their numbers or a mask (P,)."""
        rows = taken(rows, len(self.prompts))
        return replace(
            self,
            prompts=self.prompts[rows],
            values={key: value[rows] for key, value in self.values.items()},
            full={key: value[rows] for key, value in self.full.items()},
            full_risk=None if self.full_risk is None else self.full_risk[rows],
            labels={key: value[rows] for key, value in self.labels.items()},
        )

    def directed(self, lower_is_stricter: bool) -> Self:
        """The same runs with candidates from the strictest threshold on, where low or high ones are the strict ones."""
        if lower_is_stricter == self.lower_is_stricter:
            return self
        if self.stopped is not None:
            raise RiskcalError(
                "lower_is_stricter: the recording went from the highest threshold down and stopped; it has one direction."
            )
        names = list(self.candidates.columns)
        ascending = [name != "threshold" or lower_is_stricter for name in names]
        ordered = self.candidates.sort_values(names, ascending=ascending)
        return replace(
            self,
            candidates=ordered.reset_index(drop=True),
            values={name: value[:, ordered.index] for name, value in self.values.items()},
            lower_is_stricter=lower_is_stricter,
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
        return self.take(numbered_order(self.prompts, content_prints(*self.content())))

    def content(self) -> list[Floats]:
        """The losses (P, k) and (P,) that put prompts without ids in order; one order, whichever end of the grid is strict."""
        high = self.directed(False).values
        content = [high[name] for name in ("dissimilarity", "risk") if name in high]
        return content if self.full_risk is None else [*content, self.full_risk]

    def losses(self, objective: str = "textual") -> Floats:
        """The loss matrix that an objective tests.

        Parameters
        ----------
        objective : {"textual", "risk", "risk_clipped"}
            ``dissimilarity`` in [0, 1]; ``risk - full_risk`` in [-1, 1] (CALM, Definition 2); its positive part (Eq. 11).

        Returns
        -------
        (n, k) float64
            Rows are `units`: prompts, or the means over each cluster.

        Raises
        ------
        RiskcalError
            If the objective is unknown or its columns were not recorded.
        """
        return self.unit_means(self.prompt_losses(objective))

    def prompt_losses(self, objective: str = "textual") -> Floats:
        """As `losses`, one row for each prompt, (P, k), whatever its cluster."""
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
        """Average rows (P, ...) within each independent unit; the rows themselves where there are no clusters."""
        if "cluster" not in self.labels:
            return per_prompt
        return means_within(per_prompt, self._unit_of_prompt)

    @cached_property
    def _unit_of_prompt(self) -> NDArray[np.intp]:
        """The row in `units` of each prompt's cluster."""
        units = self.units
        sorter = np.argsort(units)
        return sorter[np.searchsorted(units, self.labels["cluster"], sorter=sorter)]

    def digest(self) -> str:
        """A hash of everything recorded, the same for any order of rows and any file format."""
        return long_table.digest(self)

    def to_frame(self) -> pd.DataFrame:
        """The long table of the contract, ``prompts`` as they stand, the full model's row first in each."""
        return pd.DataFrame({name: of(slice(None)) for name, of in long_table.columns(self)})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `to_frame` as Parquet, CSV or JSON lines, by the path's ending; replaced whole or not at all."""
        files.write(self.to_frame(), path)

    def mean_costs(self) -> pd.DataFrame:
        """Mean recorded costs of each candidate, one row per candidate."""
        means = {name: self.unit_means(self.values[name]).mean(0) for name in self.costs}
        return pd.DataFrame(means)

    def _recorded(self, column: str, objective: str) -> Floats:
        if column not in self.values:
            other, said = "dissimilarity", "objective='textual' tests it"
            if column == "dissimilarity":
                other = "risk"
                said = "objective='risk' or 'risk_clipped' tests it (on the shell --objective risk)"
            there = f" There is {other}: {said}." if other in self.values else ""
            raise RiskcalError(
                f"{column}: objective {objective!r} needs this column, which was not recorded.{there}"
            )
        return self.values[column]

    def plot(self, objective: str = "textual", ax: Any = None) -> Any:
        """Mean loss of each candidate against its threshold, with no guarantee; returns the matplotlib axes."""
        return runs_plot(self, objective, ax)

    def __repr__(self) -> str:
        return runs_sentence(self)

    def _repr_html_(self) -> str:
        return runs_html(self)
