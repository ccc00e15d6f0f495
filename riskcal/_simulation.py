"""Samples drawn from a stated law, and the smallest sample that does what is asked in a given share of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from riskcal._validate import Floats

#: The largest sample that is looked for: beyond any calibration set.
LARGEST = 2**20
#: The most rows that a test which walks along them is simulated on, and the most where events are so rare that this many
#: hold fewer than `_EVENTS`; larger samples are mapped to fewer rows.
_ROWS, _ROWS_OF_RARE, _EVENTS = 2**14, 2**17, 400
#: Draws per size: at 2,000 the share of those that certify has a standard error of .009, at 250 of .025.
_DRAWS = (250, 2000)
#: Entries that are held at a time.
_CHUNK = 2**21


@dataclass(frozen=True)
class Law:
    """Rows of ``values`` (1 + m, c): the first with probability ``1 - share``, each of the others with ``share / m``."""

    values: Floats
    share: float

    @property
    def mean(self) -> Floats:
        usual, others = self.values[0], self.values[1:].mean(0)
        result: Floats = usual + self.share * (others - usual)
        return result

    @property
    def deviation(self) -> Floats:
        squares = (self.values - self.mean) ** 2
        result: Floats = np.sqrt((1.0 - self.share) * squares[0] + self.share * squares[1:].mean(0))
        return result

    def samples(
        self, n: int, *, pilot: int = 0, ordered: bool
    ) -> "list[tuple[Sample | None, Sample]]":
        """Samples of n rows, the first ``pilot`` of them by themselves, in parts that fit into memory.

        If not ``ordered``, perhaps only how often each row came is drawn. The same for the same n. If all rows are alike,
        a single sample says all.
        """
        m = len(self.values) - 1
        ordered = ordered or n < 20 * m  # a category's count takes as long to draw as 20 rows
        entries = n if ordered else m
        draws = 1 if self.share == 0.0 else int(np.clip(4 * _CHUNK // entries, *_DRAWS))
        size, rng = max(1, _CHUNK // entries), np.random.default_rng(0)
        result: list[tuple[Sample | None, Sample]] = []
        for first in range(0, draws, size):
            of = min(size, draws - first)
            chooses = self._sample(pilot, of, ordered, rng) if pilot else None
            result.append((chooses, self._sample(n - pilot, of, ordered, rng)))
        return result

    def _sample(self, n: int, draws: int, ordered: bool, rng: np.random.Generator) -> "Sample":
        m = len(self.values) - 1
        if not ordered:
            others = rng.binomial(n, self.share, size=draws)
            counts = rng.multinomial(others, np.full(m, 1.0 / m))
            return Sample(
                self.values, n, np.column_stack([n - others, counts]).astype(np.float64), ordered
            )
        which = rng.integers(
            1, m + 1, size=(n, draws), dtype=np.uint16 if m < 2**16 - 1 else np.uint32
        )
        if self.share < 1.0:
            which *= rng.random((n, draws), dtype=np.float32) < self.share
        return Sample(self.values, n, which, ordered)


class Sample(NamedTuple):
    """Draws of n rows of ``values``: which came when (n, draws), or, if not ``ordered``, how often (draws, 1 + m)."""

    values: Floats
    n: int
    drawn: NDArray[Any]
    ordered: bool

    @property
    def draws(self) -> int:
        return int(self.drawn.shape[1 if self.ordered else 0])

    def rows(self, column: int, of: NDArray[np.intp]) -> Floats:
        """One column's losses, (n, len(of)), in the draws ``of`` of an ordered sample."""
        which = self.drawn if len(of) == self.draws else self.drawn[:, of]
        losses: Floats = np.ascontiguousarray(self.values[:, column])[which]
        return losses

    def totals(self, column: int, *, power: int = 1) -> Floats:
        """Sums over the rows of one column's losses to this power, (draws,)."""
        values = self.values[:, column] ** power
        total: Floats = (
            np.sum(values[self.drawn], axis=0) if self.ordered else np.asarray(self.drawn @ values)
        )
        return total


def of_rows(rows: Floats) -> Law:
    """The law of drawing from observed ``rows`` (N, c), each alike; the most frequent one comes first if most rows are it."""
    distinct, where, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    usual = int(counts.argmax())
    others = rows[where.ravel() != usual]
    if not len(others):
        return Law(np.concatenate([distinct, distinct]), 0.0)
    if 2 * counts[usual] < len(rows):
        return Law(np.concatenate([rows[:1], rows]), 1.0)
    return Law(np.concatenate([distinct[usual : usual + 1], others]), len(others) / len(rows))


def of_moments(mean: float, deviation: float, *, bins: int = 4096) -> Law:
    """The beta law of this mean and standard deviation on the unit interval; 0 and 1 alone where that is the widest.

    The part above a tenth of the mean is cut into bins of equal probability, each standing at its own mean, and the part
    below is one more.
    """
    widest = mean * (1.0 - mean)
    if deviation**2 >= widest * (1.0 - 1e-6):
        return Law(np.array([[0.0], [1.0]]), mean)
    if deviation**2 <= widest * 1e-9:
        return Law(np.full((2, 1), mean), 0.0)
    both = widest / deviation**2 - 1.0
    a, b = mean * both, (1.0 - mean) * both
    share = float(special.betaincc(a, b, 0.1 * mean))
    edges = special.betainccinv(a, b, share * np.arange(bins + 1) / bins)
    edges[0] = 1.0
    above = mean * special.betaincc(a + 1.0, b, edges)  # the mean's part from each edge up
    usual = (mean - above[-1]) / (1.0 - share) if share < 1.0 else 0.0
    # next to 1, edges coincide
    inside = np.clip(np.diff(above) * bins / share, edges[1:], edges[:-1])
    return Law(np.append(usual, inside)[:, None], share)


