"""Procedures as small frozen objects: in which order, at which levels, and what is then rejected."""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.fwer import rules


@dataclass(frozen=True, eq=False)
class Procedure(ABC):
    """What `riskcal.calibrate` asks of a procedure over k hypotheses; by itself the levels are those of Bonferroni.

    Examples
    --------
    >>> procedures = [riskcal.fwer.FixedSequence(), riskcal.fwer.Holm()]  # both are a Procedure
    >>> [procedure.rejected([0.03, 0.04, 0.2], 0.05).tolist() for procedure in procedures]
    [[True, True, False], [False, False, False]]
    """

    name: ClassVar[str]
    #: Whether the largest p-values are looked at first, so that no single one certifies anything by itself.
    step_up: ClassVar[bool] = False

    def arranged(self, k: int) -> NDArray[np.intp] | None:
        """The preregistered order of the k candidates; None where they stand in it."""
        order = getattr(self, "order", None)
        if order is None:
            return None
        index = _validate.as_given(order, "order")
        distinct = index.dtype.kind in "iu" and np.array_equal(
            np.sort(np.atleast_1d(index)), np.arange(k)
        )
        if not distinct:
            raise RiskcalError(
                f"order: give every row number of runs.candidates, 0 to {k - 1}, once."
            )
        return index.astype(np.intp)

    def in_order(self) -> Self:
        """The same procedure over candidates that stand in its order already."""
        given: dict[str, Any] = {"order": None} if hasattr(self, "order") else {}
        return replace(self, **given)

    def levels(self, epsilon: float, k: int) -> Floats:
        """The level (k,) at which each hypothesis is first tested: where `riskcal.pvalues.betting` is tuned."""
        return np.full(k, epsilon / k)

    def begins(self, epsilon: float, k: int) -> Floats:
        """The p-value (k,) that certifies a hypothesis before any other is; 0 for those that cannot come first.

        Where a pilot chooses the order, each of them can.
        """
        return np.full(k, epsilon / k)

    @abstractmethod
    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        """Which of the hypotheses (k,), in tested order, are rejected."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, as numbers and lists of them."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: np.asarray(value).tolist() for name, value in given.items() if value is not None
        }

    @property
    def preregistered(self) -> str | None:
        """Digest of the order, weights and transitions that were given; None if none were."""
        names, options = ("order", "weights", "transitions"), self.options
        given = [name for name in names if name in options]
        if not given:
            return None
        text = json.dumps({name: np.array(options[name], np.float64).tolist() for name in given})
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, eq=False)
class FixedSequence(Procedure):
    """In a fixed order, each until its first failure: `riskcal.fwer.fixed_sequence`.

    Parameters
    ----------
    starts : int
        Evenly spaced starting points, each at ``epsilon / starts``.
    order : sequence of int, optional
        Preregistered order of the rows of ``runs.candidates``. Default: from the highest threshold down, where candidates
        differ in nothing else.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.calibrate(runs, delta=0.1, procedure=riskcal.fwer.FixedSequence(starts=3)).threshold
    0.5
    """

    name: ClassVar[str] = "fixed_sequence"
    starts: int = 1
    order: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", _validate.count(self.starts, "starts", least=1))

    def levels(self, epsilon: float, k: int) -> Floats:
        return np.full(k, epsilon / self.starts)

    def begins(self, epsilon: float, k: int) -> Floats:
        first = np.zeros(k)
        first[np.arange(self.starts) * k // self.starts] = epsilon / self.starts
        return first

    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        return rules.fixed_sequence(pvalues, epsilon, self.starts)


@dataclass(frozen=True, eq=False)
class Bonferroni(Procedure):
    """Each at ``epsilon / k``: `riskcal.fwer.bonferroni`.

    Examples
    --------
    >>> riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1, procedure=riskcal.fwer.Bonferroni()).threshold
    0.5
    """

    name: ClassVar[str] = "bonferroni"

    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        return rules.bonferroni(pvalues, epsilon)


@dataclass(frozen=True, eq=False)
class Holm(Procedure):
    """Step-down, any dependence, no order: `riskcal.fwer.holm`.

    Examples
    --------
    >>> riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1, procedure=riskcal.fwer.Holm()).threshold
    0.5
    """

    name: ClassVar[str] = "holm"

    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        return rules.holm(pvalues, epsilon)


@dataclass(frozen=True, eq=False)
class Hochberg(Procedure):
    """Step-up, for positively dependent p-values alone: `riskcal.fwer.hochberg`.

    Examples
    --------
    >>> riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1, procedure=riskcal.fwer.Hochberg()).threshold
    0.5
    """

    name: ClassVar[str] = "hochberg"
    step_up: ClassVar[bool] = True

    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        return rules.hochberg(pvalues, epsilon)


@dataclass(frozen=True, eq=False)
class Fallback(Procedure):
    """A fixed sequence that survives a failure: `riskcal.fwer.fallback`.

    Parameters
    ----------
    weights : (k,), optional
        Shares of epsilon, in tested order; equal if not given.
    order : sequence of int, optional
        As in `FixedSequence`.

    Examples
    --------
    >>> riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1, procedure=riskcal.fwer.Fallback()).threshold
    0.5
    """

    name: ClassVar[str] = "fallback"
    weights: ArrayLike | None = None
    order: Sequence[int] | None = None

    def shares(self, k: int) -> Any:
        """The weights (k,)."""
        return np.full(k, 1 / k) if self.weights is None else self.weights

    def levels(self, epsilon: float, k: int) -> Floats:
        found = rules.initial_levels(epsilon, self.shares(k), getattr(self, "transitions", None))
        return np.where(found > 0, found, epsilon / k)

    def begins(self, epsilon: float, k: int) -> Floats:
        return epsilon * np.asarray(self.shares(k), dtype=np.float64)

    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        return rules.fallback(pvalues, epsilon, self.shares(np.size(np.asarray(pvalues))))


@dataclass(frozen=True, eq=False)
class Graphical(Fallback):
    """A graph along which levels are handed on: `riskcal.fwer.graphical`.

    Parameters
    ----------
    weights : (k,), optional
        Shares of epsilon, in tested order; equal if not given.
    order : sequence of int, optional
        As in `FixedSequence`.
    transitions : (k, k)
        Row i: which fractions of its level hypothesis i hands to the others.

    Examples
    --------
    >>> chain = np.eye(21, k=1)  # each threshold hands its level to the next
    >>> procedure = riskcal.fwer.Graphical(transitions=chain)
    >>> riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1, procedure=procedure).threshold
    0.5
    """

    name: ClassVar[str] = "graphical"
    transitions: ArrayLike | None = None

    def __post_init__(self) -> None:
        if self.transitions is None:
            raise RiskcalError(
                "transitions: the graphical procedure needs them, one row per candidate in tested order."
            )

    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        shares, edges = (
            self.shares(np.size(np.asarray(pvalues))),
            cast("ArrayLike", self.transitions),
        )
        return rules.graphical(pvalues, epsilon, shares, edges)


@dataclass(frozen=True, eq=False)
class PilotOrder(Procedure):
    """A fixed sequence over all candidates, in the order of their risk on a pilot split that is not tested.

    Parameters
    ----------
    pilot_fraction : float
        Share of the units that is set aside to choose the order.

    Examples
    --------
    >>> calibration = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1, procedure=riskcal.fwer.PilotOrder(0.1))
    >>> calibration.n, len(calibration.pilot), calibration.threshold
    (2700, 300, 0.5)
    """

    name: ClassVar[str] = "pilot_order"
    #: Whether the order depends on costs.
    looks_at_cost: ClassVar[bool] = False
    pilot_fraction: float = 0.1

    def __post_init__(self) -> None:
        share = _validate.level(self.pilot_fraction, "pilot_fraction")
        object.__setattr__(self, "pilot_fraction", share)

    def chosen(self, excess: Floats, spent: Floats) -> NDArray[np.intp]:
        """Candidates by what the pilot says of them, those furthest below their tolerances first.

        ``excess`` (k,) is the mean loss above tolerance, relative to the loss's range (of several risks the worst), ``spent``
        (k,) the mean cost.
        """
        return np.argsort(excess, kind="stable")

    def ties(self, spent: Floats) -> NDArray[np.intp]:
        """The order in which a fresh pilot prefers candidates that it finds alike."""
        return np.arange(len(spent))

    def levels(self, epsilon: float, k: int) -> Floats:
        return np.full(k, epsilon)

    def begins(self, epsilon: float, k: int) -> Floats:
        return np.full(k, epsilon)

    def rejected(self, pvalues: ArrayLike, epsilon: float) -> NDArray[np.bool_]:
        return rules.fixed_sequence(pvalues, epsilon)


@dataclass(frozen=True, eq=False)
class Pareto(PilotOrder):
    """As `PilotOrder`, over those candidates alone that none beats in both risk and cost on the pilot.

    Pareto Testing (Laufer-Goldshtein et al. 2023).

    Examples
    --------
    >>> calibration = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1, procedure=riskcal.fwer.Pareto(0.1))
    >>> calibration.n, calibration.threshold
    (2700, 0.5)
    """

    name: ClassVar[str] = "pareto"
    looks_at_cost: ClassVar[bool] = True

    def chosen(self, excess: Floats, spent: Floats) -> NDArray[np.intp]:
        order = np.lexsort((spent, excess))
        cheapest_so_far = np.minimum.accumulate(np.r_[np.inf, spent[order][:-1]])
        return order[spent[order] < cheapest_so_far]

    def ties(self, spent: Floats) -> NDArray[np.intp]:
        return np.argsort(spent, kind="stable")


#: Every procedure by its name.
BY_NAME: dict[str, type[Procedure]] = {
    kind.name: kind
    for kind in (
        FixedSequence,
        Holm,
        Bonferroni,
        Hochberg,
        Fallback,
        Graphical,
        PilotOrder,
        Pareto,
    )
}


def options_of(name: str) -> list[str]:
    """The options of a procedure."""
    return [field.name for field in fields(BY_NAME[name])]


def named(procedure: Any, **options: Any) -> Procedure:
    """The procedure of this name and these options; an object is returned as it is.

    Raises
    ------
    RiskcalError
        For an unknown name, an option that the procedure does not use, and options beside an object.
    TypeError
        For an option that no procedure has.
    """
    if isinstance(procedure, Procedure):
        refuse_options(options, f"procedure {procedure.name!r} carries its own options and")
        return procedure
    name = _validate.choice(procedure, "procedure", BY_NAME)
    own = options_of(name)
    others = {option: value for option, value in options.items() if option not in own}
    refuse_options(others, f"procedure {name!r}")
    return BY_NAME[name](**{option: options[option] for option in options if option in own})


def refuse_options(options: Mapping[str, Any], told: str) -> None:
    """Refuse an option that would change nothing; what equals its default is not counted as given."""
    for option, value in options.items():
        users = {
            name: field
            for name in BY_NAME
            for field in fields(BY_NAME[name])
            if field.name == option
        }
        if not users:
            raise TypeError(
                f"unexpected argument {option!r}: no procedure has an option of that name"
            )
        default = next(iter(users.values())).default
        plain = isinstance(value, bool | int | float | np.generic)  # what else compares as it likes
        if value is None or (plain and value == default):
            continue
        raise RiskcalError(
            f"{option}: {told} does not use it, only {' and '.join(users)}; leave it out."
        )


def pilot_size(n: int, fraction: float) -> int | None:
    """Units of a pilot of this share of n; None where it would not leave two for itself and two to test."""
    size = math.ceil(fraction * n)
    return size if size >= 2 and n - size >= 2 else None


def spent_by_attempt(epsilon: float, attempt: Any) -> float:
    """What an attempt, from 1, spends of epsilon, ``6 epsilon / (pi attempt)^2``: over all attempts that is epsilon."""
    if attempt is None:
        return epsilon
    return 6 * epsilon / (math.pi * _validate.count(attempt, "attempt", least=1)) ** 2
