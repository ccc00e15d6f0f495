"""Whether exit heads belong to a model."""

from collections.abc import Mapping
from typing import Any

from riskcal import RiskcalError, internal
from riskcal_adapters import fingerprint
from riskcal_adapters.torch.exit_heads import ExitHead


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

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import ExitHead, check_heads
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... ))
    >>> head = ExitHead.small(model, ids=[5, 9, 7])
    >>> check_heads({2: head}, model)
    >>> try:
    ...     check_heads({6: head}, model)
    ... except riskcal.RiskcalError as error:
    ...     print(error)
    heads: 6 is no layer of this model; its layers are numbered 1 to 4.
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
        check_finite(layer, head)
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


def check_finite(layer: int, head: ExitHead) -> None:
    """Refuse a head that holds numbers which are not finite."""
    for name, part in head.held():
        bad = ~part.isfinite()
        if bad.any():
            raise RiskcalError(
                f"heads[{layer}].{name}: {int(bad.sum())} of its numbers are not finite, the first at "
                f"{internal.first(bad.cpu().numpy())}; train the head again, with a lower learning rate."
            )
