"""`compare`: what each test and procedure would certify on a pilot sample."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate, fwer, records
from riskcal._validate import RiskcalError
from riskcal.calibration.calibrate import calibrate
from riskcal.calibration.posing import require_runs
from riskcal.fwer import Procedure
from riskcal.fwer.procedures import options_of, pilot_size
from riskcal.pvalues import Method
from riskcal.records import Runs


def compare(
    runs: Runs,
    deltas: ArrayLike,
    *,
    tests: Sequence[str | Method] = ("betting", "convex_order", "hoeffding_bentkus"),
    procedures: Sequence[str | Procedure] | None = None,
    epsilon: float = 0.05,
    objective: str = "textual",
    **options: Any,
) -> pd.DataFrame:
    """What each test and procedure would certify on a pilot sample, side by side. Never returns a policy.

    Choosing between tests, procedures or deltas by their outcome is a look at the data that no epsilon covers. So give this
    function prompts that you will not calibrate on, and calibrate with the choice on the others.

    Parameters
    ----------
    runs : Runs
        The pilot sample.
    deltas : float or sequence of float
    tests : sequence of str or `riskcal.pvalues.Method`
        As in `riskcal.calibrate`.
    procedures : sequence of str or `riskcal.fwer.Procedure`, optional
        As in `riskcal.calibrate`; the default is those that need no further argument: ``"holm"``, ``"bonferroni"`` and, with one
        coordinate, ``"fixed_sequence"``.
    epsilon, objective, **options
        As in `riskcal.calibrate`; options such as ``order`` or ``weights`` go to the procedures that use them.

    Returns
    -------
    DataFrame
        One row per delta, test and procedure: the ``threshold`` chosen (``inf`` if none) and any further coordinate,
        ``certified`` (the share of the k candidates that were), the mean ``loss`` and costs of the chosen candidate, and the
        full model's costs. A pilot is smaller than the calibration set, so expect less than it will certify.

    Examples
    --------
    >>> pilot, rest = riskcal.split_pilot(riskcal.load_example("g2p"), 0.2)
    >>> table = riskcal.compare(pilot, deltas=[0.1], procedures=["fixed_sequence"])
    >>> dict(zip(table["test"], table["threshold"]))
    {'betting': 0.5, 'convex_order': 0.55, 'hoeffding_bentkus': 0.55}
    >>> riskcal.calibrate(rest, delta=0.1, test="betting").threshold
    0.5
    """
    require_runs(runs)
    procedures = procedures or (
        _ONE_COORDINATE if records.only_threshold(runs.candidates) else ("holm", "bonferroni")
    )
    rows = []
    for delta in _validate.numbers(deltas, "deltas"):
        for test in tests:
            for procedure in procedures:
                given = {n: v for n, v in options.items() if _uses(procedure, n, procedures)}
                given |= {"epsilon": epsilon, "objective": objective}
                given |= {"test": test, "procedure": procedure}
                row = {"delta": delta, "test": _name(test), "procedure": _name(procedure)}
                rows.append(row | _outcome(runs, delta, given))
    return pd.DataFrame(rows)


_ONE_COORDINATE = ("fixed_sequence", "holm", "bonferroni")


def _name(choice: Any) -> Any:
    return getattr(choice, "name", choice)


def _uses(procedure: Any, option: str, procedures: Sequence[Any]) -> bool:
    """Whether a procedure is given an option; one that none of them uses goes to all, to be refused."""
    users = [name for name in fwer.BY_NAME if option in options_of(name)]
    by_name = [name for name in procedures if isinstance(name, str)]
    return not users or procedure in users or not set(users) & set(by_name)


def _outcome(runs: Runs, delta: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """One row of `compare`: what a calibration would choose, without the calibration itself."""
    result = calibrate(runs, delta=delta, **settings)
    row: dict[str, Any] = {"threshold": math.inf}
    if result.chosen is not None:
        row |= {
            name: result.chosen[name] for name in dict.fromkeys(["threshold", *runs.coordinates])
        }
    row["certified"] = float(result.table["certified"].sum()) / runs.k
    for name in result.table.columns:
        # several risks have one each; a budget's is the mean cost
        if name == "loss" or name.startswith("loss_"):
            full = result.full_costs.get(name.removeprefix("loss_"), 0.0)
            row[name] = full if result.chosen is None else float(result.chosen[name])
    for name in runs.costs:
        row[name] = (
            result.full_costs.get(name, math.nan)
            if result.chosen is None
            else float(result.chosen[name])
        )
    return row | {f"full_{name}": mean for name, mean in result.full_costs.items()}


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

    Examples
    --------
    >>> pilot, rest = riskcal.split_pilot(riskcal.load_example("g2p"), 0.2)
    >>> pilot.n, rest.n
    (600, 2400)
    """
    require_runs(runs)
    share = _validate.level(fraction, "fraction")
    size = pilot_size(runs.n, share)
    if size is None:
        size = math.ceil(share * runs.n)
        raise RiskcalError(
            f"fraction: {share:g} of {runs.n} units leaves {size} and {runs.n - size}; both need two."
        )
    units = np.arange(runs.n)
    return of_units(runs, units[:size]), of_units(runs, units[size:])


def of_units(runs: Runs, units: NDArray[np.intp]) -> Runs:
    """The runs of some of the independent units, given by their rows in tested order."""
    if "cluster" not in runs.labels:
        return runs.take(units)
    return runs.take(np.flatnonzero(np.isin(runs.labels["cluster"], runs.units[units])))
