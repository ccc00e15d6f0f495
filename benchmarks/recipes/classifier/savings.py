"""What each kind of certificate saves on the shipped classifier's requests, over repeated splits; no torch is needed.

``PYTHONPATH=benchmarks python -m recipes.classifier.savings`` writes
``benchmarks/results/recipes/classifier-savings.json``: over 50 random splits, each certificate made on 80% of the requests and
measured on the others.
"""

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import riskcal
from riskcal.internal import Floats, replacing

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "recipes" / "classifier-savings.json"
SPLITS, HELD_OUT = 50, 0.2
DELTAS = (0.02, 0.05, 0.1)
#: More candidates cost a fixed sequence nothing and Holm's procedure little, and heads choose among finer ones.
THRESHOLDS = np.round(np.linspace(0.95, 0.3, 66), 2)

Rows = NDArray[np.intp]


def certified(traces: riskcal.Traces, rows: Rows, delta: float) -> Iterator[tuple[str, Floats]]:
    """Each kind of certificate by name, and its thresholds, one per exit before the last."""
    exits = traces.n_layers - 1
    runs = riskcal.replay_traces(_of(traces, rows), THRESHOLDS, exact=True)
    for name, asked in (("mean", "textual"), ("pooled", "selective")):
        found = riskcal.calibrate(runs, delta=delta, objective=asked, cost="flops")
        yield f"one threshold, {name}", np.full(exits, found.threshold)
    heads = riskcal.heads.certified(
        traces.confidence[rows, :-1],
        _agrees(traces)[rows, :-1],
        prompts=traces.prompt[rows],
        max_tokens=1,
        agreement=1 - delta,
        layers=range(1, exits + 1),
    )
    yield "a threshold per exit", heads.thresholds


def measured(traces: riskcal.Traces, rows: Rows, thresholds: Floats) -> dict[str, float]:
    """Loss over all requests and over those that stop early, and FLOPs as a share of the full network's."""
    losses, exits, costs = riskcal.replay_arrays(
        traces.confidence[rows],
        1.0 - _agrees(traces)[rows],
        thresholds[None, :],
        costs=traces.costs["flops"][rows],
    )
    early = exits[:, 0] < traces.n_layers
    loss = np.asarray(losses)[:, 0]
    return {
        "mean loss": float(loss.mean()),
        "pooled loss": float(loss[early].mean()) if early.any() else math.nan,
        "stopped early": float(early.mean()),
        "share of FLOPs": float(costs["cost"].mean() / traces.costs["flops"][0, -1]),
    }


def _agrees(traces: riskcal.Traces) -> NDArray[np.bool_]:
    assert traces.agrees is not None
    return traces.agrees


def _of(traces: riskcal.Traces, rows: Rows) -> riskcal.Traces:
    return riskcal.Traces.from_arrays(
        prompt=traces.prompt[rows],
        position=traces.position[rows],
        confidence=traces.confidence[rows],
        agrees=_agrees(traces)[rows],
        cost={"flops": traces.costs["flops"][rows]},
    )


def main() -> None:
    traces = riskcal.load_example("stress")
    n = len(traces.prompt)
    found: dict[tuple[float, str], list[dict[str, float]]] = {}
    for seed in range(SPLITS):
        shuffled = np.random.default_rng(seed).permutation(n)
        held_out, rows = shuffled[: int(HELD_OUT * n)], np.sort(shuffled[int(HELD_OUT * n) :])
        for delta in DELTAS:
            for name, thresholds in certified(traces, rows, delta):
                found.setdefault((delta, name), []).append(measured(traces, held_out, thresholds))
    table = [
        {"delta": delta, "certificate": name, **_summary(splits)}
        for (delta, name), splits in found.items()
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    conditions = {
        "command": "PYTHONPATH=benchmarks python -m recipes.classifier.savings",
        "commit": commit.strip(),
        "splits": SPLITS,
        "held out": HELD_OUT,
        "epsilon": 0.05,
    }
    with replacing(RESULTS) as partial:
        partial.write_text(
            json.dumps({"conditions": conditions, "table": table}, indent=1) + "\n", "utf-8"
        )
    print(json.dumps(table, indent=1))


def _summary(splits: list[dict[str, float]]) -> dict[str, Any]:
    columns = {name: np.array([split[name] for split in splits]) for name in splits[0]}
    return {
        f"{name}, {kind}": round(float(of(values)), 4)
        for name, values in columns.items()
        for kind, of in (("mean", np.nanmean), ("sd", np.nanstd), ("median", np.nanmedian))
    }


if __name__ == "__main__":
    main()
