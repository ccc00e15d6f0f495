"""The same decoder in both frameworks, for tests that hold for each."""

import jax.numpy as jnp
import numpy as np
import torch
from exit_reference import CLASSIFIER

import riskcal_adapters.jax
import riskcal_adapters.torch
from riskcal_adapters.jax import measures as jax_measures
from riskcal_adapters.torch import measures as torch_measures

FRAMEWORKS = ("torch", "jax")


def decoder(framework, model):
    """A decoder of a PyTorch model; always with a classifier and stacked layers, which spares compiling more programs."""
    if framework == "torch":
        return riskcal_adapters.torch.EarlyExitT5(model, classifier=CLASSIFIER)
    return riskcal_adapters.jax.EarlyExitT5(
        riskcal_adapters.jax.from_torch(model), classifier=CLASSIFIER, stacked=True
    )


def confidence_of_logits(framework, name, logits):
    """The measure ``name`` of logits (B, V)."""
    if framework == "torch":
        functions = {
            "softmax": torch_measures.softmax_margin,
            "max": torch_measures.max_probability,
            "entropy": torch_measures.negative_entropy,
        }
        return np.asarray(functions[name](torch.as_tensor(logits)))
    codes = jnp.full(len(logits), jax_measures.NAMES.index(name))
    return np.asarray(jax_measures.of_logits(jnp.asarray(logits), codes, None)[1])


def cosine_of_states(framework, before, state):
    """The measure ``state`` of states (B, d)."""
    if framework == "torch":
        return np.asarray(
            torch_measures.saturation(torch.as_tensor(state), torch.as_tensor(before))
        )
    codes = jnp.full(len(state), jax_measures.STATE)
    return np.asarray(
        jax_measures.of_states(
            jnp.asarray(before), jnp.asarray(state), jnp.bool_(False), codes, None
        )
    )
