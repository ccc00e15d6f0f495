"""`LearnedRisk`: from an exit's confidence to the probability that leaving there is wrong, and policies that bound it."""

import hashlib
import math
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, FiniteFloat, model_validator

from riskcal import _validate, records
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import ExitPolicy, RiskLimit
from riskcal.policy.columns import learned_columns
from riskcal.policy.fields import Frozen
from riskcal.policy.saved import Saved
from riskcal.records import Runs, Traces
from riskcal.replay import replay_traces
from riskcal.replay.replay import Costs


class RiskMap(Frozen):
    """One exit's map from confidence to risk: a staircase that falls.

    Parameters
    ----------
    confidence : list of m float
        Where each step begins, ascending.
    risk : list of m float
        The risk from there on, descending, in [0, 1]; below the first confidence it is 1.

    Examples
    --------
    >>> learned = riskcal.heads.learn_risk(riskcal.load_example("g2p-traces"))
    >>> first = learned.maps[0]  # of the first exit
    >>> bool(np.all(np.diff(first.confidence) > 0)), bool(np.all(np.diff(first.risk) < 0))
    (True, True)
    """

    confidence: tuple[FiniteFloat, ...]
    risk: tuple[FiniteFloat, ...]

    @model_validator(mode="after")
    def _staircase(self) -> Self:
        if len(self.confidence) != len(self.risk):
            raise ValueError("confidence and risk must have one entry for each step")
        if any(np.diff(self.confidence) <= 0) or any(np.diff(self.risk) >= 0):
            raise ValueError("confidences must ascend and risks descend")
        if self.risk and not 0 <= self.risk[-1] <= self.risk[0] <= 1:
            raise ValueError("risks must lie in [0, 1]")
        return self


