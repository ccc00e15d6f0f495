"""How well exit classifiers find the layers at which not to exit: independent, balanced and geometric training (CALM, Table D.1).

``PYTHONPATH=benchmarks python benchmarks/studies/classifiers.py --classifiers FOLDER``,
a folder where ``PYTHONPATH=benchmarks python -m recipes.g2p.classifiers``
left the three.
"""

from pathlib import Path

import common
import figures
import torch
from safetensors.torch import load_file

from recipes.g2p import data
from recipes.g2p.classifiers import OBJECTIVES, f1_by_layer
from recipes.g2p.train import pairs
from riskcal import ExitPolicy
from riskcal_adapters.torch.training import ExitClassifier

F1_WORDS = 1500


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--classifiers", type=Path, required=True)
    options = parser.parse_args()
    options.words = options.words or 500
    task, decoder = common.load(options)
    classifiers = {}
    for objective in OBJECTIVES:
        weights = load_file(options.classifiers / f"classifier-{objective}.safetensors")
        classifiers[objective] = ExitClassifier(decoder.model.config.d_model)
        classifiers[objective].load_state_dict(
            {name: torch.as_tensor(value) for name, value in weights.items()}
        )
    words = data.splits(data.read_dictionary(data.dictionary_path()))["development"]
    table = f1_by_layer(decoder.model, classifiers, pairs(words)[:F1_WORDS])
    full = common.decode(decoder, task, ExitPolicy())
    curves = []
    for objective, classifier in classifiers.items():
        decoder = type(decoder)(decoder.model, decoder.tokenizer, classifier=classifier)
        for threshold in common.thresholds(decoder, task, "classifier", 8):
            decoded = common.decode(
                decoder, task, ExitPolicy(measure="classifier", threshold=threshold)
            )
            curves.append(
                {
                    "objective": objective,
                    "threshold": threshold,
                    **common.quality(task, decoded, full),
                }
            )
    static = [
        {
            "layer": k,
            **common.quality(task, common.decode(decoder, task, ExitPolicy.static(k)), full),
        }
        for k in range(1, decoder.n_layers + 1)
    ]
    found = {
        "words": F1_WORDS,
        "f1": table.reset_index().to_dict("records"),
        "curves": curves,
        "static": static,
    }
    figures.save(common.save("classifiers", options, decoder, task, found))


if __name__ == "__main__":
    main()
