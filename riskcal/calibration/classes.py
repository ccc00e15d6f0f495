"""`calibrate_classes`: thresholds by class of request that are fast together, and whose budgets all hold together."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate, fwer, records
from riskcal._validate import Floats, RiskcalError
from riskcal.calibration import books
from riskcal.calibration import problem as problems
from riskcal.calibration.calibrate import refuse_cut_grid, risk_pvalues
from riskcal.calibration.class_result import ClassCalibration
from riskcal.calibration.posing import RANGES, pose, require_runs
from riskcal.calibration.problem import Problem, TestedRisk
from riskcal.calibration.settling import asked
from riskcal.pvalues import Method, methods
from riskcal.records import Runs


def calibrate_classes(
    runs: Runs,
    *,
    budgets: float | Mapping[str, float],
    joint: float | None = None,
    epsilon: float = 0.05,
    objective: str = "textual",
    cost: str = "seconds",
    test: str | Method = "betting",
    pilot_fraction: float = 0.2,
) -> ClassCalibration:
    """Find a candidate for each class of requests, the fastest together whose expected losses keep within budgets.

    Parameters
    ----------
    runs : Runs
        With a ``group`` for every prompt, its class, in the proportions in which they are served, without clusters; with
        rows of the full model.
    budgets : float, or mapping of class to float
        Tolerated expected loss of each class, in the loss's own units; a number is every class's.
    joint : float, optional
        Tolerated expected loss of all requests together, besides.
    epsilon : float
        Probability, over the draw of the calibration prompts, that any of these budgets is exceeded by what is certified.
    objective : {"textual", "risk", "risk_clipped"}
        Which loss of the runs is tested.
    cost : str
        Recorded cost whose expectation is minimised: ``"seconds"`` is measured latency. It may be of another name, ``"layers"``.
    test : str or `riskcal.pvalues.Method`
        As in `calibrate`.
    pilot_fraction : float
        Share of the prompts that choose what is tested, and are not tested.

    Returns
    -------
    ClassCalibration
        Its ``policies()`` by class are for a `riskcal.serving.PolicyBook`. A class may be left with the full model.

    Raises
    ------
    RiskcalError
        For runs without groups, with clusters or without the full model's cost; budgets that miss a class, name another or are
        below 0, the full model's loss;
        classes with fewer than two prompts in the pilot or the rest; and wherever `calibrate` refuses the runs.

    Notes
    -----
    A *book* is one candidate, or the full model, for each of several classes. Its excess is that of its worst budget: the mean
    loss on the pilot above the budget, in standard errors of what the pilot and the rest can tell, with one request of the
    worst loss more than was seen. For every excess the pilot has a cheapest book; those that are cheaper than all books of less
    excess are the Pareto front of excess and cost, which is found exactly. The rest of the prompts test the books of the front
    one after the other, from the least excess on, and stop at the first failure. The hypothesis of a book is that any of its
    budgets is exceeded, its p-value the largest of theirs; a class that runs the full model has nothing to show.

    Without a joint budget a class is a book of its own, whose sequence is tested at its share of epsilon, so that a class that
    fails stops no other. A joint budget ties all classes into books together, which are tested at the whole of epsilon. Either
    way, with probability at least 1 - epsilon, all budgets hold at once.

    Assumes i.i.d. prompts of the classes in the proportions of the service, and candidates that were fixed beforehand. Sources:
    Learn then Test (Angelopoulos et al. 2021), Pareto Testing (Laufer-Goldshtein et al. 2023), Berger (1982) for the largest
    p-value.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> runs = riskcal.Runs.from_arrays(
    ...     thresholds=[0.9, 0.5, np.inf],
    ...     prompts=np.arange(1000),
    ...     group=np.repeat(["easy", "hard"], 500),
    ...     dissimilarity=np.repeat([[0.0, 0.02, 0.0], [0.02, 0.4, 0.0]], 500, axis=0) * rng.random((1000, 1)),
    ...     layers=np.tile([4.0, 2.0, 8.0], (1000, 1)),
    ... )
    >>> calibration = riskcal.calibrate_classes(runs, budgets={"easy": 0.05, "hard": 0.05}, cost="layers")
    >>> {name: policy.threshold for name, policy in calibration.policies().items()}
    {'easy': 0.5, 'hard': 0.9}
    """
    require_runs(runs)
    level, method = _validate.level(epsilon, "epsilon"), methods.named(test)
    if "cluster" in runs.labels:
        raise RiskcalError(
            "cluster: budgets by class are for runs without clusters; calibrate_groups takes them."
        )
    tolerated = _budgets(runs, budgets, objective)
    problem = pose(runs, next(iter(tolerated.values())), objective)
    for name in {"class", "step"} & set(problem.coordinates):
        raise RiskcalError(
            f"candidates: the setting {name!r} has the name of a column of the table by class; record it under another."
        )
    refuse_cut_grid(problem.stopped, one_sequence=False)
    problems.refuse_unknown_cost(problem, cost)
    if cost not in problem.costs or cost not in problem.full:
        raise RiskcalError(
            f"cost: {cost!r} of the full model was not recorded, which a class may be left with; record its rows too."
        )
    [risk] = problem.risks
    total = None if joint is None else _tolerated(joint, risk.lower, risk.upper, "joint")
    label = dict(zip(runs.prompts.tolist(), runs.group.tolist(), strict=True))
    group = np.array([str(label[unit]) for unit in problem.units.tolist()])
    size = len(problems.split_pilot(problem, pilot_fraction)[0].units)
    pilot = np.arange(problem.n) < size
    for name in tolerated:
        _refuse_few(group[pilot], group[~pilot], name)
    known = _Known(problem, risk, method, cost, group, pilot)
    families = [[name] for name in tolerated] if total is None else [list(tolerated)]
    tables: list[pd.DataFrame] = []
    chosen: dict[str, int] = {}
    for family in families:
        own = {name: tolerated[name] for name in family}
        table, best = _tested(known, own, total, level / len(families))
        tables.append(table)
        chosen |= best
    return ClassCalibration(
        table=pd.concat(tables, ignore_index=True),
        candidates=problem.candidates,
        chosen=chosen,
        budgets=tolerated,
        joint=total,
        epsilon=level,
        objective=objective,
        cost=cost,
        costs=_mean_costs(known, chosen),
        lower=risk.lower,
        upper=risk.upper,
        test=method.name,
        n={name: int((group[~pilot] == name).sum()) for name in tolerated},
        pilot=tuple(problem.units[pilot].tolist()),
        records_digest=problem.digest,
        asked=asked(problem, cost, {"pilot_fraction": pilot_fraction}),
        _beside=problem.beside,
    )


class _Known(NamedTuple):
    """What all classes share."""

    problem: Problem
    risk: TestedRisk
    method: Method
    cost: str
    group: NDArray[Any]  # (n,)
    pilot: NDArray[np.bool_]  # (n,)

    @property
    def losses(self) -> Floats:
        """(n, k + 1), the full model's last."""
        return np.column_stack([self.risk.losses, np.zeros(self.problem.n)])

    @property
    def costs(self) -> Floats:
        """(n, k + 1), the full model's last."""
        return np.column_stack([self.problem.costs[self.cost], self.problem.full[self.cost]])

    def pvalues(self, losses: Floats, delta: float, level: float) -> Floats:
        """Of losses (n, candidates) of some of the units."""
        risk = self.risk._replace(losses=np.ascontiguousarray(losses), delta=delta)
        levels = np.full(losses.shape[1], level)
        return risk_pvalues(self.method, risk, levels, self.problem.nameless)


