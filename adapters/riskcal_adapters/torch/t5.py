"""`EarlyExitT5`: greedy decoding with a Hugging Face T5 in which every token may leave at an earlier layer.

A token exits at the first layer whose confidence reaches the policy's threshold. The layers above it did not see it, but
later tokens attend to it there: its keys and values in a skipped layer are projected from the state at which it exited.
This is put off until the layer next runs, when all positions that skipped it are projected in one product with the token
at hand. In a batch, rows that exited, or ended, keep their state and ride along with the others: their keys and values are
then the same projections, so every row decodes as if alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy
from riskcal.records import Traces
from riskcal_adapters import _requests
from riskcal_adapters.torch import weights
from riskcal_adapters.torch.weights import Layer, rms_norm


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
        Confidence at that layer, in [0, 1]; NaN where padded.
    """

    tokens: Tensor
    exit_layers: Tensor
    confidence: Tensor


@dataclass(eq=False)
class _LayerCache:
    """Keys and values of one decoder layer: its own, of ``filled`` positions, and those of the encoded prompt."""

    rows: Tensor  # (T * B, 3h), position by position: what one product writes
    queries: Tensor  # (B, heads, T, d_kv), as are keys and values: views of rows
    keys: Tensor
    values: Tensor
    prompt_keys: Tensor  # (B, heads, S, d_kv)
    prompt_values: Tensor
    filled: int = 0


@dataclass(eq=False)
class _Cache:
    """What a batch's generation remembers; layers are opened when a token first reaches them."""

    memory: Tensor  # (B * S, d), the encoder's normed output
    prompt_bias: Tensor | None  # (B, 1, 1, S), -inf at padding; None without padding
    position_bias: list[Tensor]  # (1, heads, 1, n) for n = 1..T
    batch: int
    length: int
    layers: dict[int, _LayerCache] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)  # (B, d) each: the state at which each position's tokens exited


