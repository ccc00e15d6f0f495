"""The prompts of `record`, checked: one `Prompt` per row of whatever table was given."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from riskcal import RiskcalError, internal


class Prompt(NamedTuple):
    """One prompt, checked."""

    text: str
    prompt: int | str
    references: tuple[str, ...] = ()
    cluster: int | str | None = None
    group: int | str | None = None


def needs_references(risk: Any) -> bool:
    """Whether a risk is one against references: all but those that say otherwise."""
    return risk is not None and bool(getattr(risk, "needs_references", True))


def check_prompts(prompts: Any, *, references: bool = False) -> tuple[Prompt, ...]:
    """The prompts of `record` as rows, or a `RiskcalError` that names the column, the row (from 0) and the remedy.

    Parameters
    ----------
    prompts : sequence of str, or table
        As in `record`.
    references : bool
        Whether references are needed; if not, they are left out.
    """
    if isinstance(prompts, str):
        raise RiskcalError(
            "prompts: a single string; give a list of strings, or a table with a column 'text'."
        )
    frame = internal.table_from_object(prompts if _is_table(prompts) else _column(prompts))
    internal.require_columns(frame, ["text", "references"] if references else ["text"])
    for row, text in enumerate(frame["text"]):
        if not isinstance(text, str) or not text.strip():
            what = "is empty" if isinstance(text, str) else f"is {text!r}, not a string"
            raise RiskcalError(
                f"text: row {row} {what}; give every prompt a text, or drop the row."
            )
    columns: dict[str, list[Any]] = {
        "text": frame["text"].tolist(),
        "prompt": list(range(len(frame))),
    }
    for name in ("prompt", "cluster", "group"):
        if name in frame.columns:
            columns[name] = internal.identifiers(frame[name], name).tolist()
    again = pd.Series(columns["prompt"]).duplicated().to_numpy()
    if again.any():
        row = int(again.argmax())
        raise RiskcalError(
            f"prompt: id {columns['prompt'][row]!r} stands twice, again at row {row}; give each prompt its own."
        )
    if references:
        columns["references"] = [
            _references(value, row) for row, value in enumerate(frame["references"])
        ]
    return tuple(
        Prompt(**dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    )


def _is_table(prompts: Any) -> bool:
    return isinstance(prompts, pd.DataFrame | Mapping) or hasattr(prompts, "__arrow_c_stream__")


def _column(prompts: Any) -> pd.DataFrame:
    if not np.iterable(prompts):
        kind = type(prompts).__name__
        raise RiskcalError(
            f"prompts: a {kind}; give a list of strings, or a table with a column 'text'."
        )
    return pd.DataFrame({"text": pd.Series(list(prompts), dtype=object)})


def _references(value: Any, row: int) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else list(value) if np.iterable(value) else []
    if not given:
        raise RiskcalError(
            f"references: row {row} has none; risk needs at least one for every prompt."
        )
    for reference in given:
        if not isinstance(reference, str) or not reference.strip():
            raise RiskcalError(
                f"references: row {row} holds {reference!r}; give strings that are not empty."
            )
    return tuple(given)


def warn_of_repeated_texts(prompts: Sequence[Prompt]) -> None:
    seen: dict[str, Prompt] = {}
    repeated = []
    for row in prompts:
        earlier = seen.setdefault(row.text, row)
        if earlier is not row and (row.cluster is None or row.cluster != earlier.cluster):
            repeated.append((earlier, row))
    if repeated:
        earlier, row = repeated[0]
        warnings.warn(
            f"text: prompt {row.prompt!r} repeats the text of prompt {earlier.prompt!r} (repeats: {len(repeated)}); "
            "identical prompts under two ids are not independent. Drop one, or give both the same cluster.",
            stacklevel=3,
        )
