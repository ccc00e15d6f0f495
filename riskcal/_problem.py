"""What a calibration tests: losses in tested order, candidates and costs, drawn from `Runs` or from plain arrays."""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special

from riskcal import _tables, _validate, records
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import Stop
from riskcal.records import Runs, Traces, holds_tokens

#: What the certified mean is taken over: prompts, clusters that count alike, or the requests of clusters.
Weighting = Literal["prompts", "clusters", "requests"]


class Risk(NamedTuple):
    """One controlled loss: (n, k), rows and columns in tested order, its tolerance and its known bounds."""

    name: str
    losses: Floats
    delta: float
    lower: float
    upper: float

    @property
    def width(self) -> float:
        return self.upper - self.lower


@dataclass(frozen=True, eq=False)
class Problem:
    """Risks over the same units and candidates, with what each candidate costs each unit."""

    risks: tuple[Risk, ...]
    candidates: pd.DataFrame
    costs: Mapping[str, Floats]
    full: Mapping[str, Floats]  # (n,) each: what the full model costs each unit
    units: NDArray[Any]
    unit: str  # what a row is, in the plural
    digest: str
    stopped: Stop | None = None  # why lower thresholds were never run
    weighting: Weighting = "prompts"  # what the mean is taken over
    sizes: NDArray[np.intp] | None = (
        None  # requests of each unit, where these count and not the clusters
    )
    max_cluster: int | None = None
    nameless: bool = (
        False  # units have no ids but their numbers, and may have been sorted by outcome
    )

    @property
    def n(self) -> int:
        return len(self.units)

    @property
    def k(self) -> int:
        return len(self.candidates)

    @property
    def coordinates(self) -> list[str]:
        """What candidates differ in; the threshold, if there is but one candidate."""
        return records.varying(self.candidates)

    @property
    def several(self) -> bool:
        """Whether candidates differ in anything but their thresholds, which alone have an order that is known beforehand."""
        return not records.only_threshold(self.candidates)

    @property
    def full_costs(self) -> dict[str, float]:
        """The full model's mean costs, over these units as the candidates' are."""
        return {name: float(cost.mean()) for name, cost in self.full.items()}

    def mean(self, risk: Risk) -> Floats:
        """Each candidate's observed mean loss (k,), over what it is certified for."""
        if self.sizes is None or self.max_cluster is None:
            mean: Floats = risk.losses.mean(0)
            return mean
        summed: Floats = (risk.losses - risk.delta).sum(0)
        return risk.delta + summed * float(self.max_cluster / self.sizes.sum())

    def name(self, candidate: int) -> str:
        """A candidate, as messages name it: what it is in each coordinate."""
        row = self.candidates.iloc[candidate]
        return ", ".join(f"{name} {plain(row[name])}" for name in self.coordinates)

    def rows(self, which: slice | NDArray[np.intp]) -> Self:
        """The same problem on some of the units."""
        sizes = None if self.sizes is None else self.sizes[which]
        again = 1.0 if self.sizes is None or sizes is None else self.sizes.mean() / sizes.mean()
        return replace(
            self,
            risks=tuple(risk._replace(losses=risk.losses[which]) for risk in self.risks),
            costs={name: cost[which] * again for name, cost in self.costs.items()},
            full={name: cost[which] * again for name, cost in self.full.items()},
            units=self.units[which],
            sizes=sizes,
        )

    def columns(self, which: NDArray[np.intp]) -> Self:
        """The same problem on some of the candidates, in this order."""
        return replace(
            self,
            risks=tuple(
                risk._replace(losses=np.ascontiguousarray(risk.losses[:, which]))
                for risk in self.risks
            ),
            candidates=self.candidates.iloc[which].reset_index(drop=True),
            costs={name: cost[:, which] for name, cost in self.costs.items()},
        )


