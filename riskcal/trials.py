"""How large and how stable savings are: `run_trials` over repeated splits, `compare` over tests and procedures.

Neither issues a certificate. What is to be deployed comes from `riskcal.calibrate`, on data that were not used to choose it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate, calibration, fwer, pvalues, records
from riskcal._validate import Floats, RiskcalError
from riskcal.records import Runs

#: What each p-value (k,) is selected by, at a shared epsilon, where that needs nothing but the p-values.
_SELECT: dict[str, Callable[[ArrayLike, float], NDArray[np.bool_]]] = {
    "holm": fwer.holm,
    "hochberg": fwer.hochberg,
    "fallback": lambda p, epsilon: fwer.fallback(p, epsilon, np.full(np.size(p), 1.0 / np.size(p))),
}
_TINY = float(np.finfo(np.float64).tiny)


def run_trials(
    runs: Runs,
    deltas: ArrayLike,
    *,
    n_trials: int = 50,
    calibration_fraction: float = 0.8,
    seed: int = 0,
    epsilon: float = 0.05,
    objective: str = "textual",
    test: str = "betting",
    procedure: str | None = None,
    cost: str = "layers",
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
    """
    calibration.require_runs(runs)
    _validate.choice(test, "test", calibration.TESTS)
    n_trials = _validate.count(n_trials, "n_trials", least=1)
    level = _validate.level(epsilon, "epsilon")
    if "weighting" in options or "max_cluster" in options:
        raise RiskcalError(
            "weighting: trials count every cluster alike; leave weighting and max_cluster out."
        )
    procedure = procedure or (
        "fixed_sequence" if records.only_threshold(runs.candidates) else "holm"
    )
    _validate.choice(procedure, "procedure", calibration.PROCEDURES)
    pool = _pool(runs, objective, cost)
    one = (
        procedure == "fixed_sequence"
        and pool.cost is None
        and options.get("starts", 1) == 1
        and "order" not in options
    )
    calibration.refuse_cut_grid(runs.stopped, one_sequence=one)
    calibration.refuse_unused(procedure, pool.cost is not None, options | {"cost": cost})
    tolerated = [
        _validate.tolerance(d, pool.lower, pool.upper) for d in _validate.numbers(deltas, "deltas")
    ]
    heldout = _splits(len(pool.losses), n_trials, calibration_fraction, seed)
    plain = (
        procedure in ("fixed_sequence", "bonferroni", *_SELECT)
        and not options
        and pool.ordered(procedure)
    )
    if plain:
        chosen, loss = _decide(pool, tolerated, heldout, test, procedure, level)
    else:
        settings = {
            "objective": objective,
            "test": test,
            "procedure": procedure,
            "cost": cost,
            "epsilon": level,
        }
        chosen, loss = _calibrate_each(runs, pool, tolerated, heldout, settings | options)
    return _trial_table(pool, tolerated, chosen, loss, heldout)


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
    measured = [
        name
        for name in ("calibration_loss", "heldout_loss", *records.COSTS)
        if name in trials.columns
    ]
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


def compare(
    runs: Runs,
    deltas: ArrayLike,
    *,
    tests: Sequence[str] = ("betting", "convex_order", "hoeffding_bentkus"),
    procedures: Sequence[str] | None = None,
    epsilon: float = 0.05,
    objective: str = "textual",
    **options: Any,
) -> pd.DataFrame:
    """What each test and procedure would certify on a pilot sample, side by side. Never returns a policy.

    Choosing between tests, procedures or deltas by their outcome is a look at the data that no epsilon covers. So give this
    function prompts that you will not calibrate on, and calibrate with the choice on the others:

    >>> pilot, rest = riskcal.split_pilot(runs, 0.2)
    >>> riskcal.compare(pilot, deltas=[0.05, 0.1])
    >>> riskcal.calibrate(rest, delta=0.1, test="betting", procedure="holm")

    Parameters
    ----------
    runs : Runs
        The pilot sample.
    deltas : float or sequence of float
    tests : sequence of str
        Names of tests, as in `riskcal.calibrate`.
    procedures : sequence of str, optional
        Names of procedures; the default is those that need no further argument: ``"holm"``, ``"bonferroni"`` and, with one
        coordinate, ``"fixed_sequence"``.
    epsilon, objective, **options
        As in `riskcal.calibrate`; options such as ``order`` or ``weights`` go to the procedures that use them.

    Returns
    -------
    DataFrame
        One row per delta, test and procedure: the ``threshold`` chosen (``inf`` if none) and any further coordinate,
        ``certified`` (the share of the k candidates that were), the mean ``loss`` and costs of the chosen candidate, and the
        full model's costs. A pilot is smaller than the calibration set, so expect less than it will certify.
    """
    procedures = procedures or (
        _ONE_COORDINATE if records.only_threshold(runs.candidates) else ("holm", "bonferroni")
    )
    rows = []
    for delta in _validate.numbers(deltas, "deltas"):
        for test in tests:
            for procedure in procedures:
                given = {
                    name: value
                    for name, value in options.items()
                    if _uses(procedure, name, procedures)
                }
                given |= {
                    "epsilon": epsilon,
                    "objective": objective,
                    "test": test,
                    "procedure": procedure,
                }
                rows.append(
                    {"delta": delta, "test": test, "procedure": procedure}
                    | _outcome(runs, delta, given)
                )
    return pd.DataFrame(rows)


