"""Recipe: exit classifiers for a spelling-to-phonemes checkpoint, whose weights are only read. A few CPU minutes.

``PYTHONPATH=benchmarks python -m recipes.g2p.classifiers --checkpoint FOLDER``
writes ``classifier-<objective>.safetensors`` beside the
model, and prints how well each finds the layers at which not to exit (CALM, table D.1), on development words along their
listed pronunciations.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from transformers import T5ForConditionalGeneration

from recipes.g2p import data
from recipes.g2p.train import pairs
from riskcal_adapters.torch import load_t5
from riskcal_adapters.torch.training import (
    ExitClassifier,
    consistency_labels,
    decoder_pass,
    do_not_exit_f1,
    save_classifier,
)
from riskcal_adapters.torch.training.batches import Pairs, collator
from riskcal_adapters.torch.training.trainer import train_classifier

OBJECTIVES = ("independent", "balanced", "geometric")
EVALUATED = 1500


@torch.inference_mode()
def f1_by_layer(
    model: T5ForConditionalGeneration, classifiers: dict[str, ExitClassifier], some: Pairs
) -> pd.DataFrame:
    """F1 of "do not exit" at confidence one half, one row per layer below the last, and the share of inconsistent tokens."""
    batch = collator(model)(some)
    states, logits = decoder_pass(
        model, batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"]
    )
    consistent, labels = consistency_labels(logits), batch["labels"]
    real = labels != -100
    columns = {"inconsistent": (~consistent & real).sum((1, 2)) / real.sum()}
    for name, classifier in classifiers.items():
        columns[name] = do_not_exit_f1(classifier(states[:-1]), consistent, labels)
    layers = range(1, len(consistent) + 1)
    return pd.DataFrame(
        {name: column.numpy() for name, column in columns.items()},
        index=pd.Index(layers, name="layer"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="folder of the model; the classifiers go there too",
    )
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = data.splits(data.read_dictionary(data.dictionary_path()))
    model = load_t5(options.checkpoint)
    classifiers = {}
    for objective in OBJECTIVES:
        with TemporaryDirectory() as folder:
            trained = train_classifier(
                model, pairs(parts["train"]), Path(folder), objective, steps=options.steps
            )
        save_classifier(trained, options.checkpoint / f"classifier-{objective}.safetensors")
        classifiers[objective] = trained
    development = pairs(parts["development"])[:EVALUATED]
    print(f1_by_layer(model, classifiers, development).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
