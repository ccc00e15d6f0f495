"""Folders that are written whole or not at all."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from riskcal import RiskcalError, internal


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Fill a new neighbour and give it the folder's name, so that what has that name is one writer's work, and whole.

    The neighbour's name is drawn: writers in other threads, or in containers where all have one process id, fill their own.
    """
    with written(folder):
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
        staging.mkdir(parents=True)
        try:
            yield staging
            for file in staging.iterdir():
                internal.flush(file)
            _rename(staging, folder)
            internal.flush(folder.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _rename(staging: Path, folder: Path) -> None:
    """Rename onto a folder that may be there; no system does that in one step, so what is there is renamed away first."""
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    while True:
        old = staging.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
        with suppress(FileNotFoundError):
            folder.rename(old)
        try:
            staging.rename(folder)
            return
        except OSError as error:  # another writer was first
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """What cannot be written there is a `RiskcalError` that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        where, why = (
            getattr(error, "filename", None) or folder,
            getattr(error, "strerror", None) or error,
        )
        raise RiskcalError(
            f"{where}: cannot be written ({why}); make room, or give a folder that can be."
        ) from None
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise RiskcalError(
            f"{folder}: cannot be written ({str(error).splitlines()[0]}); make room, or give another."
        ) from None
