"""Calibrations for a list of deltas, by bounds that hold for all candidates at once."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from riskcal import bounds, fwer
from riskcal.calibration import sentences
from riskcal.calibration.counts import bounds_of_counts
from riskcal.calibration.outlook import Design, outlook
from riskcal.calibration.problem import Problem
from riskcal.calibration.result import Calibration
from riskcal.calibration.settling import settled, table_of
from riskcal.pvalues import Betting, Method


def simultaneous(
    problem: Problem,
    deltas: list[float],
    method: Method,
    cost: str | None,
    epsilons: dict[str, Any],
) -> list[Calibration]:
    """One calibration per delta from bounds that hold for all candidates at once."""
    risk = problem.risks[0]
    grid = {"grid": np.unique(deltas)} if isinstance(method, Betting) or not method.bounded else {}
    epsilon = epsilons["epsilon_spent"]
    bound = bounds.simultaneous(
        risk.losses, epsilon=epsilon, method=method, lower=risk.lower, upper=risk.upper, **grid
    )
    if method.walks and problem.nameless:
        bound = np.maximum(bound, bounds_of_counts(risk.losses, epsilon / problem.k))
    # bounds know of no proxy, so that it leaves no share of the variance to tell
    problem = replace(problem, risks=(risk._replace(pairs=None),))
    rises, results = sentences.rises(problem), []
    design = Design.of(method, fwer.Bonferroni(), epsilon, problem.k)
    for delta in deltas:
        posed = problem.at(delta)
        results.append(
            settled(
                posed,
                table_of(posed, bound=bound, certified=bound <= delta),
                cost,
                outlook=partial(outlook, posed, design),
                rises=rises,
                test=method.name,
                procedure="simultaneous",
                deltas=deltas,
                **epsilons,
            )
        )
    return results
