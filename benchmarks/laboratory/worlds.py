"""The worlds: populations of prompts whose expected losses are known.

A world draws losses (n, k) of independent prompts under k candidates, from the safest (first) to the cheapest (last), and
knows each candidate's expected loss and what it saves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

from riskcal import RiskcalError, internal, records
from riskcal.internal import Floats
from riskcal.records import Runs

#: How far above delta the candidates stand that are meant to lie on the border: to be certified there is an error.
_JUST_ABOVE = 1.0 + 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class World:
    """A population of prompts with known expected losses.

    Attributes
    ----------
    name : str
    thresholds : (k,)
        Descending.
    risk : (k,)
        Expected loss of each candidate.
    saving : (k,)
        What each candidate saves, as a share of the full model's cost; not falling along the candidates.
    delta : float
        The tolerance that the world is about: in the worlds for `validity`, just below the risk of a candidate.
    losses_at : callable
        Losses (n, k) of n prompts that are described by uniform numbers (n, ``width``).
    width : int
        Uniform numbers per prompt. With one, all candidates' losses are functions of the same number.
    lower, upper : float
        Bounds of the losses.
    """

    name: str
    thresholds: Floats
    risk: Floats
    saving: Floats
    delta: float
    losses_at: Callable[[Floats], Floats]
    width: int = 1
    lower: float = 0.0
    upper: float = 1.0

    def __post_init__(self) -> None:
        internal.tolerance(self.delta, self.lower, self.upper)
        # a comparison with NaN would count every violation as none
        internal.finite(self.risk, "risk")

    @property
    def k(self) -> int:
        """Candidates."""
        return self.risk.size

    def sample(self, n: int, rng: np.random.Generator) -> Floats:
        """Losses (n, k) of n independent prompts."""
        return self.losses_at(rng.random((n, self.width)))

    def sample_many(self, n: int, draws: int, rng: np.random.Generator) -> Floats:
        """Independent samples of n prompts side by side, (n, draws * k), so that one call tests them all."""
        return self.losses_at(rng.random((n * draws, self.width))).reshape(n, draws * self.k)

    def oracle(self, delta: float | None = None) -> float:
        """The largest saving whose expected loss is at most delta; 0, the full model's, if there is none."""
        valid = self.risk <= (self.delta if delta is None else internal.number(delta, "delta"))
        return float(self.saving[valid].max(initial=0.0))

    def __repr__(self) -> str:
        return f"World {self.name!r}: {self.k} candidates, losses in [{self.lower:g}, {self.upper:g}], delta {self.delta:g}"


def steady(k: int = 20, *, delta: float = 0.1) -> World:
    """Mostly zero losses whose expectation rises steadily, ``.35 (1 - threshold)^1.5``; the standard world for efficiency.

    A loss is 0, or Beta(2, 3) with the probability that gives the mean. All candidates' losses are functions of one number
    per prompt, and never fall as the threshold falls. A candidate saves ``.7 (1 - threshold^.8)``.
    """
    k = internal.count(k, "k", least=2)
    thresholds = np.linspace(1.0 - 1.0 / k, 1.0 / k, k)
    return _mostly_zero(f"monotone, {k} candidates", thresholds, _steady_risk(thresholds), delta)


def bump(height: float, k: int = 20, *, delta: float = 0.1) -> World:
    """`steady`, but with this expected loss at the thresholds between .72 and .85.

    At .075 it is a harmless bump that the sample may still stumble over; at .13 it is above delta, and a fixed sequence
    cannot get past it.
    """
    k = internal.count(k, "k", least=2)
    thresholds = np.linspace(1.0 - 1.0 / k, 1.0 / k, k)
    risk = np.where((thresholds > 0.72) & (thresholds < 0.85), height, _steady_risk(thresholds))
    return _mostly_zero(f"bump of {height:g}", thresholds, risk, delta)


def sparse() -> World:
    """Losses of 0 or 1, rarely 1: delta is .02."""
    return _binary("sparse", 0.02)


def binary() -> World:
    """Losses of 0 or 1; delta is .2."""
    return _binary("binary", 0.2)


def continuous() -> World:
    """Powers of a uniform number, spread over all of [0, 1]; delta is .2."""
    risk = _ladder(0.2)
    return _laddered("continuous", risk, lambda u: (1.0 - u) ** ((1.0 - risk) / risk), delta=0.2)


def heavy_at_one() -> World:
    """Uniform losses with most of their mass at 1; delta is .8."""
    risk = np.array([0.6, 0.68, 0.75, 0.8 * _JUST_ABOVE, 0.83, 0.86, 0.9, 0.95])
    ones = 2.0 * risk - 1.0
    return _laddered(
        "heavy at one", risk, lambda u: np.minimum((1.0 - u) / (1.0 - ones), 1.0), delta=0.8
    )


def tiny_variance() -> World:
    """Losses within .01 of their mean; delta is .1."""
    risk = 0.1 * np.array([0.9, 0.94, 0.97, _JUST_ABOVE, 1.01, 1.03, 1.1, 1.3])
    return _laddered("tiny variance", risk, lambda u: risk + 0.01 * (1.0 - 2.0 * u), delta=0.1)


