"""What a recipe found, as JSON beside the command that finds it again."""

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import riskcal
from riskcal.internal import replacing

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "recipes"


def certified(
    runs: riskcal.Runs, deltas: Sequence[float], cost: str, objective: str = "textual"
) -> dict[str, Any]:
    """What is certified at each delta, and what 20 calibrations on random four fifths do on the rest."""
    trials = riskcal.run_trials(
        runs, deltas, n_trials=20, objective=objective, cost=cost, seed=0
    ).groupby("delta")
    found: dict[str, Any] = {}
    for delta in deltas:
        calibration = riskcal.calibrate(runs, delta=delta, objective=objective, cost=cost)
        of = trials.get_group(delta)
        found[str(delta)] = {
            "certified": calibration.certified,
            "thresholds": calibration.policy().thresholds or str(calibration.threshold),
            "chosen": _numbers(calibration.chosen if calibration.certified else {}),
            "full": _numbers(calibration.full_costs),
            "splits certified": int(of["certified"].sum()),
            "held-out loss": float(of["heldout_loss"].mean()),
            "held-out cost": float(of[cost].mean()),
        }
    return found


def write(name: str, figures: dict[str, Any]) -> None:
    """Write what was found, with what is needed to find it again."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    conditions = {
        "command": f"PYTHONPATH=benchmarks python -m recipes.{name}.records --out {name}-records",
        "commit": commit.strip(),
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    with replacing(RESULTS / f"{name}.json") as partial:
        text = json.dumps(_rounded({"conditions": conditions} | figures), indent=1)
        partial.write_text(text + "\n", encoding="utf-8")


def _numbers(row: Any) -> dict[str, float]:
    wanted = ("loss", "price", "tokens", "thought", "give_up")
    return {name: float(row[name]) for name in wanted if name in row}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
