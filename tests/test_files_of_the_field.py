"""Files as programs of the field leave them: JSON under either ending, dialects of CSV, encodings, lists of paths."""

import bz2
import csv
import gzip
import json
import lzma
import math
import os
import pathlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import pytest

from helpers import served
from riskcal import ExitPolicy, RiskcalError, Runs, Traces, load_example, verify
from riskcal.serving import EventLog, read_events


def table(n: int = 6) -> pd.DataFrame:
    return served(n, 3.5)


def named() -> pd.DataFrame:
    """The table with the full model by its word, as JSON has to write it."""
    return table().replace({"threshold": {math.inf: "full"}})


DIGEST = Runs.from_frame(table()).digest()


def followed(path: Path) -> Runs:
    """What the refusal of a file says to do, done to the letter."""
    with pytest.raises(RiskcalError) as refusal:
        Runs.read(path)
    told = re.search(r"(Runs\.from_frame\(.*\))\.$", str(refusal.value))
    assert told is not None, refusal.value
    names = {"Runs": Runs, "pandas": pd, "json": json, "pathlib": pathlib, "path": path}
    found = eval(told[1], names)
    assert isinstance(found, Runs)
    return found


# JSON


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson", "json.gz", "jsonl.gz"])
@pytest.mark.parametrize("form", ["lines", "array", "indented", "lines after a blank one"])
def test_rows_are_read_whichever_way_json_holds_them(
    form: str, ending: str, tmp_path: Path
) -> None:
    """Spark and datasets write lines into .json; a script dumps a list into .jsonl."""
    frame = named()
    text = {
        "lines": frame.to_json(orient="records", lines=True),
        "array": frame.to_json(orient="records"),
        "indented": frame.to_json(orient="records", indent=2),
        "lines after a blank one": "\n" + frame.to_json(orient="records", lines=True),
    }[form]
    path = tmp_path / f"runs.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    assert Runs.read(path).digest() == DIGEST


@pytest.mark.parametrize("write", [pd.DataFrame.to_json, lambda f: json.dumps(f.to_dict("list"))])
def test_json_of_columns_is_a_table(write: Callable[[Any], str], tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(write(named()))
    assert Runs.read(tmp_path / "runs.json").digest() == DIGEST


def test_a_row_that_is_damaged_is_named_in_lines_and_in_arrays(tmp_path: Path) -> None:
    lines = named().to_json(orient="records", lines=True)
    (tmp_path / "torn.json").write_text(lines[:-20])
    with pytest.raises(RiskcalError, match=r"torn\.json: row 17 is not JSON"):
        Runs.read(tmp_path / "torn.json")
    (tmp_path / "mixed.jsonl").write_text(json.dumps([*named().to_dict("records"), 3]))
    with pytest.raises(RiskcalError, match=r"mixed\.jsonl: row 18 is not a JSON object"):
        Runs.read(tmp_path / "mixed.jsonl")


@pytest.mark.parametrize("form", ["lines", "array", "columns"])
def test_an_object_with_a_name_twice_is_refused_rather_than_its_last_taken(
    form: str, tmp_path: Path
) -> None:
    """Some loggers add fields without a look at those that are there; of a CSV two such columns are refused, too."""
    text = named().to_json(
        orient={"lines": "records", "array": "records"}.get(form, form), lines=form == "lines"
    )
    again = text.replace('"layers":', '"dissimilarity":0.0,"layers":', 1)
    assert again != text
    (tmp_path / "runs.json").write_text(again)
    with pytest.raises(RiskcalError, match="'dissimilarity' stands in it 2 times; keep one"):
        Runs.read(tmp_path / "runs.json")
    (tmp_path / "runs.json").write_text(text)
    assert Runs.read(tmp_path / "runs.json").digest() == DIGEST


def test_and_what_nobody_reads_may_have_one(tmp_path: Path) -> None:
    lines = named().to_json(orient="records", lines=True)
    for text in (lines, f"[{','.join(lines.split())}]"):
        (tmp_path / "runs.json").write_text(text.replace("}", ',"meta":{"a":1,"a":2}}'))
        assert Runs.read(tmp_path / "runs.json").digest() == DIGEST


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("thresholds", '{"1": 0.9, "1": 0.1}'),
        ("policy", '{"min_layer": 1, "min_layer": 2}'),
        ("learned", '{"max_risk": 0.1, "max_risk": 0.2}'),
    ],
)
def test_nor_may_a_setting_have_a_name_twice(
    name: str, cell: str, texts: bool, tmp_path: Path
) -> None:
    lines = named().to_json(orient="records", lines=True)
    held = json.dumps(cell) if texts else cell
    (tmp_path / "runs.jsonl").write_text(lines.replace("}", f',"{name}":{held}}}'))
    with pytest.raises(RiskcalError, match=rf"{name}: (.*) at row \d: '(.*)' stands in it 2 times"):
        Runs.read(tmp_path / "runs.jsonl")


