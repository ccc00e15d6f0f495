"""Where requests come from, an iterable or a queue that other threads put them into, and which of them are late."""

import heapq
import itertools
import queue
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from riskcal_adapters.torch.engine.requests import Flight


class Deadlines:
    """Requests with a time-out, soonest first. Those that were answered are forgotten now and then, so that memory is flat."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Flight]] = []
        self._numbers = itertools.count()
        self._most = 64

    def add(self, flight: Flight) -> None:
        """Watch one, if it has a time-out."""
        if flight.deadline == float("inf"):
            return
        heapq.heappush(self._heap, (flight.deadline, next(self._numbers), flight))
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if not entry[2].answered]
            heapq.heapify(self._heap)
            self._most = 64 + 2 * len(self._heap)

    def past(self, now: float) -> list[Flight]:
        """Those whose time is over and that were not answered, once each."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            flight = heapq.heappop(self._heap)[2]
            if not flight.answered:
                found.append(flight)
        return found


class Source(Protocol):
    """What an engine takes requests from."""

    def look(self) -> None:
        """Note what has been asked meanwhile, so that what waits is not late unnoticed."""

    def take(self, most: int, *, wait: bool) -> list[Flight]:
        """Up to so many; none where there are none, or if it waits, where there will be none any more."""


class Listed:
    """Of an iterable, which is read no further than asked for, and not at all once ``closed`` says so.

    Attributes
    ----------
    fault : Exception or None
        What the iterable raised: it ended there, and what it gave before is served.
    """

    def __init__(
        self, flights: Iterable[Flight], deadlines: Deadlines, closed: Callable[[], bool]
    ) -> None:
        self._flights = iter(flights)
        self._deadlines, self._closed = deadlines, closed
        self._ended = False
        self.fault: Exception | None = None

    def look(self) -> None:
        """Nothing waits."""

    def take(self, most: int, *, wait: bool) -> list[Flight]:
        """The next ones."""
        taken: list[Flight] = []
        while len(taken) < most and not self._ended and not self._closed():
            try:
                flight = next(self._flights)
            except StopIteration:
                self._ended = True
            except Exception as error:
                self.fault, self._ended = error, True
            else:
                self._deadlines.add(flight)
                taken.append(flight)
        return taken


class Queued:
    """Of a queue that ends with None."""

    def __init__(self, asked: "queue.SimpleQueue[Flight | None]", deadlines: Deadlines) -> None:
        self._asked, self._deadlines = asked, deadlines
        self._waiting: deque[Flight] = deque()
        self._ended = False

    def look(self) -> None:
        """Whatever was put into the queue waits here, where its time can run out."""
        while not self._ended and not self._asked.empty():
            self._read()

    def take(self, most: int, *, wait: bool) -> list[Flight]:
        """What is there; if it waits, at least one."""
        self.look()
        taken = self._next(most)
        while wait and not taken and not self._ended:
            self._read()
            self.look()
            taken = self._next(most)
        return taken

    def _read(self) -> None:
        one = self._asked.get()
        if one is None:
            self._ended = True
        else:
            self._waiting.append(one)
            self._deadlines.add(one)

    def _next(self, most: int) -> list[Flight]:
        taken: list[Flight] = []
        while self._waiting and len(taken) < most:
            flight = self._waiting.popleft()
            if not flight.answered:  # late, or cancelled while it waited
                taken.append(flight)
        return taken
