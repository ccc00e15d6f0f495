"""Policies as an engine serves them: each with its table, the full model's in place of those made for another model."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from riskcal import RiskcalError
from riskcal.policy import ExitPolicy
from riskcal.serving import EventLog, PolicyBook
from riskcal_adapters import request_checks
from riskcal_adapters.torch.decoder import Decoder


class Served(NamedTuple):
    """A policy as it is served."""

    policy: ExitPolicy
    needed: NDArray[np.float32]  # (T, L), the confidence needed to exit

    @classmethod
    def of(cls, policy: ExitPolicy, decoder: Decoder, limit: int) -> "Served":
        return cls(policy, decoder.needed([policy], 1, limit)[..., 0])


def by_task(policy: ExitPolicy | PolicyBook) -> dict[str | None, ExitPolicy]:
    """The policies of a book; of one policy, for whatever task."""
    if not isinstance(policy, PolicyBook):
        return {None: policy}
    found: dict[str | None, ExitPolicy] = {}
    found.update(policy.policies)
    return found


def limit_of(
    policies: Mapping[str | None, ExitPolicy], max_new_tokens: int | None, decoder: Decoder
) -> int:
    """The length limit: the caller's, else the policies', else the decoder's."""
    return request_checks.length(max_new_tokens, list(policies.values()), decoder.default_length)


def checked(
    task: str | None, policy: ExitPolicy, decoder: Decoder, events: EventLog | None
) -> ExitPolicy:
    """The policy, or the full model in place of one that was made for another model, which is an event.

    Raises
    ------
    RiskcalError
        For a policy that needs what an engine has not.
    """
    where = "policy" if task is None else f"policy of task {task!r}"
    [named] = request_checks.policies(policy, 1, decoder.measures)
    if named.is_full_model:
        return named
    unable = {
        "measure": named.measure not in request_checks.SIMPLE_MEASURES or named.measure == "oracle",
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
        decoder.refuse_other([named])
        decoder.needed([named], 1, 1)  # of as many layers
    except RiskcalError as error:
        if events is not None:
            told = {"riskcal.task": task or "", "riskcal.reason": str(error)}
            events.write("riskcal.policy.refused", told)
        return ExitPolicy().named()
    return named
