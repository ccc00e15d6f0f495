import hashlib
import json
import math
import os
import subprocess
import sys

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riskcal import (
    RiskcalError,
    Runs,
    Traces,
    _replacing,
    calibrate,
    records,
    replay_traces,
)
from riskcal.records import columns as record_columns
from riskcal.records import files

FILES = ("parquet", "csv", "jsonl")
TABLES = ("pandas", "pyarrow", "polars", "duckdb")
every_entry = pytest.mark.parametrize("entry", [*FILES, *TABLES])


def write(frame, path):
    """As any other program would write it, not by riskcal."""
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), path)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        if "threshold" in frame:
            rows = [
                row | {"threshold": "full" if row["threshold"] == math.inf else row["threshold"]}
                for row in rows
            ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def enter(frame, entry, folder, **options):
    """A table through one of the ways in."""
    if entry in FILES:
        return Runs.read(write(frame, folder / f"runs.{entry}"), **options)
    if entry == "duckdb":
        connection = duckdb.connect()
        connection.register("frame", frame)
        return Runs.from_frame(connection.sql("select * from frame"), **options)
    convert = {
        "pandas": lambda f: f,
        "pyarrow": lambda f: pa.Table.from_pandas(f, preserve_index=False),
    }
    return Runs.from_frame((convert | {"polars": polars.from_pandas})[entry](frame), **options)


def table(full=True, ids=("a", "b", "c"), **columns):
    """Three prompts, thresholds .9 and .5 and the full model: rows 0 to 8."""
    rows = []
    for i, prompt in enumerate(ids):
        for j, threshold in enumerate((math.inf, 0.9, 0.5)):
            if threshold == math.inf and not full:
                continue
            value = 0.0 if threshold == math.inf else 0.1 * j + 0.01 * i
            row = {
                "prompt": prompt,
                "threshold": threshold,
                "dissimilarity": value,
                "risk": value / 2 + 0.1,
            }
            rows.append(row | {"layers": 8.0 - j, "group": f"g{i % 2}"})
    return pd.DataFrame(rows).assign(**columns)


def with_full_as_text(frame):
    return frame.assign(
        threshold=["full" if t == math.inf else repr(t) for t in frame["threshold"]]
    )


def changed(row, **values):
    def change(frame):
        for name, value in values.items():
            column = frame[name].astype(object)
            column[row] = value
            frame[name] = column.infer_objects()
        return frame

    return change


def same(runs, other):
    assert runs.prompts.tolist() == other.prompts.tolist()
    pd.testing.assert_frame_equal(runs.candidates, other.candidates, check_dtype=False)
    assert runs.values.keys() == other.values.keys()
    for name, value in runs.values.items():
        assert np.array_equal(value, other.values[name]), name
    assert runs.full.keys() == other.full.keys()
    assert all(np.array_equal(runs.full[name], other.full[name]) for name in runs.full)
    assert runs.labels.keys() == other.labels.keys()
    assert all(runs.labels[name].tolist() == other.labels[name].tolist() for name in runs.labels)
    assert (runs.source, runs.exact) == (other.source, other.exact)
    assert runs.digest() == other.digest()


# Every refusal, in every entry: the column, the row, and what to do


REFUSALS = {
    "NaN loss": (changed(4, dissimilarity=math.nan), "dissimilarity: nan at row 4", "has the worst loss, 1"),
    "infinite loss": (changed(5, risk=1e999), "risk: inf at row 5", "has the worst loss, 1"),
    "loss above its range": (changed(2, dissimilarity=1 + 2e-9), "dissimilarity: 1.000000002 at row 2", "[0, 1]"),
    "loss below its range": (changed(7, risk=-2e-9), "risk: -2e-09 at row 7", "[0, 1]"),
    "loss that is text": (changed(2, dissimilarity="low"), "dissimilarity: 'low' at row 2", "has the worst loss, 1"),
    "NaN cost": (changed(3, layers=math.nan), "layers: nan at row 3", "Give what the run took"),
    "negative cost": (changed(3, layers=-1.0), "layers: -1.0 at row 3", "[0, inf]"),
    "prompt that lacks a candidate": (
        lambda f: f.drop(index=5).reset_index(drop=True),
        "prompt: 'b' (row 3) lacks the candidate threshold 0.5",
        "add its row with failed true",
    ),
    "prompt that lacks the full model": (
        lambda f: f.drop(index=6).reset_index(drop=True),
        "prompt: 'c' (row 6) lacks the full model's row",
        "record it for all or for none",
    ),
    "duplicated candidate": (
        changed(5, threshold=0.9),
        "prompt: 'b' with threshold 0.9 stands twice, again at row 5",
        "name the prompt they share in a column cluster",
    ),
    "duplicated full model": (
        lambda f: pd.concat([f, f.iloc[[0]]], ignore_index=True),
        "prompt: 'a' with threshold full stands twice, again at row 9",
        "name the prompt they share in a column cluster",
    ),
    "one prompt": (lambda f: f.iloc[:3], "prompt: only 1 prompt ('a', row 0)", "at least two"),
    "threshold of minus infinity": (changed(1, threshold=-math.inf), "threshold: -inf at row 1", "give a number"),
    "only the full model": (lambda f: f.iloc[[0, 3, 6]], "threshold: every row is the full model", "record at least one"),
    "no prompt column": (lambda f: f.drop(columns="prompt"), "prompt: the column is missing; the table has: threshold", ""),
    "no threshold column": (lambda f: f.drop(columns="threshold"), "threshold: the column is missing", "the table has: prompt"),
    "no loss column": (
        lambda f: f.drop(columns=["dissimilarity", "risk"]),
        "dissimilarity, risk: both columns are missing",
        "record at least one",
    ),
    "full model at a distance from itself": (
        changed(3, dissimilarity=2e-9),
        "dissimilarity: 2e-09 at row 3, a full-model row",
        "Is the decoder deterministic?",
    ),
    "group that changes": (
        changed(4, group="g9"),
        "group: 'g9' at row 4, but 'g1' earlier for the same prompt 'b'",
        "constant within it",
    ),
    "cluster that changes": (
        lambda f: changed(8, cluster="z")(f.assign(cluster="x")),
        "cluster: 'z' at row 8, but 'x' earlier for the same prompt 'c'",
        "constant within it",
    ),
    "unknown source": (lambda f: f.assign(source="guessed"), "source: 'guessed' at row 0", "'generated' or 'replayed'"),
    "mixed sources": (
        lambda f: changed(4, source="replayed")(f.assign(source="generated")),
        "source: 'replayed' at row 4, but 'generated' at row 0",
        "separate tables",
    ),
    "exact in part": (
        lambda f: changed(4, exact=False)(f.assign(source="replayed", exact=True)),
        "exact: False at row 4",
        "true throughout or false throughout",
    ),
    "full risk that changes": (
        lambda f: changed(4, full_risk=0.2)(f.assign(full_risk=0.1)),
        "full_risk: ",
        "differs within prompt 'b'",
    ),
    "full risk against the full model's rows": (
        lambda f: f.assign(full_risk=0.4),
        "full_risk: differs from the risk",
        "keep one",
    ),
    "empty id": (changed(3, prompt=""), "prompt: missing (an empty text) at row 3", "every row needs one"),
    "empty cluster": (
        lambda f: changed(2, cluster="")(f.assign(cluster="x")),
        "cluster: missing (an empty text) at row 2",
        "every row needs one",
    ),
}  # fmt: skip


@every_entry
@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_refused_by_column_and_row_with_a_remedy(case, entry, tmp_path):
    change, named, remedy = REFUSALS[case]
    frame = change(table())
    if case == "loss that is text" and entry not in ("pandas", "jsonl"):
        frame["dissimilarity"] = frame["dissimilarity"].astype(str)  # their columns have one type
    with pytest.raises(RiskcalError) as refusal:
        enter(frame, entry, tmp_path)
    message = str(refusal.value)
    if entry in FILES:
        assert message.startswith(f"{tmp_path / f'runs.{entry}'}: ")
        message = message.removeprefix(f"{tmp_path / f'runs.{entry}'}: ")
    assert message.replace("'-inf'", "-inf").startswith(named)  # a CSV's thresholds are text
    assert remedy in message
    assert "np." not in message
    assert "\n" not in message


@every_entry
def test_a_threshold_that_is_no_number_is_refused(entry, tmp_path):
    for value in (math.nan, None):
        frame = table()
        frame.loc[4, "threshold"] = value
        with pytest.raises(
            RiskcalError,
            match=r"threshold: .* at row 4 is not a threshold; give a number, or 'full'",
        ):
            enter(frame, entry, tmp_path)
    frame = with_full_as_text(table())
    frame.loc[4, "threshold"] = "fully"
    with pytest.raises(RiskcalError, match=r"threshold: 'fully' at row 4"):
        enter(frame, entry, tmp_path)
    with pytest.raises(RiskcalError, match=r"threshold: True at row 0|threshold: 'True' at row 0"):
        enter(table().assign(threshold=True), entry, tmp_path)


@every_entry
@pytest.mark.parametrize("column", ["prompt", "cluster", "group"])
def test_a_missing_label_is_refused(column, entry, tmp_path):
    frame = table(cluster="x")
    frame.loc[5, column] = None
    if entry == "csv" and column == "group":
        pytest.skip(
            "a CSV cannot tell a missing text from an empty one, which is a group like any other"
        )
    with pytest.raises(RiskcalError, match=rf"{column}: missing .*at row 5"):
        enter(frame, entry, tmp_path)


@every_entry
def test_a_table_without_rows_is_refused(entry, tmp_path):
    with pytest.raises(
        RiskcalError, match=r"prompt: the table is empty|is empty|prompt: the column is missing"
    ):
        enter(table().iloc[:0], entry, tmp_path)


@every_entry
def test_losses_a_rounding_error_outside_are_taken_as_the_bound(entry, tmp_path):
    frame = table()
    frame.loc[[1, 2, 4], ["dissimilarity", "risk"]] = [1 + 9e-10, -9e-10]
    frame.loc[3, "dissimilarity"] = 9e-10  # a full model's row
    runs = enter(frame, entry, tmp_path)
    assert runs.values["dissimilarity"].max() == 1.0
    assert runs.values["risk"].min() == 0.0
    assert (runs.losses("textual") <= 1.0).all()
    assert calibrate(runs, delta=0.5).n == 3


@pytest.mark.parametrize("objective", ["nonsense", None, 3, ["textual"], "Textual"])
def test_an_unknown_objective_is_refused_with_the_known_ones(objective):
    runs = Runs.from_frame(table())
    with pytest.raises(
        RiskcalError,
        match=r"^objective: .* is unknown; choose one of 'textual', 'risk', 'risk_clipped'",
    ):
        runs.losses(objective)


def test_an_objective_whose_columns_were_not_recorded_is_refused_by_column():
    with pytest.raises(
        RiskcalError,
        match=r"^dissimilarity: objective 'textual' needs this column.*There is risk: objective='risk'",
    ):
        Runs.from_frame(table().drop(columns="dissimilarity")).losses("textual")
    with pytest.raises(RiskcalError, match=r"^risk: objective 'risk' needs this column"):
        Runs.from_frame(table().drop(columns="risk")).losses("risk")
    for objective in ("risk", "risk_clipped"):
        with pytest.raises(
            RiskcalError,
            match=r"^full_risk: objective .* needs the full model's risk; record a row",
        ):
            Runs.from_frame(table(full=False)).losses(objective)


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        (3, "table: a int is not a table"),
        ([{"prompt": 1}], "table: a list is not a table"),
        (None, "table: a NoneType is not a table"),
        ({"prompt": [1, 2], "threshold": [0.5]}, "table: not a dictionary of columns of one length"),
        ({"prompt": 1}, "table: not a dictionary of columns of one length"),
        (table().rename(columns={"layers": "risk"}), "risk: two columns have this name"),
        (table().rename(columns={"layers": "prompt"}), "prompt: two columns have this name"),
        (table().assign(prompt=0.5), "prompt: 0.5 at row 0"),
        (table().assign(prompt=True), "prompt: True at row 0"),
        (table().assign(prompt=[1, 1, 1, "b", "b", "b", 3, 3, 3]), "prompt: 'b' at row 3, in a column of type object"),
        (table().assign(prompt=["a"] * 3 + [2] * 3 + ["c"] * 3), "prompt: 2 at row 3"),
        (table().assign(prompt=[b"a"] * 3 + [b"b"] * 6), "prompt: b'a' at row 0"),
        (table().assign(prompt=pd.Series(["a"] * 3 + ["\ud800"] * 6, dtype=object)), "prompt: '\\ud800' at row 3 is not valid"),
        (table().assign(group=[None, 1.5] * 4 + [1.0]), "group: missing at row 0"),
        (table().assign(source=pd.array(["generated"] * 8 + [pd.NA], dtype="string")), "source: <NA> at row 8"),
        (table().assign(exact=pd.Series([True] * 8 + [math.nan], dtype=object)), "exact: nan at row 8"),
        (table().assign(exact="False"), "exact: 'False' at row 0"),
        (table().assign(threshold=[[0.5]] * 9), "threshold: [0.5] at row 0"),
        (table().assign(threshold=10**400), "threshold: 1000"),
        (table().assign(dissimilarity=[{"a": 1}] * 9), "dissimilarity: {'a': 1} at row 0"),
    ],
)  # fmt: skip
def test_what_is_no_table_or_has_columns_of_no_meaning_is_refused(given_, named):
    with pytest.raises(RiskcalError) as refusal:
        Runs.from_frame(given_)
    assert str(refusal.value).startswith(named)


