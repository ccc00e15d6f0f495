"""What exit-aware training buys, and which of its choices matter: an ablation by real early-exit decoding.

``python benchmarks/exit_aware.py`` takes the plain stage of the spelling-to-phonemes recipe (trained first if
``start-checkpoint`` is not in the ``--work`` folder), fine-tunes it for the same number of steps in every way of `stages`,
trains two models from scratch and those for long outputs, decodes development words with each, and writes
``benchmarks/results/exit_aware.json``. A run that was cut off goes on where it stopped; ``--scale`` shortens all of it.
``benchmarks/exit_aware_figures.py`` draws the figures and prints the tables of docs/training.md.
"""

import argparse
import copy
import dataclasses
import json
import math
import platform
import shutil
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers

from recipes import g2p
from recipes.g2p import data
from recipes.g2p.evaluate import evaluate
from recipes.g2p.train import STAGES, pairs
from recipes.numbers import data as numbers_data
from recipes.numbers import train as numbers
from riskcal import ExitPolicy
from riskcal.internal import replacing
from riskcal.policy.pruning import Pruning
from riskcal_adapters.torch import EarlyExitT5, load_example, load_t5
from riskcal_adapters.torch.training import (
    ExitClassifier,
    classifier_confidence,
    decoder_pass,
    load_classifier,
    pruned_margin,
    save_classifier,
    state_saturation,
)
from riskcal_adapters.torch.training.batches import Pairs, collator
from riskcal_adapters.torch.training.confidence import Confidence
from riskcal_adapters.torch.training.trainer import (
    THRESHOLDS,
    Stage,
    new_t5,
    train,
    train_classifier,
    write_checkpoint,
)

RESULTS = Path(__file__).parent / "results" / "exit_aware.json"
WORDS = 1500
STEPS = 400
SCRATCH_STEPS = 1600
CLASSIFIER_STEPS = 150
KEPT = 8
#: Shares of exits below the last that a measure's drawn and decoded thresholds refuse, on the plain model's training data.
QUANTILES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
SOFTMAX = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3)
PRUNING = Pruning("fixed", largest=KEPT, smallest=KEPT)

FINE = Stage(steps=STEPS, learning_rate=8e-4, batch_size=64, seed=2)
SCRATCH = Stage(steps=SCRATCH_STEPS, learning_rate=2e-3, batch_size=64, seed=2)
#: Objectives that need nothing but the plain model.
VARIANTS = {
    "plain": FINE,
    "exit-aware": dataclasses.replace(FINE, thresholds=THRESHOLDS),
    "only .9": dataclasses.replace(FINE, thresholds=(0.9,)),
    "uniform": dataclasses.replace(FINE, thresholds=tuple(np.linspace(0, 1, 101))),
    "pruned": dataclasses.replace(FINE, thresholds=THRESHOLDS, confidence=pruned_margin(KEPT)),
    "dropout": dataclasses.replace(FINE, largest_dropout=0.2),
    "dropout, exit-aware": dataclasses.replace(FINE, largest_dropout=0.2, thresholds=THRESHOLDS),
    "12 layers, plain": FINE,
    "12 layers, exit-aware": dataclasses.replace(FINE, thresholds=THRESHOLDS),
    "scratch, plain": SCRATCH,
    "scratch, exit-aware": dataclasses.replace(SCRATCH, thresholds=THRESHOLDS),
}
#: Stages of the whole recipe, for comparison: the start of all fine-tuning, and the shipped checkpoint.
RECIPE = ("recipe, plain", "recipe, shipped")


@torch.inference_mode()
def quantile_thresholds(
    model: torch.nn.Module, confidence: Confidence, some: Pairs
) -> tuple[float, ...]:
    """The measure's quantiles over real positions and over the exits below the last, in plain teacher forcing."""
    batch = collator(model)(some)
    states, logits = decoder_pass(
        model, batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"]
    )
    values = [
        confidence(states[:i], logits[:i])[batch["labels"] != -100] for i in range(1, len(states))
    ]
    return tuple(np.quantile(torch.cat(values).numpy(), QUANTILES).tolist())


