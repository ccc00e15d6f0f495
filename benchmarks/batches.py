"""Batches whose rows exit at different depths: what each mode costs, and whether the cost model of `timing.py` knows.

Held-out words are decoded in batches of several sizes and thresholds, with every mode. From the exits that ``"diverge"``
recorded the work of all three modes is predicted; the costs of a step and of calling a layer on so many rows are fitted to
the times of half of the batches, mode by mode, and held against the clock on the other half.
"""

import json
import math
import time

import numpy as np
import pandas as pd
import torch
from tqdm.auto import trange

import command
from recipes.g2p import data
from riskcal import ExitPolicy, efficiency
from riskcal_adapters.torch import EarlyExitT5, load_example
from timing import fit_batch_costs

MODES = ("diverge", "regroup", "deepest")


def timed(decoder: EarlyExitT5, prompt: tuple[torch.Tensor, ...], policy: ExitPolicy) -> float:
    """Seconds of decoding a batch, its encoding taken off."""
    tokens, mask = decoder.checked(*prompt)
    moments = [time.perf_counter()]
    with torch.inference_mode():
        decoder._backbone.start(tokens, mask, 24)
    moments.append(time.perf_counter())
    decoder.generate(*prompt, policy=policy, max_new_tokens=24)
    encoding, whole = np.diff([*moments, time.perf_counter()])
    return float(whole - encoding)


def main() -> None:
    parser = command.parser(__doc__, figures=False)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.45, 0.85])
    parser.add_argument(
        "--batches", type=int, default=6, help="batches of each size; half of them are fitted"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(vars(options) | {"torch": torch.__version__}))

    decoder = load_example("g2p")
    words = data.splits(data.read_dictionary(data.dictionary_path()))["development"].words
    rows, jobs = [], []
    for size in options.sizes:
        for number in range(options.batches):
            prompt = decoder.encode(words[number * size : (number + 1) * size])
            for threshold in [math.inf, *options.thresholds]:
                plain = ExitPolicy(threshold=threshold)
                exits = decoder.generate(
                    *prompt, policy=plain, max_new_tokens=24
                ).exit_layers.numpy()
                for mode in MODES:
                    policy = plain.model_copy(update={"batching": mode})
                    work = efficiency.batch_work(exits, mode)
                    rows.append((size, number, threshold, mode, work))
                    jobs.append((prompt, policy))
    table = pd.DataFrame(rows, columns=["batch", "number", "threshold", "mode", "work"])
    # all batches take turns, so that none is measured in a slow minute only; the quickest round is disturbed least
    rounds = [
        [timed(decoder, *job) for job in jobs] for _ in trange(options.rounds + 1, desc="rounds")
    ]
    table["seconds"] = np.min(rounds[1:], axis=0)
    exiting = table[np.isfinite(table["threshold"])]
    fitted = {
        mode: fit_batch_costs(half["work"].tolist(), half["seconds"])
        for mode, half in exiting[exiting["number"] % 2 == 0].groupby("mode")
    }
    for mode, costs in fitted.items():
        calls = ", ".join(
            f"{1e6 * call:.0f} ({size})" for size, call in zip(costs.sizes, costs.call, strict=True)
        )
        print(f"{mode}: {1e6 * costs.step:.0f} us a step; a call of a layer, by rows: {calls}")
    held_out = table[table["number"] % 2 == 1].copy()
    # the full model looks at no confidence, so that it has no costs of its own here
    held_out["predicted"] = [
        fitted[mode].seconds(work) if math.isfinite(threshold) else math.nan
        for mode, work, threshold in zip(
            held_out["mode"], held_out["work"], held_out["threshold"], strict=True
        )
    ]
    held_out["off"] = (held_out["predicted"] / held_out["seconds"] - 1).abs()
    means = (
        held_out.groupby(["batch", "threshold", "mode"])[["seconds", "predicted", "off"]]
        .mean()
        .reset_index()
    )
    plain_times = means[means["mode"] == "diverge"].set_index(["batch", "threshold"])["seconds"]
    full = means[(means["mode"] == "diverge") & np.isinf(means["threshold"])].set_index("batch")[
        "seconds"
    ]
    means["x diverge"] = (
        plain_times.loc[list(zip(means["batch"], means["threshold"], strict=True))].to_numpy()
        / means["seconds"]
    )
    means["x full"] = full.loc[means["batch"]].to_numpy() / means["seconds"]
    means[["seconds", "predicted"]] *= 1000
    means["off"] *= 100
    renamed = means.rename(
        columns={"seconds": "ms", "predicted": "predicted ms", "off": "off by %"}
    )
    again = table[np.isinf(table["threshold"])].groupby(["batch", "number"])["seconds"]
    spread = again.max() / again.min() - 1  # the full model is the same work in every mode
    print(
        f"\nThe same work timed three times differs by {100 * spread.median():.0f}% (median of batches)."
    )
    print("Off by, %:", (100 * held_out["off"]).quantile([0.5, 0.9, 1.0]).round(1).to_dict())
    print("\nBatches that were not fitted, encoding not counted:")
    print(renamed.to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