def test_a_candidate_column_must_be_there():
    with pytest.raises(
        RiskcalError, match=r"^draft: the column is missing; the table has: prompt, threshold"
    ):
        Runs.from_frame(table(), candidate_columns=["draft"])


@pytest.mark.parametrize("name", ["n", "loss", "pvalue", "bound", "certified", "loss_risk"])
def test_a_setting_of_the_name_of_a_result_is_refused(name):
    """A calibration's table would hold the result in its place, and the policy take it for the setting."""
    with pytest.raises(RiskcalError, match=rf"candidate_columns: '{name}' is what a calibration"):
        Runs.from_frame(table().assign(**{name: "u"}), candidate_columns=[name])


# Ways in: all say the same


@every_entry
@pytest.mark.parametrize("ids", ["str", "int"])
@pytest.mark.parametrize("clusters", [False, True])
def test_every_entry_gives_the_same_runs(entry, ids, clusters, tmp_path):
    names = ("a", "b", "c") if ids == "str" else (-7, 0, 2**62)
    frame = table(ids=names)
    if clusters:
        frame["cluster"] = frame["prompt"].map(
            dict(zip(names, [5, 6, 5] if ids == "int" else ["x", "y", "x"], strict=True))
        )
    expected = Runs.from_frame(frame)
    found = enter(frame, entry, tmp_path)
    same(found, expected)
    assert found.prompts.dtype.kind == ("i" if ids == "int" else "O")


@every_entry
def test_full_may_be_written_as_a_word_or_as_infinity(entry, tmp_path):
    expected = Runs.from_frame(table())
    same(enter(with_full_as_text(table()), entry, tmp_path), expected)
    for word in ("Full", " full ", "inf", "Infinity", "+inf"):
        frame = with_full_as_text(table())
        same(
            enter(
                frame.assign(threshold=frame["threshold"].replace("full", word)), entry, tmp_path
            ),
            expected,
        )


