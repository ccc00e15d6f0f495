"""Prompts as ids and outputs as texts: many together, which is quicker, and each alone where one of them cannot be read."""

from typing import NamedTuple

import numpy as np

from riskcal import RiskcalError
from riskcal.internal import shown
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.engine.requests import Request


def ids_of(request: Request, decoder: Decoder) -> Ints:
    """The prompt's ids (S,), checked; a copy, as callers may change what they gave while it runs.

    Raises
    ------
    RiskcalError
        For what is no text and no ids, and for a text without tokens.
    """
    if request.input_ids is not None:
        given = _array(request.input_ids)
        if given.ndim != 1 and not (given.ndim == 2 and len(given) == 1):
            raise RiskcalError(
                f"input_ids: has shape {given.shape}; give the ids of one prompt, (S,)."
            )
        tokens, _ = decoder.checked(np.atleast_2d(given), None)
        return np.array(tokens[0].cpu().numpy())
    if not isinstance(request.text, str):
        raise RiskcalError(f"text: {shown(request.text)} is no text; give a string, or input_ids.")
    tokens, mask = decoder.encode([request.text])
    ids = tokens[0].cpu().numpy()[mask[0].cpu().numpy() == 1].astype(np.int64)
    if not len(ids):
        raise RiskcalError(f"text: {shown(request.text)} has no token; give a text with some.")
    return np.array(decoder.checked(ids[None], np.ones_like(ids[None]))[0][0].cpu().numpy())


def ids_together(requests: list[Request], decoder: Decoder) -> list[Ints | None]:
    """Ids of plain texts, read together; None for what `ids_of` reads: other requests, odd ones, and all if any fails."""
    plain = [isinstance(one.text, str) and one.input_ids is None for one in requests]
    if sum(plain) < 2:
        return [None] * len(requests)
    try:
        texts = [one.text for one, is_plain in zip(requests, plain, strict=True) if is_plain]
        read = iter(decoder.ids([text for text in texts if text is not None]))
    except Exception:  # each is read again, and told its own fault
        return [None] * len(requests)
    most = decoder.loop.backbone.vocabulary
    found: list[Ints | None] = []
    for is_plain in plain:
        ids = next(read) if is_plain else np.zeros(0, dtype=np.int64)
        found.append(ids if len(ids) and ids.max() < most else None)
    return found


class Text(NamedTuple):
    """An output as text, or why there is none."""

    text: str | None
    error: str | None = None


def texts_of(outputs: list[Ints], decoder: Decoder) -> list[Text]:
    """What was generated, read together; no text, and no error, without a tokenizer."""
    if decoder.tokenizer is None or not outputs:
        return [Text(None)] * len(outputs)
    try:
        return [Text(one) for one in decoder.decode([tokens.tolist() for tokens in outputs])]
    except Exception as error:
        if len(outputs) == 1:
            return [
                Text(None, f"text: the output cannot be read ({type(error).__name__}: {error}).")
            ]
        return [text for one in outputs for text in texts_of([one], decoder)]


def _array(values: object) -> np.ndarray:
    try:
        return np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    except Exception as error:
        raise RiskcalError(f"input_ids: is no array of ids ({error}); give (S,).") from None