_ONE_COORDINATE = ("fixed_sequence", "holm", "bonferroni")


def _uses(procedure: str, option: str, procedures: Sequence[str]) -> bool:
    """Whether a procedure is given an option; one that none of them uses goes to all, to be refused."""
    users = calibration.USED_BY.get(option, (None, (procedure,)))[1]
    return procedure in users or not set(users) & set(procedures)


def split_pilot(runs: Runs, fraction: float = 0.2) -> tuple[Runs, Runs]:
    """Divide runs into a pilot sample, to explore and choose with, and the rest, to calibrate on.

    Parameters
    ----------
    runs : Runs
    fraction : float
        Share of the independent units (prompts, or clusters) in the pilot, rounded up.

    Returns
    -------
    pilot, rest : Runs
        No unit is in both. The pilot is the first units in the contract's pseudo-random order, which depends on their ids
        alone: the same for everyone, and no lucky split can be searched for.
    """
    share = _validate.level(fraction, "fraction")
    size = math.ceil(share * runs.n)
    if size < 2 or runs.n - size < 2:
        raise RiskcalError(
            f"fraction: {share:g} of {runs.n} units leaves {size} and {runs.n - size}; both need two."
        )
    units = np.arange(runs.n)
    return _of_units(runs, units[:size]), _of_units(runs, units[size:])


@dataclass(frozen=True, eq=False)
class _Pool:
    """All units in tested order, with what a trial needs of them."""

    losses: Floats  # (n, k)
    lower: float
    upper: float
    candidates: pd.DataFrame
    costs: dict[str, Floats]  # (n, k) each
    full_costs: dict[str, Floats]  # (n,) each
    cost: str | None  # what the choice among certified candidates minimises; None: the threshold

    def ordered(self, procedure: str) -> bool:
        """Whether the candidates' own order is the one to test in."""
        return procedure != "fixed_sequence" or self.cost is None

    def mapped(self, delta: float) -> float:
        """Delta on the unit interval."""
        return (delta - self.lower) / (self.upper - self.lower)


def _pool(runs: Runs, objective: str, cost: str) -> _Pool:
    if runs.source == "replayed" and not runs.exact:
        raise RiskcalError(
            "runs: they were replayed on the full model's path, which shows no real decoder's losses or savings. Record real "
            "generations, or declare a memoryless exit with replay_traces(..., exact=True)."
        )
    losses = runs.losses(objective)
    lower, upper = records.OBJECTIVES[objective]
    several = not records.only_threshold(runs.candidates)
    if several and cost not in runs.values:
        raise RiskcalError(
            f"cost: {cost!r} was not recorded; choosing among several coordinates needs it."
        )
    return _Pool(
        losses=losses,
        lower=lower,
        upper=upper,
        candidates=runs.candidates[list(dict.fromkeys(["threshold", *runs.coordinates]))],
        costs={
            name: runs.unit_means(runs.values[name])
            for name in records.COSTS
            if name in runs.values
        },
        full_costs={
            name: runs.unit_means(runs.full[name]) for name in records.COSTS if name in runs.full
        },
        cost=cost if several else None,
    )


def _splits(n: int, n_trials: int, fraction: float, seed: int) -> NDArray[np.intp]:
    """Row numbers to hold out, (n_trials, n - m), where m are calibrated on."""
    share = _validate.level(fraction, "calibration_fraction")
    size = round(share * n)
    if size < 2 or size == n:
        raise RiskcalError(
            f"calibration_fraction: {share:g} of {n} units leaves {size} to calibrate on and {n - size} to hold out; "
            "at least two and one are needed."
        )
    keys = np.random.default_rng(_validate.count(seed, "seed", least=0)).random((n_trials, n))
    return np.argpartition(keys, n - size, axis=1)[:, : n - size]