def _budgets(runs: Runs, given: Any, objective: str) -> dict[str, float]:
    """Each class's budget, in the order of their names."""
    classes = [str(name) for name in np.unique(runs.group)]
    if not isinstance(given, Mapping):
        given = dict.fromkeys(classes, given)
    missing = [name for name in classes if name not in given]
    other = [name for name in given if name not in classes]
    if missing or other:
        what = f"no budget for {missing[0]!r}" if missing else f"no prompt is of {other[0]!r}"
        raise RiskcalError(
            f"budgets: {what}; give one for each of {', '.join(map(repr, classes))}."
        )
    lower, upper = RANGES[_validate.choice(objective, "objective", records.OBJECTIVES)]
    return {name: _tolerated(given[name], lower, upper, f"budgets: {name!r}") for name in classes}


def _tolerated(delta: Any, lower: float, upper: float, what: str) -> float:
    """A budget that the full model keeps, with which a class may be left."""
    found = _validate.tolerance(delta, lower, upper)
    if found < 0.0:
        raise RiskcalError(
            f"{what}: {found:g} is below 0, the loss of the full model, with which a class may be left; give at least 0. "
            "calibrate certifies a decrease."
        )
    return found


def _refuse_few(pilot: NDArray[Any], rest: NDArray[Any], name: str) -> None:
    aside, left = int((pilot == name).sum()), int((rest == name).sum())
    if aside < 2 or left < 2:
        raise RiskcalError(
            f"group: {name!r} has {aside} prompts in the pilot and {left} to test; each needs at least two. Record more of it, "
            "or fix beforehand that it is pooled with another."
        )


