"""Simulated worlds whose truth is known: whether a procedure keeps its word there, and how much of the possible it gets.

A world draws losses (n, k) of independent prompts under k candidates, from the safest (first) to the cheapest (last), and
knows each candidate's expected loss and what it saves. `validity` counts how often a procedure certifies what it should
not; `power_limit` and `efficiency` measure what it certifies against what any valid procedure could.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from riskcal import _validate, records
from riskcal._validate import Floats, RiskcalError
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
        _validate.tolerance(self.delta, self.lower, self.upper)
        _validate.finite(self.risk, "risk")  # a comparison with NaN would count every violation as none

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
        valid = self.risk <= (self.delta if delta is None else _validate.number(delta, "delta"))
        return float(self.saving[valid].max(initial=0.0))

    def __repr__(self) -> str:
        return f"World {self.name!r}: {self.k} candidates, losses in [{self.lower:g}, {self.upper:g}], delta {self.delta:g}"


def monotone(k: int = 20, *, delta: float = 0.1) -> World:
    """Mostly zero losses whose expectation rises steadily, ``.35 (1 - threshold)^1.5``; the standard world for efficiency.

    A loss is 0, or Beta(2, 3) with the probability that gives the mean. All candidates' losses are functions of one number
    per prompt, and never fall as the threshold falls. A candidate saves ``.7 (1 - threshold^.8)``.
    """
    k = _validate.count(k, "k", least=2)
    thresholds = np.linspace(1.0 - 1.0 / k, 1.0 / k, k)
    return _mostly_zero(f"monotone, {k} candidates", thresholds, _steady_risk(thresholds), delta)


def bump(height: float, k: int = 20, *, delta: float = 0.1) -> World:
    """`monotone`, but with this expected loss at the thresholds between .72 and .85.

    At .075 it is a harmless bump that the sample may still stumble over; at .13 it is above delta, and a fixed sequence
    cannot get past it.
    """
    k = _validate.count(k, "k", least=2)
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
    return _laddered("heavy at one", risk, lambda u: np.minimum((1.0 - u) / (1.0 - ones), 1.0), delta=0.8)


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
        parts = np.stack([u, u, 1.0 - u, (u + 0.5) % 1.0, np.where(v < 0.9, u, (v - 0.9) / 0.1), v], axis=1)
        return (parts < risk).astype(np.float64)

    thresholds = np.linspace(0.9, 0.4, risk.size)
    return World("dependent candidates", thresholds, risk, 1.0 - thresholds, 0.15, losses_at, width=2)


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


def recorded(runs: Runs, *, delta: float, objective: str = "textual", cost: str = "layers") -> World:
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
        raise RiskcalError(f"runs: candidates differ in {', '.join(runs.coordinates)}; give runs of one coordinate.")
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
        delta=_validate.tolerance(delta, lower, upper),
        losses_at=lambda u: losses[(u[:, 0] * len(losses)).astype(np.intp)],
        lower=lower,
        upper=upper,
    )


class Validity(NamedTuple):
    """How often a procedure certified a candidate whose expected loss is above delta."""

    violations: int
    trials: int
    rate: float
    low: float  # Clopper-Pearson interval of the rate
    high: float


def validity(
    world: World,
    decide: Callable[[Floats], ArrayLike],
    *,
    n: int,
    trials: int = 1000,
    seed: int = 0,
    delta: float | None = None,
    confidence: float = 0.95,
) -> Validity:
    """How often a procedure breaks its guarantee, in a world whose truth is known.

    Parameters
    ----------
    world : World
    decide : callable
        From losses (n, k), columns from the highest threshold down, to which candidates are certified, boolean (k,).
    n : int
        Prompts per trial.
    trials : int
        Independent samples.
    seed : int
    delta : float, optional
        Tolerance that ``decide`` tests; default the world's own.
    confidence : float
        Of the exact (Clopper-Pearson) interval.

    Returns
    -------
    Validity
        A trial counts as a violation if any certified candidate's expected loss is above delta. A procedure that holds
        epsilon has a rate of at most epsilon, so that an interval wholly above it is evidence of a defect.
    """
    n, trials = _validate.count(n, "n", least=1), _validate.count(trials, "trials", least=1)
    level = _validate.level(confidence, "confidence")
    wrong = world.risk > (world.delta if delta is None else _validate.number(delta, "delta"))
    rng = np.random.default_rng(_validate.count(seed, "seed", least=0))
    violations = 0
    for _ in range(trials):
        certified = np.asarray(decide(world.sample(n, rng)))
        if certified.shape != wrong.shape or certified.dtype != np.bool_:
            raise RiskcalError(
                f"decide: returned an array of shape {certified.shape} and type {certified.dtype}; it must say for each of "
                f"the {world.k} candidates whether it is certified, true or false."
            )
        violations += bool((certified & wrong).any())
    low, high = clopper_pearson(violations, trials, level)
    return Validity(violations, trials, violations / trials, low, high)


def clopper_pearson(count: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a binomial share (Clopper and Pearson 1934)."""
    tail = (1.0 - confidence) / 2.0
    low = special.betaincinv(count, trials - count + 1, tail) if count > 0 else 0.0
    high = special.betaincinv(count + 1, trials - count, 1.0 - tail) if count < trials else 1.0
    return float(low), float(high)


