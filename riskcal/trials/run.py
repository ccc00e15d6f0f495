"""`run_trials`: how large and how stable savings are over repeated splits."""

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate, records
from riskcal._validate import Floats, RiskcalError
from riskcal.calibration.calibrate import procedure_for, with_candidates_in_order
from riskcal.calibration.posing import pose, require_runs
from riskcal.calibration.problem import Problem, refuse_unknown_cost
from riskcal.fwer import PilotOrder, Procedure
from riskcal.pvalues import Method, methods
from riskcal.records import Runs
from riskcal.trials.deciding import decide


def run_trials(
    runs: Runs,
    deltas: ArrayLike,
    *,
    n_trials: int = 50,
    calibration_fraction: float = 0.8,
    seed: int = 0,
    epsilon: float = 0.05,
    objective: str = "textual",
    test: str | Method = "betting",
    procedure: str | Procedure | None = None,
    cost: str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Calibrate on random splits of the prompts, and see what each calibration costs and loses on the rest.

    Parameters
    ----------
    runs : Runs
        Generated, or replayed exactly.
    deltas : float or sequence of float
        Tolerated expected losses, each calibrated for itself.
    n_trials : int
        Random splits; all deltas share them.
    calibration_fraction : float
        Share of the independent units (prompts, or clusters) that each trial calibrates on, rounded to whole units.
    seed : int
        Of the splits. Within a split, units are tested in the contract's order, not in a random one.
    epsilon, objective, test, procedure, cost
        As in `riskcal.calibrate`, with its defaults.
    **options
        Further arguments of `riskcal.calibrate` (``order``, ``starts``, ``weights``, ``transitions``, ``pilot_fraction``).

    Returns
    -------
    DataFrame
        One row per trial and delta: ``trial``, ``delta``, ``threshold`` (``inf`` if nothing was certified, which runs the
        full model) and any further coordinate, ``certified``, ``calibration_loss`` and ``heldout_loss`` (means at the chosen
        candidate; 0 for the full model), mean ``layers`` and other recorded costs on the held-out units, and the full
        model's on the same units (``full_layers``, ...). NaN where the full model was chosen but not recorded.

    Raises
    ------
    RiskcalError
        For what `riskcal.calibrate` refuses, and a split with fewer than two units to calibrate on or none to hold out.

    Notes
    -----
    This is the protocol of repeated 80/20 splits (Schuster et al. 2022). It shows how large the savings are and how much they
    depend on the draw of the calibration prompts. It is no proof of validity: the splits overlap, so that trials are far
    from independent and their thresholds spread less than those of fresh samples would, and a trial's held-out loss is a
    noisy mean that may exceed delta by chance. Validity is a matter of proof, and of simulated worlds whose truth is
    known (``benchmarks/laboratory``). Choosing delta, test or procedure by this table and then calibrating on the same
    runs is a second look at them.

    Examples
    --------
    >>> trials = riskcal.run_trials(riskcal.load_example("g2p"), deltas=[0.05, 0.1], n_trials=10)
    >>> trials.groupby("delta")["layers"].mean().round(1).to_dict()  # of 8 layers
    {0.05: 2.2, 0.1: 1.4}
    """
    require_runs(runs)
    method = methods.named(test)
    n_trials = _validate.count(n_trials, "n_trials", least=1)
    level = _validate.level(epsilon, "epsilon")
    if "weighting" in options or "max_cluster" in options:
        raise RiskcalError(
            "weighting: trials count every cluster alike; leave weighting and max_cluster out."
        )
    if "proxy" in options or "unlabelled" in options:
        raise RiskcalError(
            "proxy: trials calibrate without one; leave proxy and unlabelled out, or calibrate splits of your own with it: "
            "calibrate(runs.take(rows), proxy=..., unlabelled=...)."
        )
    if "budget" in options:
        raise RiskcalError(
            "budget: trials hold one loss at each delta; leave the budget out, or calibrate splits of your own with it: "
            "calibrate(runs.take(rows), budget=...)."
        )
    lower, upper = records.OBJECTIVES[_validate.choice(objective, "objective", records.OBJECTIVES)]
    tolerated = [_validate.tolerance(d, lower, upper) for d in _validate.numbers(deltas, "deltas")]
    weighting = "clusters" if "cluster" in runs.labels else None
    problem = pose(runs, tolerated[0], objective, weighting)
    chosen = procedure_for(problem, procedure, options)
    refuse_unknown_cost(problem, cost)
    heldout = splits(problem.n, n_trials, calibration_fraction, seed)
    # splits count units as the runs do, whatever order they are tested in
    ascending = np.argsort(problem.units)
    heldout = ascending[np.searchsorted(problem.units, runs.units, sorter=ascending)][heldout]
    return of_problem(problem, tolerated, heldout, method, chosen, level, cost)


def of_problem(
    problem: Problem,
    tolerated: list[float],
    heldout: NDArray[np.intp],
    method: Method,
    procedure: Procedure,
    level: float,
    cost: str | None,
) -> pd.DataFrame:
    """The table of `run_trials`, for a problem of one risk and rows of it to hold out (n_trials, m)."""
    if not isinstance(procedure, PilotOrder):
        problem = with_candidates_in_order(problem, procedure, cost).problem
        procedure = procedure.in_order()
    best, loss = decide(problem, tolerated, heldout, method, procedure, level, cost)
    return _trial_table(problem, tolerated, best, loss, heldout)


def summary(trials: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the trials, one row per delta.

    Parameters
    ----------
    trials : DataFrame
        As `run_trials` returns it.

    Returns
    -------
    DataFrame
        ``delta``, ``n_trials``, ``certified`` (share of the trials), and for the losses, each recorded cost and, where the
        full model's layers were recorded, ``saving`` (the share of them saved): ``..._mean`` and ``..._sd``.
    """
    names = list(trials.columns)
    measured = names[names.index("calibration_loss") :]
    measured = [name for name in measured if not name.startswith("full_")]
    table = trials[["delta", *measured]]
    if {"layers", "full_layers"} <= set(trials.columns):
        table = table.assign(saving=1.0 - trials["layers"] / trials["full_layers"])
        measured = [*measured, "saving"]
    groups = table.groupby("delta", sort=True)
    columns = {
        "n_trials": groups.size(),
        "certified": trials.groupby("delta", sort=True)["certified"].mean(),
    }
    for name in measured:
        columns |= {f"{name}_mean": groups[name].mean(), f"{name}_sd": groups[name].std()}
    return pd.DataFrame(columns).reset_index()


def splits(n: int, n_trials: int, fraction: float, seed: int) -> NDArray[np.intp]:
    """Row numbers to hold out, (n_trials, n - m), where m are calibrated on."""
    share = _validate.level(fraction, "calibration_fraction")
    size = round(share * n)
    if size < 2 or size == n:
        raise RiskcalError(
            f"calibration_fraction: {share:g} of {n} units leaves {size} to calibrate on and {n - size} to hold out; "
            "at least two and one are needed."
        )
    keys = np.random.default_rng(_validate.count(seed, "seed", least=0, most=2**128)).random(
        (n_trials, n)
    )
    return np.argpartition(keys, n - size, axis=1)[:, : n - size]


def _trial_table(
    problem: Problem,
    deltas: list[float],
    chosen: NDArray[np.intp],
    loss: Floats,
    heldout: NDArray[np.intp],
) -> pd.DataFrame:
    n_trials = len(heldout)
    which, some = chosen.ravel(), (chosen >= 0).ravel()
    columns: dict[str, Any] = {
        "trial": np.tile(np.arange(n_trials), len(deltas)),
        "delta": np.repeat(deltas, n_trials),
    }
    for name in dict.fromkeys(["threshold", *problem.coordinates]):
        column = problem.candidates[name].to_numpy()[which]
        columns[name] = np.where(
            some, column, math.inf if name == "threshold" else _missing(column)
        )
    columns["certified"] = some
    columns["calibration_loss"] = loss.ravel()
    columns["heldout_loss"] = np.where(
        some, _heldout_means(problem.risks[0].losses, chosen, heldout), 0.0
    )
    full = {name: cost[heldout].mean(1) for name, cost in problem.full.items()}
    for name, cost in problem.costs.items():
        reference = np.tile(full.get(name, np.full(n_trials, math.nan)), len(deltas))
        columns[name] = np.where(some, _heldout_means(cost, chosen, heldout), reference)
    columns |= {f"full_{name}": np.tile(mean, len(deltas)) for name, mean in full.items()}
    return pd.DataFrame(columns).sort_values(["trial", "delta"], kind="stable", ignore_index=True)


def _heldout_means(values: Floats, chosen: NDArray[np.intp], heldout: NDArray[np.intp]) -> Floats:
    """Mean over each trial's held-out units at its chosen candidate, (D * T,)."""
    return np.concatenate([values[heldout, of_delta[:, None]].mean(1) for of_delta in chosen])


def _missing(column: NDArray[Any]) -> Any:
    return math.nan if column.dtype.kind in "fiu" else None
