"""Large Parquet files are read some prompts at a time: to the bit the runs of the whole table, and its refusals."""

import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from riskcal import RiskcalError, Runs, calibrate
from riskcal.records import files, streaming

GRID = [float("inf"), 0.9, 0.5, 0.1]


def long_table(ids: Any, seed: int = 0, grid: Any = GRID) -> pd.DataFrame:
    """A row of each prompt and threshold, those of a prompt together, with what a recording holds."""
    rng = np.random.default_rng(seed)
    n, k = len(ids), len(grid)
    full = np.tile(np.isposinf(grid), n)
    table = pd.DataFrame({"prompt": np.repeat(np.asarray(ids), k), "threshold": np.tile(grid, n)})
    table["dissimilarity"] = np.where(full, 0.0, rng.random(n * k))
    table["risk"] = rng.random(n * k)
    table["layers"] = rng.integers(1, 12, n * k) / 7
    table["tokens"] = np.repeat(rng.integers(1, 60, n), k)
    return table


def names(n: int) -> list[str]:
    return [f"p{number * 37 % 1009}" for number in range(n)]


def clustered(n: int) -> pd.DataFrame:
    table = long_table(names(n))
    of_prompt = np.repeat(np.arange(n), len(GRID))
    table["cluster"] = [f"c{number % 40}" for number in of_prompt]
    table["group"] = [("short", "long")[number % 2] for number in of_prompt]
    table["text"] = [f"text {number % 40} of {number}" for number in of_prompt]
    return table


def failing(n: int) -> pd.DataFrame:
    table = long_table(range(500, 500 + n))
    table["failed"] = np.random.default_rng(1).random(len(table)) < 0.2
    # the full model fails or not, whatever row says it
    table.loc[table["failed"], "dissimilarity"] = np.nan
    return table


def without_references(n: int) -> pd.DataFrame:
    table = long_table(names(n), grid=GRID[1:]).drop(columns="dissimilarity")
    return table.assign(full_risk=np.repeat(np.random.default_rng(2).random(n), len(GRID) - 1))


def of_two_settings(n: int) -> pd.DataFrame:
    one, other = long_table(names(n)), long_table(names(n), seed=1)
    both = pd.concat([one.assign(min_layer=2), other.assign(min_layer=3)])
    both = both[~(np.isposinf(both["threshold"]) & (both["min_layer"] == 3))]
    return both.sort_values(["prompt", "min_layer"], kind="stable", ignore_index=True)


TABLES = {
    "named": lambda n: long_table(names(n)),
    "numbered": lambda n: long_table(np.random.default_rng(3).permutation(n)),
    "numbered from 1, as texts": lambda n: long_table([str(i + 1) for i in range(n)]),
    "clusters, groups and texts": clustered,
    "outputs that failed": failing,
    "no rows of the full model": without_references,
    "two settings": of_two_settings,
    "an entropy": lambda n: long_table(names(n)).assign(lower_is_stricter=True),
    "a replay": lambda n: long_table(names(n)).assign(source="replayed", exact=True),
}


