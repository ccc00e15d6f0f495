"""Recipe: an early-exit T5 that writes numbers in words, letter by letter, trained on a CPU in about a quarter of an hour.

``PYTHONPATH=benchmarks python -m recipes.numbers.train --out numbers-training``
trains a plain stage, and from it an exit-aware stage and,
with ``--control``, a plain one of as many steps; decodes held-out numbers at every exit after each, and writes the checkpoints
in half precision. A run that was cut off goes on where its last saved step stands.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from rapidfuzz.distance import Levenshtein
from transformers import T5ForConditionalGeneration

from recipes.decoding_study import decode_policies, static_and_adaptive
from recipes.numbers import data
from riskcal import ExitPolicy, internal
from riskcal_adapters import json_objects
from riskcal_adapters.torch import EarlyExitT5, load_t5
from riskcal_adapters.torch.training import folders
from riskcal_adapters.torch.training.batches import Pairs
from riskcal_adapters.torch.training.trainer import (
    THRESHOLDS,
    Stage,
    new_t5,
    train,
    write_checkpoint,
)

STAGES = {
    "plain": Stage(steps=400, learning_rate=2e-3, batch_size=32),
    "exit-aware": Stage(
        steps=250, learning_rate=1e-3, batch_size=32, thresholds=THRESHOLDS, seed=1
    ),
    "control": Stage(steps=250, learning_rate=1e-3, batch_size=32, seed=1),
}
TRAINED = 40_000
EVALUATED = 400
#: The longest name has 89 letters, spaces and hyphens, and an end; a decoder that loops is stopped soon after.
MAX_NEW_TOKENS = 96


def pairs(split: data.Split) -> Pairs:
    """Token ids of prompts and names."""
    tokenizer = data.tokenizer()
    return list(
        zip(tokenizer(split.prompts)["input_ids"], tokenizer(split.names)["input_ids"], strict=True)
    )


def evaluate(
    decoder: EarlyExitT5, split: data.Split, policies: Mapping[str, ExitPolicy] | None = None
) -> pd.DataFrame:
    """Character error, exact names, distance to the full model and depth of each policy (see `decode_policies`)."""
    return decode_policies(
        decoder,
        split.prompts,
        policies or static_and_adaptive(decoder.n_layers),
        lambda outputs: errors(outputs, split.names),
        MAX_NEW_TOKENS,
    )


def errors(outputs: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Edits over reference characters, summed over numbers, and the share of names without one."""
    edits = [
        Levenshtein.distance(output, wanted) for output, wanted in zip(outputs, names, strict=True)
    ]
    return {
        "character_error": sum(edits) / sum(map(len, names)),
        "exact": sum(edit == 0 for edit in edits) / len(edits),
    }


def trained(name: str, out: Path, scale: float = 1.0) -> T5ForConditionalGeneration:
    """The model after a stage, from its checkpoint in ``out`` if that is there; else trained, after the stages it follows."""
    done = out / f"{name}-checkpoint"
    if not done.exists():
        model = new_t5(len(data.tokenizer())) if name == "plain" else trained("plain", out, scale)
        stage = dataclasses.replace(STAGES[name], steps=math.ceil(STAGES[name].steps * scale))
        train(model, pairs(data.draw("train", TRAINED)), out / name, stage, save_steps=150)
        write_checkpoint(model, data.tokenizer(), done)
    return load_t5(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and figures"
    )
    parser.add_argument(
        "--control", action="store_true", help="the plain control instead of the exit-aware stage"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the recipe's steps, to try it out"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders.note_settings(options.out, {"scale": options.scale}, file="recipe.json")
    name = "control" if options.control else "exit-aware"
    decoder = EarlyExitT5(trained(name, options.out, options.scale), data.tokenizer())
    figures = evaluate(decoder, data.draw("development", EVALUATED))
    internal.write_table(figures, options.out / f"{name}-development.csv")
    print(figures.to_string(index=False, float_format="{:.4f}".format))
    card = {"torch": torch.__version__, "stages": repr(STAGES), "scale": options.scale}
    json_objects.write(options.out / "card.json", card)


if __name__ == "__main__":
    main()
