"""Run every study, one after the other.

``PYTHONPATH=benchmarks python benchmarks/studies/every.py [--model g2p|numbers] [further arguments]``.

What is given goes to each study. On an idle core the spelling-to-phonemes model takes some ten minutes.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
STUDIES = ("measures", "decay", "perturbation", "calibration", "ranks", "pruning", "second_thread")


def main() -> None:
    given = sys.argv[1:]
    for study in STUDIES:
        sys.argv = [str(HERE / f"{study}.py"), *given]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
