"""What holds, and what pays, on an accelerator: one script for any machine with this repository and PyTorch.

``python benchmarks/accelerator.py --minutes 8`` first checks the decoders on the device: the full policy against Hugging
Face's ``generate``, token for token, in float32 and bfloat16; early exits against the same decoder on the CPU; every batch mode
and self-speculation. Then it measures, on the shipped model and on a T5 of T5-large's shape with random weights: the full
decode, certified exits (there: depths drawn from the exits that the certified policy takes), at batch 1, 16, 64 and 256; and the
JAX decoder, where JAX sees a device. The same for causal models (`accelerator_causal.py`): tokens against ``generate``, the
engine, and a Llama of 1B's shape. Where exits are decided, on the host or on the device (`accelerator_loops.py`), is measured
side by side. Settings take turns within a round; ratios are medians over rounds, in one run.

It prints as it goes, ends within its minutes whatever happens, and writes JSON with the device's name (``--json``). ``--smoke``
runs all of it in small, on the CPU if need be; ``tests/benchmarks`` does. The exit status is 1 if a check failed.
"""

import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration

import command
import riskcal
from riskcal import ExitPolicy
from riskcal_adapters.torch import EarlyExitT5, load_example

LIMIT = 24  # tokens, as the shipped records were made
LARGE = {
    "vocab_size": 32_128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_heads": 16,
    "num_layers": 24,
}
SMALL = {"vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "num_layers": 4}


Prompt = tuple[torch.Tensor, torch.Tensor]


class Report:
    """What was found so far, and how much time is left for more."""

    def __init__(self, seconds: float, path: Path | None) -> None:
        self.started, self.seconds, self.path = time.monotonic(), seconds, path
        self.found: dict[str, Any] = {"checks": [], "timings": [], "left_out": []}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def failed(self) -> list[str]:
        """Checks that did not hold."""
        return [check["check"] for check in self.found["checks"] if not check["holds"]]

    def check(self, name: str, holds: bool, seen: str) -> None:
        """Print and keep a check."""
        self.found["checks"].append({"check": name, "holds": bool(holds), "seen": seen})
        print(
            f"[{time.monotonic() - self.started:5.0f} s] {'holds ' if holds else 'FAILED'} {name}: {seen}",
            flush=True,
        )
        self.write()

    def timing(self, row: dict[str, Any]) -> None:
        """Print and keep a measurement."""
        self.found["timings"].append(row)
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        )
        print(f"[{time.monotonic() - self.started:5.0f} s] {shown}", flush=True)
        self.write()

    def write(self) -> None:
        """Put all that was found into the file, whole."""
        if self.path is not None:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.found, indent=1) + "\n")
            partial.replace(self.path)

    def status(self) -> int:
        """Write, say how many checks held, and give what the command exits with."""
        self.write()
        checks = f"{len(self.found['checks'])} checks, {len(self.failed)} failed: {self.failed}"
        print(checks, flush=True)
        return 1 if self.failed else 0

    @contextmanager
    def part(self, name: str, least: float) -> Iterator[None]:
        """A part that is left out, and named, where fewer than ``least`` seconds remain; what it raises is a failed check."""
        if self.left < least:
            self.found["left_out"].append(name)
            print(f"left out for want of time: {name}", flush=True)
            raise _Skip
        try:
            yield
        except _Skip:
            raise
        except Exception as error:  # one part's failure must not cost the others their time
            traceback.print_exc()
            self.check(name, False, f"{type(error).__name__}: {str(error)[:300]}")


class _Skip(Exception):
    pass


def attempt(report: Report, name: str, least: float, part: Callable[[], None]) -> None:
    try:
        with report.part(name, least):
            part()
    except _Skip:
        pass


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def moved(decoder: EarlyExitT5, device: torch.device, dtype: torch.dtype) -> EarlyExitT5:
    return EarlyExitT5(decoder.model.to(device=device, dtype=dtype), decoder.tokenizer)


