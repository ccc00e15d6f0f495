"""The most that any valid procedure could save in a world, and how much of it a procedure gets."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from laboratory.worlds import World
from riskcal import RiskcalError, internal
from riskcal.internal import Floats


class PowerLimit(NamedTuple):
    """What no valid procedure exceeds, on average over samples."""

    saving: float  # expected saving, capped at the oracle's
    oracle: float  # the largest saving whose expected loss is at most delta
    power: Floats  # (k,), the chance to select this candidate or a cheaper one; NaN above delta


def power_limit(
    world: World, n: int, delta: float | None = None, epsilon: float = 0.05
) -> PowerLimit:
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
    n = internal.count(n, "n", least=1)
    tolerated = internal.tolerance(
        world.delta if delta is None else delta, world.lower, world.upper
    )
    level = internal.level(epsilon, "epsilon")
    grid = _quantiles(world)
    width = world.upper - world.lower
    unit_delta = (tolerated - world.lower) / width
    power = np.full(world.k, np.nan)
    for j in np.flatnonzero(world.risk <= tolerated):
        mean = (world.risk[j] - world.lower) / width
        values, weights = _law((grid[:, j] - world.lower) / width, mean)
        power[j] = (
            level
            if mean >= unit_delta
            else neyman_pearson_power(values, weights, n, unit_delta, level)
        )
    # to select j or a cheaper one is to select i or a cheaper one, for each i before j
    power = np.fmin.accumulate(power)
    safe = world.risk <= tolerated
    steps = np.diff(np.maximum.accumulate(world.saving[safe]), prepend=0.0)
    return PowerLimit(
        float((steps * power[safe]).sum()), world.oracle(tolerated), np.where(safe, power, np.nan)
    )


def neyman_pearson_power(
    values: Floats, weights: Floats, n: int, delta: float, epsilon: float
) -> float:
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


def share_of_limit(
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
    tolerated = world.delta if delta is None else internal.number(delta, "delta")
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


def _quantiles(world: World, points: int = 16_384) -> Floats:
    """Losses (points, k) at evenly spaced uniform numbers, of a world whose losses never fall along the candidates."""
    if world.width == 1:
        grid = world.losses_at(((np.arange(points) + 0.5) / points)[:, None])
        if (np.diff(grid, axis=1) >= -internal.TOLERANCE).all():
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

    def slope(bet: float) -> float:
        return float((weights * (delta - values) / (1.0 + bet * (delta - values))).sum())

    largest = (1.0 - 1e-12) / (1.0 - delta)
    return (
        largest
        if slope(largest) >= 0.0
        else float(optimize.brentq(slope, 0.0, largest, xtol=1e-15))
    )


def _sums_descending(
    score: Floats, null: Floats, law: Floats, n: int, points: int = 2**16
) -> tuple[Floats, Floats]:
    """Cumulative mass, under n-fold ``null`` and ``law``, of the sum of scores from its largest value down."""
    steps = []
    for mass in (null, law):
        mean = float(mass @ score) / mass.sum()
        steps.append((mean, math.sqrt(float(mass @ (score - mean) ** 2) / mass.sum())))
    low = max(
        min(n * mean - 14.0 * math.sqrt(n) * deviation for mean, deviation in steps),
        n * float(score.min()),
    )
    high = min(
        max(n * mean + 14.0 * math.sqrt(n) * deviation for mean, deviation in steps),
        n * float(score.max()),
    )
    if high - low < 1e-12:
        return np.array([null.sum() ** n]), np.array([1.0])
    # rounding to the lattice spreads a sum over that many points
    margin = math.ceil(8.0 * math.sqrt(n)) + 4
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