class PowerLimit(NamedTuple):
    """What no valid procedure exceeds, on average over samples."""

    saving: float  # expected saving, capped at the oracle's
    oracle: float  # the largest saving whose expected loss is at most delta
    power: Floats  # (k,), the chance to select this candidate or a cheaper one; NaN above delta


def power_limit(world: World, n: int, delta: float | None = None, epsilon: float = 0.05) -> PowerLimit:
    """The most that any procedure can save with n prompts if it certifies falsely with probability at most epsilon.

    Parameters
    ----------
    world : World
        One whose losses are functions of one uniform number per prompt and never fall as the threshold falls.
    n : int
    delta : float, optional
        Default the world's own.
    epsilon : float

    Returns
    -------
    PowerLimit

    Raises
    ------
    RiskcalError
        For a world of other losses, where the argument below does not hold.

    Notes
    -----
    Let Q be the law of the losses, candidate j safe, so that x = L(j) has ``E_Q x < delta``, and b the bet that maximises
    ``E_Q log(1 + b (delta - x))`` over ``[0, 1 / (upper - delta)]``. The tilted law ``dP = dQ / (1 + b (delta - x))``, with
    what is missing to a total of one put on prompts where j and all cheaper candidates lose ``upper``, has ``E_P x = delta``:
    inside the interval the derivative in b is zero, which says that P has mass one and mean delta; at its end P loses mass,
    and putting it at ``upper`` restores the mean. As losses are monotone, all cheaper candidates have expected losses of at
    least delta under P too, so that a valid procedure selects j or a cheaper one with probability at most epsilon (in the
    limit of worlds just above delta). Under Q it does so with at most the power of the Neyman-Pearson test of Q^n against
    P^n, which looks at candidate j's losses alone. Summing by parts, the expected saving, capped at the largest safe one, is
    at most the sum over safe candidates of ``(saving(j) - saving(j - 1)) power(j)``. The tilt is not quite the least
    favourable law for every n (an exponential tilt lowers some powers by up to .014 at n = 100), so that the limit is valid
    but need not be attainable.

    The law is taken on a grid of quantiles and sums are convolved on a lattice, which moves the limit by less than .001.
    For losses of 0 or 1 the power is that of the exact randomised binomial test.
    """
    n = _validate.count(n, "n", least=1)
    tolerated = _validate.tolerance(world.delta if delta is None else delta, world.lower, world.upper)
    level = _validate.level(epsilon, "epsilon")
    grid = _quantiles(world)
    width = world.upper - world.lower
    unit_delta = (tolerated - world.lower) / width
    power = np.full(world.k, np.nan)
    for j in np.flatnonzero(world.risk <= tolerated):
        mean = (world.risk[j] - world.lower) / width
        values, weights = _law((grid[:, j] - world.lower) / width, mean)
        power[j] = level if mean >= unit_delta else neyman_pearson_power(values, weights, n, unit_delta, level)
    power = np.fmin.accumulate(
        power
    )  # to select j or a cheaper one is to select i or a cheaper one, for each i before j
    safe = world.risk <= tolerated
    steps = np.diff(np.maximum.accumulate(world.saving[safe]), prepend=0.0)
    return PowerLimit(float((steps * power[safe]).sum()), world.oracle(tolerated), np.where(safe, power, np.nan))