@pytest.mark.parametrize(
    "dtype",
    [
        "Int64",
        "int8",
        "uint16",
        "Int8",
        "category",
        "int64[pyarrow]",
        "object",
        "str",
        "string",
        "string[pyarrow]",
    ],
)
def test_any_type_of_id_column_gives_the_same_runs(dtype):
    frame = table(ids=(1, 2, 3))
    runs = Runs.from_frame(
        frame.assign(prompt=frame["prompt"].astype(dtype), cluster=frame["prompt"].astype(dtype))
    )
    expected = Runs.from_frame(frame.assign(cluster=frame["prompt"]))
    assert runs.digest() == expected.digest()
    assert (runs.losses() == expected.losses()).all()
    assert [str(i) for i in runs.prompts] == [str(i) for i in expected.prompts]


@pytest.mark.parametrize(
    "dtype", ["Float64", "category", "str", "string", "double[pyarrow]", "object", "float64"]
)
def test_any_type_of_number_column_gives_the_same_runs(dtype):
    frame = table()
    converted = frame.assign(
        **{n: frame[n].astype(dtype) for n in ("threshold", "dissimilarity", "risk", "layers")}
    )
    same(Runs.from_frame(converted), Runs.from_frame(frame))


def test_texts_of_numbers_are_read_to_the_bit():
    numbers = np.random.default_rng(1).random(2000)
    texts = pd.Series(
        [*map(repr, numbers.tolist()), " 1.50 ", "-inf", "1_0", "one", None], dtype=object
    )
    found = record_columns.floats(texts)
    assert found[:2000].tolist() == numbers.tolist()
    assert found[2000:2002].tolist() == [1.5, -math.inf]
    assert np.isnan(found[2002:]).all()


def test_decimals_of_a_database_are_numbers():
    frame = duckdb.sql(
        "select prompt, threshold, 0.25 as dissimilarity "
        "from (values ('a', 0.5), ('b', 0.5), ('a', 0.1), ('b', 0.1)) t(prompt, threshold)"
    )
    runs = Runs.from_frame(frame)
    assert runs.thresholds.tolist() == [0.5, 0.1]
    assert (runs.losses() == 0.25).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.to_reader(),
        lambda t: t.combine_chunks().to_batches()[0],
        lambda t: t.to_pydict(),
    ],
    ids=["reader", "batch", "dict"],
)
def test_other_arrow_objects_and_dicts_are_tables_too(make):
    same(
        Runs.from_frame(make(pa.Table.from_pandas(table(), preserve_index=False))),
        Runs.from_frame(table()),
    )


def test_the_index_of_a_frame_and_columns_of_no_name_known_here_mean_nothing():
    frame = table(note="x")
    frame.index = [3] * len(frame)
    same(Runs.from_frame(frame), Runs.from_frame(table()))


def test_a_lazy_frame_is_refused_and_not_collected():
    with pytest.raises(RiskcalError, match=r"^table: a LazyFrame is not a table"):
        Runs.from_frame(polars.from_pandas(table()).lazy())


# Round trips


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
id_lists = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=5, unique=True),
    st.lists(texts, min_size=2, max_size=5, unique=True),
    st.lists(st.sampled_from(["007", "7", "null", "NA", "nan", "None", "true", "1e3", " 7", "a,b", 'q"uote', "full", "-0"]),
             min_size=2, max_size=5, unique=True),
)  # fmt: skip


@st.composite
def any_runs(draw):
    prompts = draw(id_lists)
    n, k = len(prompts), draw(st.integers(1, 4))
    grid = draw(st.lists(st.floats(-2, 2), min_size=k, max_size=k, unique=True))
    unit = st.floats(0, 1)

    def matrix(elements, width):
        return np.array(
            draw(st.lists(elements, min_size=n * width, max_size=n * width)), dtype=float
        ).reshape(n, width)

    full = draw(st.booleans())
    values = {"dissimilarity": matrix(unit, k)} if draw(st.booleans()) else {}
    values |= {"risk": matrix(unit, k)} if not values or draw(st.booleans()) else {}
    values |= {"layers": matrix(st.floats(0, 1e6), k)} if draw(st.booleans()) else {}
    values |= {"tokens": matrix(st.integers(0, 500), k)} if draw(st.booleans()) else {}
    values |= {"seconds": matrix(st.floats(0, 1e9), k)} if draw(st.booleans()) else {}
    if full:
        extra = {
            name: np.zeros((n, 1)) if name == "dissimilarity" else value[:, :1]
            for name, value in values.items()
        }
        values = {name: np.c_[value, extra[name]] for name, value in values.items()}
        grid = [*grid, math.inf]
    labels = {}
    if draw(st.booleans()):
        labels["cluster"] = draw(st.sampled_from([[1, 2], ["x", "y y"]])) * n
    if draw(st.booleans()):
        labels["group"] = draw(st.sampled_from([["a", ""], ["1", "2"], [1, 2]])) * n
    labels = {name: np.array(label[:n]) for name, label in labels.items()}
    if not full and "risk" in values and draw(st.booleans()):
        labels["full_risk"] = np.array(draw(st.lists(unit, min_size=n, max_size=n)))
    provenance = draw(
        st.sampled_from([{}, {"source": "replayed"}, {"source": "replayed", "exact": True}])
    )
    ids = np.array(prompts, dtype=object if isinstance(prompts[0], str) else np.int64)
    return Runs.from_arrays(thresholds=grid, prompts=ids, **labels, **provenance, **values)


@settings(max_examples=80)
@given(any_runs(), st.sampled_from(FILES))
def test_runs_come_back_from_every_format_as_they_were(tmp_path_factory, runs, ending):
    path = tmp_path_factory.mktemp("trip") / f"runs.{ending}"
    runs.write(path)
    back = Runs.read(path)
    assert [str(i) for i in back.prompts] == [str(i) for i in runs.prompts]
    assert back.thresholds.tolist() == runs.thresholds.tolist()
    for name, value in runs.values.items():
        assert np.array_equal(back.values[name], value), name
    assert back.full.keys() == runs.full.keys()
    assert (back.full_risk is None) == (runs.full_risk is None)
    if runs.full_risk is not None:
        assert np.array_equal(back.full_risk, runs.full_risk)
    assert (back.source, back.exact) == (runs.source, runs.exact)
    assert back.digest() == runs.digest()
    if ending != "csv" or isinstance(runs.prompts[0], str) is isinstance(back.prompts[0], str):
        assert back.prompts.tolist() == runs.prompts.tolist()
    if ending != "csv":
        assert {n: v.tolist() for n, v in back.labels.items()} == {
            n: v.tolist() for n, v in runs.labels.items()
        }


@pytest.mark.parametrize("ending", FILES)
def test_integers_come_back_as_integers_and_strings_of_digits_with_zeros_as_strings(
    ending, tmp_path
):
    for ids, kind in (([7, 10, 2**63 - 1], "i"), (["007", "7", "x"], "O"), (["7", "8", "-0"], "O")):
        runs = Runs.from_frame(table(ids=ids))
        runs.write(tmp_path / f"runs.{ending}")
        back = Runs.read(tmp_path / f"runs.{ending}")
        assert back.prompts.dtype.kind == kind
        same(back, runs)


@pytest.mark.parametrize("ending", [*FILES, "csv.gz"])
@pytest.mark.parametrize(
    "variants",
    [["007", "008"], ["1", "2"], ["true", "false"], ["2020-01-01", "2020-01-02"], ["00:10", "00:20"],
     ["0.5", "full"], ['a "b", c', "d"], [True, False], [4, 5], [0.5, 4]],
    ids=str,
)  # fmt: skip
def test_settings_of_any_type_come_back_as_they_were(variants, ending, tmp_path):
    name = "threshold_2" if "full" in variants else "variant"
    cells = [None, *variants]
    frame = pd.DataFrame(
        [
            {"prompt": i, "threshold": 0.5 if cell is not None else math.inf, "dissimilarity": 0.0}
            | {name: cell}
            for i in range(3)
            for cell in cells
        ]
    ).astype({name: object})
    runs = Runs.from_frame(frame, candidate_columns=[name])
    runs.write(path := tmp_path / f"runs.{ending}")
    back = Runs.read(path, candidate_columns=[name])
    assert back.candidates[name].tolist() == runs.candidates[name].tolist()
    assert back.digest() == runs.digest()
    without = Runs.from_frame(
        frame[frame["threshold"] < math.inf].infer_objects(), candidate_columns=[name]
    )
    assert without.candidates.equals(back.candidates)


