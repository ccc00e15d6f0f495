"""`calibrate_groups`: a guarantee for each stratum."""

from functools import partial
from typing import Any

import numpy as np

from riskcal import _validate, fwer
from riskcal._validate import RiskcalError
from riskcal.calibration.calibrate import (
    calibrate,
    listed,
    procedure_for,
    refuse_for_list,
)
from riskcal.calibration.posing import pose, require_runs, warn_of_sizes
from riskcal.calibration.problem import refuse_unknown_cost
from riskcal.calibration.result import Calibration
from riskcal.calibration.settling import settled, table_of
from riskcal.fwer import procedures
from riskcal.pvalues import methods
from riskcal.records import Runs


def calibrate_groups(
    runs: Runs, *, delta: Any, epsilon: float = 0.05, joint: bool = True, **options: Any
) -> dict[str, Calibration]:  # or lists of them
    """Calibrate each stratum (the ``group`` of its prompts) on its own, so that each gets its own guarantee.

    Parameters
    ----------
    runs : Runs
        With a ``group`` for every prompt.
    delta, **options
        As in `calibrate`.
    epsilon : float
        With ``joint`` the probability that any stratum's certificate is false (each gets an equal share); without it, the
        probability for each stratum by itself, so that of G strata up to ``G epsilon`` may fail.
    joint : bool
        Whether epsilon is shared among the strata.

    Returns
    -------
    dict of group to Calibration, or to a list of them where ``delta`` is a list
        A stratum with too few prompts for a test gets the full model, and does not stand in the way of the others. The
        pooled `calibrate` says nothing of single strata: an easy majority can carry a stratum far above delta.

    Raises
    ------
    RiskcalError
        For what `calibrate` refuses, runs without groups, and a proxy.

    Examples
    --------
    >>> runs = riskcal.Runs.from_arrays(
    ...     thresholds=[0.9, 0.5],
    ...     prompts=np.arange(400),
    ...     group=np.repeat(["chat", "code"], 200),
    ...     dissimilarity=np.repeat([[0.0, 0.02], [0.01, 0.4]], 200, axis=0),
    ... )
    >>> {name: one.threshold for name, one in riskcal.calibrate_groups(runs, delta=0.1).items()}
    {'chat': 0.5, 'code': 0.9}
    """
    require_runs(runs)
    if options.get("proxy") is not None or options.get("unlabelled") is not None:
        raise RiskcalError(
            "proxy: unlabelled requests have no groups here; calibrate each group by itself, with its own unlabelled requests "
            "and its share of epsilon: calibrate(runs.of_group(name), ...)."
        )
    groups = np.unique(runs.group)
    strata = {str(name): runs.of_group(name) for name in groups}
    share = _validate.level(epsilon, "epsilon") / (
        len(groups) if _validate.truth(joint, "joint") else 1
    )
    if (
        options.get("weighting") is None
        and "cluster" in runs.labels
        and options.get("max_cluster") is None
    ):
        if any(len(np.unique(stratum.unit_sizes)) > 1 for stratum in strata.values()):
            warn_of_sizes(runs)
        options = options | {"weighting": "clusters"}  # said for all strata at once
    found = {}
    for name, stratum in strata.items():
        found[name] = (_too_few if _small(stratum, options) else calibrate)(
            stratum, delta=delta, epsilon=share, **options
        )
    return found


#: Arguments of `calibrate` that say which problem is meant, beside those named in `_too_few`.
_POSED = (
    "thresholds",
    "lower",
    "upper",
    "prompts",
    "exact",
    "costs",
    "budget",
    "lower_is_stricter",
)


def _small(runs: Runs, options: dict[str, Any]) -> bool:
    """Whether a stratum has too few units for the test that these options ask for."""
    if runs.n < 2:
        return True
    procedure = options.get("procedure")
    given = {name: value for name, value in options.items() if name == "pilot_fraction"}
    if isinstance(procedure, str) and procedure in ("pilot_order", "pareto"):
        procedure = procedures.named(procedure, **given)
    if not isinstance(procedure, fwer.PilotOrder):
        return False
    return procedures.pilot_size(runs.n, procedure.pilot_fraction) is None


def _too_few(
    runs: Runs,
    *,
    delta: Any,
    epsilon: float,
    objective: str = "textual",
    test: Any = "betting",
    procedure: Any = None,
    attempt: int | None = None,
    cost: str = "layers",
    weighting: str | None = None,
    max_cluster: int | None = None,
    **options: Any,
) -> Any:
    """What `calibrate` makes of these arguments for a stratum that is too small for any test: the full model."""
    method = methods.named(test)
    deltas, several_deltas = listed(delta)
    posed = {name: options.pop(name) for name in _POSED if name in options}
    results = []
    for one in deltas:
        problem = pose(runs, one, objective, weighting, max_cluster, **posed)
        name, starts, chosen = "simultaneous", 1, None
        if several_deltas:
            refuse_for_list(problem, procedure, options)
        else:
            chosen = procedure_for(problem, procedure, options)
            name, starts = chosen.name, getattr(chosen, "starts", 1)
        refuse_unknown_cost(problem, cost)
        unproven = {"pvalue": 1.0}
        if several_deltas:
            unproven = {"bound": max(risk.upper for risk in problem.risks)}
        remedy = (
            f"{problem.n} {problem.unit} are too few for a test: record more of this group, or fix beforehand that it is "
            "pooled with another."
        )
        results.append(
            settled(
                problem,
                table_of(problem, **unproven, certified=False),
                cost,
                outlook=partial(str, remedy),
                epsilon=epsilon,
                epsilon_spent=procedures.spent_by_attempt(epsilon, attempt),
                attempt=attempt,
                test=method.name,
                procedure=name,
                starts=starts,
                options={} if chosen is None else chosen.options,
                deltas=deltas if several_deltas else None,
            )
        )
    return results if several_deltas else results[0]
