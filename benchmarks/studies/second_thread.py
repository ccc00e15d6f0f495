"""Whether a second thread pays that decides on the exit of layer i while layer i + 1 runs (CALM, section 3.5).

``PYTHONPATH=benchmarks python benchmarks/studies/second_thread.py``

Batch 1, plain softmax over the whole vocabulary at every layer. One by one: layer, confidence, layer, confidence. Overlapped: a
second thread computes the confidence of layer i while the first runs layer i + 1, which is thrown away if the token exits at
i. Nothing has to be undone: what layer i + 1 put into its cache is the projected state of layer i, as if it had been skipped.
The other use of a second core is to let each operation use both. Exit depths are forced to those that the shipped model has at
threshold .9, so that all settings, and an untrained model of CALM's size, do the same work.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import common
import figures
import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from riskcal import ExitPolicy
from riskcal_adapters.torch.measures import softmax_margin
from riskcal_adapters.torch.t5_backbone import T5Backbone

ROUNDS = 7
PROMPTS = 3
LENGTH = 8

Confidence = Callable[[torch.Tensor], tuple[int, float]]


class Second:
    """A thread that computes confidences."""

    def __init__(self, confidence: Confidence) -> None:
        self._asked: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self._confidence = confidence
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        with torch.inference_mode():
            while (state := self._asked.get()) is not None:
                self._answers.put(self._confidence(state))

    def ask(self, state: torch.Tensor) -> None:
        """Hand over a layer's state."""
        self._asked.put(state)

    def answer(self) -> tuple[int, float]:
        """Token and confidence of the state handed over last; waits for it."""
        return self._answers.get()

    def stop(self) -> None:
        """End the thread."""
        self._asked.put(None)
        self._thread.join()


def one_by_one(
    backbone: T5Backbone, cache: Any, depths: list[int], confidence: Confidence
) -> list[int]:
    tokens, token = [], 0
    for depth in depths:
        state = backbone.embed([token], cache)
        for index in range(depth):
            state = backbone.layer(index, state, cache)
            token, _ = confidence(state)
        cache.append(state)
        tokens.append(token)
    return tokens


def overlapped(backbone: T5Backbone, cache: Any, depths: list[int], second: Second) -> list[int]:
    tokens, token = [], 0
    for depth in depths:
        state = backbone.layer(0, backbone.embed([token], cache), cache)
        for index in range(depth):
            second.ask(state)
            further = (
                backbone.layer(index + 1, state, cache) if index + 1 < backbone.n_layers else state
            )
            token, _ = second.answer()
            if index + 1 == depth:
                break
            state = further
        cache.append(state)
        tokens.append(token)
    return tokens


def large() -> T5ForConditionalGeneration:
    """CALM's 8-layer model, untrained: width 512, 6 heads of 64, feed-forward 1,024, 32,128 tokens."""
    torch.manual_seed(0)
    sizes = {
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_heads": 6,
        "num_layers": 2,
        "num_decoder_layers": 8,
    }
    config = T5Config(
        vocab_size=32_128, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes
    )
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config).eval()