def test_a_csv_of_others_is_read_as_before(tmp_path):
    (path := tmp_path / "runs.csv").write_text(
        '"prompt","threshold","temperature","dissimilarity"\n"a","0.5","4.0","0"\n"b","0.5","4.0","0"\n'
    )
    assert Runs.read(path).candidates["temperature"].tolist() == [4.0]


@pytest.mark.parametrize("ending", FILES)
def test_ids_with_line_ends_quotes_and_separators_come_back(ending, tmp_path):
    """A bare carriage return ends a row of CSV for some readers, quoted by the writer or not."""
    runs = Runs.from_frame(
        table(ids=["\r", "a\rb", "a\r\nb", "\n", 'q"', '"', "a,b", ";", "\t", " ", "#"])
    )
    runs.write(tmp_path / f"runs.{ending}")
    same(Runs.read(tmp_path / f"runs.{ending}"), runs)


def test_json_lines_say_full_and_hold_no_infinity(tmp_path):
    Runs.from_frame(table()).write(tmp_path / "runs.jsonl")
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["threshold"] for row in rows].count("full") == 3
    assert {type(row["threshold"]) for row in rows} == {str, float}
    assert all(row["source"] == "generated" for row in rows)


@pytest.mark.parametrize("ending", FILES)
def test_further_coordinates_come_back(ending, tmp_path):
    rows = [
        {"prompt": p, "threshold": t, "measure": m, "min_layer": 2, "temperature": tau, "draft": d, "dissimilarity": 0.1}
        for p in (1, 2) for t in (0.9, 0.5) for m in ("softmax", "state") for tau in (4.0, 0.5) for d in ("x", "y")
    ]  # fmt: skip
    runs = Runs.from_frame(pd.DataFrame(rows), candidate_columns=["draft"])
    assert runs.k == 16
    assert runs.coordinates == ["threshold", "temperature", "measure", "draft"]
    runs.write(tmp_path / f"runs.{ending}")
    same(Runs.read(tmp_path / f"runs.{ending}", candidate_columns=["draft"]), runs)
    with pytest.raises(RiskcalError, match=r"stands twice.* tells them apart in candidate_columns"):
        Runs.read(tmp_path / f"runs.{ending}")


@pytest.mark.parametrize("ending", FILES)
def test_a_coordinate_that_some_candidates_lack_tells_them_apart(ending, tmp_path):
    frame = pd.concat([table(full=False, temperature=math.nan), table(full=False, temperature=4.0)])
    runs = Runs.from_frame(frame)
    assert runs.k == 4
    runs.write(tmp_path / f"runs.{ending}")
    same(Runs.read(tmp_path / f"runs.{ending}"), runs)


def test_tokens_that_are_no_whole_numbers_are_kept_as_they_are(tmp_path):
    for tokens in (3.5, 3.0):
        runs = Runs.from_frame(table(tokens=tokens))
        runs.write(tmp_path / "runs.csv")
        assert (Runs.read(tmp_path / "runs.csv").values["tokens"] == tokens).all()
    assert pd.api.types.is_integer_dtype(runs.to_frame()["tokens"])


def test_the_digest_tells_any_other_record_apart():
    frames = [
        table(), table(full=False), table().assign(source="replayed"), table().assign(source="replayed", exact=True),
        table(ids=("a", "b", "d")), table().assign(group=["x"] * 3 + ["y"] * 6), changed(4, dissimilarity=0.1100000001)(table()),
        changed(4, layers=7.5)(table()), table().drop(columns="risk"), changed(3, risk=0.11)(table()),
        table().assign(threshold=table()["threshold"].replace(0.5, 0.4)), table().assign(cluster=table()["prompt"]),
        table().rename(columns={"layers": "seconds"}),
    ]  # fmt: skip
    digests = [Runs.from_frame(frame).digest() for frame in frames]
    assert len(set(digests)) == len(digests)


# Order


@settings(max_examples=40)
@given(st.data())
def test_the_order_of_rows_never_matters(data):
    runs = data.draw(any_runs())
    frame = runs.to_frame()
    order = data.draw(st.permutations(range(len(frame))))
    shuffled = Runs.from_frame(frame.iloc[list(order)])
    same(shuffled, runs)
    objectives = ["textual"] if "dissimilarity" in runs.values else []
    objectives += (
        ["risk", "risk_clipped"] if "risk" in runs.values and runs.full_risk is not None else []
    )
    for objective in objectives:
        assert np.array_equal(shuffled.losses(objective), runs.losses(objective))


def test_the_tested_order_is_the_hash_of_the_salt_and_the_id():
    ids = ["b", "a", "é", "10", "2"]
    salt = b"riskcal: order of prompts, version 1\x00"
    expected = sorted(
        ids, key=lambda i: hashlib.blake2b(salt + i.encode(), digest_size=16).digest()
    )
    assert [ids[i] for i in records.tested_order(ids)] == expected
    numbers = np.array([10, 2, -3])
    expected = sorted(
        [10, 2, -3], key=lambda i: hashlib.blake2b(salt + str(i).encode(), digest_size=16).digest()
    )
    assert numbers[records.tested_order(numbers)].tolist() == expected


def test_the_tested_order_is_frozen():
    """Were it to change between releases, certificates could not be checked again; choosing among orders is cheating."""
    assert records.tested_order(range(12)).tolist() == [0, 10, 6, 3, 8, 9, 11, 1, 2, 4, 7, 5]


@given(id_lists, st.data())
def test_the_tested_order_depends_on_the_ids_alone(ids, data):
    """On no other prompt, no position and no loss: any two prompts stand the same way round in any company."""
    order = [ids[i] for i in records.tested_order(np.array(ids, dtype=object))]
    kept = (
        data.draw(st.lists(st.sampled_from(ids), min_size=2, unique=True)) if len(ids) > 2 else ids
    )
    again = [kept[i] for i in records.tested_order(np.array(kept, dtype=object))]
    assert again == [i for i in order if i in kept]


def test_changing_every_loss_leaves_the_order_of_prompts():
    rng = np.random.default_rng(0)
    names = [f"prompt-{i}" for i in range(50)]
    orders = {
        tuple(
            Runs.from_arrays(
                thresholds=[0.5], dissimilarity=rng.random((50, 1)), prompts=names
            ).prompts
        )
        for _ in range(5)
    }
    assert len(orders) == 1
    assert orders.pop() != tuple(names)


@pytest.mark.parametrize("n", [10, 1000, 3000])
def test_the_tested_order_looks_random_next_to_ids_that_count_up(n):
    order = records.tested_order(np.arange(n))
    assert sorted(order.tolist()) == list(range(n))
    if n >= 1000:
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / math.sqrt(n)
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 4 / math.sqrt(n)


def test_the_order_and_the_digest_do_not_depend_on_the_process(tmp_path):
    runs = Runs.from_frame(table())
    runs.write(tmp_path / "runs.parquet")
    code = "import sys, riskcal; r = riskcal.Runs.read(sys.argv[1]); print(r.digest(), *r.prompts)"
    command = [sys.executable, "-c", code, str(tmp_path / "runs.parquet")]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    printed = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert printed.split() == [runs.digest(), *runs.prompts]


def test_candidates_stand_from_the_highest_threshold_down():
    runs = Runs.from_arrays(
        thresholds=[0.2, 1.0, -1.0, 0.5], dissimilarity=[[0.2, 1.0, 0.0, 0.5]] * 2
    )
    assert runs.thresholds.tolist() == [1.0, 0.5, 0.2, -1.0]
    assert runs.losses().tolist() == [[1.0, 0.5, 0.2, 0.0]] * 2
    assert runs.candidates["threshold"].tolist() == runs.thresholds.tolist()