class EarlyExitT5:
    """A T5 that may stop each token's computation early, at batch sizes from 1.

    Parameters
    ----------
    model : T5ForConditionalGeneration
        T5 v1.0 or v1.1 in any floating type, on one device. It is read once, here, and not modified: the decoder keeps
        rearranged copies of the weights, so make a new one after changing or moving the model. float16 is computed in
        float32 (T5 overflows it), other types as they are; confidences always in float32.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed by `encode` and `decode` only.

    Attributes
    ----------
    model
        The model given.
    n_layers : int
        Decoder layers L; exits are numbered 1..L, and L is the full model.

    Raises
    ------
    RiskcalError
        If the model is no T5, has weights that are not floating-point or are spread over devices, lacks its padding, end
        or start id, or if its generation config asks for anything but greedy decoding.
    """

    def __init__(self, model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if not isinstance(model, T5ForConditionalGeneration):
            raise RiskcalError(f"model: {type(model).__name__} is not a T5ForConditionalGeneration.")
        _requests.greedy_only(model.generation_config)
        self.model = model
        self.tokenizer = tokenizer
        self.n_layers: int = model.config.num_decoder_layers
        self._special = _requests.special_tokens(model.generation_config)
        self._device = weights.device(model)
        dtype = weights.compute_dtype(model)
        self._embedding = model.shared.weight.detach().to(dtype)
        self._encoder, self._decoder = weights.layers(model, dtype)
        self._head = weights.head(model, dtype)
        self._norm_offset = weights.norm_offset(model, dtype)
        self._activation = weights.activation(model)
        self._gated: bool = model.config.is_gated_act
        self._heads: int = model.config.num_heads
        self._encoder_bias = weights.PositionBias(model.encoder, dtype)
        self._decoder_bias = weights.PositionBias(model.decoder, dtype)
        self._last_thresholds: tuple[Any, ...] = (None, 0, None, None)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        policy: ExitPolicy | Sequence[ExitPolicy] = ExitPolicy.full_model(),
        max_new_tokens: int | None = None,
    ) -> Generation:
        """Decode greedily; each token exits as its row's policy says.

        Parameters
        ----------
        input_ids : (B, S) int
            Prompts, padded on either side.
        attention_mask : (B, S), optional
            1 for real tokens, 0 for padding. Default: all are real, as in Hugging Face's ``generate``.
        policy : ExitPolicy or sequence of B of them
            Default: the full model, whose tokens are those of ``model.generate(do_sample=False, num_beams=1)``.
        max_new_tokens : int, optional
            Length limit. Default: the one the policy was calibrated with, else 64.

        Returns
        -------
        Generation
            Every row as if it had been generated alone.

        Raises
        ------
        RiskcalError
            Naming the argument and the first offending row: for empty or wholly masked prompts, shapes that do not fit,
            ids out of the vocabulary, an unknown measure, policies for other layers, another number of prompts, or
            another ``max_new_tokens``.
        """
        tokens, mask = self._checked(input_ids, attention_mask)
        batch = len(tokens)
        thresholds = self._thresholds(policy, batch, max_new_tokens)
        steps = []
        with torch.inference_mode():
            cache = self._start(tokens, mask, len(thresholds))
            chosen = [self._special.start] * batch
            going = list(range(batch))
            for needed in thresholds:
                step = self._step(cache, chosen, going, needed.tolist())
                steps.append(step)
                chosen = step[0]
                going = [row for row in going if chosen[row] not in self._special.ends]
                if not going:
                    break
        chosen, exits, confidence = zip(*steps, strict=True)
        return Generation(
            tokens=self._tensor(np.array(chosen).T),
            exit_layers=self._tensor(np.array(exits).T),
            confidence=self._tensor(np.array(confidence, dtype=np.float32).T),
        )

    def trace(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = _requests.DEFAULT_LENGTH,
        prompts: ArrayLike | None = None,
    ) -> Traces:
        """Every layer's confidence along the full model's own path, and whether its token is the full model's.

        Parameters
        ----------
        input_ids, attention_mask : (B, S)
            As in `generate`.
        max_new_tokens : int
            Length limit.
        prompts : (B,) array_like, optional
            Ids of the prompts. Default: 0 to B - 1.

        Returns
        -------
        riskcal.Traces
            One row per generated token, the end token included.
        """
        tokens, mask = self._checked(input_ids, attention_mask)
        batch = len(tokens)
        limit = _requests.length(max_new_tokens, [])
        ids = _requests.prompt_ids(prompts, batch)
        rows, positions, confidence, agrees = [], [], [], []
        with torch.inference_mode():
            cache = self._start(tokens, mask, limit)
            chosen = [self._special.start] * batch
            going = list(range(batch))
            for position in range(limit):
                margins, best = self._all_exits(cache, chosen)
                chosen = best[:, -1].tolist()
                rows += going
                positions += [position] * len(going)
                confidence.append(margins[going])
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
        encoded = self._need_tokenizer()(list(texts), padding=True, return_tensors="pt")
        return encoded["input_ids"].to(self._device), encoded["attention_mask"].to(self._device)

    def decode(self, tokens: Tensor) -> list[str]:
        """One text per row of token ids (B, T), without special tokens."""
        return self._need_tokenizer().batch_decode(tokens, skip_special_tokens=True)

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RiskcalError("tokenizer: none was given; make the decoder with EarlyExitT5(model, tokenizer).")
        return self.tokenizer

    def _checked(self, input_ids: Any, attention_mask: Any) -> tuple[Tensor, NDArray[np.bool_]]:
        tokens = _given(input_ids, "input_ids")
        given = None if attention_mask is None else _given(attention_mask, "attention_mask").cpu().numpy()
        mask = _requests.prompt_mask(tokens.cpu().numpy(), given, self._special, len(self._embedding))
        return tokens.to(self._device, torch.long), mask

    def _thresholds(
        self, policy: ExitPolicy | Sequence[ExitPolicy], batch: int, max_new_tokens: int | None
    ) -> NDArray[np.float32]:
        """(T, L, B): the confidence needed to exit; T is the length limit."""
        # One policy serves many prompts, and none ever changes: the last one's table is kept.
        known, *size, table = self._last_thresholds
        if known is policy and size == [batch, max_new_tokens]:
            return table
        asked = _requests.policies(policy, batch)
        limit = _requests.length(max_new_tokens, asked)
        table = _requests.exit_thresholds(asked, batch, self.n_layers, limit)
        if isinstance(policy, ExitPolicy):
            self._last_thresholds = policy, batch, max_new_tokens, table
        return table

    def _start(self, tokens: Tensor, mask: NDArray[np.bool_], length: int) -> _Cache:
        """Encode the prompts."""
        batch, width = tokens.shape
        bias = self._encoder_bias.square(width)
        prompt_bias = None
        if not mask.all():
            additive = np.where(mask, 0.0, -math.inf)[:, None, None, :]
            prompt_bias = torch.as_tensor(additive, dtype=bias.dtype, device=self._device)
            bias = bias + prompt_bias
        state = self._embedding.index_select(0, tokens.flatten())
        for layer in self._encoder:
            projected = torch.mm(rms_norm(state, self._norm_offset), layer.self_in)
            queries, keys, values = self._split_heads(projected, batch, 3).unbind(0)
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
            state = torch.addmm(state, attended.transpose(1, 2).reshape(len(state), -1), layer.self_out)
            state = self._feed_forward(layer, state)
        return _Cache(rms_norm(state, self._norm_offset), prompt_bias, self._decoder_bias.rows(length), batch, length)

    def _step(
        self, cache: _Cache, previous: list[int], going: list[int], thresholds: list[list[float]]
    ) -> tuple[list[int], list[int], list[float]]:
        """The next token of each row, the layer at which it exited and its confidence there.

        ``going`` are the rows that have not ended (the others get padding), ``thresholds`` (L, B) the confidence needed.
        """
        chosen, exits, confidence = [self._special.pad] * cache.batch, [0] * cache.batch, [math.nan] * cache.batch
        state = self._embed(previous)
        active, moving = going, self._column(going, cache)
        for index, needed in enumerate(thresholds):
            deeper = self._layer(index, state, cache)
            state = deeper if moving is None else torch.where(moving, deeper, state)
            last = index == self.n_layers - 1
            if not last and all(needed[row] == math.inf for row in active):
                continue
            logits = self._logits(state)
            margins = _margins(logits).tolist()
            leaving = active if last else [row for row in active if margins[row] >= needed[row]]
            if leaving:
                best = logits.argmax(-1).tolist()
                for row in leaving:
                    chosen[row], exits[row], confidence[row] = best[row], index + 1, margins[row]
                active = [row for row in active if not exits[row]]
                if not active:
                    break
                moving = self._column(active, cache)
        cache.states.append(state)
        return chosen, exits, confidence

    def _all_exits(self, cache: _Cache, previous: list[int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Confidence and token (B, L) at every layer, of a step that skips none."""
        state = self._embed(previous)
        margins, best = [], []
        for index in range(self.n_layers):
            state = self._layer(index, state, cache)
            logits = self._logits(state)
            margins.append(_margins(logits))
            best.append(logits.argmax(-1).cpu().numpy())
        cache.states.append(state)
        return np.stack(margins, axis=1), np.stack(best, axis=1)

    def _layer(self, index: int, state: Tensor, cache: _Cache) -> Tensor:
        """One decoder layer for the position at hand, (B, d) to (B, d); first catches up on positions that skipped it."""
        layer = self._decoder[index]
        own = cache.layers.get(index) or self._open(index, cache)
        batch, position = cache.batch, len(cache.states)
        skipped = cache.states[own.filled :]
        entering = torch.cat([*skipped, state]) if skipped else state
        slots = own.rows[own.filled * batch : (position + 1) * batch]
        torch.mm(rms_norm(entering, self._norm_offset), layer.self_in, out=slots)
        own.filled = position + 1
        attended = scaled_dot_product_attention(
            own.queries.narrow(2, position, 1),
            own.keys.narrow(2, 0, position + 1),
            own.values.narrow(2, 0, position + 1),
            attn_mask=cache.position_bias[position],
            scale=1.0,
        )
        state = torch.addmm(state, attended.flatten(1), layer.self_out)
        query = torch.mm(rms_norm(state, self._norm_offset), layer.cross_query).view(batch, self._heads, 1, -1)
        attended = scaled_dot_product_attention(
            query, own.prompt_keys, own.prompt_values, attn_mask=cache.prompt_bias, scale=1.0
        )
        state = torch.addmm(state, attended.flatten(1), layer.cross_out)
        return self._feed_forward(layer, state)

    def _open(self, index: int, cache: _Cache) -> _LayerCache:
        """Memory for a layer's keys and values, and the prompt's projected for it."""
        layer = self._decoder[index]
        rows = cache.memory.new_empty(cache.length * cache.batch, layer.self_in.shape[1])
        own = rows.view(cache.length, cache.batch, 3, self._heads, -1).permute(2, 1, 3, 0, 4).unbind(0)
        prompt = self._split_heads(torch.mm(cache.memory, layer.cross_memory), cache.batch, 2).unbind(0)
        cache.layers[index] = _LayerCache(rows, *own, *prompt)
        return cache.layers[index]

    def _feed_forward(self, layer: Layer, state: Tensor) -> Tensor:
        hidden = torch.mm(rms_norm(state, self._norm_offset), layer.ff_in)
        if self._gated:
            gate, linear = hidden.chunk(2, -1)
            hidden = self._activation(gate) * linear
        else:
            hidden = self._activation(hidden)
        return torch.addmm(state, hidden, layer.ff_out)

    def _logits(self, state: Tensor) -> Tensor:
        return torch.mm(rms_norm(state, self._norm_offset), self._head)

    def _embed(self, tokens: list[int]) -> Tensor:
        return self._embedding.index_select(0, self._tensor(np.array(tokens)))

    def _tensor(self, values: NDArray[Any]) -> Tensor:
        # by way of numpy: torch reads lists slowly
        return torch.from_numpy(values).to(self._device)

    def _split_heads(self, projected: Tensor, batch: int, parts: int) -> Tensor:
        """(B * S, parts * h) to (parts, B, heads, S, d_kv)."""
        width = projected.shape[1] // (parts * self._heads)
        return projected.view(batch, -1, parts, self._heads, width).permute(2, 0, 3, 1, 4)

    def _column(self, rows: list[int], cache: _Cache) -> Tensor | None:
        """(B, 1), true at these rows; None if these are all."""
        if len(rows) == cache.batch:
            return None
        chosen = np.zeros((cache.batch, 1), dtype=bool)
        chosen[rows] = True
        return self._tensor(chosen)


def _given(values: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RiskcalError(f"{name}: not an array of numbers ({error}); give (B, S), padded to one length.") from None


def _margins(logits: Tensor) -> NDArray[np.float32]:
    """The softmax measure, (B, V) to (B,): how far the most probable token is ahead of the next. One wait for the device."""
    top = torch.softmax(logits, -1, dtype=torch.float32).topk(2).values.cpu().numpy()
    return top[:, 0] - top[:, 1]
