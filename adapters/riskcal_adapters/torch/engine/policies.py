"""Policies as an engine serves them: each with its own table and length limit, full depth where it was made for another model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy
from riskcal.serving import PolicyBook
from riskcal_adapters import request_checks
from riskcal_adapters.torch.decoder import Decoder

#: Why a request was served at full depth, as events tell it; of shadows they tell nothing.
UNKNOWN, REFUSED, KILLED, FULL = "unknown route", "policy refused", "kill switch", "full model"
SHADOW = "shadow"


@dataclass(frozen=True, eq=False)
class Served:
    """A policy as it is served.

    Attributes
    ----------
    policy : ExitPolicy
        Named.
    needed : (T, L) float32
        The confidence needed to exit; T is the slots' length.
    limit : int
        Its own length limit.
    full_depth : str or None
        Why no token leaves early; None where tokens may.
    """

    policy: ExitPolicy
    needed: NDArray[np.float32]
    limit: int
    full_depth: str | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Of its losses: those that its certificate is about, else 0 and 1."""
        certificate = self.policy.certificate
        return (0.0, 1.0) if certificate is None else (certificate.lower, certificate.upper)


@dataclass(frozen=True, eq=False)
class Routes:
    """What is served by task.

    Attributes
    ----------
    book : PolicyBook or None
        By which tasks are looked up; None where one policy serves all.
    by_task : dict of str to Served
        The book's; the one of key None where there is no book.
    unknown : Served
        The full model, for tasks without a policy.
    length : int
        The longest of all limits.
    """

    book: PolicyBook | None
    by_task: dict[str | None, Served]
    unknown: Served
    length: int

    def of(self, task: Any) -> Served:
        """For a task, whatever a request holds in its place."""
        if self.book is None:
            return self.by_task[None]
        return self.by_task[task] if self.book.route(task).known else self.unknown

    def at_full_depth(self, served: Served, why: str) -> Served:
        """The same decoding and limit, no early exit."""
        policy = ExitPolicy(sampling=served.policy.sampling).named()
        return replace(served, policy=policy, needed=self.unknown.needed, full_depth=why)


def routes(
    policy: ExitPolicy | PolicyBook,
    max_new_tokens: int | None,
    decoder: Decoder,
    refused: Callable[[str | None, str], object],
) -> Routes:
    """Policies of a book, or one for whatever task; ``refused`` is told those that were made for another model, and why.

    Raises
    ------
    RiskcalError
        For a policy that needs what an engine has not, and one whose length limit is beyond ``max_new_tokens``.
    """
    book = policy if isinstance(policy, PolicyBook) else None
    given = dict[str | None, ExitPolicy](
        policy.policies.items() if isinstance(policy, PolicyBook) else [(None, policy)]
    )
    if max_new_tokens is not None:
        max_new_tokens = internal.count(max_new_tokens, "max_new_tokens", least=1)
    named = {task: _fit(task, one, decoder) for task, one in given.items()}
    limits = {task: _limit(task, one, max_new_tokens, decoder) for task, one in given.items()}
    usual = max_new_tokens if max_new_tokens is not None else decoder.default_length
    # memory is for what was asked for: a decoder's default may be far longer than any policy's limit
    unknown = usual if max_new_tokens is not None or not limits else max(limits.values())
    length = max([unknown, *limits.values()])

    def served(one: ExitPolicy, limit: int, why: str | None) -> Served:
        return Served(one, decoder.needed([one], 1, length)[..., 0], limit, why)

    full = served(ExitPolicy().named(), unknown, UNKNOWN)
    found = Routes(book, {}, full, length)
    for task, one in named.items():
        why_not = _misfit(one, decoder)
        if why_not is not None:
            refused(task, why_not)
            found.by_task[task] = found.at_full_depth(
                Served(one, full.needed, limits[task]), REFUSED
            )
        else:
            found.by_task[task] = served(one, limits[task], FULL if one.is_full_model else None)
    return found


def _limit(
    task: str | None, policy: ExitPolicy, max_new_tokens: int | None, decoder: Decoder
) -> int:
    """A policy's own limit; of one that names none the caller's, else the decoder's."""
    own = policy.max_new_tokens
    if task is None or own is None or max_new_tokens is None:
        return request_checks.length(max_new_tokens, [policy], decoder.default_length)
    if own > max_new_tokens:
        raise RiskcalError(
            f"max_new_tokens: {max_new_tokens}, but the policy of task {task!r} was calibrated for {own}; give at least "
            f"{own}, or leave it out."
        )
    return own


def _fit(task: str | None, policy: ExitPolicy, decoder: Decoder) -> ExitPolicy:
    """The policy, named, if an engine has all that it needs."""
    [named] = request_checks.policies(policy, 1, decoder.measures)
    if named.is_full_model:
        return ExitPolicy(sampling=named.sampling).named()
    where = "policy" if task is None else f"policy of task {task!r}"
    remedy = "decode with decoder.generate, or calibrate without it"
    request_checks.fit_for_engine(named, where, remedy)
    return named


def _misfit(policy: ExitPolicy, decoder: Decoder) -> str | None:
    """Why a policy must not be served by this decoder; None if it may."""
    try:
        decoder.refuse_other([policy])
        decoder.needed([policy], 1, 1)  # of as many layers
    except RiskcalError as error:
        return f"{error}"
    return None
