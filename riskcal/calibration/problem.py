"""What a calibration tests: losses of units in tested order, with candidates and costs; see `riskcal.calibration.posing`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate, records
from riskcal._validate import Floats, RiskcalError
from riskcal.fwer.procedures import pilot_size
from riskcal.policy import Constant, Stop
from riskcal.policy.sentences import as_text
from riskcal.pvalues.proxies import Paired

#: What the certified mean is taken over: prompts, clusters that count alike, or the requests of clusters.
Weighting = Literal["prompts", "clusters", "requests"]


class TestedRisk(NamedTuple):
    """One controlled loss: (n, k), rows in tested order, columns as the candidates stand, its tolerance and its known bounds."""

    name: str
    losses: Floats
    delta: float
    lower: float
    upper: float
    early: Floats | None = None  # (n, k) which rows count at all: those that stopped early
    is_cost: bool = False  # a budget's, which falls with the threshold
    pairs: Paired | None = None  # what a proxy says of each unit, and of unlabelled ones

    @property
    def width(self) -> float:
        """Of the losses' range."""
        return self.upper - self.lower

    def sliced(self, rows: Any = slice(None), columns: Any = slice(None)) -> Self:
        """The same risk on some units and candidates."""
        losses = np.ascontiguousarray(self.losses[rows][:, columns])
        early = None if self.early is None else self.early[rows][:, columns]
        pairs = None if self.pairs is None else self.pairs.sliced(rows, columns)
        return self._replace(losses=losses, early=early, pairs=pairs)


@dataclass(frozen=True, eq=False)
class Problem:
    """Risks over the same units and candidates, with what each candidate costs each unit."""

    risks: tuple[TestedRisk, ...]
    candidates: pd.DataFrame
    costs: Mapping[str, Floats]
    full: Mapping[str, Floats]  # (n,) each: what the full model costs each unit
    units: NDArray[Any]
    unit: str  # what a row is, in the plural
    digest: str
    stopped: Stop | None = None  # why lower thresholds were never run
    weighting: Weighting = "prompts"  # what the mean is taken over
    sizes: NDArray[np.intp] | None = None  # requests of each unit, where these count
    max_cluster: int | None = None
    lower_is_stricter: bool = False  # of thresholds
    uneven: bool = False  # rows that were averaged within units differ in number
    group: str | None = None  # of all prompts, where they are of one stratum
    nameless: bool = False  # units have but numbers, and may have been sorted by outcome
    replayed: bool = (
        False  # by `replay_traces`: with a schedule only if the candidates' columns hold one
    )

    @property
    def n(self) -> int:
        """Independent units."""
        return len(self.units)

    @property
    def k(self) -> int:
        """Candidates, the full model not counted."""
        return len(self.candidates)

    @cached_property
    def coordinates(self) -> list[str]:
        """What candidates differ in; the threshold, if there is but one candidate."""
        return records.varying(self.candidates)

    @property
    def several_coordinates(self) -> bool:
        """Whether candidates differ in anything but their thresholds, which alone have an order that is known beforehand."""
        return self.coordinates != ["threshold"]

    @property
    def helped(self) -> bool:
        """Whether a proxy helps the test."""
        return any(risk.pairs is not None for risk in self.risks)

    @property
    def from_the_top(self) -> bool:
        """Whether the strictest threshold is the safest: not where few stop early there, or where it costs the most."""
        plain_losses = all(risk.early is None and not risk.is_cost for risk in self.risks)
        return plain_losses and not self.several_coordinates

    @property
    def strictness(self) -> Floats:
        """Thresholds (k,), negated where low ones are the strict ones: the higher, the stricter."""
        thresholds = self.candidates["threshold"].to_numpy(dtype=np.float64)
        return -thresholds if self.lower_is_stricter else thresholds

    @property
    def beside(self) -> dict[str, Any]:
        """Fields of a candidate's policy that hold where no column of it says otherwise."""
        constant = {"schedule": Constant()} if self.replayed else {}
        return {"lower_is_stricter": self.lower_is_stricter, **constant}

    @property
    def full_costs(self) -> dict[str, float]:
        """The full model's mean costs, over these units as the candidates' are."""
        return {name: float(cost.mean()) for name, cost in self.full.items()}

    def mean(self, risk: TestedRisk) -> Floats:
        """Each candidate's observed mean loss (k,), over what it is certified for; NaN where that is nothing."""
        if risk.early is None and (self.sizes is None or self.max_cluster is None):
            return np.asarray(risk.losses.mean(0))
        above = (risk.losses - risk.delta).sum(0)
        if risk.early is not None:
            counted = risk.early.sum(0)
        elif self.sizes is not None and self.max_cluster is not None:
            counted = np.full(self.k, self.sizes.sum() / self.max_cluster)
        some = counted > 0
        mean = np.full(self.k, math.nan)
        mean[some] = risk.delta + above[some] / counted[some]
        # what is near a bound of the losses but for rounding is at it
        return np.where(
            np.abs(mean - risk.lower) <= _validate.TOLERANCE * risk.width, risk.lower, mean
        )

    def name(self, candidate: int) -> str:
        """A candidate, as messages name it: what it is in each coordinate."""
        row = self.candidates.iloc[candidate]
        return ", ".join(f"{name} {as_text(row[name])}" for name in self.coordinates)

    def rows(self, which: slice | NDArray[np.intp]) -> Self:
        """The same problem on some of the units."""
        sizes = None if self.sizes is None else self.sizes[which]
        # where requests count, costs stand weighted by size over the mean size, which these units have another of
        again = 1.0 if self.sizes is None or sizes is None else self.sizes.mean() / sizes.mean()
        return replace(
            self,
            risks=tuple(risk.sliced(rows=which) for risk in self.risks),
            costs={name: cost[which] * again for name, cost in self.costs.items()},
            full={name: cost[which] * again for name, cost in self.full.items()},
            units=self.units[which],
            sizes=sizes,
        )

    def at(self, delta: float) -> Self:
        """The same problem at another delta."""
        return replace(self, risks=tuple(risk._replace(delta=delta) for risk in self.risks))

    def columns(self, which: NDArray[np.intp]) -> Self:
        """The same problem on some of the candidates, in this order."""
        return replace(
            self,
            risks=tuple(risk.sliced(columns=which) for risk in self.risks),
            candidates=self.candidates.iloc[which].reset_index(drop=True),
            costs={name: cost[:, which] for name, cost in self.costs.items()},
        )