def _kept(heldout: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """Row numbers to calibrate on, (n_trials, m), ascending: in tested order."""
    mask = np.ones((len(heldout), n), dtype=bool)
    np.put_along_axis(mask, heldout, False, axis=1)
    return np.nonzero(mask)[1].reshape(len(heldout), -1)


def _decide(
    pool: _Pool,
    deltas: list[float],
    heldout: NDArray[np.intp],
    test: str,
    procedure: str,
    epsilon: float,
) -> tuple[NDArray[np.intp], Floats]:
    """Chosen candidate (D, T), -1 if none, and its mean loss on the calibration units, without building calibrations."""
    n, k = pool.losses.shape
    n_trials, m = len(heldout), n - heldout.shape[1]
    heldout_mask = np.zeros((n_trials, n), dtype=_exact_type(pool.losses))
    np.put_along_axis(heldout_mask, heldout, 1.0, axis=1)
    totals = _kept_totals(pool.losses, heldout_mask)
    spending = pool.candidates["threshold"].to_numpy(dtype=np.float64)
    if pool.cost is not None:
        spending = _kept_totals(pool.costs[pool.cost], heldout_mask.astype(np.float64, copy=False))
    level = epsilon if procedure == "fixed_sequence" else epsilon / k
    chosen = np.empty((len(deltas), n_trials), dtype=np.intp)
    if test == "betting" and procedure == "fixed_sequence":
        count = _bet_in_sequence(pool, deltas, _kept(heldout, n), level)
        chosen[:] = [_cheapest(np.arange(k) < of_delta[:, None], spending) for of_delta in count]
    else:
        for d, delta in enumerate(deltas):
            if test in pvalues.OF_SUMS:
                p = _pvalues_of_totals(pool, test, totals, m, delta)
            else:
                p = np.array(
                    [_pvalues(pool, test, rows, delta, level) for rows in _kept(heldout, n)]
                )
            chosen[d] = _cheapest(_select(p, procedure, epsilon), spending)
    loss = np.where(chosen < 0, 0.0, totals[np.arange(n_trials), chosen] / m)
    return chosen, loss


def _exact_type(losses: Floats) -> type[np.float32 | np.float64]:
    """Single precision where it sums exactly: whole losses, fewer than 2^24 of them."""
    whole = (
        len(losses) < 2**24
        and bool((np.abs(losses) <= 1.0).all())
        and bool((losses == np.rint(losses)).all())
    )
    return np.float32 if whole else np.float64


def _kept_totals(values: Floats, heldout_mask: NDArray[np.floating[Any]]) -> Floats:
    """Sum of each column over each trial's calibration units, (T, k): all trials in one matrix product."""
    heldout = heldout_mask @ values.astype(heldout_mask.dtype, copy=False)
    totals: Floats = values.sum(0) - heldout.astype(np.float64, copy=False)
    return totals


def _pvalues_of_totals(pool: _Pool, test: str, totals: Floats, m: int, delta: float) -> Floats:
    """P-values (T, k) of a sum-based test, for all trials and candidates at once."""
    if test == "binomial":
        if (pool.lower, pool.upper) != (0.0, 1.0):
            raise RiskcalError(
                "test: 'binomial' is for 0/1 losses, but these lie in [-1, 1]; use betting."
            )
        _validate.binary(pool.losses)
        totals = np.rint(totals)
    unit = (totals.ravel() - m * pool.lower) / (pool.upper - pool.lower)
    sums = pvalues.Sums(np.clip(unit, 0.0, m), m, pool.mapped(delta))
    return pvalues._finish(pvalues.OF_SUMS[test], sums).reshape(totals.shape)


def _pvalues(pool: _Pool, test: str, rows: NDArray[np.intp], delta: float, level: float) -> Floats:
    options = {"level": level} if test == "betting" else {}
    p = calibration.TESTS[test](
        pool.losses[rows], delta, lower=pool.lower, upper=pool.upper, **options
    )
    return np.atleast_1d(p)


def _bet_in_sequence(
    pool: _Pool, deltas: list[float], kept: NDArray[np.intp], level: float
) -> NDArray[np.int64]:
    """Certified candidates (D, T) of the betting fixed sequence, each split's walk ending at its first failure."""
    from riskcal import _kernels

    return _kernels.count_certified(
        np.ascontiguousarray(pool.losses.T),
        kept,
        np.array(deltas),
        lower=pool.lower,
        upper=pool.upper,
        level=level,
        priors=np.array([_prior_variance(pool, delta) for delta in deltas]),
    )


def _prior_variance(pool: _Pool, delta: float) -> float:
    """What `riskcal.pvalues.betting` starts from."""
    share = 0.05 if pool.lower < 0.0 < pool.upper else 1.0
    return float(max((delta - pool.lower) * (pool.upper - delta) * share, _TINY**0.5))


def _select(p: Floats, procedure: str, epsilon: float) -> NDArray[np.bool_]:
    """Certified candidates (T, k)."""
    certified: NDArray[np.bool_]
    if procedure == "fixed_sequence":
        certified = np.logical_and.accumulate(p <= epsilon, axis=1)
    elif procedure == "bonferroni":
        certified = p <= epsilon / p.shape[1]
    else:
        certified = np.array([_SELECT[procedure](row, epsilon) for row in p])
    return certified


def _cheapest(certified: NDArray[np.bool_], spending: Floats) -> NDArray[np.intp]:
    """The certified candidate of least spending (T, k) or (k,), in each trial; -1 if there is none."""
    return np.where(certified.any(1), np.where(certified, spending, math.inf).argmin(1), -1)


def _calibrate_each(
    runs: Runs,
    pool: _Pool,
    deltas: list[float],
    heldout: NDArray[np.intp],
    settings: dict[str, Any],
) -> tuple[NDArray[np.intp], Floats]:
    """As `_decide`, through `calibrate` itself: for every procedure and option that it knows."""
    chosen = np.full((len(deltas), len(heldout)), -1, dtype=np.intp)
    loss = np.zeros(chosen.shape)
    for t, units in enumerate(_kept(heldout, len(pool.losses))):
        split = _of_units(runs, units)
        for d, delta in enumerate(deltas):
            best = calibration.calibrate(split, delta=delta, **settings).chosen
            if best is not None:
                alike = pool.candidates.eq(best) | (pool.candidates.isna() & best.isna())
                chosen[d, t] = int(alike[pool.candidates.columns].all(axis=1).to_numpy().argmax())
                loss[d, t] = best["loss"]
    return chosen, loss


def _trial_table(
    pool: _Pool,
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
    for name in pool.candidates.columns:
        column = pool.candidates[name].to_numpy()[which]
        columns[name] = np.where(
            some, column, math.inf if name == "threshold" else _missing(column)
        )
    columns["certified"] = some
    columns["calibration_loss"] = loss.ravel()
    columns["heldout_loss"] = np.where(some, _heldout_means(pool.losses, chosen, heldout), 0.0)
    full = {name: cost[heldout].mean(1) for name, cost in pool.full_costs.items()}
    for name, cost in pool.costs.items():
        reference = np.tile(full.get(name, np.full(n_trials, math.nan)), len(deltas))
        columns[name] = np.where(some, _heldout_means(cost, chosen, heldout), reference)
    columns |= {f"full_{name}": np.tile(mean, len(deltas)) for name, mean in full.items()}
    return pd.DataFrame(columns).sort_values(["trial", "delta"], kind="stable", ignore_index=True)


def _heldout_means(values: Floats, chosen: NDArray[np.intp], heldout: NDArray[np.intp]) -> Floats:
    """Mean over each trial's held-out units at its chosen candidate, (D * T,)."""
    return np.concatenate([values[heldout, of_delta[:, None]].mean(1) for of_delta in chosen])


def _missing(column: NDArray[Any]) -> Any:
    return math.nan if column.dtype.kind in "fiu" else None


def _of_units(runs: Runs, units: NDArray[np.intp]) -> Runs:
    """The runs of some of the independent units, given by their rows in tested order."""
    if "cluster" in runs.labels:
        kept = np.flatnonzero(np.isin(runs.labels["cluster"], runs.units[units]))
    else:
        kept = units
    return replace(
        runs,
        prompts=runs.prompts[kept],
        values={name: value[kept] for name, value in runs.values.items()},
        full={name: value[kept] for name, value in runs.full.items()},
        full_risk=None if runs.full_risk is None else runs.full_risk[kept],
        labels={name: label[kept] for name, label in runs.labels.items()},
    )


def _outcome(runs: Runs, delta: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """One row of `compare`: what a calibration would choose, without the calibration itself."""
    result = calibration.calibrate(runs, delta=delta, **settings)
    row: dict[str, Any] = {"threshold": math.inf}
    if result.chosen is not None:
        row |= {
            name: result.chosen[name] for name in dict.fromkeys(["threshold", *runs.coordinates])
        }
    row["certified"] = float(result.table["certified"].sum()) / runs.k
    row["loss"] = 0.0 if result.chosen is None else float(result.chosen["loss"])
    for name in records.COSTS:
        if name in runs.values:
            row[name] = (
                result.full_costs.get(name, math.nan)
                if result.chosen is None
                else float(result.chosen[name])
            )
    return row | {f"full_{name}": mean for name, mean in result.full_costs.items()}
