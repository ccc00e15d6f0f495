"""Pairs of token ids as batches: of like length, padded, with the ids that a model's decoder begins and pads with."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import T5ForConditionalGeneration

from riskcal import RiskcalError
from riskcal_adapters import generation_config

#: Token ids of a prompt and of its target.
Pair = tuple[list[int], list[int]]
Pairs = list[Pair]


class Batch(TypedDict):
    """What a pass over known targets reads, each (B, S) or (B, T)."""

    input_ids: Tensor
    attention_mask: Tensor
    decoder_input_ids: Tensor
    labels: Tensor


class Batches(torch.utils.data.Sampler[list[int]]):
    """Batches of targets of like length, in an order drawn anew each epoch."""

    def __init__(self, lengths: NDArray[Any], size: int, seed: int) -> None:
        self.lengths, self.size, self.rng = lengths, size, np.random.default_rng(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        jittered = np.argsort(self.lengths + self.rng.random(len(self.lengths)), kind="stable")
        chunks = [jittered[i : i + self.size].tolist() for i in range(0, len(jittered), self.size)]
        yield from (chunks[i] for i in self.rng.permutation(len(chunks)))


def collate(pairs: Pairs, *, start: int = 0, pad: int = 0) -> Batch:
    """One batch, padded on the right; labels are -100 there.

    Parameters
    ----------
    pairs
        Token ids of prompts and of targets.
    start, pad
        The ids that open and pad the decoder's input: 0 and 0 are T5's own. `collator` takes those of a model.
    """
    padded = functools.partial(pad_sequence, batch_first=True)
    sources = [torch.tensor(source) for source, _ in pairs]
    targets = [torch.tensor(target) for _, target in pairs]
    given = padded(targets, padding_value=pad)
    return {
        "input_ids": padded(sources, padding_value=pad),
        "attention_mask": padded([torch.ones_like(source) for source in sources]),
        "decoder_input_ids": torch.nn.functional.pad(given[:, :-1], (1, 0), value=start),
        "labels": padded(targets, padding_value=-100),
    }


def collator(model: T5ForConditionalGeneration) -> Callable[[Pairs], Batch]:
    """`collate` with the start and padding ids that decoding this model begins and pads with."""
    special = generation_config.special_tokens(model.generation_config, model.config.vocab_size)
    return functools.partial(collate, start=special.start, pad=special.pad)


def check_pairs(pairs: Pairs, vocabulary: int) -> None:
    """Refuse to train on nothing, on empty rows, and on ids that the model has no embedding of."""
    if not len(pairs):
        raise RiskcalError(
            "pairs: there is none; give token ids of at least one prompt and its target."
        )
    for row, pair in enumerate(pairs):
        for what, ids in zip(("prompt", "target"), pair, strict=True):
            foreign = [one for one in ids if not 0 <= one < vocabulary]
            if foreign or not len(ids):
                said = (
                    f"holds {foreign[0]}, not in the model's vocabulary of {vocabulary}"
                    if foreign
                    else "is empty"
                )
                raise RiskcalError(
                    f"pairs: the {what} at row {row} {said}; give token ids with their end token."
                )
