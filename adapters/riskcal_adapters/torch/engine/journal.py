"""What an engine tells: events, and what became of telling them. No log and no loss of a user's ends a request."""

import logging
from typing import Any

from riskcal.internal import shown
from riskcal.serving import EventLog
from riskcal.serving.events import Encoded, quoted
from riskcal.serving.switch import Pull
from riskcal_adapters.torch.engine.requests import Done, Flight
from riskcal_adapters.torch.engine.shadows import Loss, compared
from riskcal_adapters.torch.engine.stats import Counts
from riskcal_adapters.torch.engine.telling import Telling

_LOGGER = logging.getLogger("riskcal")


class Journal:
    """Events of one engine.

    Parameters
    ----------
    events : EventLog or None
    counted : Counts
        Where what could not be written is counted. The next event that can be says how many were lost before it.
    telling : Telling or None
        What is told of requests beside their answers; None where there is no log.
    session : str
        Tells the numbers of requests without ids from those of other engines that write to the same log.
    """

    def __init__(
        self, events: EventLog | None, counted: Counts, telling: Telling | None, session: str
    ) -> None:
        self._events, self._counted, self._session = events, counted, session
        self._telling = telling
        self._told: list[tuple[str, Encoded]] = []
        self._unwritten = 0

    def write(self, name: str, told: dict[str, Any], flight: Flight | None = None) -> None:
        """Note an event, of a request or of none, for the next `flush`."""
        if self._events is not None:
            inside = Encoded.of(told)
            if flight is not None:
                known = self._known(flight)
                inside = Encoded(f"{known}, {inside}" if inside else known)
            self._told.append((name, inside))

    def flush(self) -> None:
        """Append what was noted; what cannot be written is counted, and logged."""
        if self._events is None or not self._told:
            return
        told, self._told = self._told, []
        if self._unwritten:
            name, inside = told[0]
            told[0] = name, Encoded(f'{inside}, "riskcal.events.lost": {self._unwritten}')
        try:
            self._events.write_all(told)
        except Exception as error:  # a full disk, a closed file: the service goes on
            fault = f"events: {len(told)} were not written ({type(error).__name__}: {error})"
            if not self._unwritten:
                _LOGGER.error("%s; requests go on, and events that are lost are counted", fault)
            self._unwritten += len(told)
            self._counted.events_lost += len(told)
            self._counted.fault = fault
        else:
            self._unwritten = 0

    def served(self, flight: Flight, done: Done) -> None:
        """A request ended."""
        if self._telling is None:
            return
        told = self._known(flight)
        if flight.full_depth is not None:
            told = f'{told}, "riskcal.full_depth": {quoted(flight.full_depth)}'
        if done.error is not None:
            told = f'{told}, "riskcal.error": {quoted(done.error)}'
        else:
            told = f"{told}, {self._telling.served(flight, done)}"
        self._told.append(("riskcal.request.served", Encoded(told)))

    def refused(self, task: str | None, why: str) -> None:
        """A policy is not served by this model."""
        self.write("riskcal.policy.refused", {"riskcal.task": task or "", "riskcal.reason": why})

    def pulled(self, pull: Pull | None) -> None:
        """The kill switch was pulled."""
        if pull is None:
            return
        told = {
            "riskcal.reason": pull.why,
            "riskcal.source": pull.source,
            "riskcal.pulled_unix_nano": pull.time_unix_nano,
        }
        self.write("riskcal.kill_switch.pulled", told)

    def compared(self, flight: Flight, full: Done, loss: Loss, *, has_text: bool) -> None:
        """The full model has answered a shadowed request; a loss that is none counts as the worst."""
        served = flight.shadows
        assert served is not None
        self._counted.shadows += 1
        if self._telling is None:
            return
        told = compared(served, full, loss, flight.bounds, has_text=has_text)
        told |= self._telling.compared(flight, served, full)
        if told["riskcal.loss"] is None:
            fault = f"loss: of request {flight.id!r}: {told['riskcal.error']}"
            if not self._counted.losses_failed:
                _LOGGER.error("%s; it counts as the worst, and so do others that fail", fault)
            self._counted.losses_failed += 1
            self._counted.fault = fault
        self.write("riskcal.shadow.evaluated", told, flight)

    def dropped(self, flight: Flight) -> None:
        """A shadow never ran."""
        self._counted.shadows_dropped += 1
        self.write("riskcal.shadow.dropped", {}, flight)

    def missing(self, flight: Flight, why: str) -> None:
        """There is no output that a shadow could be compared with."""
        self._counted.shadows_missing += 1
        self.write("riskcal.shadow.missing", {"riskcal.reason": why}, flight)

    def _known(self, flight: Flight) -> str:
        task, difficulty = flight.request.task, flight.request.difficulty
        named = task if isinstance(task, str) else "" if task is None else shown(task)
        known = f'"gen_ai.response.id": {quoted(flight.id)}, "riskcal.task": {quoted(named)}'
        if difficulty is not None:
            named = difficulty if isinstance(difficulty, str) else shown(difficulty)
            known = f'{known}, "riskcal.difficulty": {quoted(named)}'
        return f'{known}, "riskcal.session": "{self._session}"' if flight.numbered else known
