"""`calibrate_groups`: a guarantee for each stratum."""

import inspect
from functools import partial
from typing import Any

import numpy as np

from riskcal import _validate, fwer
from riskcal._validate import RiskcalError
from riskcal.calibration.calibrate import Question, answer, ask, calibrate, told
from riskcal.calibration.posing import require_runs, warn_of_sizes
from riskcal.calibration.result import Calibration
from riskcal.calibration.settling import settled, table_of
from riskcal.fwer import procedures
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
    return {
        name: of_stratum(stratum, delta=delta, epsilon=share, **options)
        for name, stratum in strata.items()
    }


def of_stratum(runs: Any, **options: Any) -> Any:
    """What `calibrate` gives; the full model where there are too few units for the test."""
    given = inspect.signature(calibrate).bind(runs, **options)
    given.apply_defaults()
    asked = ask(**given.arguments)
    return _too_few(asked) if _small(asked) else answer(asked)


def _small(asked: Question) -> bool:
    """Whether a stratum has too few units for the test that was asked for."""
    if isinstance(asked.rule, fwer.PilotOrder):
        return procedures.pilot_size(asked.problem.n, asked.rule.pilot_fraction) is None
    return asked.problem.n < 2


def _too_few(asked: Question) -> Any:
    """The full model: what `calibrate` makes of a stratum that is too small for any test."""
    whole, rule = asked.problem, asked.rule
    remedy = (
        f"{whole.n} {whole.unit} are too few for a test: record more of this group, or fix beforehand that it is pooled with "
        "another."
    )
    known = {"outlook": partial(str, remedy), "test": asked.method.name, **asked.epsilons}
    if rule is not None:
        table = table_of(whole, pvalue=1.0, certified=False)
        return settled(whole, table, asked.cost, **told(rule), **known)
    known |= {"procedure": "simultaneous", "deltas": asked.deltas}
    table = table_of(whole, bound=whole.risks[0].upper, certified=False)
    return [settled(whole.at(delta), table, asked.cost, **known) for delta in asked.deltas]
