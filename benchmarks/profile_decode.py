"""Where the time of decoding goes, by layer call: products, attention, norms, the head, bookkeeping, and Python around them.

``python benchmarks/profile_decode.py`` decodes held-out words of the spelling model one by one, in batches of 16, and by the
engine at 64 and 256 in flight, with the full model and the policy that the shipped records certify at delta .1. Whatever
multiplies, attends, norms, scores or keeps books is timed by the process's own seconds, what it calls counted apart; a layer
that is one compiled loop is timed as a whole, and so is the generation of one row. What is left is Python. A timer's own cost,
measured first, is taken off.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch

import command
import engine as by_engine
import riskcal
from riskcal import ExitPolicy
from riskcal_adapters.torch import (
    Engine,
    backbone,
    caches,
    exits,
    kernels,
    load_example,
    t5_backbone,
    t5_kernels,
)
from riskcal_adapters.torch.confidence import Judge
from riskcal_adapters.torch.engine import bookkeeping
from riskcal_adapters.torch.engine import engine as served

PARTS = ("layers", "products", "attention", "norms", "head", "books", "prompts", "texts", "python")


class Timers:
    """Seconds by part, each without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inside: list[float] = []

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*given: Any, **named: Any) -> Any:
            self._inside.append(0.0)
            began = time.process_time()
            try:
                return function(*given, **named)
            finally:
                took = time.process_time() - began
                self.seconds[part] += took - self._inside.pop()
                self.calls[part] += 1
                if self._inside:
                    self._inside[-1] += took

        return timed

    def patch(self, holder: Any, name: str, part: str) -> None:
        """Time what ``holder`` knows by this name."""
        setattr(holder, name, self.of(part, getattr(holder, name)))

    def clear(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.calls.clear()


def timer_cost(count: int = 20_000) -> tuple[float, float]:
    """Seconds that a timer adds to its part, and to what is around it."""
    timers = Timers()
    nothing = timers.of("nothing", lambda: None)
    began = time.process_time()
    for _ in range(count):
        nothing()
    whole = (time.process_time() - began) / count
    inside = timers.seconds["nothing"] / count
    return inside, whole - inside


def patch(timers: Timers) -> None:
    """Time the parts of decoding, for the rest of the process."""
    timers.patch(torch, "mm", "products")
    timers.patch(torch, "addmm", "products")
    for module in (backbone, caches, t5_backbone):
        timers.patch(module, "scaled_dot_product_attention", "attention")
    for name, part in (
        ("attend", "attention"),
        ("rms_norm", "norms"),
        ("gated_gelu", "norms"),
        *(
            (name, "books")
            for name in ("catch_up", "entering", "place", "put", "copy", "of", "ranges")
        ),
    ):
        timers.patch(kernels, name, part)
    # what other compiled loops call cannot be replaced
    for module, name in ((bookkeeping, "next_rows"), (exits, "asking"), (bookkeeping, "leave")):
        timers.patch(module, name, "books")
    for name in ("recall", "decoder_layer", "layer_and_surest", "encode", "generate"):
        timers.patch(t5_kernels, name, "layers")
    timers.patch(Judge, "look", "head")
    for name in ("start", "admit", "_encode"):
        timers.patch(t5_backbone.T5Backbone, name, "prompts")
    timers.patch(served, "ids_together", "texts")
    timers.patch(served, "texts_of", "texts")


def main() -> None:
    """Profile, print, write."""
    parser = command.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    decoder, texts = load_example("g2p"), by_engine.prompts("g2p", options.prompts)
    longest = max(map(len, decoder.ids(texts)))
    certified = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1).threshold
    policies = {"full": ExitPolicy.full_model(), "delta .1": ExitPolicy(threshold=certified)}
    ways: dict[tuple[str, str], tuple[Callable[[list[str]], int], list[str]]] = {}
    for name, policy in policies.items():
        some = texts[: max(1, options.prompts // 8)]
        ways["batch 1", name] = by_engine.in_batches(decoder, policy, 1, 24), some
        ways["batch 16", name] = by_engine.in_batches(decoder, policy, 16, 24), texts
        for slots in (64, 256):
            made = Engine(decoder, policy, slots=slots, max_prompt=longest, max_new_tokens=24)
            ways[f"engine {slots}", name] = by_engine.by_engine(made), texts

    timers = Timers()
    layers = 0

    def counted(run: Callable[..., Any], count: Callable[[Any], int]) -> Callable[..., Any]:
        def counting(*given: Any) -> Any:
            nonlocal layers
            found = run(*given)
            layers += count(found)
            return found

        return counting

    told_by: tuple[tuple[Any, str, Callable[[Any], int]], ...] = (
        (t5_backbone.T5Backbone, "layer_of_rows", lambda _: 1),
        (t5_backbone.T5Backbone, "layer_and_surest", lambda _: 1),
        (t5_kernels, "generate", lambda found: int(found[0][1].sum())),
    )
    for holder, name, count in told_by:
        setattr(holder, name, counted(getattr(holder, name), count))
    patch(timers)
    inside, around = timer_cost()
    rows = []
    for (way, policy_name), (run, given) in ways.items():
        run(given[:64])
        timers.clear()
        layers = 0
        began = time.process_time()
        for _ in range(options.rounds):
            run(given)
        whole = time.process_time() - began
        counts = sum(timers.calls.values())
        seconds = {part: timers.seconds[part] - inside * timers.calls[part] for part in PARTS[:-1]}
        whole -= (inside + around) * counts
        seconds["python"] = whole - sum(seconds.values())
        row = {
            "way": way,
            "policy": policy_name,
            "us a prompt": 1e6 * whole / options.rounds / len(given),
        }
        row["layer calls a prompt"] = layers / options.rounds / len(given)
        row["us a layer call"] = 1e6 * whole / layers
        rows.append(row | {f"{part} %": 100 * seconds[part] / whole for part in PARTS})
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.1f"))
    if options.json:
        told = {"options": vars(options) | {"json": None}, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
