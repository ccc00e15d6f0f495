"""Labels needed for a power of .8 with a proxy and without, on the shipped records, and false certificates at the boundary.

The words of ``load_example("g2p")``, drawn with replacement; a quadratic in a word's layers and tokens foretells its loss. It
is fitted on 500 words, and the others are the population. For each threshold and n, delta is the one at which plain betting
has a power of .8 with n labels; then labels are counted until the helped test has it, with ten unlabelled words each. Both
see the same draws. "idle" is a random number, "opposite" one minus the fitted proxy, "perfect" the loss itself. For false
certificates delta is the population's very mean.

Monitors see such words as traffic, a tenth of them sampled: how many losses until the alarm, in the median, if the mean is so
many times delta, from the start or after 10,000 requests of mean .7 delta; and their false alarms at a mean of exactly delta:
the share of Ville's within 50,000 requests, and the mean number of losses until the e-detector's.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

import riskcal
from riskcal import RiskMonitor

Array = NDArray[np.float64]

THRESHOLDS, SIZES, LEVEL, POWER = (0.7, 0.5, 0.3), (200, 300, 500, 1000, 2000, 3000), 0.05, 0.8
FITTED, EACH, DRAWS, NULL_DRAWS, STREAMS = 500, 10, 1000, 4000, 200
HELPED, STEP = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1), 0.2
CHUNK = 100
SAMPLED, RUN_LENGTH, EXCESS = 0.1, 1000, (1.2, 1.5, 2.0)


def quadratic(layers: Array, tokens: Array) -> Array:
    return np.stack(
        [np.ones_like(layers), layers, tokens, layers**2, layers * tokens, tokens**2], axis=-1
    )


def population(runs: Any, threshold: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Losses of the words that the proxy was not fitted on, and what it says of them."""
    column = int(np.abs(runs.thresholds - threshold).argmin())
    losses = runs.losses("textual")[:, column]
    features = quadratic(runs.values["layers"][:, column], runs.values["tokens"][:, column])
    order = rng.permutation(runs.n)
    fitted, rest = order[:FITTED], order[FITTED:]
    weights = np.linalg.lstsq(features[fitted], losses[fitted], rcond=None)[0]
    return losses[rest], features[rest] @ weights


def proxies(losses: Array, fitted: Array, rng: np.random.Generator) -> dict[str, Array]:
    return {
        "fitted": fitted,
        "idle": rng.random(len(losses)),
        "opposite": 1.0 - fitted,
        "perfect": losses,
    }


