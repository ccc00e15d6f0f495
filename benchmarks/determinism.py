"""What the shipped records certify, as digests: the same on every platform and in every version of what computes it.

`python benchmarks/determinism.py` prints a line for each setting: its threshold, a digest of the whole table with numbers to ten
significant digits, and one of every bit. `--against FILE` compares with what was printed elsewhere, as text or in
`results/determinism.json`, and ends with 1 where a threshold or a digit differs; bits that differ are counted. Takes the core
alone.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import riskcal

DIGITS = 10
#: Asks for losses of two values, and for a graph.
UNFIT = ("binomial", "graphical")
SETTINGS: list[dict[str, Any]] = [
    {"delta": 0.05},
    {"delta": 0.02, "objective": "risk"},
    {"delta": 0.05, "objective": "risk_clipped", "epsilon": 0.2},
    *({"delta": 0.1, "test": test} for test in riskcal.calibration.TESTS if test not in UNFIT),
    *(
        {"delta": 0.1, "procedure": rule}
        for rule in riskcal.calibration.PROCEDURES
        if rule not in UNFIT
    ),
]


def digest(table: pd.DataFrame, digits: int | None) -> str:
    """Of a table: its columns, and every value, numbers rounded or to the bit."""
    found = hashlib.blake2b(digest_size=8)
    for name, column in table.items():
        found.update(str(name).encode())
        for value in column:
            number = isinstance(value, float | np.floating)
            text = str(value) if not number else float(value).hex()
            if number and digits is not None:
                text = f"{value + 0.0:.{digits - 1}e}"
            found.update(f"\x1f{text}".encode())
    return found.hexdigest()


def lines() -> Iterator[str]:
    """A setting, its threshold, digits and bits."""
    runs = riskcal.load_example("g2p")
    yield f"records {runs.digest()}"
    for setting in SETTINGS:
        asked = " ".join(f"{name}={value}" for name, value in setting.items())
        calibration = riskcal.calibrate(runs, **setting)
        table = calibration.table
        chosen = f"{calibration.threshold:g}, {int(table['certified'].sum())} certified"
        yield f"{asked}: {chosen}, digits {digest(table, DIGITS)}, bits {digest(table, None)}"


def versions() -> str:
    """What computes here."""
    packages = ("numpy", "scipy", "numba", "llvmlite", "pandas")
    named = [f"{name} {metadata.version(name)}" for name in packages]
    return f"{platform.machine()}, python {platform.python_version()}, {', '.join(named)}"


def printed(file: Path) -> list[str]:
    """What was printed elsewhere, by a user or by `outgrown.py`, which wraps it; not what that was compared with."""
    text = file.read_text(encoding="utf-8")
    found = json.loads(text)["printed"] if file.suffix == ".json" else text.splitlines()
    return list(takewhile(bool, found))


def main() -> None:
    """Print, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="a file that holds what was printed elsewhere")
    against = parser.parse_args().against
    found = list(lines())
    print(f"# {versions()}", *found, sep="\n")
    if against is None:
        return
    head, *other = printed(against)
    pairs = list(zip(found, other, strict=True))
    differ = [
        line for line, was in pairs if line.partition(", bits")[0] != was.partition(", bits")[0]
    ]
    bits = sum(line != was for line, was in pairs)
    print(
        f"\nAgainst {head[2:]}: {len(differ)} of {len(pairs)} lines differ in digits, {bits} in bits"
    )
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
