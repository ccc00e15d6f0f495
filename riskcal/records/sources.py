"""What a source of tables means: a file, all files of a folder or a pattern, or a list of these."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError

#: What a path may be: a file, a folder, a pattern such as ``logs/*.jsonl``, or a list of these.
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

#: Stands in the folders that `riskcal_adapters.record` writes: their shards are at the top, and what is below is not runs.
RECORDING = "recording.json"

_KINDS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
}

_PACKED = {".gz": "gzip", ".zst": "zstd"}

#: How files begin that are no text; the longer of two beginnings first. Marks of letters alone may begin a CSV's header.
_OTHER_BYTES = {
    rb"\xff\xfe\0\0": "UTF-32; write it as UTF-8",
    rb"\xff\xfe": "UTF-16, as Excel and PowerShell write it; write it as UTF-8",
    rb"\xfe\xff": "UTF-16; write it as UTF-8",
    rb"\x1f\x8b": "packed by gzip; let its name end in .gz",
    rb"\x28\xb5\x2f\xfd": "packed by zstd; let its name end in .zst",
    rb"BZh[1-9]1AY&SY": "packed by bzip2; unpack it",
    rb"\xfd7zXZ": "packed by xz; unpack it",
    rb"PK(\x03\x04|\x05\x06)": "a zip archive, as .xlsx files are; unpack it, or write it as CSV",
    rb"PAR1[\0-\x08\x0e-\x1f\xf8-\xff]": "Parquet; let its name end in .parquet",
    rb"ARROW1\0\0": "Arrow IPC (Feather); write it as Parquet, pandas.read_feather(path).to_parquet(...)",
}

#: How many bytes of a file tell that.
OPENING = 16

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


@dataclass(frozen=True)
class Part:
    """One file of a source, and the folder that was given, below which names of folders are columns."""

    file: Path
    folder: Path | None = None


def listed(source: Any) -> Any:
    """A source that can be gone through again: what yields paths once, as ``folder.glob("*.csv")`` does, as a list."""
    return list(source) if isinstance(source, Iterator) and not hasattr(source, "read") else source


def named(source: Any) -> str:
    """A source as messages name it."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    paths = [str(path) for path in source]
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"


def parts(source: Source) -> list[Part]:
    """The files that a source means, in the order in which they are read; at least one."""
    if not isinstance(source, str | os.PathLike):
        return _of_several(source)
    if not str(source):
        raise RiskcalError(
            "path: is empty; give a file, a folder, a pattern or a list of these ('.' is this folder)."
        )
    return _of_one(_replacing.a_path(source))


def exists(path: Path, name: str = "path") -> bool:
    """Whether there is such a file or folder. `Path.exists` calls absent, from Python 3.14 on, what cannot be looked for."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:  # a name that no file can have, the content of one for instance
        raise RiskcalError(
            f"{name}: {_validate.shown(str(path))} cannot be looked for ({error.strerror})."
        ) from None
    return True


def _of_several(source: Any) -> list[Part]:
    """The files of a list; names of folders below the one that all paths share are columns."""
    _refuse_what_is_open_or_read(source)
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise RiskcalError(
            f"path: {source!r} is no path; give a file, a folder, a pattern or a list of these."
        )
    paths = [*source]
    if not paths:
        raise RiskcalError("path: the list is empty; give at least one file.")
    if len(paths) > 1 and all(
        isinstance(one, str | os.PathLike) and os.path.exists(one)  # noqa: PTH110  (no error for odd names)
        for one in paths
    ):
        found = [Path(os.path.abspath(one)) for one in paths]  # noqa: PTH100  (links stay as they are)
        above = Path(os.path.commonpath(found))
        return [Part(part.file, above) for one in found for part in parts(one)]
    return [part for one in paths for part in parts(one)]


def _refuse_what_is_open_or_read(source: Any) -> None:
    """A file that is open has no ending that says what it holds, and a table has been read."""
    if hasattr(source, "read"):
        raise RiskcalError(
            f"path: {_validate.shown(source)} is no path, but an open file; give its path, or let pandas read it and give "
            "the table to from_frame."
        )
    is_column = hasattr(source, "to_list")  # of paths, perhaps
    if isinstance(source, dict) or any(
        hasattr(source, name) and not is_column
        for name in ("__arrow_c_stream__", "__arrow_c_array__", "columns")
    ):
        raise RiskcalError(
            f"path: a {type(source).__name__} is no path, but a table; give it to from_frame."
        )


def _of_one(path: Path) -> list[Part]:
    if exists(path):
        return [Part(file, path) for file in _files(path)] if path.is_dir() else [Part(path)]
    matching = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  (pathlib has no patterns of absolute paths)
    if matching:
        fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        return [Part(part.file, fixed) for one in matching for part in parts(one)]
    if _ADDRESS.match(str(path)):
        raise RiskcalError(
            f"{path}: no such file. It looks like an address, and files are read where they lie: let pandas or pyarrow read "
            "it, and give the table to from_frame; or copy it here."
        )
    raise RiskcalError(f"{path}: no such file.{_hint(str(path))}")


def _hint(path: str) -> str:
    """What a path may mean that is no file's."""
    if path == "-":
        return " Standard input has no name that says what it holds: write it into a file, runs.csv for instance."
    if "$" in path:
        return " Variables of the environment are not filled in: os.path.expandvars(path) does."
    return ""


