"""What a reduction that was cut off had finished, and whether the same files and the same code would make it again."""

import dataclasses
import hashlib
import inspect
import json
import os
import secrets
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from riskcal import _parquet, _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.records import files
from riskcal.records.columns import canonical, of_arrow


def unfinished(target: Path, *asked: Any) -> Path:
    """The folder where finished files wait for the others, in one beside ``target`` that holds those of all calls.

    It has the name of what was asked, so that a call never finds, nor is given by one that still runs, what another made.
    """
    said = fingerprint(*asked) or secrets.token_hex(16)
    folder = target.with_name(f".{target.name}.unfinished") / said
    with _validate.reading("out", "a folder that can be made"):
        for name in ("runs", "made"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def state(part: files.Part) -> list[Any]:
    """By what a file is known to be as it was: its path and what folders say of it, its size and the time of its last change."""
    about = part.file.stat()
    path = os.path.abspath(part.file)  # noqa: PTH100  (links stay as they are)
    return [path, str(part.folder), about.st_size, about.st_mtime_ns]


def finished(runs: Path, of: list[Any]) -> tuple[NDArray[Any], frozenset[str]] | None:
    """The prompts and what was measured in runs that were made of a file in this state, if they are there and whole."""
    try:
        note = json.loads(_about(runs).read_text(encoding="utf-8"))
        if note["of"] != of:
            return None
        prompts = canonical(of_arrow(_parquet.read(runs).select(["prompt"])))["prompt"].unique()
        return np.asarray(prompts), frozenset(note["measured"])
    except (OSError, ValueError, KeyError, pa.ArrowException, RiskcalError):
        return None  # not there, or damaged


def finish(runs: Path, of: list[Any], measured: frozenset[str]) -> None:
    """Note of what state of a file runs that are written were made."""
    _note(_about(runs), {"of": of, "measured": sorted(measured)})


def forget(runs: Path) -> None:
    """Runs that will be changed are no longer those of their file."""
    _about(runs).unlink(missing_ok=True)


def fingerprint(*asked: Any) -> str | None:
    """A digest of functions, with all that they read and the file that defines them, and of plain values; None of others."""
    version = sys.modules[
        "riskcal"
    ].__version__  # of the package above, which nothing here may import
    try:
        said = repr([version, *map(_told, asked)])
    except (TypeError, OSError, ValueError):
        return None
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def _told(value: Any) -> Any:
    """What tells a value from others; TypeError where nothing does."""
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return [str(value.dtype), np.shape(value), _told(value.tolist())]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_told, value)]
    if isinstance(value, Mapping):
        return [type(value).__name__, *sorted(repr([_told(k), _told(v)]) for k, v in value.items())]
    if isinstance(value, partial):
        return ["partial", _told(value.func), _told(value.args), _told(value.keywords)]
    if isinstance(value, FunctionType):
        bound = [cell.cell_contents for cell in value.__closure__ or ()]
        own = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items(), *bound]
        names = sorted(_names(value.__code__) & set(value.__globals__))
        read = [[name, _global(value.__globals__[name])] for name in names]
        return [_source(value), _code(value.__code__), *map(_told, own), read]
    if hasattr(value, "model_dump_json"):
        return [_source(type(value)), value.model_dump_json()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            _source(type(value)),
            *(_told(getattr(value, field.name)) for field in dataclasses.fields(value)),
        ]
    raise TypeError(type(value).__name__)


def _code(code: CodeType) -> list[Any]:
    """What a function does: two lambdas of one line have all else in common."""
    inner = [_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, inner]


def _names(code: CodeType) -> set[str]:
    """The names that a function looks up, and the functions in it."""
    inner = [_names(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*inner)


def _global(value: Any) -> Any:
    """What a function reads of its module: of what is code, where it stands."""
    if isinstance(value, ModuleType | BuiltinFunctionType):
        return value.__name__
    if isinstance(value, type | FunctionType):
        return _source(value)
    return _told(value)


def _source(value: Any) -> list[str]:
    """The name of a function or class, its code's first line, and a digest of the file where it stands."""
    path = inspect.getsourcefile(value)
    if path is None:
        raise TypeError("no file")
    line = value.__code__.co_firstlineno if isinstance(value, FunctionType) else 0
    digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
    return [value.__module__, value.__qualname__, str(line), digest]


def _about(runs: Path) -> Path:
    """Where it is noted of what file runs were made."""
    return runs.parent.parent / "made" / f"{runs.stem}.json"


def _note(path: Path, said: Any) -> None:
    with _replacing.replacing(path) as partial_:
        partial_.write_text(json.dumps(said), encoding="utf-8")
