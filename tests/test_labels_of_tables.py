"""Tables given for matrices, whose labels say that rows or columns stand in another order than those of the others."""

import types
from typing import Any

import numpy as np
import pandas as pd
import pytest

from riskcal import RiskcalError, Runs, Traces, calibrate, heads, replay_arrays

IDS = [f"p{i}" for i in range(12)]
LOSSES = pd.DataFrame(np.linspace(0, 0.2, 24).reshape(12, 2), IDS, [0.9, 0.5])
TURNED = LOSSES.iloc[::-1]
TOLD = r"'p11' is the index of row 0, but 'p0' that of .*; bring both into one order, (.*) for"


def test_rows_of_two_tables_are_joined_by_their_index_or_not_at_all() -> None:
    """By their places one prompt's risk would be beside another's distance."""
    given: dict[str, Any] = {"thresholds": [0.9, 0.5], "full_risk": np.zeros(12), "prompts": IDS}
    one = Runs.from_arrays(dissimilarity=LOSSES, risk=LOSSES, **given)
    with pytest.raises(RiskcalError, match=f"^risk: {TOLD}"):
        Runs.from_arrays(dissimilarity=LOSSES, risk=TURNED, **given)
    mended = TURNED.loc[LOSSES.index]  # as it says
    assert Runs.from_arrays(dissimilarity=LOSSES, risk=mended, **given).digest() == one.digest()
    plain = Runs.from_arrays(dissimilarity=LOSSES, risk=LOSSES.to_numpy(), **given)
    assert plain.digest() == one.digest()
    numbered = LOSSES.reset_index(drop=True)  # nobody gave these labels
    assert Runs.from_arrays(dissimilarity=LOSSES, risk=numbered, **given).digest() == one.digest()
    # nor these, but some were shuffled afterwards
    with pytest.raises(RiskcalError, match=r"^risk: 11 is the index of row 0, .* drop the indices"):
        Runs.from_arrays(dissimilarity=numbered, risk=numbered[::-1], **given)
    as_they_stand = numbered[::-1].reset_index(drop=True)
    assert Runs.from_arrays(dissimilarity=numbered, risk=as_they_stand, **given).n == 12


@pytest.mark.parametrize("name", ["prompts", "cluster", "group"])
def test_so_are_ids_and_labels(name: str) -> None:
    labels = pd.Series(IDS, IDS)
    with pytest.raises(RiskcalError, match=f"^{name.rstrip('s')}.*: {TOLD}"):
        Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=LOSSES, **{name: labels[::-1]})
    assert Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=LOSSES, **{name: labels}).n == 12


def test_so_are_decisions_at_exits() -> None:
    prompt, position = pd.Series(IDS, IDS), np.zeros(12, dtype=int)
    given: dict[str, Any] = {"position": position, "confidence": LOSSES}
    with pytest.raises(RiskcalError, match=f"^loss: {TOLD}"):
        Traces.from_arrays(prompt=IDS, loss=TURNED, **given)
    with pytest.raises(RiskcalError, match=f"^confidence: {TOLD}"):
        Traces.from_arrays(prompt=prompt, position=position, confidence=TURNED, loss=LOSSES)
    with pytest.raises(RiskcalError, match=f"^loss: {TOLD}"):
        replay_arrays(LOSSES, TURNED, [0.5])
    with pytest.raises(RiskcalError, match=f"^agrees: {TOLD}"):
        heads.self_supervised(LOSSES, TURNED > 0)
    with pytest.raises(RiskcalError, match=f"^prompts: {TOLD}"):
        heads.certified(LOSSES, LOSSES >= 0, prompts=prompt[::-1], max_tokens=1, layers=[2, 4])
    with pytest.raises(RiskcalError, match=f"^prompts: {TOLD}"):
        heads.certified(
            LOSSES.to_numpy(), LOSSES >= 0, prompts=prompt[::-1], max_tokens=1, layers=[2, 4]
        )
    assert Traces.from_arrays(prompt=prompt, loss=LOSSES, **given).confidence.shape == (12, 2)


def test_coordinates_of_labelled_arrays_are_looked_at_as_columns_are() -> None:
    """As xarray has them."""

    class Labelled:
        dims = ("prompt", "threshold")

        def __init__(self, thresholds: list[float]) -> None:
            self.coords = {"threshold": types.SimpleNamespace(values=np.array(thresholds))}
            self.dtype, self.shape = np.dtype(float), (12, 2)

        def __array__(self, *_: Any, **__: Any) -> Any:
            return LOSSES.to_numpy()

    told = r"its columns are \[0\.5, 0\.9\], and thresholds \[0\.9, 0\.5\]"
    with pytest.raises(RiskcalError, match=told):
        calibrate(Labelled([0.5, 0.9]), thresholds=[0.9, 0.5], delta=0.3)
    found = calibrate(Labelled([0.9, 0.5]), thresholds=[0.9, 0.5], delta=0.3)
    assert found.table["loss"].tolist() == pytest.approx(LOSSES.mean().tolist())