def _files(folder: Path) -> list[Path]:
    """Every file below a folder; one that cannot be read is named rather than left out."""
    try:
        seen = [file for file in _contents(folder, set()) if not _is_mark(file)]
    except OSError as error:
        raise RiskcalError(
            f"{error.filename or folder}: cannot be read ({error.strerror})."
        ) from None
    files = [file for file in seen if ending(file)[0] in _KINDS]
    others = [file for file in seen if ending(file)[0] not in _KINDS]
    if others:
        told = ", ".join(str(file.relative_to(folder)) for file in others[:20])
        table = files[0] if files else Path("any.parquet")
        last = "".join(table.suffixes[-2 if ending(table)[1] else -1 :])
        raise RiskcalError(
            f"{folder}: holds files that are no tables ({len(others)}: {told}{', ...' if len(others) > 20 else ''}), and "
            f"would be read without them. Move them elsewhere, or give the tables alone: a list of files, or a pattern such as "
            f"'{folder}/**/*{last}'."
        )
    if not files:
        raise RiskcalError(f"{folder}: the folder holds no .parquet, .csv or .jsonl file.")
    return files


def _contents(folder: Path, entered: set[Path]) -> Iterator[Path]:
    """All files to the folder's depth, links followed, none twice; of a recording its table alone, which stands at the top."""
    if (real := folder.resolve()) in entered:
        return
    entered.add(real)
    recorded = (folder / RECORDING).exists()
    for path in sorted(folder.iterdir()):
        if recorded and path.name in (RECORDING, "traces", "unfinished"):
            continue
        if path.is_dir():
            yield from _contents(path, entered)
        else:
            yield path


def _is_mark(file: Path) -> bool:
    """Whether a file is a mark of some program (``.DS_Store``, ``_SUCCESS``), or not whole yet, and no table."""
    return file.name[0] in "._" and ending(file)[0] not in _KINDS


def ending(path: Path) -> tuple[str, str | None]:
    """The ending that says what a file holds, and how it is packed."""
    packed = _PACKED.get(path.suffix.lower())
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def kind(path: Path, otherwise: str = "") -> str:
    """What a file holds, by its ending: parquet, csv, jsonl or json; ``otherwise`` is what to do with another."""
    end, packed = ending(path)
    if end not in _KINDS or (packed and _KINDS[end] == "parquet"):
        raise RiskcalError(
            f"{path}: unknown ending {''.join(path.suffixes[-2:])!r}; use .parquet, .csv or .jsonl (also .csv.gz, .jsonl.zst)."
            f"{otherwise}"
        )
    return _KINDS[end]


def what_it_is(path: Path, error: Exception) -> str:
    """What stands in a file that is no text, by its first bytes; else, and of a packed one, what its reader says."""
    if ending(path)[1] is not None:
        return _validate.reason(error)
    with path.open("rb") as file:
        other = no_text(file.read(OPENING))
    return f"it is {other}" if other else _validate.reason(error)


def no_text(start: bytes) -> str | None:
    """What a file is that begins like this, and what to do; None of text."""
    return next(
        (what for mark, what in _OTHER_BYTES.items() if re.match(mark, start, re.DOTALL)), None
    )
