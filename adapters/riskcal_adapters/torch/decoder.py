"""What decoders of every architecture offer: `generate`, `speculate`, `trace`, and text in and out."""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from riskcal import RiskcalError
from riskcal.policy import ExitPolicy, Sampling
from riskcal.records import Traces
from riskcal_adapters import fingerprint, generation_config, request_checks
from riskcal_adapters.torch import device_loop, one_row, speculation, weights
from riskcal_adapters.torch import sampling as sampling_
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.confidence import CONTRASTIVE, MEASURES
from riskcal_adapters.torch.generation import Generation, Table, assembled
from riskcal_adapters.torch.loop import Loop
from riskcal_adapters.torch.measures import Classifier, Linear
from riskcal_adapters.torch.speculation import Drafting, Speculation

#: A fast tokenizer notes how it pads before it reads, which threads that share it must not do at once.
_TOKENIZING = threading.Lock()


class Decoder:
    """Decodes with a backbone: what is the same for every architecture.

    Parameters
    ----------
    model : PreTrainedModel
        What the backbone was read from.
    backbone : Backbone
    special : SpecialTokens
    settings : mapping
        What changes tokens beside weights and the layers' type, by the names of Hugging Face's configs.
    default_length, tokenizer, classifier
        As the architectures' faces take them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        backbone: Backbone,
        special: generation_config.SpecialTokens,
        settings: Mapping[str, Any],
        default_length: int,
        tokenizer: PreTrainedTokenizerBase | None,
        classifier: Classifier | None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, dict(settings)
        #: Tokens at most where neither caller nor policy says: the generation config's limit, else 64.
        self.default_length = default_length
        self._special, self._backbone = special, backbone
        self._as_read = weights.versions(model)
        self.n_layers: int = backbone.n_layers
        self._classifier = (
            None if classifier is None else Linear.of(classifier, backbone.width, backbone.device)
        )
        self.measures: list[str] = [
            name
            for name in MEASURES
            if (name != "classifier" or classifier is not None)
            and (name not in CONTRASTIVE or not backbone.exit_heads)
        ]
        self.loop = Loop(backbone, special, self._classifier, functools.cache(self._text))
        self._last_asked: tuple[Any, ...] = (None, 0, None, None, None)

    @property
    def dtype(self) -> str:
        """The type that layers compute in."""
        return str(self._backbone.dtype).removeprefix("torch.")

    @functools.cached_property
    def tokenizer_digest(self) -> str | None:
        """Fingerprint of the tokenizer, None without one."""
        return None if self.tokenizer is None else fingerprint.of_tokenizer(self.tokenizer)

    @functools.cached_property
    def weights(self) -> str:
        """Fingerprint of the model's weights, by which a policy knows the model that it was calibrated on."""
        if weights.versions(self.model) != self._as_read:
            raise RiskcalError(
                "model: its weights changed after this decoder read them; make a new decoder."
            )
        named = self.model.state_dict().items()
        return fingerprint.of_weights(named, lambda part: part.float().cpu().numpy())

    @functools.cached_property
    def classifier_weights(self) -> str | None:
        """Fingerprint of the exit classifier, None without one."""
        own = self._classifier
        return (
            None
            if own is None
            else fingerprint.of_classifier(own.weight.cpu().numpy(), own.bias.cpu().numpy())
        )

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        policy: ExitPolicy | Sequence[ExitPolicy] = ExitPolicy.full_model(),
        max_new_tokens: int | None = None,
    ) -> Generation:
        """Decode; each token exits as its row's policy says.

        Parameters
        ----------
        input_ids : (B, S) int
            Prompts, padded on either side.
        attention_mask : (B, S), optional
            1 for real tokens, 0 for padding. Default: all are real, as in Hugging Face's ``generate``.
        policy : ExitPolicy or sequence of B of them
            Default: the full model, whose tokens are those of ``model.generate(do_sample=False, num_beams=1)`` (where encoder
            and decoder differ in depth, transformers needs ``past_key_values=EncoderDecoderCache(DynamicCache(),
            DynamicCache())`` for it). In bfloat16 sums round differently with the batch and the order of operations, so that
            tokens can differ where two logits nearly tie. A policy
            that never exits is the full model, whatever it says of pruning and caches. Rows whose policies differ in more
            than thresholds and schedules are generated in batches of their own.
        max_new_tokens : int, optional
            Length limit. Default: the one the policy was calibrated with, else the generation config's ``max_new_tokens``, else
            its ``max_length`` less the start token, else 64.

        Returns
        -------
        Generation
            Every row as if it had been generated alone, unless its policy's ``batching`` is ``"deepest"``.

        Raises
        ------
        RiskcalError
            Naming the argument and the first offending row: for empty or wholly masked prompts, shapes that do not fit,
            ids out of the vocabulary, an unknown measure, a measure whose classifier is missing, for policies made for other
            weights, classifier, exit heads, ``config``, ``dtype`` or tokenizer, another number of layers or of prompts, or
            another ``max_new_tokens``, and for policies that this decoder cannot follow: with ``coordinates`` or
            ``lower_is_stricter``, a threshold where there is no exit head, or tokens forbidden by text without a tokenizer.
        """
        tokens, mask = self.checked(input_ids, attention_mask)
        batch = len(tokens)
        groups, needed = self._asked(policy, batch, max_new_tokens)
        with torch.inference_mode():
            if len(groups) == 1:
                parts = [self._decode(groups[0][0], tokens, mask, needed)]
            else:
                parts = [
                    self._decode(one, tokens[rows], mask[rows], needed[:, :, rows])
                    for one, rows in groups
                ]
        return assembled(
            [rows for _, rows in groups], parts, batch, self._special.pad, self._backbone.tensor
        )

    def _decode(
        self,
        policy: ExitPolicy,
        tokens: Tensor,
        mask: NDArray[np.bool_],
        needed: NDArray[np.float32],
    ) -> Table:
        """Rows that are decoded together, by the loop that waits least where the weights are."""
        if device_loop.apart(self._backbone.device) and device_loop.takes(policy, needed):
            return Table.of(device_loop.generate(self.loop, policy, tokens, mask, needed))
        if one_row.takes(self._backbone, policy, len(tokens)):
            return one_row.generate(self.loop, policy, tokens, mask, needed)
        return Table.of(self.loop.generate(policy, tokens, mask, needed))

    def speculate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        draft_layer: int,
        draft_length: int | Literal["adaptive"] = "adaptive",
        draft_confidence: float | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
    ) -> Speculation:
        """Decode as the full model does, drafting with the early layers and verifying drafts with the others.

        The tokens are those of `generate` under ``ExitPolicy(sampling=sampling)``, whatever the drafts: there is no risk to
        calibrate. They are equal up to floating-point ties, as positions that are verified together round differently.

        Parameters
        ----------
        input_ids, attention_mask : (B, S)
            As in `generate`. Rows are decoded one after the other.
        draft_layer : int
            1 to L - 1: layers up to it draft.
        draft_length : int or "adaptive"
            Tokens drafted at most before a verification; adaptive: as many as are expected to yield most tokens per layer
            run, after the row's own rate of acceptance so far, and none once drafts do not pay.
        draft_confidence : float, optional
            In [0, 1]: a draft also stops where the draft layer's softmax margin is below it.
        sampling : riskcal.Sampling, optional
            Default: greedy.
        max_new_tokens : int, optional
            Length limit. Default: as in `generate`.

        Returns
        -------
        Speculation

        Raises
        ------
        RiskcalError
            For prompts that `generate` refuses, and for arguments out of range.
        """
        tokens, mask = self.checked(input_ids, attention_mask)
        drafting = Drafting.checked(draft_layer, draft_length, draft_confidence, self.n_layers)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise RiskcalError(
                f"sampling: {sampling!r} is no riskcal.Sampling; leave it out to decode greedily."
            )
        limit = request_checks.length(max_new_tokens, [], self.default_length)
        with torch.inference_mode():
            rows = [
                speculation.speculate(
                    self._backbone,
                    tokens[row : row + 1, real],
                    drafting,
                    speculation.choice(sampling, key, self._backbone.vocabulary),
                    self._special,
                    limit,
                )
                for row, (real, key) in enumerate(
                    zip(mask, sampling_.noise_keys(tokens.cpu().numpy(), mask), strict=True)
                )
            ]
        return speculation.together(rows, self._special.pad, self._backbone.tensor)

    def trace(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        prompts: ArrayLike | None = None,
        policy: ExitPolicy = ExitPolicy.full_model(),
    ) -> Traces:
        """Every exit's confidence along the full model's own path, and whether its token is the full model's.

        Parameters
        ----------
        input_ids, attention_mask : (B, S)
            As in `generate`.
        max_new_tokens : int, optional
            Length limit. Default: as in `generate`.
        prompts : (B,) array_like, optional
            Ids of the prompts. Default: 0 to B - 1.
        policy : ExitPolicy
            Its measure, pruning, contrast, sampling, forbidden classes and ``min_layer`` are used; thresholds, cache and
            batching are not. Layers before ``min_layer`` have confidence NaN where pruning or contrasts begin at it, and
            layers whose token may not leave early where it is forbidden.

        Returns
        -------
        riskcal.Traces
            One row per generated token, the end token included. Exits are the layers; where the last layer has a head of its
            own there is one more, the final head.
        """
        tokens, mask = self.checked(input_ids, attention_mask)
        batch = len(tokens)
        limit = request_checks.length(max_new_tokens, [], self.default_length)
        ids = request_checks.prompt_ids(prompts, batch)
        [template] = request_checks.policies(policy, batch, self.measures)
        request_checks.texts_known([template], self.tokenizer)
        rows, positions, confidence, agrees = [], [], [], []
        with torch.inference_mode():
            run = self.loop.run(template, tokens, mask, limit)
            chosen, going = run.cache.first, list(range(batch))
            for position in range(limit):
                sure, best = self.loop.all_exits(run, chosen)
                self.loop.hold(run, sure, best, going)
                chosen = best[:, -1].tolist()
                rows += going
                positions += [position] * len(going)
                confidence.append(sure[going])
                agrees.append(best[going] == best[going, -1:])
                going = [row for row in going if chosen[row] not in self._special.ends]
                if not going:
                    break
        return Traces.from_arrays(
            prompt=ids[rows],
            position=np.array(positions),
            confidence=np.concatenate(confidence),
            agrees=np.concatenate(agrees),
        )

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of texts, each (B, S), on the model's device."""
        if isinstance(texts, str) or not len(texts):
            raise RiskcalError("texts: give a list of at least one string.")
        with _TOKENIZING:
            encoded = self._need_tokenizer()(list(texts), padding=True, return_tensors="pt")
        return encoded["input_ids"].to(self._backbone.device), encoded["attention_mask"].to(
            self._backbone.device
        )

    def ids(self, texts: Sequence[str]) -> list[Ints]:
        """Token ids of each text, as `encode` has them, without padding."""
        with _TOKENIZING:
            read = self._need_tokenizer()(list(texts), return_attention_mask=False)
        return [np.array(ids, dtype=np.int64) for ids in read["input_ids"]]

    def decode(self, tokens: Tensor | list[list[int]]) -> list[str]:
        """One text per row of token ids (B, T), without special tokens."""
        return self._need_tokenizer().batch_decode(tokens, skip_special_tokens=True)

    def _text(self, token: int) -> str:
        """Of a token where it follows another, with its space; none of a special token, or without a tokenizer."""
        if self.tokenizer is None:
            return ""
        once, twice = self.tokenizer.batch_decode(
            [[token], [token, token]],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return twice[len(once) :]

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RiskcalError(
                f"tokenizer: none was given; make the decoder with {type(self).__name__}(model, tokenizer)."
            )
        return self.tokenizer

    def checked(self, input_ids: Any, attention_mask: Any) -> tuple[Tensor, NDArray[np.bool_]]:
        """Prompts on the model's device, and which of their tokens are real, after checking both."""
        tokens = _given(input_ids, "input_ids")
        given = (
            None
            if attention_mask is None
            else _given(attention_mask, "attention_mask").cpu().numpy()
        )
        mask = request_checks.prompt_mask(
            tokens.cpu().numpy(), given, self._special, self._backbone.vocabulary
        )
        return tokens.to(self._backbone.device, torch.long), mask

    def _asked(
        self, policy: ExitPolicy | Sequence[ExitPolicy], batch: int, max_new_tokens: int | None
    ) -> tuple[list[tuple[ExitPolicy, list[int]]], NDArray[np.float32]]:
        """Rows that are decoded together, and what each needs to exit, as `needed` has it; T is the length limit."""
        # One policy serves many prompts, and none ever changes: what the last one says is kept.
        known, *size, groups, table = self._last_asked
        if known is policy and size == [batch, max_new_tokens]:
            return groups, table
        asked = request_checks.policies(policy, batch, self.measures)
        self.refuse_other(asked)
        limit = request_checks.length(max_new_tokens, asked, self.default_length)
        table = self.needed(asked, batch, limit)
        groups = request_checks.rows_by_settings(asked, table)
        if isinstance(policy, ExitPolicy):
            self._last_asked = policy, batch, max_new_tokens, groups, table
        return groups, table

    def refuse_other(self, asked: Sequence[ExitPolicy]) -> None:
        """Refuse policies that were made for another model, or whose thresholds or pruning do not fit the exit heads."""
        request_checks.same_model(asked, self)
        request_checks.texts_known(asked, self.tokenizer)
        if self._backbone.exit_heads:
            request_checks.defaults_only(asked, ("pruning",))
            request_checks.at_heads(asked, self._backbone.exit_heads, self.n_layers)

    def needed(self, asked: Sequence[ExitPolicy], batch: int, limit: int) -> NDArray[np.float32]:
        """(T, L or L + 1, B): the confidence that each row needs at each exit; inf where there is none."""
        exits = self._backbone.n_exits
        table = request_checks.exit_thresholds(
            asked, batch, self.n_layers, limit, own_last=exits > self.n_layers
        )
        closed = [not self._backbone.exits_at(layer + 1) for layer in range(exits)]
        table[:, closed] = np.inf
        return table


def _given(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RiskcalError(
            f"{name}: not an array of numbers ({error}); give (B, S), padded to one length."
        ) from None
