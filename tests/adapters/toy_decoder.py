"""A deterministic early-exit decoder without a framework: tokens and confidences are hashes of what was read so far.

As in a real one, a token depends on the tokens before it, so an early exit that errs changes all that follows.
"""

import os
import signal
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


@dataclass
class OpenGeneration(ToyGeneration):
    refused: np.ndarray


def fraction(*parts):
    """A number in [0, 1) that is the same everywhere."""
    return zlib.crc32("|".join(map(str, parts)).encode()) / 2**32


def step(text, history, layer, seed=""):
    """Token and confidence of one layer; the deeper, the likelier it is the last layer's token."""
    position = len(history)
    if position >= 2 + int(5 * fraction(text, "length")):
        right = END
    else:
        right = 2 + int(VOCABULARY * fraction(text, history, f"token{seed}"))
    errs = layer < LAYERS and fraction(text, history, layer, "errs") < 0.5 - 0.1 * layer
    token = 2 + (right - 1) % VOCABULARY if errs else right
    return token, fraction(text, history, layer, "confidence")


def rough_step(text, history, layer, seed=""):
    """As `step`, with confidences in float32 of which some are NaN and many exactly a threshold."""
    token, confidence = step(text, history, layer, seed)
    if fraction(text, history, layer, "nan") < 0.1:
        return token, np.float32(np.nan)
    return token, np.float32(round(confidence, 2))


def exit_of(text, history, row, step, seed=""):
    """Layer at which a token exits, its confidence there, and the largest one refused before."""
    refused = -np.inf
    for layer in range(1, LAYERS + 1):
        _, confidence = step(text, history, layer, seed)
        if confidence >= row[layer - 1]:
            break
        if row[layer - 1] < np.inf and confidence > refused and layer < LAYERS:
            refused = confidence
    return layer, confidence, refused


def generate_alone(text, needed, step=step, seed=""):
    """Tokens, exits, confidences and refused ones of a text; ``needed`` (T, LAYERS): the confidence that each exit asks for."""
    tokens, exits, confidences, refused = [], [], [], []
    for row in needed:
        layer, confidence, highest = exit_of(text, tuple(tokens), row, step, seed)
        tokens.append(step(text, tuple(tokens), layer, seed)[0])
        exits.append(layer)
        confidences.append(confidence)
        refused.append(highest)
        if tokens[-1] == END:
            break
    return tokens, exits, confidences, refused


def generate_deepest(texts, needed, step):
    """The same of a batch whose rows all exit where the last of them does."""
    rows = [([], [], [], []) for _ in texts]
    for row in needed:
        going = [i for i, (tokens, *_) in enumerate(rows) if tokens[-1:] != [END]]
        layer = max((exit_of(texts[i], tuple(rows[i][0]), row, step)[0] for i in going), default=0)
        for i in going:
            values = (*step(texts[i], tuple(rows[i][0]), layer)[:1], layer, 0.0, -np.inf)
            for column, value in zip(rows[i], values, strict=True):
                column.append(value)
    return rows


def pad(rows, dtype=np.int64, value=0):
    result = np.full((len(rows), max(map(len, rows))), value, dtype=dtype)
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
        tokens, exits, confidences, _ = zip(*rows, strict=True)
        return ToyGeneration(pad(tokens), pad(exits), pad(confidences, float))

    def decode(self, tokens):
        return [" ".join(f"w{token}" for token in row if token > END) for row in tokens]

    def trace(self, input_ids, attention_mask, *, max_new_tokens, prompts, policy):
        columns = {"prompt": [], "position": [], "confidence": [], "agrees": []}
        for text, prompt in zip(self.texts(input_ids, attention_mask), prompts, strict=True):
            tokens, *_ = generate_alone(
                text, np.full((max_new_tokens, LAYERS), [np.inf] * (LAYERS - 1) + [-np.inf])
            )
            for position, token in enumerate(tokens):
                layers = [
                    step(text, tuple(tokens[:position]), layer) for layer in range(1, LAYERS + 1)
                ]
                columns["prompt"].append(prompt)
                columns["position"].append(position)
                columns["confidence"].append([confidence for _, confidence in layers])
                columns["agrees"].append([guess == token for guess, _ in layers])
        return riskcal.records.Traces.from_arrays(**columns)


class OpenDecoder(ToyDecoder):
    """Says which confidences it refused and what its weights are, samples, and knows the batch mode in which rows depend."""

    weights, classifier_weights = "toy", "linear toy"

    def __init__(self):
        super().__init__()
        self.generated = []  # (text, threshold) of every row ever generated

    def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
        needed, texts = (
            policy.exit_thresholds(LAYERS, max_new_tokens),
            self.texts(input_ids, attention_mask),
        )
        self.generated += [(text, policy.threshold) for text in texts]
        if policy.batching == "deepest":
            rows = generate_deepest(texts, needed, rough_step)
        else:
            seed = "" if policy.sampling is None else policy.sampling.seed
            rows = [generate_alone(text, needed, rough_step, seed) for text in texts]
        tokens, exits, confidences, refused = zip(*rows, strict=True)
        lowest = pad(refused, np.float32, -np.inf)
        return OpenGeneration(pad(tokens), pad(exits), pad(confidences, np.float32), lowest)


def load(log=None, delay=0.0):
    """The decoder; each call leaves a line with the process's id in ``log``."""
    if log is not None:
        with Path(log).open("a") as file:
            file.write(f"{os.getpid()}\n")
    return ToyDecoder(float(delay))


def load_nothing():
    return object()


class KilledDecoder(ToyDecoder):
    """Its process is killed at a call of generate, the first time only: the flag goes with it."""

    def __init__(self, flag, call):
        super().__init__()
        self.flag, self.last = Path(flag), call

    def generate(self, *encoded, **settings):
        if self.calls == self.last and self.flag.exists():
            self.flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(*encoded, **settings)


def load_killed(flag=None, call=7):
    return KilledDecoder(os.environ["TOY_FLAG"] if flag is None else flag, call)
