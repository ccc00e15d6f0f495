"""Train the classifier and record the example ``stress`` that ships with riskcal, on one thread of a CPU, in some three minutes.

``PYTHONPATH=benchmarks python -m recipes.classifier.records --out classifier`` writes the weights and ``stress.parquet`` there,
and ``benchmarks/results/recipes/classifier-stress.json``. Weights that are there are not trained again.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from recipes.classifier import data
from recipes.classifier.network import MultiExit
from recipes.g2p.data import dictionary_path
from riskcal.internal import replacing, write_table

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "recipes" / "classifier-stress.json"
EPOCHS, BATCH, LEARNING_RATE, SEED = 2, 256, 3e-3, 0


def trained(words: data.Words, common: Sequence[str]) -> MultiExit:
    """A network whose exits were all trained at once, the sum of their cross-entropies being the loss."""
    torch.manual_seed(SEED)
    network = MultiExit(len(common) + 1)
    letters = torch.as_tensor(data.letters(words.words))
    wanted = torch.tensor([data.classes(listed[:1], common)[0] for listed in words.patterns])
    steps = EPOCHS * (len(letters) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        shuffled = torch.randperm(len(letters))
        for batch in shuffled[: len(letters) // BATCH * BATCH].split(BATCH):
            logits = network(letters[batch])
            loss = torch.stack([functional.cross_entropy(one, wanted[batch]) for one in logits])
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: losses of the last batch {loss.tolist()}", flush=True)
    return network.eval()


@torch.no_grad()
def recorded(network: MultiExit, words: data.Words, common: Sequence[str]) -> pd.DataFrame:
    """One row per word: confidence, class, error and agreement at each exit, and what each exit costs."""
    letters = torch.as_tensor(data.letters(words.words))
    batches = [torch.stack(network(batch), 1).softmax(-1).max(-1) for batch in letters.split(500)]
    confidence = torch.cat([batch.values for batch in batches]).numpy()
    label = torch.cat([batch.indices for batch in batches]).numpy()
    right = [
        np.isin(row, data.classes(listed, common))
        for row, listed in zip(label, words.patterns, strict=True)
    ]
    return pd.DataFrame(
        {
            "prompt": words.words,
            "position": 0,
            "confidence": list(confidence),
            "agrees": list(label == label[:, -1:]),
            "error": [~row for row in right],
            "cost_flops": [network.flops()] * len(label),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    trained_on, held_out = data.split(data.read_patterns(dictionary_path()))
    common = data.common_patterns(trained_on)
    weights, timed = options.out / "weights.safetensors", options.out / "training.json"
    if not weights.exists():
        begun = time.process_time()
        state = trained(trained_on, common).state_dict()
        timed.write_text(json.dumps({"cpu_seconds": round(time.process_time() - begun)}) + "\n")
        with replacing(weights) as partial:
            save_file(state, partial)
    network = MultiExit(len(common) + 1).eval()
    network.load_state_dict(load_file(weights))
    table = recorded(network, held_out, common)
    write_table(table, options.out / "stress.parquet")
    found = _conditions(trained_on, held_out) | json.loads(timed.read_text()) | _figures(table)
    found["parameters"] = sum(weight.numel() for weight in network.parameters())
    found["patterns"] = common
    with replacing(RESULTS) as partial:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found["exits"], indent=1))


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    """Each exit's own figures, all requests stopping there."""
    confidence, agrees, error, flops = (
        np.vstack(table[name]) for name in ("confidence", "agrees", "error", "cost_flops")
    )
    return {
        "exits": [
            {
                "flops": flops[0, i],
                "error": round(float(error[:, i].mean()), 4),
                "agreement": round(float(agrees[:, i].mean()), 4),
                "mean confidence": round(float(confidence[:, i].mean()), 4),
            }
            for i in range(confidence.shape[1])
        ]
    }


def _conditions(trained_on: data.Words, held_out: data.Words) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    return {
        "conditions": {
            "command": "PYTHONPATH=benchmarks python -m recipes.classifier.records --out classifier",
            "commit": commit.strip(),
            "words": {"training": len(trained_on.words), "held out": len(held_out.words)},
            "epochs": EPOCHS,
            "batch": BATCH,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
            "threads": 1,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    }


if __name__ == "__main__":
    main()
