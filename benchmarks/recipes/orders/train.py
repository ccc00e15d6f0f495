"""Recipe: the early-exit T5 of orders, 4 decoder layers and 180 thousand weights, trained on one core in some minutes.

``PYTHONPATH=benchmarks python -m recipes.orders.train --out orders-training`` trains a plain stage and an exit-aware one after
it, and writes the checkpoint in half precision; that of ``tests/data/orders`` was made so.
"""

import argparse
from pathlib import Path

import torch
from transformers import T5Config, T5ForConditionalGeneration

from recipes.orders import data
from riskcal_adapters.torch.training.trainer import THRESHOLDS, Stage, train, write_checkpoint

PLAIN = Stage(steps=1600, learning_rate=4e-3, batch_size=32)
EXIT_AWARE = Stage(steps=800, learning_rate=2e-3, batch_size=32, thresholds=THRESHOLDS, seed=1)
TRAINED = 60_000
SEED = 1_000_000


def model(vocabulary: int) -> T5ForConditionalGeneration:
    """A T5 v1.1 of width 48."""
    torch.manual_seed(0)
    config = T5Config(  # type: ignore[call-arg]  # it takes more than it declares
        vocab_size=vocabulary,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_heads=4,
        num_layers=1,
        num_decoder_layers=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for steps and checkpoint")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    tokenizer, split = data.tokenizer(), data.draw(TRAINED, seed=SEED)
    pairs = list(
        zip(
            tokenizer(split.prompts)["input_ids"],
            tokenizer(split.answers)["input_ids"],
            strict=True,
        )
    )
    trained = model(len(tokenizer))
    train(trained, pairs, out / "plain", PLAIN)
    train(trained, pairs, out / "exit-aware", EXIT_AWARE)
    write_checkpoint(trained, tokenizer, out / "checkpoint")


if __name__ == "__main__":
    main()
