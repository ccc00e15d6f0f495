"""Self-speculative decoding on the shipped spelling-to-phonemes model: what is accepted, and whether it pays on the clock.

``python benchmarks/speculation.py`` decodes held-out words one at a time: with the full model, and speculating with each
draft layer and length. The settings take turns on the same few words, so that a machine's drift meets them all alike; times are
medians over rounds, and ratios are paired within rounds. Every word's tokens are compared with the full model's. A second table
tells what sharing noise between drafts and verification costs in acceptance, against rejection sampling.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

import command
from recipes.g2p import data
from riskcal import ExitPolicy, Sampling, efficiency
from riskcal_adapters.torch import EarlyExitT5, load_example

FULL = "full model"
Array = NDArray[np.float64]


def settings(
    layers: list[int], lengths: list[int], confidences: list[float]
) -> dict[str, dict[str, Any]]:
    """Arguments of `EarlyExitT5.speculate`, by name."""
    chosen: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for length in [*lengths, "adaptive"]:
            chosen[f"layer {layer}, {length}"] = {"draft_layer": layer, "draft_length": length}
        for least in confidences:
            asked = {"draft_layer": layer, "draft_length": max(lengths), "draft_confidence": least}
            chosen[f"layer {layer}, margin {least:g}"] = asked
    return chosen


def full(
    decoder: EarlyExitT5,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    sampling: Sampling | None = None,
) -> int:
    """Generate with the full model, and count the tokens."""
    return decoder.generate(input_ids, mask, policy=ExitPolicy(sampling=sampling)).tokens.shape[1]


def speculating(
    decoder: EarlyExitT5, asked: dict[str, Any], input_ids: torch.Tensor, mask: torch.Tensor
) -> int:
    """Speculate, and count the tokens."""
    return decoder.speculate(input_ids, mask, **asked).tokens.shape[1]


def counts(
    decoder: EarlyExitT5, chosen: dict[str, dict[str, Any]], words: list[str]
) -> pd.DataFrame:
    """What each setting drafts, and of how many words all tokens are the full model's."""
    prompts = decoder.encode(words)
    tokens = decoder.generate(*prompts).tokens
    rows = []
    for name, asked in chosen.items():
        found = decoder.speculate(*prompts, **asked)
        same = (found.tokens == tokens).all(1).sum() if found.tokens.shape == tokens.shape else 0
        layers = (
            asked["draft_layer"] * found.drafted.sum()
            + decoder.n_layers * found.verifications.sum()
        )
        emitted = int((found.accepted + found.verifications).sum())
        rows.append(
            {
                "setting": name,
                "accepted": found.acceptance_rate,
                "tokens/verification": found.tokens_per_verification,
                "layers in turn": int(layers) / emitted,
                "words the same": int(same),
            }
        )
    return pd.DataFrame(rows)


def timings(
    ways: dict[str, Callable[..., int]], prompts: list[tuple[torch.Tensor, ...]], rounds: int
) -> pd.DataFrame:
    """Seconds and tokens of every way of generating, for every prompt and round; the first round warms up."""
    rows, names = [], list(ways)
    for round_ in tqdm(range(rounds + 1), desc="rounds"):
        for run, prompt in enumerate(prompts):
            first = (run + round_) % len(names)
            for name in names[first:] + names[:first]:
                started = time.perf_counter()
                tokens = ways[name](*prompt)
                rows.append((round_, run, name, time.perf_counter() - started, tokens))
    return pd.DataFrame(rows, columns=["round", "run", "setting", "seconds", "tokens"])


