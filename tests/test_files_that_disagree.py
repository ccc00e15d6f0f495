"""Several files, or parts of one, that write the same thing in different ways: told, never mixed up."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from riskcal import RiskcalError, Runs, calibrate


def table(ids: list[Any], distance: float = 0.1) -> pd.DataFrame:
    return pd.DataFrame(
        {"prompt": ids, "threshold": 0.5, "dissimilarity": np.linspace(0, distance, len(ids))}
    )


@pytest.mark.parametrize("column", ["prompt", "cluster"])
@pytest.mark.parametrize("other", ["007", "7.0", "+7", "7e0", " 7"])
def test_an_id_in_another_writing_is_not_a_second_unit(tmp_path, column, other):
    first, second = table([*range(10)]), table([f"x{i}" for i in range(10)])
    first[column], second[column] = [str(i) for i in range(10)], [other, *map(str, range(10, 19))]
    first["threshold"], second["threshold"] = 0.5, 0.7
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for frame, path in zip((first, second), paths, strict=True):
        frame.to_csv(path, index=False)
    with pytest.raises(RiskcalError, match=f"^{column}: .* may be 7 in another"):
        Runs.read(paths)


def test_ids_of_digits_and_other_texts_are_read_together(tmp_path):
    table([0, 1, 2]).to_csv(tmp_path / "a.csv", index=False)
    table(["007", "x1", "nan", "2e400"]).to_csv(tmp_path / "b.csv", index=False)
    assert Runs.read(tmp_path).n == 7


def test_columns_of_numbered_rows_are_joined_by_their_numbers(tmp_path):
    rows = table([*"abcdefghijkl"])
    columns = json.loads(rows.to_json())
    path = tmp_path / "log.json"
    path.write_text(json.dumps(columns))
    straight = Runs.read(path)
    columns["dissimilarity"] = dict(sorted(columns["dissimilarity"].items()))  # 0, 1, 10, 11, 2
    path.write_text(json.dumps(columns))
    assert Runs.read(path).digest() == straight.digest()


def test_a_split_table_is_told_its_remedy_whatever_its_shape(tmp_path):
    path = tmp_path / "log.json"
    table([*"abc"]).to_json(path, orient="split")  # as many rows as columns
    with pytest.raises(RiskcalError, match="orient='split'"):
        Runs.read(path)


def test_a_broken_document_is_told_where_it_breaks(tmp_path):
    path = tmp_path / "log.json"
    path.write_text('{\n  "prompt": ["a", "b"],\n  "threshold": [0.5 0.5]\n}')
    with pytest.raises(RiskcalError, match="line 3"):
        Runs.read(path)


def test_a_packed_file_is_told_what_is_wrong_inside(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"prompt,threshold,dissimilarity\na,0.5,0.1\nb,0.5\n"))
    with pytest.raises(RiskcalError, match="Expected 3 columns") as refused:
        Runs.read(path)
    assert "let its name end" not in str(refused.value)


def test_a_column_twice_in_one_of_several_files_is_refused_with_the_file(tmp_path):
    table([1, 2]).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "b.csv").write_text("prompt,prompt,threshold,dissimilarity\n3,3,0.5,0.1\n")
    with pytest.raises(RiskcalError, match=r"b\.csv: two columns are called 'prompt'"):
        Runs.read(tmp_path)


def test_an_id_that_reads_like_a_row_does_not_name_the_file(tmp_path):
    good, bad = table([f"q{i}" for i in range(20)]), table(["row 12"])
    bad["dissimilarity"] = 7.0
    bad.to_csv(tmp_path / "a.csv", index=False)
    good.to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(RiskcalError) as refused:
        Runs.read([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert "b.csv" not in str(refused.value)


def test_a_series_of_paths_is_a_list(tmp_path):
    paths = []
    for name in "ab":
        table([f"{name}{i}" for i in range(3)]).to_csv(tmp_path / f"{name}.csv", index=False)
        paths.append(str(tmp_path / f"{name}.csv"))
    assert Runs.read(pd.Series(paths)).n == 6


def test_columns_that_nobody_named_bear_no_thresholds():
    matrix = np.array([[0.0, 1.0], [0.25, 0.5]])
    runs = Runs.from_arrays(thresholds=[1, 0], dissimilarity=pd.DataFrame(matrix))
    assert runs.losses("textual")[:, 0].sum() == 0.25


@pytest.mark.parametrize("names", [["0.5", "0.9"], [0.5, 0.9]])
def test_what_a_table_of_columns_by_threshold_is_told_works(names):
    wide = pd.DataFrame([[0.5, 0.0], [0.25, 0.125]] * 40, columns=names)
    with pytest.raises(
        RiskcalError, match=r"thresholds=\[float\(name\) for name in table.columns\]"
    ):
        Runs.from_arrays(thresholds=[0.9, 0.5], dissimilarity=wide)
    grid = [float(name) for name in wide.columns]
    runs = Runs.from_arrays(thresholds=grid, dissimilarity=wide)
    assert runs.losses("textual")[:, 0].mean() == 0.0625  # of .9
    with pytest.raises(
        RiskcalError, match=r"thresholds=\[float\(name\) for name in table.columns\]"
    ):
        calibrate(wide, delta=0.3)
    assert calibrate(wide.to_numpy(), thresholds=grid, delta=0.3).threshold == 0.9


def test_costs_may_be_named_by_anything_that_yields_names():
    frame = table([*"abcd"]).assign(price=1.0)
    assert "price" in Runs.from_frame(frame, costs=(name for name in ["price"])).costs


def test_scales_of_renamed_columns_are_told_by_the_log_s_name():
    frame = table([*"abcd"]).rename(columns={"dissimilarity": "loss_pct"})
    frame["loss_pct"] = 40.0
    with pytest.raises(RiskcalError, match="by the log's own name of the column"):
        Runs.from_frame(frame, columns={"dissimilarity": "loss_pct"})
    runs = Runs.from_frame(frame, columns={"dissimilarity": ("loss_pct", "x / 100")})
    assert runs.losses("textual").max() == pytest.approx(0.4)


def test_arms_in_a_column_called_policy_are_read_as_told(tmp_path: Path):
    frame = pd.concat([table([*"abcd"]).assign(policy=arm) for arm in "AB"])
    with pytest.raises(
        RiskcalError, match=r"columns=\{'arm': 'policy'\} and candidate_columns=\['arm'\]"
    ):
        Runs.from_frame(frame)
    runs = Runs.from_frame(frame, columns={"arm": "policy"}, candidate_columns=["arm"])
    assert runs.k == 2
