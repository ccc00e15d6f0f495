"""What `riskcal.heads.certified` saves and how often it breaks its word, now and before, and what costs the rest.

Populations of `laboratory.heads`. A token leaves at the first head whose confidence reaches its threshold; a head's agreement is
the share of the tokens leaving there, in the cascade, that agree. "Saved" is in layers, over what the true thresholds save: of
each choice of heads, one after the other, the lowest thresholds at which the head's agreement is the one demanded. A draw is a
violation where the true agreement of any head is lower. "before" is the path of threshold vectors, which prompts of several
tokens still have. The parts are of four independent heads, agreement .95, 4,000 prompts of one token, epsilon .05: "law known"
gives the pilot 10,000 prompts of its own, and "each at epsilon" spends epsilon at every head, which is not valid.
"""

import argparse
import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special
from tqdm.auto import tqdm

from laboratory.heads import Population, cascade, independent
from riskcal import heads
from riskcal.heads import decisions, inputs, path

EPSILON, PILOT, KNOWN = 0.05, 0.2, 10_000
Array = NDArray[np.float64]
certified = importlib.import_module("riskcal.heads.certified")  # the function has its module's name

#: Name, population, agreement, prompts, draws.
WORLDS: list[tuple[str, Callable[[], Population], float, int, int]] = [
    ("independent, 4 heads", independent, 0.95, 4000, 300),
    ("independent, 1 head", lambda: independent(1), 0.95, 4000, 100),
    ("independent, 8 heads", lambda: independent(8), 0.95, 4000, 60),
    ("independent, 4 heads", independent, 0.9, 300, 40),
    ("independent, 4 heads", independent, 0.9, 1000, 40),
    ("related, 4 heads", lambda: cascade((1,)), 0.9, 300, 40),
    ("related, 4 heads", lambda: cascade((1,)), 0.9, 1000, 40),
    ("related, 4 heads", lambda: cascade((1,)), 0.95, 2000, 40),
    ("related, 4 heads", lambda: cascade((1,)), 0.99, 4000, 40),
    ("related, 1 head", lambda: cascade((1,), 1), 0.9, 1000, 40),
    ("related, 8 heads", lambda: cascade((1,), 8), 0.9, 2000, 40),
    ("related, 4 heads, 20 tokens", lambda: cascade((20,)), 0.9, 500, 20),
]


def draws_of(population: Population, n: int, draws: int) -> Iterator[tuple[Any, Any, Any]]:
    rng = np.random.default_rng(12)
    return (population.draw(n, rng) for _ in range(draws))


def now(population: Population, data: tuple[Any, Any, Any], agreement: float) -> Array:
    confidence, agrees, prompts = data
    return heads.certified(
        confidence,
        agrees,
        prompts=prompts,
        max_tokens=population.max_tokens,
        agreement=agreement,
        epsilon=EPSILON,
    ).thresholds


def before(population: Population, data: tuple[Any, Any, Any], agreement: float) -> Array:
    recorded = inputs._records(*data, population.max_tokens, PILOT)
    return down_the_path(recorded, path._Goal(agreement, EPSILON, population.max_tokens))


def down_the_path(recorded: Any, goal: Any) -> Array:
    walked = certified._many_tokens(recorded, layers(recorded), goal)
    passed = np.flatnonzero(walked.rejected)
    if not passed.size:
        return np.full(len(layers(recorded)), math.inf)
    result: Array = walked.thresholds[passed[-1]]
    return result


def exact(recorded: Any, goal: Any) -> Array:
    """Down the path, with exact p-values: of prompts of one token."""
    best = np.full(len(layers(recorded)), math.inf)
    for thresholds in path._path(recorded, layers(recorded), goal):
        count = path._count(recorded, thresholds)
        used = np.isfinite(thresholds)
        exits, errors = count.exits.sum(0)[used], count.errors.sum(0)[used]
        p = np.where(exits > 0, special.bdtr(errors, np.maximum(exits, 1), 1 - goal.agreement), 1.0)
        if p.max() > goal.level:
            break
        best = thresholds
    return best


