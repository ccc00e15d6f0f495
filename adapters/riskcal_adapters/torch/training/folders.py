"""Folders of training: what each was begun with, so that none goes on with something else, and that they can be written."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from riskcal import RiskcalError
from riskcal_adapters import json_objects
from riskcal_adapters.torch.replacing import written

#: In such a folder: what it was begun with.
SETTINGS_FILE = "stage.json"


def note_settings(
    folder: Path,
    settings: dict[str, Any],
    *,
    beside: dict[str, Any] | None = None,
    file: str = SETTINGS_FILE,
) -> dict[str, Any]:
    """Note in a folder of training what it is begun with, and refuse one that was begun with something else.

    Parameters
    ----------
    folder
        Made if it is not there.
    settings
        What JSON can hold; all of it must be the same whenever the folder is used again.
    beside
        Noted with them when the folder is begun, and not compared.
    file
        Where in the folder all this is noted.

    Returns
    -------
    dict
        What is noted there.

    Raises
    ------
    RiskcalError
        Naming the first setting that differs, with both values; if the folder cannot be made, read or written.
    """
    settings, path = _plain(settings), folder / file
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = read_settings(path) if path.exists() else None
        begun = last_checkpoint(folder)
    if found is None and begun is not None:
        raise RiskcalError(
            f"{folder}: holds checkpoints, but no {file} that says of what; give another folder."
        )
    if found is None:
        found = settings | (beside or {})
        json_objects.write(path, found)
    there = {name: found.get(name) for name in settings}
    if there != settings:
        name, before, now = _first_difference(there, settings)
        raise RiskcalError(
            f"{name}: {before} in the training that {folder} holds, {now} now. Give the same to go on with it, or another "
            "folder."
        )
    return found


def _first_difference(there: dict[str, Any], here: dict[str, Any]) -> tuple[str, str, str]:
    name = next(name for name in here if there.get(name) != here[name])
    before, now = there.get(name), here[name]
    if isinstance(before, dict) and isinstance(now, dict):
        inner, there_said, here_said = _first_difference(before, now)
        return f"{name}.{inner}", there_said, here_said
    if name in ("pairs", "model"):
        return (
            name,
            "others" if name == "pairs" else "another shape",
            "these" if name == "pairs" else "this one",
        )
    return name, json.dumps(before), json.dumps(now)


def _plain(value: Any) -> Any:
    """As JSON holds it: functions by their names, which say nothing of what stands behind them."""
    return json.loads(
        json.dumps(value, default=lambda one: getattr(one, "__qualname__", type(one).__name__))
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of most steps that Hugging Face's trainer left in a folder."""
    found: str | None = get_last_checkpoint(str(folder))
    return None if found is None else Path(found)


def digest(value: Any) -> str:
    """A name for what JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a folder of training."""
    remedy = f"delete the folder {path.parent} and train again"
    return json_objects.read(path, "holds no settings", remedy)
