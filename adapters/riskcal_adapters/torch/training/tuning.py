"""Exit-aware training of a causal language model by low-rank adapters: early layers learn to say what the whole model says.

The model's own text is what it learns from, and its own distribution what every exit, and the last layer, should keep to; so
no data are needed, and what the full path loses is measured against what it was.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from riskcal import RiskcalError, internal
from riskcal_adapters.torch.exit_head_checks import check_layer
from riskcal_adapters.torch.training import folders
from riskcal_adapters.torch.training.causal_forward import causal_pass
from riskcal_adapters.torch.training.descent import Descent, check_settings
from riskcal_adapters.torch.training.divergence import exit_divergence, padded
from riskcal_adapters.torch.training.forward import THRESHOLDS
from riskcal_adapters.torch.training.head_states import layer_modules
from riskcal_adapters.torch.training.low_rank import LowRankAdapters
from riskcal_adapters.torch.training.self_generated import Sequences, causal_lm

#: How far the pass over known text may be from the model's own forward, as a share of its largest logit.
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class TuningProgress:
    """Where `tune_exits` stands.

    Attributes
    ----------
    step : int
        Steps made, those of earlier calls included.
    divergence : dict of int to float
        By layer, the last one too: how far its distribution is from the model's before training, in nats (Kullback-Leibler),
        the mean over the steps since the last such report.
    positions : int
        Positions learned from since then.
    adapters : LowRankAdapters
        As they are now. Training goes on in them.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> training.TuningProgress(2, {1: 0.7, 4: 0.01}, 64, training.LowRankAdapters.fresh(model, rank=2)).divergence[4]
    0.01
    """

    step: int
    divergence: Mapping[int, float]
    positions: int
    adapters: LowRankAdapters


def tune_exits(
    model: Any,
    sequences: Sequences,
    layers: Sequence[int],
    *,
    rank: int = 16,
    keep: float = 0.5,
    thresholds: Sequence[float] = THRESHOLDS,
    steps: int = 1000,
    batch: int = 8,
    learning_rate: float = 3e-4,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    save_steps: int = 50,
    seconds: float = math.inf,
    told: Callable[[TuningProgress], None] | None = None,
    progress: bool = True,
) -> LowRankAdapters:
    """Low-rank adapters with which a model says at some layers what it says at its last one, and there what it said before.

    Parameters
    ----------
    model : PreTrainedModel or decoder
        Of the Llama family, in float32; on a GPU products run in bfloat16 (autocast). Its weights are read and stay as they are.
    sequences : Sequences
        From `self_generate`.
    layers
        After which there will be exits, 1 to L - 1. Their logits are those of the model's own final norm and head.
    rank : int
        Of the adapters, on every linear map of every layer.
    keep : float
        Weight of the last layer's divergence from what it said before, in (0, 1). Exits share the rest in proportion to
        their layers, as in `layer_weights`.
    thresholds
        One is drawn for each step, and positions that reach it leave (see `causal_pass`), so that later layers learn to read
        copied states. ``inf`` alone is training without copies.
    steps, batch, learning_rate
        Adam on so many sequences a step; the rate rises over 50 steps, or a tenth of them, then falls as a cosine to 2%.
    seed : int
        Of the adapters, of sequences and of thresholds drawn.
    folder : path, optional
        Where the state is noted every ``save_steps`` steps: the same call goes on from there, on a CPU to the same adapters bit
        for bit.
    seconds : float
        Training ends at the first step after that, and notes its state; the same call goes on. ``steps`` of the adapters says
        how far it came.
    told : callable, optional
        Given a `TuningProgress` whenever the state is noted, with a folder or without.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    LowRankAdapters

    Raises
    ------
    RiskcalError
        If a layer does not exist or is the last, the model is of another family or type, or its own forward is not what its
        modules say; if the folder was begun with anything else, or the loss is no longer finite.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import EarlyExitCausalLM, training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> sequences = training.self_generate(model, [[5], [9, 33, 7]], tokens=40, window=24)
    >>> adapters = training.tune_exits(model, sequences, layers=[2], rank=2, steps=3, progress=False)
    >>> adapters.steps, adapters.up["model.layers.0.mlp.up_proj"].any().item()
    (3, True)
    >>> decoder = EarlyExitCausalLM(adapters.merged(model))  # heads for it: train_heads on the merged model
    """
    begun = time.monotonic()
    check_settings(steps, batch, save_steps, learning_rate)
    internal.level(keep, "keep")
    whole = causal_lm(model)
    exits = _exits(layers, len(layer_modules(whole)))
    drawn = [float(one) for one in thresholds]
    if not drawn or any(math.isnan(one) for one in drawn):
        raise RiskcalError(f"thresholds: {drawn}; give at least one number, or inf.")
    _check_model(whole, sequences, exits)
    adapters = LowRankAdapters.fresh(whole, rank, seed=seed)
    settings = {
        "rank": rank,
        "keep": keep,
        "thresholds": [str(one) for one in drawn],
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "layers": exits,
        "backbone": adapters.backbone,
        "text": _digest(sequences),
    }
    weights = {name: torch.nn.Parameter(part) for name, part in adapters.named()}
    learning = LowRankAdapters(
        {name: weights[f"{name}.down"] for name in adapters.down},
        {name: weights[f"{name}.up"] for name in adapters.up},
        adapters.backbone,
    )
    run, done = Descent(weights, steps, learning_rate), 0
    if folder is not None:
        folders.note_settings(internal.a_path(folder), settings)
        done = run.restored(internal.a_path(folder))
    shares = _shares(exits, len(layer_modules(whole)), keep)
    since = _Since()
    for step in tqdm(range(done, steps), "exits", initial=done, total=steps, disable=not progress):
        rng = np.random.default_rng([seed, step])
        rows = rng.integers(len(sequences.ids), size=batch)
        ids, may_exit = padded(sequences, rows, whole.device)
        threshold = float(rng.choice(drawn))
        divergence = exit_divergence(whole, ids, may_exit, exits, learning, threshold)
        run.step(torch.stack([shares[one] * part for one, part in divergence.items()]).sum(), step)
        since.add(divergence, int(may_exit.sum()))
        done = step + 1
        late = time.monotonic() - begun >= seconds
        if done % save_steps == 0 or done == steps or late:
            reached = since.told(done, learning)
            since = _Since()
            if folder is not None:
                run.save(internal.a_path(folder), done)
            if told is not None:
                told(reached)
        if late:
            break
    return LowRankAdapters(
        {name: part.detach() for name, part in learning.down.items()},
        {name: part.detach() for name, part in learning.up.items()},
        adapters.backbone,
        done,
    )


class _Since:
    """Sums since the last report; on a GPU nothing waits for them until they are told."""

    def __init__(self) -> None:
        self.steps, self.positions = 0, 0
        self.apart: dict[int, Tensor] = {}

    def add(self, divergence: Mapping[int, Tensor], positions: int) -> None:
        self.steps, self.positions = self.steps + 1, self.positions + positions
        for layer, part in divergence.items():
            self.apart[layer] = self.apart.get(layer, torch.zeros_like(part)) + part.detach()

    def told(self, step: int, adapters: LowRankAdapters) -> TuningProgress:
        means = {layer: float(part) / self.steps for layer, part in self.apart.items()}
        if not all(map(math.isfinite, means.values())):
            raise RiskcalError(
                f"learning_rate: by step {step} the loss is no longer finite; give a lower one, and another folder."
            )
        return TuningProgress(step, means, self.positions, adapters)


def _exits(layers: Sequence[int], last: int) -> list[int]:
    for layer in layers:
        check_layer(layer, last)
    exits = sorted(set(layers))
    if not exits or exits[-1] == last:
        raise RiskcalError(
            f"layers: {list(layers)}; give at least one from 1 to {last - 1}; the last layer, {last}, is always kept to."
        )
    return exits


def _shares(exits: list[int], last: int, keep: float) -> dict[int, float]:
    """What each layer's divergence weighs in the loss."""
    whole = sum(exits)
    return {layer: (1 - keep) * layer / whole for layer in exits} | {last: keep}


