"""What every command that reads a log takes: its files, names of columns, which attempts were served, which end is strict."""

from pathlib import Path
from typing import Annotated

import typer

from riskcal._validate import RiskcalError

RunsArgument = Annotated[
    list[Path],
    typer.Argument(
        help="Runs: .parquet, .csv, .jsonl, packed or not, a folder of these, or several files."
    ),
]

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="NAME=COLUMN",
        help="The log's own name of a column, prompt=request_id, or a formula of it, 'dissimilarity=1-rougeL'; may be repeated.",
    ),
]

KeepOption = Annotated[
    str | None,
    typer.Option(
        metavar="last:COLUMN",
        help="Where requests were tried again: last or first, and the column that puts attempts in order.",
    ),
]

CoordinateOption = Annotated[
    list[str] | None,
    typer.Option(help="Further column that tells candidates apart; may be repeated."),
]

DirectionOption = Annotated[
    bool,
    typer.Option(
        "--lower-is-stricter",
        help="Exits are where a value is at most the threshold (entropy).",
    ),
]


def source(paths: list[Path]) -> Path | list[Path]:
    """What was given on the shell, which makes several files of ``logs/*.jsonl``."""
    return paths[0] if len(paths) == 1 else paths


def only_delta(deltas: list[float]) -> float:
    """The one tolerated loss; of several options of one name the shell's parser would keep the last, and say nothing."""
    if len(deltas) > 1:
        raise RiskcalError(
            f"--delta: is given {len(deltas)} times, and a calibration is at one; give one. `riskcal trials` takes several, and "
            "in Python calibrate(..., delta=[...]) certifies several together."
        )
    return deltas[0]