def neyman_pearson_power(values: Floats, weights: Floats, n: int, delta: float, epsilon: float) -> float:
    """Power against H: E[x] >= delta that no level-epsilon test exceeds, for n draws of a known law on [0, 1].

    Parameters
    ----------
    values, weights : (m,)
        Atoms of the law and their probabilities; its mean is below delta.
    n, delta, epsilon
        As in `power_limit`.

    Returns
    -------
    float
        Of the most powerful (randomised) test of the law against its tilt of mean delta.
    """
    tilt = 1.0 + _best_bet(values, weights, delta) * (delta - values)
    score, null = np.log(tilt), weights / tilt
    size, power = _sums_descending(score, null, weights, n)
    reached = int(np.searchsorted(size, epsilon))
    if reached == size.size:  # the null puts mass on prompts that the law never draws
        return 1.0
    size, power = np.r_[0.0, size], np.r_[0.0, power]
    share = (epsilon - size[reached]) / (size[reached + 1] - size[reached])
    return float(min(power[reached] + share * (power[reached + 1] - power[reached]), 1.0))


class Efficiency(NamedTuple):
    """How much of the possible a procedure gets."""

    efficiency: float  # saving / limit
    standard_error: float
    saving: float  # mean over draws, capped at the oracle's
    limit: float
    oracle: float
    violation_rate: float


def efficiency(
    world: World,
    certified: NDArray[np.bool_],
    *,
    n: int,
    delta: float | None = None,
    epsilon: float = 0.05,
    limit: float | None = None,
) -> Efficiency:
    """Share of the largest possible expected saving that a procedure reached.

    Parameters
    ----------
    world : World
    certified : (draws, k) bool
        What the procedure certified in each of many samples of n prompts (see `World.sample_many`).
    n, delta, epsilon
        As in `power_limit`.
    limit : float, optional
        What to compare with; default `power_limit`. Give ``world.oracle()`` where that does not apply.

    Returns
    -------
    Efficiency
        Of the cheapest certified candidate, whose saving counts at most as much as the best safe one's: a false
        certificate earns nothing extra.
    """
    tolerated = world.delta if delta is None else _validate.number(delta, "delta")
    chosen = np.asarray(certified, dtype=bool)
    if chosen.ndim != 2 or chosen.shape[1] != world.k or not len(chosen):
        raise RiskcalError(f"certified: has shape {chosen.shape}; expected (draws, {world.k}).")
    bound = power_limit(world, n, tolerated, epsilon).saving if limit is None else limit
    oracle = world.oracle(tolerated)
    saving = np.minimum(np.where(chosen, world.saving, 0.0).max(1), oracle)
    error = float(saving.std(ddof=1)) / math.sqrt(len(saving)) if len(saving) > 1 else math.nan
    wrong = (chosen & (world.risk > tolerated)).any(1)
    mean = float(saving.mean())
    return Efficiency(mean / bound, error / bound, mean, bound, oracle, float(wrong.mean()))


def _steady_risk(thresholds: Floats) -> Floats:
    return 0.35 * (1.0 - thresholds) ** 1.5


