"""Columns of true and false made of texts, numbers and nulls: by formulas, as messages advise, and as `check` proposes."""

import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from riskcal import RiskcalError, Runs
from riskcal.cli import app
from riskcal.records import check, renaming


def log(**columns: Any) -> pd.DataFrame:
    """Six requests at one threshold and in full; the third and the last had no output at the threshold."""
    quality = [0.9, 1.0, np.nan, 0.8, 0.7, np.nan]
    frame = pd.DataFrame(
        {
            "prompt": [f"p{i}" for i in range(6)] * 2,
            "threshold": [0.5] * 6 + ["full"] * 6,
            "quality": quality + [1.0] * 6,
        }
    )
    return frame.assign(**{name: [*cells, *cells[:1] * 6] for name, cells in columns.items()})


def failures(runs: Runs) -> list[bool]:
    """Which of the six failed at the threshold."""
    told = dict(zip(runs.prompts, runs.values["failed"][:, 0], strict=True))
    return [bool(told[f"p{i}"]) for i in range(6)]


LOSS = {"dissimilarity": ("quality", "1 - x")}
LOST = [False, False, True, False, False, True]
#: What systems write, and the formula that says which outputs failed.
WRITTEN = {
    "one of two texts": (["ok", "ok", "timeout", "ok", "ok", "timeout"], "x != ok"),
    "one of many texts": (["ok", "ok", "timeout", "ok", "ok", "out of memory"], "x != 'ok'"),
    "a text with spaces": (
        ["all good", "all good", "no", "all good", "all good", "no"],
        "x != all good",
    ),
    "the failure's own": (["", "", "lost", "", "", "lost"], 'x == "lost"'),
    "a text or null": ([None, None, "timeout", None, None, "loop"], "x != null"),
    "a number": ([200, 200, 504, 200, 200, 500], "x != 200"),
    "one or nought": ([0, 0, 1, 0, 0, 1], "x==1"),
    "one or nought as texts": (["0", "0", "1", "0", "0", "1"], "x == 1"),
    "what is not done": ([True, True, False, True, True, False], "x == false"),
    "the quality itself": ([0.9, 1.0, np.nan, 0.8, 0.7, np.nan], "x == null"),
}


@pytest.mark.parametrize(("cells", "formula"), WRITTEN.values(), ids=list(WRITTEN))
def test_what_failed_is_said_by_a_formula(cells: list[Any], formula: str) -> None:
    runs = Runs.from_frame(log(said=cells), columns=LOSS | {"failed": ("said", formula)})
    assert failures(runs) == LOST
    losses = dict(zip(runs.prompts, runs.losses()[:, 0], strict=True))
    assert [losses[f"p{i}"] for i in range(6)] == pytest.approx([0.1, 0.0, 1.0, 0.2, 0.3, 1.0])


@pytest.mark.parametrize(("cells", "formula"), WRITTEN.values(), ids=list(WRITTEN))
def test_the_shell_says_the_same(cells: list[Any], formula: str) -> None:
    [(target, column)] = renaming.options([f"failed={formula.replace('x', 'said', 1)}"]).items()
    on_the_shell = renaming.renamed(log(said=cells), {target: column})
    in_python = renaming.renamed(log(said=cells), {"failed": ("said", formula)})
    pd.testing.assert_frame_equal(on_the_shell, in_python)


def test_a_null_is_neither_and_is_asked_about() -> None:
    frame = log(status=["ok", None, "timeout", "ok", "ok", "timeout"])
    for formula in ("x != ok", "x == timeout"):
        with pytest.raises(RiskcalError, match=r"failed: None at row 1 \(1 such rows\)"):
            Runs.from_frame(frame, columns=LOSS | {"failed": ("status", formula)})


