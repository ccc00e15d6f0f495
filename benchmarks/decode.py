"""Early-exit decoding in one paired benchmark: how fast, and how good, every mechanism is at its certified policy.

``python benchmarks/decode.py`` records the test words of the shipped spelling-to-phonemes model under every measure,
certifies each for a textual delta of .1 (epsilon .05), and times the certified policies on words that no policy has seen:
beside Hugging Face's ``generate`` with its dynamic and static cache and with a compiled decoder, our full decode, the same
loop without any exit machinery, static exits and self-speculation. ``--model numbers`` does so for outputs of some 45 tokens.

The settings take turns on the same few prompts, so that a machine's drift meets them all alike; ratios are medians over
rounds, of seconds for the same prompts. Quality is measured on more prompts, in batches: a row decodes as if alone.
"""

import copy
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from rapidfuzz.distance import Levenshtein
from tqdm.auto import tqdm
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import command
import riskcal
from machinery import without_machinery
from recipes.g2p import data as g2p
from recipes.numbers import data as numbers
from riskcal import ExitPolicy, Pruning, efficiency
from riskcal_adapters import record
from riskcal_adapters.texts import token_distance, token_error_rate
from riskcal_adapters.torch import EarlyExitT5, load_example

CHUNK = 20
BATCH = 64
REFERENCE, STATIC, COMPILED = (
    "generate, dynamic cache",
    "generate, static cache",
    "generate, compiled decoder",
)
FULL, BARE = "full model", "no exit machinery"
GRID = np.round(np.arange(0.975, 0.02, -0.025), 3)
#: What is certified: a template and the thresholds that are tested, from the highest down.
CERTIFIED = {
    "softmax": (ExitPolicy(), GRID),
    "max": (ExitPolicy(measure="max"), GRID),
    "entropy": (ExitPolicy(measure="entropy"), np.round(np.arange(-0.1, -3.0, -0.05), 2)),
    "state": (ExitPolicy(measure="state"), np.round(np.arange(0.99, 0.5, -0.025), 3)),
    "classifier": (
        ExitPolicy(measure="classifier"),
        [0.999, 0.998, 0.995, 0.99, *np.arange(0.98, 0.79, -0.01).round(2)],
    ),
    "weighted contrast": (ExitPolicy(measure="weighted"), GRID),
    "jsd contrast": (ExitPolicy(measure="jsd"), GRID),
    "softmax, exact cache": (ExitPolicy(cache="deferred"), GRID),
    "softmax, pruned head": (ExitPolicy(min_layer=2, pruning=Pruning("decaying", 60, 10)), GRID),
}


class Task(NamedTuple):
    """A model with prompts to certify on, and others to time and judge on."""

    decoder: EarlyExitT5
    load: Callable[[], EarlyExitT5]
    max_new_tokens: int
    calibration: list[str]
    held_out: list[str]
    references: list[list[str]]
    distance: Callable[[str, str], float]
    error: Callable[[str, Sequence[str]], float]


def task(name: str, calibration: int, held_out: int) -> Task:
    load = partial(load_example, name)
    if name == "g2p":
        parts = g2p.splits(g2p.read_dictionary(g2p.dictionary_path()))
        prompts, held, references = (
            parts["test"].words,
            parts["development"].words,
            parts["development"].pronunciations,
        )
        limit, distance, error = 24, token_distance, token_error_rate
    else:
        other = numbers.draw("development", held_out)
        prompts, held, references = (
            numbers.draw("test", calibration).prompts,
            other.prompts,
            [[n] for n in other.names],
        )
        limit, distance, error = 96, Levenshtein.normalized_distance, character_error_rate
    return Task(
        load(),
        load,
        limit,
        prompts[:calibration],
        held[:held_out],
        references[:held_out],
        distance,
        error,
    )


def character_error_rate(output: str, references: Sequence[str]) -> float:
    """Edits over the reference's characters, clipped to 1."""
    return min(
        1.0, min(Levenshtein.distance(output, wanted) / len(wanted) for wanted in references)
    )


def certify(
    work: Task, template: ExitPolicy, grid: Sequence[float], delta: float
) -> riskcal.Calibration:
    """Record the calibration prompts, stop once the test has failed, and calibrate."""
    stop = riskcal.Stop(delta=delta)
    with tempfile.TemporaryDirectory() as folder:
        record(
            work.calibration, work.load, grid, folder, policy=template, max_new_tokens=work.max_new_tokens,
            batch_size=BATCH, dissimilarity=work.distance, stop=stop, progress=False,
        )  # fmt: skip
        return riskcal.calibrate(riskcal.Runs.read(folder), delta=delta)


