"""What `accelerator.py` checks and measures beside T5: causal language models, and the engine."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from accelerator import Prompt, Report, differing, emitted, measure_random, moved, short, timed
from riskcal import ExitPolicy
from riskcal_adapters.torch import EarlyExitCausalLM, Engine, Request, load_example

#: Of Llama 3.2 1B, and in small.
LLAMA_1B = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def random_model(kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """With random weights that say many tokens; the end is never the likeliest."""
    with torch.device(device):
        torch.manual_seed(0)
        model = kind(config).to(dtype).eval()
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight.normal_(0, weight.shape[1] ** -0.5)
        weight[_IDS["eos_token_id"]] = 0
    return model


def check_causal(report: Report, device: torch.device) -> None:
    """Llama's, Qwen3's and GPT-2's way on the device: tokens, batch modes, caches, speculation, the engine."""
    small = {"vocab_size": 512, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
    kinds = {
        "Llama": (LlamaForCausalLM, LlamaConfig(**LLAMA_SMALL, **_IDS)),
        "Qwen3": (Qwen3ForCausalLM, Qwen3Config(**LLAMA_SMALL, **_IDS)),
        "GPT-2": (GPT2LMHeadModel, GPT2Config(**small, **_IDS)),
    }
    ids = torch.randint(3, 512, (16, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(16):
        mask[row, : row % 7] = 0
    ids[mask == 0] = 0
    ids, mask = ids.to(device), mask.to(device)
    for name, (kind, config) in kinds.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(kind, config, device, dtype)
            decoder = EarlyExitCausalLM(model)
            options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 24}
            own = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 24:]
            full = decoder.generate(ids, mask, max_new_tokens=24)
            wrong = differing(full.tokens, own, 0)
            # two logits of bfloat16 nearly tie now and then, and sums round with the order of operations
            allowed = 0 if dtype == torch.float32 else 8
            seen = f"{wrong} of 16 rows differ"
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            report.check(f"full policy is generate, {what}", wrong <= allowed, seen)
        traces = decoder.trace(ids, mask, max_new_tokens=8)
        threshold = float(np.nanquantile(traces.confidence[:, :-1], 0.8))
        decoder = EarlyExitCausalLM(random_model(kind, config, device, torch.float32))
        alone = decoder.generate(
            ids, mask, policy=ExitPolicy(threshold=threshold), max_new_tokens=24
        )
        for fields in ({"batching": "regroup"}, {"cache": "deferred"}):
            policy = ExitPolicy(threshold=threshold, **fields)
            one = decoder.generate(ids[:1], mask[:1], policy=policy, max_new_tokens=24)
            batch = decoder.generate(ids, mask, policy=policy, max_new_tokens=24)
            wrong = differing(batch.exit_layers[:1], one.exit_layers, 0)
            report.check(f"rows as alone, {name}, {fields}", wrong == 0, f"{wrong} of 1 differ")
        drafted = decoder.speculate(ids, mask, draft_layer=2, max_new_tokens=24).tokens
        wrong = differing(drafted, decoder.generate(ids, mask, max_new_tokens=24).tokens, 0)
        report.check(f"speculation is the full model, {name}", wrong <= 1, f"{wrong} of 16 differ")
        engine = Engine(
            decoder, ExitPolicy(threshold=threshold), slots=5, max_prompt=24, max_new_tokens=24
        )
        prompts = [row[real.bool()].cpu().numpy() for row, real in zip(ids, mask, strict=True)]
        done = {int(one.id): one for one in engine.run(Request(input_ids=p) for p in prompts)}
        wrong = sum(
            done[i].exit_layers.tolist() != row[row > 0].tolist()
            for i, row in enumerate(alone.exit_layers.cpu())
        )
        report.check(
            f"the engine's exits are the batch's, {name}", wrong <= 1, f"{wrong} of 16 differ"
        )


def measure_engine(
    report: Report,
    device: torch.device,
    words: list[str],
    certified: ExitPolicy,
    sizes: list[int],
    rounds: int,
) -> None:
    """The shipped model: the engine beside synchronous batches of as many rows, texts in and texts out."""
    decoder = moved(load_example("g2p"), device, torch.float32)
    longest = max(decoder.encode([word])[0].shape[1] for word in words)
    for size in sizes:
        some = (words * math.ceil(4 * size / len(words)))[: max(4 * size, 16)]

        def in_step(policy: ExitPolicy, size: int = size, some: list[str] = some) -> int:
            parts = [some[i : i + size] for i in range(0, len(some), size)]
            return sum(emitted(decoder, decoder.encode(part), policy, 24) for part in parts)

        def by(engine: Engine, some: list[str] = some) -> int:
            return sum(len(done.tokens) for done in engine.run(some))

        engines = {
            name: Engine(decoder, policy, slots=size, max_prompt=longest, max_new_tokens=24)
            for name, policy in (("full", ExitPolicy.full_model()), ("certified", certified))
        }
        ways: dict[str, Callable[[], int]] = {
            "full model": lambda run=in_step: run(ExitPolicy.full_model()),
            "engine, full model": lambda e=engines["full"], run=by: run(e),
            "engine, certified": lambda e=engines["certified"], run=by: run(e),
        }
        what = {"model": "g2p through the engine, float32", "batch": size}
        timed(report, what, device, ways, seconds=15, rounds=rounds)


def measure_llama(
    report: Report,
    device: torch.device,
    shape: dict[str, Any],
    depths: Any,
    sizes: list[int],
    rounds: int,
    limit: int,
) -> None:
    """Random weights of Llama 1B's shape, beside Hugging Face's ``generate``."""
    model = random_model(LlamaForCausalLM, LlamaConfig(**shape, **_IDS), device, short(device))
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": limit}

    def generate(prompt: Prompt) -> int:
        ids, mask = prompt
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
        return int(found[:, ids.shape[1] :].numel())

    measure_random(
        report,
        device,
        EarlyExitCausalLM(model),
        "Llama",
        depths,
        sizes,
        rounds,
        limit,
        others=lambda prompt: {"generate": lambda: generate(prompt)},
    )
