"""Recipe: exit heads for SmolLM2-135M-Instruct, from text that it generates itself, on one thread of a CPU.

``PYTHONPATH=benchmarks python -m recipes.smollm2.heads --out smollm2-heads`` generates text, trains the paper's configurations
(``table``) and designs of late heads (``designs``), measures them on other prompts, and writes
``benchmarks/results/recipes/exit-heads-PART-smollm2.json`` and the shipped head. Text and states that are in ``--out`` are not
made again.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.smollm2 import prompts
from riskcal import heads as thresholds
from riskcal.internal import replacing
from riskcal_adapters.torch import ExitHead, save_heads, smollm2_parts
from riskcal_adapters.torch.exit_head_checks import backbone_fingerprint
from riskcal_adapters.torch.training import (
    HeadStates,
    Sequences,
    head_answers,
    head_states,
    self_generate,
    train_heads,
)

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "recipes"
WINDOW = 512


class Text(NamedTuple):
    """What is generated: from which prompts, how much, how."""

    prompts: Any
    tokens: int
    temperature: float
    seed: int


TEXTS = {
    "training": Text(prompts.training, 16_000, 1.0, 0),
    "sampled": Text(prompts.held_out, 5_000, 1.0, 1),
    "greedy": Text(prompts.held_out, 4_500, 0.0, 2),
}
HELD_OUT = ("sampled", "greedy")
#: Valade (2024), section 4: heads at these layers, in four configurations, each here with either target.
PAPER_LAYERS = (6, 12, 18, 24)
PAPER = {
    "fresh, .1": {"init": "fresh", "entropy_penalty": 0.1},
    "fresh, .95": {"init": "fresh", "entropy_penalty": 0.95},
    "copied, 0": {"init": "copy", "entropy_penalty": 0.0},
    "copied, .95": {"init": "copy", "entropy_penalty": 0.95},
}
#: The full vocabulary is 28 million weights a head; the tokens that matter on this text are far fewer.
PAPER_VOCABULARY, PAPER_STEPS = 1_024, 150
#: A head after the last layer saves the full head, which costs as much as several layers.
DESIGN_LAYERS = (24, 28, 30)
DESIGNS: dict[str, dict[str, Any]] = {
    "small 512": {"init": "copy", "vocabulary": 512, "steps": 250},
    "small 2,048": {"init": "copy", "vocabulary": 2_048, "steps": 250},
    "small 4,096": {"init": "copy", "vocabulary": 4_096, "steps": 200},
    "small 2,048, rank 128": {"init": "low_rank", "rank": 128, "vocabulary": 2_048, "steps": 250},
    # a square factor turns all states alike, so that rare tokens learn from common ones
    "small 2,048, rank 576": {"init": "low_rank", "rank": 576, "vocabulary": 2_048, "steps": 250},
    "small 2,048, rank 576, hard": {
        "init": "low_rank",
        "rank": 576,
        "vocabulary": 2_048,
        "steps": 250,
        "target": "hard",
    },
    "low rank 64": {"init": "low_rank", "rank": 64, "steps": 50},
}
#: Rows of the final head as they are, after the last layer, where only other tokens can make them wrong.
UNTRAINED = (2_048, 4_096, 8_192, 16_384)
LAYERS = (6, 12, 18, 24, 28, 30)
KEPT = ("final", "said", "log_norm", "mean_probability")
SHIPPED = ("small 2,048, rank 576, hard", (24, 28))
AGREEMENTS = (0.9, 0.95)
SPLITS = 50


def text(
    name: str, out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Sequences:
    """Generated text, kept in a file."""
    path, asked = out / f"{name}.npz", TEXTS[name]
    if not path.exists():
        made = self_generate(
            model,
            asked.prompts(tokenizer),
            tokens=asked.tokens,
            window=WINDOW,
            temperature=asked.temperature,
            seed=asked.seed,
            tokenizer=tokenizer,
        )
        lengths = [len(ids) for ids in made.ids]
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                ids=np.concatenate(made.ids),
                lens=lengths,
                starts=made.starts,
                prompts=made.prompts,
            )
    found = np.load(path)
    ids = np.split(found["ids"], np.cumsum(found["lens"])[:-1])
    return Sequences(tuple(ids), found["starts"], found["prompts"])


def states_of(name: str, out: Path, model: LlamaForCausalLM, made: Sequences) -> HeadStates:
    """States after `LAYERS` over a text, kept in a file."""
    path = out / f"{name}-states.safetensors"
    if not path.exists():
        found = head_states(model, made, LAYERS)
        tensors = {field: getattr(found, field) for field in KEPT}
        tensors |= {f"raw.{layer}": raw for layer, raw in found.raw.items()}
        with replacing(path) as partial:
            save_file(tensors | {"prompts": torch.from_numpy(found.prompts)}, partial)
    tensors = load_file(path)
    raw = {layer: tensors[f"raw.{layer}"] for layer in LAYERS}
    return HeadStates(raw, *(tensors[field] for field in KEPT), tensors["prompts"].numpy())


def quality(head: ExitHead, layer: int, held_out: Mapping[str, HeadStates]) -> dict[str, Any]:
    """Agreement, entropy, and what a threshold by the paper's rule covers on prompts that it was not chosen on."""
    found: dict[str, Any] = {}
    for name, states in held_out.items():
        answers = head_answers(head, states, layer)
        found[name] = {
            "agreement": float(answers.agrees.mean()),
            "entropy": float(answers.entropy.mean()),
            "largest_confidence": float(answers.confidence.max()),
        }
        for wanted in AGREEMENTS:
            splits = [
                _covered(answers.confidence, answers.agrees, states.prompts, wanted, seed)
                for seed in range(SPLITS)
            ]
            coverage, agreed = (np.array(column, float) for column in zip(*splits, strict=True))
            found[name][f"at {wanted:g}"] = {
                "coverage": float(coverage.mean()),
                "agreement_where_covered": float(np.nansum(coverage * agreed) / coverage.sum())
                if coverage.sum()
                else None,
                "splits_below": float(np.mean(agreed < wanted)),
            }
    return found


