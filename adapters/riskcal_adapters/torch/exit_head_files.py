"""Exit heads as a set: whether they belong to a model, and folders that hold them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from riskcal import RiskcalError, internal
from riskcal_adapters import fingerprint
from riskcal_adapters.torch import replacing
from riskcal_adapters.torch.exit_heads import PARTS, ExitHead

_WEIGHTS, _CARD = "heads.safetensors", "heads.json"


def backbone_fingerprint(model: Any) -> str:
    """Fingerprint of a model's weights, tied ones counted once, by which heads know the model that they were made for."""
    named = ((name, weight.detach()) for name, weight in model.named_parameters())
    return fingerprint.of_weights(named, lambda part: part.float().cpu().numpy())


def check_heads(heads: Mapping[int, ExitHead], model: Any) -> None:
    """Refuse heads that do not belong to a model.

    A head after the last layer is no mistake: where it is sure, it saves the full head.

    Raises
    ------
    RiskcalError
        Naming the layer whose head is for a layer that does not exist, for states of another width, covers tokens that are
        not in the vocabulary, holds numbers that are not finite, or was made for another model.
    """
    layers, width = int(model.config.num_hidden_layers), int(model.config.hidden_size)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    own = None
    for layer, head in heads.items():
        check_layer(layer, layers)
        if head.width != width:
            raise RiskcalError(
                f"heads[{layer}]: reads states of width {head.width}, and the model's have {width}; train heads for this model."
            )
        most = len(head.weight) - 1 if head.ids is None else int(head.ids.max())
        if most >= vocabulary or (head.ids is None and most != vocabulary - 1):
            raise RiskcalError(
                f"heads[{layer}]: covers tokens 0 to {most}, and the model's vocabulary has {vocabulary}; train heads for this "
                "model, or name its tokens by ids."
            )
        _check_finite(layer, head)
        if head.backbone is not None:
            own = own or backbone_fingerprint(model)
            if head.backbone != own:
                raise RiskcalError(
                    f"heads[{layer}]: was trained for a model with weights {head.backbone}, and this one has {own}; train heads "
                    "for this model."
                )


def check_layer(layer: Any, layers: int) -> None:
    """Refuse what is no layer after which a head can stand."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer <= layers:
        raise RiskcalError(
            f"heads: {layer!r} is no layer of this model; its layers are numbered 1 to {layers}."
        )


def save_heads(heads: Mapping[int, ExitHead], folder: str | os.PathLike[str]) -> None:
    """Write heads as one file of safetensors and one of JSON; an existing folder is replaced whole or not at all.

    Raises
    ------
    RiskcalError
        If there is none, one holds numbers that are not finite, or the folder cannot be written.
    """
    if not heads:
        raise RiskcalError("heads: there is none; give {layer: head}.")
    tensors: dict[str, Tensor] = {}
    card: dict[str, Any] = {}
    for layer, head in sorted(heads.items()):
        _check_finite(layer, head)
        tensors |= {
            f"{layer}.{name}": part.detach().cpu().contiguous() for name, part in head.held()
        }
        card[str(layer)] = {
            "epsilon": head.epsilon,
            "backbone": head.backbone,
            "fingerprint": head.fingerprint,
        }
    with replacing.replaced(Path(folder)) as staging:
        save_file(tensors, staging / _WEIGHTS)
        (staging / _CARD).write_text(json.dumps({"heads": card}, indent=1) + "\n", encoding="utf-8")


def load_heads(folder: str | os.PathLike[str]) -> dict[int, ExitHead]:
    """Heads that `save_heads` wrote, by layer, in float32 whatever type they were kept in.

    Raises
    ------
    RiskcalError
        If the folder cannot be read, or its weights are not those that were written.
    """
    try:
        card = json.loads((Path(folder) / _CARD).read_text(encoding="utf-8"))["heads"]
        tensors = load_file(Path(folder) / _WEIGHTS)
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
        _check_finite(layer, head)
        if head.fingerprint != card[str(layer)]["fingerprint"]:
            raise RiskcalError(
                f"{folder}: the head of layer {layer} is not the one that was written; copy the folder again."
            )
    return heads


def _check_finite(layer: int, head: ExitHead) -> None:
    for name, part in head.held():
        bad = ~part.isfinite()
        if bad.any():
            raise RiskcalError(
                f"heads[{layer}].{name}: {int(bad.sum())} of its numbers are not finite, the first at "
                f"{internal.first(bad.cpu().numpy())}; train the head again, with a lower learning rate."
            )
