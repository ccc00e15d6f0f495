"""What other libraries raise, each found by a fuzz of 250 types: refused by name, and nothing odd is taken for a number."""

import datetime
import decimal
import fractions
import math
import re
import uuid
from collections.abc import Callable
from pathlib import Path
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
    table = cascade().assign(seconds=objects(datetime.timedelta(seconds=2)))
    assert Runs.from_frame(table, candidate_columns=["arm"]).values["seconds"][0, 0] == 2.0


def cascade() -> pd.DataFrame:
    """Six prompts, two candidates that differ in a setting ``arm``."""
    return pd.DataFrame(
        {
            "prompt": np.repeat(IDS[:6], 2),
            "threshold": 0.5,
            "arm": np.tile([0.9, 0.25], 6),
            "dissimilarity": 0.1,
        }
    )


@pytest.mark.parametrize(
    "arm",
    [
        [decimal.Decimal("0.9"), decimal.Decimal("0.25")],
        [fractions.Fraction(9, 10), fractions.Fraction(1, 4)],
        pa.array([decimal.Decimal("0.90"), decimal.Decimal("0.25")]),  # as SQL's literals are
    ],
    ids=["decimals", "fractions", "Arrow"],
)
def test_a_setting_may_be_a_decimal(arm: Any) -> None:
    column = pd.Series(arm, dtype=pd.ArrowDtype(arm.type) if isinstance(arm, pa.Array) else object)
    table = cascade().assign(arm=pd.concat([column] * 6, ignore_index=True))
    plain = Runs.from_frame(cascade(), candidate_columns=["arm"])
    assert Runs.from_frame(table, candidate_columns=["arm"]).digest() == plain.digest()


@pytest.mark.parametrize("full", ["full", "FULL", math.inf])
def test_full_is_infinity_beside_the_numbers_of_any_setting(full: Any) -> None:
    table = cascade().assign(arm=pd.Series([full, 0.25] * 6, dtype=object))
    found = Runs.from_frame(table, candidate_columns=["arm"])
    assert found.candidates["arm"].tolist() == [0.25, math.inf]


def test_texts_stay_texts_also_of_numbers() -> None:
    """As policies name them that were certified before."""
    for arm in (["full", "half"], ["0.25", "0.9"], ["512", "full"], ["full", "full"]):
        table = cascade().assign(arm=arm * 6, threshold=[0.5, 0.6] * 6)
        found = Runs.from_frame(table, candidate_columns=["arm"])
        assert sorted(found.candidates["arm"]) == sorted(arm)


def test_a_measure_may_have_any_name() -> None:
    table = cascade().assign(measure="full", threshold=[0.5, 0.6] * 6).drop(columns="arm")
    assert set(Runs.from_frame(table).candidates["measure"]) == {"full"}
    mixed = table.assign(measure=["full", 1] * 6)
    with pytest.raises(RiskcalError, match="measure: 1 at row 1 is not a text"):
        Runs.from_frame(mixed)


def test_a_csv_may_say_full_of_a_threshold_of_a_stage(tmp_path: Path) -> None:
    """Which makes texts of the whole column."""
    table = cascade().rename(columns={"arm": "threshold_2"})
    table["threshold_2"] = ["full", 0.25] * 6
    table.to_csv(tmp_path / "runs.csv", index=False)
    found = Runs.read(tmp_path / "runs.csv", candidate_columns=["threshold_2"])
    assert found.candidates["threshold_2"].tolist() == [0.25, math.inf]
    beside = Runs.from_frame(table, candidate_columns=["threshold_2"])
    assert beside.digest() == found.digest()


def test_minus_infinity_is_no_setting_as_no_policy_holds_it() -> None:
    """A policy said full of it, and JSON lines were none."""
    table = cascade().assign(arm=[0.25, -math.inf] * 6)
    with pytest.raises(RiskcalError, match=r"arm: -inf at row 1; (.*) give a finite one"):
        Runs.from_frame(table, candidate_columns=["arm"])


@pytest.mark.parametrize(
    "huge", [decimal.Decimal("1e400"), fractions.Fraction(10**400)], ids=["decimal", "fraction"]
)
def test_a_decimal_beyond_all_floats_is_refused_and_not_infinity(huge: Any) -> None:
    table = cascade().assign(arm=pd.Series([0.25, huge] * 6, dtype=object))
    with pytest.raises(RiskcalError, match=r"arm: (.*) at row 1 is beyond what a float holds"):
        Runs.from_frame(table, candidate_columns=["arm"])
    remedied = table.assign(arm=table["arm"].replace({huge: "full"}))
    found = Runs.from_frame(remedied, candidate_columns=["arm"])
    assert found.candidates["arm"].tolist() == [0.25, math.inf]
    thresholds = cascade().assign(threshold=pd.Series([0.25, huge] * 6, dtype=object))
    with pytest.raises(RiskcalError, match="threshold: "):
        Runs.from_frame(thresholds.drop(columns="arm"))
    costs = thresholds.rename(columns={"threshold": "layers", "arm": "threshold"})
    with pytest.raises(RiskcalError, match=r"layers: (.*) at row 1"):
        Runs.from_frame(costs)


