"""Records of real generations and requests that ship with the package."""

from importlib import resources
from typing import Literal, overload

import pandas as pd

from riskcal import _validate
from riskcal.records import Runs, Traces, files


@overload
def load_example(name: Literal["g2p"]) -> Runs: ...
@overload
def load_example(
    name: Literal[
        "g2p-traces", "stress", "stress-errors", "cascade", "reasoning", "reasoning-errors"
    ],
) -> Traces: ...
@overload
def load_example(name: Literal["g2p-generations"]) -> pd.DataFrame: ...


def load_example(name: str) -> Runs | Traces | pd.DataFrame:
    """Load real recorded runs, traces or generations.

    Parameters
    ----------
    name : str
        One of these.

        ``"g2p"``: `Runs` of an 8-layer early-exit T5 that spells English words out in phonemes, on held-out words of the
        CMU Pronouncing Dictionary, at thresholds 0.00 to 1.00 and for the full model. ``"g2p-traces"``: `Traces` of the
        same model on part of the words. ``"g2p-generations"``: a table of tokens and exit layers of a dozen words at each
        threshold, as `riskcal.report.write` takes it. The data card is ``riskcal/data/g2p.md``.

        ``"stress"``: `Traces` of a classifier with five exits, which reads the stress pattern of a held-out word off its
        spelling: whether each exit agrees with the last, and the FLOPs spent. ``"stress-errors"``: the same requests, with an
        exit's error against the dictionary as its loss. The data card is ``riskcal/data/stress.md``.

        ``"cascade"``: `Traces` of small questions of arithmetic that three stages answer: SmolLM2 once, the majority of three
        answers of it, and an expert who is always right; the loss is a wrong answer, the cost a price. The data card is
        ``riskcal/data/cascade.md``.

        ``"reasoning"``: `Traces` of thoughts of SmolLM2 with an answer forced at checkpoints: whether it is the thought's own,
        and the tokens spent. ``"reasoning-errors"``: the same thoughts, with a wrong answer as the loss. The data card is
        ``riskcal/data/reasoning.md``.

    Examples
    --------
    >>> riskcal.load_example("g2p")
    Runs: 3000 prompts x 21 candidates (generated), thresholds 1 to 0; dissimilarity, risk, layers, tokens,
    seconds; full model recorded
    >>> riskcal.load_example("g2p-traces")
    Traces: 7345 tokens of 1000 prompts x 8 exits; confidence, agrees
    >>> riskcal.load_example("g2p-generations").columns.tolist()
    ['prompt', 'text', 'threshold', 'tokens', 'exit_layers']
    """
    names = (
        "g2p",
        "g2p-traces",
        "g2p-generations",
        "stress",
        "stress-errors",
        "cascade",
        "reasoning",
        "reasoning-errors",
    )
    _validate.choice(name, "name", names)
    file = name.removesuffix("-errors")
    with resources.as_file(resources.files("riskcal") / "data" / f"{file}.parquet") as path:
        if name == "g2p-generations":
            return files.read(path)
        if name.endswith("-errors"):
            table = files.read(path).drop(columns="agrees")
            return Traces.from_frame(table, columns={"loss": "error"})
        return Runs.read(path) if name == "g2p" else Traces.read(path)
