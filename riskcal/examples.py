"""Records of real generations that ship with the package."""

from importlib import resources
from typing import Literal, overload

import pandas as pd

from riskcal import _validate
from riskcal.records import Runs, Traces, files


@overload
def load_example(name: Literal["g2p"]) -> Runs: ...
@overload
def load_example(name: Literal["g2p-traces"]) -> Traces: ...
@overload
def load_example(name: Literal["g2p-generations"]) -> pd.DataFrame: ...


def load_example(name: str) -> Runs | Traces | pd.DataFrame:
    """Load real recorded runs, traces or generations.

    Parameters
    ----------
    name : {"g2p", "g2p-traces", "g2p-generations"}
        ``"g2p"``: `Runs` of an 8-layer early-exit T5 that spells English words out in phonemes, on held-out words of the
        CMU Pronouncing Dictionary, at thresholds 0.00 to 1.00 and for the full model. ``"g2p-traces"``: `Traces` of the
        same model on part of the words. ``"g2p-generations"``: a table of tokens and exit layers of a dozen words at each
        threshold, as `riskcal.report.write` takes it. The data card is ``riskcal/data/g2p.md``.

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
    _validate.choice(name, "name", ("g2p", "g2p-traces", "g2p-generations"))
    with resources.as_file(resources.files("riskcal") / "data" / f"{name}.parquet") as path:
        if name == "g2p-generations":
            return files.read(path)
        return Traces.read(path) if name == "g2p-traces" else Runs.read(path)
