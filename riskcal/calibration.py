"""`calibrate`: from records to the cheapest candidate whose expected loss is certified, or to the full model."""

import hashlib
import html
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _tables, _validate, fwer, pvalues, records
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import Certificate, ExitPolicy
from riskcal.records import Runs, Traces
from riskcal.replay import TokenLosses
from riskcal.schedules import Decaying

TESTS: dict[str, Callable[..., Any]] = {
    "betting": pvalues.betting,
    "convex_order": pvalues.convex_order,
    "hoeffding_bentkus": pvalues.hoeffding_bentkus,
    "bentkus": pvalues.bentkus,
    "hoeffding": pvalues.hoeffding,
    "binomial": pvalues.binomial,
}
PROCEDURES = ("fixed_sequence", "holm", "bonferroni")
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
        One row per candidate in tested order: coordinates, ``n``, mean ``loss``, ``pvalue``, ``certified``, mean costs.
    full_costs : dict
        Mean costs of the full model, where recorded.
    message : str
        The outcome in plain words, with what to do next if nothing was certified.
    """

    threshold: float
    certified: bool
    chosen: pd.Series | None
    table: pd.DataFrame
    full_costs: dict[str, float]
    message: str
    delta: float
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

    def policy(self, **fields: Any) -> ExitPolicy:
        """The policy to deploy, with its certificate.

        Parameters
        ----------
        **fields
            Fields of `ExitPolicy` that the records do not say (a schedule's length, ``max_new_tokens``). A schedule must
            be the one that was recorded.
        """
        given: dict[str, Any] = {"threshold": self.threshold}
        row = self.table.iloc[0] if self.chosen is None else self.chosen
        for name, convert in (("measure", str), ("min_layer", int)):
            if name in self.table.columns:
                given[name] = convert(row[name])
        temperature = row.get("temperature", math.nan)
        if self.chosen is not None and not pd.isna(temperature):
            schedule = fields.get("schedule")
            if not isinstance(schedule, Decaying) or schedule.temperature != temperature:
                raise RiskcalError(
                    f"schedule: the records decay with temperature {temperature:g}; give schedule=Decaying({temperature:g}, "
                    "max_length=...) as it was recorded."
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
            pvalue=None if self.chosen is None else float(self.chosen["pvalue"]),
            records_digest=self.records_digest,
            versions=_versions(),
        )
        return ExitPolicy(**(given | fields | {"certificate": certificate}))

    def plot(self, ax: Any = None) -> Any:
        """Mean loss against the threshold, with delta and the certified region; returns the matplotlib axes."""
        from riskcal import plots

        return plots.risk_curve(self.table, delta=self.delta, threshold=self.threshold, ax=ax)

    def to_frame(self) -> pd.DataFrame:
        """A copy of ``table``."""
        return self.table.copy()

    def __repr__(self) -> str:
        head = f"Calibration: {self.objective}, delta {self.delta:g}, epsilon {self.epsilon:g}, {self.test}, {self.procedure}"
        return f"{head}\n{self.message}\n\n{self.table.to_string(index=False, float_format='{:.4g}'.format)}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.message)}</p>{self.table.to_html(index=False, float_format='{:.4g}'.format)}"


class _Problem(NamedTuple):
    losses: Floats  # (n, k), rows in tested order, columns in tested order
    candidates: pd.DataFrame
    costs: pd.DataFrame
    full_costs: dict[str, float]
    objective: str
    lower: float
    upper: float
    digest: str


def calibrate(
    runs: Runs | ArrayLike,
    *,
    delta: float,
    epsilon: float = 0.05,
    objective: str = "textual",
    test: str = "betting",
    procedure: str | None = None,
    starts: int = 1,
    attempt: int | None = None,
    order: Sequence[int] | None = None,
    cost: str = "layers",
    thresholds: ArrayLike | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    prompts: ArrayLike | None = None,
) -> Calibration:
    """Find the cheapest candidate whose expected loss is at most delta, with probability at least 1 - epsilon.

    Parameters
    ----------
    runs : Runs, or (n, k) array of losses
        Array rows are independent units (or tokens, with ``prompts``), columns are ``thresholds``.
    delta : float
        Tolerated expected loss, in the loss's own units.
    epsilon : float
        Probability, over the draw of the calibration prompts, that a false certificate is issued.
    objective : {"textual", "risk", "risk_clipped"}
        Which loss of the runs is tested (see `Runs.losses`); not used with arrays.
    test : str
        ``"betting"`` (the tightest for most losses), ``"convex_order"``, ``"hoeffding_bentkus"``, ``"bentkus"``,
        ``"hoeffding"``, or ``"binomial"`` for 0/1 losses.
    procedure : {"fixed_sequence", "holm", "bonferroni"}, optional
        Default: fixed sequence for one coordinate (from the highest threshold down), Holm for several.
    starts : int
        Evenly spaced starting points of the fixed sequence.
    attempt : int, optional
        Which planned attempt this is, from 1; attempt j spends ``6 epsilon / (pi^2 j^2)``. The default, one attempt with
        all of epsilon, is right only if no second look follows, whatever its outcome.
    order : sequence of int, optional
        Preregistered order of the rows of ``runs.candidates``; needed for a fixed sequence over several coordinates.
    cost : str
        Recorded cost that the choice among certified candidates of several coordinates minimises.
    thresholds, lower, upper : optional
        For arrays: one threshold per column, and the losses' known bounds.
    prompts : (n,), optional
        For arrays: the prompt that each row belongs to; rows are averaged within it.

    Returns
    -------
    Calibration

    Raises
    ------
    RiskcalError
        For invalid input, replayed runs that are not exact, and token rows without ``prompts``.

    Notes
    -----
    Assumes i.i.d. units from the population that will be served, candidates and order fixed before the data were seen, and
    bounded losses. Prompts are tested in a pseudo-random order that depends on their ids alone (arrays: a fixed
    permutation), never in the order they stand in. Nothing is said about a single prompt or a stratum. Sources: Learn then
    Test (Angelopoulos et al. 2021), CALM (Schuster et al. 2022).
    """
    _validate.level(epsilon, "epsilon")
    _validate.choice(test, "test", TESTS)
    if isinstance(runs, Runs):
        problem = _from_runs(runs, objective, thresholds, prompts)
    else:
        problem = _from_arrays(runs, thresholds, lower, upper, prompts)
    if isinstance(delta, Sequence | np.ndarray):
        raise RiskcalError("delta: give one number; choosing among several after looking is not covered by epsilon.")
    tolerated = _validate.tolerance(delta, problem.lower, problem.upper)
    coordinates = [c for c in problem.candidates.columns if problem.candidates[c].nunique(dropna=False) > 1]
    several = len(coordinates) > 1
    procedure = procedure or ("holm" if several else "fixed_sequence")
    _validate.choice(procedure, "procedure", PROCEDURES)
    problem = _reorder(problem, order, needed=several and procedure == "fixed_sequence")
    spent = epsilon if attempt is None else 6 * epsilon / (math.pi * _validate.count(attempt, "attempt", least=1)) ** 2
    n, k = problem.losses.shape
    starts = _validate.count(starts, "starts", least=1)
    if starts > 1 and procedure != "fixed_sequence":
        raise RiskcalError(f"starts: {starts} starts belong to the fixed sequence, not to {procedure}.")
    level = spent / (starts if procedure == "fixed_sequence" else k)
    p = _test(test, problem, tolerated, level)
    rejected = _select(procedure, p, spent, starts)
    table = problem.candidates.assign(n=n, loss=problem.losses.mean(0), pvalue=p, certified=rejected)
    table = pd.concat([table, problem.costs], axis=1)
    chosen = _choose(table, rejected, several, cost)
    threshold = math.inf if chosen is None else float(chosen["threshold"])
    return Calibration(
        threshold=threshold,
        certified=chosen is not None,
        chosen=chosen,
        table=table,
        full_costs=problem.full_costs,
        message=_message(problem, table, chosen, test, tolerated, spent, level),
        delta=tolerated,
        epsilon=float(epsilon),
        epsilon_spent=spent,
        attempt=attempt,
        objective=problem.objective,
        test=test,
        procedure=procedure,
        starts=starts,
        n=n,
        k=k,
        lower=problem.lower,
        upper=problem.upper,
        records_digest=problem.digest,
    )


def _from_runs(runs: Runs, objective: str, thresholds: Any, prompts: Any) -> _Problem:
    for name, value in (("thresholds", thresholds), ("prompts", prompts)):
        if value is not None:
            raise RiskcalError(f"{name}: Runs carry their own; leave it out.")
    if runs.source == "replayed" and not runs.exact:
        raise RiskcalError(
            "runs: they were replayed on the full model's path, but after a first early exit a real decoder's states differ. "
            "Record real generations, or declare a memoryless exit with replay_traces(..., exact=True)."
        )
    _validate.choice(objective, "objective", records.OBJECTIVES)
    low, high = records.OBJECTIVES[objective]
    full = {name: float(runs.unit_means(runs.full[name]).mean()) for name in records.COSTS if name in runs.full}
    return _Problem(
        runs.losses(objective), runs.candidates, runs.mean_costs(), full, objective, low, high, runs.digest()
    )


def _from_arrays(losses: Any, thresholds: Any, lower: float, upper: float, prompts: Any) -> _Problem:
    if isinstance(losses, Traces | pd.DataFrame):
        raise RiskcalError(
            "runs: give Runs or an array of losses. A table becomes Runs with Runs.from_frame; Traces hold token rows of one "
            "path, which replay_traces turns into (replayed) Runs."
        )
    if isinstance(losses, TokenLosses) and prompts is None:
        raise RiskcalError(
            "losses: these rows are tokens, which depend on each other within a prompt; give prompts= to average them."
        )
    low, high = _validate.bounds(lower, upper)
    if thresholds is None:
        raise RiskcalError("thresholds: an array of losses needs one threshold per column.")
    grid = _validate.threshold_grid(thresholds, allow_full=False)
    matrix = _validate.losses(np.asarray(losses), lower=low, upper=high)
    if matrix.shape[1] != grid.size:
        raise RiskcalError(f"thresholds: {grid.size} given for {matrix.shape[1]} columns of losses; give one per column.")
    if prompts is None:
        matrix = matrix[np.random.default_rng(0).permutation(len(matrix))]
    else:
        matrix = _average_within(matrix, prompts)
    descending = np.argsort(-grid, kind="stable")
    matrix = np.ascontiguousarray(matrix[:, descending])
    candidates = pd.DataFrame({"threshold": grid[descending]})
    digest = hashlib.blake2b(matrix.tobytes() + grid[descending].tobytes(), digest_size=16).hexdigest()
    return _Problem(matrix, candidates, pd.DataFrame(), {}, "losses", low, high, digest)


def _average_within(matrix: Floats, prompts: ArrayLike) -> Floats:
    """Mean of each prompt's rows, prompts in tested order."""
    ids = _tables.identifiers(pd.Series(np.asarray(prompts)), "prompts")
    if len(ids) != len(matrix):
        raise RiskcalError(f"prompts: {len(ids)} ids for {len(matrix)} rows; give one per row.")
    code, distinct = pd.factorize(ids)
    if len(distinct) < 2:
        raise RiskcalError("prompts: all rows belong to one prompt; at least two are needed.")
    sums = np.zeros((len(distinct), matrix.shape[1]))
    np.add.at(sums, code, matrix)
    means: Floats = sums / np.bincount(code)[:, None]
    return means[records.tested_order(distinct)]


def _reorder(problem: _Problem, order: Sequence[int] | None, *, needed: bool) -> _Problem:
    if order is None:
        if needed:
            raise RiskcalError(
                "order: candidates differ in several coordinates, so a fixed sequence needs a preregistered order= (row "
                "numbers of runs.candidates), fixed before the data were seen; or use procedure='holm'."
            )
        return problem
    index = np.asarray(order)
    if sorted(index.tolist()) != list(range(len(problem.candidates))):
        raise RiskcalError(f"order: give every row number of runs.candidates, 0 to {len(problem.candidates) - 1}, once.")
    costs = problem.costs.iloc[index].reset_index(drop=True) if len(problem.costs.columns) else problem.costs
    return problem._replace(
        losses=problem.losses[:, index], candidates=problem.candidates.iloc[index].reset_index(drop=True), costs=costs
    )


def _test(test: str, problem: _Problem, delta: float, level: float) -> Floats:
    bounds = {"lower": problem.lower, "upper": problem.upper}
    if test == "binomial":
        if bounds != {"lower": 0.0, "upper": 1.0}:
            raise RiskcalError(f"test: 'binomial' is for 0/1 losses, but these lie in {list(bounds.values())}; use betting.")
        bounds = {}
    extra = {"level": level} if test == "betting" else {}
    return np.atleast_1d(TESTS[test](problem.losses, delta, **bounds, **extra))


def _select(procedure: str, p: Floats, epsilon: float, starts: int) -> NDArray[np.bool_]:
    if procedure == "fixed_sequence":
        return fwer.fixed_sequence(p, epsilon, starts)
    return fwer.holm(p, epsilon) if procedure == "holm" else fwer.bonferroni(p, epsilon)


def _choose(table: pd.DataFrame, rejected: NDArray[np.bool_], several: bool, cost: str) -> pd.Series | None:
    if not rejected.any():
        return None
    certified = table[rejected]
    if not several:
        return certified.loc[certified["threshold"].idxmin()]
    if cost not in table.columns:
        raise RiskcalError(f"cost: {cost!r} was not recorded; choosing among several coordinates needs it.")
    return certified.loc[certified[cost].idxmin()]


def _message(
    problem: _Problem, table: pd.DataFrame, chosen: pd.Series | None, test: str, delta: float, epsilon: float, level: float
) -> str:
    meaning = _MEANING[problem.objective]
    if chosen is not None:
        where = ", ".join(f"{name} {_plain(chosen[name])}" for name in problem.candidates.columns)
        return (
            f"Certified: with probability at least {1 - epsilon:.6g} over the draw of the {len(problem.losses)} calibration "
            f"units, the expected {meaning} at {where} is at most {delta:g} (observed {chosen['loss']:.4g})."
        )
    best = int(table["loss"].to_numpy().argmin())
    mean, deviation = float(table["loss"].iloc[best]), float(problem.losses[:, best].std(ddof=1))
    opening = f"Nothing was certified at delta {delta:g}: run the full model. "
    if mean >= delta:
        return opening + (
            f"Even the safest candidate's observed {meaning} is {mean:.4g}, so more prompts alone will not help: raise delta, "
            "record higher thresholds, or train the model for early exit."
        )
    width = problem.upper - problem.lower
    needed = pvalues.sample_size(
        test, (mean - problem.lower) / width, deviation / width, (delta - problem.lower) / width, level
    )
    size = max(needed, len(problem.losses) + 1)
    return opening + (
        f"The safest candidate's observed {meaning} is {mean:.4g}; a fresh sample of about {size} units would certify it in "
        "four draws of five, if that is its true mean. Testing these data again, or more of the same pool, is a new attempt "
        "that this epsilon does not cover."
    )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)


def _versions() -> dict[str, str]:
    packages = ("riskcal-ltt", "numpy", "scipy", "numba")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that was never installed
            found[package] = "not installed"
    return found
