"""`EarlyExitCausalLM`: the same with a causal language model, of Llama's family or GPT-2's, with exit heads or without."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from riskcal import RiskcalError
from riskcal_adapters import fingerprint, generation_config
from riskcal_adapters.generation_config import SpecialTokens
from riskcal_adapters.torch import causal_weights, selfcheck
from riskcal_adapters.torch.backbone import ExitHeadLike
from riskcal_adapters.torch.causal_backbone import CausalBackbone
from riskcal_adapters.torch.causal_weights import CausalLM
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.exit_head_checks import check_heads
from riskcal_adapters.torch.exit_heads import ExitHead
from riskcal_adapters.torch.measures import Classifier

#: Settings of configs that change tokens.
_TOLD = (
    *("hidden_act", "activation_function", "rms_norm_eps", "layer_norm_epsilon"),
    *("rope_parameters", "sliding_window", "tie_word_embeddings"),
)


class EarlyExitCausalLM(Decoder):
    """A causal language model that may stop each generated token's computation early, at batch sizes from 1.

    The prompt is read by all layers; its last token is the first that may exit. Everything else is as in `EarlyExitT5`:
    measures, schedules, pruning, caches of skipped layers, batches, sampling, traces, speculation. Of ``generate``'s tokens
    only the new ones are returned.

    Parameters
    ----------
    model : LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or GPT2LMHeadModel
        In any floating type, on one device; computed in its own type, confidences in float32. It is read once, here, and not
        modified; projections of one input are copied, so make a new decoder after changing or moving the model.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed by `encode` and `decode` only.
    heads : dict of int to ExitHead, optional
        Heads of exits by their layer. Only these layers and the last are exits then. None: every layer is an exit, with the
        model's own final norm and head. A head after the last layer, L, speaks before the final head does: a token that
        reaches its threshold saves that product. It exits at layer L either way.
    classifier : object with ``weight`` (d,) and ``bias``, optional
        As in `EarlyExitT5`.

    Raises
    ------
    RiskcalError
        If the model is of another class, is quantised or spread over devices, or its own forward gives other logits than its
        weights do; if it lacks an end id; if its generation config asks for beams or penalties (sampling is left out of
        account: a policy says whether tokens are drawn); for a head of a layer that does not exist, of another width, or that
        was made for another model.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import EarlyExitCausalLM
    >>> config = LlamaConfig(  # small and random; real ones come from LlamaForCausalLM.from_pretrained
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )
    >>> decoder = EarlyExitCausalLM(LlamaForCausalLM(config).eval())
    >>> policy = riskcal.ExitPolicy(threshold=0.0)  # leaves at the first layer, always
    >>> decoder.generate(torch.tensor([[5, 9, 7]]), policy=policy, max_new_tokens=4).exit_layers.unique().tolist()
    [1]
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        heads: Mapping[int, ExitHeadLike] | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        causal_weights.refuse_other(model)
        generation = model.generation_config
        generation_config.greedy_only(generation, but=("do_sample",))
        special = generation_config.of_causal(generation, model.config.vocab_size)
        backbone = selfcheck.read_causal(model)
        self.heads = _of_this_model(heads or {}, model, backbone)
        backbone.exit_heads = self.heads
        length = generation.max_new_tokens or generation_config.DEFAULT_LENGTH
        settings = _settings(model, special, backbone.dtype)
        super().__init__(model, backbone, special, settings, length, tokenizer, classifier)

    @functools.cached_property
    def head_weights(self) -> str | None:
        """Fingerprint of the exit heads, None without any."""
        return fingerprint.of_heads(self.heads) if self.heads else None

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of texts, each (B, S), padded on the left, on the model's device."""
        if isinstance(texts, str) or not len(texts):
            raise RiskcalError("texts: give a list of at least one string.")
        tokenizer = self._need_tokenizer()
        rows = [list(tokenizer(text)["input_ids"]) for text in texts]
        empty = [i for i, row in enumerate(rows) if not row]
        if empty:
            raise RiskcalError(
                f"texts: number {empty[0]} has no token, of {len(empty)} that have none; a causal model needs one to begin after."
            )
        width = max(map(len, rows))
        pad = max(self._special.pad, 0)
        tokens = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return tokens.to(self._backbone.device), mask.to(self._backbone.device)


def _settings(model: CausalLM, special: SpecialTokens, dtype: torch.dtype) -> dict[str, Any]:
    """What changes tokens beside weights, by the names of Hugging Face's configs."""
    config = model.config.to_dict()
    told = {name: config[name] for name in _TOLD if config.get(name) is not None}
    rotation = told.pop("rope_parameters", None)
    if rotation is not None:
        told["rope_parameters"] = json.dumps(rotation, sort_keys=True)
    return {
        "model_type": model.config.model_type,
        "eos_token_id": sorted(special.ends),
        "pad_token_id": special.pad,
        **told,
        "logits_dtype": str(dtype).removeprefix("torch."),
    }


def _of_this_model(
    heads: Mapping[int, ExitHeadLike], model: CausalLM, backbone: CausalBackbone
) -> dict[int, ExitHeadLike]:
    """The heads as they are decoded with, if they are the model's."""
    own = {layer: head for layer, head in heads.items() if isinstance(head, ExitHead)}
    check_heads(own, model)
    for layer, head in heads.items():
        _refuse_misfit(layer, head, backbone)
    return {**heads, **{layer: head.across() for layer, head in own.items()}}


def _refuse_misfit(layer: int, head: ExitHeadLike, backbone: CausalBackbone) -> None:
    if not 1 <= layer <= backbone.n_layers:
        raise RiskcalError(
            f"heads: there is one for layer {layer}, but the model's layers are 1 to {backbone.n_layers}."
        )
    try:
        with torch.inference_mode():
            states = torch.zeros(1, backbone.width, dtype=backbone.dtype, device=backbone.device)
            scored = head.logits(states)
    except RuntimeError as error:
        raise RiskcalError(
            f"heads: that of layer {layer} does not take states of width {backbone.width} in {backbone.dtype} on "
            f"{backbone.device} ({str(error).splitlines()[0]}); give heads made for this model."
        ) from None
    ids = head.ids
    fits = scored.shape[-1] == backbone.vocabulary if ids is None else len(ids) == scored.shape[-1]
    if not fits or (
        ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < backbone.vocabulary
    ):
        raise RiskcalError(
            f"heads: that of layer {layer} scores {scored.shape[-1]} tokens, which are not those of this model's vocabulary of "
            f"{backbone.vocabulary}; give heads made for this model."
        )