def generated(
    model: T5ForConditionalGeneration, input_ids: torch.Tensor, mask: torch.Tensor, limit: int
) -> torch.Tensor:
    """Hugging Face's greedy tokens without the start token."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    options = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": limit,
        "past_key_values": cache,
    }
    return model.generate(input_ids=input_ids, attention_mask=mask, **options)[:, 1:]


def differing(first: torch.Tensor, second: torch.Tensor, pad: int) -> int:
    """Rows whose tokens differ; what is missing of the shorter is padding."""
    width = max(first.shape[1], second.shape[1])
    padded = [
        torch.nn.functional.pad(t.cpu(), (0, width - t.shape[1]), value=pad)
        for t in (first, second)
    ]
    return int((padded[0] != padded[1]).any(1).sum())


def batches(words: list[str], size: int) -> Iterator[list[str]]:
    return (words[i : i + size] for i in range(0, len(words), size))


def check_decoders(
    report: Report, device: torch.device, words: list[str], certified: ExitPolicy
) -> None:
    """The shipped model on the device: tokens, exits, batch modes, speculation."""
    here = moved(load_example("g2p"), torch.device("cpu"), torch.float32)
    pad = here.model.generation_config.pad_token_id
    for dtype in (torch.float32, torch.bfloat16):
        there = moved(load_example("g2p"), device, dtype)
        name = str(dtype).removeprefix("torch.")
        for size in (1, 64):
            some = words[: 16 if size == 1 else len(words)]
            wrong = 0
            for part in batches(some, size):
                prompt = there.encode(part)
                ours = there.generate(*prompt, max_new_tokens=LIMIT).tokens
                wrong += differing(ours, generated(there.model, *prompt, LIMIT), pad)
            # two logits of bfloat16 nearly tie now and then, and sums round with the order of operations
            allowed = 0 if dtype == torch.float32 else math.ceil(0.05 * len(some))
            report.check(
                f"full policy is generate, {name}, batch {size}",
                wrong <= allowed,
                f"{wrong} of {len(some)} rows differ",
            )
    there = moved(load_example("g2p"), device, torch.float32)
    alone = here.generate(*here.encode(words), policy=certified, max_new_tokens=LIMIT)
    for mode in ("diverge", "regroup"):
        policy = ExitPolicy(**(certified.model_dump(exclude={"certificate"}) | {"batching": mode}))
        found = there.generate(*there.encode(words), policy=policy, max_new_tokens=LIMIT)
        wrong = differing(found.exit_layers, alone.exit_layers, 0)
        report.check(
            f"exits are the CPU's, {mode}",
            wrong <= math.ceil(0.01 * len(words)),
            f"{wrong} of {len(words)} rows differ",
        )
    for cache in ("deferred", "recompute", "copy", "first"):
        policy = ExitPolicy(threshold=certified.threshold, measure="softmax", cache=cache)
        some = words[:64]
        found = there.generate(*there.encode(some), policy=policy, max_new_tokens=LIMIT)
        wrong = differing(
            found.tokens,
            here.generate(*here.encode(some), policy=policy, max_new_tokens=LIMIT).tokens,
            pad,
        )
        report.check(
            f"tokens are the CPU's, cache {cache}",
            wrong <= 1,
            f"{wrong} of {len(some)} rows differ",
        )
    some = words[:16]
    drafted = there.speculate(*there.encode(some), draft_layer=2, max_new_tokens=LIMIT).tokens
    full = there.generate(*there.encode(some), max_new_tokens=LIMIT).tokens
    wrong = differing(drafted, full, pad)
    report.check("speculation is the full model", wrong == 0, f"{wrong} of {len(some)} rows differ")
    traces = there.trace(*there.encode(some), max_new_tokens=LIMIT)
    expected = here.trace(*here.encode(some), max_new_tokens=LIMIT)
    gap = float(np.nanmax(np.abs(traces.confidence - expected.confidence)))
    report.check("traces are the CPU's", gap < 1e-3, f"confidences differ by at most {gap:.2g}")


def paired(
    report: Report,
    device: torch.device,
    ways: dict[str, Callable[[], int]],
    seconds: float,
    rounds: int,
) -> dict[str, tuple[list[float], int]]:
    """Seconds of each way in every round, taking turns, and its tokens; the first round warms up and is not kept."""
    names, kept = list(ways), {name: [] for name in ways}
    tokens = dict.fromkeys(ways, 0)
    ends = time.monotonic() + min(seconds, report.left - 5)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize(device)
            started = time.perf_counter()
            tokens[name] = ways[name]()
            synchronize(device)
            if turn:
                kept[name].append(time.perf_counter() - started)
        if time.monotonic() > ends and turn >= 1:
            break
    return {name: (kept[name], tokens[name]) for name in names}


def timed(
    report: Report,
    what: dict[str, Any],
    device: torch.device,
    ways: dict[str, Callable[[], int]],
    seconds: float,
    rounds: int,
) -> None:
    """One row per way: seconds, tokens per second, and its ratio to the full model, round by round."""
    found = paired(report, device, ways, seconds, rounds)
    full = found["full model"][0]
    for name, (times, tokens) in found.items():
        ratios = [a / b for a, b in zip(full, times, strict=True)]
        report.timing(
            what
            | {
                "setting": name,
                "seconds": statistics.median(times),
                "tokens": tokens,
                "x full": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "rounds": len(times),
            }
        )


def emitted(
    decoder: Any, prompt: tuple[torch.Tensor, torch.Tensor], policy: Any, limit: int
) -> int:
    return int(
        (decoder.generate(*prompt, policy=policy, max_new_tokens=limit).exit_layers > 0).sum()
    )


def measure_shipped(
    report: Report,
    device: torch.device,
    words: list[str],
    certified: ExitPolicy,
    sizes: list[int],
    rounds: int,
) -> None:
    """The shipped model, float32: the certified policy beside the full decode and Hugging Face's ``generate``."""
    from accelerator_loops import loops  # which takes how to count tokens from here

    decoder = moved(load_example("g2p"), device, torch.float32)
    grouped = ExitPolicy(
        **(certified.model_dump(exclude={"certificate"}) | {"batching": "regroup"})
    )
    for size in sizes:
        prompt = decoder.encode((words * math.ceil(size / len(words)))[:size])
        ways: dict[str, Callable[[], int]] = {
            "full model": lambda p=prompt: emitted(decoder, p, ExitPolicy.full_model(), LIMIT),
            "generate": lambda p=prompt: generated(decoder.model, *p, LIMIT).numel(),
            "certified": lambda p=prompt: emitted(decoder, p, certified, LIMIT),
            "certified, regrouped": lambda p=prompt: emitted(decoder, p, grouped, LIMIT),
            **loops(decoder, prompt, ExitPolicy.full_model(), LIMIT, "full model"),
            **loops(decoder, prompt, certified, LIMIT, "certified"),
        }
        what = {"model": "g2p, 8 layers of 128, float32", "batch": size}
        timed(report, what, device, ways, seconds=12, rounds=rounds)


