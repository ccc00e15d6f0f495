"""One folder or file per setting, as systems are run that do not know of settings: which candidate each is."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.records import files, renaming, sources
from riskcal.records.candidates import as_numbers
from riskcal.records.runs import Runs

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
    seen: dict[tuple[Any, ...], Any] = {}
    for key, path in settings.items():
        values = key if isinstance(key, tuple) else (key,)
        if len(values) != len(coordinates):
            raise RiskcalError(
                f"settings: {_validate.shown(key)} has {len(values)} coordinates, not {len(coordinates)}: "
                f"{', '.join(coordinates)}. Name those that there are in coordinates=."
            )
        setting = dict(zip(coordinates, values, strict=True))
        _refuse_no_setting(setting, key)
        if full is not None and _is_full(setting["threshold"]):
            raise RiskcalError(
                f"settings: {_validate.shown(key)} is the full model, as is full=; give it once."
            )
        number = as_numbers(pd.Series([setting["threshold"]], dtype=object))[0]
        if math.isnan(number) or number == -math.inf:
            raise RiskcalError(
                f"settings: {_validate.shown(key)}: threshold is {_validate.shown(setting['threshold'])}, which is none; give a "
                "number."
            )
        same = tuple(number if name == "threshold" else setting[name] for name in coordinates)
        if same in seen:
            raise RiskcalError(
                f"settings: {_validate.shown(key)} is {_validate.shown(seen[same])} again; give each setting once, and what "
                "else tells the two apart in coordinates=."
            )
        seen[same] = key
        yield setting, _path(path, f"settings: {_validate.shown(key)}")


def refuse_gaps(frame: pd.DataFrame, remedy: str) -> None:
    """Refuse a ``prompt`` that a ``setting`` lacks and another has; rows have a ``place``."""
    settings = frame.groupby("prompt", sort=False)["setting"].agg(set)
    lacking = settings[settings.map(len) < frame["setting"].nunique()]
    if len(lacking):
        prompt, held = lacking.index[0], lacking.iloc[0]
        there = frame[frame["prompt"] == prompt].iloc[0]
        elsewhere = frame[~frame["setting"].isin(held)]
        if "group" in frame and (same := elsewhere["group"] == there["group"]).any():
            elsewhere = elsewhere[same]
        place, other = there["place"], elsewhere.iloc[0]["place"].rpartition(": row ")[0]
        raise RiskcalError(
            f"{place}: {prompt!r} is not in {other} ({len(lacking)} prompts are lacking somewhere); every setting needs every "
            f"prompt. Run it there; if it failed, {remedy}. To leave out what failed would select on the outcome."
        )
    if len(settings) < 2:
        raise RiskcalError(
            f"{frame['place'].iloc[0]}: {settings.index[0]!r} is the only prompt; at least two are needed."
        )


def runs(frame: pd.DataFrame, names: Sequence[str], coordinates: Sequence[str]) -> Runs:
    """The runs in some columns of a table, of which each row has a ``place`` by which refusals call it."""
    frame = frame.reset_index(drop=True)
    try:
        return Runs.from_frame(
            frame[names], candidate_columns=[name for name in coordinates if name != "threshold"]
        )
    except RiskcalError as error:
        told = re.sub(
            r"\bat row (\d+)\b", lambda row: f"at {frame['place'][int(row[1])]}", str(error)
        )
        raise RiskcalError(told) from None


def _refuse_no_setting(setting: Mapping[str, Any], key: Any) -> None:
    for name, value in setting.items():
        if not isinstance(value, str) and not _validate.is_number(value):
            raise RiskcalError(
                f"settings: {_validate.shown(key)}: {name} is {_validate.shown(value)}; give a number, or a text."
            )


def _is_full(threshold: Any) -> bool:
    if isinstance(threshold, str):
        return threshold.strip().lower() in ("full", "inf")
    return bool(threshold == math.inf)


def _path(path: Any, name: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise RiskcalError(f"{name}: {_validate.shown(path)} is no path.")
    if not sources.exists(found := _replacing.a_path(path), name):
        raise RiskcalError(f"{name}: {found} does not exist.")
    return found


def path_of(path: Any) -> Path:
    """The one file of a log."""
    found = _path(path, "path")
    if found.is_dir():
        raise RiskcalError(f"path: {found} is a folder; give one file of it at a time.")
    return found


def name_of(value: Any, argument: str) -> str:
    """An argument that names something in a log."""
    if not isinstance(value, str) or not value:
        raise RiskcalError(f"{argument}: {_validate.shown(value)} is no name; give a text.")
    return value


def finite(value: Any) -> float | None:
    """A cell of JSON as a number; None where it is none, or beyond any float."""
    if not _validate.is_number(value):
        return None
    with suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


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
    if asked is not None:
        name_of(asked, argument)
    if asked is None and len(names) != 1:
        raise RiskcalError(
            f"{argument}: {where} has several, {listed}; choose one, before you look at results, with {argument}=."
        )
    if asked is not None and asked not in names:
        raise RiskcalError(f"{argument}: {where} has no {asked!r}; it has {listed}.")
    return next(iter(names)) if asked is None else asked