def test_nor_may_a_policy(tmp_path: Path) -> None:
    ExitPolicy(threshold=0.5).save(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(text.replace("{", '{"threshold": 0.9,', 1))
    with pytest.raises(RiskcalError, match="'threshold' stands in it 2 times; keep one"):
        ExitPolicy.load(tmp_path / "policy.json")


@pytest.mark.parametrize(
    "write",
    [
        lambda f: json.dumps({"model": "m", "runs": f.to_dict("records")}),
        lambda f: f.to_json(orient="table", index=False),
        lambda f: f.to_json(orient="split"),
    ],
    ids=["rows beside other things", "table", "split"],
)
def test_rows_within_an_object_are_refused_with_the_way_that_reads_them(
    write: Callable[[Any], str], tmp_path: Path
) -> None:
    (tmp_path / "runs.json").write_text(write(named()))
    assert followed(tmp_path / "runs.json").digest() == DIGEST


# CSV


@pytest.mark.parametrize("full", [math.inf, "full"])
@pytest.mark.parametrize("first", ["", "sep=;\n"])
@pytest.mark.parametrize("decimal", [".", ","])
def test_a_csv_of_another_country_is_read_as_its_refusal_says(
    decimal: str, first: str, full: Any, tmp_path: Path
) -> None:
    """A column of numbers and the word full is text, of which pandas' decimal= changes nothing."""
    frame = table()
    texts = [str(t).replace(".", decimal) if t < 1 else str(full) for t in frame["threshold"]]
    text = frame.assign(threshold=texts).to_csv(sep=";", decimal=decimal, index=False)
    (tmp_path / "runs.csv").write_text(first + text, encoding="utf-8-sig")
    assert followed(tmp_path / "runs.csv").digest() == DIGEST


def test_blanks_after_commas_are_refused_with_the_way_that_reads_them(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(table().to_csv(index=False).replace(",", ", "))
    assert followed(tmp_path / "runs.csv").digest() == DIGEST


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json"])
@pytest.mark.parametrize(
    ("encode", "said"),
    [
        (lambda text: text.encode("utf-16"), "it is UTF-16, as Excel and PowerShell write it"),
        (lambda text: text.encode("utf-32"), "it is UTF-32; write it as UTF-8"),
        (lambda text: gzip.compress(text.encode()), r"packed by gzip; let its name end in \.gz"),
        (lambda text: b"\x1f\x8b\t;|\n" + text.encode("utf-16"), "it is packed by gzip"),
        (lambda text: bz2.compress(text.encode()), "packed by bzip2; unpack it"),
        (lambda text: lzma.compress(text.encode()), "packed by xz; unpack it"),
        (lambda text: b"PK\3\4\xff" + text.encode(), r"a zip archive, as \.xlsx files are"),
        (lambda text: b"PAR1\xff;" + text.encode(), r"Parquet; let its name end in \.parquet"),
        (lambda text: b"ARROW1\0\0\xff" + text.encode(), r"Arrow IPC \(Feather\); write it as Par"),
    ],
    ids=["UTF-16", "UTF-32", "gzip", "tabs", "bzip2", "xz", "zip", "Parquet", "Arrow"],
)
def test_bytes_that_are_no_text_are_told_by_what_they_are(
    encode: Callable[[str], bytes], said: str, ending: str, tmp_path: Path
) -> None:
    frame = named()
    text = (
        frame.to_csv(index=False)
        if ending == "csv"
        else frame.to_json(orient="records", lines=True)
    )
    (tmp_path / f"runs.{ending}").write_bytes(encode(text))
    with pytest.raises(RiskcalError, match=said):
        Runs.read(tmp_path / f"runs.{ending}")


@pytest.mark.parametrize("name", ["PK", "BZh", "BZh9", "PAR1", "ARROW1", "PAR1 größe", "[prompt]"])
def test_a_header_may_begin_as_archives_do(name: str, tmp_path: Path) -> None:
    text = named().rename(columns={"prompt": name}).to_csv(index=False)
    assert text.startswith(name)
    (tmp_path / "runs.csv").write_text(text, encoding="utf-8")
    assert Runs.read(tmp_path / "runs.csv", columns={"prompt": name}).digest() == DIGEST


def test_a_table_under_the_name_of_another_is_told_so(tmp_path: Path) -> None:
    lines = named().to_json(orient="records", lines=True)
    (tmp_path / "runs.csv").write_text("\ufeff" + lines, encoding="utf-8")
    with pytest.raises(RiskcalError, match=r"it is JSON; let its name end in \.jsonl"):
        Runs.read(tmp_path / "runs.csv")
    (tmp_path / "array.csv").write_text(f"[\n{','.join(lines.split())}]")
    with pytest.raises(RiskcalError, match=r"it is JSON; let its name end in \.jsonl"):
        Runs.read(tmp_path / "array.csv")
    (tmp_path / "runs.csv").rename(tmp_path / "runs.jsonl")
    assert Runs.read(tmp_path / "runs.jsonl").digest() == DIGEST
    (tmp_path / "runs.parquet").write_bytes(gzip.compress(lines.encode()))
    with pytest.raises(RiskcalError, match="not a readable parquet file \\(it is packed by gzip"):
        Runs.read(tmp_path / "runs.parquet")
    table().to_feather(tmp_path / "runs.csv")
    with pytest.raises(RiskcalError, match=r"pandas\.read_feather\(path\)\.to_parquet"):
        Runs.read(tmp_path / "runs.csv")
    pd.read_feather(tmp_path / "runs.csv").to_parquet(tmp_path / "runs.parquet")
    assert Runs.read(tmp_path / "runs.parquet").digest() == DIGEST


def test_files_that_were_put_together_byte_by_byte_are_one_table_or_told_their_second_header(
    tmp_path: Path,
) -> None:
    halves = [named()[:9], named()[9:]]
    lines = ["\ufeff" + half.to_json(orient="records", lines=True) for half in halves]
    (tmp_path / "runs.jsonl").write_text("".join(lines), encoding="utf-8")
    assert Runs.read(tmp_path / "runs.jsonl").digest() == DIGEST
    (tmp_path / "runs.csv").write_text("".join(half.to_csv(index=False) for half in halves))
    with pytest.raises(RiskcalError, match=r"runs\.csv: row 9 is the header again \(1 such rows\)"):
        Runs.read(tmp_path / "runs.csv")
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    (tmp_path / "runs.csv").write_text("\n".join(rows[:10] + rows[11:]))
    assert Runs.read(tmp_path / "runs.csv").digest() == DIGEST


# Several files


@pytest.mark.parametrize(
    "ids",
    [["0101", "0102", "1103", "1104"], ["17", "18", "a19", "b20"]],
    ids=["zeros", "letters in one file"],
)
def test_ids_that_one_csv_could_hold_as_integers_are_texts_where_another_has_texts(
    ids: list[str], tmp_path: Path
) -> None:
    frame = table(4).assign(prompt=[name for name in ids for _ in range(3)])
    frame["cluster"] = frame["prompt"]
    frame[:6].to_csv(tmp_path / "a.csv", index=False)
    frame[6:].to_csv(tmp_path / "b.csv", index=False)
    assert Runs.read(tmp_path).digest() == Runs.from_frame(frame).digest()


def test_folders_that_name_a_column_may_be_listed_or_matched_themselves(tmp_path: Path) -> None:
    for threshold, rows in table().groupby("threshold"):
        below = tmp_path / f"threshold={threshold}"
        below.mkdir()
        rows.drop(columns="threshold").to_parquet(below / "part.parquet")
    folders = sorted(tmp_path.iterdir())
    for source in (folders, [str(one) for one in folders], f"{tmp_path}/*", tmp_path.glob("*")):
        assert Runs.read(source).digest() == DIGEST


def test_what_yields_paths_once_is_as_good_as_a_list(tmp_path: Path) -> None:
    """Path.glob is a generator; it was gone through twice, and found empty."""
    table()[:9].to_csv(tmp_path / "a.csv", index=False)
    table()[9:].to_csv(tmp_path / "b.csv", index=False)
    assert Runs.read(tmp_path.glob("*.csv")).digest() == DIGEST
    traces = Traces.from_arrays(
        prompt=["a", "b"], position=[0, 0], confidence=[[0.5, 1]] * 2, agrees=[[1, 1]] * 2
    )
    traces.write(tmp_path / "t.parquet")
    assert len(Traces.read(tmp_path.glob("t.*")).prompt) == 2


def test_a_refusal_names_a_list_by_its_first_file(tmp_path: Path) -> None:
    for place in range(30):
        table().to_csv(tmp_path / f"{place:02}.csv", index=False)
    with pytest.raises(RiskcalError, match=r"00\.csv and 29 more: prompt: .* stands twice"):
        Runs.read(sorted(tmp_path.glob("*.csv")))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("s3://bucket/runs.parquet", "looks like an address"),
        ("https://host/runs.csv", "looks like an address"),
        ("", "is empty"),
        (table().to_csv(), "cannot be looked for"),
        (table(), "a DataFrame is no path, but a table; give it to from_frame"),
        (table().to_dict("list"), "a dict is no path, but a table"),
    ],
    ids=["s3", "https", "nothing", "the content", "a table", "columns"],
)
def test_what_is_no_path_of_a_file_is_told_by_what_it_is(path: Any, said: str) -> None:
    with pytest.raises(RiskcalError, match=said):
        Runs.read(path)


