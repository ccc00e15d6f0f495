"""From `Runs` or plain arrays to the `Problem` that is tested, and what cannot be tested is refused."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate, records
from riskcal._validate import Floats, RiskcalError
from riskcal.calibration.fitted import refuse_fitted
from riskcal.calibration.problem import Problem, TestedRisk
from riskcal.policy.sentences import as_text
from riskcal.records import Runs, Traces, direction, holds_tokens
from riskcal.records import columns as table_columns
from riskcal.records import costs as costs_
from riskcal.records.advice import ROUNDING
from riskcal.records.alignment import refuse_other_columns, refuse_other_rows
from riskcal.records.averages import means_within

#: Range of each loss that can be asked for.
RANGES = records.OBJECTIVES | {"selective": (0.0, 1.0)}


def pose(
    runs: Any,
    delta: Any,
    objective: str = "textual",
    weighting: str | None = None,
    max_cluster: int | None = None,
    *,
    thresholds: Any = None,
    lower: float = 0.0,
    upper: float = 1.0,
    prompts: Any = None,
    exact: bool = False,
    costs: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    lower_is_stricter: bool = False,
) -> Problem:
    """The problem that these arguments of `riskcal.calibrate` ask for; one that would not be used is refused."""
    _validate.choice(objective, "objective", RANGES)
    lower_first = direction.given(lower_is_stricter)
    if objective != "textual" and (isinstance(delta, Mapping) or not isinstance(runs, Runs)):
        given = (
            "a mapping of deltas names the objectives"
            if isinstance(delta, Mapping)
            else "an array is the losses itself"
        )
        raise RiskcalError(f"objective: {given}, so {objective!r} would not be used; leave it out.")
    if not isinstance(runs, Runs):
        if isinstance(delta, Mapping):
            raise RiskcalError(
                "delta: several risks at once need Runs, which name them; an array has one delta."
            )
        for name, value in (("weighting", weighting), ("max_cluster", max_cluster)):
            if value is not None:
                raise RiskcalError(
                    f"{name}: is for Runs with clusters; the rows of an array count alike. Leave it out."
                )
        if budget is not None:
            raise RiskcalError(
                "budget: is for Runs; make them with Runs.from_arrays(..., costs={...}) of losses in [0, 1]."
            )
        return from_arrays(
            runs,
            delta,
            thresholds=thresholds,
            lower=lower,
            upper=upper,
            prompts=prompts,
            exact=exact,
            costs=costs,
            lower_is_stricter=lower_first,
        )
    own: dict[str, Any] = {"thresholds": thresholds, "prompts": prompts, "exact": exact}
    for name, value in (own | {"costs": costs}).items():
        if value is not None and value is not False:
            raise RiskcalError(f"{name}: Runs carry their own; leave it out.")
    if (lower, upper) not in ((0.0, 1.0), RANGES[objective]):
        raise RiskcalError(
            f"lower, upper: objective {objective!r} of Runs has its own bounds; leave them out."
        )
    if budget is not None and not isinstance(budget, Mapping):
        raise RiskcalError(
            f"budget: {_validate.shown(budget)} is no dictionary; give {{'price': (mean, largest)}}."
        )
    deltas = delta if isinstance(delta, Mapping) else {objective: delta}
    if not deltas:
        raise RiskcalError("delta: the mapping is empty; give at least one objective.")
    if lower_first:
        runs = runs.directed(True)
    return from_runs(
        runs, deltas, weighting=weighting, max_cluster=max_cluster, budget=budget or {}
    )


def require_runs(runs: Any) -> None:
    """Refuse what is no Runs where the prompts' groups, or costs, are needed."""
    if not isinstance(runs, Runs):
        raise RiskcalError(
            f"runs: give Runs, not {type(runs).__name__}; Runs.from_arrays makes them of matrices, Runs.from_frame of a table."
        )