# Losses


def test_each_objective_is_its_formula():
    runs = Runs.from_frame(table())
    risk, full = runs.values["risk"], runs.full["risk"][:, None]
    assert np.array_equal(runs.losses(), runs.values["dissimilarity"])
    assert np.array_equal(runs.losses("risk"), risk - full)
    assert np.array_equal(runs.losses("risk_clipped"), np.maximum(risk - full, 0))
    by_prompt = {p: runs.losses("risk")[i].tolist() for i, p in enumerate(runs.prompts)}
    assert by_prompt["b"] == pytest.approx([0.155 + 0.0 - 0.1, 0.205 - 0.1])


def test_improvements_count_in_risk_and_not_in_risk_clipped():
    runs = Runs.from_arrays(
        thresholds=[0.5, math.inf], risk=[[0.1, 0.4], [0.9, 0.4]], prompts=["a", "b"]
    )
    by_prompt = dict(zip(runs.prompts, runs.losses("risk")[:, 0], strict=True))
    assert by_prompt == {"a": pytest.approx(-0.3), "b": pytest.approx(0.5)}
    clipped = dict(zip(runs.prompts, runs.losses("risk_clipped")[:, 0], strict=True))
    assert clipped == {"a": 0.0, "b": pytest.approx(0.5)}


def test_a_full_risk_column_is_as_good_as_full_rows():
    with_rows = Runs.from_frame(table())
    full_risk = dict(zip(with_rows.prompts, with_rows.full_risk, strict=True))
    frame = table(full=False)
    with_column = Runs.from_frame(frame.assign(full_risk=frame["prompt"].map(full_risk)))
    both = Runs.from_frame(table().assign(full_risk=table()["prompt"].map(full_risk)))
    for objective in ("risk", "risk_clipped"):
        assert np.array_equal(with_column.losses(objective), with_rows.losses(objective))
        assert np.array_equal(both.losses(objective), with_rows.losses(objective))
    assert not with_column.full


@pytest.mark.parametrize("objective", ["textual", "risk", "risk_clipped"])
def test_losses_are_averaged_within_clusters_and_clipped_before(objective):
    rng = np.random.default_rng(1)
    n = 40
    cluster = np.array([f"c{i}" for i in rng.integers(0, 9, n)])
    risk, full = rng.random((n, 2)), rng.random(n)
    values = {"dissimilarity": np.c_[rng.random((n, 2)), np.zeros(n)], "risk": np.c_[risk, full]}
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.5, math.inf], cluster=cluster, layers=rng.random((n, 3)), **values
    )
    prompts = Runs.from_arrays(thresholds=[0.9, 0.5, math.inf], **values)
    per_prompt = dict(zip(prompts.prompts.tolist(), prompts.losses(objective), strict=True))
    names = np.unique(cluster)
    assert runs.n == len(names)
    assert runs.units.tolist() == names[records.tested_order(names)].tolist()
    for unit, row in zip(runs.units, runs.losses(objective), strict=True):
        expected = np.mean([per_prompt[i] for i in np.flatnonzero(cluster == unit)], axis=0)
        assert row == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_means_of_costs_are_over_units_too():
    layers = np.array([[1.0], [2.0], [9.0]])
    runs = Runs.from_arrays(
        thresholds=[0.5], dissimilarity=np.zeros((3, 1)), layers=layers, cluster=["x", "x", "y"]
    )
    assert runs.mean_costs()["layers"].tolist() == [pytest.approx((1.5 + 9) / 2)]


def test_equal_texts_under_two_ids_are_warned_about_unless_they_share_a_cluster():
    text = ["t"] * 6 + ["u"] * 3
    with pytest.warns(UserWarning, match=r"^text: prompt 'b' repeats an earlier prompt's text"):
        Runs.from_frame(table(text=text))
    with pytest.warns(UserWarning, match=r"^text: prompt 'b' repeats"):
        Runs.from_frame(table(text=text, cluster=["x"] * 3 + ["y"] * 6))
    Runs.from_frame(table(text=text, cluster=["x"] * 6 + ["y"] * 3))  # a warning here is an error
    Runs.from_frame(table(text=["t"] * 3 + ["u"] * 3 + ["v"] * 3))


# Arrays


def test_arrays_say_what_the_long_table_says():
    long = Runs.from_frame(table())
    values = {name: np.c_[long.full[name], value] for name, value in long.values.items()}
    same(
        Runs.from_arrays(
            thresholds=[math.inf, 0.9, 0.5],
            prompts=long.prompts,
            group=long.labels["group"],
            **values,
        ),
        long,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dissimilarity": [[0.1, math.nan], [0.1, 0.1]]}, "dissimilarity: nan at index [0, 1]"),
        ({"dissimilarity": [[0.1, 0.1], [1.1, 0.1]]}, "dissimilarity: 1.1 at index [1, 0] is outside [0, 1]"),
        ({"risk": [[0.1, 0.1], [0.1, -0.1]]}, "risk: -0.1 at index [1, 1] is outside [0, 1]"),
        ({"layers": [[1.0, 1.0], [math.inf, 1.0]]}, "layers: inf at index [1, 0]"),
        ({"layers": [[1.0, -1.0], [1.0, 1.0]]}, "layers: -1.0 at index [0, 1]"),
        ({"dissimilarity": [["a", "b"], ["c", "d"]]}, "dissimilarity: not an array of numbers"),
        ({"dissimilarity": [0.1, 0.2]}, "dissimilarity: has shape (2,)"),
        ({"dissimilarity": [[0.1], [0.2]]}, "dissimilarity: has shape (2, 1)"),
        ({"risk": [[0.1, 0.2]]}, "risk: has shape (1, 2); expected (2, 2)"),
        ({"dissimilarity": [[0.1, 0.1]]}, "prompt: only 1 prompt"),
        ({"thresholds": [0.5, 0.5]}, "thresholds: 0.5 is given more than once"),
        ({"thresholds": [0.5, math.nan]}, "thresholds: nan at index 1"),
        ({"thresholds": [0.5, -math.inf]}, "thresholds: -inf at index 1"),
        ({"thresholds": [True, False]}, "thresholds: not an array of numbers"),
        ({"thresholds": [math.inf, 0.5]}, "dissimilarity: 0.1 at row 0, a full-model row"),
        ({"prompts": ["a"]}, "prompts: has shape (1,); expected (2,)"),
        ({"prompts": ["a", "a"]}, "prompts: 'a' stands twice, again at index 1"),
        ({"prompts": [1, "1"]}, "prompts: '1' at row 1, in a column of type object"),
        (
            {"prompts": ["1", "1", "2"], "dissimilarity": [[0.1, 0.2]] * 3},
            "prompts: '1' stands twice, again at index 1 (1 such rows)",
        ),
        ({"prompts": "ab"}, "prompts: has shape ()"),
        ({"prompts": [0.5, 1.5]}, "prompts: 0.5 at row 0"),
        ({"seconds": [[1, 1], [1, math.nan]]}, "seconds: nan at index [1, 1] (1 such values); a cost"),
        (
            {"failed": [[True, False]] * 2, "dissimilarity": [[math.nan, 0], [math.nan] * 2]},
            "dissimilarity: nan at index [1, 1] (1 such values), which did not fail",
        ),
        ({"group": "a"}, "group: has shape ()"),
        ({"full_risk": [0.1, 1.1]}, "full_risk: 1.1 at row 1"),
        ({"full_risk": [0.1]}, "full_risk: has shape (1,)"),
        ({"accuracy": [[0.1, 0.1]] * 2}, "argument: 'accuracy' is unknown"),
        ({"source": "guessed"}, "source: 'guessed'"),
        ({"exact": "yes"}, "exact: 'yes'"),
    ],
)  # fmt: skip
def test_arrays_that_are_wrong_are_refused_by_name_and_index(change, named):
    with pytest.raises(RiskcalError) as refusal:
        Runs.from_arrays(**({"thresholds": [0.9, 0.5], "dissimilarity": [[0.1, 0.2]] * 2} | change))
    assert str(refusal.value).startswith(named)


