"""`read_events`: the events of a log as it is found, with a count of everything that is odd in it."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from riskcal import _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.serving.events import NAMES

#: Half of a surrogate pair, and before it what only looks like one: an escaped backslash, and whole pairs.
_HALF = re.compile(rb"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)")


@dataclass(frozen=True)
class Events:
    """What stands in a stretch of a log.

    Attributes
    ----------
    events : list of dict
        All that are whole, in the order of the file, those of unknown names among them, repeated ones too.
    offset : int
        Byte from which to read on: after the last line that is whole.
    torn_bytes : int
        Bytes after it: a line that is being written, or was torn by a crash. Read again from ``offset``.
    damaged : list of int
        Bytes at which lines begin that are no event: no JSON, no object, or no text ``name``.
    backwards : int
        Events whose clock is behind that of the line before. The file's order is the one that counts.
    repeated : int
        Events of one name with the request id of an earlier one.
    unknown : Counter
        Names that riskcal does not know.

    Examples
    --------
    >>> log = riskcal.serving.EventLog("events.jsonl")
    >>> for _ in range(2):  # the same request twice
    ...     log.write("riskcal.request.served", {"gen_ai.response.id": "r1"})
    >>> found = riskcal.serving.read_events("events.jsonl")
    >>> len(found.events), found.repeated, found.torn_bytes
    (2, 1, 0)
    """

    events: list[dict[str, Any]]
    offset: int
    torn_bytes: int
    damaged: list[int]
    backwards: int
    repeated: int
    unknown: Counter[str]

    def __str__(self) -> str:
        text = f"{len(self.events)} events"
        for count, what in (
            (len(self.damaged), "damaged lines"),
            (self.torn_bytes, "bytes of a torn last line"),
            (self.backwards, "clocks going backwards"),
            (self.repeated, "repeated ids"),
            (self.unknown.total(), "unknown events"),
        ):
            text += f", {count} {what}" if count else ""
        return text


def read_events(path: str | os.PathLike[str], *, offset: int = 0) -> Events:
    """Read a log from a byte on, to its last whole line.

    Parameters
    ----------
    path : path
        One file of a log.
    offset : int
        Where to begin, an earlier `Events.offset` of the same file.

    Raises
    ------
    RiskcalError
        If the file cannot be read, or ends before ``offset``: then it is another one, perhaps rotated.

    Examples
    --------
    >>> riskcal.serving.EventLog("events.jsonl").write("riskcal.request.served", {"gen_ai.response.id": "r1"})
    >>> found = riskcal.serving.read_events("events.jsonl")
    >>> print(found)
    1 events
    >>> later = riskcal.serving.read_events("events.jsonl", offset=found.offset)
    >>> len(later.events)  # nothing new yet
    0
    """
    _validate.count(offset, "offset", least=0)
    try:
        with _replacing.a_path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(offset)
            if offset <= size:
                return events_in(file.read(), offset)
    except OSError as error:
        raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
    raise RiskcalError(
        f"offset: {offset} is beyond the {size} bytes of {path}; it is another file: begin at 0."
    )


def events_in(data: bytes, offset: int) -> Events:
    """The events of what stands in a log from a byte on."""
    whole = data[: data.rfind(b"\n") + 1]
    events: list[dict[str, Any]] = []
    damaged: list[int] = []
    unknown: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    backwards = repeated = 0
    clock = -1
    at = offset
    for line in whole.split(b"\n")[:-1]:  # bytes.splitlines would split at a lone \r too
        start, at = at, at + len(line) + 1
        if not line.strip():
            continue
        event = parsed(line)
        if event is None:
            damaged.append(start)
            continue
        events.append(event)
        if event["name"] not in NAMES:
            unknown[event["name"]] += 1
        now = event.get("time_unix_nano")
        if isinstance(now, int):
            backwards += now < clock
            clock = now
        identity = request_id(event)
        if identity is not None:
            repeated += (event["name"], identity) in seen
            seen.add((event["name"], identity))
    return Events(events, at, len(data) - len(whole), damaged, backwards, repeated, unknown)


def request_id(event: dict[str, Any]) -> str | None:
    """The request that an event is about; None where it says none.

    Requests without an id of their own are numbered, from 0 with every engine: ``riskcal.session`` says which one it was.
    """
    attributes = event.get("attributes")
    if not isinstance(attributes, dict):
        return None
    found, session = attributes.get("gen_ai.response.id"), attributes.get("riskcal.session")
    if not isinstance(found, str):
        return None
    return f"{session}/{found}" if isinstance(session, str) else found


def parsed(line: str | bytes) -> dict[str, Any] | None:
    """The event in a line; None where it is damaged.

    Half of a surrogate pair, which a request may hold and no file or page can, is told by its escape.
    """
    data = line.encode("utf-8", "backslashreplace") if isinstance(line, str) else line
    if b"\\ud" in data or b"\\uD" in data:
        data = _HALF.sub(lambda found: b"\\" * (found[1] is not None) + found[0], data)
    try:
        event = _validate.from_json(data)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("name"), str) else None
