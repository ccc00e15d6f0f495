"""Power of the default test beside its competitors and the Neyman-Pearson limit, where deltas are small and where they are not.

One candidate, ``laws`` of known mean, delta from .001 to .3, levels .05 and .0025, sample sizes at which the best test of the
known law would have a power of about .5, .75 and .95. All tests see the same draws. "before" are the stakes that the default
test had until it was measured here: the normal hedge alone, its variance from 8 pseudo-rows on. "recalculating" bets
``sqrt(2 log(1 / (level capital)) / (rows left x variance))``, after STaR-Bets (2025), with that variance. A cell passes
where betting is not below convex_order by more than .02, nor below the best of the others by more than .03, but for noise
(three standard errors of the paired difference).
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from numpy.typing import NDArray
from tqdm.auto import tqdm

import command
from laboratory.limit import neyman_pearson_power
from riskcal import pvalues
from riskcal.pvalues import bettor_kernels

DELTAS, LEVELS, POWERS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.3), (0.05, 0.0025), (0.5, 0.75, 0.95)
ROWS = 300_000  # cells of larger samples are left out
NUMBERS = 10_000_000  # losses drawn in a cell, at most
OTHERS = ("before", "recalculating", "convex_order", "hoeffding_bentkus", "binomial")

Array = NDArray[np.float64]


def coins(mean: float) -> tuple[Array, Array]:
    """0 or 1."""
    return np.array([0.0, 1.0]), np.array([1 - mean, mean])


def inflated(mean: float, largest: float = 1.0) -> tuple[Array, Array]:
    """Mostly 0, else evenly spread up to ``largest``."""
    share = 2 * mean / largest
    return np.r_[0.0, largest * (np.arange(40) + 0.5) / 40], np.r_[
        1 - share, np.full(40, share / 40)
    ]


def quarter(mean: float) -> tuple[Array, Array]:
    """As `inflated`, up to a quarter."""
    return inflated(mean, 0.25)


def two_point(mean: float) -> tuple[Array, Array]:
    """Half the mean, or three times it."""
    return np.array([0.5 * mean, 3 * mean]), np.array([0.8, 0.2])


def uniform(mean: float) -> tuple[Array, Array]:
    """Evenly spread from 0 to twice the mean."""
    return 2 * mean * (np.arange(80) + 0.5) / 80, np.full(80, 1 / 80)


def signed(mean: float) -> tuple[Array, Array]:
    """A difference: mostly a tie, else won or lost."""
    return np.array([-1.0, 0.0, 1.0]), np.array([0.05, 0.9 - mean, 0.05 + mean])


LAWS = {
    "coins": coins,
    "zero-inflated": inflated,
    "zero-inflated / 4": quarter,
    "two-point": two_point,
    "uniform": uniform,
    "signed": signed,
}
#: The law's mean, over delta: closer where the variance is small, so that samples are not of a few rows.
SHARE = {"two-point": 0.8, "uniform": 0.8}


def cells() -> Iterator[tuple[str, float, float, int, float]]:
    """Law, delta, level, n and the limit."""
    for name, law in LAWS.items():
        for delta in DELTAS:
            mean = delta * SHARE.get(name, 0.7 if delta == 0.3 else 0.5)
            if name == "zero-inflated / 4" and mean > 0.12:
                continue
            values, weights = law(mean)
            low = -1.0 if name == "signed" else 0.0
            unit, tolerated = (values - low) / (1 - low), (delta - low) / (1 - low)
            for level in LEVELS:
                for wanted in POWERS:
                    n = smallest(unit, weights, tolerated, level, wanted)
                    if n is not None:
                        yield (
                            name,
                            delta,
                            level,
                            n,
                            neyman_pearson_power(unit, weights, n, tolerated, level),
                        )


def smallest(values: Array, weights: Array, delta: float, level: float, power: float) -> int | None:
    """About the smallest n at which the limit reaches this power; None beyond ``ROWS``."""
    low, high = 4, 8
    while neyman_pearson_power(values, weights, high, delta, level) < power:
        low, high = high, 2 * high
        if low > ROWS:
            return None
    while high > 1.03 * low + 1:
        middle = (low + high) // 2
        reached = neyman_pearson_power(values, weights, middle, delta, level) >= power
        low, high = (low, middle) if reached else (middle, high)
    return high if high <= ROWS else None


@njit(cache=True)
def other_stakes(losses, delta, upper, level, prior, normal, recalculating):  # type: ignore[no-untyped-def]
    """Largest log capital (k,) of two bettors with a running variance from 8 pseudo-rows on."""
    n, k = losses.shape
    best = np.zeros(k)
    cap, target = 0.99 / (upper - delta), math.log(level / 1.03)
    for j in range(k):
        capital, spread, t = 0.0, 8.0 * prior, 0
        while t < n:
            left = n - t
            variance, short, bet = spread / (8.0 + t), capital + target, 0.0
            if short < 0.0 and recalculating:
                bet = math.sqrt(-2.0 * short / (left * variance))
            elif short < 0.0:
                place = -64.0 * short
                index = min(int(place), normal.size - 2)
                share = min(place - index, 1.0)
                bet = (normal[index] * (1.0 - share) + normal[index + 1] * share) / math.sqrt(
                    left * variance
                )
            bet = min(bet, cap)
            until = t + min(max(left // 20, 1), 16)
            factor = 1.0
            for i in range(t, until):
                gap = delta - losses[i, j]
                factor *= 1.0 + bet * gap
                spread += gap * gap
            capital += math.log(factor)
            best[j] = max(best[j], capital)
            t = until
    return best


def rejections(
    losses: Array, delta: float, level: float, low: float
) -> dict[str, NDArray[np.bool_]]:
    """Which of k samples (n, k) each test rejects."""
    known = {"lower": low, "upper": 1.0}
    prior = (delta - low) * (1.0 - delta) * (0.05 if low < 0 else 1.0)
    below, needed = losses.mean(0) < delta, -math.log(level)
    given = (losses, delta, 1.0, level, prior, bettor_kernels.HEDGE[0])
    found = {
        "betting": pvalues.betting(losses, delta, level=level, **known) <= level,
        "before": (other_stakes(*given, False) >= needed) & below,
        "recalculating": (other_stakes(*given, True) >= needed) & below,
        "convex_order": pvalues.convex_order(losses, delta, **known) <= level,
        "hoeffding_bentkus": pvalues.hoeffding_bentkus(losses, delta, **known) <= level,
    }
    if low == 0.0 and ((losses == 0) | (losses == 1)).all():
        found["binomial"] = pvalues.binomial(losses, delta) <= level
    return {name: np.atleast_1d(rejected) for name, rejected in found.items()}


def row(
    name: str,
    delta: float,
    level: float,
    n: int,
    limit: float,
    draws: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Powers in one cell, on common draws."""
    mean = delta * SHARE.get(name, 0.7 if delta == 0.3 else 0.5)
    values, weights = LAWS[name](mean)
    k = max(min(draws, NUMBERS // n), 200)
    at_once = max(min(k, 4_000_000 // n), 1)
    parts = [
        rejections(
            rng.choice(values, (n, min(at_once, k - first)), p=weights),
            delta,
            level,
            -1.0 if name == "signed" else 0.0,
        )
        for first in range(0, k, at_once)
    ]
    rejected = {test: np.concatenate([part[test] for part in parts]) for test in parts[0]}
    power = {test: float(found.mean()) for test, found in rejected.items()}

    def behind(test: str) -> float:
        """By how much betting is surely below a test."""
        gap = rejected[test].astype(float) - rejected["betting"]
        return float(gap.mean() - 3 * gap.std() / math.sqrt(k))

    best = max((test for test in power if test != "betting"), key=power.__getitem__)
    holds = behind("convex_order") <= 0.02 and behind(best) <= 0.03
    cell = {
        "law": name,
        "delta": delta,
        "mean": mean,
        "level": level,
        "n": n,
        "draws": k,
        "limit": limit,
    }
    return cell | power | {"best other": best, "holds": holds}


def main() -> None:
    """Print the grid, and what does not hold."""
    parser = command.parser(__doc__)
    parser.add_argument("--draws", type=int, default=4000, help="samples of a cell, at most")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = [row(*cell, options.draws, rng) for cell in tqdm(list(cells()), desc="cells")]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.4g}".format))
    short = table[~table["holds"]]
    print(
        f"\n{len(table)} cells, {len(short)} of them behind convex_order by more than .02 or the best other by more than .03"
    )
    tests = ["betting", *OTHERS]
    print(table.groupby("law")[tests].mean().to_string(float_format="{:.3f}".format))
    command.keep({"rows": rows}, options.json)


if __name__ == "__main__":
    main()