def policies(measure: str, thresholds: tuple[float, ...], **settings) -> dict[str, ExitPolicy]:
    """The full model, static exits at 1 to 5 layers, and thresholds, from the highest."""
    return (
        {"full model": ExitPolicy.full_model()}
        | {f"static {k}": ExitPolicy(thresholds={k: 0.0}) for k in range(1, 6)}
        | {
            f"threshold {value:.6g}": ExitPolicy(threshold=value, measure=measure, **settings)
            for value in sorted(thresholds, reverse=True)
        }
    )


class Study:
    """The words, the plain model, and a file of results that grows by one row at a time."""

    def __init__(self, work: Path, scale: float) -> None:
        self.work, self.scale = work, scale
        self.tokenizer = data.tokenizer()
        parts = data.splits(data.read_dictionary(data.dictionary_path()))
        self.train_pairs = pairs(parts["train"])
        self.words = data.Split(*(column[:WORDS] for column in parts["development"]))
        work.mkdir(parents=True, exist_ok=True)
        self.start = work / "start-checkpoint"
        if not self.start.exists():
            model = new_t5(len(self.tokenizer))
            self.fit(model, STAGES["plain"])
            write_checkpoint(model, self.tokenizer, self.start)
        self.results = work / "results.json"
        self.rows = json.loads(self.results.read_text())["rows"] if self.results.exists() else []
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
        self.conditions = {
            "commit": git.stdout.strip(),
            "words": WORDS,
            "numbers": numbers.EVALUATED,
            "steps": STEPS,
            "batch": FINE.batch_size,
            "scale": scale,
            "seeds": 1,
            "threads": 1,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }

    def started(self) -> transformers.T5ForConditionalGeneration:
        """The model that fine-tuning starts from, read anew."""
        return load_t5(self.start)

    def fit(self, model: transformers.T5ForConditionalGeneration, stage: Stage) -> float:
        """Train in place; CPU seconds."""
        stage = dataclasses.replace(stage, steps=max(1, round(stage.steps * self.scale)))
        began = time.process_time()
        with TemporaryDirectory() as folder:
            train(model, self.train_pairs, Path(folder), stage, save_steps=stage.steps + 1)
        return time.process_time() - began

    def classifier(
        self, name: str, model: transformers.T5ForConditionalGeneration
    ) -> ExitClassifier:
        """A classifier of independent exits for these weights, trained once, then read."""
        if name == "recipe, shipped":
            return load_classifier(
                Path(g2p.__file__).parent / "checkpoint" / "classifier-independent.safetensors"
            )
        path = self.folder(name) / "classifier.safetensors"
        if not path.exists():
            with TemporaryDirectory() as folder:
                steps = max(1, round(CLASSIFIER_STEPS * self.scale))
                save_classifier(
                    train_classifier(model, self.train_pairs, Path(folder), steps=steps), path
                )
        return load_classifier(path)

    def folder(self, name: str) -> Path:
        """Where a model's checkpoint is."""
        if name == "recipe, plain":
            return self.start
        return self.work / f"{name.replace(', ', '-').replace(' ', '-')}-checkpoint"

    def variant(self, name: str) -> transformers.T5ForConditionalGeneration:
        """The model of a variant, trained once, then read."""
        if name in RECIPE:
            return self.started() if name == "recipe, plain" else load_example("g2p").model
        folder = self.folder(name)
        if not folder.exists():
            model = (
                new_t5(len(self.tokenizer), seed=1)
                if name.startswith("scratch")
                else self.started()
            )
            if name.startswith("12 layers"):
                model = deepened(model)
            seconds = self.fit(model, stages(self)[name])
            write_checkpoint(model, self.tokenizer, folder)
            (folder / "cpu_seconds.json").write_text(json.dumps(round(seconds, 1)))
        return load_t5(folder)

    def row(self, name: str, decoding: str, asked: dict[str, ExitPolicy]) -> None:
        """Errors and depth of each policy, and what the training took, unless the file has them."""
        if any((row["training"], row["decoding"]) == (name, decoding) for row in self.rows):
            return
        if name.startswith("numbers"):
            model = numbers.trained(
                name.removeprefix("numbers, "), self.work / "numbers", self.scale
            )
            decoder = EarlyExitT5(model, numbers_data.tokenizer())
            table = numbers.evaluate(
                decoder, numbers_data.draw("development", numbers.EVALUATED), asked
            )
        else:
            model = self.variant(name)
            classifier = self.classifier(name, model) if decoding.startswith("classifier") else None
            table = evaluate(
                EarlyExitT5(model, self.tokenizer, classifier=classifier), self.words, asked
            )
        taken = self.folder(name) / "cpu_seconds.json"
        self.rows.append(
            {
                "training": name,
                "decoding": decoding,
                "cpu_seconds": json.loads(taken.read_text()) if taken.exists() else None,
                "table": table.round(5).to_dict("records"),
            }
        )
        with replacing(self.results) as partial:
            partial.write_text(json.dumps({**self.conditions, "rows": self.rows}, indent=1) + "\n")
        print(name, decoding, flush=True)


