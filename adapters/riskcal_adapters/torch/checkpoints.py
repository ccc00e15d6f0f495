"""Reading T5 checkpoints as they were written, and the examples that ship with the package."""

import os
from importlib import resources
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from riskcal import RiskcalError, internal
from riskcal_adapters import _checkpoints, json_objects
from riskcal_adapters.torch.causal import EarlyExitCausalLM
from riskcal_adapters.torch.exit_head_files import load_heads
from riskcal_adapters.torch.t5 import EarlyExitT5
from riskcal_adapters.torch.training.classifier import load_classifier
from riskcal_adapters.torch.weights import T5

#: By the model type that a config names.
_CLASSES: dict[str, tuple[Any, Any]] = {
    "t5": (T5ForConditionalGeneration, T5Config),
    "mt5": (MT5ForConditionalGeneration, MT5Config),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config),
}


def load_t5(folder: str | os.PathLike[str]) -> T5:
    """A T5, mT5 or UMT5 in float32 and evaluation mode, from a folder as Hugging Face writes it.

    Read are ``config.json``, ``generation_config.json`` where there is one, and ``model.safetensors`` or the parts that its
    index names. A checkpoint that has a head of its own (``lm_head.weight``) keeps it, whatever its config says of tied
    embeddings: transformers 5 writes ``tie_word_embeddings: true`` always. Copies of the embedding may be left out of the file.

    Raises
    ------
    RiskcalError
        If a file is missing, cannot be read, or lacks weights that the config asks for.

    Examples
    --------
    >>> from importlib import resources
    >>> from riskcal_adapters.torch import load_t5
    >>> model = load_t5(resources.files("riskcal_adapters") / "g2p" / "checkpoint")
    >>> model.config.num_decoder_layers, model.training
    (8, False)
    """
    folder = internal.a_path(folder)
    weights = {
        name: weight.float()
        for name, weight in _checkpoints.read_weights(folder, load_file).items()
    }
    config, generation = _checkpoints.read_config(folder)
    weights.pop(_checkpoints.UNUSED, None)
    model_class, config_class = _CLASSES[config["model_type"]]
    model = model_class(config_class(**config))
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    if "lm_head.weight" in weights:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    try:
        absent, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise RiskcalError(
            f"{folder}: the weights do not fit the config ({str(error).splitlines()[-1].strip()})."
        ) from None
    copies = {
        name
        for name, weight in model.state_dict(keep_vars=True).items()
        if weight is model.shared.weight
    }
    lacking = sorted(set(absent) - copies if "shared.weight" in weights else set(absent))
    if lacking or unknown:
        what = (
            f"lacks {lacking[0]}"
            if lacking
            else f"holds {unknown[0]}, which is no weight of a {model_class.__name__}"
        )
        raise RiskcalError(
            f"{folder / 'model.safetensors'}: {what}; give the folder of a whole T5 checkpoint."
        )
    loaded: T5 = model.eval()
    return loaded


#: Causal language models that `load` reads, by the model type that a config names.
_CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


def load(
    folder: str | os.PathLike[str],
    heads: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
) -> EarlyExitT5 | EarlyExitCausalLM:
    """A decoder of a checkpoint folder as Hugging Face writes it: T5, mT5, UMT5, Llama, Mistral, Qwen2, Qwen3 or GPT-2.

    Parameters
    ----------
    folder : path
        With ``config.json``, safetensors and the tokenizer's files; nothing is looked for elsewhere. Computed in float32.
    heads : path, optional
        The folder of a causal model's exit heads, as `save_heads` writes it.
    device : str or torch.device
        Where the model computes, ``"cuda"`` for instance.

    Raises
    ------
    RiskcalError
        If a file is missing or cannot be read, the model is of another kind, or there is no such device.

    Examples
    --------
    >>> from importlib import resources
    >>> from riskcal_adapters.torch import load
    >>> decoder = load(resources.files("riskcal_adapters") / "g2p" / "checkpoint")  # a folder of yours
    >>> decoder.decode(decoder.generate(*decoder.encode(["calm"])).tokens)
    ['K AA M']
    """
    folder = internal.a_path(folder)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError) as error:  # the first where torch has no CUDA
        why = str(error).splitlines()[0]
        raise RiskcalError(f"device: {device!r} cannot be used here ({why}).") from None
    remedy = "give a folder as Hugging Face's save_pretrained writes it"
    config = json_objects.read(folder / "config.json", "is not one JSON object", remedy)
    kind = config.get("model_type")
    if kind not in (*_CLASSES, *_CAUSAL):
        raise RiskcalError(
            f"{folder}: holds a model of type {kind!r}; read are {', '.join((*_CLASSES, *_CAUSAL))}."
        )
    if heads is not None and kind in _CLASSES:
        raise RiskcalError(f"heads: {kind} models have none; leave them out.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if kind in _CLASSES:
            moved = torch.nn.Module.to(load_t5(folder), device)  # the model's own has no types
            return EarlyExitT5(moved, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        ).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, RiskcalError):
            raise
        raise RiskcalError(f"{folder}: cannot be read ({error}).") from None
    placed = None
    if heads is not None:
        placed = {layer: head.to(device) for layer, head in load_heads(heads).items()}
    return EarlyExitCausalLM(model.to(device), tokenizer, heads=placed)


def load_example(name: str = "g2p") -> EarlyExitT5:
    """A trained early-exit model that ships with the package, as a ready decoder.

    Parameters
    ----------
    name : {"g2p", "numbers"}
        Both are T5 v1.1 of 2.2 million weights with 8 decoder layers, trained with exits. ``"g2p"``: spelling in, phonemes
        out, from the CMU Pronouncing Dictionary, 7 tokens on average; with an exit classifier, trained with
        `independent_loss`, for policies with measure ``"classifier"``. ``"numbers"``: numbers of 3 to 7 digits written out in
        English, French or German, letter by letter, 45 tokens on average; without a classifier.

    Examples
    --------
    >>> from riskcal_adapters.torch import load_example
    >>> decoder = load_example("g2p")
    >>> decoder.decode(decoder.generate(*decoder.encode(["phoneme"])).tokens)
    ['F OW N IY M']
    >>> decoder = load_example("numbers")
    >>> decoder.decode(decoder.generate(*decoder.encode(["fr:1980"])).tokens)
    ['mille neuf cent quatre-vingts']
    """
    internal.choice(name, "name", ("g2p", "numbers"))
    with resources.as_file(resources.files("riskcal_adapters") / name / "checkpoint") as folder:
        model, tokenizer = (
            load_t5(folder),
            PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True),
        )
        classifier = folder / "classifier-independent.safetensors"
        return EarlyExitT5(
            model,
            tokenizer,
            classifier=load_classifier(classifier) if classifier.is_file() else None,
        )