def short(device: torch.device) -> torch.dtype:
    """What large models are measured in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_t5(shape: dict[str, int], device: torch.device) -> EarlyExitT5:
    """T5 v1.1 with random weights and an end token that is never the likeliest: a cost, no quality."""
    config = T5Config(
        **shape,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).to(short(device)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, shape["d_model"] ** -0.5)
        model.lm_head.weight[config.eos_token_id] = 0
    return EarlyExitT5(model)


def measure_random(
    report: Report,
    device: torch.device,
    decoder: Any,
    kind: str,
    depths: np.ndarray,
    sizes: list[int],
    rounds: int,
    limit: int,
    others: Callable[[Prompt], dict[str, Callable[[], int]]] = lambda prompt: {},
) -> None:
    """Every row leaves at a depth of its own, drawn from the certified exits and scaled to the decoder's layers.

    ``others`` are further ways to generate as many tokens after a prompt.
    """
    from accelerator_loops import loops

    scaled = np.maximum(1, np.round(depths * decoder.n_layers / 8)).astype(int)
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        ids = torch.randint(3, decoder.model.config.vocab_size, (size, 64), generator=generator)
        prompt = ids.to(device), torch.ones_like(ids).to(device)
        each = [int(d) for d in scaled[:size]] if size > 1 else [round(float(scaled.mean()))]
        static = [ExitPolicy.static(depth, measure="softmax") for depth in each]
        grouped = [ExitPolicy.static(d, measure="softmax", batching="regroup") for d in each]
        ways: dict[str, Callable[[], int]] = {
            "full model": lambda p=prompt: emitted(decoder, p, ExitPolicy.full_model(), limit),
            **others(prompt),
            "forced depths": lambda p=prompt, s=static: emitted(decoder, p, s, limit),
            "forced depths, regrouped": lambda p=prompt, g=grouped: emitted(decoder, p, g, limit),
            **loops(decoder, prompt, static, limit, "forced depths"),
        }
        what = {
            "model": f"random {kind}, {decoder.n_layers} layers of {decoder.model.config.hidden_size}, {decoder.dtype}",
            "batch": size,
            "mean depth": float(np.mean(each)),
        }
        timed(report, what, device, ways, seconds=25, rounds=rounds)


def measure_jax(
    report: Report, words: list[str], certified: ExitPolicy, sizes: list[int], rounds: int
) -> None:
    """The JAX decoder: the same tokens as PyTorch's on the CPU, and its own ratio."""
    # autotuned Triton products gave wrong tokens at batch 256 once on an H200, and take a minute to tune
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    import jax

    from riskcal_adapters.jax import load_example as load_jax

    decoder, reference = load_jax("g2p"), load_example("g2p")
    some = words[: max(sizes)]
    expected = reference.generate(*reference.encode(some), policy=certified, max_new_tokens=LIMIT)
    found = decoder.generate(*decoder.encode(some), policy=certified, max_new_tokens=LIMIT)
    pad = reference.model.generation_config.pad_token_id
    wrong = differing(torch.as_tensor(np.array(found.tokens)), expected.tokens, pad)
    report.check(
        f"JAX on {jax.devices()[0].platform} gives PyTorch's tokens",
        wrong <= 1,
        f"{wrong} of {len(some)} rows differ",
    )
    for size in sizes:
        prompt = decoder.encode((words * math.ceil(size / len(words)))[:size])

        def run(policy: ExitPolicy, prompt: Any = prompt) -> int:
            return int(
                (
                    np.asarray(
                        decoder.generate(*prompt, policy=policy, max_new_tokens=LIMIT).exit_layers
                    )
                    > 0
                ).sum()
            )

        ways = {
            "full model": lambda: run(ExitPolicy.full_model()),
            "certified": lambda: run(certified),
        }
        what = {"model": f"g2p in JAX on {jax.devices()[0].platform}", "batch": size}
        timed(report, what, torch.device("cpu"), ways, seconds=8, rounds=rounds)


