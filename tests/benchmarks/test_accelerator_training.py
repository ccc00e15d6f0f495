"""The training script in small: it learns, keeps the full path, and, killed and started again, ends with the same bytes."""

import json
import queue
import subprocess
import sys
import time
from pathlib import Path

import accelerator
import accelerator_training

SCRIPT = Path(accelerator_training.__file__)
RESULTS = [
    *("adapters/adapters.safetensors", "adapters/adapters.json"),
    *("heads/heads.safetensors", "heads/heads.json"),
]


def command(folder: Path) -> list[str]:
    options = ["--smoke", "--work", str(folder), "--json", str(folder.with_suffix(".json"))]
    return [sys.executable, str(SCRIPT), *options]


def finished(folder: Path) -> dict:
    run = subprocess.run(command(folder), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(folder.with_suffix(".json").read_text())


def killed_once_begun(folder: Path) -> None:
    """End the process as soon as it has noted some steps, without a word to it."""
    run = subprocess.Popen(command(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "tuning" / "state.safetensors").exists():
        assert run.poll() is None, "it ended before it noted a step"
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert not (folder / "adapters").exists()


def test_smoke_learns_and_goes_on_after_a_kill_to_the_same_bytes(tmp_path: Path) -> None:
    found = finished(tmp_path / "whole")
    assert found["device"]
    assert found["model"].startswith("random Llama")
    assert not found["left_out"]
    assert {check["check"]: check["holds"] for check in found["checks"]} == {
        "exits are nearer to the full model": True,
        "the full path keeps its tokens": True,
        "the full policy is generate": True,
        "what was saved decodes alike": True,
    }
    steps = [row for row in found["timings"] if "step" in row]
    assert [row["step"] for row in steps] == [f"{step} of 20" for step in (5, 10, 15, 20)]
    assert all(row["tokens/s"] > 0 for row in steps)
    assert found["result"]["steps"] == 20
    decoded = [row for row in found["timings"] if row.get("decoded") == "tuned, saved and loaded"]
    assert min(row["mean exit layer"] for row in decoded) < 4

    killed_once_begun(tmp_path / "killed")
    again = finished(tmp_path / "killed")
    assert len([row for row in again["timings"] if "step" in row]) < len(steps)
    assert again["result"] == found["result"]
    for name in RESULTS:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_no_time_left_means_left_out_and_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(accelerator_training, "ends", lambda report: None)
    monkeypatch.setattr(sys, "argv", [*command(tmp_path / "work")[1:], "--minutes", "0.05"])
    assert accelerator_training.main() == 0
    assert json.loads((tmp_path / "work.json").read_text())["left_out"] == ["training"]


def test_what_looks_at_no_clock_is_ended_too(tmp_path: Path, monkeypatch) -> None:
    """A watch ends the process from beside the work; here it only says so."""
    ended: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(accelerator_training.os, "_exit", ended.put)
    accelerator_training.ends(accelerator.Report(0.1, tmp_path / "found.json"))
    assert ended.get(timeout=300) == 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["left_out"] == ["what was under way when the time was over"]
