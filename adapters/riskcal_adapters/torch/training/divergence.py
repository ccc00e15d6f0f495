"""How far the exits of a causal language model, and its full path, are from what the model says without adapters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from riskcal import internal
from riskcal_adapters.torch.training.causal_forward import causal_pass
from riskcal_adapters.torch.training.low_rank import LowRankAdapters
from riskcal_adapters.torch.training.self_generated import Sequences, causal_lm


@dataclass(frozen=True)
class ExitQuality:
    """What an exit, or the last layer, is worth along a text.

    Attributes
    ----------
    agreement : float
        Share of positions where its likeliest token is the model's without adapters.
    divergence : float
        Of its distribution from that model's, in nats (Kullback-Leibler), the mean over positions.

    Examples
    --------
    >>> from riskcal_adapters.torch.training import ExitQuality
    >>> ExitQuality(agreement=0.46, divergence=2.1).agreement
    0.46
    """

    agreement: float
    divergence: float


def exit_quality(
    model: Any,
    sequences: Sequences,
    layers: Sequence[int],
    adapters: LowRankAdapters | None = None,
    *,
    batch: int = 8,
) -> dict[int, ExitQuality]:
    """Measure a model's exits, through its own final norm and head, and its full path, with adapters or without.

    Parameters
    ----------
    model : PreTrainedModel or decoder
        Of the Llama family, without the adapters: what it says by itself is what is compared with.
    sequences : Sequences
        Text of prompts that nothing was trained on; only generated tokens count.
    layers
        1 to L.
    adapters : LowRankAdapters, optional
        Of `tune_exits`.
    batch : int
        Sequences at a time.

    Returns
    -------
    dict of int to ExitQuality
        By layer, the last one too: with adapters, what the full path has kept.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> sequences = training.self_generate(model, [[5], [9, 33, 7]], tokens=40, window=24)
    >>> quality = training.exit_quality(model, sequences, layers=[2])
    >>> sorted(quality), quality[4]  # the last layer is the model
    ([2, 4], ExitQuality(agreement=1.0, divergence=0.0))
    """
    internal.count(batch, "batch", least=1)
    sequences.refuse_none()
    whole = causal_lm(model)
    if adapters is not None:
        adapters.check(whole)
    # of like length together, so that little is padded
    order = np.argsort([len(ids) for ids in sequences.ids], kind="stable")
    agreed: dict[int, float] = {}
    apart: dict[int, float] = {}
    count = 0
    for start in range(0, len(order), batch):
        ids, may_exit = padded(sequences, order[start : start + batch], whole.device)
        with torch.no_grad():
            own, found = _both(whole, ids, may_exit, layers, adapters, math.inf)
            said = own.argmax(-1)
            for layer, part in _divergences(own, found).items():
                apart[layer] = apart.get(layer, 0.0) + float(part) * len(said)
                same = (found[layer].argmax(-1) == said).sum()
                agreed[layer] = agreed.get(layer, 0.0) + float(same)
        count += len(said)
    # rounding alone may leave a divergence a hair below zero
    return {
        layer: ExitQuality(agreed[layer] / count, max(apart[layer] / count, 0.0))
        for layer in sorted(apart)
    }


def exit_divergence(
    model: Any,
    ids: Tensor,
    may_exit: Tensor,
    layers: Sequence[int],
    adapters: LowRankAdapters,
    threshold: float,
) -> dict[int, Tensor]:
    """What is trained on: by layer, the last one too, how far it is from the model without adapters, the mean over positions.

    Arguments as in `causal_pass`. Gradients reach the adapters alone. On a GPU products run in bfloat16.
    """
    place = ids.device.type
    with torch.autocast(place, dtype=torch.bfloat16, enabled=place == "cuda"):
        own, found = _both(model, ids, may_exit, layers, adapters, threshold)
        return _divergences(own, found)


def padded(
    sequences: Sequences, rows: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Some sequences without their last token (B, T), padded on the right; and where generated tokens were said (B, T)."""
    longest = max(len(sequences.ids[row]) for row in rows) - 1
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    may_exit = np.zeros((len(rows), longest), dtype=bool)
    for place, row in enumerate(rows):
        own = sequences.ids[row][:-1]
        ids[place, : len(own)] = own
        may_exit[place, int(sequences.starts[row]) - 1 : len(own)] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(may_exit).to(device)


def _both(
    model: Any,
    ids: Tensor,
    may_exit: Tensor,
    layers: Sequence[int],
    adapters: LowRankAdapters | None,
    threshold: float,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (N, V) of the model by itself; and by layer with adapters."""
    if adapters is None:
        found = causal_pass(model, ids, may_exit, layers, threshold)
        return found[max(found)], found
    with torch.no_grad():
        (own,) = causal_pass(model, ids, may_exit, []).values()
    with adapters.applied(model):
        return own, causal_pass(model, ids, may_exit, layers, threshold)


def _divergences(own: Tensor, found: Mapping[int, Tensor]) -> dict[int, Tensor]:
    wanted = own.float().log_softmax(-1)
    return {
        layer: F.kl_div(
            logits.float().log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
        for layer, logits in found.items()
    }
