"""How an engine fares: latencies of its latest requests, and how full its layer calls are."""

from collections import deque
from dataclasses import dataclass

import numpy as np

#: Requests whose latencies are kept.
_KEPT = 10_000


@dataclass(frozen=True)
class EngineStats:
    """What an engine did so far.

    Attributes
    ----------
    requests, failed, tokens : int
        Answered with an output, answered with an error, tokens generated.
    shadows, shadows_dropped : int
        Requests that also ran on the full model, and those for which no slot was ever free.
    shadows_missing : int
        Requests that a shadow would have taken, and that ended without an output, by a time-out say: losses nobody knows.
    shadows_at_full_depth : int
        Requests that a shadow would have taken, had they not been served at full depth: nothing is to be learnt there.
    losses_failed : int
        Shadows of which ``loss`` raised, or gave no number within its bounds; they count as the worst loss.
    events_lost : int
        Events that could not be written.
    calls : int
        Of a layer.
    rows_per_call, occupancy : float
        Rows that a layer call serves on average, and this as a share of the slots.
    seconds, first_token_seconds, token_seconds : (float, float)
        Median and 99th percentile of the latest 10,000 requests: whole, until the first token, per token after it. NaN
        before the first.
    fault : str or None
        The latest fault of the log or of ``loss``.

    Examples
    --------
    >>> from riskcal_adapters.torch import Engine, load_example
    >>> with Engine(load_example("g2p"), riskcal.ExitPolicy(threshold=0.9), slots=2) as engine:
    ...     answers = list(engine.run(["calm", "early", "exit"]))
    ...     print(engine.stats.requests, engine.stats.failed, engine.stats.rows_per_call <= 2)
    3 0 True
    """

    requests: int
    failed: int
    tokens: int
    shadows: int
    shadows_dropped: int
    shadows_missing: int
    shadows_at_full_depth: int
    losses_failed: int
    events_lost: int
    calls: int
    rows_per_call: float
    occupancy: float
    seconds: tuple[float, float]
    first_token_seconds: tuple[float, float]
    token_seconds: tuple[float, float]
    fault: str | None


class Counts:
    """What is counted of requests: their latencies, and whatever else `EngineStats` has beside the slots' own."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.failed = 0
        self.shadows = self.shadows_dropped = 0
        self.shadows_missing = self.shadows_at_full_depth = 0
        self.losses_failed = self.events_lost = 0
        self.fault: str | None = None
        self._kept: deque[tuple[float, float, float]] = deque(maxlen=_KEPT)

    def add(self, seconds: float, first: float, tokens: int) -> None:
        """Of one request that was answered."""
        self.requests += 1
        self.tokens += tokens
        self._kept.append((seconds, first, (seconds - first) / max(tokens - 1, 1)))

    def stats(self, calls: int, rows: int, slots: int) -> EngineStats:
        """With what the slots counted."""
        held = np.array(list(self._kept)) if self._kept else np.full((1, 3), np.nan)
        middle, late = np.quantile(held, [0.5, 0.99], axis=0)
        per_call = rows / calls if calls else 0.0
        pairs = [(float(a), float(b)) for a, b in zip(middle, late, strict=True)]
        return EngineStats(
            *(self.requests, self.failed, self.tokens, self.shadows, self.shadows_dropped),
            *(
                self.shadows_missing,
                self.shadows_at_full_depth,
                self.losses_failed,
                self.events_lost,
            ),
            *(calls, per_call, per_call / slots),
            seconds=pairs[0],
            first_token_seconds=pairs[1],
            token_seconds=pairs[2],
            fault=self.fault,
        )
