"""Record the example runs and traces that ship with riskcal, from the shipped checkpoint on held-out words.

``PYTHONPATH=benchmarks python -m recipes.g2p.records --out g2p-records`` goes on where it stopped if it is cut off.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import riskcal
from recipes.g2p import data
from recipes.g2p.evaluate import MAX_NEW_TOKENS
from riskcal_adapters import record
from riskcal_adapters.texts import token_error_rate
from riskcal_adapters.torch import load_example

#: Fixed before any word was decoded.
THRESHOLDS = np.round(np.arange(0, 1.0001, 0.05), 2)
TRACED = 1000


def load() -> object:
    """The shipped checkpoint, one thread: the tokens do not depend on it, the times do."""
    torch.set_num_threads(1)
    return load_example("g2p")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    test = data.splits(data.read_dictionary(data.dictionary_path()))["test"]
    table = {"prompt": test.words, "text": test.words, "references": test.pronunciations}
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "risk": token_error_rate}
    runs = record(table, load, THRESHOLDS, options.out / "runs", **settings)
    some = {name: column[:TRACED] for name, column in table.items()}
    traced = record(some, load, [0.5], options.out / "traced", **settings, traces=True)
    frame = riskcal.Runs.read(runs).to_frame()
    frame["seconds"] = frame["seconds"].round(6)
    riskcal.Runs.from_frame(frame).write(options.out / "g2p.parquet")
    traces = riskcal.Traces.read(traced / "traces")
    traces.write(options.out / "g2p-traces.parquet")
    print(riskcal.Runs.read(options.out / "g2p.parquet"), traces, sep="\n")


if __name__ == "__main__":
    main()