def _piloted(known: _Known, name: str, delta: float) -> books.Pilot:
    own = known.group == name
    aside = own & known.pilot
    return books.of_class(
        known.risk.losses[aside],
        known.costs[aside].mean(0),
        delta,
        known.risk.upper,
        share=float(aside.sum() / known.pilot.sum()),
        n_rest=int((own & ~known.pilot).sum()),
    )


def _tested(
    known: _Known, budgets: Mapping[str, float], joint: float | None, level: float
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Test the books of some classes: a row per book and class, in tested order, and the candidate of each class."""
    rest, full = ~known.pilot, known.problem.k
    sizes = int(known.pilot.sum()), int(rest.sum())
    found = books.path([_piloted(known, *one) for one in budgets.items()], joint, *sizes)
    losses, costs = known.losses, known.costs
    p, rows = np.zeros(len(found)), []
    for c, (name, delta) in enumerate(budgets.items()):
        own, picked = (known.group == name) & rest, found[:, c]
        tried = np.unique(picked[picked < full])
        pvalue = np.zeros(full + 1)
        if tried.size:
            pvalue[tried] = known.pvalues(losses[np.ix_(own, tried)], delta, level)
        p = np.maximum(p, pvalue[picked])
        told = _names(known.problem, picked)
        told |= {
            "n": int(own.sum()),
            "loss": losses[own].mean(0)[picked],
            known.cost: costs[own].mean(0)[picked],
        }
        rows.append(pd.DataFrame({"class": name, "step": np.arange(len(found))} | told))
    if joint is not None and len(found):
        names = list(budgets)
        column = found[:, [names.index(name) for name in known.group[rest]]].T
        mixed = losses[np.flatnonzero(rest)[:, None], column]
        p = np.maximum(p, known.pvalues(mixed, joint, level))
    certified = fwer.fixed_sequence(p, level) if len(found) else np.zeros(0, dtype=bool)
    table = pd.concat([one.assign(pvalue=p, certified=certified) for one in rows])
    last = found[int(certified.sum()) - 1] if certified.any() else np.full(len(budgets), full)
    return (
        table.sort_values("step", kind="stable"),
        dict(zip(budgets, last.tolist(), strict=True)),
    )


def _names(problem: Problem, picked: NDArray[np.intp]) -> dict[str, Any]:
    """What tells candidates apart, and the full model from them."""
    told = {}
    for name in problem.coordinates:
        values = problem.candidates[name].tolist()
        values.append(math.inf if name == "threshold" else "full")
        told[name] = [values[j] for j in picked]
    return told


def _mean_costs(known: _Known, chosen: Mapping[str, int]) -> tuple[float, float]:
    """Of what was chosen, and of the full model, over the prompts that were tested."""
    rest = np.flatnonzero(~known.pilot)
    picked = [chosen[name] for name in known.group[rest]]
    costs = known.costs
    return float(costs[rest, picked].mean()), float(costs[rest, -1].mean())
