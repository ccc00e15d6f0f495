"""`calibrate`: from records to the cheapest candidate whose expected loss is certified, or to the full model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.calibration import counts, proxies, sentences
from riskcal.calibration import problem as problems
from riskcal.calibration.outlook import Design, outlook
from riskcal.calibration.posing import pose
from riskcal.calibration.problem import Problem
from riskcal.calibration.result import Calibration
from riskcal.calibration.settling import settled, table_of
from riskcal.calibration.simultaneous import simultaneous
from riskcal.fwer import FixedSequence, PilotOrder, Procedure, procedures
from riskcal.pvalues import Method, methods
from riskcal.pvalues.proxies import of_pairs
from riskcal.records import Runs


def calibrate(
    runs: Runs | ArrayLike,
    *,
    delta: Any,
    epsilon: float = 0.05,
    objective: str = "textual",
    test: str | Method = "betting",
    procedure: str | Procedure | None = None,
    attempt: int | None = None,
    cost: str | None = None,
    costs: Mapping[str, ArrayLike] | None = None,
    thresholds: ArrayLike | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    prompts: ArrayLike | None = None,
    exact: bool = False,
    weighting: str | None = None,
    max_cluster: int | None = None,
    budget: Mapping[str, Any] | None = None,
    lower_is_stricter: bool = False,
    proxy: str | ArrayLike | None = None,
    unlabelled: ArrayLike | None = None,
    **options: Any,
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
    objective : {"textual", "risk", "risk_clipped", "selective"}
        Which loss of the runs is tested (see `Runs.losses`); not used with arrays or a mapping of deltas. ``"selective"`` is
        the dissimilarity pooled over the requests that stopped early, those with fewer ``layers`` than the full model took
        for them, and those whose output failed: ``E[loss; early] / P(early) <= delta``. The others do not dilute it.
    test : str or `riskcal.pvalues.Method`
        ``"betting"`` (see the power table of the guarantee's page), ``"convex_order"``, ``"hoeffding_bentkus"``, ``"bentkus"``,
        ``"hoeffding"``, ``"empirical_bernstein"``, or ``"binomial"`` for 0/1 losses.
    procedure : str or `riskcal.fwer.Procedure`, optional
        ``"fixed_sequence"`` (default for one coordinate: from the strictest threshold on, the highest
        or, with ``lower_is_stricter``, the lowest), ``"holm"`` (default for several,
        and with a selective risk or a budget, of which the highest threshold is not the safest), ``"bonferroni"``,
        ``"hochberg"`` (needs positively dependent p-values), ``"fallback"``, ``"graphical"``, or a fixed sequence whose order
        a pilot split chooses: ``"pilot_order"`` (all candidates, by pilot risk) and ``"pareto"`` (those that none beats in
        risk and cost). Or the object, with its options: ``riskcal.fwer.FixedSequence(starts=3)``. With a list of deltas
        there is none.
    attempt : int, optional
        Which planned attempt this is, from 1; attempt j spends ``6 epsilon / (pi^2 j^2)``. The default, one attempt with
        all of epsilon, is right only if no second look follows, whatever its outcome.
    cost : str, optional
        Recorded cost that the choice among certified candidates minimises. Default: ``"layers"``, but with one coordinate the
        loosest threshold, whatever was recorded.
    costs : mapping of name to (n, k) or (k,), optional
        For arrays: what each row (averaged within ``prompts`` as losses are), or each candidate, costs.
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
    budget : mapping of cost to float or (float, float), optional
        Certifies beside the loss that the mean cost is at most so much, ``{"layers": 5}``. The second number of a pair is the
        largest cost that a request can have, fixed beforehand; layers have the full model's, if that is one number.
    lower_is_stricter : bool
        Whether a request exits where its value is at most the threshold, as with an entropy: then low thresholds are the
        strict ones, and are tested from the lowest up. Runs may say so themselves.
    proxy : str, (n,) or (n, k), optional
        A number, on any scale, that may foretell the loss and was fixed before the losses were seen: a recorded cost of the
        runs, or an array in the order of ``runs.prompts`` and ``runs.candidates`` (of the losses, where these are an array).
        One number a row serves all candidates. For ``test="betting"``; see `riskcal.pvalues.betting_with_proxy`.
    unlabelled : (m,) or (m, k), optional
        With ``proxy``: the same number of other requests from the same population, whose losses nobody measured; columns as
        those of the proxy, rows in any order.
    **options
        Of a procedure given by its name: ``starts``, ``order``, ``weights``, ``transitions``, ``pilot_fraction``; see
        `riskcal.fwer.FixedSequence` and so on. ``procedure="fixed_sequence", starts=3`` is ``FixedSequence(starts=3)``. A
        preregistered ``order`` is needed for a fixed sequence over several coordinates.

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
    ``weighting="requests"`` tests.
    In the same way ``u = delta + (loss - delta) early`` is tested for a selective risk.

    Sources: Learn then Test (Angelopoulos et al. 2021), CALM (Schuster et al. 2022), Pareto
    Testing (Laufer-Goldshtein et al. 2023).

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> calibration = riskcal.calibrate(runs, delta=0.1)
    >>> calibration.certified, calibration.threshold
    (True, 0.45)
    >>> calibration.policy().save("policy.json")

    Losses in an array, one row per prompt and one column per threshold, do as well:

    >>> losses = runs.losses("textual")
    >>> riskcal.calibrate(losses, thresholds=runs.thresholds, delta=0.05, test="convex_order").threshold
    0.85
    """
    _refuse_one_cluster(runs)
    asked = ask(
        runs,
        delta=delta,
        epsilon=epsilon,
        test=test,
        procedure=procedure,
        attempt=attempt,
        cost=cost,
        proxy=proxy,
        unlabelled=unlabelled,
        options=options,
        objective=objective,
        weighting=weighting,
        max_cluster=max_cluster,
        thresholds=thresholds,
        lower=lower,
        upper=upper,
        prompts=prompts,
        exact=exact,
        costs=costs,
        budget=budget,
        lower_is_stricter=lower_is_stricter,
    )
    return answer(asked)


