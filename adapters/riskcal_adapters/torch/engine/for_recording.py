"""For `record(engine=True)`: a decoder whose batches go through slots. Requests that come and go are `engine.Engine`'s."""

import math
from typing import Any

import numpy as np
import torch

from riskcal.efficiency.engine import ADMITTED_AT, LEAST
from riskcal.policy import ExitPolicy
from riskcal_adapters import request_checks
from riskcal_adapters.recording.job import WITHOUT_ENGINE
from riskcal_adapters.torch import sampling
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.engine.slots import Newcomer, Slots
from riskcal_adapters.torch.generation import Generation
from riskcal_adapters.torch.weights import whole_pieces


class DepthWise:
    """The same decoder, with `generate` through slots; everything else is the decoder's own.

    Parameters
    ----------
    decoder : EarlyExitT5 or EarlyExitCausalLM
    slots : int
        Rows in flight at most.
    """

    def __init__(self, decoder: Decoder, slots: int = 64) -> None:
        self._decoder, self._size = decoder, slots
        self._slots: Slots | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        policy: ExitPolicy = ExitPolicy.full_model(),
        max_new_tokens: int | None = None,
    ) -> Generation:
        """As `EarlyExitT5.generate`, of one policy that an engine can take; whatever does not fit is refused."""
        decoder = self._decoder
        tokens, mask = decoder.checked(input_ids, attention_mask)
        [named] = request_checks.policies(policy, 1, decoder.measures)
        decoder.refuse_other([named])
        if named.is_full_model:
            served = ExitPolicy(sampling=named.sampling).named()
        else:
            request_checks.fit_for_engine(named, "policy", WITHOUT_ENGINE)
            served = named
        limit = request_checks.length(max_new_tokens, [named], decoder.default_length)
        needed = decoder.needed([served], 1, limit)[..., 0]
        read = tokens.cpu().numpy()
        keys = [0] * len(read) if served.sampling is None else sampling.noise_keys(read, mask)
        newcomers = [
            Newcomer(row[real], served, needed, key)
            for row, real, key in zip(read, mask, keys, strict=True)
        ]
        with torch.inference_mode():
            return self._run(newcomers, int(mask.sum(1).max()), limit)

    def _run(self, newcomers: list[Newcomer], longest: int, limit: int) -> Generation:
        slots = self._room(longest, limit)
        count, place = len(newcomers), dict[int, int]()
        tokens = np.full((count, limit), max(self._decoder.loop.special.pad, 0))
        exits = np.zeros((count, limit), dtype=np.int64)
        confidence = np.full((count, limit), math.nan, dtype=np.float32)
        refused = np.full((count, limit), -math.inf, dtype=np.float32)
        begun = length = 0
        while begun < count or place:
            if begun < count and (not place or len(slots.free) * ADMITTED_AT >= slots.size):
                some = newcomers[begun : begun + len(slots.free)]
                rows = slots.admit(some)
                place |= dict(zip(rows.tolist(), range(begun, begun + len(some)), strict=True))
                begun += len(some)
            for ended in slots.advance():
                i, size = place.pop(ended.row), len(ended.tokens)
                tokens[i, :size], exits[i, :size] = ended.tokens, ended.exit_layers
                confidence[i, :size], refused[i, :size] = ended.confidence, ended.refused
                length = max(length, size)
        found = (tokens, exits, confidence, refused)
        return Generation(*(torch.from_numpy(one[:, :length]) for one in found))

    def _room(self, longest: int, limit: int) -> Slots:
        """Slots for such prompts and outputs; those that are there, if they are large enough."""
        known = self._slots
        if known is None or known.prompt < longest or known.length < limit:
            known = Slots(
                self._decoder.loop,
                self._size,
                whole_pieces(longest),
                limit,
                least=LEAST,
                max_wait=math.inf,
            )
            self._slots = known
        return known
