"""Standard input that says when nothing has come yet, so that what came is told before it is waited for more."""

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any


class Arriving(io.RawIOBase):
    """The bytes of a descriptor, which stays open.

    Attributes
    ----------
    before_waiting : callable, optional
        Is called whenever all that came was read, before the next bytes are waited for; it gives the seconds after which it
        wants to be called again if none came, or None.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.before_waiting: Callable[[], float | None] | None = None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """What is there, or comes next."""
        seconds = self.before_waiting() if self.before_waiting is not None else None
        while seconds is not None and not select.select([self._descriptor], [], [], seconds)[0]:
            seconds = self.before_waiting() if self.before_waiting is not None else None
        data = os.read(self._descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def arriving(file: Any) -> Arriving | None:
    """What is under a text file that `standard_input` gave, if it comes of a descriptor."""
    raw = getattr(getattr(file, "buffer", None), "raw", None)
    return raw if isinstance(raw, Arriving) else None


def standard_input() -> Any:
    """It as text, in UTF-8; bytes that are none are surrogates, and a byte-order mark is no part of it."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # it was replaced, by a test perhaps
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")
        return sys.stdin
    return io.TextIOWrapper(
        io.BufferedReader(Arriving(descriptor)),
        encoding="utf-8-sig",
        errors="surrogateescape",
        newline="",
    )