@torch.inference_mode()
def measure(
    model: T5ForConditionalGeneration, prompts: list[torch.Tensor], depths: list[list[int]]
) -> dict[str, Any]:
    """Wall-clock seconds of every setting in every round, and the parts' own CPU times."""
    backbone = T5Backbone(model, start=0)

    def confidence(state: torch.Tensor) -> tuple[int, float]:
        logits = backbone.logits(state)
        return int(logits.argmax()), float(softmax_margin(logits)[0])

    second = Second(confidence)
    ways = {
        "one by one": lambda cache, depth: one_by_one(backbone, cache, depth, confidence),
        "second thread": lambda cache, depth: overlapped(backbone, cache, depth, second),
        "two cores in each operation": lambda cache, depth: one_by_one(
            backbone, cache, depth, confidence
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    said: dict[str, list[list[int]]] = {}
    for turn in range(ROUNDS + 2):
        total = dict.fromkeys(ways, 0.0)
        for i, (ids, depth) in enumerate(zip(prompts, depths, strict=True)):
            for name in np.roll(list(ways), turn + i):
                torch.set_num_threads(2 if name.startswith("two") else 1)
                cache = backbone.start(ids, np.ones(ids.shape, dtype=bool), len(depth))
                began = time.perf_counter()
                tokens = ways[name](cache, depth)
                total[name] += time.perf_counter() - began
                said.setdefault(name, []).append(tokens)
        for name, value in total.items():
            seconds[name].append(value)
    second.stop()
    torch.set_num_threads(1)
    assert said["one by one"] == said["second thread"], "tokens differ"
    steps = sum(map(len, depths))
    parts = own_times(backbone, prompts[0], confidence)
    ratio = {
        name: np.array(seconds["one by one"][2:]) / np.array(values[2:])
        for name, values in seconds.items()
        if name != "one by one"
    }
    flat = [depth for some in depths for depth in some]
    alone = sum(depth * (parts["layer"] + parts["confidence"]) for depth in flat)
    ideal = sum(  # the first layer, then the longer of the two at once; at the last layer only the confidence is left
        parts["layer"]
        + (depth - (depth == backbone.n_layers)) * max(parts["layer"], parts["confidence"])
        + (depth == backbone.n_layers) * parts["confidence"]
        for depth in flat
    )
    return {
        "milliseconds_per_token": {
            name: 1e3 * float(np.median(v[2:])) / steps for name, v in seconds.items()
        },
        "fastest_round": {name: 1e3 * float(np.min(v[2:])) / steps for name, v in seconds.items()},
        "speedup": {
            name: {"median": np.median(r), "low": np.quantile(r, 0.1), "high": np.quantile(r, 0.9)}
            for name, r in ratio.items()
        },
        "cpu_milliseconds": {name: 1e3 * value for name, value in parts.items()},
        "ideal_speedup": alone / ideal,
    }


def own_times(backbone: T5Backbone, ids: torch.Tensor, confidence: Confidence) -> dict[str, float]:
    """CPU seconds of a layer and of a confidence, each the median of many."""
    layer, sure = [], []
    for _ in range(30):
        cache = backbone.start(ids, np.ones(ids.shape, dtype=bool), 2)
        state = backbone.embed([0], cache)
        for index in range(backbone.n_layers):
            times = [time.thread_time()]
            state = backbone.layer(index, state, cache)
            times.append(time.thread_time())
            confidence(state)
            times.append(time.thread_time())
            layer.append(times[1] - times[0])
            sure.append(times[2] - times[1])
    return {"layer": float(np.median(layer)), "confidence": float(np.median(sure))}


def main() -> None:
    options = common.parser(__doc__).parse_args()
    options.words = PROMPTS
    task, decoder = common.load(options)
    decoded = common.decode(decoder, task, ExitPolicy(threshold=0.9))
    depths = [[int(exit_) for exit_ in row[:LENGTH] if exit_] for row in decoded.exits]
    prompts = [decoder.encode([prompt])[0] for prompt in task.prompts]
    before = os.getloadavg()[0]
    models = {"small": decoder.model, "large": large()}
    found = {name: measure(model, prompts, depths) for name, model in models.items()}
    sizes = {
        name: {"d_model": model.config.d_model, "vocabulary": model.config.vocab_size}
        for name, model in models.items()
    }
    conditions = {"cores": os.cpu_count(), "load_before": before, "load_after": os.getloadavg()[0]}
    more = {"sizes": sizes, "rounds": ROUNDS, "mean_depth": float(np.mean(np.concatenate(depths)))}
    figures.save(
        common.save(
            "second_thread", options, decoder, task, {**conditions, **more, "models": found}
        )
    )


if __name__ == "__main__":
    main()
