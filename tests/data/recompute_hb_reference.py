"""Recompute hb_reference.csv in 60-digit arithmetic and compare: ``python tests/data/recompute_hb_reference.py``.

Each row tests k ones among n losses against alpha: Hoeffding's bound in its relative-entropy form, Bentkus' bound clipped
at 1, the smaller of the two, and the exact binomial probability. Exits with 1 at the first row that differs.
"""

import csv
import sys
from pathlib import Path

from mpmath import binomial, e, exp, log, mp, mpf, nstr

TABLE = Path(__file__).parent / "hb_reference.csv"
mp.dps = 60


def recompute(n: int, k: int, alpha: str) -> dict[str, mpf]:
    """The four columns of a row, to 60 digits."""
    level, mean = mpf(alpha), mpf(k) / n
    below = sum(binomial(n, j) * level**j * (1 - level) ** (n - j) for j in range(k + 1))
    entropy = mpf(0)
    if mean < level:
        entropy += mean * log(mean / level) if k else 0
        entropy += (1 - mean) * log((1 - mean) / (1 - level))
    hoeffding, bentkus = exp(-n * entropy), min(mpf(1), e * below)
    return {
        "hoeffding_kl": hoeffding,
        "bentkus_e_clip1": bentkus,
        "hb": min(hoeffding, bentkus),
        "binomial_exact": below,
    }


def main() -> int:
    with TABLE.open(newline="") as file:
        table = list(csv.DictReader(file))
    for number, given in enumerate(table):
        for name, exact in recompute(int(given["n"]), int(given["k"]), given["alpha"]).items():
            if abs(exact - mpf(given[name])) > mpf("1e-14") * exact:
                print(
                    f"row {number}: {name} is {given[name]}, but {nstr(exact, 17)} in {mp.dps} digits"
                )
                return 1
    print(f"{len(table)} rows agree to 1e-14")
    return 0


if __name__ == "__main__":
    sys.exit(main())
