"""Tables given for matrices, whose labels say that rows or columns stand in another order than those of the others."""

import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from riskcal import RiskcalError, Runs, Traces, calibrate, heads, replay_arrays, replay_traces

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
    with pytest.raises(
        RiskcalError, match=r"confidence\.sel\(threshold=sorted\(confidence\['thresh"
    ):
        replay_arrays(Labelled([2, 1]), LOSSES.to_numpy(), [0.5])
    found = calibrate(Labelled([0.9, 0.5]), thresholds=[0.9, 0.5], delta=0.3)
    assert found.table["loss"].tolist() == pytest.approx(LOSSES.mean().tolist())


def done(refusal: pytest.ExceptionInfo[RiskcalError], **names: Any) -> Any:
    """What a refusal says to write, done to the letter."""
    _, there, told = str(refusal.value).partition("order: ")
    assert there, refusal.value
    return eval(told.partition(". If ")[0].rstrip("."), names)


EXITS = np.sort(np.random.default_rng(0).random((40, 12)), axis=1)
USES: dict[str, Callable[[Any, Any], Any]] = {
    "traces": lambda c, a: Traces.from_arrays(
        prompt=np.arange(40), position=np.zeros(40, int), confidence=c, agrees=a
    ),
    "arrays": lambda c, a: replay_arrays(c, a, [0.5]),
    "heads": heads.self_supervised,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(
    "table", [pd.DataFrame, pl.from_pandas, pa.Table.from_pandas], ids=["pandas", "polars", "Arrow"]
)
@pytest.mark.parametrize("both", [True, False])
def test_columns_of_exits_are_in_the_exits_order_or_refused(
    use: Callable[[Any, Any], Any], table: Callable[[pd.DataFrame], Any], both: bool
) -> None:
    """A pivot sorts texts: layer 9 would be taken for the full model, in both tables alike."""
    names = [f"layer_{i}" for i in range(1, 13)]
    confidence, agrees = (pd.DataFrame(of, columns=names) for of in (EXITS, (EXITS > 0.2) * 1.0))
    as_texts, told = sorted(names), r"\[1, 10, 11, 12, 2, .*2 at index 4 comes behind 12"
    c, a = table(confidence[as_texts]), table(agrees[as_texts]) if both else agrees.to_numpy()
    with pytest.raises(RiskcalError, match=f"^confidence: .* numbered {told}") as refusal:
        use(c, a)
    mended = done(refusal, confidence=c)
    use(np.asarray(c), np.asarray(a))  # where the numbers mean something else
    if both:
        with pytest.raises(RiskcalError, match=r"^agrees|^loss"):
            use(mended, a)
        a = table(agrees)
    use(mended, a)
    assert np.array_equal(np.asarray(mended), EXITS)
    use(confidence.set_axis([f"at {i / 10}" for i in range(12, 0, -1)], axis=1), agrees.to_numpy())
    for deepest_first in ([*range(12, 0, -1)], pd.RangeIndex(11, -1, -1)):
        with pytest.raises(RiskcalError, match=r"^agrees|^loss"):
            use(EXITS, agrees.set_axis(deepest_first, axis=1))


@pytest.mark.parametrize(
    "form",
    [pa.Table.from_pandas, pa.RecordBatch.from_pandas, pl.from_pandas],
    ids=["Table", "RecordBatch", "polars"],
)
def test_names_of_thresholds_are_looked_at_in_tables_of_arrow(
    form: Callable[[pd.DataFrame], Any],
) -> None:
    grid, columns = [0.9, 0.7, 0.3], ["0.3", "0.7", "0.9"]
    table = form(pd.DataFrame(np.linspace(0, 1, 36).reshape(12, 3), columns=columns))
    told = r"columns are \[0\.3, 0\.7, 0\.9\], and thresholds \[0\.9, 0\.7, 0\.3\]; .*thresholds=(.*) for inst"
    uses: list[Callable[[Any], Any]] = [
        lambda grid: Runs.from_arrays(thresholds=grid, dissimilarity=table),
        lambda grid: calibrate(table, thresholds=grid, delta=0.3),
    ]
    for use in uses:
        with pytest.raises(RiskcalError, match=told) as refusal:
            use(grid)
        use(eval(re.findall(told, str(refusal.value))[0], {"table": table}))  # as it says


@pytest.mark.parametrize("label", [float, str])
@pytest.mark.parametrize("rows", [None, 12])
def test_names_of_thresholds_are_looked_at_in_costs(label: type, rows: int | None) -> None:
    """By its place the price of .3 would be that of .9."""
    grid = [0.9, 0.7, 0.3]
    row = pd.Series([1.0, 2.0, 3.0], [label(t) for t in grid[::-1]])
    price = row if rows is None else pd.DataFrame([row] * rows)
    losses = np.zeros((12, 3))
    uses: list[Callable[[Any], Any]] = [
        lambda price: calibrate(losses, thresholds=grid, delta=0.5, costs={"price": price}),
        lambda price: Runs.from_arrays(
            thresholds=grid, dissimilarity=losses, costs={"price": price}
        ),
    ]
    for use in uses:
        told = r"^costs: price: it is labelled \[0\.3, 0\.7, 0\.9\], and thresholds are \[0\.9"
        with pytest.raises(RiskcalError, match=told) as refusal:
            use(price)
        found = use(done(refusal, price=price, thresholds=grid))
        table = found.table if hasattr(found, "table") else found.mean_costs()
        assert table["price"].tolist() == [3.0, 2.0, 1.0]


def test_names_of_exits_are_looked_at_in_costs() -> None:
    price = pd.Series([1.0, 3.0, 2.0], ["exit_1", "exit_3", "exit_2"])
    with pytest.raises(RiskcalError, match=r"^cost price: its entries are numbered \[3, 2, 1\]"):
        replay_arrays(
            EXITS[:, :3], EXITS[:, :3], [0.5], costs={"price": pd.Series({3: 3.0, 2: 2.0, 1: 1.0})}
        )
    traces = Traces.from_arrays(
        prompt=IDS, position=np.zeros(12, int), confidence=EXITS[:12, :3], agrees=np.ones((12, 3))
    )
    with pytest.raises(RiskcalError, match=r"^costs: price: its entries are numbered") as refusal:
        replay_traces(traces, [0.5], costs={"price": price})
    mended = done(refusal, price=price)
    assert (
        replay_traces(traces, [0.5], costs={"price": mended}).full["price"].tolist() == [3.0] * 12
    )
    table = pd.DataFrame([price] * 12)
    with pytest.raises(RiskcalError, match=r"^cost price: its columns are numbered") as refusal:
        replay_arrays(EXITS[:12, :3], np.zeros((12, 3)), [0.5], costs={"price": table})
    mended = done(refusal, price=table)
    replay_arrays(EXITS[:12, :3], np.zeros((12, 3)), [0.5], costs={"price": mended})


def test_losses_and_prompts_are_joined_by_their_index() -> None:
    """By their places each prompt would have another's losses, and other rows would be averaged."""
    losses = pd.Series(np.linspace(0, 0.2, 12), IDS)
    prompts = pd.Series([f"d{i // 3}" for i in range(12)], IDS).iloc[::-1]
    with pytest.raises(RiskcalError, match=f"^prompts: {TOLD}"):
        calibrate(losses, prompts=prompts, thresholds=[0.5], delta=0.5)
    found = calibrate(losses, prompts=prompts.loc[losses.index], thresholds=[0.5], delta=0.5)
    plain = calibrate(
        losses.to_numpy(), prompts=prompts.to_numpy()[::-1], thresholds=[0.5], delta=0.5
    )
    assert found.records_digest == plain.records_digest
