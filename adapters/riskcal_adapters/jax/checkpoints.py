"""T5 checkpoints for JAX: read from Hugging Face's files without its libraries, or taken from a PyTorch model."""

import os
from collections.abc import Mapping
from importlib import resources
from types import SimpleNamespace
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from riskcal import RiskcalError, internal
from riskcal_adapters import _checkpoints
from riskcal_adapters.jax import weights
from riskcal_adapters.jax.t5 import EarlyExitT5
from riskcal_adapters.jax.weights import T5, Classifier


def load_t5(folder: str | os.PathLike[str]) -> T5:
    """A T5, mT5 or UMT5 from a folder as Hugging Face writes it.

    Read are ``config.json``, ``generation_config.json`` where there is one, and ``model.safetensors`` or the parts that its
    index names.

    A checkpoint that has a head of its own (``lm_head.weight``) keeps it, whatever its config says of tied embeddings:
    transformers 5 writes ``tie_word_embeddings: true`` always. Copies of the embedding may be left out of the file.

    Raises
    ------
    RiskcalError
        If a file is missing, cannot be read, or lacks weights that the config asks for, which are named by their key.

    Examples
    --------
    >>> from importlib import resources
    >>> from riskcal_adapters.jax import load_t5
    >>> load_t5(resources.files("riskcal_adapters") / "g2p" / "checkpoint").weights["shared.weight"].shape
    (68, 128)
    """
    folder = internal.a_path(folder)
    config, generation = _checkpoints.read_config(folder)
    weights.read_shape(config, str(folder / "config.json"))  # before gigabytes are read
    named = _checkpoints.read_weights(folder, load_file)
    return _checked(
        named, config, generation, str(folder / "config.json"), str(folder / "model.safetensors")
    )


def from_torch(model: Any) -> T5:
    """Take over a Hugging Face T5 in PyTorch, ``transformers.T5ForConditionalGeneration``, with a copy of its weights.

    Raises
    ------
    RiskcalError
        For other models, and for one to which more is attached than its weights say: adapters, hooks and so on.

    Examples
    --------
    >>> from riskcal_adapters import jax, torch
    >>> model = jax.from_torch(torch.load_example("g2p").model)
    >>> model.shape == jax.load_example("g2p").model.shape
    True
    """
    if not hasattr(model, "state_dict") or not hasattr(model, "generation_config"):
        raise RiskcalError(f"model: {type(model).__name__} is not a T5ForConditionalGeneration.")
    # only where there is a model of PyTorch's: everything else here works without it
    from riskcal_adapters.torch import selfcheck

    selfcheck.read_t5(model, start=0)  # nothing is generated here
    named = {name: _from_tensor(tensor) for name, tensor in model.state_dict().items()}
    generation = model.generation_config.to_dict()
    return _checked(named, model.config.to_dict(), generation, "model.config", "model")


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
    """A linear exit classifier as `riskcal_adapters.torch.training` saves it.

    Raises
    ------
    RiskcalError
        If the file cannot be read or does not hold exactly ``weight`` (d,) and ``bias`` ().

    Examples
    --------
    >>> from importlib import resources
    >>> from riskcal_adapters.jax import load_classifier
    >>> folder = resources.files("riskcal_adapters") / "g2p" / "checkpoint"
    >>> load_classifier(folder / "classifier-independent.safetensors").weight.shape
    (128,)
    """
    return Classifier(**_checkpoints.read_classifier(internal.a_path(path), load_file))


def load_example(name: str = "g2p") -> EarlyExitT5:
    """A trained early-exit model that ships with the package, as a ready decoder.

    Parameters
    ----------
    name : {"g2p", "numbers"}
        Both are T5 v1.1 of 2.2 million weights with 8 decoder layers, trained with exits: the same files as those of the
        PyTorch decoder. ``"g2p"``: spelling in, phonemes out, from the CMU Pronouncing Dictionary; with an exit classifier,
        for policies with measure ``"classifier"``. ``"numbers"``: numbers written out in English, French or German, letter
        by letter.

    Examples
    --------
    >>> from riskcal_adapters.jax import load_example
    >>> decoder = load_example("g2p")
    >>> decoder.decode(decoder.generate(*decoder.encode(["phoneme"])).tokens)
    ['F OW N IY M']
    """
    internal.choice(name, "name", ("g2p", "numbers"))
    with resources.as_file(resources.files("riskcal_adapters") / name / "checkpoint") as folder:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        classifier = folder / "classifier-independent.safetensors"
        learned = load_classifier(classifier) if classifier.is_file() else None
        return EarlyExitT5(load_t5(folder), tokenizer, classifier=learned)


def _checked(
    named: Mapping[str, NDArray[Any]],
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    where: str,
    given: str,
) -> T5:
    shape = weights.read_shape(config, where)
    weights.check(named, shape, given)
    return T5(shape, named, SimpleNamespace(**generation))


def _from_tensor(tensor: Any) -> NDArray[Any]:
    """A copy, as torch would go on to change its own."""
    if tensor.device.type == "meta":
        raise RiskcalError("model: weights on meta; load it whole.")
    if not tensor.is_floating_point():
        raise RiskcalError(
            f"model: has weights of type {tensor.dtype}; load it with floating-point weights."
        )
    values: NDArray[Any] = tensor.detach().cpu().float().numpy()
    return values.copy()
