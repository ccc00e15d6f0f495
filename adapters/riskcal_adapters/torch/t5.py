"""`EarlyExitT5`: decoding with a Hugging Face T5 in which every token may leave at an earlier layer.

A token exits at the first layer whose confidence reaches the policy's threshold. The layers above it did not see it, but
later tokens attend to it there; what they see is the policy's ``cache``, and made up for only when such a layer next runs
(`riskcal_adapters.torch.backbone`). In a batch every row decodes as if alone, unless its policy says ``"deepest"``.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy, Sampling
from riskcal.records import Traces
from riskcal_adapters import _requests, fingerprint
from riskcal_adapters.torch import choosing, selfcheck, speculation, weights
from riskcal_adapters.torch.backbone import Backbone, Cache
from riskcal_adapters.torch.heads import Scores
from riskcal_adapters.torch.judging import CONTRASTIVE, MEASURES, Judge
from riskcal_adapters.torch.measures import Classifier
from riskcal_adapters.torch.speculation import Drafting, Speculation

#: A fast tokenizer notes how it pads before it reads, which threads that share it must not do at once.
_TOKENIZING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Generation:
    """What was generated for B prompts; T is the longest of the generations.

    Attributes
    ----------
    tokens : (B, T) int64
        Token ids, the end token included, the padding id after it.
    exit_layers : (B, T) int64
        Layer at which each token left the decoder, 1..L; 0 where padded.
    confidence : (B, T) float32
        Confidence at that layer; NaN where padded.
    refused : (B, T) float32
        The largest confidence at which the token might have exited earlier and did not; ``-inf`` where there was none. A
        threshold above all of a row's would have generated the very same.
    """

    tokens: Tensor
    exit_layers: Tensor
    confidence: Tensor
    refused: Tensor


@dataclass(eq=False)
class _Step:
    """One position of a batch, row by row."""

    tokens: list[int]
    exits: list[int]
    confidence: list[float]
    refused: list[float]

    @classmethod
    def blank(cls, batch: int, pad: int) -> "_Step":
        return cls([pad] * batch, [0] * batch, [math.nan] * batch, [-math.inf] * batch)

    def spread(self, rows: list[int], blank: "_Step") -> "_Step":
        """``blank``, of a larger batch, with this at its ``rows``."""
        for place, row in enumerate(rows):
            blank.tokens[row], blank.exits[row] = self.tokens[place], self.exits[place]
            blank.confidence[row], blank.refused[row] = self.confidence[place], self.refused[place]
        return blank


@dataclass(eq=False)
class _Run:
    """The generation of rows that share all settings of their policies but thresholds."""

    policy: ExitPolicy
    cache: Cache
    judge: Judge
    layer: Callable[[int, Tensor, Cache], Tensor]
    keys: list[int]  # of each row's noise
    pending: list[int]  # each row's early exits in a row
    opens: list[bool]  # whether any row may ever exit at a layer
    embedded: list[Tensor] = field(
        default_factory=list
    )  # of all positions, where they are run again

    @property
    def position(self) -> int:
        return len(self.cache.states)

    def keep(self, rows: list[int], as_tensor: Callable[[NDArray[Any]], Tensor]) -> None:
        """Go on with some rows of the batch."""
        kept = as_tensor(np.array(rows))
        self.cache.keep(kept)
        self.keys = [self.keys[row] for row in rows] if self.keys else []
        self.pending = [self.pending[row] for row in rows]
        self.embedded = [state.index_select(0, kept) for state in self.embedded]


class EarlyExitT5:
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
    """

    def __init__(
        self,
        model: weights.T5,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        classifier: Classifier | None = None,
    ) -> None:
        backbone = selfcheck.read(model)
        _requests.greedy_only(model.generation_config)
        #: Tokens at most where neither caller nor policy says: the generation config's limit, else 64.
        self.default_length = _requests.default_length(model.generation_config)
        self.model = model
        self.tokenizer = tokenizer
        self._special = _requests.special_tokens(model.generation_config, model.config.vocab_size)
        self._backbone = backbone
        self._as_read = weights.versions(model)
        #: What changes tokens beside the weights, which a policy is bound to.
        self.settings = _requests.settings(
            self._special,
            epsilon=model.config.layer_norm_epsilon,
            activation=model.config.dense_act_fn,
            gated=model.config.is_gated_act,
            reach=model.config.relative_attention_max_distance,
            scaled=weights.scales_outputs(model),
            logits=self.dtype,
        )
        self.n_layers: int = self._backbone.n_layers
        self._classifier = None if classifier is None else _Linear.of(classifier, self._backbone)
        self.measures: list[str] = [
            name for name in MEASURES if name != "classifier" or classifier is not None
        ]
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
            ids out of the vocabulary, an unknown measure, a measure whose classifier is missing, and for policies made for
            other weights, another number of layers or of prompts, or another ``max_new_tokens``.
        """
        tokens, mask = self._checked(input_ids, attention_mask)
        batch = len(tokens)
        groups, thresholds = self._asked(policy, batch, max_new_tokens)
        with torch.inference_mode():
            if len(groups) == 1:
                parts = [self._decode(groups[0][0], tokens, mask, thresholds)]
            else:
                parts = [
                    self._decode(one, tokens[rows], mask[rows], thresholds[:, :, rows])
                    for one, rows in groups
                ]
        return self._generation([rows for _, rows in groups], parts, batch)

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
        tokens, mask = self._checked(input_ids, attention_mask)
        drafting = Drafting.checked(draft_layer, draft_length, draft_confidence, self.n_layers)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise RiskcalError(
                f"sampling: {sampling!r} is no riskcal.Sampling; leave it out to decode greedily."
            )
        limit = _requests.length(max_new_tokens, [], self.default_length)
        with torch.inference_mode():
            rows = [
                speculation.speculate(
                    self._backbone,
                    tokens[row : row + 1, real],
                    drafting,
                    speculation.choice(sampling, key),
                    self._special,
                    limit,
                )
                for row, (real, key) in enumerate(
                    zip(mask, choosing.noise_keys(tokens.cpu().numpy(), mask), strict=True)
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
        """Every layer's confidence along the full model's own path, and whether its token is the full model's.

        Parameters
        ----------
        input_ids, attention_mask : (B, S)
            As in `generate`.
        max_new_tokens : int, optional
            Length limit. Default: as in `generate`.
        prompts : (B,) array_like, optional
            Ids of the prompts. Default: 0 to B - 1.
        policy : ExitPolicy
            Its measure, pruning, contrast, sampling and ``min_layer`` are used; thresholds, cache and batching are not.
            Layers before ``min_layer`` have confidence NaN where pruning or contrasts begin at it.

        Returns
        -------
        riskcal.Traces
            One row per generated token, the end token included.
        """
        tokens, mask = self._checked(input_ids, attention_mask)
        batch = len(tokens)
        limit = _requests.length(max_new_tokens, [], self.default_length)
        ids = _requests.prompt_ids(prompts, batch)
        [template] = _requests.policies(policy, batch, self.measures)
        rows, positions, confidence, agrees = [], [], [], []
        with torch.inference_mode():
            run = self._run(template, tokens, mask, limit)
            chosen, going = [self._special.start] * batch, list(range(batch))
            for position in range(limit):
                sure, best = self._all_exits(run, chosen)
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

    def decode(self, tokens: Tensor) -> list[str]:
        """One text per row of token ids (B, T), without special tokens."""
        return self._need_tokenizer().batch_decode(tokens, skip_special_tokens=True)

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RiskcalError(
                "tokenizer: none was given; make the decoder with EarlyExitT5(model, tokenizer)."
            )
        return self.tokenizer

    def _checked(self, input_ids: Any, attention_mask: Any) -> tuple[Tensor, NDArray[np.bool_]]:
        tokens = _given(input_ids, "input_ids")
        given = (
            None
            if attention_mask is None
            else _given(attention_mask, "attention_mask").cpu().numpy()
        )
        mask = _requests.prompt_mask(
            tokens.cpu().numpy(), given, self._special, self._backbone.vocabulary
        )
        return tokens.to(self._backbone.device, torch.long), mask

    def _asked(
        self, policy: ExitPolicy | Sequence[ExitPolicy], batch: int, max_new_tokens: int | None
    ) -> tuple[list[tuple[ExitPolicy, list[int]]], NDArray[np.float32]]:
        """Rows that are decoded together, and (T, L, B): the confidence needed to exit; T is the length limit."""
        # One policy serves many prompts, and none ever changes: what the last one says is kept.
        known, *size, groups, table = self._last_asked
        if known is policy and size == [batch, max_new_tokens]:
            return groups, table
        asked = _requests.policies(policy, batch, self.measures)
        _requests.same_model(asked, self)
        limit = _requests.length(max_new_tokens, asked, self.default_length)
        table = _requests.exit_thresholds(asked, batch, self.n_layers, limit)
        groups = _requests.rows_by_settings(asked, table)
        if isinstance(policy, ExitPolicy):
            self._last_asked = policy, batch, max_new_tokens, groups, table
        return groups, table

    def _generation(
        self, rows: list[list[int]], parts: list[list[_Step]], batch: int
    ) -> Generation:
        """Put groups of rows together again."""
        length = max(len(steps) for steps in parts)
        tokens = np.full((batch, length), self._special.pad)
        exits = np.zeros((batch, length), dtype=np.int64)
        confidence = np.full((batch, length), math.nan, dtype=np.float32)
        refused = np.full((batch, length), -math.inf, dtype=np.float32)
        for some, steps in zip(rows, parts, strict=True):
            own, size = slice(None) if len(some) == batch else some, len(steps)
            tokens[own, :size] = np.array([step.tokens for step in steps]).T
            exits[own, :size] = np.array([step.exits for step in steps]).T
            confidence[own, :size] = np.array(
                [step.confidence for step in steps], dtype=np.float32
            ).T
            refused[own, :size] = np.array([step.refused for step in steps], dtype=np.float32).T
        as_tensor = self._backbone.tensor
        return Generation(
            as_tensor(tokens), as_tensor(exits), as_tensor(confidence), as_tensor(refused)
        )

    def _run(
        self, policy: ExitPolicy, tokens: Tensor, mask: NDArray[np.bool_], length: int
    ) -> _Run:
        backbone, batch = self._backbone, len(tokens)
        policy = policy.named()
        return _Run(
            policy=policy,
            cache=backbone.start(tokens, mask, length),
            judge=Judge(backbone, policy, self._classifier),
            layer=backbone.layer_exact
            if policy.cache in ("deferred", "recompute")
            else backbone.layer,
            keys=choosing.noise_keys(tokens.cpu().numpy(), mask) if policy.sampling else [],
            pending=[0] * batch,
            opens=[True] * self.n_layers,
        )

    def _decode(
        self,
        policy: ExitPolicy,
        tokens: Tensor,
        mask: NDArray[np.bool_],
        thresholds: NDArray[np.float32],
    ) -> list[_Step]:
        """The positions of rows that share ``policy``, but for the ``thresholds`` (T, L, B)."""
        batch = len(tokens)
        run = self._run(policy, tokens, mask, len(thresholds))
        run.opens = np.isfinite(thresholds).any((0, 2)).tolist()
        chosen, going = [self._special.start] * batch, list(range(batch))
        advance = self._step_of_rows if policy.batching == "regroup" else self._step
        steps, rows = [], going  # rows: which of the batch's those of the run are
        for position in range(len(thresholds)):
            step = advance(run, chosen, going, thresholds[position].tolist())
            steps.append(
                step
                if len(rows) == batch
                else step.spread(rows, _Step.blank(batch, self._special.pad))
            )
            chosen = step.tokens
            going = [row for row in going if chosen[row] not in self._special.ends]
            if not going:
                break
            if 2 * len(going) <= len(
                rows
            ):  # half of the batch has ended: go on with the others alone
                run.keep(going, self._backbone.tensor)
                thresholds = thresholds[:, :, going]
                rows, chosen = [rows[row] for row in going], [chosen[row] for row in going]
                going = list(range(len(rows)))
        return steps

    def _step(
        self, run: _Run, previous: list[int], going: list[int], thresholds: list[list[float]]
    ) -> _Step:
        """The next token of each row.

        ``going`` are the rows that have not ended (the others get padding), ``thresholds`` (L, B) the confidence needed.
        """
        policy, cache, judge = run.policy, run.cache, run.judge
        step = _Step.blank(cache.batch, self._special.pad)
        state = first = self._begin(run, previous)
        ahead = (
            self._last_scores(run, state)
            if policy.measure == "oracle" or policy.emits == "last"
            else None
        )
        judge.begin(None if ahead is None else ahead.best())
        if policy.max_pending is not None:
            thresholds = self._forced(run, thresholds)
        together = policy.batching == "deepest"
        # Rows that exit keep the state at which they did; with exact caches their true state goes on with the others'.
        freezes = not together and run.layer != self._backbone.layer_exact
        active, moving = going, self._column(going, cache) if freezes else None
        waiting = set(going)  # rows of a "deepest" batch that have not reached their threshold yet
        for index, needed in enumerate(thresholds):
            before = state if index else None
            deeper = run.layer(index, state, cache)
            state = deeper if moving is None else torch.where(moving, deeper, state)
            if index == 0:
                first = state
            last = index == self.n_layers - 1
            if not last and (
                not run.opens[index] or all(needed[row] == math.inf for row in active)
            ):
                judge.pass_by(state)
                continue
            confidence, scores = judge.look(index + 1, state, before)
            sure = confidence.tolist()
            leaving = active if last else [row for row in active if sure[row] >= needed[row]]
            if together and not last:
                waiting.difference_update(leaving)
                leaving = [] if waiting else active
            if leaving:
                emitting = scores or judge.scores(index + 1, state)
                self._leave(
                    run,
                    step,
                    index + 1,
                    leaving,
                    leaving,
                    sure,
                    emitting if policy.emits == "exit" else ahead,
                )
                if len(leaving) == len(active):
                    break
            for row in active:
                if (
                    sure[row] > step.refused[row]
                    and not step.exits[row]
                    and needed[row] != math.inf
                ):
                    step.refused[row] = sure[row]
            if leaving:
                active = [row for row in active if not step.exits[row]]
                moving = self._column(active, cache) if freezes else None
        cache.states.append(first if policy.cache == "first" else state)
        if policy.cache == "copy":
            self._backbone.copy_upwards(cache, max(step.exits))
        for row in going:
            run.pending[row] = 0 if step.exits[row] == self.n_layers else run.pending[row] + 1
        return step

    def _step_of_rows(
        self, run: _Run, previous: list[int], going: list[int], thresholds: list[list[float]]
    ) -> _Step:
        """As `_step`, computing in each layer the rows that go so deep and no others."""
        cache, judge, as_tensor = run.cache, run.judge, self._backbone.tensor
        step = _Step.blank(cache.batch, self._special.pad)
        rows = going
        at_exit = self._begin(run, previous)  # (B, d), row after row
        state = (
            at_exit
            if len(rows) == cache.batch
            else at_exit.index_select(0, as_tensor(np.array(rows)))
        )
        at_exit = at_exit.clone()
        judge.begin()
        for index, needed in enumerate(thresholds):
            before = state if index else None
            state = self._backbone.layer_of_rows(index, state, rows, cache)
            last = index == self.n_layers - 1
            if not last and (not run.opens[index] or all(needed[row] == math.inf for row in rows)):
                judge.pass_by(state)
                continue
            confidence, scores = judge.look(index + 1, state, before)
            sure = confidence.tolist()
            places = [i for i, row in enumerate(rows) if last or sure[i] >= needed[row]]
            if places:
                leaving = [rows[i] for i in places]
                self._leave(
                    run,
                    step,
                    index + 1,
                    leaving,
                    places,
                    sure,
                    scores or judge.scores(index + 1, state),
                )
                exiting = state.index_select(0, as_tensor(np.array(places)))
                at_exit.index_copy_(0, as_tensor(np.array(leaving)), exiting)
            stay = [i for i, row in enumerate(rows) if not step.exits[row]]
            for i in stay:
                if sure[i] > step.refused[rows[i]] and needed[rows[i]] != math.inf:
                    step.refused[rows[i]] = sure[i]
            if not stay:
                break
            if places:
                rows = [rows[i] for i in stay]
                kept = as_tensor(np.array(stay))
                state = state.index_select(0, kept)
                judge.keep(kept)
        cache.states.append(at_exit)
        return step

    def _begin(self, run: _Run, previous: list[int]) -> Tensor:
        """Embed the tokens before; where the cache is recomputed, go back to the last position that ran all layers."""
        state = self._backbone.embed(previous)
        if run.policy.cache == "recompute":
            deepest = run.cache.layers.get(self.n_layers - 1)
            full = 0 if deepest is None else deepest.filled
            run.cache.rewind(full)
            run.cache.states[full:] = run.embedded[full:]
            run.embedded.append(state)
        return state

    def _last_scores(self, run: _Run, state: Tensor) -> Scores:
        """The last layer's logits on the cache as it is; the cache is left as if they had not been asked for."""
        cache = run.cache
        position, states = run.position, list(cache.states)
        for index in range(self.n_layers):
            state = run.layer(index, state, cache)
        cache.rewind(position)
        cache.states[:] = states
        return Scores(self._backbone.logits(state))

    def _forced(self, run: _Run, thresholds: list[list[float]]) -> list[list[float]]:
        """No exit for rows that exited ``max_pending`` times in a row."""
        limit = run.policy.max_pending
        due = {row for row, count in enumerate(run.pending) if limit is not None and count >= limit}
        if not due:
            return thresholds
        *early, last = thresholds
        return [
            [math.inf if row in due else value for row, value in enumerate(needed)]
            for needed in early
        ] + [last]

    def _leave(
        self,
        run: _Run,
        step: _Step,
        layer: int,
        rows: list[int],
        places: list[int],
        sure: list[float],
        scores: Scores,
    ) -> None:
        """Rows of the batch, which stand at ``places`` in the scores and confidences, emit their tokens."""
        tokens = self._choose(run, scores, rows, places)
        for row, place, token in zip(rows, places, tokens, strict=True):
            step.tokens[row], step.exits[row], step.confidence[row] = token, layer, sure[place]

    def _choose(self, run: _Run, scores: Scores, rows: list[int], places: list[int]) -> list[int]:
        sampling = run.policy.sampling
        if sampling is None:
            best = scores.best().tolist()
            return [best[place] for place in places]
        keys = [run.keys[row] for row in rows]
        return choosing.draw(
            scores, places, keys, run.position, sampling, self._backbone.vocabulary
        )

    def _all_exits(
        self, run: _Run, previous: list[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Confidence and token (B, L) at every layer, of a step that skips none; the last token is the full model's."""
        policy, cache, judge = run.policy, run.cache, run.judge
        begins = (
            policy.min_layer if policy.pruning is not None or policy.measure in CONTRASTIVE else 1
        )
        everyone = list(range(cache.batch))
        states = [self._backbone.embed(previous)]
        for index in range(self.n_layers):
            states.append(self._backbone.layer(index, states[-1], cache))
        last = Scores(self._backbone.logits(states[-1]))
        judge.begin(last.best() if policy.measure == "oracle" else None)
        confidence, best = [], []
        scores: Scores | None
        for layer, state in enumerate(states[1:], start=1):
            if layer < begins:
                judge.pass_by(state)
                sure, scores = (
                    np.full(cache.batch, np.float32(math.nan)),
                    Scores(self._backbone.logits(state)),
                )
            else:
                sure, scores = judge.look(layer, state, states[layer - 1] if layer > 1 else None)
            confidence.append(sure)
            best.append(self._choose(run, scores or judge.scores(layer, state), everyone, everyone))
        best[-1] = self._choose(run, last, everyone, everyone)
        cache.states.append(states[-1])
        return np.stack(confidence, axis=1), np.array(best).T

    def _column(self, rows: list[int], cache: Cache) -> Tensor | None:
        """(B, 1), true at these rows; None if these are all."""
        if len(rows) == cache.batch:
            return None
        chosen = np.zeros((cache.batch, 1), dtype=bool)
        chosen[rows] = True
        return self._backbone.tensor(chosen)


@dataclass(frozen=True, eq=False)
class _Linear:
    """An exit classifier's weights, on the model's device."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, classifier: Classifier, backbone: Backbone) -> "_Linear":
        weight, bias = map(
            torch.from_numpy, _requests.classifier_parts(classifier, len(backbone.head))
        )
        return cls(weight.to(backbone.device), bias.to(backbone.device))


def _given(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RiskcalError(
            f"{name}: not an array of numbers ({error}); give (B, S), padded to one length."
        ) from None
