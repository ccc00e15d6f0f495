"""What a process of its own needs to import the helpers that stand here."""

import os
from pathlib import Path


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, from which its children import these helpers too."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | changes