def test_no_values_at_all_are_refused():
    with pytest.raises(RiskcalError, match=r"^dissimilarity, risk: neither is given"):
        Runs.from_arrays(thresholds=[0.5])


def test_ids_that_look_alike_to_a_person_stay_apart():
    ids = ["é", "e\u0301", "a", "a ", "A", "\u0430", "0", "00"]  # the sixth is Cyrillic
    runs = Runs.from_arrays(thresholds=[0.5], dissimilarity=np.arange(8)[:, None] / 8, prompts=ids)
    assert sorted(runs.prompts) == sorted(ids)
    values = dict(zip(runs.prompts, runs.losses()[:, 0], strict=True))
    assert values == {name: i / 8 for i, name in enumerate(ids)}


# Files


ONE_ROW = b'{"prompt": "a", "threshold": 0.5, "risk": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("runs.csv", b"", "the file is empty"),
        ("runs.parquet", b"", "the file is empty"),
        ("runs.jsonl", b"", "the file is empty"),
        ("runs.csv", b"prompt,threshold,dissimilarity\n", "prompt: the table is empty"),
        ("runs.jsonl", b"\n  \n", "prompt: the column is missing"),
        ("runs.csv", b"prompt;threshold;dissimilarity\na;0.5;0.1\n", "its columns are parted by ';', not by commas."),
        ("runs.csv", b"prompt,threshold,dissimilarity\na,0.5,0.1,9\n", "not a readable csv file"),
        ("runs.csv", b"prompt,threshold,dissimilarity\n\xe9,0.5,0.1\n", "not a readable csv file"),
        ("runs.csv", b"prompt,threshold,dissimilarity\na,0.5,\nb,0.5,0.1\n", "dissimilarity: nan at row 0"),
        ("runs.csv", b"prompt,threshold,dissimilarity\na,,0.1\nb,0.5,0.1\n", "threshold: '' at row 0"),
        ("runs.csv", b"prompt,threshold,dissimilarity\n,0.5,0.1\nb,0.5,0.1\n", "prompt: missing (an empty text) at row 0"),
        ("runs.csv", b"prompt,prompt,threshold,dissimilarity\na,a,0.5,0.1\nb,b,0.5,0.1\n", "prompt: two columns have this name"),
        ("runs.csv", b"prompt,threshold,risk,risk\na,0.5,0.1,0.1\nb,0.5,0.1,0.1\n", "risk: two columns have this name"),
        ("runs.jsonl", b'{"prompt": 1, "threshold": 0.5, "dissimilarity": 0.1}\n{"prompt"\n', "row 1 is not JSON"),
        ("runs.jsonl", b"[1]\n", "row 0 is not a JSON object"),
        ("runs.jsonl", b'{"prompt": "\xe9"}\n', "is not UTF-8 text"),
        ("runs.jsonl", b'{"prompt": "a", "threshold": -Infinity, "dissimilarity": 0}\n', "threshold: -inf at row 0"),
        ("runs.jsonl", b'{"prompt": "a", "threshold": 0.5, "dissimilarity": Infinity}\n', "dissimilarity: inf at row 0"),
        ("runs.jsonl", b'{"prompt": "a", "threshold": 0.5, "risk": NaN}\n', "risk: nan at row 0"),
        ("runs.jsonl", ONE_ROW + b'{"prompt": "b", "threshold": 0.5}\n', "risk: nan at row 1"),
        ("runs.jsonl", ONE_ROW + b'{"prompt": 1, "threshold": 0.5, "risk": 0}\n', "prompt: 1 at row 1"),
        ("runs.jsonl", b'{"prompt": "\\ud800", "threshold": 0.5, "risk": 0}\n', "row 0 is not valid Unicode"),
        ("runs.parquet", b"not parquet at all", "not a readable parquet file"),
        ("runs.parquet", b"PAR1\x00\x00\x00\x00PAR1", "cannot be read (Could not open Parquet input source"),
        ("runs.txt", b"x", "unknown ending '.txt'; use .parquet, .csv or .jsonl"),
        ("runs", b"x", "unknown ending ''"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_with_its_name(name, content, named, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RiskcalError) as refusal:
        Runs.read(tmp_path / name)
    assert str(refusal.value).startswith(f"{tmp_path / name}: {named}")
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_and_a_folder_without_records_are_refused(tmp_path):
    with pytest.raises(RiskcalError, match=r"none\.parquet: no such file"):
        Runs.read(tmp_path / "none.parquet")
    with pytest.raises(RiskcalError, match=r"the folder holds no \.parquet, \.csv or \.jsonl file"):
        Runs.read(tmp_path)


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "runs.parquet"
    Runs.from_frame(table()).write(path)
    whole = path.read_bytes()
    for length in [*range(40), *range(40, len(whole), 61), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(RiskcalError, match=r"^.*runs\.parquet: "):
            Runs.read(path)


def test_a_parquet_file_with_flipped_bytes_is_refused_or_read_but_never_fails_otherwise(tmp_path):
    path = tmp_path / "runs.parquet"
    Runs.from_frame(table(ids=[f"p{i}" for i in range(40)])).write(path)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        broken = bytearray(whole)
        for place in rng.integers(len(whole), size=3):
            broken[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(broken))
        try:
            Runs.read(path)
        except RiskcalError:
            refused += 1
    assert refused > 50


def test_csv_quoting_line_ends_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "runs.csv"
    rows = 'prompt,threshold,dissimilarity\n"a, ""x""\ny",0.5,.1\nb,0.5,.2\n'
    for content in (
        rows.encode(),
        rows.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + rows.encode(),
    ):
        path.write_bytes(content)
        runs = Runs.read(path)
        assert sorted(runs.prompts)[1] == "b"
        assert sorted(runs.prompts)[0].replace("\r", "") == 'a, "x"\ny'


def test_columns_that_change_type_far_down_a_csv_are_read(tmp_path):
    rows = "".join(f"{i},0.5,0\n" for i in range(150_000))
    (tmp_path / "runs.csv").write_text("prompt,threshold,dissimilarity\n" + rows + "last,0.5,0.5\n")
    runs = Runs.read(tmp_path / "runs.csv")
    assert runs.n == 150_001
    assert runs.losses().sum() == 0.5
    assert {type(p) for p in runs.prompts[:100]} == {str}


@pytest.mark.parametrize("name", ["prompt", "text", "group"])
def test_line_ends_inside_texts_are_read_in_large_files_too(name, tmp_path):
    """A reader that splits a file into blocks at line ends must not split a text."""
    texts_ = [f"{i}\nline\r\n" + "word, " * 200 for i in range(2500)]
    frame = pd.DataFrame({"prompt": [f"p{i}" for i in range(2500)], "threshold": 0.5, "risk": 0.25})
    frame[name] = texts_
    expected = Runs.from_frame(frame)
    expected.write(tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").stat().st_size > 2**21
    same(Runs.read(tmp_path / "runs.csv"), expected)


def test_a_folder_of_shards_is_one_table(tmp_path):
    frame = table(ids=[f"p{i}" for i in range(6)])
    for shard in range(3):
        write(frame.iloc[6 * shard : 6 * shard + 6], tmp_path / f"part-{shard}.parquet")
    (tmp_path / ".part-9.parquet.1.partial").write_text("cut")
    same(Runs.read(tmp_path), Runs.from_frame(frame))


@pytest.mark.parametrize("ending", FILES)
def test_a_failed_write_leaves_the_old_file_untouched_and_nothing_beside_it(
    ending, tmp_path, monkeypatch
):
    path = tmp_path / f"runs.{ending}"
    old = Runs.from_frame(table())
    old.write(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_replacing.os, "replace", fail)
        with pytest.raises(
            RiskcalError, match=rf"runs\.{ending}: cannot be written \(No space left"
        ):
            Runs.from_frame(table(full=False)).write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", FILES)
def test_a_write_that_breaks_half_way_leaves_the_old_file_untouched(ending, tmp_path, monkeypatch):
    path = tmp_path / f"runs.{ending}"
    Runs.from_frame(table()).write(path)
    before = path.read_bytes()

    def half(*_, **__):
        [partial] = set(tmp_path.iterdir()) - {path}
        partial.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files._parquet, "write", half)
        patch.setattr(pd.DataFrame, "to_csv", half)
        patch.setattr(json, "dumps", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Runs.from_frame(table(full=False)).write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writing_where_there_is_no_folder_or_an_unknown_ending_is_refused(tmp_path):
    runs = Runs.from_frame(table())
    with pytest.raises(RiskcalError, match="cannot be written"):
        runs.write(tmp_path / "nowhere" / "runs.parquet")
    with pytest.raises(RiskcalError, match=r"unknown ending '\.xlsx'"):
        runs.write(tmp_path / "runs.xlsx")
    assert list(tmp_path.iterdir()) == []


# Traces


def trace_arrays(seed=0, lengths=(3, 1, 4), n_layers=3, outcome="agrees", dtype=np.float32):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    confidence = rng.random((n, n_layers)).astype(dtype)
    confidence[0, 0], confidence[1, 0] = math.nan, 1.0
    agrees = rng.random((n, n_layers)) < 0.7
    agrees[:, -1] = True
    return {
        "prompt": np.repeat(
            np.array([f"p{i}" for i in range(len(lengths))], dtype=object), lengths
        ),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "confidence": confidence,
        outcome: agrees if outcome == "agrees" else rng.random((n, n_layers)),
        "group": rng.choice(["a", "b"], n),
    }


def same_traces(a, b):
    assert a.prompt.tolist() == b.prompt.tolist()
    assert a.position.tolist() == b.position.tolist()
    assert np.array_equal(a.confidence, b.confidence, equal_nan=True)
    for name in ("agrees", "loss"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)
    assert (a.group is None) == (b.group is None)
    assert a.group is None or a.group.tolist() == b.group.tolist()


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.parametrize("outcome", ["agrees", "loss"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_traces_come_back_from_every_format(ending, outcome, dtype, tmp_path):
    arrays = trace_arrays(outcome=outcome, dtype=dtype)
    arrays["confidence"][2] = [math.inf, -math.inf, -0.5]
    traces = Traces.from_arrays(**arrays)
    traces.write(tmp_path / f"traces.{ending}")
    back = Traces.read(tmp_path / f"traces.{ending}")
    same_traces(back, traces)
    if ending == "parquet":
        assert back.confidence.dtype == dtype


@given(st.permutations(range(8)))
def test_the_order_of_a_traces_rows_never_matters(order):
    arrays = trace_arrays()
    shuffled = {name: value[list(order)] for name, value in arrays.items()}
    same_traces(Traces.from_arrays(**shuffled), Traces.from_arrays(**arrays))


def test_traces_stand_by_prompt_in_tested_order_and_then_by_position():
    traces = Traces.from_arrays(**trace_arrays())
    names = np.unique(traces.prompt)
    expected = [
        name
        for name in names[records.tested_order(names)]
        for _ in range({"p0": 3, "p1": 1, "p2": 4}[name])
    ]
    assert traces.prompt.tolist() == expected
    assert traces.n_layers == 3


@pytest.mark.parametrize(
    "make",
    [pa.Table.from_pandas, polars.from_pandas, pd.DataFrame],
    ids=["pyarrow", "polars", "pandas"],
)
def test_traces_are_read_from_any_table(make):
    traces = Traces.from_arrays(**trace_arrays())
    same_traces(Traces.from_frame(make(traces.to_frame())), traces)


def test_positions_of_a_nullable_type_are_positions():
    frame = Traces.from_arrays(**trace_arrays()).to_frame()
    same_traces(
        Traces.from_frame(frame.assign(position=frame["position"].astype("Int64"))),
        Traces.from_frame(frame),
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"confidence": None}, "confidence: the column is missing"),
        ({"agrees": None}, "agrees, loss: give exactly one"),
        ({"loss": np.zeros((8, 3))}, "agrees, loss: give exactly one"),
        (
            {"confidence": np.zeros((8, 2))},
            "confidence: has shape (8, 2), but agrees has (8, 3)",
        ),
        ({"confidence": np.zeros(8)}, "confidence: has shape (8,)"),
        ({"confidence": [["a"] * 3] * 8}, "confidence: not an array of numbers"),
        (
            {"confidence": [[0.1]] * 7 + [[0.1, 0.2]]},
            "confidence: row 0 holds 1 exits, but agrees 3",
        ),
        ({"agrees": np.full((8, 3), 0.5)}, "agrees: 0.5 at index [0, 0]; it is true or false"),
        ({"agrees": np.full((8, 3), math.nan)}, "agrees: NaN at index [0, 0]"),
        ({"agrees": None, "loss": np.full((8, 3), math.nan)}, "loss: NaN at index [0, 0]"),
        (
            {"agrees": None, "loss": np.full((8, 3), 1.1)},
            "loss: 1.1 at index [0, 0] is outside [0, 1]",
        ),
        ({"position": np.zeros(8, dtype=int)}, "position: 0 of prompt 'p"),
        ({"position": np.zeros(8)}, "position: give whole numbers"),
        ({"position": -np.arange(8)}, "position: give whole numbers"),
        ({"position": np.zeros((8, 1), dtype=int)}, "position: has shape (8, 1)"),
        ({"position": np.arange(7)}, "position: has shape (7,)"),
        ({"prompt": np.arange(7)}, "prompt: has shape (7,)"),
        ({"prompt": [0.5] * 8}, "prompt: 0.5 at row 0"),
        ({"prompt": ["a"] * 7 + [None]}, "prompt: missing at row 7"),
        ({"group": ["a"] * 3}, "group: has shape (3,)"),
    ],
)
def test_traces_that_are_wrong_are_refused_by_name(change, named):
    with pytest.raises(RiskcalError) as refusal:
        Traces.from_arrays(**(trace_arrays() | change))
    assert str(refusal.value).startswith(named)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: f.drop(columns="prompt"), "prompt: the column is missing"),
        (lambda f: f.drop(columns="position"), "position: the column is missing"),
        (lambda f: f.drop(columns="confidence"), "confidence: the column is missing"),
        (lambda f: f.drop(columns="agrees"), "agrees, loss: give exactly one"),
        (lambda f: f.iloc[:0], "prompt: the table is empty"),
        (lambda f: f.assign(confidence=0.5), "confidence: 0.5 at row 0"),
        (
            lambda f: f.assign(confidence=[[0.5] * 3] * 7 + [[0.5]]),
            "confidence: row 7 holds 1 exits, but agrees 3 (1 such rows)",
        ),
        (
            lambda f: f.assign(confidence=[["a"] * 3] * 8),
            "confidence: not an array of numbers ('a' at",
        ),
        (
            lambda f: f.drop(columns="confidence").assign(confidence_1=0.5, confidence_3=0.5),
            "confidence: columns for the exits [1, 3]; number them from confidence_1 on",
        ),
        (
            lambda f: f.drop(columns="confidence").assign(confidence_1=0.5, confidence_01=0.5),
            "confidence: confidence_01 and confidence_1 are of one exit; rename or drop one.",
        ),
        (
            lambda f: f.drop(columns="confidence").assign(
                confidence_0=0.5, confidence_1=0.5, confidence_2=0.5
            ),
            "confidence: columns for the exits [0, 1, 2]",
        ),
    ],
)
def test_tables_of_traces_that_are_wrong_are_refused_by_name(change, named, tmp_path):
    frame = change(Traces.from_arrays(**trace_arrays()).to_frame())
    with pytest.raises(RiskcalError) as refusal:
        Traces.from_frame(frame)
    assert str(refusal.value).startswith(named)
    write(frame, tmp_path / "traces.parquet")
    with pytest.raises(RiskcalError) as refusal:
        Traces.read(tmp_path / "traces.parquet")
    assert str(refusal.value).startswith(f"{tmp_path / 'traces.parquet'}: {named}")


