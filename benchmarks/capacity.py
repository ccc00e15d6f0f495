"""What `riskcal.efficiency.capacity` foretells of the shipped model, held against a run.

``python benchmarks/capacity.py`` decodes held-out words with the engine and in regrouped batches, at several numbers of requests
in flight and thresholds. Half of the thresholds say what a call of a layer costs, and each of its rows, and reading a word; from
these three numbers and the exits alone throughput and waiting times of the others are foretold, and of the full model, whose
calls are cheaper, as they look at no confidence. Clocks count the process's CPU seconds, which other work on the machine
disturbs least; settings take turns, and the median of the rounds stands.
"""

import json
import subprocess
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy import optimize
from tqdm.auto import tqdm

import command
from recipes.g2p import data
from riskcal import ExitPolicy, efficiency
from riskcal_adapters.torch import EarlyExitT5, Engine, load_example
from riskcal_adapters.torch.engine import engine as engine_module
from riskcal_adapters.torch.engine import slots as slots_module

LIMIT = 24
#: One group of thresholds says what calls cost, the other is foretold.
FITTED, FORETOLD = (0.3, 0.7, 0.95), (0.45, 0.85, np.inf)


def exits_of(decoder: EarlyExitT5, policy: ExitPolicy, words: list[str]) -> np.ndarray:
    found = np.zeros((len(words), LIMIT), dtype=int)
    for start in range(0, len(words), 64):
        given = decoder.encode(words[start : start + 64])
        exits = decoder.generate(*given, policy=policy, max_new_tokens=LIMIT).exit_layers.numpy()
        found[start : start + len(exits), : exits.shape[1]] = exits
    return found


def in_batches(
    decoder: EarlyExitT5, policy: ExitPolicy, size: int
) -> Callable[[list[str]], list[float]]:
    grouped = policy.model_copy(update={"batching": "regroup"})

    def run(words: list[str]) -> list[float]:
        each = []
        for start in range(0, len(words), size):
            began = time.process_time()
            given = decoder.encode(words[start : start + size])
            decoder.decode(decoder.generate(*given, policy=grouped, max_new_tokens=LIMIT).tokens)
            each += [time.process_time() - began] * min(size, len(words) - start)
        return each

    return run


def by_engine(engine: Engine) -> Callable[[list[str]], list[float]]:
    return lambda words: [done.seconds for done in engine.run(words)]


def counted(exits: np.ndarray, way: str, size: int) -> tuple[float, float, float]:
    """Calls, their rows and requests: what is paid for."""
    if way == "engine":
        work = efficiency.engine_work(exits, size)
        return work.calls, float(work.rows.sum()), len(exits)
    batches = [exits[start : start + size] for start in range(0, len(exits), size)]
    works = [efficiency.batch_work(b[:, : (b > 0).sum(1).max()], way) for b in batches]
    return sum(w.calls for w in works), sum(sum(w.rows) for w in works), len(exits)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--words", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # waiting times on the same clock as all else
    engine_module.time = slots_module.time = SimpleNamespace(monotonic=time.process_time)
    decoder = load_example("g2p")
    words = list(data.splits(data.read_dictionary(data.dictionary_path()))["development"].words)
    words = words[: options.words]
    longest = max(len(decoder.encode([word])[0][0]) for word in words)
    policies = {value: ExitPolicy(threshold=value) for value in (*FITTED, *FORETOLD)}
    exits = {value: exits_of(decoder, policy, words) for value, policy in policies.items()}
    engines, ways = {}, {}
    for size in options.rows:
        for value, policy in policies.items():
            engine = Engine(
                decoder,
                policy,
                slots=size,
                max_prompt=longest,
                max_new_tokens=LIMIT,
                max_wait=600.0,
            )
            engines[size, value] = engine
            ways["engine", size, value] = by_engine(engine)
            if value < np.inf:  # without an exit there is nothing to regroup
                ways["regroup", size, value] = in_batches(decoder, policy, size)
    took: dict[tuple, list[float]] = {key: [] for key in ways}
    late: dict[tuple, list[float]] = {key: [] for key in ways}
    for turn in tqdm(range(options.rounds + 1), desc="rounds"):
        for key, way in ways.items():
            began = time.process_time()
            each = way(words)
            if turn:
                took[key].append(time.process_time() - began)
                late[key].append(float(np.quantile(each, 0.99)))
    rows, costs = [], {}
    for way in ("engine", "regroup"):
        keys = [key for key in ways if key[0] == way and key[2] in FITTED]
        paid = np.array([counted(exits[value], way, size) for _, size, value in keys])
        seconds = np.array([np.median(took[key]) for key in keys])
        # of least relative error
        costs[way], _ = optimize.nnls(paid / seconds[:, None], np.ones(len(keys)))
        call, request = (float(costs[way][0]), float(costs[way][1])), float(costs[way][2])
        for _, size, value in (key for key in ways if key[0] == way):
            foretold = efficiency.capacity(
                exits[value], 8, rows=[size], ways=[way], call=call, request=request
            ).table.iloc[0]
            key = way, size, value
            measured = len(words) / float(np.median(took[key]))
            stats = engines[size, value].stats
            rows.append(
                {
                    "way": way,
                    "rows": size,
                    "threshold": str(value),
                    "fitted": value in FITTED,
                    "layers": float(exits[value].sum() / (exits[value] > 0).sum()),
                    "depth": float(foretold["depth"]),
                    "rows per call, foretold": float(foretold["rows_per_call"]),
                    "rows per call, measured": stats.rows_per_call if way == "engine" else None,
                    "words a second, foretold": float(foretold["requests_per_second"]),
                    "words a second, measured": measured,
                    "ratio": float(foretold["requests_per_second"]) / measured,
                    "p99 ms, foretold": 1e3 * float(foretold["p99"]),
                    "p99 ms, measured": 1e3 * float(np.median(late[key])),
                    "ratio of p99": float(foretold["p99"]) / float(np.median(late[key])),
                }
            )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.3f"))
    told = {}
    exiting, full = ~table["fitted"] & (table["threshold"] != "inf"), table["threshold"] == "inf"
    for name, of in (("thresholds that were not fitted", exiting), ("the full model", full)):
        for ratio in ("ratio", "ratio of p99"):
            found = table[ratio][of]
            told[f"{name}, {ratio}"] = [
                float(found.min()),
                float(found.median()),
                float(found.max()),
            ]
    print({way: found.tolist() for way, found in costs.items()}, told)
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        found = {
            "commit": commit.stdout.strip(),
            "command": "python benchmarks/capacity.py --json benchmarks/results/capacity.json",
            "options": vars(options) | {"json": None},
            "torch": torch.__version__,
            "clock": "CPU seconds of the process, one thread",
            "seconds of a call, of a row, of a word": {w: c.tolist() for w, c in costs.items()},
            "foretold over measured: least, median, most": told,
            "rows": rows,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
