"""What a request becomes when there is a slot for it: its prompt's ids, and the policy it is served by, checked."""

from dataclasses import dataclass

import numpy as np

from riskcal import RiskcalError, internal
from riskcal_adapters.torch import sampling
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.engine.journal import Journal
from riskcal_adapters.torch.engine.policies import KILLED, REFUSED, SHADOW, UNKNOWN, Routes, Served
from riskcal_adapters.torch.engine.prompts import ids_of
from riskcal_adapters.torch.engine.requests import Flight
from riskcal_adapters.torch.engine.slots import Newcomer


@dataclass(frozen=True, eq=False)
class Admission:
    """What one engine lets into its slots.

    Attributes
    ----------
    decoder : EarlyExitT5 or EarlyExitCausalLM
    routes : Routes
    room : int
        Tokens of a prompt at most.
    journal : Journal
        Is told who is served at full depth although a policy was meant.
    """

    decoder: Decoder
    routes: Routes
    room: int
    journal: Journal

    def newcomer(self, flight: Flight, ids: Ints | None, *, pulled: bool = False) -> Newcomer:
        """A request as slots take it; ``ids`` are its prompt's, where they were read, ``pulled`` says if early exit is off.

        Raises
        ------
        RiskcalError
            For whatever is wrong with it.
        """
        if flight.fault is not None:
            raise RiskcalError(flight.fault)
        prompt = ids_of(flight.request, self.decoder) if ids is None else ids
        if len(prompt) > self.room:
            raise RiskcalError(
                f"text: has {len(prompt)} tokens, a slot of this engine has room for {self.room}; make the engine with "
                f"max_prompt={len(prompt)}, or shorten the text."
            )
        served, limit = self._served(flight, pulled=pulled)
        key = 0
        if served.policy.sampling is not None:
            flight.temperature = served.policy.sampling.temperature
            [key] = sampling.noise_keys(prompt[None], np.ones((1, len(prompt)), dtype=bool))
        flight.prompt, flight.full_depth = prompt, served.full_depth
        return Newcomer(prompt, served.policy, served.needed[:limit], key)

    def _served(self, flight: Flight, *, pulled: bool) -> tuple[Served, int]:
        """The policy of a request, and how many tokens it may have."""
        found, asked = self.routes.of(flight.request.task), flight.request.max_new_tokens
        limit = found.limit
        if asked is not None:
            limit = internal.count(asked, "max_new_tokens", least=1)
            if limit > self.routes.length:
                raise RiskcalError(
                    f"max_new_tokens: {asked}, but a slot of this engine has room for {self.routes.length}."
                )
        if flight.shadows is not None:
            return self.routes.at_full_depth(found, SHADOW), limit
        flight.bounds = found.bounds
        if found.full_depth == UNKNOWN:
            self.journal.write("riskcal.route.unknown", {}, flight)
        elif found.full_depth is None and pulled:
            found = self.routes.at_full_depth(found, KILLED)
        elif found.full_depth is None and found.policy.max_new_tokens not in (None, limit):
            made = found.policy.max_new_tokens
            why = f"max_new_tokens: the policy was made for {made}, the request asks for {limit}."
            self.journal.write("riskcal.policy.refused", {"riskcal.reason": why}, flight)
            found = self.routes.at_full_depth(found, REFUSED)
        return found, limit
