"""Models read as backbones, and whether these compute what the models do: weights do not say what else is attached."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from riskcal import RiskcalError
from riskcal_adapters.torch import weights
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.causal_backbone import CausalBackbone
from riskcal_adapters.torch.causal_weights import CausalLM
from riskcal_adapters.torch.t5_backbone import T5Backbone
from riskcal_adapters.torch.weights import T5

#: How far logits may be from the model's own, as a share of its largest. Measured on random and trained models of up to 8
#: encoder and 12 decoder layers: 5e-7 (its norms are float32), 3e-6, .02, .003.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
_PROMPT, _LENGTH = 9, 4
#: A model's own logits (B, T, V) after a prompt, and the tokens (B, T) that they follow, of (model, prompt, mask, tokens).
Forward = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_REMEDY = (
    "Early-exit decoding runs a model's weights and nothing else: merge adapters into them (peft: merge_and_unload()), remove "
    "hooks and replaced modules, and make the decoder anew."
)


def read_t5(model: object, start: int) -> T5Backbone:
    """A T5's weights as the backbone that decodes with them, after making sure that they are all there is to it."""
    t5 = weights.only_t5(model)
    try:
        backbone = T5Backbone(t5, start)
    except AttributeError as error:
        raise RiskcalError(f"model: has not the modules of a T5 ({error}). {_REMEDY}") from error
    refuse_attachments(t5, backbone)
    return backbone


def read_causal(model: CausalLM) -> CausalBackbone:
    """A causal language model's backbone likewise, after making sure that they are all there is to it."""
    try:
        backbone = CausalBackbone(model, {})
    except AttributeError as error:
        raise RiskcalError(
            f"model: has not the modules of its class ({error}). {_REMEDY}"
        ) from error
    refuse_difference(model, backbone, attachments(model, biases=True), _causal_logits)
    return backbone


def refuse_attachments(model: T5, backbone: T5Backbone) -> None:
    """Refuse a T5 with something attached to it that its weights do not say."""
    for name in ("encoder", "decoder"):  # a few ids would not tell where only some rows differ
        own, shared = getattr(model, name).embed_tokens.weight, model.shared.weight
        if own.data_ptr() != shared.data_ptr() and not torch.equal(own, shared):
            raise RiskcalError(
                f"model: {name}.embed_tokens is not the shared embedding; a T5 has one: set model.{name}.embed_tokens.weight = "
                "model.shared.weight if it should be."
            )
    refuse_difference(model, backbone, attachments(model), _t5_logits)


def refuse_difference(
    model: PreTrainedModel, backbone: Backbone, unusual: list[str], forward: Forward
) -> None:
    """Compare one teacher-forced forward of the backbone with the model's own, and refuse a model whose own says otherwise.

    Neither random numbers nor the model's mode are touched. In types shorter than float32, whose rounding hides small
    differences, whatever looks ``unusual`` is refused as well.
    """
    precise = backbone.dtype in (torch.float32, torch.float64) and all(
        weight.dtype in (torch.float32, torch.float64) for weight in model.parameters()
    )
    if unusual and not precise:
        raise RiskcalError(f"model: {_listed(unusual)}. {_REMEDY}")
    error = _error(model, backbone, forward)
    least = min(
        (weight.dtype for weight in model.parameters()), key=lambda dtype: -_TOLERANCE[dtype]
    )
    if error > _TOLERANCE[least]:
        cause = (
            _listed(unusual)
            if unusual
            else (
                f"{type(model).__name__} may have a forward of its own, or its config was changed after its modules were made"
            )
        )
        raise RiskcalError(
            f"model: its own forward gives other logits than its weights alone (by {error:.1g} of the largest): {cause}. "
            f"{_REMEDY}"
        )


def attachments(model: torch.nn.Module, *, biases: bool = False) -> list[str]:
    """What a plain model does not have, each as a part of a sentence; ``biases`` are among its weights, or not."""
    found = []
    for name, module in model.named_modules():
        place = name or "the model"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # transformers notes hidden states by hooks, and leaves them there
        if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
            found.append(f"{place} has a forward hook")
        if "forward" in vars(module):
            found.append(f"{place} has a forward of its own")
        if not type(module).__module__.startswith(("torch.nn.modules.", "transformers.")):
            found.append(f"{place} is a {type(module).__module__}.{type(module).__qualname__}")
        elif not biases and isinstance(module, torch.nn.Linear) and module.bias is not None:
            found.append(f"{place} has a bias")
    return found


def _listed(found: list[str]) -> str:
    more = len(found) - 2
    return "; ".join(found[:2]) + (f"; and {more} more" if more > 0 else "")


def _error(model: PreTrainedModel, backbone: Backbone, forward: Forward) -> float:
    """The largest difference of logits, as a share of the largest of the model's own."""
    device, vocabulary = backbone.device, backbone.vocabulary
    # spread over the vocabulary by a step that shares no factor with it; one row is padded
    step = next(step for step in (7919, 7907, 7901, 1) if math.gcd(step, vocabulary) == 1)
    ids = (
        torch.arange(1, 2 * (_PROMPT + _LENGTH) + 1, device=device)
        .mul(step)
        .remainder(vocabulary)
        .view(2, -1)
    )
    prompt, forced = ids[:, :_PROMPT].contiguous(), ids[:, _PROMPT:].contiguous()
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        with _evaluating(model):
            try:
                own, fed = forward(model, prompt, mask, forced)
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
                raise RiskcalError(f"model: its own forward fails ({error}). {_REMEDY}") from error
        ours = _teacher_forced(backbone, prompt, mask.cpu().numpy().astype(bool), fed)
    own, ours = own.double(), ours.double()
    if own.shape != ours.shape:
        return math.inf
    finite = own.isfinite()  # float16 overflows where decoding, in float32, does not
    if backbone.dtype in (torch.float32, torch.float64) and not (ours.isfinite() | ~finite).all():
        return math.inf
    finite &= ours.isfinite()
    if not finite.any():
        return 0.0
    scale: float = own[finite].abs().max().item()
    furthest: float = (own - ours)[finite].abs().max().item()
    return furthest / max(scale, torch.finfo(torch.float32).tiny)


def _t5_logits(model: Any, prompt: Tensor, mask: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
    own = model(input_ids=prompt, attention_mask=mask, decoder_input_ids=forced, use_cache=False)
    return own.logits, forced


def _causal_logits(
    model: Any, prompt: Tensor, mask: Tensor, forced: Tensor
) -> tuple[Tensor, Tensor]:
    whole = torch.cat([prompt, forced[:, 1:]], 1)
    real = torch.cat([mask, torch.ones_like(forced[:, 1:])], 1)
    places = (real.cumsum(1) - 1).clamp(min=0)
    own = model(input_ids=whole, attention_mask=real, position_ids=places, use_cache=False)
    fed = whole[:, prompt.shape[1] - 1 :]
    return own.logits[:, prompt.shape[1] - 1 :], fed


def _teacher_forced(
    backbone: Backbone, prompt: Tensor, mask: NDArray[np.bool_], fed: Tensor
) -> Tensor:
    """The last layer's logits (B, T, V)."""
    cache = backbone.start(prompt, mask, fed.shape[1])
    logits = []
    for column in fed.T.tolist():
        state = backbone.embed(column, cache)
        for index in range(backbone.n_layers):
            state = backbone.layer(index, state, cache)
        cache.append(state)
        logits.append(backbone.logits(state))
    return torch.stack(logits, dim=1)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and after that in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
