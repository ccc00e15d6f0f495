"""Where the final token ranks at each layer, and how confidence follows accuracy (the second document's Figs. 1 to 3).

``PYTHONPATH=benchmarks python benchmarks/studies/ranks.py [--model g2p|numbers] [--checkpoint FOLDER]
[--also "TRAINING=FOLDER" ...]``


Along each full model's own outputs; ``--also`` adds models that were trained otherwise. Each is also recorded, to see whether
`record` warns of exits at chance level.
"""

import tempfile
import warnings
from pathlib import Path

import common
import figures
import numpy as np
import torch

from riskcal import ExitPolicy
from riskcal_adapters import record
from riskcal_adapters.torch.training import teacher_forced

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = np.linspace(0, 1, 11)


@torch.inference_mode()
def of_model(decoder, task: common.Task) -> dict:
    """Ranks, agreement and confidence by layer, and what a static exit there would cost."""
    encoded = decoder.encode(task.prompts)
    tokens = decoder.generate(*encoded, max_new_tokens=task.max_new_tokens).tokens
    start = torch.full((len(tokens), 1), decoder.model.config.decoder_start_token_id)
    logits = teacher_forced(decoder.model, *encoded, torch.cat([start, tokens[:, :-1]], 1))
    real = tokens != 0
    full = common.decode(decoder, task, ExitPolicy())
    layers = []
    for number, of_layer in enumerate(logits[:, real], 1):
        final = of_layer.gather(-1, tokens[real][:, None])
        rank = 1 + (of_layer > final).sum(-1).numpy()
        top = torch.softmax(of_layer, -1).topk(2).values
        margin = (top[:, 0] - top[:, 1]).numpy()
        agrees = rank == 1
        bins = np.minimum((margin * 10).astype(int), 9)
        counts = np.bincount(bins, minlength=10)
        static = common.decode(decoder, task, ExitPolicy.static(number))
        layers.append(
            {
                "layer": number,
                "rank": np.quantile(rank, QUANTILES),
                "mean_rank": rank.mean(),
                "agreement": agrees.mean(),
                "margin": margin.mean(),
                "bin_counts": counts,
                "bin_margin": np.bincount(bins, margin, 10) / counts.clip(1),
                "bin_agreement": np.bincount(bins, agrees, 10) / counts.clip(1),
                "static_accuracy": 1 - common.quality(task, static, full)["risk"],
            }
        )
    warns = {
        str(grid): warnings_of_recording(decoder, task, grid) for grid in ((0.5, 0.7, 0.9), (0.05,))
    }
    return {"tokens": int(real.sum()), "layers": layers, "record_warns": warns}


def warnings_of_recording(decoder, task: common.Task, thresholds: tuple[float, ...]) -> list[str]:
    """What `record` says of a model on the same prompts."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        record(
            task.prompts,
            lambda: decoder,
            thresholds,
            Path(folder) / "runs",
            max_new_tokens=task.max_new_tokens,
            dissimilarity=task.distance,
            progress=False,
        )
    return [str(one.message) for one in caught]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--also", action="append", default=[], metavar="TRAINING=FOLDER")
    parser.add_argument("--training", default="exit-aware", help="how the first model was trained")
    options = parser.parse_args()
    options.words = options.words or (200 if options.model == "g2p" else 100)
    task, decoder = common.load(options)
    models = {options.training: of_model(decoder, task)}
    for given in options.also:
        name, _, folder = given.partition("=")
        models[name] = of_model(common.decoder_of(Path(folder)), task)
    found = {
        "quantiles": QUANTILES,
        "vocabulary": decoder.model.config.vocab_size,
        "models": models,
    }
    figures.save(common.save("ranks", options, decoder, task, found))


if __name__ == "__main__":
    main()
