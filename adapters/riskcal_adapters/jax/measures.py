"""Confidence measures: what tells, after some layer, how sure its next token is. All in float32, higher is surer.

Each row of a batch may have its own measure, by its code: the place of its name in `NAMES`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from riskcal_adapters.jax.weights import Classifier

NAMES = ("softmax", "max", "entropy", "oracle", "state", "classifier")
MAX, ENTROPY, ORACLE, STATE, CLASSIFIER = (NAMES.index(name) for name in NAMES[1:])


def by_logits(measures: Array) -> Array:
    """Whether a layer's logits are needed to know its confidence."""
    return measures < STATE


def of_logits(logits: Array, measures: Array, target: Array | None) -> tuple[Array, Array]:
    """The likeliest token, the first of equals, and its confidence; logits (..., B, V), measures and ``target`` (B,).

    Softmax margin, largest probability, or minus the entropy in nats. With ``target``, the last layer's token, the oracle is
    1 where the token is the same, else 0. Two maxima serve, as sorting the vocabulary for the two largest is slow.
    """
    highest = logits.max(-1)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    # where a logit is NaN so is the maximum, which equals nothing
    candidates = (logits == highest[..., None]) | jnp.isnan(logits)
    token = jnp.where(candidates, ids, logits.shape[-1]).min(-1)
    second = jnp.where(ids == token[..., None], -jnp.inf, logits).max(-1)
    shifted = logits - highest[..., None]
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    # a token of probability 0 adds nothing to the entropy, though its logarithm is minus infinity
    mean_shift = (weights * jnp.maximum(shifted, np.finfo(np.float32).min)).sum(-1) / total
    confidence = (1.0 - jnp.exp(second - highest)) / total
    confidence = jnp.where(measures == MAX, 1.0 / total, confidence)
    confidence = jnp.where(measures == ENTROPY, mean_shift - jnp.log(total), confidence)
    if target is not None:
        confidence = jnp.where(
            measures == ORACLE, (token == target).astype(jnp.float32), confidence
        )
    return token, confidence


def of_states(
    before: Array, state: Array, first: Array, measures: Array, classifier: Classifier | None
) -> Array:
    """Confidence by raw states (..., B, d): the layer's own and that before it; ``first`` where there is none before.

    The cosine between the two, 0 at the first layer and for states of length zero, or the linear classifier's probability
    (CALM, section 3.4).
    """
    before, state = before.astype(jnp.float32), state.astype(jnp.float32)
    lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(state, axis=-1)
    cosine = (before * state).sum(-1) / lengths
    confidence = jnp.where(first | (lengths == 0), 0.0, cosine)
    if classifier is None:
        return confidence
    score = (
        jnp.matmul(state, classifier.weight, precision=jax.lax.Precision.HIGHEST) + classifier.bias
    )
    return jnp.where(measures == CLASSIFIER, jax.nn.sigmoid(score), confidence)
