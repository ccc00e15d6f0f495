"""Which token an exit emits: the likeliest, or one drawn with noise that policies have in common."""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from riskcal.policy import Sampling
from riskcal_adapters.torch.scores import Scores


def noise_keys(tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> list[int]:
    """A number for each prompt (B, S), of its real tokens alone: the same whatever the batch and the padding."""
    digests = [hashlib.blake2b(row[real].astype("<i8").tobytes(), digest_size=8).digest()
               for row, real in zip(tokens, mask, strict=True)]  # fmt: skip
    return [int.from_bytes(digest, "little") for digest in digests]


def nucleus(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(V,) log probabilities, up to a constant, of the tokens that may be drawn; minus infinity for the others.

    The likeliest tokens are taken until their probabilities add up to ``top_p``, the one that reaches it included.
    """
    log = torch.log_softmax(logits.double() / sampling.temperature, -1)
    if sampling.top_p == 1.0:
        return log
    ordered = log.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.exp().cumsum(-1) - ordered.values.exp()
    return log.index_fill(0, ordered.indices[before >= sampling.top_p], -torch.inf)


def draw(
    scores: Scores,
    places: list[int],
    keys: list[int],
    position: int,
    sampling: Sampling,
    vocabulary: int,
) -> list[int]:
    """One token for each of some rows of the scores, drawn by adding Gumbel noise to log probabilities.

    The noise of each token of the vocabulary depends on ``(sampling.seed, key, position)`` only. The largest sum has exactly
    the law of the softmax, and two policies whose logits are close nearly always draw the same token.
    """
    drawn = []
    for place, key in zip(places, keys, strict=True):
        log = nucleus(scores.logits[place].cpu(), sampling)
        noise = torch.from_numpy(
            np.random.default_rng([sampling.seed, key, position]).gumbel(size=vocabulary)
        )
        if scores.ids is None:
            drawn.append(int((log + noise).argmax()))
        else:
            ids = scores.ids[place].cpu()
            drawn.append(int(ids[(log + noise[ids]).argmax()]))
    return drawn