@torch.no_grad()
def deepened(
    model: transformers.T5ForConditionalGeneration,
) -> transformers.T5ForConditionalGeneration:
    """The model with a new layer after every second one of its decoder; at first it passes its input on."""
    n_layers = model.config.num_decoder_layers
    config = copy.deepcopy(model.config)
    config.num_decoder_layers = n_layers + n_layers // 2
    torch.manual_seed(0)
    deeper = transformers.T5ForConditionalGeneration(config)
    deeper.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    deeper.shared, deeper.encoder = model.shared, model.encoder
    deeper.decoder.embed_tokens, deeper.decoder.final_layer_norm = (
        model.shared,
        model.decoder.final_layer_norm,
    )
    for place, block in enumerate(deeper.decoder.block):
        if place % 3 < 2:
            block.load_state_dict(model.decoder.block[place // 3 * 2 + place % 3].state_dict())
        else:
            self_layer, cross_layer, feed_forward = block.layer
            for last in (
                self_layer.SelfAttention.o,
                cross_layer.EncDecAttention.o,
                feed_forward.DenseReluDense.wo,
            ):
                last.weight.zero_()
    return deeper


def measured(study: Study) -> dict[str, tuple[Confidence, tuple[float, ...]]]:
    """The measures beside softmax, as the plain model has them, and the thresholds drawn and decoded for each."""
    start = study.started()
    confidences = {
        "state": state_saturation,
        "classifier": classifier_confidence(study.classifier("start", start)),
    }
    some = study.train_pairs[:2000]
    return {name: (one, quantile_thresholds(start, one, some)) for name, one in confidences.items()}


def stages(study: Study) -> dict[str, Stage]:
    """Every way of training, by name."""
    return VARIANTS | {
        f"exit-aware, {name}": dataclasses.replace(
            FINE, thresholds=(*thresholds, math.inf), confidence=confidence
        )
        for name, (confidence, thresholds) in measured(study).items()
    }


def decode_all(study: Study) -> None:
    """A row for every model and every way of decoding it that tells something, the most telling first."""
    softmax = policies("softmax", SOFTMAX)
    pruned = policies("softmax", SOFTMAX, pruning=PRUNING)
    for name in RECIPE:
        study.row(name, "softmax", softmax)
    study.row(
        "recipe, plain",
        "softmax, recomputed cache",
        policies("softmax", SOFTMAX, cache="recompute"),
    )
    for name in ("plain", "exit-aware", "control"):
        study.row(f"numbers, {name}", "softmax", softmax)
    for name in ("plain", "exit-aware", "only .9", "12 layers, plain", "12 layers, exit-aware"):
        study.row(name, "softmax", softmax)
    for measure, (_, values) in measured(study).items():
        for name in ("plain", "exit-aware", f"exit-aware, {measure}", *RECIPE):
            study.row(name, measure, policies(measure, values))
        study.row(
            "plain", f"{measure}, recomputed cache", policies(measure, values, cache="recompute")
        )
    for name in stages(study):
        study.row(name, "softmax", softmax)
    for name in ("plain", "exit-aware", "pruned", *RECIPE):
        study.row(name, f"softmax over {KEPT}", pruned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path("build/exit-aware"), help="folder for checkpoints"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps")
    parser.add_argument(
        "--train",
        nargs="+",
        help="train these variants only, beside other processes, and decode none",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(options.work, options.scale)
    if options.train:
        for name in options.train:
            study.variant(name)
        return
    decode_all(study)
    shutil.copy(study.results, RESULTS)


if __name__ == "__main__":
    main()
