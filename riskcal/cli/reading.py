"""Options of every command that reads a log: under which names its columns stand."""

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
