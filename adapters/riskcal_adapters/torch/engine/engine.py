"""`Engine`: many requests in flight, each at its own layer and position; a layer runs for all that wait for it."""

import itertools
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from typing import Self

import numpy as np
import torch

from riskcal import RiskcalError, internal
from riskcal.efficiency.engine import ADMITTED_AT, LEAST
from riskcal.forbidden import Rule
from riskcal.policy import ExitPolicy
from riskcal.serving import EventLog, KillSwitch, PolicyBook, Shadow
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.engine.admission import Admission
from riskcal_adapters.torch.engine.journal import Journal
from riskcal_adapters.torch.engine.policies import KILLED, routes
from riskcal_adapters.torch.engine.prompts import Text, ids_together, texts_of
from riskcal_adapters.torch.engine.requests import Done, Flight, Request
from riskcal_adapters.torch.engine.shadows import Loss, differ
from riskcal_adapters.torch.engine.slots import Ended, Newcomer, Slots
from riskcal_adapters.torch.engine.sources import Deadlines, Listed, Queued, Source
from riskcal_adapters.torch.engine.stats import Counts, EngineStats
from riskcal_adapters.torch.engine.telling import Telling

#: Shadows that wait for a free slot; of more, the oldest is dropped.
_SHADOWS_WAITING = 1000


