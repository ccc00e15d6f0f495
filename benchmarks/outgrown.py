"""Which committed benchmark results the code has outgrown; ``--rerun`` measures all of them afresh.

A result in ``benchmarks/results`` is JSON: the commit that it was measured on, and what the benchmark printed, or the figures
that it writes itself where it has an option ``--json``. ``exit_aware.py`` trains for hours and keeps its own.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
RESULTS = HERE / "results"
#: Measures nothing, or nothing anew.
OTHERS = (
    *("outgrown", "accelerator_causal", "accelerator_loops", "exit_aware_figures", "timing"),
    *("command", "mutations"),
)
#: What measurements are made with, beside the script itself.
SHARED = (":/riskcal", ":/adapters", ":/benchmarks/timing.py", ":/benchmarks/laboratory")
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path.stem not in OTHERS)


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False
    )


def outgrown(script: Path) -> str | None:
    """Why a benchmark should be run again, or None if nothing that it measures has changed since."""
    result = RESULTS / f"{script.stem}.json"
    if not result.exists():
        return "was never run"
    commit = json.loads(result.read_text())["commit"]
    changed = git("diff", "--stat", commit, "--", *SHARED, str(script))
    if changed.returncode:
        return f"was run on {commit[:12]}, which this checkout does not know"
    return f"was run on {commit[:12]}; the code has changed since" if changed.stdout else None


def rerun(script: Path) -> None:
    print(f"== {script.name}", flush=True)
    commit = git("rev-parse", "HEAD").stdout.strip()
    result = RESULTS / f"{script.stem}.json"
    partial = result.with_suffix(".partial")
    keeps_its_own = script.stem == "exit_aware"
    code = script.read_text()
    writes = not keeps_its_own and ('"--json"' in code or "command.parser(__doc__)" in code)
    options = ["--json", str(partial)] if writes else []
    with TemporaryDirectory() as folder:  # where another would go on from what it did before
        options += ["--work", folder] if script.stem == "accelerator_training" else []
        run = subprocess.run(
            [sys.executable, str(script), *options], check=True, stdout=subprocess.PIPE, text=True
        )
    print(run.stdout)
    if not keeps_its_own:
        figures = (
            json.loads(partial.read_text()) if writes else {"printed": run.stdout.splitlines()}
        )
        partial.write_text(json.dumps({"commit": commit} | figures, indent=1) + "\n")
        partial.replace(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rerun", nargs="*", metavar="NAME", help="measure these afresh, or all")
    wanted = parser.parse_args().rerun
    if wanted is not None:
        RESULTS.mkdir(exist_ok=True)
        for script in SCRIPTS:
            if not wanted or script.stem in wanted:
                rerun(script)
        return
    for script in SCRIPTS:
        reason = outgrown(script)
        print(f"benchmarks/{script.name}: {reason or 'result is current'}")


if __name__ == "__main__":
    main()
