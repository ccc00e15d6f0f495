"""One folder or file per setting, as systems are run that do not know of settings: which candidate each is."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import files, renaming

#: Of each setting, by its threshold or, where there are several ``coordinates``, a tuple of them, where its outputs are.
Settings = Mapping[Any, str | os.PathLike[str]]


def candidates(
    settings: Settings, coordinates: Sequence[str], full: str | os.PathLike[str] | None
) -> Iterator[tuple[dict[str, Any], Path]]:
    """Every setting's coordinates and path, the full model first, if there is one."""
    if not isinstance(settings, Mapping) or not settings:
        raise RiskcalError(
            f"settings: {_validate.shown(settings)} is no dictionary of paths; give {{0.9: 'runs/0.9', 0.5: 'runs/0.5'}}."
        )
    if "threshold" not in coordinates or isinstance(coordinates, str):
        raise RiskcalError(
            f"coordinates: {_validate.shown(coordinates)} has no threshold; name it and what else tells settings apart, in order."
        )
    if full is not None:
        yield dict.fromkeys(coordinates, None) | {"threshold": math.inf}, _path(full, "full")
    for key, path in settings.items():
        values = key if isinstance(key, tuple) else (key,)
        if len(values) != len(coordinates):
            raise RiskcalError(
                f"settings: {_validate.shown(key)} has {len(values)} coordinates, not {len(coordinates)}: "
                f"{', '.join(coordinates)}. Name those that there are in coordinates=."
            )
        setting = dict(zip(coordinates, values, strict=True))
        if full is not None and setting["threshold"] in ("full", math.inf):
            raise RiskcalError(
                f"settings: {_validate.shown(key)} is the full model, as is full=; give it once."
            )
        yield setting, _path(path, f"settings: {_validate.shown(key)}")


def _path(path: Any, name: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise RiskcalError(f"{name}: {_validate.shown(path)} is no path.")
    if not (found := Path(path)).exists():
        raise RiskcalError(f"{name}: {found} does not exist.")
    return found


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file of JSON lines, packed or not, with their numbers."""
    return files.json_objects(path)


def formula(text: Any) -> Callable[[Any], Any]:
    """What a score becomes as a loss: ``"1 - x"``."""
    return renaming.formula("loss", text)


def only(names: set[Any], asked: Any, argument: str, where: str) -> Any:
    """The one name that was asked for, or that there is; several are refused, since to take one of them is a choice."""
    listed = ", ".join(map(repr, sorted(names, key=str))) or "none"
    if not names:
        raise RiskcalError(f"{argument}: {where} has none.")
    if asked is None and len(names) != 1:
        raise RiskcalError(
            f"{argument}: {where} has several, {listed}; choose one, before you look at results, with {argument}=."
        )
    if asked is not None and asked not in names:
        raise RiskcalError(f"{argument}: {where} has no {asked!r}; it has {listed}.")
    return next(iter(names)) if asked is None else asked