class Question(NamedTuple):
    """What `calibrate` was asked, checked: all but the data's answer."""

    problem: Problem
    deltas: list[Any]
    method: Method
    rule: Procedure | None  # None for a list of deltas
    cost: str | None
    epsilons: dict[str, Any]


def ask(
    runs: Any,
    *,
    delta: Any,
    epsilon: Any,
    test: Any,
    procedure: Any,
    attempt: int | None,
    cost: str | None,
    proxy: Any,
    unlabelled: Any,
    options: Mapping[str, Any],
    **posed: Any,
) -> Question:
    """The arguments of `calibrate`, checked and made into what they stand for; ``posed`` are those of `pose`."""
    level, method = _validate.level(epsilon, "epsilon"), methods.named(test)
    deltas, several = listed(delta)
    problem = pose(runs, deltas[0], **posed)  # of several, the others are put in its place later
    if several:
        refuse_for_list(problem, procedure, options, proxy)
    for one in deltas if several else ():
        _validate.tolerance(one, problem.risks[0].lower, problem.risks[0].upper)
    own = {name: posed[name] for name in ("thresholds", "prompts")}
    problem = proxies.with_proxy(problem, runs, proxy, unlabelled, method, **own)
    spent = procedures.spent_by_attempt(level, attempt)
    rule = None if several else procedure_for(problem, procedure, options)
    if several:
        refuse_cut_grid(problem.stopped, one_sequence=False)
    problems.refuse_unknown_cost(problem, cost)
    epsilons = {"epsilon": level, "epsilon_spent": spent, "attempt": attempt}
    return Question(problem, deltas, method, rule, cost, epsilons)


def answer(asked: Question) -> Any:  # a Calibration; a list of them where delta is a list
    """Test what was asked, and choose."""
    problem, deltas, method, rule, cost, epsilons = asked
    if rule is None:
        return simultaneous(problem, deltas, method, cost, epsilons)
    tested = with_candidates_in_order(problem, rule, cost)
    proof = prove(tested.problem, method, rule, epsilons["epsilon_spent"])
    return _result(tested, proof, method, rule, cost, epsilons)


def _refuse_one_cluster(runs: Any) -> None:
    """Refuse runs whose prompts all share one source: there is one unit, and nothing to test."""
    if isinstance(runs, Runs) and "cluster" in runs.labels and runs.n < 2:
        raise RiskcalError(
            f"cluster: all prompts are of one, {runs.units.tolist()[0]!r}; a test needs at least two independent units. Leave "
            "the column out if the prompts are independent of each other."
        )


def listed(delta: Any) -> tuple[list[Any], bool]:
    """The deltas, and whether they were given as a list."""
    several = not isinstance(delta, Mapping) and _validate.several(delta, "delta")
    return (list(_validate.numbers(delta, "delta")), True) if several else ([delta], False)


def procedure_for(problem: Problem, procedure: Any, options: Mapping[str, Any]) -> Procedure:
    """The procedure that is meant, as an object, if it is sound and of use on this problem."""
    if procedure is None:
        procedure = "fixed_sequence" if problem.from_the_top else "holm"
    chosen = procedures.named(procedure, **options)
    sequence = isinstance(chosen, FixedSequence)
    starts = getattr(chosen, "starts", 1)
    unordered = getattr(chosen, "order", None) is None
    one = sequence and starts == 1 and unordered and not problem.several_coordinates
    refuse_cut_grid(problem.stopped, one_sequence=one)
    if problem.several_coordinates and sequence and unordered:
        raise RiskcalError(
            "order: candidates differ in several coordinates, so a fixed sequence needs a preregistered order= (row "
            "numbers of runs.candidates), fixed before the data were seen; or use procedure='holm'."
        )
    return chosen


