"""Pruned heads and contrastive confidence over the minimum exit layer (the second document's Figs. 4 to 13 and Table 1).

``PYTHONPATH=benchmarks python benchmarks/studies/pruning.py [--model g2p|numbers] [--checkpoint FOLDER]``

At threshold .9 throughout, as there, and from each minimum exit layer on. The vocabulary has some 70 tokens instead of 32,128,
so that FLOPs are also counted for a head of that size with the same shares kept.
"""

from typing import Any

import common
import figures
import numpy as np
from numpy.typing import NDArray

import riskcal
from riskcal import ExitPolicy, efficiency
from riskcal.policy.pruning import Pruning

THRESHOLD = 0.9
#: The second document (docs/studies.md) keeps 35,000 and 250 of 32,128; these keep like shares of the ranking that matter at 68.
LARGEST, SMALLEST = 68, 6
PRUNINGS: dict[str, Pruning | None] = {
    "none": None,
    **{
        form: Pruning(form, largest=LARGEST, smallest=SMALLEST)
        for form in ("fixed", "decaying", "adaptive")
    },
}
MEASURES = ("softmax", "weighted", "jsd", "jsd-code")
MEASURES_PRUNED = ("softmax", "jsd")
LARGE = 32_128


def rows_multiplied(
    measure: str,
    pruning: Pruning | None,
    exits: NDArray[np.int64],
    least: int,
    vocabulary: int,
    layers: int,
) -> NDArray[np.int64]:
    """Rows of the head that each token multiplies at each layer, contrasts with earlier layers included (B, T, L)."""
    if pruning is None:
        tested = np.where(np.arange(1, layers + 1) >= least, vocabulary, 0)
    else:  # adaptive: at the share that a confidence of nine tenths leaves
        tested = efficiency.head_sizes(
            pruning, layers, vocabulary, start=least, confidence=np.full(layers, THRESHOLD)
        )
    sizes = np.broadcast_to(tested, (*exits.shape, layers)).copy()
    for layer in range(least, layers + 1):
        if measure in ("weighted", "contrastive", "contrastive-code") and layer >= 2:
            again = [layer // 2] if layer // 2 < least or pruning else []
        elif "jsd" in measure:
            first = 2 if measure == "jsd-code" else max(2, least)
            again = range(first, layer) if pruning else range(first, min(least, layer))
        else:
            again = []
        for (
            earlier
        ) in again:  # without pruning an earlier layer's whole head is computed once and kept
            reached = exits >= layer
            if pruning:
                sizes[..., earlier - 1] += np.where(reached, tested[layer - 1], 0)
            else:
                sizes[..., earlier - 1] = np.where(reached, vocabulary, sizes[..., earlier - 1])
    return sizes


def head_and_body(
    decoder: Any, task: common.Task, decoded: common.Decoded, sizes: NDArray[np.int64], d: int
) -> tuple:
    """FLOPs per token of the head's rows up to the exit, and of the layers."""
    seen = np.arange(1, sizes.shape[-1] + 1) <= decoded.exits[..., None]
    tokens = np.count_nonzero(decoded.exits)
    return 2 * d * int((sizes * seen).sum()) / tokens, common.flops(
        decoder, task, decoded, "state"
    ).per_token


def scaled(pruning: Pruning | None) -> Pruning | None:
    """The second document's sizes."""
    return None if pruning is None else Pruning(pruning.form)


def main() -> None:
    options = common.parser(__doc__).parse_args()
    options.words = options.words or 200
    task, decoder = common.load(options)
    layers, d = decoder.n_layers, decoder.model.config.d_model
    full = common.decode(decoder, task, ExitPolicy())
    rows = []
    settings = [(measure, "none") for measure in MEASURES]
    settings += [
        (measure, form) for measure in MEASURES_PRUNED for form in PRUNINGS if form != "none"
    ]
    for measure, form in settings:
        for least in range(1, layers):
            pruning = PRUNINGS[form]
            policy = ExitPolicy(
                measure=measure, threshold=THRESHOLD, min_layer=least, pruning=pruning
            )
            decoded = common.decode(decoder, task, policy)
            row = {
                "measure": measure,
                "pruning": form,
                "min_layer": least,
                **common.quality(task, decoded, full),
            }
            for size, rule in (
                (decoder.model.config.vocab_size, pruning),
                (LARGE, scaled(pruning)),
            ):
                sizes = rows_multiplied(measure, rule, decoded.exits, least, size, layers)
                head, body = head_and_body(decoder, task, decoded, sizes, d)
                row |= {f"head_flops_{size}": head, f"body_flops_{size}": body}
            rows.append(row)
        print(measure, form, flush=True)
    found = {
        "threshold": THRESHOLD,
        "largest": LARGEST,
        "smallest": SMALLEST,
        "vocabulary": decoder.model.config.vocab_size,
        "full": common.quality(task, full, full),
        "rows": rows,
        "alone": alone(decoder, task),
        "version": riskcal.__version__,
    }
    figures.save(common.save("pruning", options, decoder, task, found))


def alone(decoder: Any, task: common.Task) -> dict[str, Any]:
    """The pathology: how confident each measure is where its softmax margin is small, and how often one token is plausible."""
    encoded = decoder.encode(task.prompts[:100])
    of = {
        measure: np.asarray(
            decoder.trace(
                *encoded, task.max_new_tokens, policy=ExitPolicy(measure=measure)
            ).confidence,
            dtype=float,
        )[:, :-1]
        for measure in ("max", *MEASURES)
    }
    margin, largest = of["softmax"], of["max"]
    unsure = margin < 0.5
    second = largest - margin
    lonely = second < 0.1 * largest  # the runner-up is not plausible at alpha .1
    # at the first two layers JSD has no layer to contrast with and is the margin itself
    unsure[:, :2] = lonely[:, :2] = False
    return {
        "alpha": 0.1,
        "single_plausible": float(lonely[:, 2:].mean()),
        "exits_at_threshold_where_margin_below_half": {
            measure: float((values[unsure] >= THRESHOLD).mean()) for measure, values in of.items()
        },
        "tokens_and_layers_with_margin_below_half": int(unsure.sum()),
    }


if __name__ == "__main__":
    main()