class Engine:
    """Depth-wise continuous batching.

    Tokens and exits are those of ``decoder.generate`` for the row alone, whatever shares the slots, up to floating-point ties.

    Parameters
    ----------
    decoder : EarlyExitT5 or EarlyExitCausalLM
    policy : ExitPolicy or riskcal.serving.PolicyBook
        Of cache ``"project"``, without pruning, and of a measure that looks at one layer at a time (``"softmax"``, ``"max"``,
        ``"entropy"``, ``"state"``, ``"classifier"``). A policy that was made for another model is not served: its requests
        run at full depth, and an event says so.
    slots : int
        Requests in flight at most.
    max_prompt : int
        Tokens of a prompt at most; longer ones are refused.
    max_new_tokens : int, optional
        Tokens of an output at most: the limit of policies that name none, and of tasks without a policy; the policies of a book
        that name one keep theirs. Default: the policies', else the decoder's.
    least : int
        When deep layers have their turn, one that fewer rows wait for is passed over, but in every 64 calls once none is. More
        rows a call, longer waits.
    max_wait : float
        Seconds after which a row goes before all others.
    kill_switch, shadow, events
        A `riskcal.serving.KillSwitch`, `riskcal.serving.Shadow` and `riskcal.serving.EventLog`.
    loss : callable
        Of the served and the full model's text (lists of ids, without a tokenizer): the certificate's loss, for shadows, within
        the certificate's bounds (without one, 0 and 1). Default: 1 where they differ, else 0. One that raises or gives no such
        number is counted, and is the worst loss.
    classes : mapping of str to Inside, Tokens or Pattern, optional
        Classes of tokens (`riskcal.serving`) by which events count exits and disagreements; a token is of the first that has it.

    Raises
    ------
    RiskcalError
        For a policy that needs what the engine has not, and sizes that are no sizes.

    Examples
    --------
    >>> import riskcal
    >>> from riskcal_adapters.torch import Engine, load_example
    >>> with Engine(load_example("g2p"), riskcal.ExitPolicy(threshold=0.9), slots=4) as engine:
    ...     sorted(done.text for done in engine.run(["phoneme", "layer"]))
    ['F OW N IY M', 'L EY ER']
    """

    def __init__(
        self,
        decoder: Decoder,
        policy: ExitPolicy | PolicyBook,
        *,
        slots: int = 64,
        max_prompt: int = 256,
        max_new_tokens: int | None = None,
        least: int = LEAST,
        max_wait: float = 1.0,
        kill_switch: KillSwitch | None = None,
        shadow: Shadow | None = None,
        events: EventLog | None = None,
        loss: Loss = differ,
        classes: Mapping[str, Rule] | None = None,
    ) -> None:
        internal.count(slots, "slots", least=1)
        internal.count(max_prompt, "max_prompt", least=1)
        internal.count(least, "least", least=1)
        internal.number(max_wait, "max_wait")
        if not callable(loss):
            raise RiskcalError(
                f"loss: a {type(loss).__name__} cannot be called; give a function of two outputs."
            )
        self._decoder, self._loss = decoder, loss
        self._switch, self._shadow = kill_switch, shadow
        self._counted = Counts()
        telling = None if events is None else Telling(decoder, classes)
        self._journal = Journal(events, self._counted, telling, uuid.uuid4().hex[:8])
        found = routes(policy, max_new_tokens, decoder, self._journal.refused)
        self._admission = Admission(decoder, found, max_prompt, self._journal)
        self._journal.flush()
        with torch.inference_mode():
            self._slots = Slots(decoder.loop, slots, max_prompt, found.length, least, max_wait)
        self._flights: dict[int, Flight] = {}
        self._waiting_shadows: deque[Flight] = deque()
        self._deadlines = Deadlines()
        self._cancelled: deque[Flight] = deque()
        self._numbers = itertools.count()
        self._pulled = False
        self._running, self._starting = threading.Lock(), threading.Lock()
        self._asked: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        #: With a future that has no answer yet.
        self._open: set[Flight] = set()
        self._worker: threading.Thread | None = None
        self._closed: str | None = None  # why

    # -- what users call -----------------------------------------------------------------------------------------------

    def run(self, requests: Iterable[str | Request]) -> Iterator[Done]:
        """Generate for requests, which are read as slots become free; in the order in which they end.

        A request that fails is a `Done` with an ``error``, and ends no other. Where the iterable itself raises, it ends there:
        what it gave before is answered, and then its exception is raised.

        Raises
        ------
        RiskcalError
            While another `run` or `submit` uses the engine, after `close`, and for a single string.
        """
        if isinstance(requests, str | bytes | Request):
            raise RiskcalError("requests: is a single one; give a list of them.")
        if self._closed or self._worker is not None or not self._running.acquire(blocking=False):
            why = self._closed or "serves others"
            raise RiskcalError(f"engine: {why}; make another one.")
        try:
            source = Listed(
                map(self._flight, requests), self._deadlines, lambda: self._closed is not None
            )
            with closing(self._serve(source)) as served:
                for _, done in served:
                    yield done
            if source.fault is not None:
                raise source.fault
        finally:
            self._abandon()
            self._running.release()

    def submit(
        self, text: str | Request, *, task: str | None = None, timeout: float | None = None
    ) -> "Future[Done]":
        """Ask from any thread; cancelling the future ends the request. Its result is a `Done`, also where the request failed.

        Should the engine itself fail, whatever waits gets its exception, and later calls a `RiskcalError`.
        """
        if isinstance(text, Request) and (task is not None or timeout is not None):
            raise RiskcalError("task, timeout: stand in the Request; give them there.")
        request = text if isinstance(text, Request) else Request(text, task=task, timeout=timeout)
        with self._starting:
            if self._closed:
                raise RiskcalError(f"engine: {self._closed}; make another one.")
            if self._worker is None:
                if not self._running.acquire(blocking=False):
                    raise RiskcalError("engine: serves others; make another one.")
                self._worker = threading.Thread(
                    target=self._work, name="riskcal-engine", daemon=True
                )
                self._worker.start()
            flight = self._flight(request)
            future: Future[Done] = Future()
            flight.future = future
            self._open.add(flight)
            future.add_done_callback(
                lambda one: self._cancelled.append(flight) if one.cancelled() else None
            )
            self._asked.put(flight)
        return future

    def close(self) -> None:
        """Take no more requests, and answer what is asked; where `run` reads an iterable, that ends."""
        with self._starting:
            self._closed = self._closed or "is closed"
            self._asked.put(None)
        # an answer may be what closes it, in the worker itself
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def memory_bytes(self) -> int:
        """Allocated once, when the engine was made."""
        return self._slots.memory_bytes

    @property
    def stats(self) -> EngineStats:
        """Requests, tokens, rows per layer call, and latencies of the latest requests."""
        return self._counted.stats(self._slots.calls, self._slots.rows_computed, self._slots.size)

    # -- one layer after the other ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            for flight, done in self._serve(Queued(self._asked, self._deadlines)):
                self._open.discard(flight)
                future, flight.future = flight.future, None
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_result(done)
        except BaseException as error:  # whoever waits must know
            self._break(error)
            raise

    def _serve(self, source: Source) -> Generator[tuple[Flight, Done]]:
        """Admit, run a layer, hand over, until there is nothing more to take."""
        slots = self._slots
        while True:
            source.look()
            yield from self._overdue()
            free = slots.size - len(self._flights)
            if free * ADMITTED_AT >= slots.size or not self._flights:
                wait = not self._flights and not self._waiting_shadows
                newcomers = source.take(free, wait=wait)
                yield from self._admit(newcomers)
                self._fill_with_shadows()
                if not self._flights:
                    if wait and not newcomers:
                        return
                    continue  # all of them failed
            self._obey_switch()
            with torch.inference_mode():
                ended = slots.advance()
            texts = texts_of([one.tokens for one in ended], self._decoder)
            answers = [self._finished(*pair) for pair in zip(ended, texts, strict=True)]
            self._journal.flush()  # before anybody hears of them
            yield from (pair for pair in answers if pair is not None)

    def _flight(self, request: str | Request) -> Flight:
        request = request if isinstance(request, Request) else Request(request)
        return Flight.of(request, next(self._numbers))

    def _admit(self, flights: list[Flight]) -> Iterator[tuple[Flight, Done]]:
        ready, newcomers, failed = list[Flight](), list[Newcomer](), list[tuple[Flight, str]]()
        read = ids_together([flight.request for flight in flights], self._decoder)
        now = time.monotonic()
        for flight, ids in zip(flights, read, strict=True):
            try:
                if flight.deadline <= now:
                    raise RiskcalError("timed out")
                if flight.future is not None and flight.future.cancelled():
                    raise RiskcalError("cancelled")
                newcomers.append(self._admission.newcomer(flight, ids, pulled=self._pulled))
            except Exception as error:  # one request's fault ends no other
                failed.append((flight, f"{error}" or type(error).__name__))
            else:
                ready.append(flight)
        self._place(ready, newcomers)
        # all before anybody hears of one: a run may be abandoned there
        answers = [self._answer(flight, Done.failed(flight, why)) for flight, why in failed]
        self._journal.flush()
        yield from answers

    def _place(self, flights: list[Flight], newcomers: list[Newcomer]) -> None:
        if not newcomers:
            return
        with torch.inference_mode():
            rows = self._slots.admit(newcomers)
        for row, flight in zip(rows.tolist(), flights, strict=True):
            self._flights[row], flight.row = flight, row

    def _obey_switch(self) -> None:
        if self._switch is None or self._pulled or not self._switch.pulled:
            return
        self._pulled = True
        self._slots.full_depth(np.array(list(self._flights)))
        for flight in self._flights.values():
            flight.full_depth = flight.full_depth or KILLED
        self._journal.pulled(self._switch.state)
        self._journal.flush()

    # -- how a request ends --------------------------------------------------------------------------------------------

    def _answer(self, flight: Flight, done: Done) -> tuple[Flight, Done]:
        """The one end of every request: its slot is free, its answer counted and told, and shadowed where that is wanted."""
        self._free(flight)
        if done.error is None:
            self._counted.add(done.seconds, done.first_token_seconds, len(done.tokens))
        else:
            self._counted.failed += 1
        self._journal.served(flight, done)
        self._shadowed(flight, done)
        return flight, done

    def _free(self, flight: Flight) -> None:
        """Its slot, if it has one; it is answered, and not again."""
        flight.answered = True
        row, flight.row = flight.row, None
        if row is not None:
            self._slots.drop(row)
            del self._flights[row]

    def _finished(self, ended: Ended, text: Text) -> tuple[Flight, Done] | None:
        """The answer with a generation that ended; None of a shadow, which nobody waits for."""
        flight = self._flights[ended.row]
        done = Done.of(flight, ended, text.text, text.error)
        if flight.shadows is None:
            return self._answer(flight, done)
        self._free(flight)
        has_text = self._decoder.tokenizer is not None
        self._journal.compared(flight, done, self._loss, has_text=has_text)
        return None

    def _overdue(self) -> list[tuple[Flight, Done]]:
        """Answers to what ran out of time or was cancelled, in a slot or waiting for one."""
        late = dict.fromkeys(self._deadlines.past(time.monotonic()), "timed out")
        while self._cancelled:
            late.setdefault(self._cancelled.popleft(), "cancelled")
        answers = [
            self._answer(flight, Done.failed(flight, why))
            for flight, why in late.items()
            if not flight.answered
        ]
        self._journal.flush()
        return answers

    def _abandon(self) -> None:
        """Leave nothing of a `run` that ended, perhaps halfway."""
        self._deadlines = Deadlines()
        self._drop_shadows()
        for flight in list(self._flights.values()):
            self._answer(flight, Done.failed(flight, "cancelled"))
        self._journal.flush()

    def _break(self, error: BaseException) -> None:
        """The engine itself failed: whoever waits gets its exception, and nobody is served any more."""
        with self._starting:
            self._closed = f"failed ({type(error).__name__}: {error})"
        self._drop_shadows()
        for flight in list(self._open):
            future = flight.future
            if future is not None and future.set_running_or_notify_cancel():
                if not flight.answered:  # else it was counted and told with others of its layer
                    self._answer(flight, Done.failed(flight, self._closed))
                future.set_exception(error)
        self._open.clear()
        self._journal.flush()

    # -- shadows -------------------------------------------------------------------------------------------------------

    def _shadowed(self, flight: Flight, done: Done) -> None:
        """Let a request that shadows take wait for a second run, where its loss is known then and the policy's doing."""
        if self._shadow is None or flight.prompt is None or not self._shadow.takes(flight.id):
            return
        if flight.full_depth is not None:  # its loss, 0, would say nothing of the policy
            self._counted.shadows_at_full_depth += done.error is None
        elif done.error is not None:
            self._journal.missing(flight, done.error)
        else:
            self._waiting_shadows.append(flight.again(done))
            if len(self._waiting_shadows) > _SHADOWS_WAITING:
                self._journal.dropped(self._waiting_shadows.popleft())

    def _drop_shadows(self) -> None:
        """Those in slots, and those that wait."""
        running = [flight for flight in self._flights.values() if flight.shadows is not None]
        for flight in [*running, *self._waiting_shadows]:
            self._free(flight)
            self._journal.dropped(flight)
        self._waiting_shadows.clear()

    def _fill_with_shadows(self) -> None:
        """Into slots that no request wants now."""
        free = self._slots.size - len(self._flights)
        flights = [
            self._waiting_shadows.popleft() for _ in range(min(free, len(self._waiting_shadows)))
        ]
        self._place(flights, [self._admission.newcomer(one, one.prompt) for one in flights])
