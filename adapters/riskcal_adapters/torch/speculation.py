"""Self-speculative decoding: the first layers draft tokens, the others verify them all at once; the full model's tokens.

A drafted token's states stay at the draft layer, as those of a token that exited there. Its verification is what makes up for
skipped layers with exact caches (`Backbone.layer_exact`): the remaining layers run for all drafted positions together with the
one at hand. So nothing that a draft computed is computed again, and what verification finds wrong is forgotten. After
Elhoushi et al., *LayerSkip* (2024), section 4.3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from riskcal import RiskcalError, internal
from riskcal.policy import Sampling
from riskcal_adapters.generation_config import SpecialTokens
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.caches import Cache
from riskcal_adapters.torch.measures import softmax_margin
from riskcal_adapters.torch.sampling import draw
from riskcal_adapters.torch.scores import Scores

LONGEST = 16  # of adaptive drafts
#: What adaptive drafts believe before the first: as if four of five drafted tokens had been accepted.
PRIOR = (4, 5)

#: Tokens of successive positions, given their scores (m, V) and the first position.
Choice = Callable[[Scores, int], list[int]]


@dataclass(frozen=True, eq=False)
class Speculation:
    """What was generated for B prompts, and what drafting it took.

    A row has as many tokens as were accepted, and one more for each verification.

    Attributes
    ----------
    tokens : (B, T) int64
        Token ids, the end token included, the padding id after it: those of the decoder's `generate` without early exits.
    drafted, accepted : (B,) int64
        Tokens that the early layers proposed, and those of them that the full model would have chosen as well.
    verifications : (B,) int64
        Passes through the layers above the draft layer.

    Examples
    --------
    >>> import torch
    >>> from riskcal_adapters.torch import load_example
    >>> decoder = load_example("g2p")
    >>> inputs = decoder.encode(["guarantee"])
    >>> speculation = decoder.speculate(*inputs, draft_layer=2)
    >>> torch.equal(speculation.tokens, decoder.generate(*inputs).tokens)  # the full model's tokens
    True
    >>> (speculation.accepted <= speculation.drafted).all().item()
    True
    """

    tokens: Tensor
    drafted: Tensor
    accepted: Tensor
    verifications: Tensor

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens over drafted ones, of all rows together; NaN where none was drafted."""
        drafted = int(self.drafted.sum())
        return int(self.accepted.sum()) / drafted if drafted else math.nan

    @property
    def tokens_per_verification(self) -> float:
        """Generated tokens over verifications, of all rows together; 1 where no draft was accepted."""
        return 1 + int(self.accepted.sum()) / int(self.verifications.sum())


@dataclass(frozen=True)
class Drafting:
    """How tokens are drafted.

    Parameters
    ----------
    layer : int
        Layers 1 to this one draft; below L.
    length : int, optional
        Tokens drafted at most before each verification. None: as many as `best_length` expects most of.
    confidence : float
        A draft stops where the draft layer's softmax margin is below it.
    """

    layer: int
    length: int | None
    confidence: float

    @classmethod
    def checked(cls, layer: Any, length: Any, confidence: Any, n_layers: int) -> "Drafting":
        """Of the arguments of `Decoder.speculate`."""
        internal.count(layer, "draft_layer", least=1)
        if layer >= n_layers:
            raise RiskcalError(
                f"draft_layer: {layer}, but the model has {n_layers} layers; leave some to verify with."
            )
        if length != "adaptive":
            if isinstance(length, str):
                raise RiskcalError(
                    f"draft_length: {length!r}; give a number of tokens, or 'adaptive'."
                )
            internal.count(length, "draft_length", least=1)
        least = 0.0 if confidence is None else internal.number(confidence, "draft_confidence")
        if not 0 <= least <= 1:
            raise RiskcalError(
                f"draft_confidence: {least:g} is no softmax margin; give a number in [0, 1], or None."
            )
        return cls(layer, None if length == "adaptive" else length, least)


@dataclass(eq=False)
class Row:
    """One prompt's generation."""

    tokens: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    rejections: int = 0
    verifications: int = 0

    @property
    def acceptance(self) -> float:
        """Estimated probability that the next drafted token is accepted.

        What follows a rejected token was drafted on a wrong premise and does not count.
        """
        accepted, judged = PRIOR
        return (accepted + self.accepted) / (judged + self.accepted + self.rejections)


