"""Generate the example words whose tokens the demo's report colours, from the shipped checkpoint on held-out words.

``PYTHONPATH=benchmarks python -m recipes.g2p.generations --out g2p-generations.parquet``
"""

import argparse
from pathlib import Path

from recipes.g2p import data
from recipes.g2p.evaluate import MAX_NEW_TOKENS
from recipes.g2p.records import THRESHOLDS, load
from riskcal_adapters import generations

#: The first words of the test split that are long enough to be worth reading; which, was fixed before any was decoded.
WORDS, LETTERS = 12, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    test = data.splits(data.read_dictionary(data.dictionary_path()))["test"]
    words = [word for word in test.words if len(word) >= LETTERS][:WORDS]
    table = {"prompt": words, "text": words}
    found = generations(table, load(), THRESHOLDS, max_new_tokens=MAX_NEW_TOKENS)
    found.to_parquet(parser.parse_args().out, index=False)
    print(found)


if __name__ == "__main__":
    main()
