"""Depth-wise continuous batching against synchronous batches, at the same number of requests in flight.

``python benchmarks/engine.py`` decodes the same held-out prompts, text in and text out, by our full decode in synchronous
batches, by the same batches with early exits (regrouped), and by the engine, at several numbers of requests in flight. The
settings take turns, so that a machine's drift meets them all alike; ratios are medians over rounds of the same prompts, of
the process's CPU seconds, which other work on the machine disturbs least (one thread: on an idle machine those of a clock). The
policies are the one that the shipped records certify at delta .1, and one at threshold .85. Tokens and exits of all prompts
are compared with those of batches of one. "x best full" is against the faster of batches and the engine with the full policy.

With ``--soak 5000`` two threads ask, cancel, and ask for what cannot be served, and each request's answer is counted.
With ``--rates`` requests arrive at random at given rates instead, and throughput and latencies are told for both policies;
``--picture`` draws them from results that are there, and measures nothing.
"""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

import command
import riskcal
from recipes.g2p import data as g2p
from recipes.numbers import data as numbers
from riskcal import ExitPolicy
from riskcal_adapters.torch import Done, EarlyExitT5, Engine, Request, load_example

ROOT = Path(__file__).resolve().parents[1]


def prompts(model: str, count: int) -> list[str]:
    """Held-out ones."""
    if model == "g2p":
        return list(
            g2p.splits(g2p.read_dictionary(g2p.dictionary_path()))["development"].words[:count]
        )
    return list(numbers.draw("development", count).prompts)


def in_batches(
    decoder: EarlyExitT5, policy: ExitPolicy, size: int, limit: int
) -> Callable[[list[str]], int]:
    """Synchronous batches; gives the tokens generated."""

    def run(texts: list[str]) -> int:
        count = 0
        for start in range(0, len(texts), size):
            given = decoder.encode(texts[start : start + size])
            generation = decoder.generate(*given, policy=policy, max_new_tokens=limit)
            decoder.decode(generation.tokens)
            count += int((generation.exit_layers > 0).sum())
        return count

    return run


def by_engine(engine: Engine) -> Callable[[list[str]], int]:
    return lambda texts: sum(len(done.tokens) for done in engine.run(texts))


def policies(model: str) -> dict[str, ExitPolicy]:
    """The certified one, of the model whose records ship, and thresholds that save less."""
    named = {f"threshold {value}": ExitPolicy(threshold=value) for value in (0.85, 0.9)}
    if model != "g2p":
        return named
    certified = riskcal.calibrate(riskcal.load_example(model), delta=0.1)
    plain = ExitPolicy(threshold=certified.threshold)
    return {f"delta .1 ({certified.threshold:g})": plain, "threshold .85": named["threshold 0.85"]}


def same_as_alone(
    decoder: EarlyExitT5, policy: ExitPolicy, engine: Engine, texts: list[str], limit: int
) -> int:
    """Prompts whose tokens or exits differ from those of batches of one."""
    done = {int(one.id): one for one in engine.run(texts)}
    first = min(done)
    wrong = 0
    for i, text in enumerate(tqdm(texts, desc="one by one", leave=False)):
        alone = decoder.generate(*decoder.encode([text]), policy=policy, max_new_tokens=limit)
        one = done[first + i]
        wrong += (
            one.tokens.tolist() != alone.tokens[0].tolist()
            or one.exit_layers.tolist() != alone.exit_layers[0].tolist()
        )
    return wrong


def arrivals(engine: Engine, texts: list[str], rate: float, seed: int) -> dict[str, float]:
    """Requests that arrive at random, so many a second on average."""
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, len(texts)))
    began = time.monotonic()
    futures = []
    for text, moment in zip(texts, due, strict=True):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        futures.append(engine.submit(text))
    seconds = [future.result().seconds for future in futures]
    took = time.monotonic() - began
    return {
        "rate": rate,
        "throughput": len(texts) / took,
        "p50": float(np.quantile(seconds, 0.5)),
        "p99": float(np.quantile(seconds, 0.99)),
    }


