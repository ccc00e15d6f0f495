"""Early-exit decoding with JAX: the same T5s, policies, tokens and records as with PyTorch, in one compiled program."""

from riskcal_adapters import _extras

try:
    from riskcal_adapters.jax.checkpoints import from_torch as from_torch
    from riskcal_adapters.jax.checkpoints import load_classifier as load_classifier
    from riskcal_adapters.jax.checkpoints import load_example as load_example
    from riskcal_adapters.jax.checkpoints import load_t5 as load_t5
    from riskcal_adapters.jax.generation import Generation as Generation
    from riskcal_adapters.jax.t5 import EarlyExitT5 as EarlyExitT5
    from riskcal_adapters.jax.weights import T5 as T5
except ModuleNotFoundError as error:
    raise _extras.missing(error, __name__, "jax") from None
