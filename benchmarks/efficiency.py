"""Certification efficiency: which share of the largest possible saving is certified, by the default test and by others.

Simulated: the monotone world of `laboratory.worlds`, 20 candidates, epsilon .05, delta .1, every test in the same fixed
sequence on the same draws; the yardstick is the information limit, which no valid procedure exceeds. Recorded: samples drawn
from the shipped records with replacement; there the yardstick is the records' own cheapest candidate with a mean loss of at
most delta, and of a risk CALM's tests see the clipped differences. Standard errors are over draws. The default's ends are
.91, .975 and .985 at n = 100, 500 and 2,000.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

import command
import riskcal
from laboratory.limit import power_limit, share_of_limit
from laboratory.worlds import World, recorded, steady
from riskcal import pvalues

EPSILON, DELTA = 0.05, 0.1
ENDS = {100: 0.91, 500: 0.975, 2000: 0.985}
DEFAULT = "betting (default)"
CELLS = 4_000_000  # losses held at once

Array = NDArray[np.float64]


def adaptive_bets(losses: Array, delta: float, *, lower: float = 0.0, upper: float = 1.0) -> Array:
    """The betting test of Waudby-Smith and Ramdas, one-sided: predictable plug-in bets, one over the largest capital."""
    losses, delta = (losses - lower) / (upper - lower), (delta - lower) / (upper - lower)
    n, k = losses.shape
    total, square = np.full(k, 0.5), np.full(k, 0.25)
    capital, largest = np.zeros(k), np.zeros(k)
    aim = 2.0 * math.log(1.0 / EPSILON) / n
    for t, row in enumerate(losses):
        bet = np.minimum(np.sqrt(aim * (t + 1) / square), 0.75 / (1.0 - delta))
        capital += np.log1p(bet * (delta - row))
        np.maximum(largest, capital, out=largest)
        total += row
        square += (row - total / (t + 2)) ** 2
    return np.exp(-largest)


TESTS: dict[str, Callable[..., Any]] = {
    DEFAULT: lambda losses, delta, **known: pvalues.betting(losses, delta, level=EPSILON, **known),
    "WSR betting": adaptive_bets,
    "convex_order": pvalues.convex_order,
    "hoeffding_bentkus (CALM)": pvalues.hoeffding_bentkus,
    "hoeffding (CALM, Eq. 9)": pvalues.hoeffding,
}
CALM = [name for name in TESTS if "CALM" in name]


def certified(world: World, n: int, draws: int, seed: int) -> dict[str, NDArray[np.bool_]]:
    """What each test certifies in fixed sequence, (draws, k), all on the same samples."""
    rng = np.random.default_rng(seed)
    chunk = max(CELLS // (n * world.k), 1)
    found: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in TESTS}
    for first in tqdm(range(0, draws, chunk), desc=f"{world.name}, n = {n}", leave=False):
        many = min(chunk, draws - first)
        losses = world.sample_many(n, many, rng)
        for name, test in TESTS.items():
            p = test(losses, world.delta, lower=world.lower, upper=world.upper).reshape(
                many, world.k
            )
            found[name].append(np.logical_and.accumulate(p <= EPSILON, axis=1))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def rows_of(
    world: World, found: dict[str, NDArray[np.bool_]], n: int, limit: float
) -> list[dict[str, Any]]:
    """One row per test."""
    rows = []
    for name, chosen in found.items():
        result = share_of_limit(world, chosen, n=n, epsilon=EPSILON, limit=limit)
        of_oracle = result.saving / result.oracle if result.oracle else math.nan
        rows.append(
            {
                "n": n,
                "test": name,
                "efficiency": result.efficiency,
                "se": result.standard_error,
                "of oracle": of_oracle,
                "violations": result.violation_rate,
            }
        )
    return rows


def simulated(draws: int, seed: int) -> pd.DataFrame:
    """The standard world against the information limit."""
    world = steady(20, delta=DELTA)
    rows = []
    for n in ENDS:
        limit = power_limit(world, n, epsilon=EPSILON)
        found = certified(world, n, draws, seed)
        of_oracle = limit.saving / limit.oracle
        rows += [
            row | {"limit/oracle": of_oracle} for row in rows_of(world, found, n, limit.saving)
        ]
    return pd.DataFrame(rows)


def from_records(draws: int, seed: int) -> pd.DataFrame:
    """The shipped records as a population, against what an oracle that knows their means would choose."""
    runs = riskcal.load_example("g2p")
    rows = []
    for objective, delta in (("textual", 0.1), ("textual", 0.05), ("risk", 0.05), ("risk", 0.02)):
        world = recorded(runs, delta=delta, objective=objective)
        if world.oracle() <= 0.0:
            continue
        for n in ENDS:
            if n > runs.n:
                continue
            found = certified(world, n, draws, seed)
            if objective == "risk":  # the same seed draws the same prompts
                clipped = certified(
                    recorded(runs, delta=delta, objective="risk_clipped"), n, draws, seed
                )
                found |= {name: clipped[name] for name in CALM}
            found_rows = rows_of(world, found, n, world.oracle())
            rows += [{"objective": objective, "delta": delta} | row for row in found_rows]
    return pd.DataFrame(rows).drop(columns="of oracle")


def main() -> None:
    """Measure, print, and write the figures if asked to."""
    parser = command.parser(__doc__)
    parser.add_argument("--draws", type=int, default=5000, help="simulated samples of each size")
    parser.add_argument(
        "--record-draws", type=int, default=1000, help="samples of each size from the records"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    figures: dict[str, Any] = {
        "draws": options.draws,
        "record draws": options.record_draws,
        "seed": options.seed,
    }
    table = simulated(options.draws, options.seed)
    print(
        f"Monotone world, 20 candidates, delta {DELTA:g}, epsilon {EPSILON:g}, {options.draws} draws\n"
    )
    print(table.to_string(index=False, float_format="%.4f"), end="\n\n")
    figures["simulated"] = table.to_dict("records")
    reached = table[table["test"] == DEFAULT].set_index("n")["efficiency"]
    for n, end in ENDS.items():
        print(
            f"n = {n}: {reached[n]:.4f}, end {end:g}: {'reached' if reached[n] >= end else 'MISSED'}"
        )
    try:
        recorded = from_records(options.record_draws, options.seed)
    except riskcal.RiskcalError as error:
        print(f"\nRecords: nothing is measured on them. {error}")
    else:
        print(
            f"\nShipped records as the population, share of the empirical oracle's saving, {options.record_draws} draws\n"
        )
        print(recorded.to_string(index=False, float_format="%.4f"))
        figures["records"] = recorded.to_dict("records")
    command.keep(figures, options.json)


if __name__ == "__main__":
    main()
