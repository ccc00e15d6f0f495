"""From what was certified to the `Calibration` that says so."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal.calibration import problem as problems
from riskcal.calibration import proxies, sentences
from riskcal.calibration.problem import Problem
from riskcal.calibration.result import Calibration
from riskcal.policy import CANDIDATE_COLUMNS, Asked
from riskcal.records import COSTS

#: Columns that tell candidates apart without being named.
_KNOWN = ("threshold", *CANDIDATE_COLUMNS)


def cheapest(problem: Problem, certified: NDArray[np.bool_], cost: str | None) -> int | None:
    """The certified candidate of least cost; with one coordinate and no word of a cost, the least strict."""
    if not certified.any():
        return None
    return int(np.where(certified, problems.spending(problem, cost), math.inf).argmin())


def table_of(problem: Problem, **tested: Any) -> pd.DataFrame:
    """One row per candidate: coordinates, n, mean losses, what was ``tested`` of them, and costs."""
    losses = {f"loss_{risk.name}": problem.mean(risk) for risk in problem.risks}
    if len(losses) == 1:
        losses = {"loss": next(iter(losses.values()))}
    costs = {name: cost.mean(0) for name, cost in problem.costs.items()}
    return pd.DataFrame({**problem.candidates, "n": problem.n, **losses, **tested, **costs})


def settled(
    problem: Problem,
    table: pd.DataFrame,
    cost: str | None,
    *,
    outlook: Callable[[], str],
    rises: str = "",
    pilot: tuple[Any, ...] = (),
    starts: int = 1,
    options: Mapping[str, Any] = MappingProxyType({}),
    deltas: list[float] | None = None,
    **fields: Any,
) -> Calibration:
    """The calibration that says what the table's column ``certified`` does.

    ``fields`` are further ones of it, ``epsilon_spent`` among them.
    """
    index = cheapest(problem, table["certified"].to_numpy(dtype=bool), cost)
    chosen = None if index is None else table.iloc[index]
    opening = sentences.opening(problem, chosen, fields["epsilon_spent"])
    remarks = (
        sentences.worth(problem, chosen)
        + proxies.labels_saved(problem, chosen)
        + rises
        + sentences.end(table, problem.stopped)
    )
    single = problem.risks[0]
    return Calibration(
        threshold=math.inf if chosen is None else float(chosen["threshold"]),
        certified=chosen is not None,
        chosen=chosen,
        table=table,
        full_costs=problem.full_costs,
        _message=partial(
            sentences.message, opening, None if chosen is not None else outlook, remarks
        ),
        _problem=problem,
        delta=single.delta
        if len(problem.risks) == 1
        else {risk.name: risk.delta for risk in problem.risks},
        objective="+".join(risk.name for risk in problem.risks),
        n=problem.n,
        k=problem.k,
        lower=min(risk.lower for risk in problem.risks if not risk.is_cost),
        upper=max(risk.upper for risk in problem.risks if not risk.is_cost),
        records_digest=problem.digest,
        pilot=pilot,
        starts=starts,
        stopped=problem.stopped,
        weighting=problem.weighting,
        max_cluster=problem.max_cluster,
        lower_is_stricter=problem.lower_is_stricter,
        asked=asked(problem, cost, options, deltas),
        **fields,
    )


def asked(
    problem: Problem,
    cost: str | None,
    options: Mapping[str, Any],
    deltas: list[float] | None = None,
) -> Asked:
    """What a certificate keeps, so that all of it can be done again."""
    return Asked(
        cost=cost or problems.CUSTOMARY,
        cost_named=cost is not None,
        options=dict(options),
        deltas=deltas,
        largest={risk.name: risk.upper for risk in problem.risks if risk.is_cost},
        candidate_columns=[str(name) for name in problem.candidates if name not in _KNOWN],
        costs=[name for name in problem.costs if name not in COSTS],
        lower_is_stricter=problem.lower_is_stricter,
        group=problem.group,
    )