# -- ways to decode a batch, each giving its number of tokens


def hugging_face(
    model: transformers.T5ForConditionalGeneration,
    limit: int,
    static: bool,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> int:
    """Decode as Hugging Face does; its own caches are sized by the encoder's depth, so they are given."""
    if static:
        config = copy.copy(model.config)
        config.num_hidden_layers = config.num_layers = model.config.num_decoder_layers
        sizes = limit + 1, input_ids.shape[1]
        cache = EncoderDecoderCache(
            *(StaticCache(config=config, max_cache_len=size) for size in sizes)
        )
    else:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    tokens = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit,
        use_cache=True,
        past_key_values=cache,
    )
    return int((tokens[:, 1:] != model.generation_config.pad_token_id).sum())


def compiled(
    model: transformers.T5ForConditionalGeneration,
) -> transformers.T5ForConditionalGeneration:
    """The model with ``torch.compile`` over its decoder, for any length: compiled in the first calls, a minute or two."""
    model = copy.deepcopy(model)
    model.decoder.forward = torch.compile(model.decoder.forward, dynamic=True)
    return model


def ours(
    work: Task, policy: ExitPolicy, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> int:
    generation = work.decoder.generate(
        input_ids, attention_mask, policy=policy, max_new_tokens=work.max_new_tokens
    )
    return int((generation.exit_layers > 0).sum())


def speculating(
    work: Task, settings: dict[str, Any], input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> int:
    found = work.decoder.speculate(
        input_ids, attention_mask, max_new_tokens=work.max_new_tokens, **settings
    )
    return int((found.tokens != work.decoder.model.generation_config.pad_token_id).sum())


def bare(work: Task, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> int:
    said = without_machinery(work.decoder, work.max_new_tokens, input_ids, attention_mask)
    pad = work.decoder._special.pad
    return sum(token != pad for row in said for token in row)


# -- speed and quality


def timings(
    ways: dict[str, Callable[..., int]], prompts: list[tuple[torch.Tensor, ...]], rounds: int
) -> pd.DataFrame:
    """Tokens and seconds of every way on every few prompts, in every round; the first round warms up."""
    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    names = list(ways)
    rows = []
    for turn in tqdm(range(rounds + 1), desc="rounds"):
        for run, chunk in enumerate(chunks):
            first = (turn + run) % len(names)
            for name in names[first:] + names[:first]:
                started = time.perf_counter()
                tokens = sum(ways[name](*prompt) for prompt in chunk)
                rows.append((turn, run, name, tokens, time.perf_counter() - started))
    return pd.DataFrame(rows, columns=["round", "run", "setting", "tokens", "seconds"])


class Quality:
    """Layers, error and distance to the full model, per held-out prompt, of a policy."""

    def __init__(self, work: Task) -> None:
        self.work = work
        self.batches = [
            work.decoder.encode(work.held_out[i : i + BATCH])
            for i in range(0, len(work.held_out), BATCH)
        ]
        self.full = self._texts(ExitPolicy.full_model())[0]

    def of(self, policy: ExitPolicy) -> pd.DataFrame:
        """One row per prompt: ``layers`` (summed over its ``tokens``), ``error`` and ``distance``."""
        texts, layers, tokens = self._texts(policy)
        errors = [
            self.work.error(text, wanted)
            for text, wanted in zip(texts, self.work.references, strict=True)
        ]
        distances = [
            self.work.distance(text, full) for text, full in zip(texts, self.full, strict=True)
        ]
        return pd.DataFrame(
            {"layers": layers, "tokens": tokens, "error": errors, "distance": distances}
        )

    def _texts(self, policy: ExitPolicy) -> tuple[list[str], list[int], list[int]]:
        texts, layers, tokens = [], [], []
        for prompt in self.batches:
            generation = self.work.decoder.generate(
                *prompt, policy=policy, max_new_tokens=self.work.max_new_tokens
            )
            texts += self.work.decoder.decode(generation.tokens)
            layers += generation.exit_layers.sum(1).tolist()
            tokens += (generation.exit_layers > 0).sum(1).tolist()
        return texts, layers, tokens


def mean_layers(prompts: pd.DataFrame) -> float:
    """Layers per generated token."""
    return float(prompts["layers"].sum() / prompts["tokens"].sum())


def static_table(quality: Quality, n_layers: int) -> pd.DataFrame:
    """Every static exit against the flat threshold that uses at most as many layers: chosen by layers, never by error."""
    grid = np.arange(0, 1, 0.04).round(2).tolist()
    adaptive = {t: quality.of(ExitPolicy(threshold=t)) for t in tqdm(grid, desc="thresholds")}
    rows = []
    for k in range(1, n_layers):
        static = quality.of(ExitPolicy.static(k))
        threshold = max(
            (t for t, prompts in adaptive.items() if mean_layers(prompts) <= k), default=0.0
        )
        prompts = adaptive[threshold]
        gain = 100 * (static["error"] - prompts["error"])
        rows.append(
            {
                "static exit": k,
                "error %": 100 * static["error"].mean(),
                "threshold": threshold,
                "its layers": mean_layers(prompts),
                "its error %": 100 * prompts["error"].mean(),
                "points gained": gain.mean(),
                "+- 1.96 se": 1.96 * gain.sem(),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Certify, time, judge; print the tables."""
    parser = command.parser(__doc__, figures=False)
    parser.add_argument("--model", choices=("g2p", "numbers"), default="g2p")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CERTIFIED),
        default=list(CERTIFIED),
        help="what to certify",
    )
    parser.add_argument(
        "--delta", type=float, default=0.1, help="textual tolerance of the certified policies"
    )
    parser.add_argument(
        "--calibration", type=int, default=3000, help="prompts that policies are certified on"
    )
    parser.add_argument(
        "--prompts", type=int, default=100, help="prompts timed, of the held-out ones"
    )
    parser.add_argument(
        "--judged", type=int, default=1000, help="held-out prompts on which quality is measured"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; at batch 1 more than one rarely pays"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*cache.*", module="transformers")

    work = task(options.model, options.calibration, options.judged)
    quality = Quality(work)
    conditions: dict[str, Any] = vars(options) | {
        "max_new_tokens": work.max_new_tokens,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(conditions))

    policies = {FULL: ExitPolicy.full_model()}
    policies |= {f"static exit {k}": ExitPolicy.static(k) for k in (1, 2, 3)}
    rows = []
    measured = {name: one for name, one in CERTIFIED.items() if name in options.only}
    known = {None, *work.decoder.measures}  # None: the decoder's own
    measured = {name: one for name, one in measured.items() if one[0].measure in known}
    for name, (template, grid) in tqdm(measured.items(), desc="certify"):
        calibration = certify(work, template, grid, options.delta)
        policies[name] = calibration.policy()
        judged = quality.of(policies[name])
        rows.append(
            {
                "measure": name,
                "threshold": calibration.threshold,
                "layers": mean_layers(judged),
                "distance %": 100 * judged["distance"].mean(),
                "error %": 100 * judged["error"].mean(),
            }
        )
    judged = quality.of(policies[FULL])
    rows.append(
        {"measure": FULL, "layers": mean_layers(judged), "error %": 100 * judged["error"].mean()}
    )
    print(
        f"\nCertified for a textual delta of {options.delta:g}, epsilon .05, on {options.calibration} prompts; held out:"
    )
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.2f"))

    ways: dict[str, Callable[..., int]] = {
        REFERENCE: partial(hugging_face, work.decoder.model, work.max_new_tokens, False),
        STATIC: partial(hugging_face, work.decoder.model, work.max_new_tokens, True),
        COMPILED: partial(hugging_face, compiled(work.decoder.model), work.max_new_tokens, False),
        BARE: partial(bare, work),
    }
    ways |= {name: partial(ours, work, policy) for name, policy in policies.items()}
    ways["self-speculation, 2 layers"] = partial(
        speculating, work, {"draft_layer": 2, "draft_length": 4}
    )
    for batch in options.batch:
        timed = work.held_out[: options.prompts]
        prompts = [work.decoder.encode(timed[i : i + batch]) for i in range(0, len(timed), batch)]
        table = efficiency.speed_table(timings(ways, prompts, options.rounds), [REFERENCE, FULL])
        table["ms per prompt"] = 1000 * table["mean"] * math.ceil(len(prompts) / CHUNK) / len(timed)
        ratios = [f"x {REFERENCE}", f"x {FULL}", f"x {FULL} low", f"x {FULL} high"]
        shown = ["setting", "ms per prompt", "tokens_per_second", *ratios]
        print(
            f"\nBatch {batch}, encoder included; seconds for the same prompts, medians of {options.rounds} rounds:"
        )
        print(table[shown].to_string(index=False, float_format="%.2f"))

    print("\nStatic exits against flat softmax thresholds:")
    print(static_table(quality, work.decoder.n_layers).to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
