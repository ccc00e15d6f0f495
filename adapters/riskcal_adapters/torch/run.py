"""What the generation of a batch goes on from, position by position: see `riskcal_adapters.torch.loop`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from riskcal.forbidden import Guard, State
from riskcal.policy import ExitPolicy
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.caches import Cache, Ints
from riskcal_adapters.torch.confidence import Judge
from riskcal_adapters.torch.heads import Head


@dataclass(eq=False)
class Run:
    """The generation of rows that share all settings of their policies but thresholds."""

    policy: ExitPolicy
    backbone: Backbone
    cache: Cache
    head: Head
    judge: Judge
    keys: list[int]  # of each row's noise
    pending: list[int]  # each row's early exits in a row
    #: Whether only rows that go on are computed. Of one row there is nothing to leave out; a run that began with more keeps
    #: each row's gaps apart, whatever is left of it.
    gathers: bool
    #: Whether skipped positions later run the layers that they skipped, instead of being projected to keys and values alone.
    exact: bool
    #: Of all positions, where they are run again.
    embedded: list[Tensor] = field(default_factory=list)
    #: Of tokens that may not leave early, None if all may; with it, where each row's text stands.
    guard: Guard | None = None
    contexts: list[tuple[State, ...]] = field(default_factory=list)

    def layer(self, index: int, state: Tensor, rows: Ints) -> Tensor:
        """A layer for the position at hand, of these rows where it `gathers`, else of the batch."""
        if self.exact:
            return self.backbone.layer_exact(index, state, self.cache)
        if not self.gathers:
            return self.backbone.layer(index, state, self.cache)
        positions = np.full(len(rows), self.cache.position)
        return self.backbone.layer_of_rows(index, state, rows, positions, self.cache)

    def keep(self, rows: list[int], as_tensor: Callable[[NDArray[Any]], Tensor]) -> None:
        """Go on with some rows of the batch."""
        numbers = np.array(rows)
        kept = as_tensor(numbers)
        self.cache.keep(kept, numbers)
        self.keys = [self.keys[row] for row in rows] if self.keys else []
        self.pending = [self.pending[row] for row in rows]
        self.contexts = [self.contexts[row] for row in rows] if self.contexts else []
        self.embedded = [state.index_select(0, kept) for state in self.embedded]
