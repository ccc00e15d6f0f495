"""Train the spelling-to-phonemes model without any early-exit loss: what a checkpoint that was never meant to exit looks like.

``PYTHONPATH=benchmarks python benchmarks/studies/without_exits.py --out FOLDER``
gives FOLDER/checkpoint, which `ranks.py` takes beside others. The
stage is the recipe's plain one, shortened, with the last layer's loss alone.
"""

import argparse
from pathlib import Path

import torch

from recipes.g2p import data
from recipes.g2p.train import pairs
from riskcal_adapters.torch.training import batches, folders, saved, trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folders.note_settings(options.out, {"steps": options.steps}, file="recipe.json")
    if (options.out / "checkpoint").exists():
        raise SystemExit(
            f"{options.out / 'checkpoint'}: is there already; give another folder, or delete it"
        )
    tokenizer = data.tokenizer()
    model = trainer.new_t5(len(tokenizer))
    words = data.splits(data.read_dictionary(data.dictionary_path()))["train"]
    arguments = trainer.arguments(options.out, options.steps, 2e-3, 128, 0, save_steps=200)
    # the model's own loss is the last layer's
    fitted = trainer.PairTrainer(model, arguments, pairs(words), batches.collator(model))
    last = folders.last_checkpoint(options.out)
    fitted.train(resume_from_checkpoint=None if last is None else str(last))
    saved.write_checkpoint(model, tokenizer, options.out / "checkpoint")


if __name__ == "__main__":
    main()
