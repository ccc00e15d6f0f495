"""Low-rank adapters: a model's matrices each changed by the product of two thin ones, its own weights left as they are.

They are added by hooks while they learn, so that no module is replaced, and merged into a copy for decoding.
"""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from riskcal import RiskcalError, internal
from riskcal_adapters import fingerprint
from riskcal_adapters.torch import replacing
from riskcal_adapters.torch.exit_head_checks import backbone_fingerprint
from riskcal_adapters.torch.training.head_states import layer_modules
from riskcal_adapters.torch.training.self_generated import causal_lm

_WEIGHTS, _CARD = "adapters.safetensors", "adapters.json"


@dataclass(frozen=True, eq=False)
class LowRankAdapters:
    """Changes of a causal language model's matrices (Hu et al. 2022).

    Attributes
    ----------
    down : dict of str to (r, inputs)
        By the name of the module whose matrix is changed.
    up : dict of str to (outputs, r)
        The matrix becomes itself plus ``up @ down``.
    backbone : str
        Fingerprint of the model that they are for.
    steps : int
        Of training that made them.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> adapters = training.LowRankAdapters.fresh(model, rank=2)  # `tune_exits` trains them
    >>> adapters.parameters, adapters.down["model.layers.0.mlp.up_proj"].shape
    (1984, torch.Size([2, 16]))
    >>> merged = adapters.merged(model)  # a copy, for EarlyExitCausalLM or save_pretrained
    """

    down: Mapping[str, Tensor]
    up: Mapping[str, Tensor]
    backbone: str
    steps: int = 0

    def __post_init__(self) -> None:
        for name in sorted({*self.down, *self.up}):
            if name not in self.down or name not in self.up:
                raise RiskcalError(f"adapters: {name} has one of its two factors only; give both.")
            down, up = self.down[name], self.up[name]
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                raise RiskcalError(
                    f"adapters: {name} has factors {tuple(up.shape)} and {tuple(down.shape)}; give (outputs, r) and (r, inputs)."
                )

    @classmethod
    def fresh(cls, model: Any, rank: int = 16, *, seed: int = 0) -> "LowRankAdapters":
        """For every linear map of every layer, attention's and the feed-forward's; they change nothing yet: ``up`` is 0."""
        internal.count(rank, "rank", least=1)
        whole = causal_lm(model)
        linear = _linear(whole)
        rng = np.random.default_rng(seed)
        down = {
            name: torch.from_numpy(rng.standard_normal((rank, part.in_features), np.float32))
            .mul(part.in_features**-0.5)
            .to(part.weight.device)
            for name, part in linear.items()
        }
        up = {
            name: torch.zeros(part.out_features, rank, device=part.weight.device)
            for name, part in linear.items()
        }
        return cls(down, up, backbone_fingerprint(whole))

    @property
    def parameters(self) -> int:
        """Numbers that they have."""
        return sum(part.numel() for part in (*self.down.values(), *self.up.values()))

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of their weights."""
        return fingerprint.of_weights(
            (name, part.detach().float().cpu().numpy()) for name, part in self.named()
        )

    def named(self) -> list[tuple[str, Tensor]]:
        """All factors, each by its module's name and its own."""
        return [
            (f"{name}.{kind}", part)
            for kind, held in (("down", self.down), ("up", self.up))
            for name, part in held.items()
        ]

    @torch.no_grad()
    def merged(self, model: Any) -> Any:
        """A copy of the model whose matrices have the changes in them.

        Raises
        ------
        RiskcalError
            If they are for another model.
        """
        whole = causal_lm(model)
        self.check(whole)
        changed = copy.deepcopy(whole)
        for name, up in self.up.items():
            weight = changed.get_submodule(name).weight
            change = (up.float() @ self.down[name].float()).to(weight.device)
            weight.copy_((weight.float() + change).to(weight.dtype))
        return changed.eval()

    def check(self, model: Any) -> None:
        """Refuse a model that they are not for."""
        own = backbone_fingerprint(model)
        if own != self.backbone:
            raise RiskcalError(
                f"adapters: are for a model with weights {self.backbone}, and this one has {own}; give the model that they "
                "were trained on, before any were merged into it."
            )

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """While this is open the model's own forward has the changes; gradients reach them and none of its weights."""
        frozen = [part for part in model.parameters() if part.requires_grad]
        handles = []
        try:
            for part in frozen:
                part.requires_grad_(False)
            for name, up in self.up.items():
                module = model.get_submodule(name)
                place = module.weight.device
                hook = _adding(self.down[name].to(place), up.to(place))
                handles.append(module.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in frozen:
                part.requires_grad_(True)


def save_adapters(adapters: LowRankAdapters, folder: str | os.PathLike[str]) -> None:
    """Write adapters as one file of safetensors and one of JSON; an existing folder is replaced whole or not at all.

    Raises
    ------
    RiskcalError
        If the folder cannot be written.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> adapters = training.LowRankAdapters.fresh(model, rank=2)
    >>> training.save_adapters(adapters, "adapters")
    >>> training.load_adapters("adapters").fingerprint == adapters.fingerprint
    True
    """
    tensors = {name: part.detach().cpu().contiguous() for name, part in adapters.named()}
    card = {
        "backbone": adapters.backbone,
        "steps": adapters.steps,
        "fingerprint": adapters.fingerprint,
    }
    with replacing.replaced(internal.a_path(folder)) as staging:
        save_file(tensors, staging / _WEIGHTS)
        (staging / _CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def load_adapters(folder: str | os.PathLike[str]) -> LowRankAdapters:
    """Adapters that `save_adapters` wrote.

    Raises
    ------
    RiskcalError
        If the folder cannot be read, or its weights are not those that were written.

    Examples
    --------
    >>> from riskcal_adapters.torch import training
    >>> try:
    ...     training.load_adapters("nowhere")
    ... except riskcal.RiskcalError as error:
    ...     print(str(error)[:24])
    nowhere: cannot be read
    """
    try:
        card = json.loads((internal.a_path(folder) / _CARD).read_text(encoding="utf-8"))
        tensors = load_file(internal.a_path(folder) / _WEIGHTS)
        held: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}}
        for name, part in tensors.items():
            module, _, kind = name.rpartition(".")
            held[kind][module] = part
        found = LowRankAdapters(**held, backbone=str(card["backbone"]), steps=int(card["steps"]))
        written = card["fingerprint"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RiskcalError(
            f"{folder}: cannot be read ({error}); give a folder written by save_adapters."
        ) from None
    if found.fingerprint != written:
        raise RiskcalError(
            f"{folder}: the adapters are not those that were written; copy the folder again."
        )
    return found


def _linear(model: Any) -> dict[str, torch.nn.Linear]:
    """The linear maps of a model's layers by their names."""
    places = {module: name for name, module in model.named_modules()}
    found = {
        places[part]: part
        for layer in layer_modules(model)
        for part in layer.modules()
        if isinstance(part, torch.nn.Linear)
    }
    if not found:
        raise RiskcalError(
            f"model: the layers of {type(model).__name__} have no linear maps; give one of the Llama family."
        )
    return found


def _adding(down: Tensor, up: Tensor) -> Any:
    def hook(module: torch.nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(given[0], down), up)

    return hook
