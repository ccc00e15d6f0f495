"""What a learned risk is worth: one number for all layers against one threshold for all layers, on real generations.

``python benchmarks/learned.py`` learns the risk of each exit of the shipped spelling model on a share of the words of the shipped
traces, generates the other held-out words with the policies of a grid of ``max_risk``, and certifies them as any candidates; the
single thresholds are certified on the shipped generations of the very same words. Layers per token are those of these words.
"""

import json
import subprocess

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import command
import riskcal
from riskcal.heads import learn_risk
from riskcal_adapters.texts import token_distance
from riskcal_adapters.torch import EarlyExitT5, load_example

GRID = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4)
LIMIT = 24


def generated(
    decoder: EarlyExitT5, policy: riskcal.ExitPolicy, words: list[str]
) -> list[tuple[str, float]]:
    """Text and mean layer of each word, whose rows are as if alone."""
    found = []
    for start in range(0, len(words), 64):
        given = decoder.encode(words[start : start + 64])
        done = decoder.generate(*given, policy=policy, max_new_tokens=LIMIT)
        exits = done.exit_layers.numpy()
        layers = exits.sum(1) / (exits > 0).sum(1)
        found += list(zip(decoder.decode(done.tokens), layers.tolist(), strict=True))
    return found


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--deltas", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--fit-fraction", type=float, default=0.3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    risk = learn_risk(
        riskcal.load_example("g2p-traces"), fit_fraction=options.fit_fraction, measure="softmax"
    )
    shipped = riskcal.load_example("g2p")
    kept = shipped.take(np.flatnonzero(~risk.fitted_on(shipped.prompts)))
    words = kept.prompts.tolist()
    decoder = load_example("g2p")
    full = generated(decoder, riskcal.ExitPolicy.full_model(), words)
    rows = [
        {"prompt": word, "threshold": "full", "dissimilarity": 0.0, "layers": layers}
        for word, (_, layers) in zip(words, full, strict=True)
    ]
    for max_risk in tqdm(GRID, desc="max_risk"):
        policy = risk.policy(max_risk, max_new_tokens=LIMIT)
        for word, (text, layers), (reference, _) in zip(
            words, generated(decoder, policy, words), full, strict=True
        ):
            loss = token_distance(text, reference)
            rows.append(
                {"prompt": word, **policy.to_columns(), "dissimilarity": loss, "layers": layers}
            )
    learned = riskcal.Runs.from_frame(pd.DataFrame(rows))
    told = []
    for delta in options.deltas:
        one, many = riskcal.calibrate(kept, delta=delta), riskcal.calibrate(learned, delta=delta)
        told.append(
            {
                "delta": delta,
                "threshold": one.threshold,
                "layers of one threshold": float(one.chosen["layers"]),
                "loss of one threshold": float(one.chosen["loss"]),
                "max_risk": many.policy().learned.max_risk,
                "layers of a learned risk": float(many.chosen["layers"]),
                "loss of a learned risk": float(many.chosen["loss"]),
            }
        )
    print(pd.DataFrame(told).to_string(index=False, float_format="%.4g"))
    by_risk = pd.DataFrame(
        {
            "max_risk": GRID[: learned.k],
            "loss": learned.losses().mean(0),
            "layers": learned.values["layers"].mean(0),
        }
    )
    single = pd.DataFrame(
        {
            "threshold": kept.thresholds,
            "loss": kept.losses().mean(0),
            "layers": kept.values["layers"].mean(0),
        }
    )
    print(by_risk.to_string(index=False), single.to_string(index=False), sep="\n")
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        found = {
            "commit": commit.stdout.strip(),
            "command": "python benchmarks/learned.py --json benchmarks/results/learned.json",
            "options": vars(options) | {"json": None},
            "words": len(words),
            "fitted on": {"prompts": risk.fit_n, "tokens": risk.fit_tokens},
            "certified": told,
            "learned": by_risk.to_dict("records"),
            "single": single.to_dict("records"),
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
