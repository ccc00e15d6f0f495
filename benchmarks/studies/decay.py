"""Thresholds that decay with the position against one threshold: what temperatures do (CALM, Figs. 2b and 2c).

``PYTHONPATH=benchmarks python benchmarks/studies/decay.py [--model g2p|numbers] [--checkpoint FOLDER]``
"""

import common
import figures
import numpy as np

from riskcal import Constant, Decaying, ExitPolicy

THRESHOLDS = (1.0, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)
DRAWN = 0.9  # the threshold whose course is drawn, as in the paper


def schedules(length: int) -> dict[str, Constant | Decaying]:
    """By name; N is the request's length limit."""
    paper = {
        f"paper, tau {tau:g}": Decaying(temperature=tau, max_length=length) for tau in (0, 4, 8)
    }
    return (
        {"constant": Constant()}
        | paper
        | {"t5x, tau 4": Decaying(temperature=4, max_length=length, form="t5x")}
    )


def main() -> None:
    options = common.parser(__doc__).parse_args()
    options.words = options.words or (500 if options.model == "g2p" else 200)
    task, decoder = common.load(options)
    full = common.decode(decoder, task, ExitPolicy())
    rows, courses = [], {}
    positions = np.arange(task.max_new_tokens)
    for name, schedule in schedules(task.max_new_tokens).items():
        courses[name] = schedule.local_threshold(DRAWN, positions)
        for threshold in THRESHOLDS:
            decoded = common.decode(
                decoder, task, ExitPolicy(threshold=threshold, schedule=schedule)
            )
            rows.append(
                {"schedule": name, "threshold": threshold, **common.quality(task, decoded, full)}
            )
        print(name, flush=True)
    found = {"threshold": DRAWN, "length": task.max_new_tokens, "courses": courses, "rows": rows}
    figures.save(common.save("decay", options, decoder, task, found))


if __name__ == "__main__":
    main()
