"""What an engine is asked, and what it answers."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal import RiskcalError
from riskcal_adapters.torch.backbone import Ints
from riskcal_adapters.torch.decoder import Decoder


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
    tokens: Ints
    exit_layers: Ints
    confidence: NDArray[np.float32]
    refused: NDArray[np.float32]
    seconds: float
    first_token_seconds: float
    error: str | None = None

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
    """A request, from when it was taken."""

    request: Request
    id: str
    taken: float
    future: "Future[Done] | None" = None
    #: The served output that this run of the full model is compared with.
    shadows: Done | None = None


def ids_of(request: Request, decoder: Decoder) -> Ints:
    """The prompt's ids (S,), checked."""
    if request.input_ids is not None:
        tokens, _ = decoder.checked(np.atleast_2d(np.asarray(request.input_ids)), None)
    else:
        if not isinstance(request.text, str):
            raise RiskcalError(f"text: {request.text!r} is no text; give a string, or input_ids.")
        tokens, mask = decoder.encode([request.text])
        tokens = tokens[:, mask[0].bool()]
    ids: Ints = tokens[0].cpu().numpy()
    return ids


def ids_together(requests: list[Request], decoder: Decoder) -> list[Ints | None]:
    """Ids of plain texts, read together, which is quicker; None for what `ids_of` reads: other requests, and all if any fails."""
    plain = [isinstance(one.text, str) and one.input_ids is None for one in requests]
    if sum(plain) < 2:
        return [None] * len(requests)
    try:
        texts = [one.text for one, is_plain in zip(requests, plain, strict=True) if is_plain]
        tokens, mask = decoder.encode([text for text in texts if text is not None])
    except Exception:  # each is read again, and told its own fault
        return [None] * len(requests)
    read = iter(zip(tokens.cpu().numpy(), mask.cpu().numpy() == 1, strict=True))
    found: list[Ints | None] = []
    for is_plain in plain:
        if not is_plain:
            found.append(None)
            continue
        row, real = next(read)
        found.append(row[real])
    return found


def texts_of(outputs: list[Ints], decoder: Decoder) -> Sequence[str | None]:
    """What was generated, read together; None without a tokenizer."""
    if decoder.tokenizer is None or not outputs:
        return [None] * len(outputs)
    return decoder.decode([tokens.tolist() for tokens in outputs])