def from_runs(
    runs: Runs,
    deltas: Mapping[str, Any],
    *,
    weighting: str | None = None,
    max_cluster: int | None = None,
    budget: Mapping[str, Any] = MappingProxyType({}),
) -> Problem:
    """The problem of controlling each objective of recorded runs at its delta, and each cost at its budget."""
    if runs.source == "replayed" and not runs.exact:
        raise RiskcalError(
            "runs: they were replayed on the full model's path, but after a first early exit a real decoder's states differ. "
            "Record real generations, or declare a memoryless exit with replay_traces(..., exact=True)."
        )
    refuse_fitted(runs)
    sizes = _sizes(runs, weighting, max_cluster)
    share = None if sizes is None or max_cluster is None else (sizes / max_cluster)[:, None]
    risks = []
    for objective, delta in deltas.items():
        _validate.choice(objective, "objective", RANGES)
        lower, upper = RANGES[objective]
        tolerated = _validate.tolerance(delta, lower, upper)
        early = _early(runs, sizes, tolerated) if objective == "selective" else None
        if early is None:
            losses = runs.losses(objective)
        else:  # has mean delta or less exactly where the pooled risk is
            per_prompt = runs.prompt_losses("textual") - tolerated
            losses = tolerated + runs.unit_means(per_prompt * early)
        if share is not None:
            losses = tolerated + (losses - tolerated) * share
        if early is not None:
            early = runs.unit_means(early)
            if share is not None:
                early = early * share
        risks.append(TestedRisk(objective, losses, tolerated, lower, upper, early))
    if budget and sizes is not None:
        raise RiskcalError("budget: with weighting='requests' none can be certified; leave it out.")
    risks.extend(_budgeted(runs, name, wanted) for name, wanted in budget.items())

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
        costs={name: cost(runs.values[name]) for name in runs.costs},
        full={name: cost(runs.full[name]) for name in runs.costs if name in runs.full},
        units=runs.units,
        unit="clusters" if "cluster" in runs.labels else "prompts",
        digest=runs.digest(),
        stopped=runs.stopped,
        lower_is_stricter=runs.lower_is_stricter,
        # which says from which layer on; who replayed by other means and says nothing of the rule is not known to have had no
        # schedule
        replayed=runs.source == "replayed" and "min_layer" in runs.candidates,
        weighting="requests"
        if sizes is not None
        else "clusters"
        if "cluster" in runs.labels
        else "prompts",
        sizes=sizes,
        max_cluster=max_cluster,
        group=_one_group(runs),
    )
    if not runs.nameless:
        return problem
    made_here = [  # losses that no column holds: the order of the runs' content knows nothing of them
        (risk.losses - risk.lower) / risk.width
        for risk in problem.risks
        if risk.early is not None or risk.is_cost
    ]
    if "cluster" not in runs.labels and not made_here:
        return replace(problem, nameless=True)  # the runs stand in the order of their content
    means = [
        runs.unit_means(runs.values[name])
        for name in ("dissimilarity", "risk")
        if name in runs.values
    ]
    order = records.numbered_order(problem.units, records.content_prints(*means, *made_here))
    return replace(problem.rows(order), nameless=True)


def _one_group(runs: Runs) -> str | None:
    """The stratum of all prompts; None where they are of several, or of none that was said."""
    alike = "group" in runs.labels and (runs.group == runs.group[0]).all()
    return str(runs.group[0]) if alike else None


def _early(runs: Runs, sizes: Any, tolerated: float) -> Floats:
    """Which prompts stopped early, (P, k), as 0 and 1; whichever is worse where it may be float32's rounding alone."""
    if "cluster" in runs.labels and sizes is None:
        raise RiskcalError(
            "objective: 'selective' pools requests, so clusters need weighting='requests' and max_cluster=."
        )
    if "layers" not in runs.values or "layers" not in runs.full:
        raise RiskcalError(
            "layers: objective 'selective' asks which requests stopped before the full model did; record the column for every "
            "candidate, and rows of the full model (threshold inf)."
        )
    layers, full = runs.values["layers"], runs.full["layers"][:, None]
    early = layers < full * (1 - ROUNDING)
    early |= (layers < full * (1 - _validate.TOLERANCE)) & (runs.prompt_losses() > tolerated)
    if "failed" in runs.values:  # what failed must not hide among those that ran in full
        early |= runs.values["failed"] > 0
    return early.astype(np.float64)


def _budgeted(runs: Runs, name: str, wanted: Any) -> TestedRisk:
    """The mean of a cost as a risk."""
    if name not in runs.costs:
        raise RiskcalError(
            f"budget: {name!r} is no recorded cost; there is {', '.join(runs.costs) or 'none'}."
        )
    costs = runs.unit_means(runs.values[name])
    pair = wanted if isinstance(wanted, tuple | list) and len(wanted) == 2 else (wanted, None)
    largest = pair[1]
    full = runs.full.get(name)
    if largest is None and name == "layers" and full is not None and np.ptp(full) == 0:
        largest = float(full[0]) * (1 + _validate.TOLERANCE)  # the decoder's own number of them
    if largest is None:
        raise RiskcalError(
            f"budget: give {name!r} with the largest cost that a request can have, fixed beforehand: "
            f"budget={{{name!r}: ({as_text(pair[0])}, largest)}}."
        )
    most = _validate.number(largest, f"budget: largest {name}")
    mean = _validate.number(pair[0], f"budget: {name}")
    if not 0.0 < mean < most:
        raise RiskcalError(
            f"budget: {name!r} of {mean:g} is not between 0 and its largest, {most:g}."
        )
    beyond = (costs > most) | (costs < 0.0)
    if beyond.any():
        row, column = (int(i) for i in np.argwhere(beyond)[0])
        raise RiskcalError(
            f"budget: {name} of {table_columns.plain(runs.units[row])!r} is {costs[row, column]:g}, outside [0, {most:g}] "
            f"({int(beyond.sum())} values are); give a bound that holds for all that will be served."
        )
    return TestedRisk(name, costs, mean, 0.0, most, is_cost=True)


