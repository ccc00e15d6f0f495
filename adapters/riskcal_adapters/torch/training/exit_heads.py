"""Training exit heads on what the model itself says (Valade 2024): the backbone is only read."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from riskcal import RiskcalError, internal
from riskcal_adapters.torch.exit_head_checks import backbone_fingerprint
from riskcal_adapters.torch.exit_heads import ExitHead
from riskcal_adapters.torch.training import folders
from riskcal_adapters.torch.training.descent import Descent, check_settings
from riskcal_adapters.torch.training.head_losses import checked_penalty, head_loss, head_targets
from riskcal_adapters.torch.training.head_states import HeadStates, head_states
from riskcal_adapters.torch.training.self_generated import Sequences, causal_lm

_TRAINED = ("norm_weight", "norm_bias", "down", "weight")


def train_heads(
    model: Any,
    sequences: Sequences | HeadStates,
    layers: Sequence[int],
    *,
    init: str = "copy",
    target: str = "soft",
    entropy_penalty: float = 0.95,
    combine: str = "sum",
    vocabulary: int | Sequence[int] | None = None,
    rank: int | None = None,
    steps: int = 500,
    batch: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    save_steps: int = 100,
    progress: bool = True,
) -> dict[int, ExitHead]:
    """Exit heads after some layers, trained to say what the model says.

    Parameters
    ----------
    model : PreTrainedModel or decoder
        As in `self_generate`. Its weights are read and stay as they are.
    sequences : Sequences or HeadStates
        Self-generated text, or what `head_states` made of it, for several trainings on one text.
    layers
        After which heads stand, 1 to L.
    init : {"copy", "fresh", "low_rank"}
        The model's final norm and head; weights drawn at random; or the final head in two factors of ``rank``.
    target : {"soft", "hard"}
        The model's distribution, or its likeliest token. The paper's text has the first, its code the second.
    entropy_penalty
        In [0, 1), see `head_loss`.
    combine : {"sum", "mean"}
        How the heads' losses are put together; heads share no weight, so that with Adam this matters little.
    vocabulary
        Tokens that heads cover: how many of those that the model holds likeliest on the mean over ``sequences``, or their ids;
        None: all.
    rank
        For ``init="low_rank"``.
    steps, batch, learning_rate
        Adam on so many positions a step; the rate rises over 50 steps, or a tenth of them, then falls as a cosine to 2%.
    seed
        Of the positions drawn, and of fresh weights.
    folder
        Where to note the state every ``save_steps`` steps: the same call goes on from there, to the same heads bit for bit.
    progress
        Whether to show it.

    Returns
    -------
    dict of int to ExitHead

    Raises
    ------
    RiskcalError
        If a layer does not exist, a choice is not known, the folder was begun with anything else, or weights become NaN.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import EarlyExitCausalLM, training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> sequences = training.self_generate(model, [[5], [9, 33, 7]], tokens=40, window=24)
    >>> heads = training.train_heads(model, sequences, layers=[1, 3], vocabulary=20, steps=2, progress=False)
    >>> {layer: len(head.ids) for layer, head in heads.items()}
    {1: 20, 3: 20}
    >>> decoder = EarlyExitCausalLM(model, heads=heads)
    """
    internal.choice(init, "init", ("copy", "fresh", "low_rank"))
    internal.choice(target, "target", ("hard", "soft"))
    internal.choice(combine, "combine", ("sum", "mean"))
    penalty = checked_penalty(entropy_penalty)
    check_settings(steps, batch, save_steps, learning_rate)
    if (rank is None) == (init == "low_rank"):
        raise RiskcalError(f"rank: {rank} with init {init!r}; a rank goes with 'low_rank' only.")
    whole = causal_lm(model)
    states = (
        head_states(whole, sequences, layers, progress=progress)
        if isinstance(sequences, Sequences)
        else sequences
    )
    lacking = [layer for layer in layers if layer not in states.raw]
    if lacking or not len(layers):
        raise RiskcalError(
            f"layers: {list(layers)}, and states were kept after {sorted(states.raw)}; name some of them."
        )
    backbone = backbone_fingerprint(whole)
    ids = _covered(vocabulary, states)
    heads = {
        layer: _begun(whole, init, rank, ids, seed=seed + layer, backbone=backbone)
        for layer in layers
    }
    settings = {
        "init": init,
        "target": target,
        "entropy_penalty": penalty,
        "combine": combine,
        "rank": rank,
        "ids": None if ids is None else folders.digest(ids),
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "layers": list(layers),
        "backbone": backbone,
        "text": _digest(states),
    }
    learning = {layer: _trainable(layer, head) for layer, head in heads.items()}
    heads = {layer: head for layer, (head, _) in learning.items()}
    weights = {name: part for _, named in learning.values() for name, part in named.items()}
    run, done = Descent(weights, steps, learning_rate), 0
    if folder is not None:
        folders.note_settings(internal.a_path(folder), settings)
        done = run.restored(internal.a_path(folder))
    teacher = whole.get_output_embeddings().weight.detach()
    bar = tqdm(range(done, steps), "heads", initial=done, total=steps, disable=not progress)
    for step in bar:
        rows = np.random.default_rng([seed, step]).integers(len(states.said), size=batch)
        losses = _losses(heads, states, torch.from_numpy(rows), teacher, target, penalty)
        loss = losses.sum() if combine == "sum" else losses.mean()
        run.step(loss, step)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if folder is not None and ((step + 1) % save_steps == 0 or step + 1 == steps):
            run.save(internal.a_path(folder), step + 1)
    assert backbone_fingerprint(whole) == backbone, "the backbone changed while heads were trained"
    return {layer: _finished(layer, head) for layer, head in heads.items()}


def _trainable(layer: int, head: ExitHead) -> tuple[ExitHead, dict[str, torch.nn.Parameter]]:
    """A head whose weights learn, and these by name."""
    held = {name: getattr(head, name) for name in _TRAINED}
    own: dict[str, Any] = {
        name: torch.nn.Parameter(part.detach().float().clone())
        for name, part in held.items()
        if part is not None
    }
    named = {f"{layer}.{name}": part for name, part in own.items()}
    return dataclasses.replace(head, **own), named


def _losses(
    heads: dict[int, ExitHead],
    states: HeadStates,
    rows: Tensor,
    teacher: Tensor,
    target: str,
    penalty: float,
) -> Tensor:
    """(K,) losses of the heads at some positions."""
    ids = next(iter(heads.values())).ids  # all heads of a training cover the same tokens
    rows = rows.to(states.final.device)
    said = states.said[rows]
    covered = teacher if ids is None else teacher[ids]
    with torch.no_grad():
        logits = states.final[rows] @ covered.float().T
        probabilities = (logits - states.log_norm[rows, None]).exp()
        wanted = head_targets(probabilities, said, ids, target)
    return torch.stack(
        [
            head_loss(head.logits(states.raw[layer][rows]), wanted, penalty)
            for layer, head in heads.items()
        ]
    )


def _begun(
    model: Any, init: str, rank: int | None, ids: list[int] | None, *, seed: int, backbone: str
) -> ExitHead:
    if init == "fresh":
        head = ExitHead.fresh(model, seed=seed, ids=ids)
    elif rank is not None:
        head = ExitHead.low_rank(model, rank, ids=ids)
    else:
        head = ExitHead.copied(model) if ids is None else ExitHead.small(model, ids)
    return dataclasses.replace(head, backbone=backbone)


def _covered(vocabulary: int | Sequence[int] | None, states: HeadStates) -> list[int] | None:
    """The ids that were asked for, or those that the model holds likeliest on the mean."""
    if vocabulary is None or not isinstance(vocabulary, int):
        return None if vocabulary is None else [int(one) for one in vocabulary]
    internal.count(vocabulary, "vocabulary", least=2)
    commonest = states.mean_probability.argsort(descending=True, stable=True)[:vocabulary]
    return sorted(int(token) for token in commonest)


def _digest(states: HeadStates) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for part in (states.said, states.log_norm, *states.raw.values()):
        hasher.update(np.ascontiguousarray(part.cpu().numpy()).data)
    return hasher.hexdigest()


def _finished(layer: int, head: ExitHead) -> ExitHead:
    own = {name: getattr(head, name) for name in _TRAINED}
    weights: dict[str, Any] = {
        name: part.detach() for name, part in own.items() if part is not None
    }
    if any(not part.isfinite().all() for part in weights.values()):
        raise RiskcalError(
            f"learning_rate: the head after layer {layer} became NaN or infinite; give a lower one."
        )
    return dataclasses.replace(head, **weights)