def test_ids_of_the_type_that_databases_have_are_their_texts() -> None:
    ids = [uuid.UUID(int=i // 2) for i in range(12)]
    named = Runs.from_frame(cascade().assign(prompt=list(map(str, ids))), candidate_columns=["arm"])
    column = pa.array([one.bytes for one in ids], type=pa.uuid())
    table = pa.Table.from_pandas(cascade()).set_column(0, "prompt", column)
    for given in (cascade().assign(prompt=ids), table):
        assert Runs.from_frame(given, candidate_columns=["arm"]).digest() == named.digest()


def test_vectors_of_thresholds_may_be_tensors_or_maps() -> None:
    torch = pytest.importorskip("torch")
    table = cascade().drop(columns="arm").assign(threshold=np.tile([2.0, 1.0], 6))
    vectors = [[0.9, 0.75], [0.5, 0.25]]
    plain = Runs.from_frame(table.assign(thresholds=vectors * 6))
    tensors = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in vectors]
    assert Runs.from_frame(table.assign(thresholds=tensors * 6)).digest() == plain.digest()
    maps = pa.array([list(enumerate(v, 1)) for v in vectors * 6], pa.map_(pa.int32(), pa.float64()))
    arrow = pa.Table.from_pandas(table).append_column("thresholds", maps)
    assert Runs.from_frame(arrow).digest() == plain.digest()


@pytest.mark.parametrize("text", ["0 days 00:00:02", "0:00:02", "2s", "PT2S"])
def test_the_text_of_a_duration_is_told_what_makes_one_of_it(text: str) -> None:
    table = cascade().assign(seconds=text)
    with pytest.raises(
        RiskcalError, match=r"pandas\.to_timedelta\(table\['seconds'\]\) makes durations"
    ):
        Runs.from_frame(table, candidate_columns=["arm"])
    table["seconds"] = pd.to_timedelta(table["seconds"])
    assert Runs.from_frame(table, candidate_columns=["arm"]).values["seconds"][0, 0] == 2.0


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


def test_so_are_several_statistics_and_what_was_unstacked() -> None:
    long = pd.DataFrame(
        {
            "prompt": np.repeat(IDS[:6], 2),
            "threshold": np.tile(GRID, 6),
            "dissimilarity": 0.1,
            "layers": 3.0,
        }
    )
    digest = Runs.from_frame(long).digest()
    keys = ["prompt", "threshold"]
    several = long.groupby(keys).agg({"layers": "mean", "dissimilarity": ["mean", "max"]})
    table = several.reset_index()
    with pytest.raises(RiskcalError, match="say which dissimilarity is meant: columns=") as refusal:
        Runs.from_frame(table)
    flat, named = re.findall(
        r"table\.columns = (\[.*\]), and.*columns=(\{.*\})\.", str(refusal.value)
    )[0]
    table.columns = eval(flat, {"table": table})
    names = {**eval(named), "layers": "layers_mean"}
    with pytest.warns(UserWarning, match="dissimilarity_max: the column is not read"):
        assert Runs.from_frame(table, columns=names).digest() == digest

    table = long.set_index(keys).unstack()  # noqa: PD010
    with pytest.raises(RiskcalError, match=r"make it one: table\.stack\(\)\.reset_index\(\)\."):
        Runs.from_frame(table)
    assert Runs.from_frame(table.stack().reset_index()).digest() == digest  # noqa: PD013
    unnamed = table.rename_axis(columns=[None, None])
    with pytest.raises(RiskcalError, match=r"make it one: table\.stack") as refusal:
        Runs.from_frame(unnamed)
    stacked = re.findall(r"make it one: (.*)\.$", str(refusal.value))[0]
    assert Runs.from_frame(eval(stacked, {"table": unnamed})).digest() == digest

    losses = long.set_index(keys)["dissimilarity"]
    told = r"make rows of them: (table\.melt\(.*\)), after (table\.reset_index\(\)) where"
    for table in (losses.unstack(), losses.unstack().reset_index()):  # noqa: PD010
        with pytest.raises(RiskcalError, match=told) as refusal:
            Runs.from_frame(table)
        melted, index = re.findall(told, str(refusal.value))[0]
        table = table if "prompt" in table else eval(index, {"table": table})
        found = Runs.from_frame(eval(melted, {"table": table}))
        np.testing.assert_array_equal(found.losses("textual"), np.full((6, 2), 0.1))

    with pytest.raises(RiskcalError, match=r"or its reset_index\(\) where it has keys"):
        Runs.from_frame(losses)
    assert Runs.from_frame(losses.reset_index()).n == 6


def test_a_message_is_short_whatever_was_given() -> None:
    with pytest.raises(RiskcalError) as refusal:
        losses(test=np.arange(900))
    assert len(str(refusal.value)) < 400
    assert "\n" not in str(refusal.value)