def test_an_open_file_is_told_from_a_list_of_paths(tmp_path: Path) -> None:
    table().to_csv(tmp_path / "runs.csv", index=False)
    with (
        (tmp_path / "runs.csv").open() as file,
        pytest.raises(RiskcalError, match="is no path, but an open file; give its path"),
    ):
        Runs.read(file)  # type: ignore[arg-type]


# What is written


@pytest.mark.parametrize("ending", ["csv.gz", "csv.zst", "jsonl.gz", "jsonl.zst", "CSV.GZ"])
def test_what_is_written_under_a_packed_ending_is_packed(ending: str, tmp_path: Path) -> None:
    """It was plain text there, which nothing could read back."""
    path = tmp_path / f"runs.{ending}"
    Runs.from_frame(table()).write(path)
    assert Runs.read(path).digest() == DIGEST
    if ending.lower().endswith("gz"):
        assert b"prompt" in gzip.decompress(path.read_bytes())
    traces = load_example("g2p-traces")
    traces.write(tmp_path / f"traces.{ending}")
    assert repr(Traces.read(tmp_path / f"traces.{ending}")) == repr(traces)


def test_a_policy_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(RiskcalError, match=r"policy: .*; ExitPolicy\.load reads one from its file"):
        verify(str(tmp_path / "policy.json"), Runs.from_frame(table()))  # type: ignore[arg-type]


