"""`EarlyExitT5`: decoding with a Hugging Face T5 in which every token may leave at an earlier layer.

A token exits at the first layer whose confidence reaches the policy's threshold. The layers above it did not see it, but
later tokens attend to it there; what they see is the policy's ``cache``, and made up for only when such a layer next runs
(`riskcal_adapters.torch.backbone`). In a batch every row decodes as if alone, unless its policy says ``"deepest"``. The exits
are in `riskcal_adapters.torch.loop`, what users call in `riskcal_adapters.torch.decoder`; here is what is a T5's alone.
"""

from transformers import PreTrainedTokenizerBase

from riskcal_adapters import generation_config, request_checks
from riskcal_adapters.torch import selfcheck, weights
from riskcal_adapters.torch.decoder import Decoder
from riskcal_adapters.torch.measures import Classifier


class EarlyExitT5(Decoder):
    """A T5 that may stop each token's computation early, at batch sizes from 1.

    Parameters
    ----------
    model : T5ForConditionalGeneration
        T5 v1.0 or v1.1, or an ``MT5ForConditionalGeneration`` or ``UMT5ForConditionalGeneration``, in any floating type, on
        one device. It is read once, here, and not modified: the decoder keeps rearranged copies of the weights, so make a
        new one after changing or moving the model. float16 is computed in
        float32 (T5 overflows it), other types as they are; confidences always in float32.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed by `encode` and `decode` only.
    classifier : object with ``weight`` (d,) and ``bias``, optional
        A linear exit classifier on raw states, for policies with measure ``"classifier"``.

    Attributes
    ----------
    model
        The model given.
    n_layers : int
        Decoder layers L; exits are numbered 1..L, and L is the full model.
    measures : list of str
        The measures that a policy may name.
    weights, classifier_weights, tokenizer_digest, dtype, settings
        By what a policy knows the decoder that it was calibrated on: fingerprints, the type that layers compute in, and what
        else of the model's configs changes tokens. A policy that names another is refused.

    Raises
    ------
    RiskcalError
        If the model is no T5, has weights that are not floating-point or are spread over devices, lacks its padding, end
        or start id, if its generation config asks for anything but greedy decoding, if the classifier does not fit it, or
        if its own forward gives other logits than its weights in a T5: adapters, hooks, added biases, replaced norms and
        other embeddings are not decoded with, and so not ignored.

    Examples
    --------
    >>> from importlib import resources
    >>> from transformers import AutoTokenizer
    >>> from riskcal_adapters.torch import EarlyExitT5, load_t5
    >>> folder = resources.files("riskcal_adapters") / "g2p" / "checkpoint"  # or a folder of yours
    >>> decoder = EarlyExitT5(load_t5(folder), AutoTokenizer.from_pretrained(folder))
    >>> policy = riskcal.ExitPolicy(threshold=0.9, cache="deferred")
    >>> generation = decoder.generate(*decoder.encode(["guarantee"]), policy=policy, max_new_tokens=24)
    >>> decoder.decode(generation.tokens), generation.exit_layers.max().item() <= decoder.n_layers
    (['G EH R AH N T IY'], True)
    """

    def __init__(
        self,
        model: weights.T5,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        classifier: Classifier | None = None,
    ) -> None:
        weights.only_t5(model)
        generation_config.greedy_only(model.generation_config)
        special = generation_config.special_tokens(model.generation_config, model.config.vocab_size)
        backbone = selfcheck.read_t5(model, special.start)
        settings = request_checks.settings(
            special,
            epsilon=model.config.layer_norm_epsilon,
            activation=model.config.dense_act_fn,
            gated=model.config.is_gated_act,
            reach=model.config.relative_attention_max_distance,
            scaled=weights.scales_outputs(model),
            logits=str(backbone.dtype).removeprefix("torch."),
        )
        length = generation_config.default_length(model.generation_config)
        super().__init__(model, backbone, special, settings, length, tokenizer, classifier)
