"""A deterministic early-exit decoder without a framework: tokens and confidences are hashes of what was read so far.

As in a real one, a token depends on the tokens before it, so an early exit that errs changes all that follows.
"""

import os
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import riskcal.records

LAYERS, END, VOCABULARY = 4, 1, 6


@dataclass
class ToyGeneration:
    tokens: np.ndarray
    exit_layers: np.ndarray
    confidence: np.ndarray


def fraction(*parts):
    """A number in [0, 1) that is the same everywhere."""
    return zlib.crc32("|".join(map(str, parts)).encode()) / 2**32


def step(text, history, layer):
    """Token and confidence of one layer; the deeper, the likelier it is the last layer's token."""
    position = len(history)
    if position >= 2 + int(5 * fraction(text, "length")):
        right = END
    else:
        right = 2 + int(VOCABULARY * fraction(text, history, "token"))
    errs = layer < LAYERS and fraction(text, history, layer, "errs") < 0.5 - 0.1 * layer
    token = 2 + (right - 1) % VOCABULARY if errs else right
    return token, fraction(text, history, layer, "confidence")


def generate_alone(text, needed):
    """Tokens and exits of one text; ``needed`` (T, LAYERS) holds the confidence that each exit asks for."""
    tokens, exits, confidences = [], [], []
    for row in needed:
        for layer in range(1, LAYERS + 1):
            token, confidence = step(text, tuple(tokens), layer)
            if confidence >= row[layer - 1]:
                break
        tokens.append(token)
        exits.append(layer)
        confidences.append(confidence)
        if token == END:
            break
    return tokens, exits, confidences


def pad(rows, dtype=np.int64):
    result = np.zeros((len(rows), max(map(len, rows))), dtype=dtype)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result


class ToyDecoder:
    n_layers = LAYERS

    def __init__(self, delay=0.0):
        self.delay = delay
        self.calls = 0

    def encode(self, texts):
        codes = [[ord(letter) for letter in text] for text in texts]
        return pad(codes), pad([[1] * len(row) for row in codes])

    def texts(self, input_ids, mask):
        return ["".join(map(chr, row[: m.sum()])) for row, m in zip(input_ids, mask, strict=True)]

    def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
        time.sleep(self.delay)
        self.calls += 1
        needed = policy.exit_thresholds(LAYERS, max_new_tokens)
        rows = [generate_alone(text, needed) for text in self.texts(input_ids, attention_mask)]
        tokens, exits, confidences = zip(*rows, strict=True)
        return ToyGeneration(pad(tokens), pad(exits), pad(confidences, float))

    def decode(self, tokens):
        return [" ".join(f"w{token}" for token in row if token > END) for row in tokens]

    def trace(self, input_ids, attention_mask, *, max_new_tokens, prompts):
        columns = {"prompt": [], "position": [], "confidence": [], "agrees": []}
        for text, prompt in zip(self.texts(input_ids, attention_mask), prompts, strict=True):
            tokens, _, _ = generate_alone(text, np.full((max_new_tokens, LAYERS), [np.inf] * (LAYERS - 1) + [-np.inf]))
            for position, token in enumerate(tokens):
                layers = [step(text, tuple(tokens[:position]), layer) for layer in range(1, LAYERS + 1)]
                columns["prompt"].append(prompt)
                columns["position"].append(position)
                columns["confidence"].append([confidence for _, confidence in layers])
                columns["agrees"].append([guess == token for guess, _ in layers])
        return riskcal.records.Traces.from_arrays(**columns)


def load(log=None, delay=0.0):
    """The decoder; each call leaves a line with the process's id in ``log``."""
    if log is not None:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
    return ToyDecoder(float(delay))


def load_nothing():
    return object()