def test_a_column_may_stand_in_the_files_and_in_their_folders_names_if_both_agree(
    tmp_path: Path,
) -> None:
    """As polars partitions; what does not agree stays refused."""
    for threshold, rows in table().groupby("threshold"):
        below = tmp_path / f"threshold={threshold}"
        below.mkdir()
        rows.to_parquet(below / "part.parquet")
    assert Runs.read(tmp_path).digest() == DIGEST
    table().to_parquet(tmp_path / "threshold=0.5" / "part.parquet")
    with pytest.raises(RiskcalError, match="threshold is a column of the file and the name of its"):
        Runs.read(tmp_path)


def test_an_empty_text_of_a_csv_is_null_to_a_formula(tmp_path: Path) -> None:
    """Every request had failed, where no error was logged."""
    frame = table().assign(error=[None] * 17 + ["time-out"])
    frame.to_csv(tmp_path / "runs.csv", index=False)
    runs = Runs.read(tmp_path / "runs.csv", columns={"failed": ("error", "x != null")})
    assert runs.values["failed"].sum() == 1


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("lines", [True, False])
def test_half_of_a_surrogate_pair_is_refused_with_its_row(tmp_path, ending, lines):
    rows = [{"prompt": f"p{i}", "threshold": 0.5, "dissimilarity": 0.1} for i in range(6)]
    rows[4]["prompt"] = "\ud83d"
    path = tmp_path / f"log.{ending}"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    with pytest.raises(RiskcalError, match="row 4 is not valid Unicode"):
        Runs.read(path)
    rows[4]["prompt"] = "\ud83d\ude00"  # both halves are a character
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    assert "\U0001f600" in set(Runs.read(path).to_frame()["prompt"])


