"""The tests as small frozen objects, which `riskcal.calibrate` takes as ``test``."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.pvalues import bernstein, bettor
from riskcal.pvalues.sums import OF_SUMS, Sums, binomial, pvalues_of, sums_of

if TYPE_CHECKING:
    from riskcal._simulation import Sample


@dataclass(frozen=True)
class Method(ABC):
    """What `riskcal.calibrate` asks of a test of H: E[L] > delta.

    A test of one's own has a ``name``, that of no other, and ``pvalues``; ``walks`` says whether it looks at the rows in the
    order given, and is tuned at a level.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> methods = [riskcal.pvalues.Betting(), riskcal.pvalues.Hoeffding()]  # both are a Method
    >>> [riskcal.calibrate(runs, delta=0.1, test=method).threshold for method in methods]
    [0.45, 0.55]
    """

    name: ClassVar[str]
    #: Whether it looks at the rows in the order given, and is tuned at a level.
    walks: ClassVar[bool] = False
    #: Whether `simulated` asks of a sample but the totals of its rows.
    of_totals_alone: ClassVar[bool] = False

    @property
    def bound(self) -> str:
        """Name of its inversion in `riskcal.bounds`: at most delta if and only if it rejects at delta."""
        return self.name

    @property
    def bounded(self) -> bool:
        """Whether `riskcal.bounds` has that inversion by its name; others are made on a grid."""
        return BY_BOUND.get(self.bound) == self

    def refuse_bounds(self, lower: float, upper: float, argument: str, said: str) -> None:  # noqa: B027
        """Refuse bounds of losses that the test is not for, if any; ``argument`` named it as ``said``."""

    @abstractmethod
    def pvalues(
        self, losses: Floats, delta: float, *, level: float, lower: float, upper: float
    ) -> Floats:
        """P-values (k,) of losses (n, k); ``level`` is where a test that is tuned is tuned."""

    def simulated(
        self,
        sample: "Sample",
        column: int,
        of: NDArray[np.intp],
        delta: float,
        level: float,
        *,
        lower: float,
        upper: float,
    ) -> Floats:
        """P-values of one column of simulated losses in the draws ``of``."""
        rows = sample.rows(column, of)
        return self.pvalues(rows, delta, level=level, lower=lower, upper=upper)


@dataclass(frozen=True)
class Betting(Method):
    """`riskcal.pvalues.betting`: the default, the most powerful but for losses of 0 or 1.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.calibrate(runs, delta=0.1, test=riskcal.pvalues.Betting()).threshold
    0.45
    """

    name: ClassVar[str] = "betting"
    walks: ClassVar[bool] = True

    def pvalues(
        self, losses: Floats, delta: float, *, level: float, lower: float, upper: float
    ) -> Floats:
        return np.atleast_1d(bettor.betting(losses, delta, level=level, lower=lower, upper=upper))


@dataclass(frozen=True)
class OfSum(Method):
    """A test that depends on the losses through their sum alone."""

    of_totals_alone: ClassVar[bool] = True

    @property
    def _of_sums(self) -> Callable[[Sums], Floats]:
        """The test itself; that of the class it comes of, if somebody gave it a name of its own."""
        names = (getattr(kind, "name", "") for kind in type(self).__mro__)
        return next(OF_SUMS[name] for name in names if name in OF_SUMS)

    def pvalues(
        self, losses: Floats, delta: float, *, level: float, lower: float, upper: float
    ) -> Floats:
        return pvalues_of(self._of_sums, sums_of(losses, delta, lower, upper))

    def of_totals(
        self, totals: Floats, n: int, delta: float, *, lower: float, upper: float
    ) -> Floats:
        """P-values of sums (any shape) of n losses."""
        sums = Sums.of(totals.ravel(), n, delta, lower, upper)
        return pvalues_of(self._of_sums, sums).reshape(totals.shape)

    def simulated(
        self,
        sample: "Sample",
        column: int,
        of: NDArray[np.intp],
        delta: float,
        level: float,
        *,
        lower: float,
        upper: float,
    ) -> Floats:
        totals = sample.totals(column)[of]
        return self.of_totals(totals, sample.n, delta, lower=lower, upper=upper)


@dataclass(frozen=True)
class ConvexOrder(OfSum):
    """`riskcal.pvalues.convex_order`: free of the rows' order.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.calibrate(runs, delta=0.1, test=riskcal.pvalues.ConvexOrder()).threshold
    0.5
    """

    name: ClassVar[str] = "convex_order"


@dataclass(frozen=True)
class HoeffdingBentkus(OfSum):
    """`riskcal.pvalues.hoeffding_bentkus`: CALM's own test.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.calibrate(runs, delta=0.1, test=riskcal.pvalues.HoeffdingBentkus()).threshold
    0.5
    """

    name: ClassVar[str] = "hoeffding_bentkus"


@dataclass(frozen=True)
class Bentkus(OfSum):
    """`riskcal.pvalues.bentkus`.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.calibrate(runs, delta=0.1, test=riskcal.pvalues.Bentkus()).threshold
    0.5
    """

    name: ClassVar[str] = "bentkus"


@dataclass(frozen=True)
class Hoeffding(OfSum):
    """`riskcal.pvalues.hoeffding`.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.calibrate(runs, delta=0.1, test=riskcal.pvalues.Hoeffding()).threshold
    0.55
    """

    name: ClassVar[str] = "hoeffding"


@dataclass(frozen=True)
class EmpiricalBernstein(Method):
    """`riskcal.pvalues.empirical_bernstein`: for large n and a small variance.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> riskcal.calibrate(runs, delta=0.1, test=riskcal.pvalues.EmpiricalBernstein()).threshold
    0.5
    """

    name: ClassVar[str] = "empirical_bernstein"
    of_totals_alone: ClassVar[bool] = True

    def pvalues(
        self, losses: Floats, delta: float, *, level: float, lower: float, upper: float
    ) -> Floats:
        p = bernstein.empirical_bernstein(losses, delta, lower=lower, upper=upper)
        return np.atleast_1d(p)

    def simulated(
        self,
        sample: "Sample",
        column: int,
        of: NDArray[np.intp],
        delta: float,
        level: float,
        *,
        lower: float,
        upper: float,
    ) -> Floats:
        n, width = sample.n, upper - lower
        totals = (sample.totals(column)[of] - n * lower) / width
        squares = sample.totals(column, power=2)[of] - 2.0 * lower * width * totals - n * lower**2
        variance = np.maximum(squares / width**2 - totals**2 / n, 0.0) / (n - 1)
        tolerated = (delta - lower) / width
        return bernstein.of_moments(totals / n, np.sqrt(variance), tolerated, n)


@dataclass(frozen=True)
class Binomial(OfSum):
    """`riskcal.pvalues.binomial`: exact, for losses of 0 or 1.

    Examples
    --------
    >>> wrong = np.repeat([[0, 1], [0, 0]], [30, 270], axis=0)  # 300 answers, of which the lower threshold spoils 30
    >>> riskcal.calibrate(wrong, thresholds=[0.9, 0.5], delta=0.1, test=riskcal.pvalues.Binomial()).threshold
    0.9
    """

    name: ClassVar[str] = "binomial"

    def pvalues(
        self, losses: Floats, delta: float, *, level: float, lower: float, upper: float
    ) -> Floats:
        self.refuse_bounds(lower, upper, "test", self.name)
        return np.atleast_1d(binomial(losses, delta))

    def of_totals(
        self, totals: Floats, n: int, delta: float, *, lower: float, upper: float
    ) -> Floats:
        self.refuse_bounds(lower, upper, "test", self.name)
        return super().of_totals(np.rint(totals), n, delta, lower=lower, upper=upper)

    @property
    def bound(self) -> str:
        return "clopper_pearson"

    def refuse_bounds(self, lower: float, upper: float, argument: str, said: str) -> None:
        if (lower, upper) != (0.0, 1.0):
            raise RiskcalError(
                f"{argument}: {said!r} is for 0/1 losses, but these lie in [{lower:g}, {upper:g}]; use betting."
            )


@dataclass(frozen=True)
class PredictableBernstein(Method):
    """`riskcal.pvalues.predictable_bernstein`: only for its bound, as `Betting` certifies more."""

    name: ClassVar[str] = "predictable_bernstein"
    walks: ClassVar[bool] = True

    def pvalues(
        self, losses: Floats, delta: float, *, level: float, lower: float, upper: float
    ) -> Floats:
        p = bernstein.predictable_bernstein(losses, delta, level=level, lower=lower, upper=upper)
        return np.atleast_1d(p)


@dataclass(frozen=True)
class Clt(Method):
    """`riskcal.pvalues.clt`: asymptotic, so that nothing may be certified by it."""

    name: ClassVar[str] = "clt"

    def pvalues(
        self, losses: Floats, delta: float, *, level: float, lower: float, upper: float
    ) -> Floats:
        return np.atleast_1d(bernstein.clt(losses, delta, lower=lower, upper=upper))


#: Every test that `riskcal.calibrate` offers, by its name.
BY_NAME: dict[str, Method] = {
    method.name: method
    for method in (
        Betting(),
        ConvexOrder(),
        HoeffdingBentkus(),
        Bentkus(),
        Hoeffding(),
        EmpiricalBernstein(),
        Binomial(),
    )
}
#: Every test that has an inversion, by the name of that bound.
BY_BOUND: dict[str, Method] = {
    method.bound: method for method in (*BY_NAME.values(), PredictableBernstein(), Clt())
}


def named(test: Any) -> Method:
    """The test of this name; an object is returned as it is.

    Raises
    ------
    RiskcalError
        For another name, an object that bears the name of another test, and the asymptotic test, by which nothing may be
        certified.
    """
    if isinstance(test, Clt):
        raise RiskcalError(
            "test: 'clt' is asymptotic, and nothing may be certified by it; use betting."
        )
    if not isinstance(test, Method):
        return BY_NAME[_validate.choice(test, "test", BY_NAME)]
    if BY_NAME.get(test.name, test) != test:
        raise RiskcalError(
            f"test: {type(test).__name__} bears the name of another test, {test.name!r}; give it one of its own."
        )
    return test


def inverted(bound: Any, argument: str) -> Method:
    """The test whose inversion is the bound of this name; an object is returned as it is."""
    if isinstance(bound, Method):
        return bound
    return BY_BOUND[_validate.choice(bound, argument, BY_BOUND)]
