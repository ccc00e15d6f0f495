"""What exit heads read and should say, computed once: the model is run here and nowhere else in their training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from riskcal import RiskcalError
from riskcal_adapters.torch.exit_head_checks import check_layer
from riskcal_adapters.torch.exit_heads import ExitHead
from riskcal_adapters.torch.training.self_generated import Sequences, causal_lm

#: Positions at a time where logits of a whole vocabulary are made.
_PART = 256


@dataclass(frozen=True, eq=False)
class HeadStates:
    """The N positions before generated tokens.

    Attributes
    ----------
    raw : dict of int to (N, d)
        States after each layer that was asked for.
    final : (N, d)
        States after the final norm.
    said : (N,) int64
        The model's likeliest token.
    log_norm : (N,)
        Logarithm of the sum over all tokens of exp(logit): a logit minus this is a log-probability.
    mean_probability : (V,)
        What the model gives to each token, the mean over positions.
    prompts : (N,) int64
        Which prompt the position's text began with.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch.training import HeadStates
    >>> states = HeadStates(
    ...     raw={2: torch.randn(3, 16)}, final=torch.randn(3, 16), said=torch.tensor([5, 7, 5]),
    ...     log_norm=torch.zeros(3), mean_probability=torch.full((60,), 1 / 60), prompts=np.array([0, 0, 1]),
    ... )
    >>> list(states.raw), len(states.said)  # three positions, of two prompts
    ([2], 3)
    """

    raw: dict[int, Tensor]
    final: Tensor
    said: Tensor
    log_norm: Tensor
    mean_probability: Tensor
    prompts: NDArray[np.int64]


@torch.no_grad()
def head_states(
    model: Any, sequences: Sequences, layers: Sequence[int], *, progress: bool = True
) -> HeadStates:
    """Run a causal language model over self-generated text and keep what heads after these layers read and should say.

    Parameters
    ----------
    model : PreTrainedModel or decoder
        As in `self_generate`.
    sequences
        From `self_generate`.
    layers
        1 to L.
    progress
        Whether to show it.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> sequences = training.self_generate(model, [[5], [9, 33, 7]], tokens=40, window=24)
    >>> states = training.head_states(model, sequences, layers=[1, 3], progress=False)
    >>> states.raw[1].shape, states.said.shape  # for train_heads and head_answers
    (torch.Size([40, 16]), torch.Size([40]))
    """
    whole = causal_lm(model)
    blocks = layer_modules(whole)
    for layer in layers:
        check_layer(layer, len(blocks))
    sequences.refuse_none()
    head = whole.get_output_embeddings().weight
    total = torch.zeros(len(head), dtype=torch.float64, device=head.device)
    parts: dict[Any, list[Tensor]] = {name: [] for name in (*layers, "final", "said", "norm")}
    with _captured(blocks, layers) as seen:
        rows = zip(sequences.ids, sequences.starts, strict=True)
        for ids, start in tqdm(list(rows), desc="states", disable=not progress):
            given = torch.from_numpy(ids[:-1])[None].to(whole.device)
            final = whole.base_model(given, use_cache=False).last_hidden_state
            kept = slice(int(start) - 1, None)
            for layer in layers:
                parts[layer].append(seen[layer][0, kept].float())
            parts["final"].append(final[0, kept].float())
            for some in final[0, kept].split(_PART):
                logits = torch.nn.functional.linear(some, head).float()
                parts["said"].append(logits.argmax(-1))
                norm = logits.logsumexp(-1)
                parts["norm"].append(norm)
                total += (logits - norm[:, None]).exp_().sum(0)
    joined = {name: torch.cat(found) for name, found in parts.items()}
    generated = [
        len(ids) - int(start) for ids, start in zip(sequences.ids, sequences.starts, strict=True)
    ]
    prompts = np.repeat(sequences.prompts, generated)
    raw = {layer: joined[layer] for layer in layers}
    mean = (total / len(prompts)).float()
    return HeadStates(raw, joined["final"], joined["said"], joined["norm"], mean, prompts)


def layer_modules(model: Any) -> Sequence[torch.nn.Module]:
    """The layers of a causal language model, in order."""
    base = model.base_model
    blocks = getattr(base, "layers", None) or getattr(base, "h", None)
    if blocks is None:
        raise RiskcalError(
            f"model: the layers of {type(model).__name__} are not where the Llama and GPT-2 families have them."
        )
    found: Sequence[torch.nn.Module] = blocks
    return found


@contextmanager
def _captured(
    blocks: Sequence[torch.nn.Module], layers: Sequence[int]
) -> Iterator[dict[int, Tensor]]:
    """The last outputs of some layers, before the final norm: Hugging Face gives the last layer's only after it."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: torch.nn.Module, given: Any, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class HeadAnswers:
    """What a head says at N positions.

    Attributes
    ----------
    agrees : (N,) bool
        Whether its likeliest token is the model's.
    confidence : (N,) float32
        How far its most probable token is ahead of the next.
    entropy : (N,) float32
        Of its distribution, in nats.

    Examples
    --------
    >>> from riskcal_adapters.torch.training import HeadAnswers
    >>> answers = HeadAnswers(
    ...     agrees=np.array([True, False, True]), confidence=np.array([0.9, 0.2, 0.6]), entropy=np.array([0.3, 2.1, 1.0])
    ... )
    >>> answers.agrees[answers.confidence >= 0.5].mean().item()  # agreement where it is sure
    1.0
    """

    agrees: NDArray[np.bool_]
    confidence: NDArray[np.float32]
    entropy: NDArray[np.float32]


@torch.no_grad()
def head_answers(head: ExitHead, states: HeadStates, layer: int) -> HeadAnswers:
    """Let a head answer at the positions whose states after its layer were kept.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import ExitHead, training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> sequences = training.self_generate(model, [[5], [9, 33, 7]], tokens=40, window=24)
    >>> states = training.head_states(model, sequences, layers=[4], progress=False)
    >>> training.head_answers(ExitHead.copied(model), states, layer=4).agrees.all().item()  # the final head is the model
    True
    """
    count = len(states.said)
    answers = HeadAnswers(
        np.empty(count, bool), np.empty(count, np.float32), np.empty(count, np.float32)
    )
    for start in range(0, count, _PART):
        part = slice(start, start + _PART)
        logits = head.logits(states.raw[layer][part]).float()
        log_probability = logits.log_softmax(-1)
        probability = log_probability.exp()
        best, index = probability.topk(2)
        said = index[:, 0] if head.ids is None else head.ids[index[:, 0]]
        answers.agrees[part] = (said == states.said[part]).cpu().numpy()
        answers.confidence[part] = (best[:, 0] - best[:, 1]).cpu().numpy()
        answers.entropy[part] = -(probability * log_probability).sum(-1).cpu().numpy()
    return answers
