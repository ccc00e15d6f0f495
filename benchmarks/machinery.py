"""What the machinery of exits costs where nothing exits: the full policy against a plain greedy loop on the same layers.

``python benchmarks/machinery.py`` decodes the same prompts by `generate` with the full policy and by `without_machinery`, which
has no policy, thresholds or confidences, one at a time and in batches of eight: words of the spelling model, whose layers are
compiled; random words of a random T5 v1.0 of its shape, whose are not; and a random causal model with six of SmolLM2's thirty
layers and a smaller vocabulary. Both ways take turns, each first in every other round. A ratio is the median over rounds of the
process's CPU seconds, which other work on the machine disturbs least; beside it stand the middle half of the rounds, and the
ratio of each way's quickest fifth. Tokens are compared. Of a gated T5 one row's generation is compiled as a whole
(`riskcal_adapters.torch.one_row`), the plain loop is not.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm

import command
import engine as by_engine
from riskcal import ExitPolicy
from riskcal_adapters.torch import EarlyExitCausalLM, EarlyExitT5, load_example

FULL = ExitPolicy.full_model()
Prompt = tuple[torch.Tensor, torch.Tensor]


def without_machinery(
    decoder: Any, limit: int, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[list[int]]:
    """Our layers in a plain greedy loop; the tokens of each row."""
    backbone, special = decoder._backbone, decoder._special
    tokens, mask = decoder.checked(input_ids, attention_mask)
    said = []
    with torch.inference_mode():
        cache = backbone.start(tokens, mask, limit)
        chosen, going = cache.first, [True] * len(tokens)
        for _ in range(limit):
            state = backbone.embed(chosen, cache)
            for index in range(backbone.n_layers):
                state = backbone.layer(index, state, cache)
            cache.append(state)
            best = backbone.logits(state).argmax(-1).tolist()
            chosen = [token if on else special.pad for token, on in zip(best, going, strict=True)]
            said.append(chosen)
            going = [
                on and token not in special.ends for token, on in zip(chosen, going, strict=True)
            ]
            if not any(going):
                break
    return [list(row) for row in zip(*said, strict=True)]


def random_t5() -> EarlyExitT5:
    """Of the spelling model's shape, with layers of v1.0; it never ends before the limit."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=68, d_model=128, d_kv=32, d_ff=256, num_heads=4, num_layers=2, num_decoder_layers=8,
        feed_forward_proj="relu", decoder_start_token_id=0,
    )  # fmt: skip
    return EarlyExitT5(transformers.T5ForConditionalGeneration(config).eval())


def random_causal() -> EarlyExitCausalLM:
    """Of SmolLM2-135M's width."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return EarlyExitCausalLM(transformers.LlamaForCausalLM(config).eval())


def random_prompts(count: int) -> Prompt:
    """Of 3 to 12 tokens, padded."""
    rng = np.random.default_rng(0)
    mask = np.arange(12) < rng.integers(3, 13, count)[:, None]
    ids = np.where(mask, rng.integers(2, 68, mask.shape), 0)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def in_batches(ids: torch.Tensor, mask: torch.Tensor, size: int) -> list[Prompt]:
    """Without columns that hold padding alone."""
    parts = []
    for rows in torch.arange(len(ids)).split(size):
        real = mask[rows].any(0)
        parts.append((ids[rows][:, real], mask[rows][:, real]))
    return parts


def compared(decoder: Any, limit: int, given: list[Prompt], rounds: int) -> dict[str, float]:
    """Milliseconds of both ways, and their ratios."""

    def full(*prompt: torch.Tensor) -> list[list[int]]:
        found: list[list[int]] = decoder.generate(
            *prompt, policy=FULL, max_new_tokens=limit
        ).tokens.tolist()
        return found

    def bare(*prompt: torch.Tensor) -> list[list[int]]:
        return without_machinery(decoder, limit, *prompt)

    ways: list[Callable[..., list[list[int]]]] = [bare, full]
    same = sum(bare(*prompt) == full(*prompt) for prompt in given)
    taken = np.empty((rounds, 2))
    for turn in tqdm(range(rounds), leave=False):
        for way in (0, 1) if turn % 2 else (1, 0):
            began = time.process_time()
            for prompt in given:
                ways[way](*prompt)
            taken[turn, way] = time.process_time() - began
    ratio = taken[:, 1] / taken[:, 0]
    quick = np.quantile(taken, 0.2, axis=0)
    prompts = sum(len(ids) for ids, _ in given)
    return {
        "ms bare": 1e3 * float(np.median(taken[:, 0])) / prompts,
        "ms full policy": 1e3 * float(np.median(taken[:, 1])) / prompts,
        "ratio": float(np.median(ratio)),
        "low": float(np.quantile(ratio, 0.25)),
        "high": float(np.quantile(ratio, 0.75)),
        "quickest fifth": float(quick[1] / quick[0]),
        "batches that differ": len(given) - same,
    }


def main() -> None:
    """Measure, print, write."""
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--prompts", type=int, default=48, help="of the T5s; the causal model has 8"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = load_example("g2p")
    models: dict[str, tuple[Any, int, Prompt]] = {
        "spelling": (words, 24, words.encode(by_engine.prompts("g2p", options.prompts))),
        "T5 v1.0": (random_t5(), 8, random_prompts(options.prompts)),
        "causal": (random_causal(), 8, random_prompts(8)),
    }
    rows = []
    for name, (decoder, limit, prompts) in models.items():
        for size in options.batch:
            found = compared(decoder, limit, in_batches(*prompts, size), options.rounds)
            rows.append({"model": name, "batch": size, **found})
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))
    told = {"options": vars(options) | {"json": None}, "torch": torch.__version__, "rows": rows}
    command.keep(told, options.json)


if __name__ == "__main__":
    main()
