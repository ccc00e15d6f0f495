"""Options of every command that reads a log: the names of its columns, which attempts were served, which end is strict."""

from typing import Annotated

import typer

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