def same(one: Runs, other: Runs) -> None:
    """To the bit, and of the same types."""
    pairs = [(one.prompts, other.prompts), (one.full_risk, other.full_risk)]
    for name in ("values", "full", "labels"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert list(ours) == list(theirs)
        pairs += [(ours[key], theirs[key]) for key in ours]
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
    pd.testing.assert_frame_equal(one.candidates, other.candidates, check_exact=True)
    for name in ("source", "exact", "stopped", "lower_is_stricter"):
        assert getattr(one, name) == getattr(other, name)
    assert one.digest() == other.digest()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 100 rows are large."""
    monkeypatch.setattr(streaming, "ROWS", 50)


@pytest.fixture
def whole_tables(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was read at once."""
    read, seen = files.read_placed, []

    def watched(source: Any, *more: Any) -> Any:
        seen.append(source)
        return read(source, *more)

    monkeypatch.setattr(files, "read_placed", watched)
    return seen


def write(table: pd.DataFrame, folder: Path, n_files: int) -> Path:
    """In files of whole prompts, of several sizes."""
    folder.mkdir()
    code = pd.factorize(table["prompt"])[0]
    of_file = np.searchsorted(
        np.sort(np.random.default_rng(n_files).choice(code.max(), n_files - 1, replace=False)), code
    )
    for number, part in table.groupby(of_file):
        files.write(part.reset_index(drop=True), folder / f"{number:03}.parquet")
    return folder


@pytest.mark.parametrize("n_files", [1, 7, 60])
@pytest.mark.parametrize("name", TABLES)
def test_runs_are_those_of_the_whole_table(
    tmp_path: Path, small: None, whole_tables: list[Any], name: str, n_files: int
) -> None:
    table = TABLES[name](211)
    found = Runs.read(write(table, tmp_path / "runs", n_files))
    assert whole_tables == []
    same(found, Runs.from_frame(table))


def test_the_policy_and_its_certificate_are_the_same(
    tmp_path: Path, small: None, whole_tables: list[Any]
) -> None:
    table = long_table(range(400))
    table["dissimilarity"] /= 5
    folder = write(table, tmp_path / "runs", 9)
    streamed, whole = (
        calibrate(runs, delta=0.2) for runs in (Runs.read(folder), Runs.from_frame(table))
    )
    assert whole_tables == []
    assert whole.certified
    pd.testing.assert_frame_equal(streamed.table, whole.table, check_exact=True)
    assert streamed.certificate == whole.certificate


def test_names_of_the_log_folders_and_files_that_lack_failures(
    tmp_path: Path, small: None, whole_tables: list[Any]
) -> None:
    a, b = long_table(names(60)[:30]), long_table(names(60)[30:], seed=1)
    b["failed"] = b["risk"] < 0.1
    for group, part in (("a", a), ("b", b)):
        (tmp_path / "runs" / f"group={group}").mkdir(parents=True)
        part = part.assign(dissimilarity=1 - part["dissimilarity"])
        part = part.rename(columns={"prompt": "request", "dissimilarity": "rougeL"})
        files.write(part, tmp_path / "runs" / f"group={group}" / "0.parquet")
    columns: Any = {"prompt": "request", "dissimilarity": ("rougeL", "1 - x")}
    found = Runs.read(tmp_path / "runs", columns=columns)
    assert whole_tables == []
    table = pd.concat([a.assign(group="a", failed=False), b.assign(group="b")])
    table["dissimilarity"] = 1 - (1 - table["dissimilarity"])
    same(found, Runs.from_frame(table))


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(RiskcalError) as refused:
        Runs.read(path, **options)
    return str(refused.value)


SPOILED = {
    "a candidate is missing": lambda t: t.drop(index=402),
    "a row stands twice": lambda t: pd.concat([t, t.iloc[[13]]], ignore_index=True),
    "a distance is too large": lambda t: t.assign(
        dissimilarity=t["dissimilarity"].where(t.index != 641, 1.5)
    ),
    "some were replayed": lambda t: t.assign(
        source=["generated"] * 600 + ["replayed"] * (len(t) - 600)
    ),
    "a reference is missing": lambda t: t.drop(index=700),
    "a prompt is null": lambda t: t.assign(prompt=t["prompt"].where(t.index != 650)),
    "a group changes": lambda t: t.assign(group=np.where(t.index < 553, "a", "b")),
    "nothing was measured": lambda t: t.drop(columns=["dissimilarity", "risk"]),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_refusals_are_those_of_the_whole_table(
    tmp_path: Path, monkeypatch: Any, spoil: Any
) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    table = spoil(long_table(names(200))).reset_index(drop=True)
    for number in range(4):
        part = table.iloc[number * 200 : (number + 1) * 200 if number < 3 else None]
        files.write(part.reset_index(drop=True), folder / f"{number}.parquet")
    right = refusal(folder)
    monkeypatch.setattr(streaming, "ROWS", 50)
    assert refusal(folder) == right


def test_rows_of_a_prompt_may_stand_anywhere(
    tmp_path: Path, small: None, whole_tables: list[Any]
) -> None:
    table = long_table(names(100))
    files.write(table.sample(frac=1, random_state=0), tmp_path / "shuffled.parquet")
    files.write(table.sort_values("threshold", kind="stable"), tmp_path / "sorted.parquet")
    for name in ("shuffled", "sorted"):
        same(Runs.read(tmp_path / f"{name}.parquet"), Runs.from_frame(table))
    assert len(whole_tables) == 2


def test_warnings_are_those_of_the_whole_table(tmp_path: Path, small: None) -> None:
    table = long_table(names(100)).assign(price=np.nan, other="x")
    table.loc[300, "price"] = 3.5
    repeated = np.repeat([f"text {number % 90}" for number in range(100)], len(GRID))
    for more, about in ((table, "price"), (table.assign(text=repeated), "text")):
        files.write(more, tmp_path / "runs.parquet")
        told = []
        for call in (lambda: Runs.read(tmp_path / "runs.parquet"), lambda: Runs.from_frame(more)):  # noqa: B023
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            assert {warning.filename for warning in caught} == {__file__}
            told.append(sorted(str(warning.message) for warning in caught))
        assert told[0] == told[1]
        assert any(about in message for message in told[0])


def test_a_table_of_many_rows_is_read_in_little_more_than_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.parquet"
    grid = [float("inf"), *np.linspace(0.99, 0.01, 20)]
    table = long_table(range(12_000), grid=grid).drop(columns="risk")
    files.write(table, path)
    peaks = [0, 0]
    for number, rows in enumerate((2**30, 2**12)):
        monkeypatch.setattr(streaming, "ROWS", rows)
        Runs.read(path)  # imports are not the call's
        tracemalloc.start()
        runs = Runs.read(path)
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    whole, streamed = peaks
    assert runs.values["tokens"].strides[1] == 0  # one number a prompt
    matrices = runs.values["dissimilarity"].nbytes + runs.values["layers"].nbytes
    assert streamed < 2.5 * matrices
    assert whole > 4 * matrices  # Arrow's memory, which tracemalloc does not see, comes to both
