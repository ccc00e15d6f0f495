"""What the scripts of this folder have in common as commands: how they tell what they are for, and where figures go."""

import argparse
import json
from pathlib import Path
from typing import Any


def parser(description: str | None, *, figures: bool = True) -> argparse.ArgumentParser:
    """Options of a script; with ``figures`` also ``--json``, by which `outgrown.py` gets them."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if figures:
        found.add_argument("--json", type=Path, help="where the figures go")
    return found


def keep(figures: Any, path: Path | None) -> None:
    """Write figures where they were asked for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
