"""What an engine is asked, and what it answers."""

import math
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal import RiskcalError, internal
from riskcal.internal import shown
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.engine.slots import Ended


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be generated.

    Parameters
    ----------
    text : str, optional
        The prompt; needs a decoder with a tokenizer.
    id : str, optional
        By which events and shadows know it; not empty. Default: a running number.
    task : str, optional
        By which a `riskcal.serving.PolicyBook` finds the policy; anything else is a task that it does not know.
    input_ids : (S,) int, optional
        The prompt's ids instead of its text.
    max_new_tokens : int, optional
        At most the engine's. Another limit than the policy was calibrated with is full depth, and an event.
    difficulty : str, optional
        Of a few levels, as whoever asks knows them: estimates are told apart by it, nothing else.
    timeout : float, optional
        Seconds after being taken (by `Engine.submit`, or from the iterable) from which it is given up, whether it runs or waits.

    Examples
    --------
    >>> from riskcal_adapters.torch import Engine, Request, load_example
    >>> policies = riskcal.serving.PolicyBook({"names": riskcal.ExitPolicy(threshold=0.9)})
    >>> with Engine(load_example("g2p"), policies, slots=2, max_new_tokens=24) as engine:
    ...     requests = [Request("calm", id="r1", task="names"), Request("exit", id="r2")]  # the second at full depth
    ...     print(sorted((done.id, done.text) for done in engine.run(requests)))
    [('r1', 'K AA M'), ('r2', 'EH G Z IH T')]
    """

    text: str | None = None
    id: str | None = None
    task: str | None = None
    input_ids: Any = None
    max_new_tokens: int | None = None
    timeout: float | None = None
    difficulty: str | None = None


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

    Examples
    --------
    >>> from riskcal_adapters.torch import Engine, load_example
    >>> with Engine(load_example("g2p"), riskcal.ExitPolicy(threshold=0.9), slots=2) as engine:
    ...     (done,) = engine.run(["calm"])
    >>> done.text, done.error, len(done.tokens) == len(done.exit_layers), done.first_token_seconds <= done.seconds
    ('K AA M', None, True, True)
    """

    id: str
    task: str | None
    text: str | None
    tokens: Ints
    exit_layers: Ints
    confidence: NDArray[np.float32]
    refused: NDArray[np.float32]
    seconds: float
    first_token_seconds: float
    error: str | None = None

    @classmethod
    def of(cls, flight: "Flight", ended: Ended, text: str | None, error: str | None) -> "Done":
        """Now, of a generation that ended."""
        return cls(
            flight.id,
            flight.request.task,
            text,
            ended.tokens,
            ended.exit_layers,
            ended.confidence,
            ended.refused,
            seconds=time.monotonic() - flight.taken,
            first_token_seconds=ended.first_token - flight.taken,
            error=error,
        )

    @classmethod
    def failed(cls, flight: "Flight", why: str) -> "Done":
        """Without an output."""
        nothing, nowhere = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
        return cls(
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


@dataclass(eq=False)
class Flight:
    """A request, from when it was taken.

    Attributes
    ----------
    id : str
        The request's, as text whatever it holds; of one without an id its number.
    numbered : bool
        Whether it had none: numbers begin again with every engine.
    deadline : float
        By `time.monotonic`; inf without a time-out.
    fault : str or None
        What is wrong with the request beside its prompt; told when a slot is free for it.
    prompt : (S,) int64, optional
        Its ids, once they were read.
    row : int or None
        Its slot, while it has one.
    answered : bool
        Whether it has had its answer.
    full_depth : str or None
        Why it was served at full depth, also in part.
    shadows : Done or None
        The served output that this run of the full model is compared with, which was another flight's.
    bounds : (float, float)
        Of the loss that certifies its policy.
    temperature : float
        That it is decoded at; 0 is greedy.
    """

    request: Request
    id: str
    numbered: bool
    taken: float
    deadline: float = math.inf
    fault: str | None = None
    prompt: Ints | None = None
    future: "Future[Done] | None" = None
    row: int | None = None
    answered: bool = False
    full_depth: str | None = None
    shadows: Done | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    temperature: float = 0.0

    @classmethod
    def of(cls, request: Request, number: int) -> "Flight":
        """Taken now."""
        flight = cls(request, str(number), numbered=request.id is None, taken=time.monotonic())
        try:
            if request.id is not None:
                flight.id = request.id if isinstance(request.id, str) else shown(request.id)
                if not isinstance(request.id, str) or not request.id:
                    raise RiskcalError(
                        f"id: {shown(request.id)} is no text; give every request a text of its own, or none."
                    )
            if request.timeout is not None:
                flight.deadline = flight.taken + internal.number(request.timeout, "timeout")
        except RiskcalError as error:
            flight.fault = f"{error}"
        return flight

    def again(self, served: Done) -> "Flight":
        """The shadow of it."""
        shadow = Flight(self.request, self.id, self.numbered, time.monotonic(), shadows=served)
        shadow.prompt, shadow.bounds = self.prompt, self.bounds
        return shadow
