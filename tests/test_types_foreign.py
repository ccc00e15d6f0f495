"""What other libraries raise, each found by a fuzz of 250 types: refused by name, and nothing odd is taken for a number."""

import decimal
import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from riskcal import (
    ExitPolicy,
    RiskcalError,
    RiskMonitor,
    Runs,
    Traces,
    calibrate,
    heads,
    pvalues,
    replay_arrays,
)

N, GRID = 12, [0.9, 0.5]
GOOD, AGREES, IDS = np.full((N, 2), 0.1), np.ones((N, 2), dtype=bool), [f"p{i}" for i in range(N)]


class Raises:
    """An array whose library raises an exception of its own."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise LookupError("nobody knows this one")


def objects(value: Any) -> Any:
    column = np.empty(N, dtype=object)
    column.fill(value)
    return column


def runs(**columns: Any) -> Runs:
    given = {
        "prompt": np.repeat(IDS[:6], 2),
        "threshold": np.tile(GRID, 6),
        "dissimilarity": np.full(N, 0.1),
    }
    return Runs.from_frame(pd.DataFrame({**given, **columns}))


def losses(values: Any = GOOD, **options: Any) -> Any:
    return calibrate(values, **{"thresholds": GRID, "delta": 0.5, **options})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "durations among objects": (
        lambda: runs(layers=objects(np.timedelta64(2, "s"))),
        "layers: holds durations",
    ),
    "complex numbers among objects": (
        lambda: runs(layers=objects(np.complex128(1))),
        r"layers: \(1\+0j\) at row 0",
    ),
    "categories of numbers, one missing": (
        lambda: runs(layers=pd.Categorical([1, 2, None] * 4)),
        "layers: nan at row",
    ),
    "categories of ids, one missing": (
        lambda: runs(prompt=pd.Categorical([1, 2, None] * 4)),
        "prompt: missing at row",
    ),
    "decimals that signal": (
        lambda: runs(prompt=objects(decimal.Decimal("sNaN"))),
        "prompt: not a column of labels",
    ),
    "an array that raises": (
        lambda: losses(Raises()),
        "losses: not an array of numbers .nobody knows",
    ),
    "an order that raises": (lambda: losses(order=Raises()), "order: not an array"),
    "ids that raise": (lambda: losses(prompts=Raises()), "prompts: not a list of labels"),
    "integers of 128 bits": (
        lambda: pvalues.convex_order(pl.Series([0] * N, dtype=pl.Int128), 0.5),
        "losses: not an array of numbers",
    ),
    "ids that are records": (
        lambda: losses(prompts=np.zeros(N, [("a", "i4")])),
        "prompts: not a list of labels",
    ),
    "ids that are bytes": (lambda: losses(prompts=np.zeros(N, "V4")), "prompts: holds records"),
    "masked confidences": (
        lambda: replay_arrays(np.ma.masked_array(GOOD, mask=AGREES), GOOD, GRID),
        r"confidence: masked at index \[0, 0\]",
    ),
    "records as a coordinate": (lambda: runs(measure=np.zeros(N, "V4")), "measure: holds records"),
    "dates that no Python date holds": (
        lambda: runs(min_layer=pd.Series([2**50] * N, dtype=pd.ArrowDtype(pa.timestamp("s")))),
        "min_layer: ",
    ),
    "a signalling coordinate": (
        lambda: runs(measure=objects(decimal.Decimal("sNaN"))),
        "measure: not a column",
    ),
    "an object whose bases have no end": (
        lambda: Runs.from_arrays(thresholds=GRID, dissimilarity=pd.DateOffset(months=1)),  # type: ignore[arg-type]
        "dissimilarity: ",
    ),
    "lists of dates that no Python date holds": (
        lambda: Traces.from_frame(
            pd.DataFrame({"prompt": IDS, "position": 0, "agrees": [[True]] * N}).assign(
                confidence=pd.array(
                    pa.array([2**62] * N, pa.duration("s")), dtype=pd.ArrowDtype(pa.duration("s"))
                )
            )
        ),
        "confidence: ",
    ),
    "arrays without a length as lists": (
        lambda: Traces.from_frame(
            {
                "prompt": IDS,
                "position": [0] * N,
                "agrees": [[True]] * N,
                "confidence": objects(np.array(0.5)),
            }
        ),
        r"confidence: .* at row 0 \(12 such rows\) is not a list",
    ),
    "records as a count": (
        lambda: losses(starts=np.zeros(N, "V4")),
        "starts: .* is not a whole number",
    ),
    "a source for each row": (
        lambda: Runs.from_arrays(
            thresholds=GRID, dissimilarity=GOOD, source=np.array(["generated"] * N)
        ),  # type: ignore[arg-type]
        "source: ",
    ),
    "a list as exact": (
        lambda: Runs.from_arrays(thresholds=GRID, dissimilarity=GOOD, exact=[True]),  # type: ignore[arg-type]
        r"exact: \[True\] is neither True nor False",
    ),
    "one number as layers": (
        lambda: heads.certified(GOOD, AGREES, prompts=IDS, max_tokens=3, layers=np.array(1)),  # type: ignore[arg-type]
        "layers: not a list of whole numbers",
    ),
    "layers beyond 64 bits": (
        lambda: heads.certified(GOOD, AGREES, prompts=IDS, max_tokens=3, layers=[1, 2**64]),
        "layers: 18446744073709551616 is more than",
    ),
    "tokens beyond 64 bits": (
        lambda: heads.certified(GOOD, AGREES, prompts=IDS, max_tokens=2**70),
        "max_tokens: .* is more than",
    ),
    "a duration as a count": (
        lambda: losses(starts=np.timedelta64(1, "s")),
        "starts: .* is not a whole number",
    ),
    "a duration as a level": (
        lambda: losses(epsilon=np.timedelta64(0, "s")),
        "epsilon: .* is not a number",
    ),
    "a missing value as a count": (
        lambda: losses(starts=pd.NA),
        "starts: <NA> is not a whole number",
    ),
    "a complex tolerance": (lambda: RiskMonitor(np.complex128(0.1)), "delta: .* is not a number"),  # type: ignore[arg-type]
    "a missing threshold": (
        lambda: ExitPolicy(threshold=pd.NA),
        "threshold: <NA> is neither a number",
    ),  # type: ignore[arg-type]
    "a duration as a threshold": (
        lambda: ExitPolicy(threshold=np.timedelta64(1, "s")),
        "threshold: .* neither a number",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case: str) -> None:
    call, named = REFUSED[case]
    with pytest.raises(RiskcalError, match=named):
        call()


def test_what_means_a_number_is_read_as_it() -> None:
    assert runs(seconds=objects(np.timedelta64(2, "s"))).values["seconds"][0, 0] == 2.0
    assert runs(layers=objects(fractions.Fraction(1, 2))).values["layers"][0, 0] == 0.5
    assert runs(layers=objects(decimal.Decimal("0.5"))).values["layers"][0, 0] == 0.5


def test_tensors_that_need_gradients_are_read() -> None:
    torch = pytest.importorskip("torch")
    matrix = torch.full((N, 2), 0.1, dtype=torch.float64, requires_grad=True)
    pd.testing.assert_frame_equal(losses(matrix).table, losses().table)
    with pytest.raises(RiskcalError, match="losses: not an array of numbers"):
        losses(matrix.to("meta"))


def test_two_level_columns_are_flattened_as_the_refusal_says() -> None:
    long = pd.DataFrame(
        {"prompt": np.repeat(IDS[:6], 2), "threshold": np.tile(GRID, 6), "dissimilarity": 0.1}
    )
    table = long.groupby(["prompt", "threshold"]).agg({"dissimilarity": ["mean"]}).reset_index()
    with pytest.raises(
        RiskcalError, match=r"table\.columns = \[level\[0\] for level in table\.columns\]"
    ):
        Runs.from_frame(table)
    table.columns = pd.Index([level[0] for level in table.columns])
    assert Runs.from_frame(table).digest() == Runs.from_frame(long).digest()


def test_a_message_is_short_whatever_was_given() -> None:
    with pytest.raises(RiskcalError) as refusal:
        losses(test=np.arange(900))
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)