def signed() -> World:
    """Differences in [-1, 1], mostly ties: a tenth of the prompts gains, and some more lose; delta is .04."""
    risk = _ladder(0.04)
    gain, lose = 0.1, 0.1 + 2.0 * risk

    def losses_at(u: Floats) -> Floats:
        return np.maximum(1.0 - u / lose, 0.0) - np.maximum(1.0 - (1.0 - u) / gain, 0.0)

    return _laddered("signed", risk, losses_at, delta=0.04, lower=-1.0)


def non_monotone() -> World:
    """Mostly zero losses whose expectation rises to delta, .1, falls, and rises past it."""
    risk = 0.1 * np.array([0.2, 0.5, _JUST_ABOVE, 0.6, 0.3, 1.3, 0.8, 2.0])
    thresholds = np.linspace(0.9, 0.2, risk.size)
    return _mostly_zero("non-monotone curve", thresholds, risk, 0.1)


def dependent() -> World:
    """Six candidates that are all just above delta, .15: two alike, one opposed, one shifted, one mixed, one independent."""
    risk = np.full(6, 0.15 * _JUST_ABOVE)

    def losses_at(uniforms: Floats) -> Floats:
        u, v = uniforms[:, 0], uniforms[:, 1]
        parts = np.stack(
            [u, u, 1.0 - u, (u + 0.5) % 1.0, np.where(v < 0.9, u, (v - 0.9) / 0.1), v], axis=1
        )
        return (parts < risk).astype(np.float64)

    thresholds = np.linspace(0.9, 0.4, risk.size)
    return World(
        "dependent candidates", thresholds, risk, 1.0 - thresholds, 0.15, losses_at, width=2
    )


#: The eight kinds of losses on which a guarantee is checked; in each, a candidate stands just above delta.
WORLDS: dict[str, Callable[[], World]] = {
    "sparse": sparse,
    "binary": binary,
    "continuous": continuous,
    "heavy_at_one": heavy_at_one,
    "tiny_variance": tiny_variance,
    "signed": signed,
    "non_monotone": non_monotone,
    "dependent": dependent,
}


def recorded(
    runs: Runs, *, delta: float, objective: str = "textual", cost: str = "layers"
) -> World:
    """The world whose population is a set of recorded prompts: samples are drawn from them with replacement.

    Parameters
    ----------
    runs : Runs
        With ``cost`` recorded for the candidates and for the full model; the threshold is the only coordinate.
    delta : float
    objective : {"textual", "risk", "risk_clipped"}
    cost : str

    Returns
    -------
    World
        Its truth is the records' own: the mean over them is each candidate's expected loss. Real losses, their dependence
        between candidates, and a curve that need not be monotone; nothing follows for other prompts.
    """
    if runs.coordinates != ["threshold"]:
        raise RiskcalError(
            f"runs: candidates differ in {', '.join(runs.coordinates)}; give runs of one coordinate."
        )
    if cost not in runs.values or cost not in runs.full:
        raise RiskcalError(
            f"cost: {cost!r} was not recorded for the candidates and the full model; a saving needs both."
        )
    losses = runs.losses(objective)
    lower, upper = records.OBJECTIVES[objective]
    spent = runs.unit_means(runs.values[cost]).mean(0)
    return World(
        name=f"{runs.n} recorded prompts",
        thresholds=runs.candidates["threshold"].to_numpy(dtype=np.float64),
        risk=losses.mean(0),
        saving=1.0 - spent / runs.unit_means(runs.full[cost]).mean(),
        delta=internal.tolerance(delta, lower, upper),
        losses_at=lambda u: losses[(u[:, 0] * len(losses)).astype(np.intp)],
        lower=lower,
        upper=upper,
    )


def _steady_risk(thresholds: Floats) -> Floats:
    return 0.35 * (1.0 - thresholds) ** 1.5


def _mostly_zero(name: str, thresholds: Floats, risk: Floats, delta: float) -> World:
    """Losses that are 0, or Beta(2, 3) with probability ``risk / .4``, all functions of one uniform number."""
    table = special.betaincinv(2.0, 3.0, np.linspace(0.0, 1.0, 4097))
    # linear in between, so that the mean is .4 to 1e-7
    table[1:-1] *= 0.4 / ((table.sum() - 0.5) / 4096)
    share = risk / 0.4

    def losses_at(u: Floats) -> Floats:
        place = (1.0 - u / share) * 4096.0
        losses = np.zeros(place.shape)
        nonzero = place > 0.0
        inside = place[nonzero]
        left = np.minimum(inside.astype(np.intp), 4095)
        losses[nonzero] = table[left] + (inside - left) * (table[left + 1] - table[left])
        return losses

    return World(name, thresholds, risk, 0.7 * (1.0 - thresholds**0.8), delta, losses_at)


def _ladder(delta: float) -> Floats:
    """Eight expected losses, the fourth just above delta."""
    return delta * np.array([0.25, 0.5, 0.75, _JUST_ABOVE, 1.1, 1.25, 1.5, 2.0])


def _binary(name: str, delta: float) -> World:
    risk = _ladder(delta)
    return _laddered(name, risk, lambda u: (u < risk).astype(np.float64), delta=delta)


def _laddered(
    name: str,
    risk: Floats,
    losses_at: Callable[[Floats], Floats],
    *,
    delta: float,
    lower: float = 0.0,
) -> World:
    thresholds = np.linspace(0.9, 0.2, risk.size)
    return World(name, thresholds, risk, 1.0 - thresholds, delta, losses_at, lower=lower)
