"""`Calibration`: what was tested, what was certified, and the policy to deploy."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from riskcal import _showing, _validate, bounds
from riskcal._validate import Floats, RiskcalError
from riskcal.calibration.counts import bounds_of_counts
from riskcal.calibration.problem import Problem, TestedRisk, Weighting
from riskcal.policy import Asked, Certificate, ExitPolicy, Stop, ids_digest, versions
from riskcal.policy.sentences import meaning
from riskcal.pvalues.methods import BY_NAME
from riskcal.records import on_curves


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
        The certified candidate of least cost (with one coordinate and no cost named, the least strict): its row of ``table``.
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
    lower_is_stricter : bool
        Whether low thresholds are the strict ones: a request exits where its value is at most the threshold.
    asked : Asked
        What else was asked for: with the fields above all that `riskcal.verify` needs to do it again.

    Examples
    --------
    >>> calibration = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1)
    >>> print(calibration.message)
    Certified: with probability at least 0.95 over the draw of the 3000 calibration prompts, at threshold 0.45 the
    expected dissimilarity to the full model's output is at most 0.1 (observed 0.0925).
    >>> int(calibration.table["certified"].sum()), calibration.n, calibration.k
    (12, 3000, 21)
    >>> calibration.policy().save("policy.json")
    >>> axes = calibration.plot()
    """

    threshold: float
    certified: bool
    chosen: pd.Series | None
    table: pd.DataFrame
    full_costs: dict[str, float]
    _message: Callable[[], str]
    _problem: Problem
    asked: Asked
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
    weighting: Weighting = "prompts"
    max_cluster: int | None = None
    lower_is_stricter: bool = False

    @cached_property
    def message(self) -> str:
        """The outcome in plain words."""
        return self._message()

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
            If a field that is given is not what was recorded (what `riskcal.replay_traces` gave without columns of a schedule
            was replayed without one), or a column has the name of a field that one number or text
            cannot fill (``thresholds``, ``config``).
        """
        problem = self._problem
        policy = ExitPolicy.from_columns(problem.candidates, self.chosen, problem.beside, **fields)
        return policy.certified(self.certificate)

    @property
    def certificate(self) -> Certificate:
        """What was shown, as a policy carries it."""
        pvalue = (
            None
            if self.chosen is None or "pvalue" not in self.table.columns
            else float(self.chosen["pvalue"])
        )
        return Certificate(
            delta=self.delta,
            epsilon=self.epsilon,
            epsilon_spent=self.epsilon_spent,
            attempt=self.attempt,
            objective=self.objective,
            lower=self.lower,
            upper=self.upper,
            test=f"{self.test}_with_proxy" if self._problem.helped else self.test,
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
            asked=self.asked,
            versions=versions(),
        )

    @property
    def coordinates(self) -> list[str]:
        """What the candidates differ in: the threshold, and whatever else was varied."""
        return list(self._problem.coordinates)

    @property
    def costs(self) -> list[str]:
        """The recorded costs, whose means stand in the table."""
        return list(self._problem.costs)

    def plot(self, ax: Any = None, *, cost: str | None = None) -> Any:
        """Mean loss against the threshold, with delta and the certified thresholds; returns the matplotlib axes.

        For one controlled loss, and candidates that differ in their thresholds and at most one coordinate more, which has a
        curve for each of its values. The band goes up to each threshold's own upper confidence bound, the inversion of the
        test at ``epsilon_spent``: a threshold that a fixed sequence certifies has it at most at delta. It is left out where
        the mean is one of requests that stopped early or of clusters' requests, and where a proxy helped. With ``cost``, the
        mean of that recorded cost instead, ``"layers"`` or any other, beside the full model's; of candidates that differ in
        more, or in vectors of thresholds, against their mean loss.
        """
        from riskcal import plots

        others = [name for name in self.coordinates if name != "threshold"]
        if cost is not None:
            _validate.choice(cost, "cost", self.costs or ["none, since no cost was recorded"])
        if not on_curves(self.coordinates):
            return self._trade_off(cost, ax)
        form: dict[str, Any] = {
            "threshold": self.threshold,
            "lower_is_stricter": self.lower_is_stricter,
            "by": others[0] if others else None,
            "ax": ax,
        }
        table = self.table
        if others and self.chosen is not None:
            table = table.assign(chosen=table.index == self.chosen.name)
        if cost is not None:
            return plots.cost_curve(table, full=self.full_costs.get(cost), cost=cost, **form)
        if isinstance(self.delta, dict):
            raise RiskcalError(
                "plot: one curve needs one delta; plot the loss_... columns of the table instead."
            )
        risk = self._problem.risks[0]
        plain = risk.early is None and risk.pairs is None and self.max_cluster is None
        if plain and "bound" not in table and self.test in BY_NAME:
            table = table.assign(bound=self._bounds(risk))
        return plots.risk_curve(
            table,
            delta=self.delta,
            meaning=meaning(risk.name),
            of=f"{self.n} {self._problem.unit}",
            **form,
        )

    def _trade_off(self, cost: str | None, ax: Any) -> Any:
        """A cost against the loss, of candidates that no curve over thresholds shows."""
        from riskcal import plots

        if cost is None or isinstance(self.delta, dict):
            remedy = (
                ""
                if isinstance(self.delta, dict)
                else "cost= draws a recorded cost against the loss, or "
            )
            raise RiskcalError(
                f"plot: candidates differ in {', '.join(self.coordinates)}, which curves over thresholds cannot show; {remedy}"
                "plot columns of calibration.table, where calibration.chosen is the row to mark."
            )
        return plots.trade_off(
            self.table,
            cost=cost,
            delta=self.delta,
            full=self.full_costs.get(cost),
            chosen=None if self.chosen is None else self.chosen.name,  # type: ignore[arg-type]
            meaning=meaning(self._problem.risks[0].name),
            of=f"{self.n} {self._problem.unit}",
            ax=ax,
        )

    def _bounds(self, risk: TestedRisk) -> Floats:
        """Each tested candidate's own upper confidence bound (k,)."""
        bound: Any = getattr(bounds, BY_NAME[self.test].bound)
        level = {"epsilon": self.epsilon_spent}
        if self.test != "binomial":
            level |= {"lower": risk.lower, "upper": risk.upper}
        found: Floats = np.asarray(bound(risk.losses, **level))
        if self._problem.nameless and BY_NAME[self.test].walks:  # as its p-values
            found = np.maximum(found, bounds_of_counts(risk.losses, self.epsilon_spent))
        return found

    def report(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write one self-contained HTML page of it, with delta to move: see `riskcal.report.write`, whose options these are.

        Parameters
        ----------
        path : path
            Where the page goes; a file that stands there is replaced whole or not at all.
        **options
            ``traces``, ``generations`` and ``title``.
        """
        # Reports stand above calibrations in the order of modules, so that this one is found by its name.
        importlib.import_module("riskcal.report").write(path, self, **options)

    def to_frame(self) -> pd.DataFrame:
        """A copy of ``table``."""
        return self.table.copy()

    def __repr__(self) -> str:
        head = f"Calibration: {self.objective}, delta {self.delta}, epsilon {self.epsilon:g}, {self.test}, {self.procedure}"
        return f"{head}\n{self.message}\n\n{_showing.text(self._told, **self._shown)}"

    def _repr_html_(self) -> str:
        return _showing.paragraph(self.message) + _showing.html(self._told, **self._shown)

    @property
    def _told(self) -> pd.DataFrame:
        """The table without vectors that the threshold stands for."""
        named = {"thresholds", "learned"} - set(self.coordinates) if "learned" in self.table else ()
        return self.table.drop(columns=[name for name in self.table if name in named])

    @property
    def _shown(self) -> dict[str, Any]:
        """Which columns may be left out of a display, and which row is marked."""
        settings = {*map(str, self._problem.candidates), "n"} - set(self.coordinates)
        return {"settings": settings, "chosen": None if self.chosen is None else self.chosen.name}