class LearnedRisk(Saved):
    """The risk of leaving at each exit, as a function of the confidence there: what `learn_risk` makes.

    A token leaves at the first exit of a risk of at most ``max_risk``. As every map falls with the confidence, that is where its
    confidence reaches the exit's own threshold, so that `policy` gives an `riskcal.ExitPolicy` with ``thresholds``, which every
    decoder runs as it is, and one number, ``max_risk``, goes through all of them.

    Attributes
    ----------
    maps : tuple of RiskMap
        One for each exit but the last.
    layers : tuple of int
        The layers after which these exits stand.
    n_exits : int
        With the last one, the full model.
    measure : str or None
        Of the confidences.
    fit_fraction : float
        The share of all prompts, by a hash of their ids, that the maps were fitted on.
    fit_n, fit_tokens : int
        Prompts and tokens that they were fitted on.
    fit_digest : str
        Of these prompts' ids.

    Examples
    --------
    >>> learned = riskcal.heads.learn_risk(riskcal.load_example("g2p-traces"))
    >>> cautious, bold = learned.policy(0.02).thresholds, learned.policy(0.2).thresholds
    >>> all(cautious[layer] >= bold[layer] for layer in bold)
    True
    """

    called: ClassVar[str] = "learned risk"

    maps: tuple[RiskMap, ...] = Field(min_length=1)
    layers: tuple[int, ...]
    measure: str | None = None
    fit_fraction: FiniteFloat = Field(gt=0, lt=1)
    fit_n: int = Field(ge=1)
    fit_tokens: int = Field(ge=1)
    fit_digest: str

    @model_validator(mode="after")
    def _one_map_per_layer(self) -> Self:
        if len(self.layers) != len(self.maps):
            raise ValueError("layers: give one for each map")
        return self

    @property
    def n_exits(self) -> int:
        """With the last one, the full model."""
        return len(self.maps) + 1

    def digest(self) -> str:
        """BLAKE2b of the whole, 32 hexadecimal digits."""
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=16).hexdigest()

    def risk(self, confidence: ArrayLike) -> Floats:
        """Probability of being wrong, or expected loss, of each exit.

        Parameters
        ----------
        confidence : (..., L - 1) or (..., L)
            Of the exits; that of the last one, if given, is not looked at.

        Returns
        -------
        (..., L - 1)
            1 below all confidences that were seen; NaN, which is below no ``max_risk``, for a NaN.
        """
        given = _validate.as_numbers(np.asarray(confidence), "confidence")
        if given.ndim < 1 or given.shape[-1] not in (len(self.maps), self.n_exits):
            raise RiskcalError(
                f"confidence: has shape {given.shape}; the last axis must be the {len(self.maps)} exits before the last."
            )
        risks = np.empty((*given.shape[:-1], len(self.maps)))
        for exit_, own in enumerate(self.maps):
            steps = np.array([1.0, *own.risk])
            value = given[..., exit_]
            risks[..., exit_] = steps[np.searchsorted(own.confidence, value, side="right")]
            risks[..., exit_][np.isnan(value)] = math.nan
        return risks

    def thresholds(self, max_risk: float) -> Floats:
        """The least confidence of a risk of at most ``max_risk`` at each exit, (L - 1,); ``inf`` where there is none."""
        most = _validate.level(max_risk, "max_risk")
        found = np.full(len(self.maps), math.inf)
        for exit_, own in enumerate(self.maps):
            enough = np.flatnonzero(np.array(own.risk) <= most)
            if enough.size:
                found[exit_] = own.confidence[enough[0]]
        return found

    def policy(self, max_risk: float, **fields: Any) -> ExitPolicy:
        """The policy under which a token leaves where its risk is at most ``max_risk``: no certificate, to record with.

        ``policy.to_columns()`` are the columns of its rows in a table of `riskcal.Runs`, which `riskcal.calibrate` certifies.

        Parameters
        ----------
        max_risk : float
            In (0, 1).
        **fields
            Further fields of `riskcal.ExitPolicy`.

        Raises
        ------
        RiskcalError
            If no confidence at any exit has so small a risk: that is the full model.
        """
        found = self.thresholds(max_risk)
        if np.isinf(found).all():
            least = min((own.risk[-1] for own in self.maps if own.risk), default=1.0)
            raise RiskcalError(
                f"max_risk: {max_risk:g} lets no token leave at any exit, which is the full model; the least risk is {least:.3g}."
            )
        by_layer = {
            layer: float(value)
            for layer, value in zip(self.layers, found, strict=True)
            if value < math.inf
        }
        limit = RiskLimit(max_risk=max_risk, risk=self.digest(), fit_fraction=self.fit_fraction)
        given = {"measure": self.measure} | fields
        return ExitPolicy(thresholds=by_layer, learned=limit, **given)

    def fitted_on(self, prompts: ArrayLike) -> NDArray[np.bool_]:
        """Which of these prompts (n,) belong to the share that the maps were fitted on."""
        return records.fitted_on(prompts, self.fit_fraction)

    def rest(self, traces: Traces) -> Traces:
        """The traces without the prompts that the maps were fitted on."""
        return _of_rows(traces, ~self.fitted_on(traces.prompt))

    def replay(
        self,
        traces: Traces,
        max_risks: ArrayLike,
        *,
        exact: bool = False,
        costs: Costs | None = None,
    ) -> Runs:
        """What each ``max_risk`` would have done to the prompts that the maps were not fitted on; see `riskcal.replay_traces`.

        Parameters
        ----------
        traces : Traces
            Prompts of the fit among them are left out.
        max_risks : (k,)
            The candidates, fixed beforehand. Those between which no exit changes are one, named by the smallest of them; those
            at which no token leaves are the full model, which is no candidate.
        exact, costs
            As in `riskcal.replay_traces`.

        Returns
        -------
        Runs
            A candidate's ``threshold`` is ``1 - max_risk``, which orders them as any threshold does: thresholds at all exits rise
            with it, so that `riskcal.calibrate` goes down from the strictest.
        """
        grid = np.unique(_validate.array(max_risks, "max_risks", ndim=(0, 1)))
        if traces.lengths is not None or traces.n_layers != self.n_exits:
            raise RiskcalError(
                f"traces: have {traces.n_layers} exits, or rows of unequal numbers; the risk was learned of {self.n_exits}."
            )
        vectors: dict[bytes, float] = {}
        for value in grid.tolist():
            found = self.thresholds(value)
            if np.isfinite(found).any():
                vectors.setdefault(found.tobytes(), value)
        if not vectors:
            self.policy(float(grid[-1]))  # says which is the least risk
        chosen = list(vectors.values())
        runs = replay_traces(
            self.rest(traces),
            [self.thresholds(value) for value in chosen],
            exact=exact,
            costs=costs,
        )
        rows = pd.DataFrame([learned_columns(self.policy(value)) for value in chosen])
        rows = rows.assign(min_layer=1)
        if self.measure is not None:
            rows = rows.assign(measure=self.measure)
        return replace(runs, candidates=rows).in_content_order()


def _of_rows(traces: Traces, kept: NDArray[np.bool_]) -> Traces:
    """Some rows of traces of equally many exits."""
    shape = traces.confidence.shape
    some: dict[str, Any] = {
        name: None if (value := getattr(traces, name)) is None else value[kept]
        for name in ("prompt", "position", "confidence", "agrees", "loss", "group")
    }
    spent = {
        name: value[kept] if value.shape == shape else value for name, value in traces.costs.items()
    }
    labels = {name: label[kept] for name, label in traces.labels.items()}
    return replace(traces, **some, costs=spent, labels=labels)
