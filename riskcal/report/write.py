"""`write`: one page from runs, traces, a calibration, a policy or an event log."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.calibration import Calibration, calibrate
from riskcal.calibration.posing import pose
from riskcal.calibration.problem import Problem
from riskcal.fwer import procedures
from riskcal.policy import ExitPolicy, versions
from riskcal.pvalues import BY_NAME
from riskcal.records import Runs, Traces
from riskcal.report import choices, curves, exits, generations, splits
from riskcal.report.choices import Choices
from riskcal.report.events import of_events
from riskcal.report.guarantee import guarantee, of_policy
from riskcal.report.html import joined, tag
from riskcal.report.page import LARGEST, page
from riskcal.report.sections import Section
from riskcal.serving.watch import EventWatch

#: A delta that a page begins with where none was fixed beforehand and a problem has to be posed at one.
_ANY = 0.1


def write(
    path: str | os.PathLike[str],
    source: Runs | Traces | Calibration | ExitPolicy | EventWatch,
    *,
    traces: Traces | None = None,
    generations: Any = None,
    title: str | None = None,
    **options: Any,
) -> None:
    """Write one self-contained HTML page, of less than 3 MB, that loads nothing.

    Parameters
    ----------
    path : path
        Where the page goes; a file that stands there is replaced whole or not at all.
    source : Runs, Traces, Calibration, ExitPolicy or `riskcal.serving.EventWatch`
        Of runs and calibrations the page has the guarantee with its assumptions, a slider that shows for every delta what is
        certified, what it costs and how fast it is (by bounds that hold for all of them at once), the risk curve, repeated
        splits and costs. Of a policy what its certificate says, of traces where tokens leave and what each head's confidence
        is worth, of a watch that has read an event log its verdict, losses and exits.
    traces : Traces, optional
        With runs or a calibration: of the same decoder, for exits by group and the heads' confidence.
    generations : table, optional
        With runs, traces or a calibration: columns ``prompt``, ``threshold`` (``inf`` for the full model), ``tokens`` (a list of
        pieces of text) and ``exit_layers`` (a list of as many layers); optionally ``text``, the prompt.
    title : str, optional
        Of the page.
    **options
        With runs: ``delta``, fixed beforehand and calibrated as `riskcal.calibrate` does, or left out, so that all of epsilon
        goes to the slider; and ``epsilon``, ``objective``, ``test``, ``attempt`` and ``cost`` as there. With traces:
        ``threshold``, or a ``policy``, at which exits are counted; by default three thresholds in the midst of the confidences.

    Raises
    ------
    RiskcalError
        For what `riskcal.calibrate` refuses, options that the source does not use, and a page that would be too large.

    Notes
    -----
    The guarantee (delta fixed beforehand) and the slider (every delta at once) are separate statements, each with its own
    epsilon. The same input gives the same bytes.

    Examples
    --------
    >>> from pathlib import Path
    >>> from riskcal import report
    >>> report.write("report.html", riskcal.load_example("g2p-traces"), title="Where tokens leave")
    >>> Path("report.html").stat().st_size < 3e6
    True
    """
    extra: dict[str, Any] = {"traces": traces, "generations": generations}
    if isinstance(source, Runs):
        about, sections = _of_runs(source, **extra, **_only(options, RUNS))
    elif isinstance(source, Calibration):
        _only(options, ())
        about, sections = _of_calibration(source, **extra)
    elif isinstance(source, Traces):
        _only({"traces": traces} if traces is not None else {}, ())
        about, sections = _of_traces(source, generations, **_only(options, ("threshold", "policy")))
    elif isinstance(source, ExitPolicy | EventWatch):
        _only({name: one for name, one in extra.items() if one is not None} | options, ())
        if isinstance(source, ExitPolicy):
            about = (
                f"A policy {'without a' if source.certificate is None else 'and its'} certificate"
            )
            sections = of_policy(source)
        else:
            about, sections = "An event log", of_events(source)
    else:
        raise RiskcalError(
            f"source: {type(source).__name__} is none of Runs, Traces, Calibration, ExitPolicy and EventWatch; read a file "
            "first, with Runs.read or Traces.read."
        )
    footer = (
        f"Made with riskcal {versions()['riskcal-ltt']}. This page loads nothing and sends nothing."
    )
    whole = page(title or _title(source), about, sections, footer).encode("utf-8")
    if len(whole) >= LARGEST:
        raise RiskcalError(
            f"report: the page would have {len(whole):,} bytes, more than {LARGEST:,}; shorten the texts, or name fewer groups."
        )
    with _replacing.replacing(path) as partial:
        Path(partial).write_bytes(whole)


def _title(source: Any) -> str:
    """What a page without a title of its own is of; only runs and their calibrations are calibrated here."""
    if isinstance(source, Traces):
        return "Early exit, traced"
    if isinstance(source, ExitPolicy):
        return "Early-exit policy"
    return "Early exit, served" if isinstance(source, EventWatch) else "Early exit, calibrated"


RUNS = ("delta", "epsilon", "objective", "test", "attempt", "cost")


def _only(options: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    for name in options:
        if name not in known:
            raise RiskcalError(
                f"{name}: is not used for this source; "
                + (f"there are {', '.join(known)}." if known else "leave it out.")
            )
    return dict(options)


def _of_runs(
    runs: Runs,
    *,
    traces: Traces | None,
    generations: Any,
    delta: float | None = None,
    epsilon: float = 0.05,
    objective: str = "textual",
    test: str = "betting",
    attempt: int | None = None,
    cost: str | None = None,
) -> tuple[str, list[Section]]:
    settings: dict[str, Any] = {"objective": objective, "test": test, "cost": cost}
    if delta is not None:
        calibration = calibrate(runs, delta=delta, epsilon=epsilon, attempt=attempt, **settings)
        return _of_calibration(calibration, traces=traces, generations=generations, runs=runs)
    level = _validate.level(epsilon, "epsilon")
    told = {
        "epsilon": level,
        "epsilon_spent": procedures.spent_by_attempt(level, attempt),
        "attempt": attempt,
    }
    problem = pose(runs, _ANY, objective)
    every = choices.choices(problem, test, cost, told, None)
    now = every.calibrations[every.step]
    opening = (
        f"At delta {now.delta:g}, where the slider begins: {now.message}"
        if now.certified
        else now.message
    )
    sections = [
        guarantee(opening, now.certificate, certified=now.certified),
        *_sections(problem, None, every, test, told, cost),
        *_shown(runs, now, traces, generations),
    ]
    return _about(problem), sections


def _of_calibration(
    calibration: Calibration, *, traces: Traces | None, generations: Any, runs: Runs | None = None
) -> tuple[str, list[Section]]:
    problem, cost = calibration._problem, calibration.asked.wanted_cost
    told = {
        "epsilon": calibration.epsilon,
        "epsilon_spent": calibration.epsilon_spent,
        "attempt": calibration.attempt,
    }
    delta = None if isinstance(calibration.delta, dict) else calibration.delta
    why = None
    try:
        if calibration.test not in BY_NAME:
            raise RiskcalError(f"test: {calibration.test!r} is known here by its name alone")
        every = choices.choices(problem, calibration.test, cost, told, delta)
    except RiskcalError as error:  # no bounds could hold together here: their own words say why
        what, _, said = str(error).removesuffix("; give one.").removesuffix(".").partition(": ")
        every, why = None, f"{what} {said}" if what == "weighting" else said
    sections = [
        guarantee(calibration.message, calibration.certificate, certified=calibration.certified),
        *_sections(problem, calibration, every, calibration.test, told, cost, why),
        *_shown(runs, calibration, traces, generations, every),
    ]
    return _about(problem), sections


def _about(problem: Problem) -> str:
    return f"{problem.n:,} {problem.unit}, {problem.k} candidates; records {problem.digest}"


def _sections(
    problem: Problem,
    calibration: Calibration | None,
    every: Choices | None,
    test: str,
    told: dict[str, Any],
    cost: str | None,
    why: str | None = None,
) -> list[Section]:
    """What losses and costs alone say."""
    fixed = (
        None if calibration is None or isinstance(calibration.delta, dict) else calibration.delta
    )
    if every is None:
        first = [
            Section(
                "delta",
                "What each delta would buy",
                joined([tag("p", f"There is no slider here: {why}.")]),
            )
        ]
    else:
        first = [choices.section(every, problem.full_costs, fixed=fixed)]
    return [
        *first,
        *curves.section(problem, calibration, every),
        *splits.section(problem, test, told["epsilon_spent"], cost, fixed),
    ]


def _shown(
    runs: Runs | None,
    calibration: Calibration,
    traces: Traces | None,
    given: Any,
    every: Choices | None = None,
) -> list[Section]:
    """What records of tokens say beside: generations, which the slider moves, exits by group, heads."""
    threshold, sections = calibration.threshold, []
    if given is not None:
        seen = threshold if every is None else every.calibrations[every.step].threshold
        sections = [generations.section(given, seen)]
    if traces is not None:
        if not math.isfinite(threshold):  # of the full model there is nothing to count
            grid, lower = calibration.table["threshold"], calibration.lower_is_stricter
            threshold = float(grid.min() if lower else grid.max())
        groups = {}
        if runs is not None and "group" in runs.labels:
            groups = dict(zip(runs.prompts.tolist(), runs.labels["group"].tolist(), strict=True))
        strictest = ExitPolicy(threshold=threshold, lower_is_stricter=calibration.lower_is_stricter)
        at = calibration.policy() if calibration.certified else strictest
        told = calibration.certified or calibration.coordinates == ["threshold"]
        if told and not at.coordinates:  # what these mean for exits, riskcal does not know
            sections.append(exits.of_traces(traces, at, groups))
        sections.append(exits.reliability(traces))
    elif runs is not None and calibration.chosen is not None:
        where = (runs.candidates == calibration.chosen[runs.candidates.columns]).all(axis=1)
        sections += exits.of_runs(runs, int(where.to_numpy().argmax()))
    return sections


def _of_traces(
    traces: Traces,
    given: Any,
    *,
    threshold: float | None = None,
    policy: ExitPolicy | None = None,
) -> tuple[str, list[Section]]:
    if threshold is not None and policy is not None:
        raise RiskcalError("threshold: stands in the policy as well; give one of the two.")
    if threshold is not None:
        policy = ExitPolicy(threshold=_validate.number(threshold, "threshold"))
    sections = [exits.of_traces(traces, policy, {}), exits.reliability(traces)]
    if given is not None:
        at = None if policy is None else policy.threshold
        sections.append(generations.section(given, at))
    return f"{traces}. Traces certify nothing: that takes runs", sections
