"""`Engine`: many requests in flight, each at its own layer and position; a layer runs for all that wait for it."""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Self

import numpy as np
import torch

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy
from riskcal.serving import EventLog, KillSwitch, PolicyBook, Shadow
from riskcal_adapters.torch import sampling
from riskcal_adapters.torch.backbone import Ints
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.engine.policies import Served, by_task, checked, limit_of
from riskcal_adapters.torch.engine.requests import (
    Done,
    Flight,
    Request,
    ids_of,
    ids_together,
    texts_of,
)
from riskcal_adapters.torch.engine.shadows import Loss, compared, differ
from riskcal_adapters.torch.engine.slots import Ended, Newcomer, Slots
from riskcal_adapters.torch.engine.sources import Asked, Listed, Source
from riskcal_adapters.torch.engine.stats import EngineStats, Latencies

#: Newcomers are read together once this share of the slots is free: one encoder call serves them all.
_ADMITTED_AT = 8
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
        Tokens of an output at most. Default: the policies', else the decoder's.
    least : int, optional
        A deep layer runs once so many rows wait for it, others while they do not. More rows a call, longer waits. Default: a
        quarter of the slots.
    max_wait : float
        Seconds after which a row goes before all others.
    kill_switch, shadow, events
        A `riskcal.serving.KillSwitch`, `riskcal.serving.Shadow` and `riskcal.serving.EventLog`.
    loss : callable
        Of the served and the full model's text (lists of ids, without a tokenizer): the certificate's loss, for shadows.
        Default: 1 where they differ, else 0.

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
        least: int | None = None,
        max_wait: float = 1.0,
        kill_switch: KillSwitch | None = None,
        shadow: Shadow | None = None,
        events: EventLog | None = None,
        loss: Loss = differ,
    ) -> None:
        internal.count(slots, "slots", least=1)
        internal.count(max_prompt, "max_prompt", least=1)
        if least is not None:
            internal.count(least, "least", least=1)
        self._decoder, self._events = decoder, events
        self._switch, self._shadow = kill_switch, shadow
        self._loss = loss
        self._book = policy if isinstance(policy, PolicyBook) else None
        named = by_task(policy)
        limit = limit_of(named, max_new_tokens, decoder)
        self._full = Served.of(ExitPolicy().named(), decoder, limit)
        self._served = {
            task: Served.of(checked(task, one, decoder, events), decoder, limit)
            for task, one in named.items()
        }
        least = max(1, slots // 4) if least is None else least
        with torch.inference_mode():
            self._slots = Slots(decoder._loop, slots, max_prompt, limit, least, max_wait)
        self._flights: dict[int, Flight] = {}
        self._waiting_shadows: deque[Flight] = deque()
        self._numbers = itertools.count()
        self._pulled = False
        self._counted = Latencies()
        self._running, self._starting = threading.Lock(), threading.Lock()
        self._asked: queue.SimpleQueue[Flight | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._closed = False

    # -- what users call -----------------------------------------------------------------------------------------------

    def run(self, requests: Iterable[str | Request]) -> Iterator[Done]:
        """Generate for requests, which are read as slots become free; in the order in which they end.

        A request that fails is a `Done` with an ``error``, and ends no other.

        Raises
        ------
        RiskcalError
            While another `run` or `submit` uses the engine, and after `close`.
        """
        if self._closed or self._worker is not None or not self._running.acquire(blocking=False):
            why = "is closed" if self._closed else "serves others"
            raise RiskcalError(f"engine: {why}; make another one.")
        try:
            for _, done in self._serve(Listed(map(self._flight, requests))):
                yield done
        finally:
            self._give_up("cancelled")
            self._running.release()

    def submit(
        self, text: str | Request, *, task: str | None = None, timeout: float | None = None
    ) -> "Future[Done]":
        """Ask from any thread; cancelling the future ends the request. Its result is a `Done`, also where it failed."""
        request = text if isinstance(text, Request) else Request(text, task=task, timeout=timeout)
        with self._starting:
            if self._closed:
                raise RiskcalError("engine: is closed; make another one.")
            if self._worker is None:
                if not self._running.acquire(blocking=False):
                    raise RiskcalError("engine: serves others; make another one.")
                self._worker = threading.Thread(
                    target=self._work, name="riskcal-engine", daemon=True
                )
                self._worker.start()
            flight = self._flight(request)
            flight.future = Future()
            self._asked.put(flight)
        return flight.future

    def close(self) -> None:
        """End what runs, and answer what is asked."""
        with self._starting:
            self._closed = True
            self._asked.put(None)
        if self._worker is not None:
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

    # -- one turn after the other ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            for flight, done in self._serve(Asked(self._asked)):
                if flight.future is not None and flight.future.set_running_or_notify_cancel():
                    flight.future.set_result(done)
        except BaseException as error:  # whoever waits must know
            self._fail(error)
            raise

    def _serve(self, source: Source) -> Iterator[tuple[Flight, Done]]:
        """Admit, run a layer, hand over, until there is nothing more to take."""
        slots = self._slots
        while True:
            free = slots.size - len(self._flights)
            if free * _ADMITTED_AT >= slots.size or not self._flights:
                wait = not self._flights and not self._waiting_shadows
                newcomers = source.take(free, wait=wait)
                yield from self._admit(newcomers)
                self._fill_with_shadows()
            if not self._flights:
                if newcomers:
                    continue  # all of them failed
                return
            self._obey_switch()
            yield from self._give_up_late()
            if self._flights:
                with torch.inference_mode():
                    ended = slots.advance()
                texts = texts_of([one.tokens for one in ended], self._decoder)
                for one, text in zip(ended, texts, strict=True):
                    flight = self._flights.pop(one.row)
                    done = self._done(flight, one, text)
                    if flight.shadows is None:
                        yield flight, done
                    else:
                        self._compare(flight.shadows, done)

    def _flight(self, request: str | Request) -> Flight:
        request = request if isinstance(request, Request) else Request(request)
        name = str(next(self._numbers)) if request.id is None else request.id
        return Flight(request, name, time.monotonic())

    def _admit(self, flights: list[Flight]) -> Iterator[tuple[Flight, Done]]:
        ready, newcomers = [], []
        read = ids_together([flight.request for flight in flights], self._decoder)
        for flight, ids in zip(flights, read, strict=True):
            try:
                if flight.future is not None and flight.future.cancelled():
                    raise RiskcalError("cancelled")
                newcomers.append(self._newcomer(flight, ids))
            except Exception as error:  # one request's fault ends no other
                yield flight, self._failed(flight, f"{error}")
            else:
                ready.append(flight)
        self._place(ready, newcomers)

    def _place(self, flights: list[Flight], newcomers: list[Newcomer]) -> None:
        if newcomers:
            with torch.inference_mode():
                rows = self._slots.admit(newcomers)
            self._flights.update(zip(rows.tolist(), flights, strict=True))

    def _newcomer(self, flight: Flight, ids: Ints | None = None) -> Newcomer:
        request, slots = flight.request, self._slots
        prompt = ids_of(request, self._decoder) if ids is None else ids
        if len(prompt) > slots.prompt:
            raise RiskcalError(
                f"text: has {len(prompt)} tokens, a slot of this engine has room for {slots.prompt}; make the engine with "
                f"max_prompt={len(prompt)}, or shorten the text."
            )
        policy, needed = self._policy(flight)
        if request.max_new_tokens is not None:
            internal.count(request.max_new_tokens, "max_new_tokens", least=1)
            if request.max_new_tokens > slots.length:
                raise RiskcalError(
                    f"max_new_tokens: {request.max_new_tokens}, but a slot of this engine has room for {slots.length}."
                )
            needed = needed[: request.max_new_tokens]
        key = 0
        if policy.sampling is not None:
            [key] = sampling.noise_keys(prompt[None], np.ones((1, len(prompt)), dtype=bool))
        return Newcomer(prompt, policy, needed, key)

    def _policy(self, flight: Flight) -> Served:
        task = flight.request.task if self._book is not None else None
        served = self._served.get(task)
        if served is None:
            if flight.shadows is None:
                self._event("riskcal.route.unknown", flight)
            return self._full
        if self._pulled or flight.shadows is not None:
            return Served(ExitPolicy(sampling=served.policy.sampling).named(), self._full.needed)
        return served

    def _obey_switch(self) -> None:
        if self._switch is None or self._pulled or not self._switch.pulled:
            return
        self._pulled = True
        self._slots.full_depth(np.array(list(self._flights)))
        state = self._switch.state
        if self._events is not None and state is not None:
            told = {"riskcal.reason": state.why, "riskcal.source": state.source}
            self._events.write("riskcal.kill_switch.pulled", told)

    def _give_up_late(self) -> Iterator[tuple[Flight, Done]]:
        now = time.monotonic()
        for row, flight in list(self._flights.items()):
            if flight.shadows is not None:
                continue
            limit = flight.request.timeout
            cancelled = flight.future is not None and flight.future.cancelled()
            if cancelled or (limit is not None and now - flight.taken > limit):
                self._slots.drop(row)
                why = "cancelled" if cancelled else "timed out"
                yield self._flights.pop(row), self._failed(flight, why)

    def _give_up(self, why: str) -> None:
        for row in list(self._flights):
            self._slots.drop(row)
            self._failed(self._flights.pop(row), why)
        self._waiting_shadows.clear()

    def _fail(self, error: BaseException) -> None:
        with self._starting:
            self._closed = True
        waiting = list(self._flights.values())
        while not self._asked.empty():
            waiting += filter(None, [self._asked.get()])
        for flight in waiting:
            if flight.future is not None and flight.future.set_running_or_notify_cancel():
                flight.future.set_exception(error)

    def _done(self, flight: Flight, ended: Ended, text: str | None) -> Done:
        now = time.monotonic()
        done = Done(
            flight.id,
            flight.request.task,
            text,
            ended.tokens,
            ended.exit_layers,
            ended.confidence,
            ended.refused,
            seconds=now - flight.taken,
            first_token_seconds=ended.first_token - flight.taken,
        )
        if flight.shadows is None:
            self._counted.add(done.seconds, done.first_token_seconds, len(done.tokens))
            if self._events is not None:
                counts = np.bincount(done.exit_layers)
                told = {
                    "gen_ai.usage.output_tokens": len(done.tokens),
                    "riskcal.exit.layers": {
                        str(layer): int(counts[layer]) for layer in np.flatnonzero(counts)
                    },
                    "riskcal.seconds": done.seconds,
                }
                self._event("riskcal.request.served", flight, told)
            if self._shadow is not None and self._shadow.takes(flight.id):
                self._wait_for_shadow(flight, done)
        return done

    def _failed(self, flight: Flight, why: str) -> Done:
        if flight.shadows is None:
            self._counted.failed += 1
            self._event("riskcal.request.served", flight, {"riskcal.error": why})
        return Done.failed(flight, why)

    # -- shadows -------------------------------------------------------------------------------------------------------

    def _wait_for_shadow(self, flight: Flight, done: Done) -> None:
        again = Flight(flight.request, flight.id, time.monotonic(), shadows=done)
        self._waiting_shadows.append(again)
        if len(self._waiting_shadows) > _SHADOWS_WAITING:
            dropped = self._waiting_shadows.popleft()
            self._counted.shadows_dropped += 1
            self._event("riskcal.shadow.dropped", dropped)

    def _fill_with_shadows(self) -> None:
        """Into slots that no request wants now."""
        free = self._slots.size - len(self._flights)
        flights = [
            self._waiting_shadows.popleft() for _ in range(min(free, len(self._waiting_shadows)))
        ]
        self._place(flights, [self._newcomer(flight) for flight in flights])

    def _compare(self, served: Done, full: Done) -> None:
        self._counted.shadows += 1
        if self._events is not None:
            has_text = self._decoder.tokenizer is not None
            self._events.write(
                "riskcal.shadow.evaluated", compared(served, full, self._loss, has_text=has_text)
            )

    def _event(self, name: str, flight: Flight, told: dict[str, Any] | None = None) -> None:
        if self._events is not None:
            known = {"gen_ai.response.id": flight.id, "riskcal.task": flight.request.task or ""}
            self._events.write(name, known | (told or {}))