def main() -> int:
    """Check, measure, write; 1 if a check failed."""
    parser = command.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="all of it in small, for a machine without an accelerator",
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    report = Report(60 * options.minutes, options.json)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report.found |= {
        "device": name,
        "torch": torch.__version__,
        "riskcal": riskcal.__version__,
        "smoke": options.smoke,
    }
    print(f"{name}, torch {torch.__version__}", flush=True)
    import accelerator_causal as causal  # which takes the report and the clock from here
    import accelerator_loops

    records = riskcal.load_example("g2p")
    certified = riskcal.calibrate(records, delta=0.1).policy()
    words = [str(word) for word in records.prompts[: 32 if options.smoke else 512]]
    sizes, rounds = ([1, 4], 1) if options.smoke else ([1, 16, 64, 256], 5)
    shape, limit = (SMALL, 4) if options.smoke else (LARGE, 32)
    decoder = load_example("g2p")
    exits = decoder.generate(
        *decoder.encode(words[:64]), policy=certified, max_new_tokens=LIMIT
    ).exit_layers
    depths = np.resize(exits[exits > 0].numpy(), 256)
    attempt(report, "checks", 20, lambda: check_decoders(report, device, words, certified))
    attempt(
        report,
        "loops",
        10,
        lambda: accelerator_loops.check_loops(report, device, words, certified),
    )
    attempt(
        report,
        "shipped model",
        20,
        lambda: measure_shipped(report, device, words, certified, sizes, rounds),
    )
    attempt(
        report,
        "T5-large",
        40,
        lambda: measure_random(
            report, device, random_t5(shape, device), "T5", depths, sizes, rounds, limit
        ),
    )
    attempt(report, "causal checks", 20, lambda: causal.check_causal(report, device))
    attempt(
        report,
        "engine",
        20,
        lambda: causal.measure_engine(report, device, words, certified, sizes, rounds),
    )
    llama = causal.LLAMA_SMALL if options.smoke else causal.LLAMA_1B
    attempt(
        report,
        "Llama 1B",
        40,
        lambda: causal.measure_llama(report, device, llama, depths, sizes, rounds, limit),
    )
    attempt(report, "JAX", 40, lambda: measure_jax(report, words, certified, sizes, rounds))
    return report.status()


if __name__ == "__main__":
    raise SystemExit(main())
