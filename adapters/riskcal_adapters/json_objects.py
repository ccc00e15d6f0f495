"""Files that hold one JSON object: what recordings and trainings were begun with, what checkpoints say of themselves."""

import json
from pathlib import Path
from typing import Any

from riskcal import RiskcalError, internal


def read(path: Path, lacking: str, remedy: str) -> dict[str, Any]:
    """The object in a file; ``lacking`` says of a file of anything else what it is not."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RiskcalError(f"{path}: cannot be read ({error}); {remedy}.") from None
    if not isinstance(found, dict):
        raise RiskcalError(f"{path}: {lacking}; {remedy}.")
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """Write it; an existing file is replaced whole or not at all."""
    with internal.replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
