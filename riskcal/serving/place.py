"""Where reading a log ended, and whether its files are still those: names move on at rotations, numbers of files come again."""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

from riskcal import _replacing
from riskcal._validate import RiskcalError
from riskcal.serving.events import rotated

#: How often files are looked for until two looks agree.
_LOOKS = 50
#: Bytes before a place by which a file is known again.
_KNOWN_BY = 4096


def files_of(path: str | os.PathLike[str]) -> list[tuple[Path, int]]:
    """The files of a log with their inodes, oldest first, as they were at one moment: rotations in between are looked past.

    Of a log that rotates without pause, as they were last seen.

    Raises
    ------
    RiskcalError
        Where there is no such log.
    """
    looks: list[Any] = [None]
    for _ in range(_LOOKS):
        try:
            looks.append(
                [(file, file.stat().st_ino) for file in [*rotated(path), _replacing.a_path(path)]]
            )
        except OSError as error:  # a rotation is between two names, or there is none
            looks.append(error.strerror)
        if looks[-1] == looks[-2]:
            break
    seen = next((look for look in reversed(looks) if isinstance(look, list)), None)
    if seen is None or looks[-1] == looks[-2] != seen:
        raise RiskcalError(f"{path}: cannot be read ({looks[-1]}).")
    return list(seen)


def known_by(file: BinaryIO, offset: int) -> str:
    """A digest of what stands before a byte; the file is left there."""
    start = max(0, offset - _KNOWN_BY)
    file.seek(start)
    return hashlib.blake2b(file.read(offset - start), digest_size=16).hexdigest()
