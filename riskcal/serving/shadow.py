"""`Shadow`: which requests are also run on the full model."""

import functools
import hashlib
from collections.abc import Callable
from typing import Self

from riskcal import _validate
from riskcal._validate import RiskcalError


class Shadow:
    """A fixed share of requests, chosen by a hash of their id, so that a rerun takes the same.

    Parameters
    ----------
    rate : float
        In [0, 1], the share of requests.
    salt : str
        Another salt takes others. Whoever chooses the ids should not know it, or could choose what is looked at.

    Raises
    ------
    RiskcalError
        For a rate outside [0, 1].

    Notes
    -----
    The monitor needs requests that are sampled regardless of their loss; a hash of the id is, if ids do not depend on it.
    Of two rates with one salt, the larger takes all that the smaller does.

    Examples
    --------
    >>> shadow = riskcal.serving.Shadow(rate=0.1, salt="2026")
    >>> taken = [shadow.takes(f"request {i}") for i in range(10_000)]
    >>> 900 < sum(taken) < 1100, shadow.takes("request 7") == taken[7]
    (True, True)
    """

    def __init__(self, rate: float, *, salt: str = "") -> None:
        self.rate = _validate.number(rate, "rate")
        if not 0.0 <= self.rate <= 1.0:
            raise RiskcalError(f"rate: {self.rate:g} is outside [0, 1]; give a share of requests.")
        self._salt = salt
        key = hashlib.blake2b(salt.encode(), digest_size=32).digest()
        # begun once: every request is asked about
        self._begun = hashlib.blake2b(digest_size=8, key=key)

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[float]]:
        # to be sent to other processes, which a hash that was begun cannot be
        return functools.partial(type(self), salt=self._salt), (self.rate,)

    def takes(self, request_id: str) -> bool:
        """Whether this request is also run on the full model."""
        if not isinstance(request_id, str) or not request_id:
            raise RiskcalError(
                f"request_id: {_validate.shown(request_id)} is no text; give every request an id of its own."
            )
        drawn = self._begun.copy()
        drawn.update(request_id.encode("utf-8", "surrogatepass"))
        return int.from_bytes(drawn.digest()) < self.rate * 2.0**64
