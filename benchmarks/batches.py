"""Batches whose rows exit at different depths: what each mode costs, and whether the cost model of `riskcal.efficiency` knows.

Held-out words are decoded in batches of several sizes and thresholds, with every mode. From the exits that ``"diverge"``
recorded the work of all three modes is predicted; three costs (of calling a layer, of a row in it, of a step) are fitted to
the times of half of the batches and held against the clock on the other half.
"""

import argparse
import json
import math
import time
from functools import partial

import numpy as np
import pandas as pd
import torch

from riskcal import ExitPolicy, efficiency
from riskcal_adapters.g2p import data
from riskcal_adapters.torch import EarlyExitT5, load_example

MODES = ("diverge", "regroup", "deepest")


def seconds(decoder: EarlyExitT5, prompt: tuple[torch.Tensor, ...], policy: ExitPolicy, rounds: int) -> float:
    """Of decoding a batch, its encoding taken off; the quickest of several rounds, which a busy machine disturbs least."""
    tokens, mask = decoder._checked(*prompt)
    ways = (
        partial(decoder._backbone.start, tokens, mask, 24),
        partial(decoder.generate, *prompt, policy=policy, max_new_tokens=24),
    )
    taken = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            moments = [time.perf_counter()]
            for work in ways:
                work()
                moments.append(time.perf_counter())
            taken.append(np.diff(moments))
    encoding, whole = np.min(taken[1:], axis=0)
    return float(whole - encoding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.45, 0.85])
    parser.add_argument("--batches", type=int, default=6, help="batches of each size; half of them are fitted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(vars(options) | {"torch": torch.__version__}))

    decoder = load_example("g2p")
    words = data.splits(data.read_dictionary(data.dictionary_path()))["development"].words
    rows = []
    for size in options.sizes:
        for number in range(options.batches):
            prompt = decoder.encode(words[number * size : (number + 1) * size])
            for threshold in [math.inf, *options.thresholds]:
                plain = ExitPolicy(threshold=threshold)
                exits = decoder.generate(*prompt, policy=plain, max_new_tokens=24).exit_layers.numpy()
                for mode in MODES:
                    policy = plain.model_copy(update={"batching": mode})
                    work = efficiency.batch_work(exits, mode)
                    took = seconds(decoder, prompt, policy, options.rounds)
                    rows.append((size, number, threshold, mode, work, took))
    table = pd.DataFrame(rows, columns=["batch", "number", "threshold", "mode", "work", "seconds"])
    fitted = {
        mode: efficiency.fit_batch_costs(half["work"].tolist(), half["seconds"])
        for mode, half in table[table["number"] % 2 == 0].groupby("mode")
    }
    for mode, costs in fitted.items():
        print(
            f"{mode}: {1e6 * costs.call:.0f} us a layer, {1e6 * costs.row:.2f} us a row in it, {1e6 * costs.step:.0f} us a step"
        )
    held_out = table[table["number"] % 2 == 1].copy()
    held_out["predicted"] = [
        fitted[mode].seconds(work) for mode, work in zip(held_out["mode"], held_out["work"], strict=True)
    ]
    held_out["off"] = (held_out["predicted"] / held_out["seconds"] - 1).abs()
    means = held_out.groupby(["batch", "threshold", "mode"])[["seconds", "predicted", "off"]].mean().reset_index()
    plain_times = means[means["mode"] == "diverge"].set_index(["batch", "threshold"])["seconds"]
    full = means[(means["mode"] == "diverge") & np.isinf(means["threshold"])].set_index("batch")["seconds"]
    means["x diverge"] = (
        plain_times.loc[list(zip(means["batch"], means["threshold"], strict=True))].to_numpy() / means["seconds"]
    )
    means["x full"] = full.loc[means["batch"]].to_numpy() / means["seconds"]
    means[["seconds", "predicted"]] *= 1000
    means["off"] *= 100
    renamed = means.rename(columns={"seconds": "ms", "predicted": "predicted ms", "off": "off by %"})
    print("\nBatches that were not fitted, encoding not counted:")
    print(renamed.to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
