"""Answers as JSON lines, written as they come, so that a run which was cut off goes on where it stopped."""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
Item = TypeVar("Item", bound=Hashable)


def answered(
    path: Path, items: Sequence[Item], ask: Callable[[Sequence[Item]], Iterable[Row]], batch: int
) -> list[Row]:
    """The rows of all items, in order; an item that the file has already, or that occurs twice, is not asked again."""
    distinct = list(dict.fromkeys(items))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last may be torn
    path.write_text("".join(whole))
    for first in range(len(whole), len(distinct), batch):
        rows = list(ask(distinct[first : first + batch]))
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{path.name}: {first + len(rows)} of {len(distinct)}", flush=True)
    known = [json.loads(line) for line in path.read_text().splitlines()]
    of = dict(zip(distinct, known, strict=False))
    return [of[item] for item in items]