def scaled(law: Law, delta: Floats, n: int, upper: Floats) -> tuple[Law, Floats, int]:
    """A smaller problem on which a test that walks along the rows has nearly the same power.

    Down to `_ROWS`, or what holds `_EVENTS` rows other than the usual one, delta is moved away from the mean as
    ``1 / sqrt(n)``: the walk keeps its drift over its spread (the limit of a Brownian motion). Where that leaves more than
    `_ROWS_OF_RARE`, the rare rows are made f times as frequent, ``delta`` (c,) f times as far from the usual row, and n f
    times smaller: as many events meet the same excess (Poisson's limit).
    """
    if n <= _ROWS:
        return law, delta, n
    usual = law.values[0]
    below = usual < delta
    gap = float(np.max((delta - usual)[below] / (upper - usual)[below], initial=0.0))
    f = min(n, _EVENTS / max(law.share, 1e-300)) / _ROWS_OF_RARE
    if f > 1.0 and law.share > 0.0 and gap > 0.0:
        f = max(1.0, min(f, 0.05 / law.share, 0.1 / gap))
        law, delta, n = (
            replace(law, share=law.share * f),
            usual + f * (delta - usual),
            math.ceil(n / f),
        )
    rows = max(_ROWS, math.ceil(_EVENTS / law.share)) if law.share > 0.0 else n
    if n <= rows:
        return law, delta, n
    moved = law.mean + (delta - law.mean) * math.sqrt(n / rows)
    # beyond half way the power is 1 in any case
    return law, np.minimum(moved, 0.5 * (delta + upper)), rows


def smallest(
    share: Callable[[int], float], wanted: float, guess: float
) -> tuple[int, float] | None:
    """The smallest n, to about 1%, of which ``share(n)`` is ``wanted``, and its share; None beyond `LARGEST`.

    The share is taken to grow with n, by and large. Where it jumps, the side of the jump is taken that is nearer to what
    is wanted.
    """
    low, high = 1, LARGEST + 1  # one unit is never enough
    share_low, share_high = 0.0, math.nan
    n = int(np.clip(guess, 2, LARGEST)) if math.isfinite(guess) else LARGEST
    while high - low > max(1, high // 100):
        here = share(n)
        if abs(here - wanted) <= 0.01:
            return n, here
        if here >= wanted:
            high, share_high = n, here
        elif n == LARGEST:
            return None
        else:
            low, share_low = n, here
        if high > LARGEST:
            n = min(2 * n, LARGEST)
        elif low == 1 and high > 4:
            n = high // 2
        else:
            z_low, aim, z_high = special.ndtri(
                np.clip([share_low, wanted, share_high], 0.001, 0.999)
            )
            place = float(np.clip((aim - z_low) / (z_high - z_low), 0.1, 0.9))
            n = int(np.clip(round(low * (high / low) ** place), low + 1, high - 1))
    return (low, share_low) if wanted - share_low < share_high - wanted else (high, share_high)


def smallest_fitted(
    share: Callable[[int, int, int], float], wanted: float, guess: float, largest: int
) -> int | None:
    """As `smallest`, where a draw is dear: few draws, ``share(n, draws, seed)``, at each of many sizes.

    A logistic curve in log n is fitted to all of them, and the next size is where it has the share that is wanted. Some 300
    draws near there place the share to about .03, or, where it is steep, the size to a few hundredths.
    """
    tried: list[float] = []
    found: list[float] = []
    draws = 30
    x, last = math.log(min(max(guess, 2.0), largest)), math.log(largest)
    while len(tried) < 12 or not min(found) < wanted <= max(found):
        n = min(round(math.exp(x)), largest)
        tried.append(math.log(n))
        found.append(share(n, draws, len(tried)))
        if (found[-1] < wanted and n == largest) or (found[-1] >= wanted and n <= 2):
            break
        if min(found) >= wanted or max(found) < wanted:  # all too large, or all too small
            x = min(max(x + math.copysign(0.4, wanted - found[-1]), math.log(2.0)), last)
        else:
            x = _crossing(np.array(tried), np.array(found), wanted)
    return None if max(found) < wanted else math.ceil(math.exp(x))


def _crossing(x: Floats, share: Floats, wanted: float) -> float:
    """Where the likeliest logistic curve through shares of equally many draws at ``x`` (m,) has the share wanted."""
    place = np.linspace(x.min(), x.max(), 201)[:, None, None]
    slope = 2.0 ** np.arange(8)[:, None]
    logit = special.logit(wanted) + slope * (x - place)
    likelihood = (share * special.log_expit(logit) + (1.0 - share) * special.log_expit(-logit)).sum(
        -1
    )
    return float(place[np.unravel_index(likelihood.argmax(), likelihood.shape)[0], 0, 0])
