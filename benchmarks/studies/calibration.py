"""Calibrated exits over the tolerance: held-out losses, layers, FLOPs and times (CALM, Figs. B.1 to B.4, Table 2; B.7, B.8).

``PYTHONPATH=benchmarks python benchmarks/studies/calibration.py [--model g2p|numbers] [--checkpoint FOLDER]``

50 random splits, 80% to calibrate, epsilon .05. As Schuster et al. (2022) have it ("documents"): Hoeffding-Bentkus p-values, risk
clipped at the full model's. As riskcal has it by default: betting, and differences of risk that may be negative.
"""

import time
from typing import Any

import common
import figures
import numpy as np
import pandas as pd

import riskcal
from riskcal import ExitPolicy, efficiency

MEASURES = ("softmax", "state", "classifier")
SIZE = 9  # thresholds of each measure
DELTAS = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
TABLE = {"textual": (0.1, 0.25), "risk": (0.02, 0.05)}
PROTOCOLS = {
    ("documents", "textual"): {"objective": "textual", "test": "hoeffding_bentkus"},
    ("documents", "risk"): {"objective": "risk_clipped", "test": "hoeffding_bentkus"},
    ("riskcal", "textual"): {"objective": "textual", "test": "betting"},
    ("riskcal", "risk"): {"objective": "risk", "test": "betting"},
}
TIMED, ROUNDS = 8, 4


def columns(
    task: common.Task, decoder: Any, decoded: common.Decoded, full: common.Decoded, measure: str
) -> dict:
    """Losses and costs of every prompt."""
    edits = [task.edits(*pair) for pair in zip(decoded.texts, task.references, strict=True)]
    return {
        "prompt": np.arange(len(task.prompts)),
        "dissimilarity": [
            task.distance(*pair) for pair in zip(decoded.texts, full.texts, strict=True)
        ],
        "risk": [min(1.0, wrong / length) for wrong, length in edits],
        "layers": decoded.exits.sum(1) / decoded.tokens,
        "tokens": decoded.tokens,
        "flops": common.flops(decoder, task, decoded, measure).adaptive / decoded.tokens,
    }


def record(task: common.Task, decoder: Any, measure: str, full: common.Decoded) -> riskcal.Runs:
    """All prompts at all thresholds of a measure."""
    parts = [pd.DataFrame({"threshold": np.inf, **columns(task, decoder, full, full, "static")})]
    for threshold in common.thresholds(decoder, task, measure, SIZE):
        decoded = common.decode(decoder, task, ExitPolicy(measure=measure, threshold=threshold))
        parts.append(
            pd.DataFrame({"threshold": threshold, **columns(task, decoder, decoded, full, measure)})
        )
    return riskcal.Runs.from_frame(pd.concat(parts, ignore_index=True))


def calibrated(name: str, runs: riskcal.Runs) -> list[dict[str, Any]]:
    """Means and standard deviations over the trials, for every protocol and tolerance."""
    rows = []
    for (protocol, consistency), settings in PROTOCOLS.items():
        each = riskcal.run_trials(runs, DELTAS, n_trials=50, seed=0, epsilon=0.05, **settings)
        for delta, some in each.groupby("delta"):
            ratio = (some["full_flops"] / some["flops"]).mean() if "flops" in some else None
            rows.append(
                {
                    "measure": name,
                    "protocol": protocol,
                    "consistency": consistency,
                    "delta": delta,
                    "certified": some["certified"].mean(),
                    "loss": some["heldout_loss"].mean(),
                    "loss_sd": some["heldout_loss"].std(),
                    "above": (some["heldout_loss"] > delta).mean(),
                    "layers": some["layers"].mean(),
                    "layers_sd": some["layers"].std(),
                    "flops_ratio": ratio,
                }
            )
    return rows


def speeds(task: common.Task, decoder: Any, policies: dict[str, ExitPolicy]) -> pd.DataFrame:
    """CPU seconds of single requests, encoder included, settings in turns."""
    some = [decoder.encode([prompt]) for prompt in task.prompts[:TIMED]]
    rows = []
    for turn in range(ROUNDS):
        for run, encoded in enumerate(some):
            for name in np.roll(list(policies), turn + run):
                began = time.process_time()
                decoder.generate(
                    *encoded, policy=policies[name], max_new_tokens=task.max_new_tokens
                )
                rows.append(
                    {
                        "round": turn,
                        "run": run,
                        "setting": name,
                        "seconds": time.process_time() - began,
                    }
                )
    return efficiency.speed_table(pd.DataFrame(rows), ["full"]).set_index("setting")


def main() -> None:
    parser = common.parser(__doc__)
    options = parser.parse_args()
    options.words = options.words or (1000 if options.model == "g2p" else 300)
    task, decoder = common.load(options)
    full = common.decode(decoder, task, ExitPolicy())
    trials, table, policies = [], [], {"full": ExitPolicy()}
    if options.model == "g2p" and options.checkpoint is None:  # the records are the shipped model's
        trials += calibrated("softmax, 3,000 test words", riskcal.load_example("g2p"))
    for measure in common.available(decoder, MEASURES):
        runs = record(task, decoder, measure, full)
        print(measure, flush=True)
        trials += calibrated(measure, runs)
        for consistency, deltas in TABLE.items():
            for delta in deltas:
                chosen = riskcal.calibrate(
                    runs, delta=delta, epsilon=0.05, **PROTOCOLS["documents", consistency]
                )
                name = f"{measure}, {consistency} {delta:g}"
                policies[name] = ExitPolicy(measure=measure, threshold=chosen.threshold)
                table.append(
                    {
                        "setting": name,
                        "consistency": consistency,
                        "delta": delta,
                        "measure": measure,
                    }
                    | {"threshold": "full" if np.isinf(chosen.threshold) else chosen.threshold}
                )
    timed = speeds(task, decoder, policies)
    of_trials = {
        (t["measure"], t["consistency"], t["delta"]): t
        for t in trials
        if t["protocol"] == "documents"
    }
    for line in table:
        mean = of_trials[line["measure"], line["consistency"], line["delta"]]
        line |= {name: mean[name] for name in ("layers", "flops_ratio")}
        line |= {
            "speedup": timed.loc[line["setting"], "x full"],
            "low": timed.loc[line["setting"], "x full low"],
        }
        line |= {"high": timed.loc[line["setting"], "x full high"]}
    found = {
        "epsilon": 0.05,
        "trials": trials,
        "table": table,
        "timed": {"prompts": TIMED, "rounds": ROUNDS - 1},
    }
    figures.save(common.save("calibration", options, decoder, task, found))


if __name__ == "__main__":
    main()
