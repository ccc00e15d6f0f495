"""riskcal beside its peers, in one process on the same arrays: time and memory.

Peers are MAPIE and riskgate, where installed (``pip install -r benchmarks/referee.txt``), and plain-numpy versions of the
formulas of Schuster et al. (2022). Times are CPU seconds, the least of several rounds in which all take turns; memory is the
largest growth of the process while the call runs (Linux only). Whether they keep their word is asked by ``referee.py``.
"""

import contextlib
import ctypes
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import command
import riskcal
from laboratory import published, worlds
from riskcal import pvalues, records, trials

with contextlib.suppress(ImportError):
    from riskgate import multirisk
with contextlib.suppress(ImportError):
    from mapie.risk_control import methods as mapie
    from mapie.risk_control._base_controller import ltt_procedure

DELTA, EPSILON = 0.1, 0.05
HAS = {"riskgate": "multirisk" in globals(), "MAPIE": "ltt_procedure" in globals()}

Array = NDArray[np.float64]
Calls = dict[str, Callable[[], Any]]


# Measuring ---------------------------------------------------------------------------------------------------------


def cpu_times(calls: Calls, rounds: int) -> dict[str, float]:
    """Least CPU seconds of each call; short calls are repeated within a round, very long ones are not made again."""
    best = {name: seconds(call) for name, call in calls.items()}  # compiles, and fills caches
    again = {name: call for name, call in calls.items() if best[name] < 20.0}
    repeats = {
        name: max(1, min(200, int(0.02 / max(seconds(call), 1e-6)))) for name, call in again.items()
    }
    for _ in range(rounds):
        for name, call in again.items():
            best[name] = min(best[name], seconds(call, repeats[name]))
    return best


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """CPU seconds of one call, averaged over a few."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def peak_growth(call: Callable[[], Any]) -> float:
    """MiB by which the process grows at most while the call runs; NaN where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        call()
        return (memory("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return math.nan


def memory(field: str) -> int:
    """A figure of this process, in KiB."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1])


def measured(calls: Calls, rounds: int) -> pd.DataFrame:
    """One row per call: milliseconds of CPU, MiB."""
    best = cpu_times(calls, rounds)
    grown = {name: peak_growth(call) for name, call in calls.items()}
    return pd.DataFrame(
        {
            "call": list(calls),
            "ms": [1000 * best[n] for n in calls],
            "MiB": [grown[n] for n in calls],
        }
    )


# What is compared --------------------------------------------------------------------------------------------------


def mapie_bounds(losses: Array) -> Array:
    """MAPIE's betting bounds of all columns, on its grid."""
    k = losses.shape[1]
    return mapie.get_r_hat_plus(losses, np.arange(1, k + 1) / k, "rcps", "wsr", EPSILON, 0.25)[1]


def pvalue_table(rounds: int, n: int = 2000, k: int = 1000, few: int = 100) -> pd.DataFrame:
    """P-values of k columns; the peers' betting on some of them, since MAPIE needs memory of the order k^2."""
    rng = np.random.default_rng(0)
    losses = np.where(rng.random((n, k)) < 0.2, rng.random((n, k)), 0.0)
    some = np.ascontiguousarray(losses[:, :few])
    calls: Calls = {
        "numpy: column means": lambda: losses.mean(0),
        "numpy: Hoeffding": lambda: published.hoeffding(losses.mean(0), n, DELTA),
        "numpy: Hoeffding-Bentkus": lambda: published.hoeffding_bentkus(losses.mean(0), n, DELTA),
        "riskcal: hoeffding": lambda: pvalues.hoeffding(losses, DELTA),
        "riskcal: hoeffding_bentkus": lambda: pvalues.hoeffding_bentkus(losses, DELTA),
        "riskcal: convex_order": lambda: pvalues.convex_order(losses, DELTA),
        "riskcal: betting": lambda: pvalues.betting(losses, DELTA, level=EPSILON),
        f"riskcal: betting, {few} columns": lambda: pvalues.betting(some, DELTA, level=EPSILON),
        f"numpy: WSR, {few} columns": lambda: [
            published.adaptive_bets(column[:, None], DELTA, EPSILON) for column in some.T
        ],
    }
    if HAS["riskgate"]:
        calls["riskgate: hb"] = lambda: multirisk.ltt_pvalues([losses], [DELTA], "hb")
    if HAS["MAPIE"]:
        calls["MAPIE: Hoeffding-Bentkus"] = lambda: mapie.compute_hoeffding_bentkus_p_value(
            losses.mean(0), n, DELTA
        )
        calls[f"MAPIE: WSR, {few} columns"] = lambda: mapie_bounds(some)
    table = measured(calls, rounds)
    columns = np.where(table["call"].str.contains(f"{few} columns"), few, k)
    reference = table.loc[table["call"] == "numpy: column means", "ms"].iloc[0]
    table["us per column"] = 1000 * table["ms"] / columns
    table["x column means"] = np.where(columns == k, table["ms"] / reference, math.nan)
    return table


def split_table(rounds: int, n: int = 2000, k: int = 100, n_trials: int = 1000) -> pd.DataFrame:
    """Random 80/20 splits: fixed sequence on each, mean layers on the rest."""
    world = worlds.steady(k)
    rng = np.random.default_rng(1)
    losses = world.sample(n, rng)
    layers = 8 * (1 - world.saving) + rng.random((n, k))
    runs = riskcal.Runs.from_arrays(
        thresholds=world.thresholds, dissimilarity=losses, layers=layers
    )
    losses, layers = runs.losses(), runs.values["layers"]
    size = round(0.8 * n)

    def loop(decide: Callable[[Array], NDArray[np.bool_]]) -> list[float]:
        generator, results = np.random.default_rng(0), []
        for _ in range(n_trials):
            order = generator.permutation(n)
            certified = decide(losses[order[:size]])
            chosen = np.logical_and.accumulate(certified).sum() - 1
            results.append(layers[order[size:], chosen].mean() if chosen >= 0 else math.nan)
        return results

    def by_formula(sample: Array) -> NDArray[np.bool_]:
        return published.hoeffding_bentkus(sample.mean(0), size, DELTA) <= EPSILON

    def by_riskgate(sample: Array) -> NDArray[np.bool_]:
        ascending = world.thresholds[::-1]
        threshold = multirisk.ltt_threshold([sample[:, ::-1]], ascending, [DELTA], EPSILON, "hb")
        return world.thresholds >= threshold

    def by_mapie(sample: Array) -> NDArray[np.bool_]:
        of_k = np.full((1, k), float(size))
        valid, _ = ltt_procedure(
            sample.mean(0)[None], np.array([[DELTA]]), EPSILON, of_k, fwer_method="fixed_sequence"
        )
        return np.isin(np.arange(k), valid[0])

    def ours(test: str) -> Callable[[], pd.DataFrame]:
        return lambda: trials.run_trials(runs, DELTA, n_trials=n_trials, test=test)

    tests = ("hoeffding_bentkus", "convex_order", "betting")
    calls: Calls = {f"riskcal: run_trials, {test}": ours(test) for test in tests}
    calls["numpy: Hoeffding-Bentkus, split by split"] = lambda: loop(by_formula)
    if HAS["riskgate"]:
        calls["riskgate: ltt_threshold, split by split"] = lambda: loop(by_riskgate)
    if HAS["MAPIE"]:
        calls["MAPIE: ltt_procedure, split by split"] = lambda: loop(by_mapie)
    return measured(calls, rounds)


def replay_table(rounds: int, tokens: int, n_layers: int = 24, k: int = 100) -> pd.DataFrame:
    """Traces of many tokens, 100 a prompt, to runs of (prompts, k), beside reading confidences and outcomes once."""
    rng = np.random.default_rng(2)
    prompts = max(tokens // 100, 2)
    prompt = np.sort(rng.integers(0, prompts, tokens))
    start = np.flatnonzero(np.r_[True, prompt[1:] != prompt[:-1]])
    position = np.arange(tokens) - np.repeat(start, np.diff(np.r_[start, tokens]))
    confidence = rng.random((tokens, n_layers), dtype=np.float32)
    np.sqrt(confidence, out=confidence)
    agrees = np.empty((tokens, n_layers), dtype=bool)
    for layer in range(n_layers):
        agrees[:, layer] = rng.random(tokens, dtype=np.float32) < (layer + 1) / n_layers
    agrees[:, -1] = True
    traces = records.Traces(prompt=prompt, position=position, confidence=confidence, agrees=agrees)
    thresholds = np.linspace(0.999, 0.009, k)

    def read() -> float:
        return float(confidence.max()) + np.count_nonzero(agrees)

    def by_formula() -> list[float]:
        """One threshold; the rule of Schuster et al. (2022), first layer at or above it, over all tokens."""
        exits = confidence >= 0.5
        exits[:, -1] = True
        return list(np.take_along_axis(agrees, exits.argmax(1)[:, None], axis=1)[:, 0])[:1]

    calls: Calls = {
        "numpy: reading the arrays once": read,
        "riskcal: replay_traces": lambda: riskcal.replay_traces(traces, thresholds),
        "numpy: one threshold of the hundred": by_formula,
    }
    table = measured(calls, rounds)
    table["x reading"] = table["ms"] / table["ms"].iloc[0]
    return table


def ends(tables: dict[str, pd.DataFrame]) -> list[str]:
    """What had to be reached, and whether it was."""
    p = tables["p-values"].set_index("call")
    sums = p.loc[
        ["riskcal: hoeffding", "riskcal: hoeffding_bentkus", "riskcal: convex_order"],
        "x column means",
    ].max()
    betting = p.loc["riskcal: betting", "x column means"]
    lines = [
        f"sum-based p-values: {sums:.2f} x column means (end 1.3)",
        f"betting: {betting:.1f} x column means (end 12, aim 8)",
    ]
    for peer, end in (
        ("numpy: WSR, 100 columns", "no end set"),
        ("MAPIE: WSR, 100 columns", "end 20"),
    ):
        if peer in p.index:
            factor = p.loc[peer, "us per column"] / p.loc["riskcal: betting", "us per column"]
            lines.append(
                f"betting per column: {factor:.0f} x as fast as {peer.split(',')[0]} ({end})"
            )
    splits = tables["splits"].set_index("call")["ms"]
    slowest = max(
        splits[f"riskcal: run_trials, {test}"] for test in ("hoeffding_bentkus", "convex_order")
    )
    lines.append(f"1,000 splits, sum-based: {slowest / 1000:.3f} s of CPU (end .1)")
    factor = tables["replay"].set_index("call").loc["riskcal: replay_traces", "x reading"]
    lines.append(f"replay_traces: {factor:.1f} x reading the arrays once (end 3)")
    return lines


def main() -> None:
    """Measure, print, and write the figures if asked to."""
    parser = command.parser(__doc__)
    parser.add_argument(
        "--tokens", type=int, default=10_000_000, help="tokens replayed; about 120 bytes each"
    )
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="mapie")

    absent = [name for name, found in HAS.items() if not found]
    for name in absent:
        print(
            f"{name} is not installed, so nothing is measured of it: pip install -r benchmarks/referee.txt"
        )
    tables = {
        "p-values": pvalue_table(options.rounds),
        "splits": split_table(max(options.rounds // 2, 1)),
        "replay": replay_table(max(options.rounds // 2, 1), options.tokens),
    }
    titles = {
        "p-values": "P-values of 2,000 x 1,000 losses",
        "splits": "1,000 random 80/20 splits, 2,000 prompts x 100 candidates",
        "replay": f"Replay of {options.tokens:,} tokens x 24 layers under 100 thresholds",
    }
    for name, table in tables.items():
        print(f"\n{titles[name]}\n\n{table.to_string(index=False, float_format='%.3f', na_rep='')}")
    reached = ends(tables)
    print("", *reached, sep="\n")
    if options.json:
        figures: dict[str, Any] = {
            name: json.loads(table.to_json(orient="records")) for name, table in tables.items()
        }
        figures |= {
            "ends": reached,
            "not installed": absent,
            "tokens": options.tokens,
            "machine": platform.machine(),
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
