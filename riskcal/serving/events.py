"""`EventLog`: what happened in production, one JSON object a line."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError

#: Names of events, and what each says. Others may stand in a log too; readers count them.
NAMES = {
    "riskcal.request.served": "a request ended",
    "riskcal.shadow.evaluated": "its output was compared with the full model's",
    "riskcal.shadow.dropped": "no slot was free for its shadow",
    "riskcal.route.unknown": "its task has no policy: full depth",
    "riskcal.policy.refused": "its policy was made for something else: full depth",
    "riskcal.kill_switch.pulled": "full depth from the next token on",
}


class EventLog:
    """Append events to a file, for several threads and processes at once (POSIX).

    Parameters
    ----------
    path : path
        Where to append.
    max_bytes : int
        A file that would grow beyond this is renamed to ``path.000001``, ``path.000002`` and so on, oldest first, and a new
        one begun. None is ever deleted: that is for whoever knows what has been read.

    Notes
    -----
    A line is ``{"name", "time_unix_nano", "attributes"}``, a log record of OpenTelemetry. Attributes have the names of its
    generative-AI conventions where there are any (``gen_ai.request.model``, ``gen_ai.request.temperature``,
    ``gen_ai.request.max_tokens``, ``gen_ai.response.id``, ``gen_ai.usage.output_tokens``), else names that begin with
    ``riskcal.``.

    Writers take turns by a lock on ``.path.lock``, so that a line is whole and no two of them rotate at once. A line that a
    crash tore is ended before the next is written. Nothing waits for the disk: what a machine that loses power had not
    written yet is lost.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 256 * 2**20) -> None:
        self.path = _replacing.a_path(path)
        self.max_bytes = _validate.count(max_bytes, "max_bytes", least=1)
        self._thread = threading.Lock()

    def write(self, name: str, attributes: dict[str, Any] | None = None) -> None:
        """Append one event, whole.

        Raises
        ------
        RiskcalError
            For what JSON cannot hold (NaN too), or where nothing can be written.
        """
        event = {
            "name": name,
            "time_unix_nano": time.time_ns(),
            "attributes": attributes or {},
        }
        try:
            line = json.dumps(event, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise RiskcalError(
                f"attributes: {error}; give text, finite numbers, booleans, None, lists and dicts."
            ) from None
        try:
            with self._turn():
                self._append(line)
        except OSError as error:
            raise RiskcalError(f"{self.path}: cannot be written ({error.strerror}).") from None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        import fcntl  # here, so that riskcal can be imported where there is none

        lock = self.path.with_name(f".{self.path.name}.lock")
        with self._thread:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)  # lets the lock go

    def _append(self, line: bytes) -> None:
        # Opened each time: another process may have renamed the file since.
        with self.path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0 or size + len(line) <= self.max_bytes:
                _write_whole(file.fileno(), line, size)
                return
        self.path.rename(self._next_name())
        with self.path.open("ab+", buffering=0) as file:
            _write_whole(file.fileno(), line, 0)

    def _next_name(self) -> Path:
        last = rotated(self.path)[-1:]  # not their count: the oldest may have been moved away
        number = int(last[0].suffix[1:]) + 1 if last else 1
        return self.path.with_name(f"{self.path.name}.{number:06d}")


def rotated(path: str | os.PathLike[str]) -> list[Path]:
    """The files that a log was renamed to, oldest first."""
    target = Path(path)
    found = target.parent.glob(f"{target.name}.*")
    numbered = [file for file in found if file.name[len(target.name) + 1 :].isdecimal()]
    return sorted(numbered, key=lambda file: int(file.suffix[1:]))


def _write_whole(descriptor: int, line: bytes, size: int) -> None:
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line
    while line:
        line = line[os.write(descriptor, line) :]
