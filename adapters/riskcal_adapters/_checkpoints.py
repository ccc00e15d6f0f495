"""Reading a T5's folder, as all frameworks do: which files hold its weights, and what its configs say of it and of generation."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from riskcal import RiskcalError, internal
from riskcal_adapters import generation_config, json_objects

#: T5, mT5 (T5 v1.1 with another vocabulary) and UMT5 (with a bias on positions in each layer).
MODEL_TYPES = ("t5", "mt5", "umt5")
#: In old checkpoints; Hugging Face leaves it aside as well.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_GIVE = "give the folder of a whole T5 checkpoint"


def read_config(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``config.json`` says of the model, and what both configs say of generation.

    Of generation ``generation_config.json`` counts; what it leaves out is taken from ``config.json``, where older checkpoints
    keep it, and last from what all T5s have: padding 0, end 1.
    """
    path = internal.a_path(folder) / "config.json"
    config = _read_json(path)
    if config.get("model_type") not in MODEL_TYPES:
        raise RiskcalError(f"{path}: does not describe a T5 (model_type 't5', 'mt5' or 'umt5').")
    asked = internal.a_path(folder) / "generation_config.json"
    own = _read_json(asked) if asked.exists() else {}
    of_model = {
        name: config[name] for name in generation_config.GENERATION if config.get(name) is not None
    }
    named = {
        name: value
        for name, value in own.items()
        if not name.startswith("_") and name != "transformers_version"
    }
    return config, {"pad_token_id": 0, "eos_token_id": 1} | of_model | named


def read_weights(
    folder: str | os.PathLike[str], load: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """A checkpoint's weights by name, from one file or from the parts that its index names.

    ``load`` reads one file of safetensors, in the framework's own arrays.
    """
    weights: dict[str, Any] = {}
    for path, names in _files(internal.a_path(folder)).items():
        found = read_file(path, load, _GIVE)
        lacking = [name for name in names or () if name not in found]
        if lacking:
            raise RiskcalError(
                f"{path}: lacks {lacking[0]}, which {_INDEX} places there; copy the checkpoint again."
            )
        twice = [name for name in found if name in weights] if names is None else []
        if twice:
            raise RiskcalError(
                f"{path}: holds {twice[0]}, as another part does; copy the checkpoint again, with {_INDEX}."
            )
        weights |= found if names is None else {name: found[name] for name in names}
    return weights


def read_file(path: Path, load: Callable[[Path], Mapping[str, Any]], remedy: str) -> dict[str, Any]:
    """One file of safetensors."""
    try:
        return dict(load(path))
    except (OSError, SafetensorError) as error:
        raise RiskcalError(f"{path}: cannot be read ({error}); {remedy}.") from None


def read_classifier(path: Path, load: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """What `save_classifier` wrote: ``weight`` (d,) and ``bias`` ()."""
    remedy = "give a file written by save_classifier"
    found = read_file(path, load, remedy)
    if set(found) != {"weight", "bias"} or found["weight"].ndim != 1 or found["bias"].ndim != 0:
        raise RiskcalError(f"{path}: does not hold weight (d,) and bias (); {remedy}.")
    return found


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """The files of weights, each with the names that are read from it; None: all.

    As for Hugging Face, the single file counts, then the index; parts of other checkpoints may lie about.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if not single.exists() and index.exists():
        return _indexed(index)
    parts = sorted(folder.glob("model-*-of-*.safetensors"))
    if single.exists() or not parts:
        _refuse_pickles(folder, single)
        return {single: None}
    places = [re.fullmatch(r"model-(\d+)-of-(\d+)\.safetensors", path.name) for path in parts]
    numbers = [(int(place[1]), int(place[2])) for place in places if place is not None]
    if numbers != [(i + 1, len(parts)) for i in range(len(parts))]:
        raise RiskcalError(
            f"{folder}: holds {parts[0].name} and {len(parts) - 1} other parts that are not one whole set, and no {_INDEX} to "
            "say which belong together; copy the whole checkpoint again."
        )
    return dict.fromkeys(parts)


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    placed = _read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise RiskcalError(f"{index}: has no weight_map; {_GIVE}.")
    files: dict[Path, list[str] | None] = {}
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise RiskcalError(
                f"{index}: places {name} in {file!r}, which is no file of this folder; {_GIVE}."
            )
        names = files.setdefault(index.parent / file, [])
        assert names is not None
        names.append(name)
    return files


def _refuse_pickles(folder: Path, single: Path) -> None:
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled and not single.exists():
        raise RiskcalError(
            f"{folder}: holds its weights in {pickled[0].name}, a pickle, which can run code when it is read; convert it once, "
            "where you trust it: T5ForConditionalGeneration.from_pretrained(folder).save_pretrained(another)."
        )


def _read_json(path: Path) -> dict[str, Any]:
    return json_objects.read(path, "is not one JSON object", _GIVE)
