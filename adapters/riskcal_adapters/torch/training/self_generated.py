"""Text that a causal language model generates itself from starting prompts: data that exit heads learn from (Valade 2024)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from riskcal import RiskcalError, internal

#: Continues (B, S) ids under a (B, S) mask by at most so many tokens, at a temperature, with a seed: (B, <= tokens).
Sampler = Callable[[Tensor, Tensor, int, float, int], Tensor]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Prompts with what the model said to them.

    Attributes
    ----------
    ids : tuple of S (T_s,) int64 arrays
        The prompt, then generated tokens, the end token included where it was said.
    starts : (S,) int64
        Where the generated tokens begin.
    prompts : (S,) int64
        Which prompt each sequence began with, by its place in the list given.

    Examples
    --------
    >>> from riskcal_adapters.torch.training import Sequences
    >>> ids = (np.array([5, 8, 2]), np.array([9, 33, 7, 7]))
    >>> sequences = Sequences(ids, starts=np.array([1, 2]), prompts=np.array([0, 1]))
    >>> sequences.generated
    4
    >>> rest, held = sequences.split(0.5)  # no prompt is on both sides
    >>> len(rest.ids), len(held.ids)
    (1, 1)
    """

    ids: tuple[NDArray[np.int64], ...]
    starts: NDArray[np.int64]
    prompts: NDArray[np.int64]

    def refuse_none(self) -> None:
        """Refuse to go on without any."""
        if not self.ids:
            raise RiskcalError("sequences: there is none; generate some.")

    @property
    def generated(self) -> int:
        """Tokens that were generated."""
        return sum(map(len, self.ids)) - int(self.starts.sum())

    def split(self, share: float = 0.25, seed: int = 0) -> tuple["Sequences", "Sequences"]:
        """Most sequences, and those of a share of the prompts: no prompt is in both.

        Tokens of one generation, and generations from one prompt, depend on each other; what was learned on some of them is
        measured on others only if whole prompts stand apart.
        """
        internal.level(share, "share")
        there = np.unique(self.prompts)
        held = round(share * len(there))
        if not 0 < held < len(there):
            raise RiskcalError(
                f"share: {share:g} of {len(there)} prompts leaves {held} on one side; generate from more prompts."
            )
        drawn = np.random.default_rng(seed).permutation(there)[:held]
        apart = np.isin(self.prompts, drawn)
        return self._only(~apart), self._only(apart)

    def _only(self, kept: NDArray[np.bool_]) -> "Sequences":
        ids = tuple(one for one, is_kept in zip(self.ids, kept, strict=True) if is_kept)
        return Sequences(ids, self.starts[kept], self.prompts[kept])