# Partitions


def test_a_truth_may_be_the_name_of_a_folder(tmp_path: Path) -> None:
    lost = table().assign(
        failed=lambda frame: (frame["prompt"] == "p3") & (frame["threshold"] == 0.5)
    )
    arrow = pa.Table.from_pandas(lost, preserve_index=False)
    pa.parquet.write_to_dataset(arrow, tmp_path / "arrow", partition_cols=["failed"])
    pl.from_pandas(lost).write_parquet(
        pl.PartitionBy(tmp_path / "polars", key="failed"), mkdir=True
    )
    for folder in ("arrow", "polars"):
        assert Runs.read(tmp_path / folder).digest() == Runs.from_frame(lost).digest()


@pytest.mark.parametrize("written", [str, lambda truth: str(truth).lower()])
def test_a_truth_may_be_the_name_of_a_folder_and_a_column(
    written: Callable[[bool], str], tmp_path: Path
) -> None:
    lost = table().assign(failed=lambda frame: frame["prompt"] == "p3")
    for truth, rows in lost.groupby("failed"):
        folder = tmp_path / f"failed={written(bool(truth))}"
        folder.mkdir()
        rows.to_parquet(folder / "a.parquet", index=False)
    assert Runs.read(tmp_path).digest() == Runs.from_frame(lost).digest()


def test_a_folder_without_a_threshold_is_told_how_it_gets_one(tmp_path: Path) -> None:
    null = table().assign(threshold=lambda frame: frame["threshold"].replace(math.inf, None))
    arrow = pa.Table.from_pandas(null.astype({"threshold": float}), preserve_index=False)
    pa.parquet.write_to_dataset(arrow, tmp_path, partition_cols=["threshold"])
    with pytest.raises(RiskcalError, match=r"rename the folder (.*) to (.*)\.") as refusal:
        Runs.read(tmp_path)
    old, new = re.findall("rename the folder (.*) to (.*)\\.", str(refusal.value))[0]
    (tmp_path / old).rename(tmp_path / new)
    assert Runs.read(tmp_path).digest() == DIGEST


def test_json_lines_of_an_infinite_setting_are_json(tmp_path: Path) -> None:
    frame = (
        table().query("threshold < 1").assign(arm=lambda f: f["threshold"].replace(0.9, math.inf))
    )
    runs = Runs.from_frame(frame, candidate_columns=["arm"])
    runs.write(tmp_path / "runs.jsonl")
    assert "Infinity" not in (tmp_path / "runs.jsonl").read_text()
    assert '"arm": "full"' in (tmp_path / "runs.jsonl").read_text()
    again = Runs.read(tmp_path / "runs.jsonl", candidate_columns=["arm"])
    assert again.digest() == runs.digest()


def test_folders_that_are_called_as_the_threshold_are_told_to_say_so(tmp_path: Path) -> None:
    for threshold, rows in named().groupby("threshold"):
        (tmp_path / str(threshold)).mkdir()
        rows.drop(columns="threshold").to_csv(tmp_path / str(threshold) / "a.csv", index=False)
    for source in (tmp_path, tmp_path / "*" / "*.csv"):
        with pytest.raises(RiskcalError, match=r"rename 0\.5 to threshold=0\.5, and the others"):
            Runs.read(source)
    for folder in list(tmp_path.iterdir()):
        folder.rename(tmp_path / f"threshold={folder.name}")
    assert Runs.read(tmp_path).digest() == DIGEST


# Paths


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    runs = Runs.from_frame(table())
    runs.write("~/runs.csv")
    assert Runs.read("~/runs.csv").digest() == Runs.read("~/run*.csv").digest() == DIGEST
    ExitPolicy(threshold=0.5).save("~/policy.json")
    assert ExitPolicy.load(Path("~/policy.json")) == ExitPolicy(threshold=0.5)
    EventLog("~/events.jsonl").write("riskcal.test", {})
    assert len(read_events("~/events.jsonl").events) == 1
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == [
        "events.jsonl",
        "policy.json",
        "runs.csv",
    ]
    runs.write("~nobody-of-this-name.csv")
    assert Runs.read("~nobody-of-this-name.csv").digest() == DIGEST


