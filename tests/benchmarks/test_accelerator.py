"""The accelerator script in small, on whatever device there is: every check holds, every part is measured, within its minutes."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accelerator.py"


def test_smoke_checks_and_measures_every_part(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--minutes", "8", "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(figures.read_text())
    assert found["device"]
    assert found["smoke"]
    assert not found["left_out"]
    assert len(found["checks"]) >= 33
    assert all(check["holds"] for check in found["checks"])
    measured = {(row["model"].split(",")[0], row["setting"]) for row in found["timings"]}
    assert {
        ("g2p", "certified"),
        ("g2p", "generate"),
        ("g2p", "full model, device's loop"),
        ("g2p", "certified, host's loop"),
        ("g2p", "certified, device's loop without lag"),
        ("random T5", "forced depths, device's loop"),
        ("random Llama", "forced depths, device's loop"),
        ("random T5", "forced depths, regrouped"),
        ("random Llama", "forced depths, regrouped"),
        ("g2p through the engine", "engine, certified"),
    } <= measured
    assert any(model.startswith("g2p in JAX") for model, _ in measured)


def test_no_time_left_means_left_out_and_named(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--minutes", "0.01", "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(figures.read_text())["left_out"] == [
        "checks",
        "loops",
        "shipped model",
        "T5-large",
        "causal checks",
        "engine",
        "Llama 1B",
        "JAX",
    ]