def in_turn(recorded: Any, goal: Any) -> Array:
    turns = decisions._in_turn(recorded, path._spared(layers(recorded)), goal)
    passed = [turn.thresholds for turn in turns if turn.certified]
    return passed[-1] if passed else np.full(len(layers(recorded)), math.inf)


def layers(recorded: Any) -> NDArray[np.int64]:
    return np.arange(1, recorded.confidence.shape[1] + 1)


def split(data: tuple[Any, Any, Any], n_pilot: int) -> Any:
    confidence, agrees, prompts = data
    return inputs._Records(confidence, agrees, prompts, np.arange(len(prompts)), n_pilot)


def after(known: tuple[Any, Any, Any], data: tuple[Any, Any, Any], n: int) -> Any:
    """A pilot that knows the law, and n prompts of the draw."""
    confidence, agrees, _ = (np.concatenate([a, b[:n]]) for a, b in zip(known, data, strict=True))
    return split((confidence, agrees, np.arange(len(confidence))), len(known[0]))


def parts(draws: int) -> list[dict[str, Any]]:
    population, agreement, n = independent(), 0.95, 4000
    goal = path._Goal(agreement, EPSILON, 1)
    each = goal._replace(level=4 * EPSILON)
    known = population.draw(KNOWN, np.random.default_rng(99))
    tested = round(n * (1 - PILOT))
    ways: dict[str, Callable[[Any], Array]] = {
        "path, betting (before)": lambda d: down_the_path(split(d, n - tested), goal),
        "path, exact": lambda d: exact(split(d, n - tested), goal),
        "path, exact, law known, 3200 tested": lambda d: exact(after(known, d, tested), goal),
        "path, exact, law known, 4000 tested": lambda d: exact(after(known, d, n), goal),
        "in turn, pilot .1": lambda d: in_turn(split(d, n // 10), goal),
        "in turn, pilot .2 (now)": lambda d: in_turn(split(d, n - tested), goal),
        "in turn, pilot .3": lambda d: in_turn(split(d, 3 * n // 10), goal),
        "in turn, law known, 3200 tested": lambda d: in_turn(after(known, d, tested), goal),
        "in turn, law known, 4000 tested": lambda d: in_turn(after(known, d, n), goal),
        "in turn, each at epsilon, law known, 4000 tested": lambda d: in_turn(
            after(known, d, n), each
        ),
    }
    most = population.saving(population.oracle(agreement))
    rows = []
    for name, way in tqdm(ways.items()):
        found = [way(data) for data in draws_of(population, n, draws)]
        rows.append({"way": name} | figures(population, found, agreement, most))
    return rows


def figures(
    population: Population, found: list[Array], agreement: float, most: float
) -> dict[str, Any]:
    saved = np.array([population.saving(thresholds) / most for thresholds in found])
    return {
        "draws": len(found),
        "violations": sum(population.breaks(thresholds, agreement) for thresholds in found),
        "saved": round(float(saved.mean()), 3),
        "error": round(float(saved.std() / math.sqrt(len(saved))), 3),
    }


def compare() -> list[dict[str, Any]]:
    rows = []
    for name, made, agreement, n, draws in tqdm(WORLDS):
        population = made()
        most = population.saving(population.oracle(agreement))
        row: dict[str, Any] = {"world": name, "agreement": agreement, "prompts": n}
        for which, way in (("before", before), ("now", now)):
            found = [way(population, data, agreement) for data in draws_of(population, n, draws)]
            row[which] = figures(population, found, agreement, most)
        rows.append(row)
        tqdm.write(str(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    target = parser.parse_args().json
    measured = {"epsilon": EPSILON, "worlds": compare(), "parts": parts(30)}
    for row in measured["parts"]:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    if target is not None:
        target.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