def best_length(acceptance: float, layer: int, n_layers: int) -> int:
    """Draft length m, at most 16, at which the expected number of tokens per layer run in turn is largest.

    A verification yields ``1 + a + ... + a^m`` tokens if each drafted token is accepted with probability a (Leviathan et al.,
    *Fast Inference from Transformers via Speculative Decoding*, 2023, Eq. 1) and takes ``m * E + L`` layers: E for each draft,
    and all L for the position that ends it, the others riding along. 0 where no draft is worth its layers.
    """
    lengths = np.arange(LONGEST + 1)
    return int((np.cumsum(acceptance**lengths) / (lengths * layer + n_layers)).argmax())


def choice(sampling: Sampling | None, key: int, vocabulary: int) -> Choice:
    """The likeliest tokens, or those that the noise of the prompt with this key draws.

    Drafts and verifications add the *same* noise to their log probabilities, which is that of `Decoder.generate`. So a
    verified token has the full model's law whatever was drafted, and is even the one that is drawn without speculation.
    """
    if sampling is None:
        return lambda scores, position: scores.best().tolist()

    def drawn(scores: Scores, position: int) -> list[int]:
        return [
            draw(scores, [i], [key], position + i, sampling, vocabulary)[0]
            for i in range(scores.logits.shape[0])
        ]

    return drawn


def speculate(
    backbone: Backbone,
    prompt: Tensor,
    drafting: Drafting,
    choose: Choice,
    special: SpecialTokens,
    limit: int,
) -> Row:
    """Generate for one prompt (1, S) without padding; at most ``limit`` tokens."""
    cache = backbone.start(prompt, np.ones(prompt.shape, dtype=bool), limit)
    row, token = Row(), cache.first[0]
    while len(row.tokens) < limit and not (row.tokens and token in special.ends):
        most = drafting.length
        if most is None:
            most = best_length(row.acceptance, drafting.layer, backbone.n_layers)
        # the position at hand is verified too and yields a token, so that drafts never reach the limit
        most = min(most, limit - len(row.tokens) - 1)
        drafted, state = _draft(backbone, cache, token, drafting, most, choose, special)
        chosen = _verify(backbone, cache, drafted, state, drafting.layer, choose)
        token = chosen[-1]
        row.tokens += chosen
        row.drafted += len(drafted)
        row.accepted += len(chosen) - 1
        row.rejections += len(chosen) <= len(drafted)
        row.verifications += 1
    return row


def together(rows: list[Row], pad: int, as_tensor: Callable[[Any], Tensor]) -> Speculation:
    """The generations of a batch's rows."""
    tokens = np.full((len(rows), max(len(row.tokens) for row in rows)), pad)
    for own, row in zip(tokens, rows, strict=True):
        own[: len(row.tokens)] = row.tokens
    counts = np.array([(row.drafted, row.accepted, row.verifications) for row in rows])
    return Speculation(as_tensor(tokens), *as_tensor(counts).unbind(1))


def _draft(
    backbone: Backbone,
    cache: Cache,
    token: int,
    drafting: Drafting,
    most: int,
    choose: Choice,
    special: SpecialTokens,
) -> tuple[list[int], Tensor]:
    """Up to ``most`` tokens after this one, and the draft layer's state (1, d) of the position that ended the draft.

    A position at which the draft layer is unsure or says that the text ends is left to the full model: the token that it
    drafts would end the draft anyway.
    """
    drafted: list[int] = []
    while True:
        state = backbone.embed([token], cache)
        for index in range(drafting.layer):
            state = backbone.layer(index, state, cache)
        if len(drafted) == most:
            return drafted, state
        scores = backbone.scores(drafting.layer, state)
        if drafting.confidence > 0 and not softmax_margin(scores.logits)[0] >= drafting.confidence:
            return drafted, state
        [token] = choose(scores, cache.position)
        if token in special.ends:
            return drafted, state
        drafted.append(token)
        cache.append(state)


def _verify(
    backbone: Backbone, cache: Cache, drafted: list[int], state: Tensor, layer: int, choose: Choice
) -> list[int]:
    """The full model's tokens up to the first that was not drafted; the cache keeps the positions that they follow."""
    first = cache.position - len(drafted)
    for index in range(layer, backbone.n_layers):
        state = backbone.layer_exact(index, state, cache)
    cache.append(state)
    verified = cache.states[first : cache.position].flatten(0, 1)
    chosen = choose(Scores(backbone.logits(verified)), first)
    wrong = [i for i, (mine, its) in enumerate(zip(drafted, chosen, strict=False)) if mine != its]
    chosen = chosen[: wrong[0] + 1] if wrong else chosen
    cache.rewind(first + len(chosen))
    return chosen
