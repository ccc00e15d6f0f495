"""Which committed benchmark results the code has outgrown; ``--rerun`` measures all of them afresh.

A result in ``benchmarks/results`` is what a benchmark printed, as JSON, with the commit that it was measured on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)


def outgrown(script: Path) -> str | None:
    """Why a benchmark should be run again, or None if nothing that it measures has changed since."""
    result = RESULTS / f"{script.stem}.json"
    if not result.exists():
        return "was never run"
    commit = json.loads(result.read_text())["commit"]
    changed = git("diff", "--stat", commit, "--", "riskcal", "adapters", str(script))
    if changed.returncode:
        return f"was run on {commit[:12]}, which this checkout does not know"
    return f"was run on {commit[:12]}; the code has changed since" if changed.stdout else None


def rerun(script: Path) -> None:
    print(f"== {script.name}", flush=True)
    commit = git("rev-parse", "HEAD").stdout.strip()
    printed = subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed)
    result = RESULTS / f"{script.stem}.json"
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps({"commit": commit, "printed": printed.splitlines()}, indent=1) + "\n")
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
