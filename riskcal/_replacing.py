"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from riskcal._validate import RiskcalError, shown


def a_path(path: Any) -> Path:
    """Where a file stands, or will stand; what begins with ``~`` is in the home folder, as pandas and polars have it."""
    named = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(named, str) or "\0" in named:
        raise RiskcalError(f"path: {shown(path)} is no path of a file.")
    with suppress(RuntimeError):  # of nobody's home
        return Path(named).expanduser()
    return Path(named)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write to a temporary neighbour and rename it into place, so that a crash leaves the old file or the new one whole.

    The neighbour's name is drawn, and the file made by whoever is first: two writers never share one, be they threads or
    processes that have the same id in containers of their own. What is renamed is on the disk before its name is.
    """
    target = a_path(path)
    if target.is_dir():  # told before anything is written, here or by who writes two files
        raise RiskcalError(f"{target}: cannot be written (Is a directory).")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield partial
        flush(partial)
        os.replace(partial, target)
        flush(target.parent)
    except OSError as error:
        raise RiskcalError(f"{target}: cannot be written ({error.strerror or error}).") from None
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; some systems cannot wait for a folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