def plain(value: Any) -> str:
    """A coordinate's value or a tolerance, as messages write it: six digits, or as many more as tell it from others."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return str(value)
    number = float(value)
    written = (f"{number:.{digits}g}" for digits in range(6, 18))
    return next(
        (text for text in written if math.isclose(float(text), number, rel_tol=1e-12)), repr(number)
    )


def from_runs(
    runs: Runs,
    deltas: Mapping[str, Any],
    *,
    weighting: str | None = None,
    max_cluster: int | None = None,
) -> Problem:
    """The problem of controlling each objective of recorded runs at its delta."""
    if runs.source == "replayed" and not runs.exact:
        raise RiskcalError(
            "runs: they were replayed on the full model's path, but after a first early exit a real decoder's states differ. "
            "Record real generations, or declare a memoryless exit with replay_traces(..., exact=True)."
        )
    sizes = _sizes(runs, weighting, max_cluster)
    risks = []
    for objective, delta in deltas.items():
        _validate.choice(objective, "objective", records.OBJECTIVES)
        lower, upper = records.OBJECTIVES[objective]
        tolerated = _validate.tolerance(delta, lower, upper)
        losses = runs.losses(objective)
        if sizes is not None and max_cluster is not None:
            losses = tolerated + (losses - tolerated) * (sizes / max_cluster)[:, None]
        risks.append(Risk(objective, losses, tolerated, lower, upper))

    def cost(per_prompt: Floats) -> Floats:
        """Rows whose mean is the mean over clusters, or over requests."""
        means = runs.unit_means(per_prompt)
        return (
            means
            if sizes is None
            else means * (sizes * (runs.n / sizes.sum())).reshape(-1, *[1] * (means.ndim - 1))
        )

    problem = Problem(
        risks=tuple(risks),
        candidates=runs.candidates,
        costs={name: cost(runs.values[name]) for name in records.COSTS if name in runs.values},
        full={name: cost(runs.full[name]) for name in records.COSTS if name in runs.full},
        units=runs.units,
        unit="clusters" if "cluster" in runs.labels else "prompts",
        digest=runs.digest(),
        stopped=None if runs.stopped is None else _stop(runs.stopped),
        weighting="requests"
        if sizes is not None
        else "clusters"
        if "cluster" in runs.labels
        else "prompts",
        sizes=sizes,
        max_cluster=max_cluster,
    )
    if not runs.nameless:
        return problem
    if "cluster" not in runs.labels:
        return replace(problem, nameless=True)
    means = [
        runs.unit_means(runs.values[name])
        for name in ("dissimilarity", "risk")
        if name in runs.values
    ]
    return _by_content(problem, *(column for mean in means for column in mean.T))


def _by_content(problem: Problem, *content: Floats) -> Problem:
    """The problem of numbered units in an order drawn from their content; see `riskcal.records.content_order`."""
    ascending = np.argsort(problem.units.astype(np.int64))
    shuffled = records.order_by_content(column[ascending] for column in content)
    return replace(problem.rows(ascending[shuffled]), nameless=True)


def warn_of_sizes(runs: Runs, stacklevel: int) -> None:
    """Say which mean is certified where clusters of several sizes count alike."""
    sizes = runs.unit_sizes
    if "cluster" in runs.labels and len(np.unique(sizes)) > 1:
        warnings.warn(
            f"cluster: sizes differ, from {sizes.min()} to {sizes.max()} prompts, and every cluster counts alike: the mean "
            "that is certified is that of a random cluster, not of a random prompt. Give weighting='requests' and "
            "max_cluster=, a bound on sizes fixed beforehand, for the mean over prompts; weighting='clusters' if it is right "
            "as it is.",
            stacklevel=stacklevel,
        )


def _sizes(runs: Runs, weighting: str | None, max_cluster: int | None) -> NDArray[np.intp] | None:
    """Requests of each cluster where the mean over requests is wanted; None where units count alike."""
    if weighting is not None:
        _validate.choice(weighting, "weighting", ("clusters", "requests"))
        if "cluster" not in runs.labels:
            raise RiskcalError(
                f"weighting: {weighting!r} is for runs with clusters, and these have none; leave it out."
            )
    if weighting != "requests":
        if max_cluster is not None:
            raise RiskcalError(
                "max_cluster: belongs to weighting='requests'; give that too, or leave it out."
            )
        if weighting is None:
            warn_of_sizes(runs, stacklevel=6)
        return None
    if max_cluster is None:
        raise RiskcalError(
            "max_cluster: weighting='requests' needs the most prompts that a cluster may have, fixed before the data were seen "
            "(a cap of the service, say)."
        )
    most, sizes = _validate.count(max_cluster, "max_cluster", least=1), runs.unit_sizes
    if (sizes > most).any():
        which = int((sizes > most).argmax())
        raise RiskcalError(
            f"max_cluster: cluster {_tables.plain(runs.units[which])!r} has {sizes[which]} prompts ({int((sizes > most).sum())} "
            f"clusters exceed {most}); give a bound that holds for all that will be served, or keep {most} prompts of each "
            "cluster, drawn at random before their losses are known."
        )
    return sizes


def two_values(losses: Floats) -> tuple[float, float] | None:
    """The two values that losses (n,) take, up to rounding; None if they are fewer or more."""
    low, high = float(losses.min()), float(losses.max())
    near = _validate.TOLERANCE * max(1.0, abs(low), abs(high))
    between = (losses > low + near) & (losses < high - near)
    return None if high - low <= 2 * near or between.any() else (low, high)


def of_count(losses: Floats, delta: float) -> float:
    """The exact p-value of losses (n,) of two values, which is that of their count; 0, no claim, for others.

    Sorted losses of two values say nothing beyond the count, and with one arrangement for each count betting is at the mercy
    of a few of them (a true size of up to .15 at a nominal .05). Never below this p-value it is right for any arrangement.
    """
    values = two_values(losses)
    if values is None:
        return 0.0
    count = (losses > 0.5 * (values[0] + values[1])).sum()
    return float(count_pvalue(count, len(losses), values, delta))


def count_pvalue(count: Any, n: int, values: tuple[float, float], delta: float) -> Any:
    """Of so many of n losses at the upper of two values, that their mean is above delta."""
    low, high = values
    return special.bdtr(count, n, min(max((delta - low) / (high - low), 0.0), 1.0))


def _stop(text: str) -> Stop:
    try:
        return Stop(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise RiskcalError(
            f"stopped: the records hold {text!r}, which is not how a recording stops ({error})."
        ) from None


def from_arrays(
    losses: Any,
    delta: Any,
    *,
    thresholds: Any,
    lower: float,
    upper: float,
    prompts: ArrayLike | None,
    exact: bool = False,
) -> Problem:
    """The problem of controlling plain losses (n, k): rows are units, or tokens where ``prompts`` groups them."""
    if isinstance(losses, str | os.PathLike):
        raise RiskcalError(f"runs: {str(losses)!r} is a path; read it first, with Runs.read(path).")
    if isinstance(losses, Traces | pd.DataFrame):
        raise RiskcalError(
            "runs: give Runs or an array of losses. A table becomes Runs with Runs.from_frame; Traces hold token rows of one "
            "path, which replay_traces turns into (replayed) Runs."
        )
    replayed = holds_tokens(losses)
    if replayed and prompts is None:
        raise RiskcalError(
            "losses: these rows were replayed, and may be tokens, which depend on each other within a prompt; give prompts= to "
            "average them, or prompts=np.arange(n) where each row is a request of its own (a classifier's, a cascade's)."
        )
    low, high = _validate.bounds(lower, upper)
    if thresholds is None:
        raise RiskcalError("thresholds: an array of losses needs one threshold per column.")
    grid = _validate.threshold_grid(thresholds, allow_full=False)
    matrix = _validate.losses(losses, lower=low, upper=high)
    if matrix.shape[1] != grid.size:
        raise RiskcalError(
            f"thresholds: {grid.size} given for {matrix.shape[1]} columns of losses; give one per column."
        )
    descending, rows = np.argsort(-grid, kind="stable"), len(matrix)
    if prompts is None:
        units, nameless = np.arange(rows), True
        hashed = np.random.default_rng(0).permutation(
            rows
        )  # as in certificates of earlier versions
    else:
        matrix, units = _average_within(matrix, prompts)
        nameless, hashed = records.numbered(units), np.arange(len(units))
        if replayed and len(units) < rows and not exact:
            raise RiskcalError(
                f"losses: {rows} rows of {len(units)} prompts were replayed on the full model's path, but after a first early "
                "exit a real decoder's states differ. Record real generations, or declare a memoryless exit with exact=True."
            )
    hasher = hashlib.blake2b(digest_size=16)
    for first in range(0, len(matrix), 4096):  # in parts: one copy of the whole is enough
        hasher.update(
            np.ascontiguousarray(matrix[np.ix_(hashed[first : first + 4096], descending)]).data
        )
    hasher.update(grid[descending].data)
    order = np.arange(len(units))
    if nameless:
        ascending = np.argsort(units.astype(np.int64))
        columns = ((matrix[ascending, j] - low) / (high - low) for j in descending)
        order = ascending[records.order_by_content(columns)]
    matrix = np.ascontiguousarray(matrix[np.ix_(order, descending)])
    return Problem(
        risks=(Risk("losses", matrix, _validate.tolerance(delta, low, high), low, high),),
        candidates=pd.DataFrame({"threshold": grid[descending]}),
        costs={},
        full={},
        units=units[order],
        nameless=nameless,
        unit="rows" if prompts is None else "prompts",
        digest=hasher.hexdigest(),
    )


def split_pilot(problem: Problem, fraction: float) -> tuple[Problem, Problem]:
    """The first units in tested order as a pilot, whose losses may choose an order, and the rest, which are tested."""
    share = _validate.level(fraction, "pilot_fraction")
    size = math.ceil(share * problem.n)
    if not pilot_fits(problem.n, share):
        raise RiskcalError(
            f"pilot_fraction: {share:g} of {problem.n} {problem.unit} leaves {size} for the pilot and {problem.n - size} for "
            "the test; each needs at least two."
        )
    return problem.rows(slice(None, size)), problem.rows(slice(size, None))


def pilot_fits(n: int, fraction: float) -> bool:
    """Whether a pilot of this share of n units leaves two for itself, and two to test."""
    size = math.ceil(_validate.level(fraction, "pilot_fraction") * n)
    return size >= 2 and n - size >= 2


def pilot_order(pilot: Problem) -> NDArray[np.intp]:
    """Candidates by what the pilot says of them, those furthest below their tolerances first."""
    return np.argsort(_excess(pilot), kind="stable")


def pareto_order(pilot: Problem, cost: str) -> NDArray[np.intp]:
    """Only the candidates that no other beats in both risk and cost on the pilot, safest first (Pareto Testing)."""
    excess, spent = _excess(pilot), mean_cost(pilot, cost)
    order = np.lexsort((spent, excess))
    cheapest_so_far = np.minimum.accumulate(np.r_[np.inf, spent[order][:-1]])
    return order[spent[order] < cheapest_so_far]


def mean_cost(problem: Problem, cost: str) -> Floats:
    """Each candidate's mean cost; with the threshold as the only coordinate and no cost recorded, the threshold itself."""
    if cost in problem.costs:
        mean: Floats = problem.costs[cost].mean(0)
        return mean
    if problem.several:
        raise RiskcalError(
            f"cost: {cost!r} was not recorded; choosing among several coordinates needs it."
        )
    return problem.candidates["threshold"].to_numpy(dtype=np.float64)


def _excess(pilot: Problem) -> Floats:
    """Mean loss above tolerance, relative to the loss's range; of several risks the worst."""
    worst: Floats = np.max(
        [(pilot.mean(risk) - risk.delta) / risk.width for risk in pilot.risks], axis=0
    )
    return worst


def _average_within(matrix: Floats, prompts: ArrayLike) -> tuple[Floats, NDArray[Any]]:
    """Mean of each prompt's rows, and the prompts' ids, in tested order."""
    ids = _tables.identifiers(_tables.series(prompts, "prompts"), "prompts")
    if len(ids) != len(matrix):
        raise RiskcalError(f"prompts: {len(ids)} ids for {len(matrix)} rows; give one per row.")
    code, distinct = pd.factorize(ids)
    if len(distinct) < 2:
        raise RiskcalError("prompts: all rows belong to one prompt; at least two are needed.")
    sums = np.zeros((len(distinct), matrix.shape[1]))
    np.add.at(sums, code, matrix)
    order = records.tested_order(distinct)
    return (sums / np.bincount(code)[:, None])[order], np.asarray(distinct)[order]
