"""`EventLog`: what happened in production, one JSON object a line."""

import functools
import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

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
#: A text as JSON has it.
quoted: Callable[[str], str] = _JSON.encode


class Encoded(str):
    """Attributes as JSON has them, less the braces: of whoever writes many alike, and need not make a dictionary of each."""

    __slots__ = ()

    @classmethod
    def of(cls, attributes: dict[str, Any]) -> Self:
        """As a line holds them.

        Raises
        ------
        RiskcalError
            For what JSON cannot hold.
        """
        if not isinstance(attributes, dict):
            raise RiskcalError(
                f"attributes: {_validate.shown(attributes)} is no dictionary; give names and values."
            )
        return cls(_encoded(attributes)[1:-1])


_APPENDED = os.O_RDWR | os.O_APPEND | os.O_CREAT


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
        # as text, since a log is opened for every request
        self._name = os.fspath(self.path)
        self._lock = os.fspath(self.path.with_name(f".{self.path.name}.lock"))
        self._thread = threading.Lock()
        _LOGS.add(self)

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Path]]:
        # to be sent to other processes, which a lock cannot be: they take turns by the file's
        return functools.partial(type(self), max_bytes=self.max_bytes), (self.path.absolute(),)

    def write(self, name: str, attributes: dict[str, Any] | None = None) -> None:
        """Append one event, whole.

        Raises
        ------
        RiskcalError
            For what JSON cannot hold (NaN too), or where nothing can be written.
        """
        self.write_all([(name, attributes)])

    def write_all(self, events: Iterable[tuple[str, dict[str, Any] | Encoded | None]]) -> None:
        """Append events, all of them or none, for the cost of little more than one.

        Parameters
        ----------
        events : iterable of (str, dict, Encoded or None)
            Names and attributes. They stand together in one file.

        Raises
        ------
        RiskcalError
            As `write`; then none of them is written.
        """
        import fcntl  # here, so that riskcal can be imported where there is none

        lines = "".join([_line(name, attributes) for name, attributes in events]).encode()
        if not lines:
            return
        try:
            with self._thread:
                lock = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    self._append(lines)
                finally:
                    with suppress(OSError):
                        fcntl.flock(lock, fcntl.LOCK_UN)  # closing would leave it to a fork's copy
                    os.close(lock)
        except OSError as error:
            raise RiskcalError(f"{self.path}: cannot be written ({error.strerror}).") from None

    def _append(self, lines: bytes) -> None:
        # Opened each time: another process may have renamed the file since.
        file = os.open(self._name, _APPENDED, 0o666)
        try:
            size = os.lseek(file, 0, os.SEEK_END)
            if size == 0 or size + len(lines) <= self.max_bytes:
                _write_whole(file, lines, size)
                return
        finally:
            os.close(file)
        self.path.rename(self._next_name())
        self._append(lines)

    def _next_name(self) -> Path:
        last = rotated(self.path)[-1:]  # not their count: the oldest may have been moved away
        number = int(last[0].suffix[1:]) + 1 if last else 1
        return self.path.with_name(f"{self.path.name}.{number:06d}")


def _begin_anew() -> None:
    """In a fork: a thread that was writing is not in it, and would never give way."""
    for log in _LOGS:
        log._thread = threading.Lock()


#: That forks take along.
_LOGS: weakref.WeakSet[EventLog] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def rotated(path: str | os.PathLike[str]) -> list[Path]:
    """The files that a log was renamed to, oldest first."""
    target = _replacing.a_path(path)
    found = target.parent.glob(f"{target.name}.*")
    numbered = [file for file in found if file.name[len(target.name) + 1 :].isdecimal()]
    return sorted(numbered, key=lambda file: int(file.suffix[1:]))


def _line(name: str, attributes: dict[str, Any] | Encoded | None) -> str:
    given = {} if attributes is None else attributes
    told = given if isinstance(given, Encoded) else Encoded.of(given)
    return f'{{"name": {_encoded(name)}, "time_unix_nano": {time.time_ns()}, "attributes": {{{told}}}}}\n'


def _encoded(value: Any) -> str:
    try:
        return _JSON.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RiskcalError(
            f"attributes: {error}; give text, finite numbers, booleans, None, lists and dicts."
        ) from None


def _write_whole(descriptor: int, lines: bytes, size: int) -> None:
    """All of them at the end of a file of this size; where they do not fit, it is left as it was."""
    if size and os.pread(descriptor, 1, size - 1) != b"\n":  # torn by a crash
        lines = b"\n" + lines
    try:
        while lines:
            lines = lines[os.write(descriptor, lines) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