def split_pilot(problem: Problem, fraction: float) -> tuple[Problem, Problem]:
    """The first units in tested order as a pilot, whose losses may choose an order, and the rest, which are tested."""
    size = pilot_size(problem.n, fraction)
    if size is None:
        aside = math.ceil(fraction * problem.n)
        raise RiskcalError(
            f"pilot_fraction: {fraction:g} of {problem.n} {problem.unit} leaves {aside} for the pilot and "
            f"{problem.n - aside} for the test; each needs at least two."
        )
    return problem.rows(slice(None, size)), problem.rows(slice(size, None))


def excess(pilot: Problem) -> Floats:
    """Mean loss above tolerance, relative to the loss's range; of several risks the worst."""
    worst: Floats = np.max(
        [(pilot.mean(risk) - risk.delta) / risk.width for risk in pilot.risks], axis=0
    )
    return worst


#: What is minimised among candidates that differ in several coordinates where nobody said what.
CUSTOMARY = "layers"


def minimised(problem: Problem, cost: str | None) -> str | None:
    """The cost that chooses; None where the most lenient candidate is chosen: with one coordinate and no word of a cost."""
    return CUSTOMARY if cost is None and problem.several_coordinates else cost


def refuse_unknown_cost(problem: Problem, cost: str | None) -> None:
    """Refuse to choose by a cost that was not recorded."""
    if not isinstance(cost, str | None):
        raise RiskcalError(f"cost: {_validate.shown(cost)} is no name; give that of one cost.")
    name = minimised(problem, cost)
    if name is not None and name not in problem.costs:
        raise RiskcalError(
            f"cost: {name!r} was not recorded; there is {', '.join(problem.costs) or 'none'}. Choosing "
            + (
                "among several coordinates needs one."
                if problem.several_coordinates
                else "by it needs it; without cost= the least strict threshold is chosen."
            )
        )


def spending(problem: Problem, cost: str | None) -> Floats:
    """What is minimised among certified candidates (k,): the mean cost that chooses, or strictness."""
    refuse_unknown_cost(problem, cost)
    name = minimised(problem, cost)
    return problem.strictness if name is None else np.asarray(problem.costs[name].mean(0))


def weighed(problem: Problem, cost: str | None) -> Floats:
    """What a Pareto front weighs against the risk (k,): a mean cost; strictness where none was named and no layers recorded."""
    name = CUSTOMARY if cost is None and CUSTOMARY in problem.costs else cost
    return spending(problem, name)