def warn_of_sizes(runs: Runs) -> None:
    """Say which mean is certified where clusters of several sizes count alike."""
    sizes = runs.unit_sizes
    if "cluster" in runs.labels and len(np.unique(sizes)) > 1:
        _validate.warn(
            f"cluster: sizes differ, from {sizes.min()} to {sizes.max()} prompts, and every cluster counts alike: the mean "
            "that is certified is that of a random cluster, not of a random prompt. Give weighting='requests' and "
            "max_cluster=, a bound on sizes fixed beforehand, for the mean over prompts; weighting='clusters' if it is right "
            "as it is.",
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
            warn_of_sizes(runs)
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
            f"max_cluster: cluster {table_columns.plain(runs.units[which])!r} has {sizes[which]} prompts "
            f"({int((sizes > most).sum())} clusters exceed {most}); give a bound that holds for all that will be served, "
            f"or keep {most} prompts of each "
            "cluster, drawn at random before their losses are known."
        )
    return sizes


def from_arrays(
    losses: Any,
    delta: Any,
    *,
    thresholds: Any,
    lower: float,
    upper: float,
    prompts: ArrayLike | None,
    exact: bool,
    costs: Mapping[str, Any] | None,
    lower_is_stricter: bool,
) -> Problem:
    """The problem of controlling plain losses (n, k): rows are units, or tokens where ``prompts`` groups them."""
    if isinstance(losses, str | os.PathLike):
        raise RiskcalError(f"runs: {str(losses)!r} is a path; read it first, with Runs.read(path).")
    if isinstance(losses, Traces | pd.DataFrame):
        raise RiskcalError(
            "runs: give Runs or an array of losses. A table becomes Runs with Runs.from_frame; one with a column per threshold "
            "is an array with table.to_numpy() and thresholds=[float(name) for name in table.columns]. Traces hold token rows of "
            "one path, which replay_traces turns into (replayed) Runs."
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
    refuse_other_columns(losses, grid, "losses")
    refuse_other_rows({"losses": losses, "prompts": prompts})
    matrix = _validate.losses(losses, lower=low, upper=high)
    if matrix.shape[1] != grid.size:
        raise RiskcalError(
            f"thresholds: {grid.size} given for {matrix.shape[1]} columns of losses; give one per column."
        )
    descending = np.argsort(grid if lower_is_stricter else -grid, kind="stable")  # strictest first
    rows = len(matrix)
    spent = {
        name: costs_.of_shape(value, name, matrix.shape, "rows", grid)
        for name, value in costs_.named(costs).items()
    }
    if prompts is None:
        units, nameless = np.arange(rows), True
        # as in certificates of earlier versions
        hashed = np.random.default_rng(0).permutation(rows)
    else:
        spent = {name: _average_within(cost, prompts)[0] for name, cost in spent.items()}
        matrix, units = _average_within(matrix, prompts)
        nameless, hashed = records.numbered(units), np.arange(len(units))
        if replayed and len(units) < rows and not exact:
            raise RiskcalError(
                f"losses: {rows} rows of {len(units)} prompts were replayed on the full model's path, but after a first early "
                "exit a real decoder's states differ. Record real generations, or declare a memoryless exit with exact=True."
            )
    hasher = hashlib.blake2b(digest_size=16)
    for first in range(0, len(matrix), 4096):  # in parts: one copy of the whole is enough
        part = matrix[np.ix_(hashed[first : first + 4096], descending)]
        hasher.update(np.ascontiguousarray(part).data)
    hasher.update(grid[descending].data)
    if lower_is_stricter:
        hasher.update(direction.COLUMN.encode())
    order = np.arange(len(units))
    if nameless:
        columns = ((matrix[:, j] - low) / (high - low) for j in descending)
        order = records.numbered_order(units, records.prints_of(columns))
    matrix = np.ascontiguousarray(matrix[np.ix_(order, descending)])
    return Problem(
        risks=(TestedRisk("losses", matrix, _validate.tolerance(delta, low, high), low, high),),
        candidates=pd.DataFrame({"threshold": grid[descending]}),
        costs={name: cost[order][:, descending] for name, cost in spent.items()},
        full={},
        units=units[order],
        nameless=nameless,
        lower_is_stricter=lower_is_stricter,
        unit="rows" if prompts is None else "prompts",
        uneven=prompts is not None and _uneven(prompts),
        digest=hasher.hexdigest(),
    )


def _uneven(prompts: ArrayLike) -> bool:
    """Whether prompts have rows in unequal numbers."""
    ids = table_columns.identifiers(table_columns.series(prompts, "prompts"), "prompts")
    return len(set(np.bincount(pd.factorize(ids)[0]).tolist())) > 1


def _average_within(matrix: Floats, prompts: ArrayLike) -> tuple[Floats, NDArray[Any]]:
    """Mean of each prompt's rows, and the prompts' ids, in tested order."""
    ids = table_columns.identifiers(table_columns.series(prompts, "prompts"), "prompts")
    if len(ids) != len(matrix):
        raise RiskcalError(f"prompts: {len(ids)} ids for {len(matrix)} rows; give one per row.")
    code, distinct = pd.factorize(ids)
    if len(distinct) < 2:
        raise RiskcalError("prompts: all rows belong to one prompt; at least two are needed.")
    order = records.tested_order(distinct)
    return means_within(matrix, code)[order], np.asarray(distinct)[order]
