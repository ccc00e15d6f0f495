"""Files that were damaged: every bit that flips is noticed, or makes no difference."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from riskcal import _parquet
from riskcal._validate import RiskcalError
from riskcal.records import files

RNG = np.random.default_rng(5)
TABLES = {
    "runs": pd.DataFrame(
        {
            "prompt": np.repeat(np.arange(60), 3),
            "cluster": np.repeat([f"c{i // 2}" for i in range(60)], 3),
            "threshold": [float("inf"), 0.9, 0.5] * 60,
            "dissimilarity": RNG.random(180),
            "risk": RNG.random(180).astype(np.float32),
            "measure": pd.Categorical(["softmax"] * 180),
            "group": ["long", None, "short"] * 60,
        }
    ),
    "traces": pd.DataFrame(
        {
            "prompt": np.arange(40) // 2,
            "position": np.arange(40) % 2,
            "confidence": list(RNG.random((40, 4)).astype(np.float32)),
            "agrees": list(RNG.random((40, 4)) < 0.7),
        }
    ),
}


def flipped(content, place):
    broken = bytearray(content)
    broken[place // 8] ^= 1 << place % 8
    return bytes(broken)


@pytest.mark.parametrize("name", TABLES)
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    path = tmp_path / "table.parquet"
    files.write(TABLES[name], path)
    whole, written = path.read_bytes(), files.read(path)
    places = np.random.default_rng(0).choice(8 * len(whole), 400, replace=False)
    refused = 0
    for place in places:
        path.write_bytes(flipped(whole, int(place)))
        try:
            found = files.read(path)
        except RiskcalError as error:
            refused += str(error).startswith(f"{path}: ")
        else:
            pd.testing.assert_frame_equal(found, written, check_exact=True)
    assert refused > 380
    path.write_bytes(whole)
    pd.testing.assert_frame_equal(files.read(path), written, check_exact=True)


def test_every_bit_of_the_pages_is_checked_even_where_the_file_s_own_checksum_is_lost(tmp_path):
    path = tmp_path / "table.parquet"
    files.write(TABLES["runs"], path)
    whole = path.read_bytes().replace(_parquet.KEY, b"another.key....")
    path.write_bytes(whole)
    assert len(files.read(path)) == 180
    column = pa.parquet.read_metadata(path).row_group(0).column(3)  # dissimilarity
    end = column.dictionary_page_offset + column.total_compressed_size
    for place in range(8 * (end - 200), 8 * end, 37):
        path.write_bytes(flipped(whole, place))
        with pytest.raises(RiskcalError, match=r"table\.parquet: cannot be read"):
            files.read(path)


def test_what_to_do_is_said(tmp_path):
    path = tmp_path / "table.parquet"
    files.write(TABLES["runs"], path)
    whole = path.read_bytes()
    # a column that would be left out unseen
    path.write_bytes(whole.replace(b"cluster", b"clustes"))
    with pytest.raises(
        RiskcalError,
        match=r"table\.parquet: is damaged: .* from a copy, or delete it and make it again",
    ):
        files.read(path)
    path.write_bytes(whole)  # the copy
    assert len(files.read(path)) == 180


def test_what_other_programs_write_is_read_as_it_is(tmp_path):
    path = tmp_path / "table.parquet"
    files.write(TABLES["runs"], path)
    table = pa.parquet.read_table(path)
    pa.parquet.write_table(table.slice(0, 90).append_column("more", pa.array(range(90))), path)
    assert files.read(path)["more"].tolist() == list(range(90))
    TABLES["traces"].to_parquet(path)
    assert len(files.read(path)) == 40
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RiskcalError, match="not a readable parquet"):
        files.read(path)


@pytest.mark.parametrize("rows", [0, 1, 70_000])
def test_tables_of_any_length_are_read_back(tmp_path, rows):
    table = pa.table(
        {
            "a": np.arange(rows),
            "b": pa.array([None] * rows),
            "c": pa.array(["0" * 32] * rows, pa.string()),
        }
    )
    _parquet.write(table, tmp_path / "table.parquet")
    assert _parquet.read(tmp_path / "table.parquet").equals(table)