def _covered(
    confidence: Any, agrees: Any, groups: Any, wanted: float, seed: int
) -> tuple[float, float]:
    """Coverage and agreement on half of the prompts, at the threshold of the other half."""
    there = np.unique(groups)
    chosen = np.random.default_rng(seed).permutation(there)[: len(there) // 2]
    on = np.isin(groups, chosen)
    rule = thresholds.self_supervised(confidence[on, None], agrees[on, None], wanted)
    left = confidence[~on] >= rule[0]
    return float(left.mean()), float(agrees[~on][left].mean()) if left.any() else float("nan")


@torch.no_grad()
def microseconds(head: ExitHead) -> float:
    """Of the processor, for logits and their softmax margin of one state: the median of 50."""
    state = torch.randn(1, head.width)
    times = []
    for _ in range(60):
        begun = time.process_time()
        head.logits(state).softmax(-1).topk(2)
        times.append(time.process_time() - begun)
    return 1e6 * float(np.median(times[10:]))


def trained(
    model: LlamaForCausalLM,
    states: Mapping[str, HeadStates],
    layers: tuple[int, ...],
    **options: Any,
) -> tuple[dict[int, ExitHead], dict[str, Any]]:
    """Heads, and what they are worth."""
    begun = time.process_time()
    heads = train_heads(model, states["training"], layers, **options)
    seconds = time.process_time() - begun
    return heads, {"options": options, "cpu_seconds": seconds, **worth(heads, states)}


def worth(heads: Mapping[int, ExitHead], states: Mapping[str, HeadStates]) -> dict[str, Any]:
    """Size, cost, and quality on prompts that were not trained on."""
    held_out = {name: states[name] for name in HELD_OUT}
    one = next(iter(heads.values()))
    return {
        "parameters": one.parameters,
        "microseconds": microseconds(one),
        "layers": {str(layer): quality(head, layer, held_out) for layer, head in heads.items()},
    }


def table(
    model: LlamaForCausalLM, states: Mapping[str, HeadStates], out: Path
) -> Iterator[tuple[str, Any]]:
    """The paper's configurations, beside the model's own head's rows on the same states."""
    ids = states["training"].mean_probability.argsort(descending=True)[:PAPER_VOCABULARY]
    own = ExitHead.small(model, ids.tolist())
    yield (
        "untrained",
        {
            name: {
                str(layer): float(head_answers(own, states[name], layer).agrees.mean())
                for layer in PAPER_LAYERS
            }
            for name in HELD_OUT
        },
    )
    shared = {"vocabulary": PAPER_VOCABULARY, "steps": PAPER_STEPS}
    for target in ("hard", "soft"):
        for name, configuration in PAPER.items():
            options = {"target": target, **shared, **configuration}
            yield f"{name}, {target}", trained(model, states, PAPER_LAYERS, **options)[1]


def designs(
    model: LlamaForCausalLM, states: Mapping[str, HeadStates], out: Path
) -> Iterator[tuple[str, Any]]:
    """Late heads that cost little; the shipped ones are written beside the text, in half precision."""
    for name, design in DESIGNS.items():
        heads, found = trained(model, states, DESIGN_LAYERS, entropy_penalty=0.0, **design)
        if name == SHIPPED[0]:
            shipped = {layer: heads[layer].to(torch.float16) for layer in SHIPPED[1]}
            save_heads(shipped, out / "shipped")
        yield name, found
    likeliest = states["training"].mean_probability.argsort(descending=True).tolist()
    for size in UNTRAINED:
        own = {LAYERS[-1]: ExitHead.small(model, likeliest[:size])}
        yield f"rows of the final head {size:,}, untrained", worth(own, states)


PARTS = {"table": table, "designs": designs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for text and heads")
    parser.add_argument("--cache", type=Path, help="folder of the dequantised model")
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = smollm2_parts(options.cache)
    texts = {name: text(name, options.out, model, tokenizer) for name in TEXTS}
    states = {name: states_of(name, options.out, model, texts[name]) for name in TEXTS}
    for part in [options.only] if options.only else PARTS:
        found: dict[str, Any] = {
            "conditions": _conditions(model, texts, part),
            "full_head_microseconds": microseconds(ExitHead.copied(model)),
            part: {},
        }
        path = RESULTS / f"exit-heads-{part}-smollm2.json"
        for name, result in PARTS[part](model, states, options.out):
            found[part][name] = result
            with replacing(path) as partial:
                partial.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")
        print(path.relative_to(ROOT), flush=True)


def _conditions(
    model: LlamaForCausalLM, texts: Mapping[str, Sequences], part: str
) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    return {
        "command": f"PYTHONPATH=benchmarks python -m recipes.smollm2.heads --out smollm2-heads --only {part}",
        "commit": commit.strip(),
        "backbone": backbone_fingerprint(model),
        "tokens": {name: made.generated for name, made in texts.items()},
        "prompts": {name: len(set(made.prompts.tolist())) for name, made in texts.items()},
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
