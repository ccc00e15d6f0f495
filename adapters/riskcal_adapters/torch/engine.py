"""`Engine`: many requests in flight, each at its own layer and position; a layer runs for all that wait for it."""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy
from riskcal.serving import EventLog, KillSwitch, PolicyBook, Shadow
from riskcal_adapters import request_checks
from riskcal_adapters.torch import sampling
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.slots import Ended, Newcomer, Slots
from riskcal_adapters.torch.stats import EngineStats, Latencies

Rows = NDArray[np.int64]

#: Newcomers are read together once this share of the slots is free: one encoder call serves them all.
_ADMITTED_AT = 8
#: Shadows that wait for a free slot; of more, the oldest is dropped.
_SHADOWS_WAITING = 1000


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be generated.

    Parameters
    ----------
    text : str, optional
        The prompt; needs a decoder with a tokenizer.
    id : str, optional
        By which events and shadows know it. Default: a running number.
    task : str, optional
        By which a `riskcal.serving.PolicyBook` finds the policy.
    input_ids : (S,) int, optional
        The prompt's ids instead of its text.
    max_new_tokens : int, optional
        Fewer than the engine's.
    timeout : float, optional
        Seconds after being taken from which it is given up.
    """

    text: str | None = None
    id: str | None = None
    task: str | None = None
    input_ids: Any = None
    max_new_tokens: int | None = None
    timeout: float | None = None


@dataclass(frozen=True, eq=False)
class Done:
    """What became of a request.

    Attributes
    ----------
    id, task : str or None
        The request's.
    text : str or None
        What was generated; None without a tokenizer, and where it failed.
    tokens, exit_layers : (T,) int64
        Ids, the end token included, and the layer that each left at.
    confidence, refused : (T,) float32
        As in `Generation`.
    seconds, first_token_seconds : float
        Since it was taken; NaN where there is no token.
    error : str or None
        Why there is no whole output: what was wrong with it, ``"timed out"``, ``"cancelled"``.
    """

    id: str
    task: str | None
    text: str | None
    tokens: Rows
    exit_layers: Rows
    confidence: NDArray[np.float32]
    refused: NDArray[np.float32]
    seconds: float
    first_token_seconds: float
    error: str | None = None


@dataclass(eq=False)
class _Flight:
    """A request, from when it was taken."""

    request: Request
    id: str
    taken: float
    future: "Future[Done] | None" = None
    #: The served output that this run of the full model is compared with.
    shadows: Done | None = None


class _Served(NamedTuple):
    """A policy as it is served."""

    policy: ExitPolicy
    needed: NDArray[np.float32]  # (T, L), the confidence needed to exit

    @classmethod
    def of(cls, policy: ExitPolicy, decoder: Decoder, limit: int) -> "_Served":
        return cls(policy, decoder.needed([policy], 1, limit)[..., 0])


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
    loss : callable, optional
        Of the served and the full model's text (tokens, without a tokenizer): the certificate's loss, for shadows. Default:
        1 where they differ, else 0.

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
        loss: Callable[[Any, Any], float] | None = None,
    ) -> None:
        internal.count(slots, "slots", least=1)
        internal.count(max_prompt, "max_prompt", least=1)
        if least is not None:
            internal.count(least, "least", least=1)
        self._decoder, self._events = decoder, events
        self._switch, self._shadow = kill_switch, shadow
        self._loss = loss or (lambda served, full: float(served != full))
        self._book = policy if isinstance(policy, PolicyBook) else None
        named = policy.policies if isinstance(policy, PolicyBook) else {None: policy}
        limit = request_checks.length(max_new_tokens, list(named.values()), decoder.default_length)
        self._full = _Served.of(ExitPolicy().named(), decoder, limit)
        self._served = {
            task: _Served.of(self._checked(task, one), decoder, limit)
            for task, one in named.items()
        }
        least = max(1, slots // 4) if least is None else least
        with torch.inference_mode():
            self._slots = Slots(decoder._loop, slots, max_prompt, limit, least, max_wait)
        self._flights: dict[int, _Flight] = {}
        self._waiting_shadows: deque[_Flight] = deque()
        self._numbers = itertools.count()
        self._pulled = False
        self._latencies = Latencies()
        self._running, self._starting = threading.Lock(), threading.Lock()
        self._asked: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
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
            source = iter(requests)

            def take(most: int, wait: bool) -> list[_Flight]:
                return [self._flight(one) for one in itertools.islice(source, most)]

            for _, done in self._serve(take):
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
        self._closed = True
        if self._worker is not None:
            self._asked.put(None)
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
        return self._latencies.stats(self._slots.calls, self._slots.rows_computed, self._slots.size)

    # -- one turn after the other ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        ended = False

        def take(most: int, wait: bool) -> list[_Flight]:
            nonlocal ended
            taken: list[_Flight] = []
            while len(taken) < most and not ended:
                try:
                    one = self._asked.get(block=wait and not taken)
                except queue.Empty:
                    break
                if one is None:
                    ended = True
                elif one.future is None or one.future.set_running_or_notify_cancel():
                    taken.append(one)
            return taken

        try:
            for flight, done in self._serve(take):
                if flight.future is not None:
                    flight.future.set_result(done)
        except BaseException as error:  # whoever waits must know
            self._fail(error)
            raise

    def _serve(self, take: Callable[[int, bool], list[_Flight]]) -> Iterator[tuple[_Flight, Done]]:
        """Admit, run a layer, hand over, until there is nothing more to take."""
        slots = self._slots
        while True:
            free = slots.size - len(self._flights)
            if free * _ADMITTED_AT >= slots.size or not self._flights:
                newcomers = take(free, not self._flights and not self._waiting_shadows)
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
                texts = self._texts(ended)
                for one, text in zip(ended, texts, strict=True):
                    flight = self._flights.pop(one.row)
                    done = self._done(flight, one, text)
                    if flight.shadows is None:
                        yield flight, done
                    else:
                        self._compare(flight.shadows, done)

    def _flight(self, request: str | Request) -> _Flight:
        request = request if isinstance(request, Request) else Request(request)
        name = str(next(self._numbers)) if request.id is None else request.id
        return _Flight(request, name, time.monotonic())

    def _admit(self, flights: list[_Flight]) -> Iterator[tuple[_Flight, Done]]:
        ready, newcomers = [], []
        read = self._read_together(flights)
        for flight in flights:
            try:
                newcomers.append(self._newcomer(flight, read.get(flight.id)))
            except Exception as error:  # one request's fault ends no other
                yield flight, self._failed(flight, f"{error}")
            else:
                ready.append(flight)
        self._enter(ready, newcomers)

    def _enter(self, flights: list[_Flight], newcomers: list[Newcomer]) -> None:
        if newcomers:
            with torch.inference_mode():
                rows = self._slots.admit(newcomers)
            self._flights.update(zip(rows.tolist(), flights, strict=True))

    def _read_together(self, flights: list[_Flight]) -> dict[str, Rows]:
        """Ids of what is plain text: a tokenizer is quicker with many at a time. None, where it fails for any of them."""
        plain = {
            flight.id: flight.request.text
            for flight in flights
            if isinstance(flight.request.text, str) and flight.request.input_ids is None
        }
        if len(plain) < 2:
            return {}
        try:
            tokens, mask = self._decoder.encode(list(plain.values()))
        except Exception:  # each is read again, and told its own fault
            return {}
        ids, real = tokens.cpu().numpy(), mask.cpu().numpy() == 1
        return {name: row[own] for name, row, own in zip(plain, ids, real, strict=True)}

    def _newcomer(self, flight: _Flight, ids: Rows | None = None) -> Newcomer:
        request, slots = flight.request, self._slots
        prompt = self._ids(request) if ids is None else ids
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

    def _ids(self, request: Request) -> Rows:
        if request.input_ids is not None:
            tokens, _ = self._decoder.checked(np.atleast_2d(np.asarray(request.input_ids)), None)
        else:
            if not isinstance(request.text, str):
                raise RiskcalError(
                    f"text: {request.text!r} is no text; give a string, or input_ids."
                )
            tokens, mask = self._decoder.encode([request.text])
            tokens = tokens[:, mask[0].bool()]
        ids: Rows = tokens[0].cpu().numpy()
        return ids

    def _policy(self, flight: _Flight) -> "_Served":
        if self._pulled or flight.shadows is not None:
            return self._full
        if self._book is None:
            return self._served[None]
        task = flight.request.task
        if not self._book.route(task).known:
            self._event("riskcal.route.unknown", flight)
            return self._full
        return self._served[task]

    def _checked(self, task: str | None, policy: ExitPolicy) -> ExitPolicy:
        """The policy as it is served: the full model in place of one that was made for another."""
        where = "policy" if task is None else f"policy of task {task!r}"
        [named] = request_checks.policies(policy, 1, self._decoder.measures)
        if named.is_full_model:
            return named
        unable = {
            "measure": named.measure not in request_checks.SIMPLE_MEASURES
            or named.measure == "oracle",
            "cache": named.cache != "project",
            "pruning": named.pruning is not None,
            "emits": named.emits != "exit",
            "batching": named.batching == "deepest",
        }
        for name, wrong in unable.items():
            if wrong:
                raise RiskcalError(
                    f"{name}: {getattr(named, name)!r} of the {where} is not known to the engine; decode with "
                    "decoder.generate, or calibrate without it."
                )
        try:
            self._decoder.refuse_other([named])
        except RiskcalError as error:
            attributes = {"riskcal.task": task or "", "riskcal.reason": str(error)}
            if self._events is not None:
                self._events.write("riskcal.policy.refused", attributes)
            return ExitPolicy().named()
        return named

    def _obey_switch(self) -> None:
        if self._switch is None or self._pulled or not self._switch.pulled:
            return
        self._pulled = True
        self._slots.full_depth(np.array(list(self._flights)))
        state = self._switch.state
        if self._events is not None and state is not None:
            told = {"riskcal.reason": state.why, "riskcal.source": state.source}
            self._events.write("riskcal.kill_switch.pulled", told)

    def _give_up_late(self) -> Iterator[tuple[_Flight, Done]]:
        now = time.monotonic()
        for row, flight in list(self._flights.items()):
            limit = flight.request.timeout
            if limit is not None and now - flight.taken > limit and flight.shadows is None:
                self._slots.drop(row)
                yield self._flights.pop(row), self._failed(flight, "timed out")

    def _give_up(self, why: str) -> None:
        for row in list(self._flights):
            self._slots.drop(row)
            self._failed(self._flights.pop(row), why)
        self._waiting_shadows.clear()

    def _fail(self, error: BaseException) -> None:
        for flight in self._flights.values():
            if flight.future is not None:
                flight.future.set_exception(error)
        self._closed = True

    def _texts(self, ended: list[Ended]) -> Sequence[str | None]:
        """What was generated, read together."""
        if self._decoder.tokenizer is None or not ended:
            return [None] * len(ended)
        return self._decoder.decode([one.tokens.tolist() for one in ended])

    def _done(self, flight: _Flight, ended: Ended, text: str | None) -> Done:
        now = time.monotonic()
        done = Done(
            flight.id,
            flight.request.task,
            text,
            *ended[1:5],
            seconds=now - flight.taken,
            first_token_seconds=ended.first_token - flight.taken,
        )
        if flight.shadows is None:
            self._latencies.add(done.seconds, done.first_token_seconds, len(done.tokens))
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

    def _failed(self, flight: _Flight, why: str) -> Done:
        if flight.shadows is None:
            self._latencies.failed += 1
            self._event("riskcal.request.served", flight, {"riskcal.error": why})
        nothing, nowhere = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        return Done(
            flight.id,
            flight.request.task,
            None,
            nothing,
            nothing,
            nowhere,
            nowhere,
            seconds=time.monotonic() - flight.taken,
            first_token_seconds=float("nan"),
            error=why,
        )

    # -- shadows -------------------------------------------------------------------------------------------------------

    def _wait_for_shadow(self, flight: _Flight, done: Done) -> None:
        again = _Flight(flight.request, flight.id, time.monotonic(), shadows=done)
        self._waiting_shadows.append(again)
        if len(self._waiting_shadows) > _SHADOWS_WAITING:
            dropped = self._waiting_shadows.popleft()
            self._latencies.shadows_dropped += 1
            self._event("riskcal.shadow.dropped", dropped)

    def _fill_with_shadows(self) -> None:
        """Into slots that no request wants now."""
        free = self._slots.size - len(self._flights)
        flights = [
            self._waiting_shadows.popleft() for _ in range(min(free, len(self._waiting_shadows)))
        ]
        self._enter(flights, [self._newcomer(flight) for flight in flights])

    def _compare(self, served: Done, full: Done) -> None:
        outputs = (served.text, full.text)
        if self._decoder.tokenizer is None:
            outputs = (served.tokens.tolist(), full.tokens.tolist())
        shorter = min(len(served.tokens), len(full.tokens))
        longer = max(len(served.tokens), len(full.tokens))
        same = int((served.tokens[:shorter] == full.tokens[:shorter]).sum())
        self._latencies.shadows += 1
        if self._events is not None:
            told = {
                "gen_ai.response.id": served.id,
                "riskcal.task": served.task or "",
                "riskcal.loss": float(self._loss(*outputs)),
                "riskcal.token.disagreement": 1 - same / longer,
            }
            self._events.write("riskcal.shadow.evaluated", told)

    def _event(self, name: str, flight: _Flight, told: dict[str, Any] | None = None) -> None:
        if self._events is not None:
            known = {"gen_ai.response.id": flight.id, "riskcal.task": flight.request.task or ""}
            self._events.write(name, known | (told or {}))