@torch.no_grad()
def _check_model(model: Any, sequences: Sequences, exits: list[int]) -> None:
    """Refuse a model that the pass over known text is not right for, such as one with a window shorter than the text."""
    if model.dtype != torch.float32:
        raise RiskcalError(
            f"model: is in {str(model.dtype).removeprefix('torch.')}; give it in float32, as adapters are trained in. On a GPU "
            "products run in bfloat16 by themselves."
        )
    sequences.refuse_none()
    longest = np.array([max(range(len(sequences.ids)), key=lambda row: len(sequences.ids[row]))])
    ids, may_exit = padded(sequences, longest, model.device)
    ours = causal_pass(model, ids, may_exit, exits)[len(layer_modules(model))]
    own = model(ids, use_cache=False).logits[may_exit]
    furthest, scale = (ours - own).abs().max(), own.abs().max()
    if not furthest <= _TOLERANCE * scale:
        raise RiskcalError(
            f"model: its own forward gives other logits than its layers alone (by {float(furthest / scale):.1g} of the largest); "
            "remove hooks, replaced modules and windows that are shorter than the text."
        )


def _digest(sequences: Sequences) -> str:
    hasher = hashlib.blake2b(np.ascontiguousarray(sequences.starts).data, digest_size=16)
    for ids in sequences.ids:
        hasher.update(len(ids).to_bytes(8, "little"))
        hasher.update(np.ascontiguousarray(ids).data)
    return hasher.hexdigest()
