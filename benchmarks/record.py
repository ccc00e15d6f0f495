"""Recording a grid of thresholds: what `record` saves over plain loops, on the shipped spelling-to-phonemes model.

``python benchmarks/record.py`` records 21 thresholds and the full model for held-out words in three ways: word by word at every
threshold; in batches of consecutive words at every threshold; and with `riskcal_adapters.record`, which batches words of like
length and depth and generates nothing twice. The ways take turns on the same words, so that a machine's drift meets them all
alike; ratios are paired within these turns. The tables must be the same, bit for bit.
"""

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import command
import riskcal
from recipes.g2p import data
from riskcal_adapters import record
from riskcal_adapters.texts import token_distance
from riskcal_adapters.torch import EarlyExitT5, load_example

GRID = np.round(np.arange(0, 1.0001, 0.05), 2)
MAX_NEW_TOKENS = 64
CLOCKS = {"seconds": time.perf_counter, "CPU seconds": time.process_time}
COLUMNS = ["prompt", "threshold", "dissimilarity", "layers", "tokens"]


def plain(
    decoder: EarlyExitT5, template: riskcal.ExitPolicy, batch_size: int, words: list[str]
) -> pd.DataFrame:
    """Every word at every threshold, in batches of consecutive words."""
    rows = []
    for start in range(0, len(words), batch_size):
        batch = words[start : start + batch_size]
        encoded = decoder.encode(batch)
        full: list[str] = []
        for threshold in (np.inf, *sorted(GRID, reverse=True)):
            policy = template.model_copy(update={"threshold": float(threshold)})
            generation = decoder.generate(*encoded, policy=policy, max_new_tokens=MAX_NEW_TOKENS)
            outputs, exits = decoder.decode(generation.tokens), generation.exit_layers.numpy()
            full = full or outputs
            tokens = (exits > 0).sum(1)
            distances = map(token_distance, outputs, full)
            rows += zip(
                batch,
                [threshold] * len(batch),
                distances,
                exits.sum(1) / tokens,
                tokens,
                strict=True,
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def recorded(
    decoder: EarlyExitT5, template: riskcal.ExitPolicy, batch_size: int, words: list[str]
) -> pd.DataFrame:
    """The same by `record`, files and all."""
    with tempfile.TemporaryDirectory() as folder:
        out = record(
            {"prompt": words, "text": words},
            lambda: decoder,
            GRID,
            Path(folder) / "runs",
            policy=template,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=batch_size,
            shard_prompts=len(words),
            progress=False,
        )
        return pd.read_parquet(out / "runs-00000.parquet")[COLUMNS]


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    return table.sort_values(["prompt", "threshold"], ignore_index=True)


def main() -> None:
    """Measure, compare the tables, print, and write the figures if asked to, turn by turn."""
    parser = command.parser(__doc__)
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument(
        "--turn", type=int, default=250, help="words per turn, and per file of the recording"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--batching", default="regroup", help="how batches are decoded; the tokens are the same"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    decoder = load_example("g2p")
    words = data.splits(data.read_dictionary(data.dictionary_path()))["test"].words[: options.words]
    batched = riskcal.ExitPolicy(batching=options.batching)
    ways: dict[str, Callable[[list[str]], pd.DataFrame]] = {
        "one by one": partial(plain, decoder, riskcal.ExitPolicy(), 1),
        "plain batches": partial(plain, decoder, batched, options.batch_size),
        "record": partial(recorded, decoder, batched, options.batch_size),
    }
    names = list(ways)
    for way in ways.values():
        way(words[: min(8, len(words))])  # first calls are slow
    rows, different = [], 0
    for turn, start in enumerate(range(0, len(words), options.turn)):
        chunk = words[start : start + options.turn]
        tables = {}
        for name in names[turn % 3 :] + names[: turn % 3]:
            begun = {clock: read() for clock, read in CLOCKS.items()}
            tables[name] = in_order(ways[name](chunk))
            rows.append(
                {"turn": turn, "way": name}
                | {clock: read() - begun[clock] for clock, read in CLOCKS.items()}
            )
        different += sum(
            int((tables[name] != tables["record"]).any(axis=1).sum()) for name in names
        )
        conditions = {
            "batch size": options.batch_size,
            "batching": options.batching,
            "threads": options.threads,
        }
        conditions |= {
            "words": start + len(chunk),
            "thresholds": len(GRID),
            "torch": torch.__version__,
        }
        text = json.dumps(
            {"conditions": conditions, "rows that differ": different} | figures(rows, names),
            indent=2,
        )
        print(text, flush=True)
        if options.json:  # after each turn: a run that is cut off leaves what it has
            options.json.write_text(text + "\n", encoding="utf-8")


def figures(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Seconds of each way in all, and the recorder's share of them, in all and turn by turn."""
    times = pd.DataFrame(rows).pivot_table(index="turn", columns="way", values=list(CLOCKS))
    found: dict[str, Any] = {}
    for clock in CLOCKS:
        seconds = times[clock]
        found[clock] = {name: round(float(seconds[name].sum()), 2) for name in names}
        for other in names[:2]:
            found[clock][f"record / {other}"] = {
                "of sums": round(float(seconds["record"].sum() / seconds[other].sum()), 4),
                "turns": (seconds["record"] / seconds[other]).round(4).tolist(),
            }
    return found


if __name__ == "__main__":
    main()
