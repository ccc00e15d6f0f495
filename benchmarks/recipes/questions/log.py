"""Answers as JSON lines, written as they come, so that a run which was cut off goes on where it stopped."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Row = dict[str, Any]
Item = TypeVar("Item")


def answered(
    path: Path, items: Sequence[Item], ask: Callable[[Sequence[Item]], Iterable[Row]], batch: int
) -> list[Row]:
    """The rows of all items, in order; those that the file has already are not asked again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last may be torn
    path.write_text("".join(whole))
    for first in range(len(whole), len(items), batch):
        rows = list(ask(items[first : first + batch]))
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{path.name}: {first + len(rows)} of {len(items)}", flush=True)
    return [json.loads(line) for line in path.read_text().splitlines()][: len(items)]
