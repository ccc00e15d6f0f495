"""`riskcal check`: every problem of a log, and what mends it; nothing is changed."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from riskcal._validate import RiskcalError
from riskcal.cli.app import app
from riskcal.cli.log_options import (
    ColumnsOption,
    CoordinateOption,
    DirectionOption,
    KeepOption,
    source,
)
from riskcal.records import COSTS, Runs, Traces, files, guessing, joining, renaming, retries
from riskcal.records.check import Finding, findings, findings_of_traces
from riskcal.records.columns import are_traces

#: Rows of a problem that are listed by number.
_LISTED = 10


@app.command()
def check(
    log: Annotated[
        list[Path],
        typer.Argument(
            help="Runs or traces: .parquet, .csv, .jsonl, packed or not, a folder, or several files."
        ),
    ],
    columns: ColumnsOption = None,
    keep: KeepOption = None,
    coordinate: CoordinateOption = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(help="Further column that is a cost; may be repeated."),
    ] = None,
    lower_is_stricter: DirectionOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the problems as one JSON object.")
    ] = False,
) -> None:
    """List every problem of LOG, with its rows, its remedy and the options that mend it; nothing is changed.

    Exit status 0: `riskcal calibrate` with the same options reads it; traces (`position` and no `threshold`) can be replayed.
    Exit status 2: it does not, they cannot.
    """
    names = renaming.options(columns or ())
    given = source(log)
    frame = files.read(given, renaming.only_renamed(names))
    asked: dict[str, Any] = {
        "candidate_columns": coordinate or (),
        "costs": [name for name in cost or () if name not in COSTS],
        "lower_is_stricter": lower_is_stricter,
        "columns": names,
        "keep": retries.option(keep),
    }
    traces = are_traces(renaming.renamed(frame, names).columns)
    if traces:
        found = findings_of_traces(frame, columns=names)
    else:
        found = findings(frame, **asked, is_json=joining.is_json_lines(frame))
    if as_json:
        print(json.dumps({"readable": not found, "problems": [_jsonable(one) for one in found]}))
    elif found:
        print("\n".join(_lines(files.named(given), found)))
    elif traces:
        print(Traces.from_frame(frame, columns=names))
        print(
            "`riskcal calibrate` reads runs; riskcal.replay_traces(traces, thresholds) makes them."
        )
    else:
        _show(given, frame, asked)
    raise typer.Exit(2 if found else 0)


def _show(log: files.Source, frame: pd.DataFrame, asked: dict[str, Any]) -> None:
    """What was read, with remarks, and what else may be."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always")
        print(Runs.read(log, **asked))
    for remark in remarks:
        print(remark.message)
    unused = {
        name: said
        for name, said in guessing.optional(renaming.renamed(frame, asked["columns"])).items()
        if _would_be_read(frame, asked, said)
    }
    if unused:
        print(f"May also be read: {' '.join(f'--columns {one}' for one in unused.values())}")


def _would_be_read(frame: pd.DataFrame, asked: dict[str, Any], said: str) -> bool:
    columns = asked["columns"] | renaming.options([said])
    is_json = joining.is_json_lines(frame)
    try:
        return not findings(frame, **(asked | {"columns": columns}), is_json=is_json)
    except RiskcalError:
        return False


def _lines(log: str, found: list[Finding]) -> list[str]:
    lines = [f"{log}: {len(found)} problem{'s' if len(found) > 1 else ''}"]
    for one in found:
        lines.append(f"\n{one.column}: {one.problem}")
        if len(one.rows) > 1:
            shown = ", ".join(map(str, one.rows[:_LISTED]))
            lines.append(
                f"  rows: {shown}{', ...' if len(one.rows) > _LISTED else ''} ({len(one.rows)} in all)"
            )
        lines += [f"  {one.remedy}"] if one.remedy else []
    if mends := [option for one in found for option in one.mend]:
        lines.append(f"\nIf the columns are what they seem to be, add:\n  {' '.join(mends)}")
    return lines


def _jsonable(one: Finding) -> dict[str, object]:
    return asdict(one) | {"rows": one.rows[:_LISTED], "count": len(one.rows)}
