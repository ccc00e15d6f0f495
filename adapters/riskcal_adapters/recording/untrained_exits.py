"""Whether a recorded model's early exits know anything: if not, no threshold will help, and the user should hear why."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

#: Fewer prompts say nothing.
LEAST = 20
#: Outputs whose distance to their own full output is this share of that to another prompt's are called chance: 1 is pure
#: chance, but a token among them that ran all layers is always right.
CHANCE = 0.8


class Evidence(NamedTuple):
    """Of some prompts: how far shallow outputs are from their own full output, in all, and from another prompt's."""

    prompts: int
    early: int  # prompts of which any run left before the last layer
    shallow: (
        int  # prompts with a shallow run: one whose mean exit is in the lower half of the layers
    )
    own: float
    another: float


def evidence(rows: pd.DataFrame, dissimilarity: Callable[[str, str], float]) -> Evidence:
    """What the rows of some prompts (with their ``output``) say; each prompt's shallow run is that of the highest threshold.

    Another prompt's full output is what chance would give: it is a likely output that has nothing to do with the prompt.
    """
    is_full = np.isposinf(rows["threshold"].to_numpy())
    full, candidates = rows[is_full], rows[~is_full]
    depth = full["layers"].iloc[0]
    shallow = candidates[candidates["layers"] <= (1 + depth) / 2].drop_duplicates("prompt")
    if len(full) < 2:
        shallow = shallow[:0]  # no other prompt to compare with
    another = dict(
        zip(full["prompt"], np.roll(full["output"].to_numpy(dtype=object), 1), strict=True)
    )
    distances = [
        dissimilarity(output, another[prompt])
        for output, prompt in zip(shallow["output"], shallow["prompt"], strict=True)
    ]
    early = candidates.loc[candidates["layers"] < depth, "prompt"].nunique()
    return Evidence(
        len(full), early, len(shallow), float(shallow["dissimilarity"].sum()), float(sum(distances))
    )


def warn(found: Sequence[Evidence]) -> None:
    """Warn of a model that was not trained for early exit."""
    prompts, early, shallow, own, another = (
        (sum(part) for part in zip(*found, strict=True)) if found else (0,) * 5
    )
    remedy = "train its early exits first, with the layer-weighted loss (CALM, Eq. 6) or exit-aware training"
    if prompts >= LEAST and not early:
        warnings.warn(
            f"decoder: no token of {prompts} prompts left before the last layer at any threshold. Record lower thresholds; if "
            f"the model was not trained for early exit, {remedy}.",
            stacklevel=3,
        )
    elif shallow >= LEAST and own >= CHANCE * another > 0:
        warnings.warn(
            f"decoder: outputs from the lower half of the layers agree with the full model's at chance level: their mean "
            f"dissimilarity is {own / shallow:.2f}, to the full output of another prompt {another / shallow:.2f}. Was the model "
            f"trained for early exit? If not, {remedy}.",
            stacklevel=3,
        )