def test_exits_spread_over_columns_stand_by_number_and_not_by_name():
    """Eleven exits: confidence_10 comes after confidence_9."""
    arrays = trace_arrays(n_layers=11)
    traces = Traces.from_arrays(**arrays)
    columns = {
        f"{name}_{i + 1}": arrays[name][:, i]
        for name in ("agrees", "confidence")
        for i in reversed(range(11))
    }
    frame = pd.DataFrame(
        {
            "prompt": arrays["prompt"],
            "position": arrays["position"],
            "group": arrays["group"],
            **columns,
        }
    )
    same_traces(Traces.from_frame(frame), traces)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"agrees": [[True, True], [True, "yes"]]}, r"agrees: .*'yes' at index \[1, 1\]\).* write 1 where"),
        ({"confidence": [[0.5, "50%"], [0.5, 0.5]]}, r"confidence: .*'50%' at index \[0, 1\]\).* a number"),
        (
            {"agrees": [[True], [True, True]], "confidence": [[0.5], [0.5, "sure"]]},
            r"confidence: .*'sure' at index \[1, 1\]\)\. It is a text: write numbers",
        ),
    ],
)  # fmt: skip
def test_texts_among_numbers_per_exit_are_refused_by_place(change, named):
    given = {"confidence": [[0.5, 1.0]] * 2, "agrees": [[True, True]] * 2} | change
    for make in (Traces.from_arrays, lambda **columns: Traces.from_frame(columns)):
        with pytest.raises(RiskcalError, match=named):
            make(prompt=[1, 2], position=[0, 0], **given)


