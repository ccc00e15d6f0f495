"""Recipe: an early-exit T5 that conjugates French verbs letter by letter, trained on a CPU in about three quarters of an hour.

``python -m riskcal_adapters.conjugation.train --out conjugation-training`` trains a plain and an exit-aware stage, decodes the
held-out verbs at every exit after each, and writes the checkpoints in half precision. A run that was cut off goes on where
its last saved step stands.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from rapidfuzz.distance import Levenshtein

from riskcal_adapters.conjugation import data
from riskcal_adapters.decoding_study import decode_policies, static_and_adaptive
from riskcal_adapters.torch import EarlyExitT5, load_t5
from riskcal_adapters.torch.training.trainer import THRESHOLDS, Pairs, Stage, new_t5, train, write_checkpoint

STAGES = {
    "plain": Stage(steps=2200, learning_rate=2e-3, batch_size=64),
    "exit-aware": Stage(steps=900, learning_rate=1e-3, batch_size=64, thresholds=THRESHOLDS, seed=1),
}
#: The longest three forms have 77 letters and spaces, and an end.
MAX_NEW_TOKENS = 80
#: Every fifth development prompt is decoded after a stage: 490, of all tenses.
EVALUATED = 5


def pairs(split: data.Split) -> Pairs:
    """Token ids of prompts and forms."""
    tokenizer = data.tokenizer()
    return list(zip(tokenizer(split.prompts)["input_ids"], tokenizer(split.forms)["input_ids"], strict=True))


def evaluate(decoder: EarlyExitT5, split: data.Split) -> pd.DataFrame:
    """Character error, exact matches, distance to the full model and depth, for the full model, every exit and thresholds."""
    policies = static_and_adaptive(decoder.n_layers)
    return decode_policies(
        decoder, split.prompts, policies, lambda outputs: errors(outputs, split.forms), MAX_NEW_TOKENS
    )


def errors(outputs: Sequence[str], forms: Sequence[str]) -> dict[str, float]:
    """Edits over reference characters, summed over prompts, and the share of outputs without one."""
    edits = [Levenshtein.distance(output, wanted) for output, wanted in zip(outputs, forms, strict=True)]
    return {
        "character_error": sum(edits) / sum(map(len, forms)),
        "exact": sum(edit == 0 for edit in edits) / len(edits),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the recipe's steps, to try it out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = data.tokenizer()
    parts = data.splits(data.read_verbs(data.data_folder()), seed=options.seed)
    model = new_t5(len(tokenizer), seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        done = options.out / f"{name}-checkpoint"
        if not done.exists():
            steps = max(1, round(stage.steps * options.scale))
            stage = dataclasses.replace(stage, steps=steps, seed=options.seed + stage.seed)
            train(model, pairs(parts["train"]), options.out / name, stage)
            write_checkpoint(model, tokenizer, done)
        model = load_t5(done)
        some = data.Split(*(column[::EVALUATED] for column in parts["development"]))
        figures = evaluate(EarlyExitT5(model, tokenizer), some)
        figures.to_csv(options.out / f"{name}-development.csv", index=False)
        print(figures.to_string(index=False, float_format="{:.4f}".format))
    card = {"torch": torch.__version__, "stages": repr(STAGES), "seed": options.seed, "scale": options.scale}
    (options.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