def soak(engine: Engine, texts: list[str], count: int) -> dict[str, int]:
    """Two threads ask for ``count`` requests; some are cancelled, some cannot be served, some run out of time."""
    answers: list[dict[int, Future[Done]]] = [{}, {}]

    def ask(thread: int) -> None:
        rng = random.Random(thread)
        for i in range(thread, count, 2):
            kind, text = rng.random(), texts[i % len(texts)]
            if kind < 0.03:
                request = Request("x" * 1000)
            elif kind < 0.06:
                request = Request(None)
            elif kind < 0.09:
                request = Request(text, timeout=0.0)
            else:
                request = Request(text)
            answers[thread][i] = engine.submit(request)
            if kind > 0.95:
                answers[thread][i].cancel()
            while i - sum(one.done() for one in answers[thread].values()) * 2 > 2000:
                time.sleep(0.01)

    before = resident()
    threads = [threading.Thread(target=ask, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    futures = [one for answer in answers for one in answer.values()]
    found = {"asked": len(futures), "answered": sum(one.done() for one in futures)}
    found["cancelled"] = sum(one.cancelled() for one in futures)
    done = [one.result() for one in futures if not one.cancelled()]
    found["with an error"] = sum(one.error is not None for one in done)
    found["with a text"] = sum(one.text is not None for one in done)
    found["ids twice"] = len(done) - len({one.id for one in done})
    found["bytes more than before"] = resident() - before
    return found


def picture(arrived: list[dict[str, Any]], out: Path) -> None:
    """Requests answered a second, and how long 99 of 100 waited at most, against how many came."""
    mpl.rcParams["svg.hashsalt"] = "riskcal"  # the same figure is the same file
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    answered, late = figure.subplots(1, 2)
    table = pd.DataFrame(arrived)
    for marker, (policy, own) in zip("so^", table.groupby("policy", sort=False), strict=False):
        own = own.sort_values("rate")
        answered.plot(own["rate"], own["throughput"], marker=marker, label=policy)
        late.plot(own["rate"], 1e3 * own["p99"], marker=marker, label=policy)
    most = table["rate"].max()
    answered.plot([0, most], [0, most], color="0.8", zorder=0)
    answered.set_ylabel("requests answered a second")
    late.set_ylabel("99 of 100 within, ms")
    late.set_yscale("log")
    for axes in (answered, late):
        axes.set_xlabel("requests a second")
    answered.legend(frameon=False)
    partial = out.with_name(f".{out.name}.partial")
    figure.savefig(partial, format="svg", metadata={"Date": None})
    partial.replace(out)


def resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--model", choices=["g2p", "numbers"], default="g2p")
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compare", type=int, default=2000, help="prompts compared with one by one"
    )
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument(
        "--soak", type=int, default=0, help="requests from two threads, some cancelled"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--picture", type=Path, help="results to draw into docs/images/engine-arrivals.svg"
    )
    options = parser.parse_args()
    if options.picture:
        told = json.loads(options.picture.read_text())
        picture(told["arrivals"], ROOT / "docs" / "images" / "engine-arrivals.svg")
        return
    torch.set_num_threads(options.threads)
    limit = 24 if options.model == "g2p" else 96
    decoder, texts = load_example(options.model), prompts(options.model, options.prompts)
    longest = max(len(decoder.encode([text])[0][0]) for text in texts)
    named = policies(options.model)
    rows = []
    for size in options.slots:
        engines = {
            name: Engine(decoder, policy, slots=size, max_prompt=longest, max_new_tokens=limit)
            for name, policy in {"full": ExitPolicy.full_model(), **named}.items()
        }
        ways = {("full", "batches"): in_batches(decoder, ExitPolicy.full_model(), size, limit)}
        for name, policy in named.items():
            grouped = policy.model_copy(update={"batching": "regroup"})
            ways[name, "regrouped"] = in_batches(decoder, grouped, size, limit)
        ways |= {(name, "engine"): by_engine(engine) for name, engine in engines.items()}
        for way in ways.values():
            way(texts[: 2 * size])
        taken: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
        for _ in tqdm(range(options.rounds), desc=f"{size} in flight"):
            for key, way in ways.items():
                began = time.process_time()
                way(texts)
                taken[key].append(time.process_time() - began)
        full = np.array(taken["full", "batches"])
        best = np.minimum(full, taken["full", "engine"])
        for (policy_name, way), seconds in taken.items():
            ratio = full / np.array(seconds)
            stats = engines[policy_name].stats if way == "engine" else None
            rows.append(
                {
                    "in flight": size,
                    "policy": policy_name,
                    "way": way,
                    "ms a prompt": 1e3 * float(np.median(seconds)) / len(texts),
                    "x full batches": float(np.median(ratio)),
                    "least": float(ratio.min()),
                    "most": float(ratio.max()),
                    "x best full": float(np.median(best / np.array(seconds))),
                    "rows a call": stats.rows_per_call if stats else None,
                }
            )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.2f"))
    known = vars(options) | {"json": None, "picture": None}
    told = {"options": known, "torch": torch.__version__, "rows": rows}

    if options.compare:
        many = prompts(options.model, options.compare)
        width = max(len(decoder.encode([text])[0][0]) for text in many)
        told["differ"] = {}
        for name, policy in named.items():
            engine = Engine(decoder, policy, slots=64, max_prompt=width, max_new_tokens=limit)
            told["differ"][name] = same_as_alone(decoder, policy, engine, many, limit)
        print(f"Of {len(many)} prompts differ from batches of one:", told["differ"])

    if options.soak:
        engine = Engine(
            decoder, next(iter(named.values())), slots=64, max_prompt=longest, max_new_tokens=limit
        )
        told["soak"] = soak(engine, texts, options.soak)
        print("Soak:", told["soak"])

    for name, policy in {"full": ExitPolicy.full_model(), **named}.items():
        for rate in options.rates:
            with Engine(
                decoder, policy, slots=64, max_prompt=longest, max_new_tokens=limit
            ) as engine:
                found = {"policy": name, **arrivals(engine, texts, rate, seed=0)}
            print(found)
            told.setdefault("arrivals", []).append(found)
    command.keep(told, options.json)


if __name__ == "__main__":
    main()
