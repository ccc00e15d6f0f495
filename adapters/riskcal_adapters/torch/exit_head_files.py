"""Folders that hold exit heads."""

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from riskcal import RiskcalError, internal
from riskcal_adapters.torch import replacing
from riskcal_adapters.torch.exit_head_checks import check_finite
from riskcal_adapters.torch.exit_heads import PARTS, ExitHead

_WEIGHTS, _CARD = "heads.safetensors", "heads.json"


def save_heads(heads: Mapping[int, ExitHead], folder: str | os.PathLike[str]) -> None:
    """Write heads as one file of safetensors and one of JSON; an existing folder is replaced whole or not at all.

    Raises
    ------
    RiskcalError
        If there is none, one holds numbers that are not finite, or the folder cannot be written.

    Examples
    --------
    >>> from riskcal_adapters.torch import load_heads, save_heads, smollm2_heads
    >>> save_heads(smollm2_heads(), "heads")
    >>> sorted(load_heads("heads")) == sorted(smollm2_heads())
    True
    """
    if not heads:
        raise RiskcalError("heads: there is none; give {layer: head}.")
    tensors: dict[str, Tensor] = {}
    card: dict[str, Any] = {}
    for layer, head in sorted(heads.items()):
        check_finite(layer, head)
        tensors |= {
            f"{layer}.{name}": part.detach().cpu().contiguous() for name, part in head.held()
        }
        card[str(layer)] = {
            "epsilon": head.epsilon,
            "backbone": head.backbone,
            "fingerprint": head.fingerprint,
        }
    with replacing.replaced(internal.a_path(folder)) as staging:
        save_file(tensors, staging / _WEIGHTS)
        (staging / _CARD).write_text(json.dumps({"heads": card}, indent=1) + "\n", encoding="utf-8")


def load_heads(folder: str | os.PathLike[str]) -> dict[int, ExitHead]:
    """Heads that `save_heads` wrote, by layer, in float32 whatever type they were kept in.

    Raises
    ------
    RiskcalError
        If the folder cannot be read, or its weights are not those that were written.

    Examples
    --------
    >>> from riskcal_adapters.torch import load_heads, save_heads, smollm2_heads
    >>> save_heads(smollm2_heads(), "heads")
    >>> {str(head.weight.dtype) for head in load_heads("heads").values()}
    {'torch.float32'}
    """
    try:
        card = json.loads((internal.a_path(folder) / _CARD).read_text(encoding="utf-8"))["heads"]
        tensors = load_file(internal.a_path(folder) / _WEIGHTS)
        tensors = {
            name: part.float() if part.is_floating_point() else part
            for name, part in tensors.items()
        }
        heads = {
            int(layer): ExitHead(
                **{
                    name: tensors.get(f"{layer}.{name}")
                    for name in PARTS
                    if name not in ("norm_weight", "weight")
                },
                norm_weight=tensors[f"{layer}.norm_weight"],
                weight=tensors[f"{layer}.weight"],
                epsilon=float(its["epsilon"]),
                backbone=its["backbone"],
            )
            for layer, its in card.items()
        }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RiskcalError(
            f"{folder}: cannot be read ({error}); give a folder written by save_heads."
        ) from None
    for layer, head in heads.items():
        check_finite(layer, head)
        if head.fingerprint != card[str(layer)]["fingerprint"]:
            raise RiskcalError(
                f"{folder}: the head of layer {layer} is not the one that was written; copy the folder again."
            )
    return heads
