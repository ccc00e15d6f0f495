"""Prompts in files: one per line, or a table."""

from pathlib import Path
from typing import Any

import pandas as pd

from riskcal import RiskcalError, internal
from riskcal_adapters.recording.prompts import check_prompts


def read_prompts(path: Path, *, references: bool = False) -> pd.DataFrame:
    """The table of prompts in a file, checked; every `RiskcalError` names the file, the column and the row (from 0)."""
    if path.suffix.lower() == ".txt":
        table = pd.DataFrame({"text": _lines(path)}, dtype=object)
    else:
        try:
            table = internal.read_table(path)
        except UnicodeDecodeError as error:
            raise RiskcalError(
                f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})."
            ) from None
    if path.suffix.lower() == ".csv" and "references" in table.columns:
        table["references"] = pd.Series(
            [_split(value) for value in table["references"]], dtype=object
        )
    try:
        check_prompts(table, references=references)
    except RiskcalError as error:
        raise RiskcalError(f"{path}: {error}") from None
    return table


def _split(cell: Any) -> Any:
    return [part.strip() for part in cell.split("|")] if isinstance(cell, str) else [cell]


def _lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except OSError as error:
        raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise RiskcalError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None