def self_generate(
    model: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    tokens: int = 20_000,
    window: int = 512,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Sequences:
    """Let a model continue starting prompts, each about as far, by drawing from all of its distribution.

    Parameters
    ----------
    model : PreTrainedModel or decoder
        A causal language model, or a decoder with ``model`` and ``tokenizer``.
    prompts : sequence of str or of sequences of int
        Texts, which take a tokenizer, or token ids.
    tokens : int
        To generate in all. Prompts whose text ended early are continued anew, with another draw.
    window : int
        Tokens that a sequence has at most, its prompt included.
    temperature : float
        Of the draws; 0 takes the likeliest token, and then a prompt has one continuation only, so that fewer than ``tokens``
        may come.
    seed : int
        The same seed gives the same text on the same machine.
    batch : int
        Prompts that are continued together.
    tokenizer : PreTrainedTokenizerBase, optional
        For texts, if ``model`` is no decoder that has one.

    Returns
    -------
    Sequences

    Raises
    ------
    RiskcalError
        If there is no prompt, or one is empty, fills the window, or holds ids that are not in the vocabulary.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from riskcal_adapters.torch import training
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    ... )).eval()
    >>> sequences = training.self_generate(model, [[5], [9, 33, 7]], tokens=40, window=24)
    >>> sequences.generated, max(map(len, sequences.ids)) <= 24
    (40, True)
    """
    for count, name in ((tokens, "tokens"), (window, "window"), (batch, "batch")):
        internal.count(count, name, least=1)
    if not internal.number(temperature, "temperature") >= 0:
        raise RiskcalError(f"temperature: {temperature:g}; give 0, for the likeliest, or more.")
    whole = causal_lm(model)
    tokenizer = tokenizer or getattr(model, "tokenizer", None)
    given = _prompt_ids(prompts, tokenizer, int(whole.config.vocab_size), window)
    share = -(-tokens // len(given))
    ids: list[NDArray[np.int64]] = []
    of_prompt: list[int] = []
    said = np.zeros(len(given), dtype=np.int64)
    round_ = 0
    while said.sum() < tokens:
        short = np.flatnonzero(said < share)
        for first in range(0, len(short), batch):
            chosen = short[first : first + batch]
            drawn = np.random.SeedSequence([seed, round_, first]).generate_state(1)[0]
            room = [min(window - len(given[i]), share - int(said[i])) for i in chosen]
            continued = _continue(whole, [given[i] for i in chosen], room, temperature, int(drawn))
            for i, new in zip(chosen, continued, strict=True):
                new = new[: max(tokens - int(said.sum()), 0)]
                if len(new):
                    ids.append(np.concatenate([given[i], new]))
                    of_prompt.append(int(i))
                    said[i] += len(new)
        round_ += 1
        if temperature == 0:
            break
    starts = np.array([len(given[i]) for i in of_prompt], dtype=np.int64)
    return Sequences(tuple(ids), starts, np.array(of_prompt, dtype=np.int64))


def causal_lm(model: Any) -> Any:
    """The Hugging Face model itself, of a decoder or as given."""
    whole = model if isinstance(model, PreTrainedModel) else getattr(model, "model", None)
    if not isinstance(whole, PreTrainedModel) or not hasattr(whole, "lm_head"):
        raise RiskcalError(
            f"model: {type(model).__name__} is no causal language model; give a Hugging Face model with a head, such as "
            "LlamaForCausalLM, or a decoder of one."
        )
    return whole


def _prompt_ids(
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
    window: int,
) -> list[NDArray[np.int64]]:
    if not len(prompts):
        raise RiskcalError("prompts: there is none; give at least one.")
    given = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise RiskcalError(
                    f"prompts: the one at row {row} is a text; give tokenizer= as well, or token ids."
                )
            prompt = tokenizer(prompt)["input_ids"]
        ids = np.asarray(prompt, dtype=np.int64)
        foreign = (ids < 0) | (ids >= vocabulary)
        if not ids.size or len(ids) >= window or foreign.any():
            what = (
                f"holds {ids[foreign][0]}, not in the vocabulary of {vocabulary}"
                if foreign.any()
                else f"has {len(ids)} tokens, where window {window} leaves room for 1 to {window - 1}"
            )
            raise RiskcalError(f"prompts: the one at row {row} {what}.")
        given.append(ids)
    return given


def _continue(
    model: Any,
    prompts: list[NDArray[np.int64]],
    room: list[int],
    temperature: float,
    seed: int,
    sample: Sampler | None = None,
) -> list[NDArray[np.int64]]:
    """What follows each prompt, at most ``room`` tokens, up to and with its first end token."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    place = model.device
    sample = sample or hugging_face(model)
    given = torch.from_numpy(ids).to(place), torch.from_numpy(mask).to(place)
    new = sample(*given, max(room), temperature, seed).cpu().numpy()
    ends = _end_ids(model)
    cut = []
    for row, most in zip(new, room, strict=True):
        ended = np.flatnonzero(np.isin(row[:most], ends))
        cut.append(row[: ended[0] + 1] if len(ended) else row[:most])
    return cut


def hugging_face(model: Any) -> Sampler:
    """Hugging Face's own sampling, from the whole distribution, whatever the model's generation config cuts off."""

    @torch.no_grad()
    def sample(ids: Tensor, mask: Tensor, tokens: int, temperature: float, seed: int) -> Tensor:
        ends = _end_ids(model)
        drawn = temperature > 0
        config = GenerationConfig(
            do_sample=drawn,
            max_new_tokens=tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if drawn else {}),
        )
        devices = [] if ids.device.type == "cpu" else [ids.device]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            whole: Tensor = model.generate(ids, attention_mask=mask, generation_config=config)
        return whole[:, ids.shape[1] :]

    return sample


def _end_ids(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        return []
    return [int(one) for one in found] if isinstance(found, list) else [int(found)]
