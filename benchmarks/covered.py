"""Which lines of riskcal/ the tests of the core run with numba's compiler off: ``python benchmarks/covered.py --json FILE``.

``make coverage`` runs them, one file of tests at a time, and keeps each file's lines in ``build/coverage``: a run that was ended
goes on there. Lines that are not run are listed by file.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "build" / "coverage" / "all"


def ranges(lines: list[int]) -> str:
    """``3-5, 9`` for 3, 4, 5 and 9."""
    found: list[list[int]] = []
    for line in lines:
        if found and line == found[-1][-1] + 1:
            found[-1][1:] = [line]
        else:
            found.append([line])
    return ", ".join("-".join(map(str, one)) for one in found)


def measured() -> dict[str, Any]:
    """Share of the lines, and those of each file that are not run."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = ["coverage", "json", f"--data-file={DATA}", "-o", str(report), "--quiet"]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        found = json.loads(report.read_text())
    of_file = {name: one for name, one in found["files"].items() if one["missing_lines"]}
    return {
        "lines": found["totals"]["num_statements"],
        "run": found["totals"]["covered_lines"],
        "percent": round(found["totals"]["percent_covered"], 2),
        "not run": {name: ranges(one["missing_lines"]) for name, one in of_file.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    asked = parser.parse_args()
    environment = Path(sys.prefix)
    subprocess.run(["make", f"VENV={environment}", "coverage"], cwd=ROOT, check=True)
    found = measured()
    asked.json.write_text(json.dumps({"command": "make coverage"} | found, indent=1) + "\n")
    print(f"{found['percent']}% of {found['lines']} lines")


if __name__ == "__main__":
    main()
