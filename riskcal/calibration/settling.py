"""From what was certified to the `Calibration` that says so."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal.calibration import problem as problems
from riskcal.calibration import sentences
from riskcal.calibration.problem import Problem
from riskcal.calibration.result import Calibration


def cheapest(problem: Problem, certified: NDArray[np.bool_], cost: str) -> int | None:
    """The certified candidate of least cost; with one coordinate, of the lowest threshold."""
    if not certified.any():
        return None
    spending = problem.candidates["threshold"].to_numpy(dtype=np.float64)
    if problem.several:
        spending = problems.mean_cost(problem, cost)
    return int(np.where(certified, spending, math.inf).argmin())


def table_of(problem: Problem) -> pd.DataFrame:
    """One row per candidate: coordinates, n, mean losses and costs."""
    losses = {f"loss_{risk.name}": problem.mean(risk) for risk in problem.risks}
    if len(losses) == 1:
        losses = {"loss": next(iter(losses.values()))}
    costs = {name: cost.mean(0) for name, cost in problem.costs.items()}
    return problem.candidates.assign(n=problem.n, **losses, **costs)


def settled(
    problem: Problem,
    table: pd.DataFrame,
    cost: str,
    *,
    outlook: Callable[[], str],
    rises: str = "",
    pilot: tuple[Any, ...] = (),
    starts: int = 1,
    **settings: Any,
) -> Calibration:
    """The calibration that says what the table's column ``certified`` does."""
    costs = [name for name in problem.costs if name in table.columns]
    table = table[[name for name in table.columns if name not in costs] + costs]
    index = cheapest(problem, table["certified"].to_numpy(dtype=bool), cost)
    chosen = None if index is None else table.iloc[index]
    opening = sentences.opening(problem, chosen, settings["epsilon_spent"])
    remarks = (
        sentences.worth(problem, table, chosen) + rises + sentences.end(table, problem.stopped)
    )
    single = problem.risks[0]
    return Calibration(
        threshold=math.inf if chosen is None else float(chosen["threshold"]),
        certified=chosen is not None,
        chosen=chosen,
        table=table,
        full_costs=problem.full_costs,
        _told=partial(sentences.message, opening, None if chosen is not None else outlook, remarks),
        _problem=problem,
        _cost=cost,
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
        **settings,
    )
