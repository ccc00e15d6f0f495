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


def mostly_zero(
    rng: np.random.Generator, mean: float, shape: tuple[int, int]
) -> NDArray[np.float64]:
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


def reversals(losses: NDArray[np.float64], rng: np.random.Generator) -> dict[str, float]:
    """Share of the columns in which betting is not monotone: in one loss, in delta, in epsilon."""
    n, draws = losses.shape
    p = pvalues.betting(losses, DELTA, level=EPSILON)
    raised, row, column = losses.copy(), rng.integers(n, size=draws), np.arange(draws)
    raised[row, column] += rng.random(draws) * (1 - raised[row, column])
    after = pvalues.betting(raised, DELTA, level=EPSILON)
    by_delta = [
        pvalues.betting(losses, delta, level=EPSILON) <= EPSILON
        for delta in np.linspace(0.06, 0.2, 29)
    ]
    by_epsilon = [
        pvalues.betting(losses, DELTA, level=level) <= level for level in np.linspace(0.01, 0.2, 20)
    ]
    return {
        "one loss raised: p-value falls": float(np.mean(after < p * (1 - 1e-9))),
        "one loss raised: certified only then": float(np.mean((after <= EPSILON) & (p > EPSILON))),
        "delta raised: certified only before": float(
            np.mean((np.diff(np.array(by_delta, int), axis=0) < 0).any(0))
        ),
        "epsilon raised: certified only before": float(
            np.mean((np.diff(np.array(by_epsilon, int), axis=0) < 0).any(0))
        ),
    }


def main() -> None:
    """Run everything; about 15 seconds."""
    rng = np.random.default_rng(0)
    for n in (200, 500, 2000):
        losses = mostly_zero(rng, 0.08, (n, 4000))
        print(f"power, mostly 0, n={n}:", {test: certified(test, losses) for test in TESTS})
        binary = (rng.random((n, 4000)) < 0.08).astype(float)
        exact = float(np.mean(pvalues.binomial(binary, DELTA) <= EPSILON))
        print(
            f"power, 0 or 1, n={n}:",
            {test: certified(test, binary) for test in TESTS} | {"binomial": exact},
        )
    for delta in (0.02, 0.05, 0.1, 0.25):
        print(
            f"smallest n at zero loss, delta={delta}:",
            {test: smallest_sample(test, delta) for test in TESTS},
        )

    for n in (200, 1000):
        draws = np.sort(rng.choice([0.0, 0.2], (n, 300)), axis=0)
        print(f"easy prompts first, n={n}: betting certifies {certified('betting', draws):.3f}")

    pool = mostly_zero(rng, DELTA, (1600, 4000))
    looks = [
        TESTS["betting"](pool[rng.permutation(n)], DELTA) <= EPSILON for n in range(200, 1601, 200)
    ]
    print(f"looks: one {np.mean(looks[0]):.3f}, eight {np.mean(np.any(looks, axis=0)):.3f}")

    effects = rng.normal(size=100_000)
    intercept = optimize.brentq(lambda b: special.expit(b + effects).mean() - DELTA, -5, 0)
    for n in (100, 500):
        wrong = rng.random((n, 20, 1000)) < special.expit(intercept + rng.normal(size=(n, 1, 1000)))
        tokens = rng.permutation(wrong.reshape(-1, 1000).astype(float))
        binomial = float(np.mean(pvalues.binomial(tokens, DELTA) <= EPSILON))
        print(
            f"tokens as prompts, {n} prompts: betting {certified('betting', tokens):.3f}, binomial {binomial:.3f}"
        )

    rng = np.random.default_rng(1)
    print(
        "betting, 4,000 samples of 500 prompts, mostly 0:",
        reversals(mostly_zero(rng, 0.08, (500, 4000)), rng),
    )
    print(
        "betting, the same, 0 or 1:", reversals((rng.random((500, 4000)) < 0.08).astype(float), rng)
    )


if __name__ == "__main__":
    main()
