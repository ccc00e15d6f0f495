"""What several tests share: one definition of each world, list and yardstick."""

import doctest
import functools
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import riskcal
from riskcal import pvalues
from riskcal.adaptive import capital

#: Every p-value whose guarantee holds in finite samples.
VALID_TESTS: dict[str, Callable[..., Any]] = {
    "hoeffding": pvalues.hoeffding,
    "bentkus": pvalues.bentkus,
    "hoeffding_bentkus": pvalues.hoeffding_bentkus,
    "convex_order": pvalues.convex_order,
    "empirical_bernstein": pvalues.empirical_bernstein,
    "predictable_bernstein": pvalues.predictable_bernstein,
    "betting": pvalues.betting,
    "binomial": pvalues.binomial,
}
#: Those that ask for the level at which they will be read.
TUNED_TESTS = ("betting", "predictable_bernstein")
#: Worlds of the laboratory whose losses are 0 or 1, which `pvalues.binomial` needs.
COINS = ("sparse", "binary", "dependent")


def tuned_at(level: float) -> dict[str, Callable[..., Any]]:
    """`VALID_TESTS`, all called with losses, delta and bounds alone."""
    return {
        name: functools.partial(test, level=level) if name in TUNED_TESTS else test
        for name, test in VALID_TESTS.items()
    }


def allowed(level: float, draws: int) -> float:
    """The share of errors up to which a Monte Carlo test accepts a true rate of ``level``: three standard errors above it."""
    return level + 3 * math.sqrt(level * (1 - level) / draws)


def ladder(n: int, *, lowest: float, **columns: object) -> pd.DataFrame:
    """Runs of n prompts: in full, at .9 without a loss, and at .5 with the ``lowest`` threshold's; further columns are alike."""
    rows = [
        {
            "prompt": f"p{i}",
            "threshold": t,
            "dissimilarity": 0.0 if t > 0.6 else lowest,
            "layers": 8.0 if t == math.inf else 3.0,
        }
        for i in range(n)
        for t in (math.inf, 0.9, 0.5)
    ]
    return pd.DataFrame(rows).assign(**columns)


def varied(name: str, values: list[object], n: int = 80) -> pd.DataFrame:
    """Candidates that differ in their thresholds and in one more column, of which the second value is cheaper."""
    return pd.DataFrame(
        [
            {
                "prompt": f"p{i}",
                "threshold": t,
                name: value,
                "dissimilarity": 0.0,
                "layers": 4.0 - j + t,
            }
            for i in range(n)
            for t in (0.9, 0.5)
            for j, value in enumerate(values)
        ]
    )


# worlds: losses with a given expectation


def bernoulli(rng, mean, shape):
    return (rng.random(shape) < mean).astype(float)


def zero_inflated(rng, mean, shape):
    """0, or Beta(2, 3): like the distance of a text to the full model's."""
    losses = (rng.random(shape) < mean / 0.4).astype(float)
    losses[losses > 0] = rng.beta(2, 3, int(losses.sum()))
    return losses


def rare(rng, mean, shape):
    """Mostly 0, seldom small, more seldom 1."""
    u = rng.random(shape)
    return np.where(u < 0.9 * mean, 1.0, np.where(u < 1.9 * mean, rng.uniform(0, 0.2, shape), 0.0))


def api_names(package: str) -> list[str]:
    """What docs/api.md lists of a package, by full names."""
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    found: list[str] = []
    current = ""
    for module, name in re.findall(r"currentmodule:: (\w+)|^   ([\w.]+)$", page, re.MULTILINE):
        current = module or current
        found += [f"{current}.{name}"] if name else []
    return [name for name in found if name.startswith(f"{package}.")]


def named(name: str) -> Any:
    """The object of a full name; modules on the way are imported."""
    found, *parts = [importlib.import_module(name.partition(".")[0]), *name.split(".")[1:]]
    for i, part in enumerate(parts, 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(name.split(".")[:i]))
        found = getattr(found, part)
    return found


def run_examples(name: str) -> int:
    """Run the examples of a public name and of its methods; the number of lines that its own "Examples" section ran.

    They find ``np`` and ``riskcal`` imported, as docs/api.md says, and whatever is longer than a line may be wrapped.
    """
    public = named(name)
    section = re.search(r"\n *Examples\n *-{8}\n(.*)", public.__doc__ or "", re.DOTALL)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    globs = {"np": np, "riskcal": riskcal}
    for test in doctest.DocTestFinder().find(public, name, module=False, globs=globs):
        runner.run(test, out=said.append)
    assert not said, "".join(said)
    lines = section[1].splitlines() if section else []
    return sum(">>> " in line and "+SKIP" not in line for line in lines)


def served(n: int, layers: float) -> pd.DataFrame:
    """A log of n prompts at thresholds .9, without loss, and .5, at this depth, beside a full model of 8 layers."""
    rows = [
        {
            "prompt": f"p{i}",
            "threshold": t,
            "dissimilarity": 0.0 if t > 0.6 else 0.125,
            "layers": 8.0 if t == math.inf else layers,
        }
        for i in range(n)
        for t in (math.inf, 0.9, 0.5)
    ]
    return pd.DataFrame(rows)


def rows_to_certify(
    losses: Any,
    delta: float,
    *,
    level: float,
    bets: str = "combined",
    n_max: int | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Any:
    """Rows until the capital of an adaptive calibration reaches ``1 / level`` against each column (k,); 0 where it never does."""
    unit = (np.asarray(losses, dtype=float).reshape(len(losses), -1) - lower) / (upper - lower)
    tolerated, straddles = (delta - lower) / (upper - lower), lower < 0.0 < upper
    own = capital.opening(unit.shape[1], tolerated, straddles=straddles)
    rows = np.zeros(unit.shape[1], dtype=int)
    given = {"n_max": n_max or len(unit), "level": level, "bets": bets, "straddles": straddles}
    for seen, row in enumerate(unit):
        own = capital.bet(own, row, tolerated, seen=seen, **given)
        rows[(rows == 0) & (own.best >= -math.log(level))] = seen + 1
    return rows
