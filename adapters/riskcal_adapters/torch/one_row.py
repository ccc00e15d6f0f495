"""Decoding one row on a CPU, where a layer's work is done sooner than Python has asked for it: see `Backbone.alone`.

Tokens, exits and confidences are those of `loop.Loop`.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from riskcal.policy import ExitPolicy
from riskcal_adapters.torch import kernels
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.generation import Table
from riskcal_adapters.torch.loop import Loop


def takes(backbone: Backbone, policy: ExitPolicy, batch: int) -> bool:
    """Whether `generate` serves a policy; all others are `loop.Loop`'s."""
    return (
        batch == 1
        and backbone.compiled
        and policy.measure in kernels.OF_LOGITS
        and (policy.cache, policy.emits) == ("project", "exit")
        and policy.pruning is None
        and policy.sampling is None
        and policy.max_pending is None
        and not policy.forbidden
    )


def generate(
    loop: Loop,
    policy: ExitPolicy,
    tokens: Tensor,
    mask: NDArray[np.bool_],
    needed: NDArray[np.float32],
) -> Table:
    """As `loop.Loop.generate`, for what it `takes`; ``needed`` is (T, L, 1)."""
    assert policy.measure is not None
    measure = kernels.OF_LOGITS.index(policy.measure)
    ends = np.array(loop.special.ends, dtype=np.int64)
    whole, real = loop.backbone.alone(
        tokens, mask, measure, np.ascontiguousarray(needed[:, :, 0]), ends
    )
    return Table(whole[:, None], real[:, None])
