"""Print the simulated figures of docs/guarantee.md: power, smallest samples, and what each broken assumption costs."""

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from riskcal import pvalues

DELTA, EPSILON = 0.1, 0.05
TESTS = {
    "hoeffding": pvalues.hoeffding,
    "hoeffding_bentkus": pvalues.hoeffding_bentkus,
    "convex_order": pvalues.convex_order,
    "betting": lambda losses, delta: pvalues.betting(losses, delta, level=EPSILON),
}


def certified(test: str, losses: NDArray[np.float64]) -> float:
    """Share of the columns that a test certifies."""
    return float(np.mean(TESTS[test](losses, DELTA) <= EPSILON))


def mostly_zero(rng: np.random.Generator, mean: float, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Losses that are 0, or Beta(2, 3) with the probability that gives this mean."""
    return np.where(rng.random(shape) < mean / 0.4, rng.beta(2, 3, shape), 0.0)


def smallest_sample(test: str, delta: float) -> int:
    """Prompts needed if every loss is zero."""
    sizes = range(2, 5000)
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high) // 2
        enough = TESTS[test](np.zeros(sizes[middle]), delta) <= EPSILON
        low, high = (low, middle) if enough else (middle + 1, high)
    return sizes[low]


def main() -> None:
    """Run everything; about 10 seconds."""
    rng = np.random.default_rng(0)
    for n in (200, 500, 2000):
        losses = mostly_zero(rng, 0.08, (n, 1000))
        print(f"power, mostly 0, n={n}:", {test: certified(test, losses) for test in TESTS})
        binary = (rng.random((n, 1000)) < 0.08).astype(float)
        exact = float(np.mean(pvalues.binomial(binary, DELTA) <= EPSILON))
        print(f"power, 0 or 1, n={n}:", {test: certified(test, binary) for test in TESTS} | {"binomial": exact})
    for delta in (0.02, 0.05, 0.1, 0.25):
        print(f"smallest n at zero loss, delta={delta}:", {test: smallest_sample(test, delta) for test in TESTS})

    for n in (200, 1000):
        draws = np.sort(rng.choice([0.0, 0.2], (n, 300)), axis=0)
        print(f"easy prompts first, n={n}: betting certifies {certified('betting', draws):.3f}")

    pool = mostly_zero(rng, DELTA, (1600, 4000))
    looks = [TESTS["betting"](pool[rng.permutation(n)], DELTA) <= EPSILON for n in range(200, 1601, 200)]
    print(f"looks: one {np.mean(looks[0]):.3f}, eight {np.mean(np.any(looks, axis=0)):.3f}")

    effects = rng.normal(size=100_000)
    intercept = optimize.brentq(lambda b: special.expit(b + effects).mean() - DELTA, -5, 0)
    for n in (100, 500):
        wrong = rng.random((n, 20, 1000)) < special.expit(intercept + rng.normal(size=(n, 1, 1000)))
        tokens = rng.permutation(wrong.reshape(-1, 1000).astype(float))
        binomial = float(np.mean(pvalues.binomial(tokens, DELTA) <= EPSILON))
        print(f"tokens as prompts, {n} prompts: betting {certified('betting', tokens):.3f}, binomial {binomial:.3f}")


if __name__ == "__main__":
    main()