def refuse_cut_grid(stopped: Any, *, one_sequence: bool) -> None:
    """Refuse all but one fixed sequence from the top where a recording stopped: it ended by what the losses were."""
    if stopped is not None and not one_sequence:
        raise RiskcalError(
            "procedure: the recording stopped where a fixed sequence failed, so that which thresholds there are depends on "
            "the losses; only a fixed sequence from the highest threshold down, with one start, is sound on them."
        )


def refuse_for_list(
    problem: Problem, procedure: Any, options: Mapping[str, Any], proxy: Any = None
) -> None:
    """Refuse what a list of deltas cannot be served with."""
    if proxy is not None:
        raise RiskcalError("delta: a proxy is for one delta at a time; give one, or no proxy.")
    if problem.weighting == "requests":
        raise RiskcalError(
            "weighting: 'requests' is for one delta at a time, by which a cluster's losses are summed; give one."
        )
    if any(risk.early is not None or risk.is_cost for risk in problem.risks):
        raise RiskcalError(
            "delta: selective risks and budgets are for one delta at a time; give one."
        )
    if procedure is not None:
        name = procedure.name if isinstance(procedure, Procedure) else procedure
        raise RiskcalError(
            f"procedure: a list of deltas is served by simultaneous bounds, not by {name!r}."
        )
    procedures.refuse_options(options, "a list of deltas")


class Arranged(NamedTuple):
    """A problem whose candidates stand in the order in which they are tested, and how it came about."""

    problem: Problem
    whole: Problem  # what a fresh sample would look like: all units, candidates as ties are broken
    order: NDArray[np.intp]  # which of the original candidates are tested, first to last
    pilot: tuple[Any, ...]  # ids of the units that chose the order and are not tested


def with_candidates_in_order(problem: Problem, procedure: Procedure, cost: str | None) -> Arranged:
    """The problem with its candidates in the order in which the procedure tests them; its units stand in theirs already."""
    if isinstance(procedure, PilotOrder):
        pilot, rest = problems.split_pilot(problem, procedure.pilot_fraction)
        looks = procedure.looks_at_cost
        costs = problems.weighed(pilot, cost) if looks else np.zeros(pilot.k)
        order = procedure.chosen(problems.excess(pilot), costs)
        costs = problems.weighed(problem, cost) if looks else np.zeros(problem.k)
        whole = problem.columns(procedure.ties(costs))
        return Arranged(rest.columns(order), whole, order, tuple(pilot.units.tolist()))
    fixed = procedure.arranged(problem.k)
    if fixed is None:
        return Arranged(problem, problem, np.arange(problem.k), ())
    ordered = problem.columns(fixed)
    return Arranged(ordered, ordered, fixed, ())


class Proof(NamedTuple):
    """P-values (k,), in tested order, and which candidates they certify."""

    pvalues: Floats
    certified: NDArray[np.bool_]


def prove(problem: Problem, method: Method, procedure: Procedure, epsilon: float) -> Proof:
    """Test all candidates of a problem, in the order in which they stand; of several risks the largest p-value counts."""
    levels = procedure.levels(epsilon, problem.k)
    p: Floats = np.max(
        [risk_pvalues(method, risk, levels, problem.nameless) for risk in problem.risks], axis=0
    )
    return Proof(p, procedure.rejected(p, epsilon))


def risk_pvalues(
    method: Method, risk: problems.TestedRisk, levels: Floats, nameless: bool
) -> Floats:
    """P-values (k,) of one risk, those of a tuned test at the level of each."""
    p = np.empty(len(levels))
    # a test that is not tuned at a level takes all columns at once
    tuned_at = levels if method.walks else np.repeat(levels[:1], len(levels))
    for level in np.unique(tuned_at):
        tuned = tuned_at == level
        some = risk if tuned.all() else risk.sliced(columns=tuned)
        known = {"level": float(level), "lower": risk.lower, "upper": risk.upper}
        p[tuned] = (
            method.pvalues(some.losses, risk.delta, **known)
            if some.pairs is None
            else of_pairs(some.losses, some.pairs, risk.delta, **known)
        )
    if nameless and method.walks:
        p = np.maximum(p, counts.of_counts(risk))
    return p


def _result(
    tested: Arranged,
    proof: Proof,
    method: Method,
    procedure: Procedure,
    cost: str | None,
    epsilons: dict[str, Any],
) -> Calibration:
    problem = tested.problem
    design = Design.of(method, procedure, epsilons["epsilon_spent"], tested.whole.k)
    return settled(
        problem,
        table_of(
            problem,
            pvalue=proof.pvalues,
            **proxies.variance_column(problem),
            certified=proof.certified,
        ),
        cost,
        outlook=partial(outlook, tested.whole, design),
        pilot=tested.pilot,
        rises=sentences.rises(problem),
        test=method.name,
        **told(procedure),
        **epsilons,
    )


def told(procedure: Procedure) -> dict[str, Any]:
    """What a calibration says of its procedure."""
    return {
        "procedure": procedure.name,
        "starts": getattr(procedure, "starts", 1),
        "preregistered": procedure.preregistered,
        "options": procedure.options,
    }
