"""Where requests come from: an iterable, or a queue that other threads put them into."""

import itertools
import queue
from collections.abc import Iterable
from typing import Protocol

from riskcal_adapters.torch.engine.requests import Flight


class Source(Protocol):
    """What an engine takes requests from."""

    def take(self, most: int, *, wait: bool) -> list[Flight]:
        """Up to so many; none where there are none, or if it waits, where there will be none any more."""


class Listed:
    """Of an iterable, which is read no further than asked for."""

    def __init__(self, flights: Iterable[Flight]) -> None:
        self._flights = iter(flights)

    def take(self, most: int, *, wait: bool) -> list[Flight]:
        """The next ones."""
        return list(itertools.islice(self._flights, most))


class Asked:
    """Of a queue that ends with None."""

    def __init__(self, asked: "queue.SimpleQueue[Flight | None]") -> None:
        self._asked, self._ended = asked, False

    def take(self, most: int, *, wait: bool) -> list[Flight]:
        """What is there; if it waits, at least one."""
        taken: list[Flight] = []
        while len(taken) < most and not self._ended:
            try:
                one = self._asked.get(block=wait and not taken)
            except queue.Empty:
                break
            if one is None:
                self._ended = True
            else:
                taken.append(one)
        return taken
