"""Early-exit decoding on the shipped spelling-to-phonemes model: how fast, and how good, in one paired benchmark.

``python benchmarks/decode.py`` decodes held-out words one at a time with Hugging Face's ``generate``, our full decode, flat
thresholds, static exits, and the policies certified on the shipped records for a textual delta of .1 and .05 (or read from
``--policy`` files). The settings take turns on the same few words, so that a machine's drift meets them all alike; speeds are
medians over rounds. Quality is measured on more words, in batches: a row decodes as if alone.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm
from transformers import DynamicCache, EncoderDecoderCache

import riskcal
from riskcal import ExitPolicy
from riskcal_adapters.g2p import data
from riskcal_adapters.texts import token_distance, token_error_rate
from riskcal_adapters.torch import EarlyExitT5, load_example

CHUNK = 20
BATCH = 64
MAX_NEW_TOKENS = 64
REFERENCE, FULL = "generate (Hugging Face)", "full model"


def settings(policy_files: list[Path], n_layers: int) -> dict[str, ExitPolicy]:
    """What is timed, by name."""
    chosen = {FULL: ExitPolicy.full_model()}
    chosen |= {f"threshold {value:g}": ExitPolicy(threshold=value) for value in (0.99, 0.9, 0.8, 0.7, 0.5, 0.3)}
    chosen |= {f"static exit {k}": static_exit(k) for k in range(1, min(5, n_layers))}
    if policy_files:
        return chosen | {path.stem: ExitPolicy.load(path) for path in policy_files}
    runs = riskcal.load_example("g2p")
    return chosen | {
        f"certified, delta {delta:g}": riskcal.calibrate(runs, delta=delta).policy() for delta in (0.1, 0.05)
    }


def static_exit(layer: int) -> ExitPolicy:
    """Every token leaves at this layer."""
    return ExitPolicy(thresholds={layer: 0.0})


def hugging_face(decoder: EarlyExitT5, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """Generate as Hugging Face does, and count the tokens."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())  # the default one is sized by the encoder's depth
    tokens = decoder.model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=MAX_NEW_TOKENS,
        use_cache=True,
        past_key_values=cache,
    )
    return tokens.shape[1] - 1


