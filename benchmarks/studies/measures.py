"""Every confidence measure against static exits and the oracle: quality over mean layers (CALM, Figs. 3 and B.6), and lengths.

``PYTHONPATH=benchmarks python benchmarks/studies/measures.py [--model g2p|numbers] [--checkpoint FOLDER]``
"""

import common
import figures
import numpy as np

from riskcal import ExitPolicy

MEASURES = (
    "softmax",
    "max",
    "entropy",
    "state",
    "classifier",
    "weighted",
    "contrastive",
    "contrastive-code",
    "jsd",
    "jsd-code",
)
ORACLES = {
    "oracle": {},
    "oracle, exact cache": {"cache": "recompute"},
    "oracle, first-layer states": {"cache": "first"},
    "oracle, copied keys and values": {"cache": "copy"},
}
SIZE = 10


def lengths(tokens: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(tokens, [0.05, 0.95])
    return {"mean": float(tokens.mean()), "5%": float(low), "95%": float(high)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--series",
        nargs="+",
        default=[*ORACLES, *MEASURES],
        help="measures and oracles; default: all",
    )
    options = parser.parse_args()
    options.words = options.words or (750 if options.model == "g2p" else 200)
    task, decoder = common.load(options)
    full = common.decode(decoder, task, ExitPolicy())
    rows = []

    def row(
        series: str, threshold: float | None, policy: ExitPolicy, measure: str
    ) -> common.Decoded:
        decoded = common.decode(decoder, task, policy)
        rows.append(
            {
                "series": series,
                "threshold": threshold,
                **common.quality(task, decoded, full),
                "flops_ratio": common.flops(decoder, task, decoded, measure).ratio,
                "longest_5%": float(np.quantile(decoded.tokens, 0.95)),
            }
        )
        return decoded

    row("full", None, ExitPolicy(), "static")
    for k in range(1, decoder.n_layers):
        row("static", k, ExitPolicy.static(k), "static")
    for name, settings in ((name, ORACLES[name]) for name in options.series if name in ORACLES):
        row(name, 1.0, ExitPolicy(measure="oracle", threshold=1.0, **settings), "oracle")
    for measure in common.available(decoder, [name for name in MEASURES if name in options.series]):
        for threshold in common.thresholds(decoder, task, measure, SIZE):
            row(measure, threshold, ExitPolicy(measure=measure, threshold=threshold), measure)
        print(measure, flush=True)
    encoded = [decoder.tokenizer(listed[0])["input_ids"] for listed in task.references]
    found = {
        "lengths": {
            "references": lengths(np.array(list(map(len, encoded)))),
            "full model": lengths(full.tokens),
        },
        "rows": rows,
    }
    figures.save(common.save("measures", options, decoder, task, found))


if __name__ == "__main__":
    main()