def test_what_a_path_may_mean_that_is_no_files_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGS", str(tmp_path))
    table().to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(RiskcalError, match=r"os\.path\.expandvars\(path\) does"):
        Runs.read("$LOGS/runs.csv")
    assert Runs.read(os.path.expandvars("$LOGS/runs.csv")).digest() == DIGEST
    with pytest.raises(RiskcalError, match=r"Standard input has no name .* write it into"):
        Runs.read("-")


# Quotes


@pytest.mark.parametrize("later", ["fine", '"fine, sir"', 'a 5" nail', 7000 * "-"])
def test_a_quote_that_nothing_closes_swallows_no_prompts(later: str, tmp_path: Path) -> None:
    """Pyarrow takes what follows for the text of one cell: prompts from 100 on, which fail, would be missing."""
    path, n = tmp_path / "runs.csv", 200

    def rows(said: str) -> str:
        lines = [
            'prompt,threshold,dissimilarity,output\nq,full,0,"two\nlines, of ""it"""\nq,.5,0,-\n'
        ]
        for i in range(n):
            lines.append(f"{i},full,0,-\n{i},.5,{int(i > 100)},{said if i == 100 else later}\n")
        return "".join(lines)

    path.write_text(rows('"ok, he said'))
    told = re.escape(
        "runs.csv: row 203 ('100,.5,0,\"ok, he said') opens a quote that is not closed"
    )
    with pytest.raises(RiskcalError, match=told):
        Runs.read(path)
    path.write_text(rows('"ok, he said"'))  # as it says
    assert Runs.read(path).losses().mean() == pytest.approx((n - 101) / (n + 1))


def test_so_it_is_in_traces_and_in_a_header(tmp_path: Path) -> None:
    path = tmp_path / "traces.csv"
    header = "prompt,position,confidence_1,confidence_2,agrees_1,agrees_2,output\n"
    rows = [f"p{i},0,.5,1,true,true,{'' if i - 2 else chr(34)}x\n" for i in range(5)]
    path.write_text(header + "".join(rows))
    with pytest.raises(RiskcalError, match=r"traces\.csv: row 2 .* opens a quote"):
        Traces.read(path)
    path.write_text(header.replace("output", '"output') + "".join(rows))
    with pytest.raises(RiskcalError, match=r"traces\.csv: its header .* opens a quote"):
        Traces.read(path)
    path.write_text(header + "".join(rows).replace('"x', '"x" and\ty'))  # as pandas reads it, too
    assert len(Traces.read(path).prompt) == 5


def test_blanks_behind_a_text_of_several_lines_are_no_open_quote(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = "".join(f'p{i},full,0,"hello\nthere" ,1\np{i},.5,0.5,-,1\n' for i in range(3))
    path.write_text("prompt,threshold,dissimilarity,output,layers\n" + rows)
    assert Runs.read(path).losses().tolist() == [[0.5]] * 3


def test_a_table_with_every_cell_in_quotes_is_read_as_without(tmp_path: Path) -> None:
    """Riskcal's own have texts alone in quotes; here numbers and truths would become texts."""
    frame = table().assign(source="replayed", exact="True", min_layer=2, temperature=0.5)
    paths = [tmp_path / f"{quoting}.csv" for quoting in (csv.QUOTE_ALL, csv.QUOTE_MINIMAL)]
    for path, quoting in zip(paths, (csv.QUOTE_ALL, csv.QUOTE_MINIMAL), strict=True):
        frame.to_csv(path, index=False, quoting=quoting)
    quoted, plain = map(Runs.read, paths)
    assert quoted.digest() == plain.digest()
    assert quoted.candidates["min_layer"].tolist() == [2] * quoted.k


@pytest.mark.parametrize("text", [150_000 * "长", 150_000 * '"', 75_000 * "a\n"])
def test_texts_of_any_length_are_read_in_linear_time(text: str, tmp_path: Path) -> None:
    """Settings are texts behind a first prompt of any length, too; the time was quadratic in a text without commas."""
    frame = table().assign(source="generated", text=text, mode="007")
    frame["text"] = frame["text"] + frame["prompt"].astype(str)
    runs = Runs.from_frame(frame, candidate_columns=["mode"])
    runs.write(tmp_path / "runs.csv")
    begun = time.process_time()
    again = Runs.read(tmp_path / "runs.csv", candidate_columns=["mode"])
    assert time.process_time() - begun < 3
    assert again.candidates["mode"].tolist() == ["007"] * again.k
    assert again.digest() == runs.digest()