def ours(decoder: EarlyExitT5, policy: ExitPolicy, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    """Generate under a policy, and count the tokens."""
    return decoder.generate(input_ids, attention_mask, policy=policy, max_new_tokens=MAX_NEW_TOKENS).tokens.shape[1]


def speeds(ways: dict[str, Callable[..., int]], prompts: list[tuple[torch.Tensor, ...]], rounds: int) -> pd.DataFrame:
    """Tokens and seconds of every way of generating in every round; a first, unmeasured chunk warms up."""
    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    names = list(ways)
    for name in names:
        timed(ways[name], chunks[0])
    rows = []
    for round_ in tqdm(range(rounds), desc="rounds"):
        for turn, chunk in enumerate(chunks):
            first = (turn + round_) % len(names)
            rows += [(round_, name, *timed(ways[name], chunk)) for name in names[first:] + names[:first]]
    return pd.DataFrame(rows, columns=["round", "setting", "tokens", "seconds"])


def timed(way: Callable[..., int], prompts: list[tuple[torch.Tensor, ...]]) -> tuple[int, float]:
    """Tokens generated and seconds taken."""
    started = time.perf_counter()
    tokens = sum(way(*prompt) for prompt in prompts)
    return tokens, time.perf_counter() - started


class Quality:
    """Layers, phoneme error and distance to the full model, per held-out word, of a policy."""

    def __init__(self, decoder: EarlyExitT5, words: list[str], pronunciations: list[list[str]]) -> None:
        self.decoder, self.pronunciations = decoder, pronunciations
        self.batches = [decoder.encode(words[i : i + BATCH]) for i in range(0, len(words), BATCH)]
        self.full = self._texts(ExitPolicy.full_model())[0]

    def of(self, policy: ExitPolicy) -> pd.DataFrame:
        """One row per word: ``layers`` (summed over its ``tokens``), ``error`` and ``distance``."""
        texts, layers, tokens = self._texts(policy)
        errors = [token_error_rate(text, spoken) for text, spoken in zip(texts, self.pronunciations, strict=True)]
        distances = [token_distance(text, full) for text, full in zip(texts, self.full, strict=True)]
        return pd.DataFrame({"layers": layers, "tokens": tokens, "error": errors, "distance": distances})

    def _texts(self, policy: ExitPolicy) -> tuple[list[str], list[int], list[int]]:
        texts, layers, tokens = [], [], []
        for prompt in self.batches:
            generation = self.decoder.generate(*prompt, policy=policy, max_new_tokens=MAX_NEW_TOKENS)
            texts += self.decoder.decode(generation.tokens)
            layers += generation.exit_layers.sum(1).tolist()
            tokens += (generation.exit_layers > 0).sum(1).tolist()
        return texts, layers, tokens


def mean_layers(words: pd.DataFrame) -> float:
    """Layers per generated token."""
    return words["layers"].sum() / words["tokens"].sum()


def speed_table(times: pd.DataFrame, quality: dict[str, pd.DataFrame], words: int) -> pd.DataFrame:
    """Each setting's speed, and what it costs; ratios are paired within rounds.

    Tokens per second flatter a policy that rambles, as a prompt's encoding is spread over more tokens: the last ratio is of
    seconds per word.
    """
    sums = times.pivot_table(index="round", columns="setting", values=["tokens", "seconds"], aggfunc="sum")
    seconds = sums["seconds"]
    rates = sums["tokens"] / seconds
    rows = []
    for name in [REFERENCE, *quality]:
        judged = quality[FULL if name == REFERENCE else name]
        rows.append(
            {
                "setting": name,
                "tokens/s": rates[name].median(),
                "x generate": (rates[name] / rates[REFERENCE]).median(),
                "x own full": (rates[name] / rates[FULL]).median(),
                "layers": mean_layers(judged),
                "error %": 100 * judged["error"].mean(),
                "distance %": 100 * judged["distance"].mean(),
                "ms/word": 1000 * seconds[name].median() / words,
                "x own full, by word": (seconds[FULL] / seconds[name]).median(),
            }
        )
    return pd.DataFrame(rows)


def static_table(quality: Quality, n_layers: int) -> pd.DataFrame:
    """Every static exit against the flat threshold that uses at most as many layers: chosen by layers, never by error."""
    adaptive = {
        t: quality.of(ExitPolicy(threshold=t)) for t in tqdm(np.arange(0, 1, 0.04).round(2).tolist(), desc="thresholds")
    }
    rows = []
    for k in range(1, n_layers):
        static = quality.of(static_exit(k))
        threshold = max((t for t, words in adaptive.items() if mean_layers(words) <= k), default=0.0)
        words = adaptive[threshold]
        gain = 100 * (static["error"] - words["error"])
        rows.append(
            {
                "static exit": k,
                "error %": 100 * static["error"].mean(),
                "threshold": threshold,
                "its layers": mean_layers(words),
                "its error %": 100 * words["error"].mean(),
                "points gained": gain.mean(),
                "+- 1.96 se": 1.96 * gain.sem(),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure, print two tables, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=200, help="words timed")
    parser.add_argument("--quality-words", type=int, default=1000, help="words on which quality is measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; at batch 1 more than one rarely pays")
    parser.add_argument(
        "--policy", type=Path, action="append", default=[], help="policy file; instead of the certified ones"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    decoder = load_example("g2p")
    held_out = data.splits(data.read_dictionary(data.dictionary_path()))["development"]  # the records are of "test"
    quality = Quality(
        decoder, held_out.words[: options.quality_words], held_out.pronunciations[: options.quality_words]
    )
    policies = settings(options.policy, decoder.n_layers)
    ways: dict[str, Callable[..., int]] = {REFERENCE: partial(hugging_face, decoder)}
    ways |= {name: partial(ours, decoder, policy) for name, policy in policies.items()}
    timed_words = held_out.words[: options.words]
    times = speeds(ways, [decoder.encode([word]) for word in timed_words], options.rounds)
    judged = {name: quality.of(policy) for name, policy in policies.items()}
    fast = speed_table(times, judged, len(timed_words))
    good = static_table(quality, decoder.n_layers)

    conditions: dict[str, Any] = {
        "threads": options.threads,
        "words timed": options.words,
        "rounds": options.rounds,
        "words judged": options.quality_words,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(
        ", ".join(f"{name} {value}" for name, value in conditions.items())
        + "; batch 1, encoder included, medians of rounds\n"
    )
    print(fast.to_string(index=False, float_format="%.2f"), end="\n\n")
    print(good.to_string(index=False, float_format="%.2f"))
    if options.json:
        figures = {"conditions": conditions, "speed": fast.to_dict("records"), "static": good.to_dict("records")}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
