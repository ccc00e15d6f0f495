"""Tables in files: Parquet, CSV, JSON lines, packed or not, and folders, patterns and lists of them."""

import csv
import glob
import io
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv

from riskcal import _parquet, _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.records.columns import canonical, is_unicode, of_arrow
from riskcal.records.joining import JSON_LINES, Places, together

#: Columns that stay text when a CSV is read, so that ids such as 007 keep their zeros.
TEXT_COLUMNS = (
    "prompt",
    "cluster",
    "group",
    "measure",
    "form",
    "source",
    "text",
    "references",
    "threshold",
)

#: Those of them that are read back as integers where they are written like some.
ID_COLUMNS = ("prompt", "cluster")

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

_INTEGER = re.compile(r"0|-?[1-9]\d{0,18}")


def read(source: Source, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table in a file, by its ending, or in all files of a folder or a pattern, by their names, or of a list, in its order.

    Columns keep their names. ``names`` gives the file's name of each of riskcal's columns that has another there, to be read so.
    """
    return read_placed(source, names)[0]


def read_placed(
    source: Source, names: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, Places]:
    """As `read`, and which file each of the rows stands in."""
    found = parts(source)
    tables = [read_part(part, names) for part in found]
    places = Places([part.file for part in found], [len(table) for table in tables])
    return together(tables, names or {}), places


@dataclass(frozen=True)
class Part:
    """One file of a source, and the folder that was given, below which names of folders are columns."""

    file: Path
    folder: Path | None = None


def parts(source: Source) -> list[Part]:
    """The files that a source means, in the order in which they are read; at least one."""
    if not isinstance(source, str | os.PathLike):
        if isinstance(source, bytes) or not isinstance(source, Iterable):
            raise RiskcalError(
                f"path: {source!r} is no path; give a file, a folder, a pattern or a list of these."
            )
        paths = [*source]
        if not paths:
            raise RiskcalError("path: the list is empty; give at least one file.")
        if len(paths) > 1 and all(
            isinstance(one, str | os.PathLike) and Path(one).is_file() for one in paths
        ):
            files = [Path(os.path.abspath(one)) for one in paths]  # noqa: PTH100  (links stay as they are)
            above = Path(os.path.commonpath(files))
            return [Part(file, above) for file in files]
        return [part for one in paths for part in parts(one)]
    path = Path(source)
    if path.is_dir():
        return [Part(file, path) for file in _files(path)]
    if not path.exists():
        matching = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  (pathlib has no patterns of absolute paths)
        if matching:
            fixed = [*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)]
            if all(Path(one).is_file() for one in matching):
                return [Part(Path(one), Path(*fixed)) for one in matching]
            return parts(matching)
        raise RiskcalError(f"{path}: no such file.")
    return [Part(path)]


def read_part(part: Part, names: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The table in one file, with what the names of its folders say."""
    return in_its_folder(_read_file(part.file, names or {}), part, names or {})


def _files(folder: Path) -> list[Path]:
    """Every file below a folder; one that cannot be read is named rather than left out."""
    try:
        seen = [file for file in _contents(folder, set()) if not _is_mark(file)]
    except OSError as error:
        raise RiskcalError(
            f"{error.filename or folder}: cannot be read ({error.strerror})."
        ) from None
    files = [file for file in seen if _ending(file)[0] in _KINDS]
    others = [file for file in seen if _ending(file)[0] not in _KINDS]
    if others:
        named = ", ".join(str(file.relative_to(folder)) for file in others[:20])
        table = files[0] if files else Path("any.parquet")
        ending = "".join(table.suffixes[-2 if _ending(table)[1] else -1 :])
        raise RiskcalError(
            f"{folder}: holds {len(others)} files that are no tables ({named}{', ...' if len(others) > 20 else ''}), and would "
            f"be read without them. Move them elsewhere, or give the tables alone: a list of files, or a pattern such as "
            f"'{folder}/**/*{ending}'."
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
    return file.name[0] in "._" and _ending(file)[0] not in _KINDS


def in_its_folder(frame: pd.DataFrame, part: Part, names: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a file with what folders such as ``threshold=0.9`` say of them as columns."""
    below = () if part.folder is None else part.file.relative_to(part.folder).parts[:-1]
    for folder in below:
        name, says, value = folder.partition("=")
        if not says:
            continue
        if name in frame.columns:
            raise RiskcalError(
                f"{part.file}: {name} is a column of the file and the name of its folder; keep one of the two."
            )
        frame = frame.assign(**{name: _partition_value(name, urllib.parse.unquote(value), names)})
    return frame


def _partition_value(name: str, value: str, names: Mapping[str, str]) -> Any:
    if value == "__HIVE_DEFAULT_PARTITION__":
        return None
    if name in _in_the_file(TEXT_COLUMNS, names):
        is_id = name in _in_the_file(ID_COLUMNS, names)
        return int(value) if is_id and _INTEGER.fullmatch(value) else value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _in_the_file(columns: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """How a file calls these columns: by their name, unless that name is another's, or by what ``names`` says."""
    own = [name for name in columns if name not in names and name not in names.values()]
    return {*own, *(names[name] for name in columns if name in names)}


def write(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table in the format of the path's ending, packed if that says so; a file is replaced whole or not at all."""
    target = _replacing.a_path(path)
    kind = _kind(target)
    if kind == "json":
        raise RiskcalError(
            f"{target}: rows are written as .parquet, .csv or .jsonl; use one of these."
        )
    with _replacing.replacing(target) as partial:
        try:
            _write_as(kind, _ending(target)[1], frame, partial)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RiskcalError(
                f"{target}: cannot be written as {kind} ({_validate.reason(error)})."
            ) from None


def _write_as(kind: str, packed: str | None, frame: pd.DataFrame, path: Path) -> None:
    if kind == "parquet":
        _parquet.write(pa.Table.from_pandas(frame, preserve_index=False), path)
        return
    with (
        pa.output_stream(str(path), compression=packed) as stream,
        io.TextIOWrapper(stream, encoding="utf-8", newline="") as file,
    ):
        if kind == "csv":  # a bare carriage return ends a row
            frame.to_csv(file, index=False, quoting=csv.QUOTE_NONNUMERIC)
            return
        for row in frame.to_dict("records"):
            named = {key: _jsonable(str(key), value) for key, value in row.items()}
            file.write(json.dumps(named) + "\n")


def _ending(path: Path) -> tuple[str, str | None]:
    """The ending that says what a file holds, and how it is packed."""
    packed = _PACKED.get(path.suffix.lower())
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _kind(path: Path) -> str:
    ending, packed = _ending(path)
    if ending not in _KINDS or (packed and _KINDS[ending] == "parquet"):
        raise RiskcalError(
            f"{path}: unknown ending {''.join(path.suffixes[-2:])!r}; use .parquet, .csv or .jsonl (also .csv.gz, .jsonl.zst)."
        )
    return _KINDS[ending]


def _read_file(path: Path, names: Mapping[str, str]) -> pd.DataFrame:
    kind = _kind(path)
    try:
        if path.stat().st_size == 0:
            raise RiskcalError(f"{path}: the file is empty.")
        if kind == "parquet":
            return canonical(of_arrow(_parquet.read(path)))
        with pa.input_stream(str(path), compression=_ending(path)[1]) as stream:
            if kind == "csv":
                return _read_csv(stream, names)
            return _read_json_lines(stream, path) if kind == "jsonl" else _read_json(stream, path)
    except RiskcalError as error:
        raise (
            error if str(error).startswith(str(path)) else RiskcalError(f"{path}: {error}")
        ) from None
    except UnicodeDecodeError as error:
        raise RiskcalError(f"{path}: is not UTF-8 text ({error}).") from None
    except OSError as error:
        raise RiskcalError(
            f"{path}: cannot be read ({error.strerror or _validate.reason(error)})."
        ) from None
    except (pa.ArrowException, ValueError) as error:
        raise RiskcalError(
            f"{path}: not a readable {kind} file ({_validate.reason(error)})."
        ) from None


def _read_csv(stream: Any, names: Mapping[str, str]) -> pd.DataFrame:
    text = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(_in_the_file(TEXT_COLUMNS, names), pa.string()),
        strings_can_be_null=False,
    )
    lines = pa.csv.ParseOptions(newlines_in_values=True)
    content = stream.read()
    _refuse_other_separators(content)
    table = pa.csv.read_csv(pa.BufferReader(content), parse_options=lines, convert_options=text)
    frame = of_arrow(table)
    return canonical(_restore_integers(frame, _in_the_file(ID_COLUMNS, names)))


def _refuse_other_separators(content: bytes) -> None:
    """Refuse a header of several columns none of which a comma parts, with the way that reads it."""
    header = content[:100_000].partition(b"\n")[0].decode("utf-8", errors="replace").strip()
    found = next((mark for mark in ";\t|" if mark in header and "," not in header), None)
    if found is not None:
        comma = ", decimal=','" if re.search(rb"\d,\d", content[:100_000]) else ""
        raise RiskcalError(
            f"its columns are parted by {found!r}, not by commas. Read it with pandas, and check the table that you get: "
            f"Runs.from_frame(pandas.read_csv(path, sep={found!r}{comma}))."
        )


def _read_json_lines(stream: Any, path: Path) -> pd.DataFrame:
    frame = canonical(pd.DataFrame([row for _, row in _objects(stream, path)]))
    frame.attrs[JSON_LINES] = True
    return frame


def _read_json(stream: Any, path: Path) -> pd.DataFrame:
    """An array of rows; one object of totals and means, as benchmarks write, holds none."""
    content = _validate.from_json(stream.read().decode("utf-8-sig"))
    if (
        not isinstance(content, list)
        or not content
        or not all(isinstance(r, dict) for r in content)
    ):
        found = (
            f"an object of {', '.join(map(repr, content))}"
            if isinstance(content, dict)
            else "no rows"
        )
        raise RiskcalError(
            f"{path}: holds {found[:200]}, not an array of one object per row. A certificate needs each prompt's "
            "loss: of means over prompts none can be made, and outputs that were left out of them, empty ones for instance, "
            "would be missing. Write a row per prompt and candidate, JSON lines for instance."
        )
    frame = canonical(pd.DataFrame(content))
    frame.attrs[JSON_LINES] = True
    return frame


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects in a file of JSON lines with the numbers of their rows, as they stand there."""
    try:
        with pa.input_stream(str(path), compression=_ending(path)[1]) as stream:
            yield from _objects(stream, path)
    except UnicodeDecodeError as error:
        raise RiskcalError(f"{path}: is not UTF-8 text ({error}).") from None
    except (OSError, pa.ArrowException) as error:
        raise RiskcalError(f"{path}: cannot be read ({_validate.reason(error)}).") from None


def _objects(stream: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # some programs begin a file with a byte-order mark
    for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig")):
        if not line.strip():
            continue
        try:
            row = _validate.from_json(line)
        except ValueError as error:
            raise RiskcalError(f"{path}: row {number} is not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise RiskcalError(f"{path}: row {number} is not a JSON object.")
        if "\\ud" in line.lower() and not is_unicode(json.dumps(row, ensure_ascii=False)):
            raise RiskcalError(
                f"{path}: row {number} is not valid Unicode (a lone surrogate); repair it."
            )
        yield number, row


def _restore_integers(frame: pd.DataFrame, ids: set[str]) -> pd.DataFrame:
    """Read ids back as integers where a CSV's text is exactly how integers are written."""
    for name in ids:
        if (
            list(frame.columns).count(name) == 1
            and frame[name].str.fullmatch(_INTEGER.pattern).all()
        ):
            with suppress(OverflowError):  # 19 digits may be more than an int64 holds
                frame[name] = frame[name].astype("int64")
    return frame


def _jsonable(name: str, value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return "full" if name == "threshold" and value == float("inf") else value