@pytest.mark.parametrize("number", ["{:02d}", "{:03d}", "\N{ARABIC-INDIC DIGIT ZERO}{}"])
def test_exits_may_be_numbered_with_zeros_before(number, tmp_path):
    ends = [number.format(i) for i in range(1, 4)]
    values = {"confidence": [0.1, 0.9, 1.0], "agrees": [True] * 3, "cost": [1, 2, 3]}
    frame = pd.DataFrame({"prompt": [1, 2], "position": 0})
    for name, cells in values.items():
        frame = frame.assign(**{f"{name}_{end}": c for end, c in zip(ends, cells, strict=True)})
    traces = Traces.from_frame(frame)
    assert traces.confidence.tolist() == [values["confidence"]] * 2
    assert traces.costs["cost"].tolist() == [values["cost"]] * 2
    others = frame.rename(columns=lambda name: name.replace("confidence", "conf"))
    same_traces(Traces.from_frame(others, columns={"confidence": "conf"}), traces)
    frame.to_csv(path := tmp_path / "traces.csv", index=False)
    with pytest.raises(RiskcalError, match=r"riskcal.Traces.read reads"):
        Runs.read(path)
    with pytest.raises(RiskcalError, match=r"riskcal.Traces.read reads"):
        Runs.from_frame(frame.rename(columns=lambda name: name.replace(ends[0], "0")))


def test_a_last_exit_that_disagrees_with_itself_is_warned_about_and_counts_as_a_loss():
    arrays = {"prompt": [0, 0, 1], "position": [0, 1, 0], "confidence": np.full((3, 2), 0.5)}
    with pytest.warns(UserWarning, match="agrees: false at row 1 for the last exit"):
        traces = Traces.from_arrays(**arrays, agrees=[[True, True], [True, False], [True, True]])
    runs = replay_traces(traces, [0.9])
    assert sorted(runs.losses("textual")[:, 0]) == [0.0, 0.5]
    assert not runs.full["dissimilarity"].any()


@pytest.mark.parametrize("failures", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_runs_of_matrices_are_those_of_the_long_table(failures, full, named):
    rng = np.random.default_rng(5)
    grid = np.array([0.3, math.inf, 0.9, 0.5] if full else [0.3, 0.9, 0.5, 0.7])
    matrices = {name: rng.random((40, 4)) for name in ("dissimilarity", "risk", "layers")}
    matrices["dissimilarity"][:, np.isinf(grid)] = 0.0
    if failures:
        matrices["failed"] = rng.random((40, 4)) < 0.2
    labels = {"prompt": [f"p{i}" for i in rng.permutation(40)]} if named else {}
    labels |= {"group": np.array(["a", "b"])[rng.integers(0, 2, 40)], "cluster": np.arange(40) // 2}
    if not full:
        labels["full_risk"] = rng.random(40)
    table = pd.DataFrame(
        {name: np.repeat(label, 4) for name, label in ({"prompt": np.arange(40)} | labels).items()}
        | {name: matrix.ravel() for name, matrix in matrices.items()}
        | {"threshold": np.tile(grid, 40)}
    )
    given = {("prompts" if name == "prompt" else name): label for name, label in labels.items()}
    ours = Runs.from_arrays(thresholds=grid, **matrices, **given)
    theirs = Runs.from_frame(table.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(ours.to_frame(), theirs.to_frame(), check_exact=True)
    assert ours.digest() == theirs.digest()


@pytest.mark.parametrize("ending", ["csv.gz", "csv.zst", "jsonl.gz", "jsonl.zst", "ndjson.gz"])
def test_what_an_ending_says_is_packed_is_written_packed(tmp_path, ending):
    runs = Runs.from_arrays(
        thresholds=[0.5, math.inf], dissimilarity=[[0.25, 0.0], [0.5, 0.0]], prompts=["ä", "b"]
    )
    traces = Traces.from_arrays(
        prompt=["a", "b"], position=[0, 0], confidence=[[0.1, 0.9]] * 2, agrees=[[0, 1]] * 2
    )
    for recorded, name in ((runs, f"runs.{ending}"), (traces, f"traces.{ending}")):
        recorded.write(tmp_path / name)
        assert type(recorded).read(tmp_path / name).to_frame().equals(recorded.to_frame())
        packed = (tmp_path / name).read_bytes()
        assert packed.startswith(
            {"gz": b"\x1f\x8b", "zst": b"\x28\xb5\x2f\xfd"}[ending.split(".")[1]]
        )


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_of_several_files_the_refusal_names_the_one(tmp_path, ending):
    for name, loss in (("1", 0.1), ("2", 1.7), ("3", 0.1)):
        columns = {
            "prompt": [f"{name}a", f"{name}b"],
            "threshold": 0.5,
            "dissimilarity": [0.1, loss],
        }
        write(pd.DataFrame(columns), tmp_path / f"{name}.{ending}")
    named = rf"1\.7 at row 3; .* \(Row 3 of all is row 1 of .*2\.{ending}\.\)$"
    for source in (tmp_path, str(tmp_path / f"*.{ending}"), sorted(tmp_path.iterdir())):
        with pytest.raises(RiskcalError, match=named):
            Runs.read(source)
    with pytest.raises(RiskcalError) as alone:
        Runs.read(tmp_path / f"2.{ending}")
    assert "of all" not in str(alone.value)


def test_of_several_files_of_traces_the_refusal_names_the_one(tmp_path):
    for name, outcome in (("1", 1), ("2", 7)):
        row = {"prompt": name, "position": 0, "confidence": [0.2, 0.9], "agrees": [outcome, 1]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        RiskcalError,
        match=r"agrees: 7 .*index \[1, 0\].* \(Row 1 of all is row 0 of .*2\.jsonl\.\)$",
    ):
        Traces.read(tmp_path)