def _mostly_zero(name: str, thresholds: Floats, risk: Floats, delta: float) -> World:
    """Losses that are 0, or Beta(2, 3) with probability ``risk / .4``, all functions of one uniform number."""
    table = special.betaincinv(2.0, 3.0, np.linspace(0.0, 1.0, 4097))
    table[1:-1] *= 0.4 / ((table.sum() - 0.5) / 4096)  # linear in between, so that the mean is .4 to 1e-7
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
    name: str, risk: Floats, losses_at: Callable[[Floats], Floats], *, delta: float, lower: float = 0.0
) -> World:
    thresholds = np.linspace(0.9, 0.2, risk.size)
    return World(name, thresholds, risk, 1.0 - thresholds, delta, losses_at, lower=lower)


def _quantiles(world: World, points: int = 16_384) -> Floats:
    """Losses (points, k) at evenly spaced uniform numbers, of a world whose losses never fall along the candidates."""
    if world.width == 1:
        grid = world.losses_at(((np.arange(points) + 0.5) / points)[:, None])
        if (np.diff(grid, axis=1) >= -_validate.TOLERANCE).all():
            return grid
    raise RiskcalError(
        f"world: {world.name!r} is not of the monotone kind, whose losses are functions of one uniform number per prompt and "
        "never fall as the threshold falls; only there is the limit known."
    )


def _law(losses: Floats, mean: float) -> tuple[Floats, Floats]:
    """Atoms and weights of equally likely losses, the smallest atom reweighted so that the mean is exact."""
    values, counts = np.unique(losses, return_counts=True)
    weights = counts / losses.size
    above = float(weights @ (values - values[0]))
    if above > 0.0:
        weights = weights * ((mean - values[0]) / above)
        weights[0] += 1.0 - weights.sum()
    return values, weights


def _best_bet(values: Floats, weights: Floats, delta: float) -> float:
    """The bet b that maximises the expected log of ``1 + b (delta - x)`` on [0, 1 / (1 - delta)]."""
    from scipy import optimize

    def slope(bet: float) -> float:
        return float((weights * (delta - values) / (1.0 + bet * (delta - values))).sum())

    largest = (1.0 - 1e-12) / (1.0 - delta)
    return largest if slope(largest) >= 0.0 else float(optimize.brentq(slope, 0.0, largest, xtol=1e-15))


def _sums_descending(score: Floats, null: Floats, law: Floats, n: int, points: int = 2**16) -> tuple[Floats, Floats]:
    """Cumulative mass, under n-fold ``null`` and ``law``, of the sum of scores from its largest value down."""
    steps = []
    for mass in (null, law):
        mean = float(mass @ score) / mass.sum()
        steps.append((mean, math.sqrt(float(mass @ (score - mean) ** 2) / mass.sum())))
    low = max(min(n * mean - 14.0 * math.sqrt(n) * deviation for mean, deviation in steps), n * float(score.min()))
    high = min(max(n * mean + 14.0 * math.sqrt(n) * deviation for mean, deviation in steps), n * float(score.max()))
    if high - low < 1e-12:
        return np.array([null.sum() ** n]), np.array([1.0])
    margin = math.ceil(8.0 * math.sqrt(n)) + 4  # rounding to the lattice spreads a sum over that many points
    spacing = (high - low) / (points - 2 * margin)
    place = (score - score.min()) / spacing
    left = np.floor(place)
    right_share = place - left
    masses = []
    for mass in (null, law):
        lattice = np.zeros(points)
        np.add.at(lattice, left.astype(np.int64) % points, mass * (1.0 - right_share))
        np.add.at(lattice, (left.astype(np.int64) + 1) % points, mass * right_share)
        masses.append(np.maximum(np.fft.irfft(np.fft.rfft(lattice) ** n, points), 0.0))
    # the lattice is a circle: point i stands for the one sum in the window that it can be
    first = math.floor((low - n * float(score.min())) / spacing) - margin
    descending = (first + np.arange(points)[::-1]) % points
    return np.cumsum(masses[0][descending]), np.cumsum(masses[1][descending])