@given(
    cells=st.lists(
        st.sampled_from(["ok", "OK", "no", "1", 1, 0, 2.5, True, False, None]), min_size=1
    ),
    said=st.sampled_from(["ok", "'no'", "1", "2.5", "true", "null"]),
)
def test_equal_and_unequal_are_opposites(cells: list[Any], said: str) -> None:
    frame = pd.DataFrame({"x": pd.Series(cells, dtype=object)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no row says it
        equal, unequal = (
            renaming.renamed(frame, {"made": ("x", f"x {sign} {said}")})["made"]
            for sign in ("==", "!=")
        )
    for cell, one, other in zip(cells, equal, unequal, strict=True):
        if cell is None and said != "null":
            assert one is None or pd.isna(one)
            assert other is None or pd.isna(other)
        else:
            assert one is not other
            assert bool(one) != bool(other)


@pytest.mark.parametrize(
    "text", ["x = ok", "x != 'ok", "x !=", "x != 'a' 'b'", "y != ok", "!= ok", "x == ok == ok"]
)
def test_what_is_no_comparison_is_refused(text: str) -> None:
    with pytest.raises(RiskcalError, match="failed has the formula"):
        renaming.renamed(log(status=["ok"] * 6), {"failed": ("status", text)})


@pytest.mark.parametrize("cell", [["ok"], b"ok", pd.Timestamp("2026-11-29"), {"is": "ok"}], ids=str)
def test_what_is_no_text_number_or_truth_is_not_compared(cell: Any) -> None:
    for formula in ("x != ok", "x == timeout"):
        with pytest.raises(RiskcalError, match=r"columns: 'status' is .* at row 0"):
            renaming.renamed(log(status=[cell] * 6), {"failed": ("status", formula)})


@pytest.mark.parametrize(
    ("cells", "formula"),
    [
        (["ok", "timeout"] * 3, "x == TIMEOUT"),
        (["0", "1"] * 3, "x == 1.0"),
        ([0, 1] * 3, "x == yes"),
    ],
)
def test_what_no_row_says_is_said(cells: list[Any], formula: str) -> None:
    with pytest.warns(UserWarning, match="columns: no row of 'status' is .*; it holds"):
        renaming.renamed(log(status=cells), {"failed": ("status", formula)})


def test_it_is_said_at_the_line_that_read_the_log() -> None:
    answered = log(status=["ok"] * 6).assign(quality=1.0)
    columns = LOSS | {"failed": ("status", "x == late")}
    with pytest.warns(UserWarning, match="no row of 'status'") as said:
        Runs.from_frame(answered, columns=columns)
    assert [one.filename for one in said] == [__file__]


def test_a_large_file_is_asked_as_a_whole(tmp_path: Path) -> None:
    late = pd.concat(
        [
            log(status=["ok"] * 6).assign(prompt=lambda f, i=i: f["prompt"] + f"-{i}")
            for i in range(7000)
        ],
        ignore_index=True,
    )
    late.loc[len(late) - 7, "status"] = "timeout"
    late.loc[late["quality"].isna(), "quality"] = 0.5
    late = late.sort_values("prompt", kind="stable")
    late["threshold"] = late["threshold"].replace("full", np.inf).astype(float)
    late.to_parquet(tmp_path / "log.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runs = Runs.read(
            tmp_path / "log.parquet", columns=LOSS | {"failed": ("status", "x == timeout")}
        )
    assert runs.values["failed"].sum() == 1


@pytest.mark.parametrize(
    "cells",
    [
        ["ok", "ok", "timeout", "ok", "ok", "timeout"],
        ["success", "success", "timeout", "success", "success", "loop"],
        [None, None, "timeout", None, None, "loop"],
        [0, 0, 1, 0, 0, 1],
        ["no", "no", "yes", "no", "no", "yes"],
        ["fine", "fine", "lost", "fine", "fine", "lost"],
    ],
    ids=str,
)
def test_what_a_message_advises_works_in_python_and_on_the_shell(
    cells: list[Any], tmp_path: Path
) -> None:
    frame = log(state=cells)
    with pytest.raises(RiskcalError, match="failed") as refusal:
        Runs.from_frame(frame, columns=LOSS | {"failed": "state"})
    told = re.search(
        r"\('COLUMN', \"(.*?)\"\)\}, on the shell --columns (.*)\.$", str(refusal.value)
    )
    assert told is not None
    runs = Runs.from_frame(frame, columns=LOSS | {"failed": ("state", told[1])})
    assert failures(runs) == LOST

    [option] = shlex.split(told[2].replace("COLUMN", "state"))
    frame.to_json(tmp_path / "log.jsonl", orient="records", lines=True)
    names = ["--columns", "dissimilarity=1-quality", "--columns", option]
    done = CliRunner().invoke(app, ["check", str(tmp_path / "log.jsonl"), *names])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("name", "cells", "formula"),
    [
        ("status", ["ok", "ok", "timeout", "ok", "ok", "lost"], "status!=ok"),
        (
            "finish_reason",
            ["stop", "stop", "error", "stop", "stop", "error"],
            "finish_reason!=stop",
        ),
        ("error", [None, None, "timeout", None, None, "loop"], "error!=null"),
        ("timed_out", LOST, "timed_out"),
    ],
)
def test_check_proposes_what_says_so_of_every_lost_output(
    name: str, cells: list[Any], formula: str
) -> None:
    columns = LOSS | {}
    [found] = check.findings(log(**{name: cells}), columns=columns)
    assert found.mend == (f"--columns {shlex.quote(f'failed={formula}')}",)
    [option] = [shlex.split(one)[1] for one in found.mend]
    assert not check.findings(log(**{name: cells}), columns=columns | renaming.options([option]))


def test_a_text_that_no_formula_can_quote_is_left_to_its_writer() -> None:
    cells = ["fine", "fine", "out\nof time", "fine", "fine", "out\nof time"]
    with pytest.raises(RiskcalError, match=r"Fill in which it is\.$"):
        Runs.from_frame(log(state=cells), columns=LOSS | {"failed": "state"})


def test_check_proposes_nothing_that_misses_a_lost_output() -> None:
    cells = ["ok", "timeout", "ok", "ok", "ok", "timeout"]  # the third is lost, and "ok"
    [found] = check.findings(log(status=cells), columns=LOSS)
    assert found.mend == ()


def test_a_formula_applies_to_names_of_one_letter_too() -> None:
    assert renaming.options(["seconds=t/1000", "risk=1-e"]) == {
        "seconds": ("t", "x/1000"),
        "risk": ("e", "1-x"),
    }
