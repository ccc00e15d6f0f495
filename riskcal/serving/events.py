"""`EventLog`: what happened in production, one JSON object a line."""

import json
import os
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError

#: Names of events, and what each says. Others may stand in a log too; readers count them.
NAMES = {
    "riskcal.request.served": "a request ended",
    "riskcal.shadow.evaluated": "its output was compared with the full model's",
    "riskcal.shadow.missing": "it ended without an output that could be compared",
    "riskcal.shadow.dropped": "no slot was free for its shadow",
    "riskcal.route.unknown": "its task has no policy: full depth",
    "riskcal.policy.refused": "its policy was made for something else: full depth",
    "riskcal.kill_switch.pulled": "full depth from the next token on",
}

_JSON = json.JSONEncoder(allow_nan=False)
_PLAIN = {str, int, float, bool, type(None), dict}


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
    crash tore is ended before the next is written. Both files stay open between events, and are opened anew where somebody
    renamed or deleted one, and in a process that was forked. Nothing waits for the disk: what a machine that loses power had not
    written yet is lost.

    Examples
    --------
    >>> log = riskcal.serving.EventLog("events.jsonl")
    >>> log.write("riskcal.shadow.evaluated", {"gen_ai.response.id": "r1", "riskcal.loss": 0.25})
    >>> riskcal.serving.read_events("events.jsonl").events[0]["attributes"]
    {'gen_ai.response.id': 'r1', 'riskcal.loss': 0.25}
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = 256 * 2**20) -> None:
        self.path = _replacing.a_path(path)
        self.max_bytes = _validate.count(max_bytes, "max_bytes", least=1)
        self._thread = threading.Lock()
        self._files = _Files(self.path)
        _LOGS.add(self)

    def write(self, name: str, attributes: dict[str, Any] | None = None) -> None:
        """Append one event, whole.

        Raises
        ------
        RiskcalError
            For what JSON cannot hold (NaN too), or where nothing can be written.
        """
        self.write_all([(name, attributes)])

    def write_all(self, events: Iterable[tuple[str, dict[str, Any] | None]]) -> None:
        """Append events, all of them or none, for the cost of little more than one.

        Parameters
        ----------
        events : iterable of (str, dict or None)
            Names and attributes. They stand together in one file.

        Raises
        ------
        RiskcalError
            As `write`; then none of them is written.
        """
        lines = b"".join([_line(name, attributes) for name, attributes in events])
        if not lines:
            return
        try:
            with self._thread:
                try:
                    self._files.take()
                    self._append(lines)
                finally:
                    self._files.give_way()
        except OSError as error:
            raise RiskcalError(f"{self.path}: cannot be written ({error.strerror}).") from None

    def _append(self, lines: bytes) -> None:
        size = self._files.size
        if size and size + len(lines) > self.max_bytes:
            self.path.rename(self._next_name())
            self._files.open()
        self._files.append(lines)

    def _next_name(self) -> Path:
        last = rotated(self.path)[-1:]  # not their count: the oldest may have been moved away
        number = int(last[0].suffix[1:]) + 1 if last else 1
        return self.path.with_name(f"{self.path.name}.{number:06d}")


class _Files:
    """A log and its lock, once they are open.

    Attributes
    ----------
    size : int
        Of the log, once it was this one's turn.
    """

    def __init__(self, path: Path) -> None:
        self._log = self._lock = -1
        # as text, since they are looked at for every answer
        self._names = os.fspath(path), os.fspath(path.with_name(f".{path.name}.lock"))

    def take(self) -> None:
        """Wait until no other writes; then these are the files that others find, too."""
        import fcntl  # here, so that riskcal can be imported where there is none

        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self._are_found():
                return
            self.close()
        self._lock = os.open(self._names[1], os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.open()

    def open(self) -> None:
        """The log anew."""
        log, self._log = self._log, -1
        if log >= 0:
            os.close(log)
        self._log = os.open(self._names[0], os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._is = os.fstat(self._log)
        self.size, self._whole = self._is.st_size, 0

    def append(self, lines: bytes) -> None:
        """All of them; where they do not fit, the log is left as it was."""
        size, begun = self.size, lines
        known = size in (0, self._whole)  # where its last line ended whole
        if not known and os.pread(self._log, 1, size - 1) != b"\n":  # torn by a crash
            lines = begun = b"\n" + lines
        try:
            while lines:
                lines = lines[os.write(self._log, lines) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._log, size)
            raise
        self._whole = size + len(begun)

    def give_way(self) -> None:
        """To who waits; a fork's copy of the lock does too, which closing would leave to it."""
        import fcntl

        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Both."""
        held, self._log, self._lock = (self._log, self._lock), -1, -1
        for descriptor in held:
            if descriptor >= 0:
                os.close(descriptor)

    def _are_found(self) -> bool:
        if self._log < 0 or not os.fstat(self._lock).st_nlink:
            return False
        try:
            found = os.stat(self._names[0])  # noqa: PTH116  (a path would be slower)
        except OSError:
            return False
        self.size = found.st_size
        return found.st_ino == self._is.st_ino and found.st_dev == self._is.st_dev

    __del__ = close


def _begin_anew() -> None:
    """In a fork: with the parent's lock it would take the parent's turn, and keep it if the parent were killed."""
    for log in _LOGS:
        log._files.close()
        log._thread = threading.Lock()


#: That forks take along.
_LOGS: weakref.WeakSet[EventLog] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def rotated(path: str | os.PathLike[str]) -> list[Path]:
    """The files that a log was renamed to, oldest first."""
    target = Path(path)
    found = target.parent.glob(f"{target.name}.*")
    numbered = [file for file in found if file.name[len(target.name) + 1 :].isdecimal()]
    return sorted(numbered, key=lambda file: int(file.suffix[1:]))


def _line(name: str, attributes: dict[str, Any] | None) -> bytes:
    event = {"name": name, "time_unix_nano": time.time_ns(), "attributes": attributes or {}}
    try:
        if _is_plain(event):
            with suppress(ValueError):  # half of a surrogate pair
                line = to_json(event)
                if line.isascii() and b"NaN" not in line and b"Infinity" not in line:
                    return line + b"\n"
        return _JSON.encode(event).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise RiskcalError(
            f"attributes: {error}; give text, finite numbers, booleans, None, lists and dicts."
        ) from None


def _is_plain(values: dict[Any, Any]) -> bool:
    """Whether two encoders agree on it: pydantic's takes a third of the time of Python's, and more than JSON holds."""
    kinds = set(map(type, values.values()))
    if not (kinds <= _PLAIN and set(map(type, values)) <= {str}):
        return False
    return dict not in kinds or all(_is_plain(one) for one in values.values() if type(one) is dict)