def time_table(times: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds per output token, the prompt's encoding included, and the speed-up over the full model."""
    speeds = efficiency.speed_table(times, [FULL]).set_index("setting")
    table = speeds[[f"x {FULL}", f"x {FULL} low", f"x {FULL} high"]]
    table.insert(0, "ms/token", 1000 / speeds["tokens_per_second"])
    return table.join(found.set_index("setting")).reset_index()


@torch.inference_mode()
def sampled_acceptance(
    decoder: EarlyExitT5, words: list[str], layers: list[int], sampling: Sampling
) -> pd.DataFrame:
    """Probability that a drafted token is accepted along the full model's sampled texts, averaged over positions.

    Rejection sampling accepts ``1 - TV(p, q)``, the most that is possible. Common Gumbel noise draws the same token from p and
    q with probability ``sum over x of 1 / (sum over y of max(p_y / p_x, q_y / q_x))``.
    """
    model = decoder.model
    kept: dict[int, list[tuple[Array, Array]]] = {layer: [] for layer in layers}
    for word in words:
        input_ids, mask = decoder.encode([word])
        said = decoder.generate(input_ids, mask, policy=ExitPolicy(sampling=sampling)).tokens
        before = torch.cat(
            [torch.full((1, 1), model.config.decoder_start_token_id), said[:, :-1]], 1
        )
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            decoder_input_ids=before,
            output_hidden_states=True,
            use_cache=False,
        )
        p = law(output.logits[0], sampling.temperature)
        for layer in layers:
            state = model.decoder.final_layer_norm(output.decoder_hidden_states[layer][0])
            scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0
            kept[layer].append((p, law(model.lm_head(state * scale), sampling.temperature)))
    rows = []
    for layer, pairs in kept.items():
        p, q = (np.concatenate(laws) for laws in zip(*pairs, strict=True))
        rejection, common = 1 - np.abs(p - q).sum(1) / 2, common_noise(p, q)
        difference = rejection - common
        rows.append(
            {
                "temperature": sampling.temperature,
                "draft layer": layer,
                "rejection sampling": rejection.mean(),
                "common noise": common.mean(),
                "points lost": 100 * difference.mean(),
                "+- 1.96 se": 196 * difference.std(ddof=1) / np.sqrt(len(difference)),
            }
        )
    return pd.DataFrame(rows)


def law(logits: torch.Tensor, temperature: float) -> Array:
    """(T, V) probabilities."""
    return torch.softmax(logits.double() / temperature, -1).numpy()


def common_noise(p: Array, q: Array) -> Array:
    """(T,): probability that the same Gumbel noise draws one token from both."""
    log_p, log_q = np.log(p), np.log(q)
    ratios = np.maximum(
        log_p[:, None, :] - log_p[:, :, None], log_q[:, None, :] - log_q[:, :, None]
    )
    return np.asarray((1 / np.exp(ratios).sum(2)).sum(1))


def main() -> None:
    """Measure, print two tables, and write the figures if asked to."""
    parser = command.parser(__doc__)
    parser.add_argument("--words", type=int, default=100, help="words timed")
    parser.add_argument(
        "--count-words", type=int, default=300, help="words on which acceptance is counted"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4], help="draft layers")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6], help="draft lengths"
    )
    parser.add_argument(
        "--confidences",
        type=float,
        nargs="*",
        default=[0.3, 0.7],
        help="margins at which drafts stop",
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    decoder = load_example("g2p")
    words = data.splits(data.read_dictionary(data.dictionary_path()))["development"].words
    chosen = settings(options.layers, options.lengths, options.confidences)
    ways: dict[str, Callable[..., int]] = {FULL: partial(full, decoder)}
    ways |= {name: partial(speculating, decoder, asked) for name, asked in chosen.items()}
    times = timings(
        ways, [decoder.encode([word]) for word in words[: options.words]], options.rounds
    )
    fast = time_table(times, counts(decoder, chosen, words[: options.count_words]))
    accepted = pd.concat(
        sampled_acceptance(
            decoder, words[: options.count_words], options.layers, Sampling(temperature=tau)
        )
        for tau in (0.5, 1.0, 1.5)
    )
    conditions = {
        name: getattr(options, name) for name in ("threads", "words", "count_words", "rounds")
    }
    conditions["torch"] = torch.__version__
    print(
        ", ".join(f"{name} {value}" for name, value in conditions.items())
        + "; batch 1, encoder included\n"
    )
    print(fast.to_string(index=False, float_format="%.3f"), end="\n\n")
    print(accepted.to_string(index=False, float_format="%.3f"))
    if options.json:
        tables = {"time": fast, "accepted": accepted}
        # NaN as null
        figures = {
            name: json.loads(table.to_json(orient="records")) for name, table in tables.items()
        }
        figures["conditions"] = conditions
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