def rejected(
    losses: Array, proxy: Array | None, n: int, delta: float, seed: int, draws: int
) -> float:
    """The share of draws of n labels in which the hypothesis is rejected; the same draws with every proxy and none."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws // CHUNK):
        labelled = rng.integers(len(losses), size=(n, CHUNK))
        others = rng.integers(len(losses), size=(EACH * n, CHUNK), dtype=np.int32)
        if proxy is None:
            p = riskcal.pvalues.betting(losses[labelled], delta, level=LEVEL)
        else:
            p = riskcal.pvalues.betting_with_proxy(
                losses[labelled], proxy[labelled], proxy[others], delta, level=LEVEL
            )
        found.append(np.mean(p <= LEVEL))
    return float(np.mean(found))


def needed(power: Callable[[int], float], n: int) -> int:
    """Labels for the power asked for, between the sizes tried."""
    powers = np.maximum.accumulate([power(round(share * n)) for share in HELPED])
    return round(n * float(np.interp(POWER, powers, HELPED)))


def delta_for(losses: Array, n: int, seed: int) -> float:
    """Where plain betting has the power asked for with n labels."""
    low, high = losses.mean(), 3.0 * losses.mean()
    for _ in range(11):
        middle = 0.5 * (low + high)
        enough = rejected(losses, None, n, middle, seed, DRAWS) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return float(high)


def alarm(
    losses: Array,
    proxy: Array | None,
    delta: float,
    seed: int,
    *,
    good: int,
    harmless: float,
    requests: int,
    **options: Any,
) -> tuple[float, bool]:
    """Losses until the alarm, of those after so many good requests, or until the end; and whether there was one.

    Of the good requests the share ``harmless`` are words without any loss.
    """
    rng = np.random.default_rng(seed)
    words = rng.integers(len(losses), size=good + requests)
    unharmed = np.flatnonzero(losses == 0)
    words[:good] = np.where(
        rng.random(good) < harmless, unharmed[rng.integers(unharmed.size, size=good)], words[:good]
    )
    seen = np.where(rng.random(words.size) < SAMPLED, losses[words], np.nan)
    if proxy is None:
        told = RiskMonitor(delta, sampling_rate=SAMPLED, **options).update(seen[~np.isnan(seen)])
    else:
        span = (float(proxy.min()), float(proxy.max()))
        monitor = RiskMonitor(delta, sampling_rate=SAMPLED, proxy=span, **options)
        told = monitor.update(seen, proxies=proxy[words])
    before = int((~np.isnan(seen[:good])).sum())
    return (told.alarm_at or told.n) - before, told.alarm


def monitors(losses: Array, known: dict[str, Array]) -> dict[str, Any]:
    """Median delays and false alarms, without a proxy and with each."""
    alarms = {"ville": {"epsilon": 0.05}, "e-detector": {"average_run_length": RUN_LENGTH}}
    delays, false, mean = [], [], float(losses.mean())
    for name, proxy in tqdm({"none": None, **known}.items()):
        for kind, options in alarms.items():
            for excess in EXCESS:
                for good in (0, 10_000):
                    found = [
                        alarm(
                            losses,
                            proxy,
                            mean / excess,
                            i,
                            good=good,
                            harmless=1 - 0.7 / excess,
                            requests=60_000,
                            **options,
                        )[0]
                        for i in range(STREAMS)
                    ]
                    row = {"proxy": name, "alarm": kind, "times_delta": excess, "good": good}
                    delays.append(row | {"losses": float(np.median(found))})
            found = [
                alarm(losses, proxy, mean, i, good=0, harmless=0.0, requests=50_000, **options)
                for i in range(2 * STREAMS)
            ]
            length, share = np.mean(found, axis=0)
            row = {"proxy": name, "alarm": kind, "mean_losses": round(float(length))}
            false.append(row | {"alarms": round(float(share), 4)})
    return {"streams": STREAMS, "delays": delays, "false_alarms": false}


def measure() -> dict[str, Any]:
    runs, rng = riskcal.load_example("g2p"), np.random.default_rng(0)
    labels, false = [], []
    for threshold in tqdm(THRESHOLDS):
        losses, fitted = population(runs, threshold, rng)
        known = proxies(losses, fitted, rng)
        explained = float(np.corrcoef(losses, fitted)[0, 1] ** 2)
        for n in tqdm(SIZES, leave=False):
            delta = delta_for(losses, n, n)

            def power(
                proxy: Array | None, at: float = delta, seed: int = n, of: Array = losses
            ) -> Callable[[int], float]:
                return lambda size: rejected(of, proxy, size, at, seed, DRAWS)

            plain, idle = power(None), power(known["idle"])
            slope = (plain(round(n * (1 + STEP))) - plain(round(n * (1 - STEP)))) / (2 * STEP)
            labels.append(
                {
                    "threshold": threshold,
                    "n": n,
                    "delta": round(delta, 4),
                    "explained": round(explained, 3),
                    "power_without": round(plain(n), 4),
                    "power_with": round(power(fitted)(n), 4),
                    "labels_with": needed(power(fitted), n),
                    "power_idle": round(idle(n), 4),
                    "labels_idle_over_none": round(1 + (plain(n) - idle(n)) / slope, 4),
                }
            )
        for name, proxy in known.items():
            for n in (200, 1000):
                share = rejected(losses, proxy, n, float(losses.mean()), n, NULL_DRAWS)
                row = {"threshold": threshold, "proxy": name, "n": n, "false": round(share, 4)}
                false.append(row)
    losses, fitted = population(runs, 0.5, rng)
    watched = monitors(losses, proxies(losses, fitted, rng))
    return {"draws": DRAWS, "null_draws": NULL_DRAWS, "labels": labels, "false": false, **watched}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    target = parser.parse_args().json
    figures = measure()
    for kind in ("labels", "false", "delays", "false_alarms"):
        for row in figures[kind]:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    if target is not None:
        target.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
