"""`calibrate`: from records to the cheapest candidate whose expected loss is certified, or to the full model."""

import hashlib
import html
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _problem, _validate, bounds, fwer, monotone, planning, pvalues, records
from riskcal._problem import Problem, Risk
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import COLUMNS, DEFAULTS, Certificate, ExitPolicy, Stop, ids_digest, versions
from riskcal.records import Runs
from riskcal.schedules import Decaying

TESTS: dict[str, Callable[..., Any]] = {
    "betting": pvalues.betting,
    "convex_order": pvalues.convex_order,
    "hoeffding_bentkus": pvalues.hoeffding_bentkus,
    "bentkus": pvalues.bentkus,
    "hoeffding": pvalues.hoeffding,
    "empirical_bernstein": pvalues.empirical_bernstein,
    "binomial": pvalues.binomial,
}
PROCEDURES = (
    "fixed_sequence",
    "holm",
    "bonferroni",
    "hochberg",
    "fallback",
    "graphical",
    "pilot_order",
    "pareto",
)
#: Procedures that make their order from a pilot split of their own.
PILOTS = ("pilot_order", "pareto")
#: Procedures that walk down a sequence.
_SEQUENCES = ("fixed_sequence", *PILOTS)
#: Options that only some procedures use, with what they are when not given.
USED_BY: dict[str, tuple[Any, tuple[str, ...]]] = {
    "starts": (1, ("fixed_sequence",)),
    "order": (None, ("fixed_sequence", "fallback", "graphical")),
    "weights": (None, ("fallback", "graphical")),
    "transitions": (None, ("graphical",)),
    "pilot_fraction": (0.1, ("pilot_order", "pareto")),
}
#: Fields of `ExitPolicy` that a column of their name fills; the other fields have a structure, or are what calibration finds.
_OF_EXITS = ("cache", "max_pending", "emits", "batching")
_OF_MODELS = ("max_new_tokens", "n_layers", "weights", "classifier_weights", "dtype", "tokenizer")
#: What a certified mean is taken over, where that is not plain.
_OVER = {
    "prompts": "",
    "clusters": ", as the mean over clusters, each cluster counting alike whatever its size",
    "requests": ", as the mean over requests",
}
_MEANING = {
    "textual": "dissimilarity to the full model's output",
    "risk": "increase in risk over the full model",
    "risk_clipped": "increase in risk over the full model (improvements counted as 0)",
    "losses": "loss",
}


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What was tested, what was certified, and the candidate to deploy.

    Attributes
    ----------
    threshold : float
        The chosen candidate's threshold; ``inf``, the full model, if nothing was certified.
    certified : bool
        Whether any candidate was.
    chosen : Series or None
        The certified candidate of least cost (with one coordinate, of the lowest threshold): its row of ``table``.
    table : DataFrame
        One row per tested candidate in tested order: coordinates, ``n``, mean ``loss`` (with several risks one column
        each, ``loss_textual`` and so on), ``pvalue`` (for a list of deltas the upper ``bound``), ``certified``, mean costs.
    full_costs : dict
        Mean costs of the full model, where recorded, over the same units as those of ``table``.
    message : str
        The outcome in plain words; if nothing was certified, what would help, such as the size of a fresh sample. That size
        is simulated where the message is first read, which takes up to a second or so.
    pilot : tuple
        Ids of the units that chose the order and were not tested; empty for an order fixed beforehand.
    weighting : {"prompts", "clusters", "requests"}
        What the certified mean is taken over; with clusters, each counts alike.
    max_cluster : int or None
        The bound on a cluster's requests that weighting by requests was given.
    preregistered : str or None
        Digest of the ``order``, ``weights`` and ``transitions`` that were given: nothing here can know when they were fixed,
        but whoever wrote them down before the data were seen can show that they are the same.
    stopped : Stop or None
        Why lower thresholds were never run; None if the recorded grid is whole.
    """

    threshold: float
    certified: bool
    chosen: pd.Series | None
    table: pd.DataFrame
    full_costs: dict[str, float]
    _told: Callable[[], str]
    delta: float | dict[str, float]
    epsilon: float
    epsilon_spent: float
    attempt: int | None
    objective: str
    test: str
    procedure: str
    starts: int
    n: int
    k: int
    lower: float
    upper: float
    records_digest: str
    pilot: tuple[Any, ...] = ()
    stopped: Stop | None = None
    preregistered: str | None = None
    weighting: _problem.Weighting = "prompts"
    max_cluster: int | None = None

    @cached_property
    def message(self) -> str:
        """The outcome in plain words."""
        return self._told()

    def policy(self, **fields: Any) -> ExitPolicy:
        """The policy to deploy, with its certificate.

        Parameters
        ----------
        **fields
            Fields of `ExitPolicy` that the records do not say (``max_new_tokens``; ``measure``, ``cache`` and ``batching`` of
            records from elsewhere; a decaying schedule's length, if the records have its temperature alone).

        Returns
        -------
        ExitPolicy
            With every coordinate that the records told candidates apart by, and nothing that they do not say. A candidate
            column of the name of a field (``cache``, ``emits``) fills that field; what has none stands in ``coordinates``.

        Raises
        ------
        RiskcalError
            If a field that is given is not what was recorded, or a column has the name of a field that one number or text
            cannot fill (``thresholds``, ``config``).
        """
        given = _recorded_policy(self.table, self.chosen, fields.get("schedule"))
        for name in ("threshold", "thresholds", "coordinates", "certificate"):
            if name in fields:
                raise RiskcalError(
                    f"{name}: is what was calibrated; leave it out, or write an ExitPolicy of your own."
                )
        for name, value in given.items():
            if fields.get(name, value) != value:
                raise RiskcalError(
                    f"{name}: {fields[name]!r} is not the recorded {value!r}; leave it out."
                )
        pvalue = (
            None
            if self.chosen is None or "pvalue" not in self.table.columns
            else float(self.chosen["pvalue"])
        )
        certificate = Certificate(
            delta=self.delta,
            epsilon=self.epsilon,
            epsilon_spent=self.epsilon_spent,
            attempt=self.attempt,
            objective=self.objective,
            lower=self.lower,
            upper=self.upper,
            test=self.test,
            procedure=self.procedure,
            starts=self.starts,
            n=self.n,
            k=self.k,
            pvalue=pvalue,
            records_digest=self.records_digest,
            pilot_n=len(self.pilot),
            pilot_digest=ids_digest(self.pilot) if self.pilot else None,
            stopped=self.stopped,
            preregistered=self.preregistered,
            weighting=self.weighting,
            max_cluster=self.max_cluster,
            versions=versions(),
        )
        return ExitPolicy(**(given | fields)).certified(certificate)

    @property
    def coordinates(self) -> list[str]:
        """What the candidates differ in: the threshold, and whatever else was varied."""
        names = list(self.table.columns[: self.table.columns.get_loc("n")])
        return records.varying(self.table[names])

    def plot(self, ax: Any = None) -> Any:
        """Mean loss against the threshold, with delta and the certified thresholds; returns the matplotlib axes.

        For one controlled loss, and candidates that differ in their thresholds alone.
        """
        from riskcal import plots

        if isinstance(self.delta, dict):
            raise RiskcalError(
                "plot: one curve needs one delta; plot the loss_... columns of the table instead."
            )
        if self.coordinates != ["threshold"]:
            raise RiskcalError(
                f"plot: candidates differ in {', '.join(self.coordinates)}, which one curve over thresholds cannot show; plot "
                "columns of calibration.table, where calibration.chosen is the row to mark."
            )
        return plots.risk_curve(self.table, delta=self.delta, threshold=self.threshold, ax=ax)

    def to_frame(self) -> pd.DataFrame:
        """A copy of ``table``."""
        return self.table.copy()

    def __repr__(self) -> str:
        head = f"Calibration: {self.objective}, delta {self.delta}, epsilon {self.epsilon:g}, {self.test}, {self.procedure}"
        return f"{head}\n{self.message}\n\n{self.table.to_string(index=False, float_format='{:.4g}'.format)}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.message)}</p>{self.table.to_html(index=False, float_format='{:.4g}'.format)}"


def calibrate(
    runs: Runs | ArrayLike,
    *,
    delta: Any,
    epsilon: float = 0.05,
    objective: str = "textual",
    test: str = "betting",
    procedure: str | None = None,
    starts: int = 1,
    attempt: int | None = None,
    order: Sequence[int] | None = None,
    cost: str = "layers",
    weights: ArrayLike | None = None,
    transitions: ArrayLike | None = None,
    pilot_fraction: float = 0.1,
    thresholds: ArrayLike | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    prompts: ArrayLike | None = None,
    exact: bool = False,
    weighting: str | None = None,
    max_cluster: int | None = None,
) -> Any:  # a Calibration; a list of them where delta is a list
    """Find the cheapest candidate whose expected loss is at most delta, with probability at least 1 - epsilon.

    Parameters
    ----------
    runs : Runs, or (n, k) array of losses
        Array rows are independent units (or tokens, with ``prompts``), columns are ``thresholds``.
    delta : float, mapping of objective to float, or list of float
        Tolerated expected loss, in the loss's own units. A mapping such as ``{"textual": 0.1, "risk": 0.02}`` controls
        several losses at once: a candidate's p-value is then the largest of theirs. A list is served by simultaneous
        bounds: all its calibrations hold together, so that one of the deltas may be chosen after looking.
    epsilon : float
        Probability, over the draw of the calibration prompts, that a false certificate is issued.
    objective : {"textual", "risk", "risk_clipped"}
        Which loss of the runs is tested (see `Runs.losses`); not used with arrays or a mapping of deltas.
    test : str
        ``"betting"`` (see the power table of the guarantee's page), ``"convex_order"``, ``"hoeffding_bentkus"``, ``"bentkus"``,
        ``"hoeffding"``, ``"empirical_bernstein"``, or ``"binomial"`` for 0/1 losses.
    procedure : str, optional
        ``"fixed_sequence"`` (default for one coordinate: from the highest threshold down), ``"holm"`` (default for
        several), ``"bonferroni"``, ``"hochberg"`` (needs positively dependent p-values), ``"fallback"``, ``"graphical"``,
        or a fixed sequence whose order a pilot split chooses: ``"pilot_order"`` (all candidates, by pilot risk) and
        ``"pareto"`` (those that none beats in risk and cost). With a list of deltas there is none.
    starts : int
        Evenly spaced starting points of ``"fixed_sequence"``.
    attempt : int, optional
        Which planned attempt this is, from 1; attempt j spends ``6 epsilon / (pi^2 j^2)``. The default, one attempt with
        all of epsilon, is right only if no second look follows, whatever its outcome.
    order : sequence of int, optional
        Preregistered order of the rows of ``runs.candidates``; needed for ``"fixed_sequence"`` over several coordinates.
    cost : str
        Recorded cost that the choice among certified candidates of several coordinates minimises.
    weights, transitions : (k,), (k, k), optional
        For ``"fallback"`` and ``"graphical"``: see `riskcal.fwer`; in tested order. Default weights are equal.
    pilot_fraction : float
        Share of the units that ``"pilot_order"`` and ``"pareto"`` set aside to choose the order; they are not tested.
    thresholds, lower, upper : optional
        For arrays: one threshold per column, and the losses' known bounds.
    prompts : (n,), optional
        For arrays: the prompt that each row belongs to; rows are averaged within it.
    exact : bool
        For arrays that `riskcal.replay_arrays` made with several rows per prompt: declares that the exit has no memory, as
        ``replay_traces(..., exact=True)`` does for Runs.
    weighting : {"clusters", "requests"}, optional
        For runs with clusters: whether each cluster counts alike (the default, with a warning where their sizes differ) or
        each of its prompts. The second certifies ``E[sum of a cluster's losses] / E[its size]``, the mean over requests.
    max_cluster : int, optional
        With ``weighting="requests"``: the most prompts that a cluster may have, fixed before the data were seen.

    Returns
    -------
    Calibration, or a list of them where ``delta`` is a list

    Raises
    ------
    RiskcalError
        For invalid input, options that the procedure does not use, replayed runs that are not exact, token rows without
        ``prompts``, and any procedure but a fixed sequence from the highest threshold down for runs that were ``stopped``.

    Notes
    -----
    Assumes i.i.d. units from the population that will be served, candidates and order fixed before the data were seen, and
    bounded losses. Prompts are tested in a pseudo-random order that depends on their ids alone, never in the order they
    stand in. Rows without ids (arrays without ``prompts``, and ids that only number the rows) are tested in an order drawn
    from the content of all of them (`riskcal.records.content_order`), and if a candidate's losses have only two values its
    betting p-value is never below the exact one of their count, so that sorting the rows by outcome does no harm. Nothing
    is said about a single prompt or a stratum. With ``u = delta + sum of (loss - delta) over a cluster / max_cluster``,
    which has the losses' bounds, the mean of u is at most delta exactly where the mean over requests is: that is what
    ``weighting="requests"`` tests. Sources: Learn then Test (Angelopoulos et al. 2021), CALM (Schuster et al. 2022), Pareto
    Testing (Laufer-Goldshtein et al. 2023).
    """
    epsilon = _validate.level(epsilon, "epsilon")
    _validate.choice(test, "test", TESTS)
    several_deltas = not isinstance(delta, Mapping) and _validate.several(delta, "delta")
    deltas = _validate.numbers(delta, "delta") if several_deltas else [delta]
    given: dict[str, Any] = {
        "thresholds": thresholds,
        "lower": lower,
        "upper": upper,
        "prompts": prompts,
        "exact": exact,
    }
    problem = _pose(runs, deltas[0], objective, weighting, max_cluster, **given)
    if several_deltas:
        _refuse_list(problem, procedure)
    spent = _spent(epsilon, attempt)
    common: dict[str, Any] = {
        "epsilon": epsilon,
        "epsilon_spent": spent,
        "attempt": attempt,
        "test": test,
    }
    starts = _validate.count(starts, "starts", least=1)
    plain = not several_deltas and procedure in (None, "fixed_sequence") and not problem.several
    refuse_cut_grid(problem.stopped, one_sequence=plain and order is None and starts == 1)
    options = {
        "starts": starts,
        "order": order,
        "weights": weights,
        "transitions": transitions,
        "pilot_fraction": pilot_fraction,
        "cost": cost,
    }
    if several_deltas:
        refuse_unused(None, problem.several, options)
        return _simultaneous(problem, deltas, cost, common)
    procedure = procedure or ("holm" if problem.several else "fixed_sequence")
    _validate.choice(procedure, "procedure", PROCEDURES)
    if problem.several and procedure == "fixed_sequence" and order is None:
        raise RiskcalError(
            "order: candidates differ in several coordinates, so a fixed sequence needs a preregistered order= (row "
            "numbers of runs.candidates), fixed before the data were seen; or use procedure='holm'."
        )
    refuse_unused(procedure, problem.several, options)
    whole = problem
    problem, pilot = _ordered(problem, procedure, order, cost, pilot_fraction)
    weights = np.full(problem.k, 1 / problem.k) if weights is None else weights
    levels = _levels(procedure, spent, problem.k, starts, weights, transitions)
    p = np.max([_test(test, risk, levels, problem.nameless) for risk in problem.risks], axis=0)
    rejected = _select(procedure, p, spent, starts, weights, transitions)
    table = _table(problem).assign(pvalue=p, certified=rejected)
    if pilot:  # a fresh sample has its own pilot, which may choose any candidate first; of equal ones the cheapest
        ties = (
            np.argsort(_problem.mean_cost(whole, cost), kind="stable")
            if procedure == "pareto"
            else np.arange(whole.k)
        )
        whole, levels = whole.columns(ties), np.full(whole.k, spent)
    else:
        whole = problem
    design = planning.Design.of(
        test,
        procedure,
        spent,
        levels,
        starts=starts,
        weights=weights,
        pilot_fraction=pilot_fraction,
    )
    outlook = partial(planning.outlook, whole, design, _MEANING)
    found: dict[str, Any] = {
        "procedure": procedure,
        "starts": starts,
        "outlook": outlook,
        "pilot": pilot,
    }
    result = _result(problem, table, cost, rises=_rises(problem), **found, **common)
    return replace(result, preregistered=_preregistered(options))


def calibrate_groups(
    runs: Runs, *, delta: float, epsilon: float = 0.05, joint: bool = True, **options: Any
) -> dict[str, Calibration]:
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
    dict of group to Calibration
        A stratum with too few prompts for a test gets the full model, and does not stand in the way of the others. The
        pooled `calibrate` says nothing of single strata: an easy majority can carry a stratum far above delta.
    """
    require_runs(runs)
    groups = np.unique(runs.group)
    strata = {str(name): runs.of_group(name) for name in groups}
    share = _validate.level(epsilon, "epsilon") / (len(groups) if joint else 1)
    if (
        options.get("weighting") is None
        and "cluster" in runs.labels
        and options.get("max_cluster") is None
    ):
        if any(len(np.unique(stratum.unit_sizes)) > 1 for stratum in strata.values()):
            _problem.warn_of_sizes(runs, stacklevel=3)
        options = options | {"weighting": "clusters"}  # said for all strata at once
    found = {}
    for name, stratum in strata.items():
        few = stratum.n < 2 or (
            options.get("procedure") in PILOTS
            and not _problem.pilot_fits(stratum.n, options.get("pilot_fraction", 0.1))
        )
        found[name] = (_too_few if few else calibrate)(
            stratum, delta=delta, epsilon=share, **options
        )
    return found


def _too_few(runs: Runs, **options: Any) -> Any:
    """What `calibrate` makes of these options for a stratum that is too small for any test: the full model."""
    given = inspect.signature(calibrate).bind(runs, **options)
    given.apply_defaults()
    asked = given.arguments
    _validate.choice(asked["test"], "test", TESTS)
    _validate.count(asked["starts"], "starts", least=1)
    delta = asked["delta"]
    several_deltas = not isinstance(delta, Mapping) and _validate.several(delta, "delta")
    deltas = _validate.numbers(delta, "delta") if several_deltas else [delta]
    arrays = {name: asked[name] for name in ("thresholds", "lower", "upper", "prompts", "exact")}
    results = []
    for one in deltas:
        problem = _pose(
            runs, one, asked["objective"], asked["weighting"], asked["max_cluster"], **arrays
        )
        if several_deltas:
            _refuse_list(problem, asked["procedure"])
        procedure = asked["procedure"] or ("holm" if problem.several else "fixed_sequence")
        _validate.choice(procedure, "procedure", PROCEDURES)
        refuse_unused(None if several_deltas else procedure, problem.several, asked)
        unproven = (
            {"bound": max(risk.upper for risk in problem.risks)}
            if several_deltas
            else {"pvalue": 1.0}
        )
        outlook = (
            f"{problem.n} {problem.unit} are too few for a test: record more of this group, or fix beforehand that it is "
            "pooled with another."
        )
        results.append(
            _result(
                problem,
                _table(problem).assign(**unproven, certified=False),
                asked["cost"],
                outlook=partial(str, outlook),
                pilot=(),
                rises="",
                epsilon=asked["epsilon"],
                epsilon_spent=_spent(asked["epsilon"], asked["attempt"]),
                attempt=asked["attempt"],
                test=asked["test"],
                procedure="simultaneous" if several_deltas else procedure,
                starts=asked["starts"],
            )
        )
    return results if several_deltas else results[0]


def require_runs(runs: Any) -> None:
    """Refuse what is no Runs where the prompts' groups, or costs, are needed."""
    if not isinstance(runs, Runs):
        raise RiskcalError(
            f"runs: give Runs, not {type(runs).__name__}; Runs.from_arrays makes them of matrices, Runs.from_frame of a table."
        )


def _spent(epsilon: float, attempt: Any) -> float:
    """What an attempt spends of epsilon; over all attempts that is epsilon."""
    return (
        epsilon
        if attempt is None
        else 6 * epsilon / (math.pi * _validate.count(attempt, "attempt", least=1)) ** 2
    )


def _refuse_list(problem: Problem, procedure: str | None) -> None:
    """Refuse what a list of deltas cannot be served with."""
    if problem.weighting == "requests":
        raise RiskcalError(
            "weighting: 'requests' is for one delta at a time, by which a cluster's losses are summed; give one."
        )
    if procedure is not None:
        raise RiskcalError(
            f"procedure: a list of deltas is served by simultaneous bounds, not by {procedure!r}."
        )


def refuse_cut_grid(stopped: Any, *, one_sequence: bool) -> None:
    """Refuse all but one fixed sequence from the top where a recording stopped: it ended by what the losses were."""
    if stopped is not None and not one_sequence:
        raise RiskcalError(
            "procedure: the recording stopped where a fixed sequence failed, so that which thresholds there are depends on "
            "the losses; only a fixed sequence from the highest threshold down, with one start, is sound on them."
        )


def refuse_unused(procedure: str | None, several: bool, options: Mapping[str, Any]) -> None:
    """Refuse an option that would change nothing; ``procedure=None`` are the simultaneous bounds of a list of deltas."""
    for name, (default, users) in USED_BY.items():
        value = options.get(name, default)
        plain = isinstance(
            value, str | bool | int | float | np.generic
        )  # what else compares as it likes
        if procedure not in users and (
            value is not None if default is None else not plain or value != default
        ):
            told = "a list of deltas" if procedure is None else f"procedure {procedure!r}"
            raise RiskcalError(
                f"{name}: {told} does not use it, only {' and '.join(users)}; leave it out."
            )
    cost = options.get("cost", "layers")
    if cost != "layers" and not several and procedure != "pareto":
        raise RiskcalError(
            f"cost: {cost!r} chooses among candidates of several coordinates; where only the threshold varies, the lowest "
            "certified one is chosen. Leave it out."
        )


def _pose(
    runs: Any,
    delta: Any,
    objective: str,
    weighting: str | None,
    max_cluster: int | None,
    **arrays: Any,
) -> Problem:
    _validate.choice(objective, "objective", records.OBJECTIVES)
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
        return _problem.from_arrays(runs, delta, **arrays)
    for name in ("thresholds", "prompts", "exact"):
        if arrays[name] is not None and arrays[name] is not False:
            raise RiskcalError(f"{name}: Runs carry their own; leave it out.")
    if (arrays["lower"], arrays["upper"]) not in ((0.0, 1.0), records.OBJECTIVES[objective]):
        raise RiskcalError(
            f"lower, upper: objective {objective!r} of Runs has its own bounds; leave them out."
        )
    deltas = delta if isinstance(delta, Mapping) else {objective: delta}
    if not deltas:
        raise RiskcalError("delta: the mapping is empty; give at least one objective.")
    return _problem.from_runs(runs, deltas, weighting=weighting, max_cluster=max_cluster)


def _ordered(
    problem: Problem, procedure: str, order: Sequence[int] | None, cost: str, pilot_fraction: float
) -> tuple[Problem, tuple[Any, ...]]:
    """The problem in the order in which it is tested, and the units that chose that order."""
    if procedure in PILOTS:
        if order is not None:
            raise RiskcalError(
                f"order: {procedure} makes its own from the pilot split; leave it out."
            )
        pilot, rest = _problem.split_pilot(problem, pilot_fraction)
        chosen = (
            _problem.pilot_order(pilot)
            if procedure == "pilot_order"
            else _problem.pareto_order(pilot, cost)
        )
        return rest.columns(chosen), tuple(pilot.units.tolist())
    if order is None:
        return problem, ()
    index = _validate.as_given(order, "order")
    if index.dtype.kind not in "iu" or not np.array_equal(
        np.sort(np.atleast_1d(index)), np.arange(problem.k)
    ):
        raise RiskcalError(
            f"order: give every row number of runs.candidates, 0 to {problem.k - 1}, once."
        )
    return problem.columns(index), ()


def _levels(
    procedure: str, epsilon: float, k: int, starts: int, weights: Any, transitions: Any
) -> Floats:
    """The level at which each hypothesis is first tested: where betting is tuned."""
    if procedure in _SEQUENCES:
        return np.full(k, epsilon / starts)
    if procedure in ("fallback", "graphical"):
        if procedure == "graphical" and transitions is None:
            raise RiskcalError(
                "transitions: the graphical procedure needs them, one row per candidate in tested order."
            )
        levels = fwer.initial_levels(epsilon, weights, transitions)
        return np.where(levels > 0, levels, epsilon / k)
    return np.full(k, epsilon / k)


def _test(test: str, risk: Risk, levels: Floats, nameless: bool = False) -> Floats:
    known = {"lower": risk.lower, "upper": risk.upper}
    if test == "binomial":
        if (risk.lower, risk.upper) != (0.0, 1.0):
            raise RiskcalError(
                f"test: 'binomial' is for 0/1 losses, but these lie in [{risk.lower:g}, {risk.upper:g}]; use betting."
            )
        return np.atleast_1d(pvalues.binomial(risk.losses, risk.delta))
    if test != "betting":
        return np.atleast_1d(TESTS[test](risk.losses, risk.delta, **known))
    p = np.empty(len(levels))
    for level in np.unique(levels):
        tuned = levels == level
        losses = risk.losses if tuned.all() else np.compress(tuned, risk.losses, axis=1)
        p[tuned] = pvalues.betting(losses, risk.delta, level=float(level), **known)
    if nameless:
        p = np.maximum(p, [_problem.of_count(column, risk.delta) for column in risk.losses.T])
    return p


def _bound_of_count(column: Floats, level: float, lower: float) -> float:
    """The exact upper bound for losses of two values; the losses' lower bound, no claim, for others. See `_problem.of_count`."""
    values = _problem.two_values(column)
    if values is None:
        return lower
    low, high = values
    share = bounds.clopper_pearson((column > (low + high) / 2).astype(np.float64), epsilon=level)
    return low + (high - low) * float(share)


def _select(
    procedure: str, p: Floats, epsilon: float, starts: int, weights: Any, transitions: Any
) -> NDArray[np.bool_]:
    if procedure in _SEQUENCES:
        return fwer.fixed_sequence(p, epsilon, starts)
    if procedure == "fallback":
        return fwer.fallback(p, epsilon, weights)
    if procedure == "graphical":
        return fwer.graphical(p, epsilon, weights, transitions)
    return {"holm": fwer.holm, "bonferroni": fwer.bonferroni, "hochberg": fwer.hochberg}[procedure](
        p, epsilon
    )


def _simultaneous(
    problem: Problem, deltas: list[float], cost: str, common: dict[str, Any]
) -> list[Calibration]:
    """One calibration per delta from bounds that hold for all candidates at once."""
    risk = problem.risks[0]
    for delta in deltas:
        _validate.tolerance(delta, risk.lower, risk.upper)
    method = "clopper_pearson" if common["test"] == "binomial" else common["test"]
    options = {"grid": np.unique(deltas)} if method == "betting" else {}
    bound = bounds.simultaneous(
        risk.losses,
        epsilon=common["epsilon_spent"],
        method=method,
        lower=risk.lower,
        upper=risk.upper,
        **options,
    )
    levels, rises, results = (
        np.full(problem.k, common["epsilon_spent"] / problem.k),
        _rises(problem),
        [],
    )
    design = planning.Design.of(common["test"], "simultaneous", common["epsilon_spent"], levels)
    if method == "betting" and problem.nameless:
        bound = np.maximum(
            bound, [_bound_of_count(c, levels[0], risk.lower) for c in risk.losses.T]
        )
    for delta in deltas:
        posed = replace(problem, risks=(risk._replace(delta=delta),))
        table = _table(posed).assign(bound=bound, certified=bound <= delta)
        outlook = partial(planning.outlook, posed, design, _MEANING)
        found: dict[str, Any] = {
            "procedure": "simultaneous",
            "starts": 1,
            "outlook": outlook,
            "pilot": (),
        }
        results.append(_result(posed, table, cost, rises=rises, **found, **common))
    return results


def _table(problem: Problem) -> pd.DataFrame:
    losses = {f"loss_{risk.name}": problem.mean(risk) for risk in problem.risks}
    if len(losses) == 1:
        losses = {"loss": next(iter(losses.values()))}
    costs = {name: cost.mean(0) for name, cost in problem.costs.items()}
    return problem.candidates.assign(n=problem.n, **losses, **costs)


def _result(
    problem: Problem,
    table: pd.DataFrame,
    cost: str,
    *,
    outlook: Callable[[], str],
    pilot: tuple[Any, ...],
    rises: str,
    **settings: Any,
) -> Calibration:
    costs = [name for name in problem.costs if name in table.columns]
    table = table[[name for name in table.columns if name not in costs] + costs]
    chosen = None
    if table["certified"].any():
        spending = (
            _problem.mean_cost(problem, cost)
            if problem.several
            else table["threshold"].to_numpy(dtype=np.float64)
        )
        chosen = table.iloc[int(np.where(table["certified"], spending, math.inf).argmin())]
    opening = _opening(problem, chosen, settings["epsilon_spent"])
    single = problem.risks[0]
    return Calibration(
        threshold=math.inf if chosen is None else float(chosen["threshold"]),
        certified=chosen is not None,
        chosen=chosen,
        table=table,
        full_costs=problem.full_costs,
        _told=partial(
            _message,
            opening,
            None if chosen is not None else outlook,
            _worth(problem, table, chosen) + rises + _end(table, problem.stopped),
        ),
        delta=single.delta
        if len(problem.risks) == 1
        else {risk.name: risk.delta for risk in problem.risks},
        objective="+".join(risk.name for risk in problem.risks),
        n=problem.n,
        k=problem.k,
        lower=min(risk.lower for risk in problem.risks),
        upper=max(risk.upper for risk in problem.risks),
        records_digest=problem.digest,
        pilot=pilot,
        stopped=problem.stopped,
        weighting=problem.weighting,
        max_cluster=problem.max_cluster,
        **settings,
    )


def _message(opening: str, outlook: Callable[[], str] | None, remarks: str) -> str:
    return opening + ("" if outlook is None else outlook()) + remarks


def _opening(problem: Problem, chosen: pd.Series | None, epsilon: float) -> str:
    if chosen is None:
        deltas = " and ".join(_problem.plain(risk.delta) for risk in problem.risks)
        return f"Nothing was certified at delta {deltas}: run the full model. "
    where = ", ".join(f"{name} {_problem.plain(chosen[name])}" for name in problem.coordinates)
    loss = "loss" if len(problem.risks) == 1 else "loss_{}"
    claims = " and ".join(
        f"the expected {_MEANING[risk.name]} is at most {_problem.plain(risk.delta)} "
        f"(observed {chosen[loss.format(risk.name)]:.4g})"
        for risk in problem.risks
    )
    return (
        f"Certified: with probability at least {_at_least(epsilon)} over the draw of the {problem.n} calibration "
        f"{problem.unit}, at {where} {claims}{_OVER[problem.weighting]}."
    )


def _worth(problem: Problem, table: pd.DataFrame, chosen: pd.Series | None) -> str:
    """What a certificate alone would leave unsaid: settings that change nothing, and savings that are none."""
    said = ""
    counted = [
        name for name in ("layers", "tokens", "flops") if name in problem.costs
    ]  # seconds differ by themselves
    alike = [risk.losses for risk in problem.risks] + [problem.costs[name] for name in counted]
    can_tell = bool(counted) or "seconds" not in problem.costs
    if problem.k > 1 and can_tell and all((matrix == matrix[:, :1]).all() for matrix in alike):
        named = ["losses", *("FLOPs" if name == "flops" else name for name in counted)]
        said += (
            f" All {problem.k} candidates gave the same {', '.join(named[:-1])}{' and ' * (len(named) > 1)}{named[-1]} on each "
            f"of the {problem.unit}: "
        )
        said += (
            "the setting made no difference. Make sure that it reached the decoder."
            if counted
            else "the setting made no difference to what was recorded, and no cost was recorded that would tell whether it "
            "reached the decoder."
        )
    if chosen is None:
        return said
    full = problem.full_costs
    for name, per in (("layers", "layers a token"), ("flops", "FLOPs a prompt")):
        if name in full and chosen[name] >= full[name] * (1 - 1e-9):
            said += f" It saves nothing: {chosen[name]:.4g} {per}, where the full model takes {full[name]:.4g}."
            break
    if "seconds" in full and chosen["seconds"] > full["seconds"] * (1 + 1e-9):
        said += (
            f" It is slower than the full model that was recorded beside it: {chosen['seconds']:.4g} seconds a prompt, where "
            f"that takes {full['seconds']:.4g}."
        )
    return said


def _at_least(epsilon: float) -> str:
    """1 - epsilon as messages write it: never rounded up."""
    if epsilon < 1e-6:
        return f"1 - {_problem.plain(epsilon)}"
    return f"{math.floor((1 - epsilon) * 1e6 + 1e-6) / 1e6:.6g}"


def _preregistered(options: Mapping[str, Any]) -> str | None:
    given = {
        name: options[name]
        for name in ("order", "weights", "transitions")
        if options[name] is not None
    }
    if not given:
        return None
    text = json.dumps(
        {name: np.asarray(value, dtype=np.float64).tolist() for name, value in given.items()}
    )
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _end(table: pd.DataFrame, stopped: Stop | None) -> str:
    """What a recording that stopped leaves open."""
    if stopped is None:
        return ""
    end = (
        f" Thresholds below {_problem.plain(table['threshold'].iloc[-1])} were never run: there fixed-sequence testing of the "
        f"{_MEANING[stopped.objective]} had failed (delta {stopped.delta:g}, epsilon {stopped.epsilon:g}, {stopped.test})."
    )
    return end + " Here it did not fail, so that a lower one might do." * bool(
        table["certified"].iloc[-1]
    )


def _rises(problem: Problem) -> str:
    """A warning where the risk rises with the threshold by more than noise: a sequence may have stopped for nothing."""
    if problem.several or problem.k < 2:
        return ""
    thresholds = problem.candidates["threshold"].to_numpy(dtype=np.float64)
    for risk in problem.risks:
        pairs = monotone.risk_rises(risk.losses, thresholds, lower=risk.lower, upper=risk.upper)
        if len(pairs):
            return (
                f" The {_MEANING[risk.name]} does not fall steadily as the threshold rises ({len(pairs)} pairs of "
                "thresholds say so beyond noise): a fixed sequence can stop early there, Holm does not mind."
            )
    return ""


def _recorded_schedule(row: pd.Series, given: Any) -> Decaying:
    """The decaying schedule that a candidate ran with; what the records leave open must be given, and fit."""
    temperature = float(row["temperature"])
    if "max_length" in row and "form" in row:
        recorded = Decaying(temperature, int(row["max_length"]), row["form"])
        if given not in (None, recorded):
            raise RiskcalError(f"schedule: {given} is not the recorded {recorded}; leave it out.")
        return recorded
    if not isinstance(given, Decaying) or given.temperature != temperature:
        raise RiskcalError(
            f"schedule: the records decay with temperature {temperature:g} but do not say over what length; give "
            f"schedule=Decaying({temperature:g}, max_length=...) as it was recorded."
        )
    return given


def _recorded_policy(
    table: pd.DataFrame, chosen: pd.Series | None, schedule: Any
) -> dict[str, Any]:
    """The fields of `ExitPolicy` that a calibrated candidate's row of records holds, every coordinate in one of them."""
    row = table.iloc[0] if chosen is None else chosen
    columns = [str(name) for name in table.columns[: table.columns.get_loc("n")]]
    given: dict[str, Any] = {"threshold": math.inf if chosen is None else float(row["threshold"])}
    if "measure" in columns:
        given["measure"] = str(row["measure"])
    if "min_layer" in columns:
        given["min_layer"] = int(row["min_layer"])
    if chosen is not None and not pd.isna(row.get("temperature", math.nan)):
        given["schedule"] = _recorded_schedule(row, schedule)
    if "policy" in columns:
        vectors = table["policy"].nunique() == table["threshold"].nunique()
        given |= _recorded_fields(str(row["policy"]), vectors=vectors, tested=chosen is not None)
    others = [name for name in columns if name not in ("threshold", *records.COORDINATES)]
    own = [name for name in others if name in ExitPolicy.model_fields]
    written = json.loads(str(row["policy"])) if "policy" in columns else {}
    if chosen is None:  # the full model has no setting of exits, and is told from no candidate
        own = [name for name in own if name in _OF_MODELS and table[name].nunique() == 1]
    for name in own:
        value = _filling(name, row[name])
        if name in written and written[name] != value:
            raise RiskcalError(
                f"{name}: {value!r} in its column, but {written[name]!r} in the column policy; record one of the two."
            )
        given[name] = value
    free = [name for name in others if name not in ExitPolicy.model_fields]
    if chosen is not None and free:
        given["coordinates"] = {name: _held(row[name]) for name in free}
    return given


def _filling(name: str, value: Any) -> Any:
    """What a column of the name of an `ExitPolicy` field puts into it."""
    held = _held(value)
    if name not in (*_OF_EXITS, *_OF_MODELS):
        raise RiskcalError(
            f"{name}: {held!r} cannot stand in the policy's field of that name, which is no single number or text. Rename the "
            "column, to have it among the policy's coordinates, or record the field as JSON in a column policy."
        )
    return int(held) if isinstance(held, float) and held.is_integer() else held


def _held(value: Any) -> Any:
    """A coordinate as JSON holds it."""
    plain = value.item() if isinstance(value, np.generic) else value
    return "full" if isinstance(plain, float) and math.isinf(plain) else plain


def _recorded_fields(text: str, *, vectors: bool, tested: bool) -> dict[str, Any]:
    """The fields of a policy that a candidate ran with, beyond those that records have columns for.

    Whoever writes that column names everything: what it leaves out had its default. Where each threshold has a text of its own
    (``vectors``), thresholds per exit layer may stand there, of which ``threshold`` is then but the name; the full model (not
    ``tested``) has none.
    """
    try:
        fields = json.loads(text)
        recorded = ExitPolicy(**fields)
    except (TypeError, ValueError) as error:
        raise RiskcalError(
            f"policy: the records hold {text!r}, which is not an object of policy fields ({error})."
        ) from None
    own = [name for name in fields if name in COLUMNS and not (vectors and name == "thresholds")]
    if own:
        raise RiskcalError(
            f"policy: the records' column holds {own[0]!r}, which has a column of its own or is what calibration finds; "
            "leave it out there."
        )
    named = {name: getattr(recorded, name) or DEFAULTS[name] for name in ("cache", "batching")}
    given = named | {name: getattr(recorded, name) for name in fields}
    if "thresholds" in given:
        return (
            given | {"threshold": math.inf}
            if tested
            else {n: v for n, v in given.items() if n != "thresholds"}
        )
    return given
