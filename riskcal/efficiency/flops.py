"""Decoder FLOPs of recorded exits and of the full model, with what deciding on an exit costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.efficiency.heads import rows_of
from riskcal.efficiency.layers import Integers, exit_array

#: What deciding on an exit costs: nothing to speak of, a linear classifier, or the language-model head.
PREDICTORS = ("none", "classifier", "head")


@dataclass(frozen=True)
class DecoderDimensions:
    """The sizes of an encoder-decoder model's decoder on which its FLOPs depend.

    Parameters
    ----------
    d_model, d_ff : int
        Width d of the states, and f of the feed-forward layers.
    vocabulary : int
        V, rows of the head.
    n_layers : int
        L.
    d_attention : int, optional
        Heads times width per head. Default: d, as in the formula's source; T5 v1.1 small has 384 with d = 512.
    d_encoder : int, optional
        Width of the encoder's states. Default: d.
    gated : bool
        Whether the feed-forward layers have three matrices (T5 v1.1) instead of two.

    Examples
    --------
    >>> t5_small = riskcal.efficiency.DecoderDimensions(
    ...     d_model=512, d_ff=1024, vocabulary=32_128, n_layers=8, d_attention=384, gated=True
    ... )
    >>> riskcal.efficiency.decoder_flops([[8, 8]], t5_small, source_lengths=100, predictor="none").full.tolist()
    [785518592]
    """

    d_model: int
    d_ff: int
    vocabulary: int
    n_layers: int
    d_attention: int | None = None
    d_encoder: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "vocabulary", "n_layers"):
            _validate.count(getattr(self, name), name, least=1)
        for name in ("d_attention", "d_encoder"):
            if getattr(self, name) is not None:
                _validate.count(getattr(self, name), name, least=1)

    @classmethod
    def from_config(cls, config: Any) -> DecoderDimensions:
        """Of a model described as Hugging Face describes a T5.

        Parameters
        ----------
        config : object
            With ``d_model``, ``d_ff``, ``vocab_size``, ``num_heads``, ``d_kv`` and ``num_decoder_layers``, and optionally
            ``is_gated_act``: a ``T5Config``, or anything like it.

        Raises
        ------
        RiskcalError
            If one of these is missing.
        """
        names = ("d_model", "d_ff", "vocab_size", "num_decoder_layers", "num_heads", "d_kv")
        missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
        if missing:
            raise RiskcalError(
                f"config: has no whole number {missing[0]}; give the configuration of a T5, or DecoderDimensions(...) itself."
            )
        return cls(
            d_model=config.d_model,
            d_ff=config.d_ff,
            vocabulary=config.vocab_size,
            n_layers=config.num_decoder_layers,
            d_attention=config.num_heads * config.d_kv,
            gated=bool(getattr(config, "is_gated_act", False)),
        )

    @property
    def attention(self) -> int:
        """Heads times width per head."""
        return self.d_model if self.d_attention is None else self.d_attention

    @property
    def cross_projection(self) -> int:
        """FLOPs per prompt token of a layer's first call: keys and values of the encoder's states."""
        return 4 * self.attention * (self.d_model if self.d_encoder is None else self.d_encoder)


@dataclass(frozen=True, eq=False)
class Flops:
    """Decoder FLOPs of generated prompts.

    Attributes
    ----------
    adaptive, full : (B,) int
        With the recorded exits, and of the full model on outputs of the same length.
    tokens : (B,) int
        Generated tokens.

    Examples
    --------
    >>> dimensions = riskcal.efficiency.DecoderDimensions(d_model=512, d_ff=2048, vocabulary=32_128, n_layers=6)
    >>> flops = riskcal.efficiency.decoder_flops([[1, 1, 0], [1, 6, 2]], dimensions, 100, predictor="none")
    >>> flops.tokens.tolist(), (flops.adaptive < flops.full).tolist()
    ([2, 3], [True, True])
    """

    adaptive: Integers
    full: Integers
    tokens: Integers

    @property
    def per_token(self) -> float:
        """FLOPs per generated token, over all tokens."""
        return int(self.adaptive.sum()) / int(self.tokens.sum())

    @property
    def full_per_token(self) -> float:
        """The full model's FLOPs per generated token."""
        return int(self.full.sum()) / int(self.tokens.sum())

    @property
    def ratio(self) -> float:
        """How many times the exits' FLOPs the full model needs: above 1, exits save."""
        return int(self.full.sum()) / int(self.adaptive.sum())


def token_flops(
    dimensions: DecoderDimensions,
    position: int,
    source_length: int,
    *,
    predictor: str = "head",
    head_sizes: ArrayLike | None = None,
    min_layer: int = 1,
) -> Integers:
    """FLOPs of one token, for each layer at which it may exit; the first calls of layers are left out.

    Parameters
    ----------
    dimensions : DecoderDimensions
    position : int
        t, from 1: the token attends to itself and to the t - 1 generated before it.
    source_length : int
        Tokens of the prompt.
    predictor, head_sizes, min_layer
        As in `decoder_flops`, ``head_sizes`` (L,).

    Returns
    -------
    (L,) int
        Entry q - 1 for an exit at layer q; 0 below ``min_layer``, where none exits.

    Examples
    --------
    >>> dimensions = riskcal.efficiency.DecoderDimensions(d_model=512, d_ff=2048, vocabulary=32_128, n_layers=6)
    >>> cost = riskcal.efficiency.token_flops(dimensions, position=10, source_length=100, predictor="classifier")
    >>> (cost / cost[-1]).round(2).tolist()
    [0.58, 0.67, 0.75, 0.83, 0.92, 1.0]
    """
    _refuse_other(dimensions)
    layers = _validate.count(min_layer, "min_layer", least=1)
    exits = np.arange(1, dimensions.n_layers + 1)
    t = _validate.count(position, "position", least=1)
    x = _validate.count(source_length, "source_length", least=1)
    heads = _head_flops(exits[:, None], dimensions, predictor, head_sizes, layers)[:, 0]
    return np.where(exits < layers, 0, _layer_flops(exits, t, x, dimensions) + heads)


def _refuse_other(dimensions: Any) -> None:
    if not isinstance(dimensions, DecoderDimensions):
        raise RiskcalError(
            f"dimensions: {_validate.shown(dimensions)} are none; give DecoderDimensions(...), or DecoderDimensions.from_config."
        )


def decoder_flops(
    exit_layers: ArrayLike,
    dimensions: DecoderDimensions,
    source_lengths: ArrayLike,
    *,
    predictor: str = "head",
    head_sizes: ArrayLike | None = None,
    min_layer: int = 1,
) -> Flops:
    """FLOPs of the decoder under the recorded exits, and of the full model.

    Parameters
    ----------
    exit_layers : (B, T) int
    dimensions : DecoderDimensions
    source_lengths : int or (B,) int
        Tokens of each prompt, padding not counted.
    predictor : {"head", "classifier", "none"}
        What decides on an exit, from ``min_layer`` up to the exit. ``"head"``: the language-model head at each of these
        layers (softmax margin, largest probability, entropy), which the emitted token then has for free. ``"classifier"``:
        one linear unit, 2d a layer (t5x computes two logits for it, 4d), and one head for the token. ``"none"``: one head
        for the token only (full model, static exits, state similarity; an oracle costs nothing by convention).
    head_sizes : (L,) or (B, T, L) int, optional
        Rows of the head that are multiplied at each layer, with ``predictor="head"``: `head_sizes` makes them from a
        `riskcal.Pruning`. 0 where the head is not called. Default: V from ``min_layer`` on.
    min_layer : int
        No token exits before it.

    Returns
    -------
    Flops

    Raises
    ------
    RiskcalError
        For exit layers that are not whole numbers in 1..L followed by zeros, that lie below ``min_layer``, or at which no
        head is called; lengths that do not fit; unknown predictors; head sizes without a head.

    Notes
    -----
    With d = d_model, a = d_attention, f = d_ff, t the position and x the prompt's tokens, a layer costs
    ``12da + 4fd + 4ta + 4xa`` (gated: 6fd), a skipped one ``4da`` for its keys and values, and a layer's first call in a
    prompt ``4 x d_encoder a`` for those of the encoder's states; a layer that no token of the prompt reaches never pays
    that. With d = a this is Elbayad et al., Depth-Adaptive Transformer (2020), appendix B. A multiplication and an addition
    count as two; norms, biases, the softmax and embeddings are not counted, as there.

    Examples
    --------
    >>> dimensions = riskcal.efficiency.DecoderDimensions(d_model=512, d_ff=2048, vocabulary=32_128, n_layers=6)
    >>> for predictor in ("classifier", "head"):  # what deciding costs: heads of a large vocabulary eat the gain
    ...     flops = riskcal.efficiency.decoder_flops([[2, 1, 6]], dimensions, source_lengths=100, predictor=predictor)
    ...     print(predictor, (flops.adaptive / flops.full).round(2).tolist())
    classifier [0.93]
    head [1.16]
    """
    _refuse_other(dimensions)
    exits = exit_array(exit_layers, dimensions.n_layers)
    least = _validate.count(min_layer, "min_layer", least=1)
    early = (exits > 0) & (exits < least)
    if early.any():
        raise RiskcalError(
            f"exit_layers: {exits[early][0]} at index {_validate.first(early)} is below min_layer {least}; give the "
            "min_layer of the run."
        )
    batch, length = exits.shape
    source = _source_lengths(source_lengths, batch)
    present = exits > 0
    positions = np.arange(1, length + 1)[None, :]
    layers = _layer_flops(exits, positions, source[:, None], dimensions)
    heads = _head_flops(exits, dimensions, predictor, head_sizes, least)
    opened = dimensions.cross_projection * source
    depth = dimensions.n_layers
    whole = _layer_flops(np.full_like(exits, depth), positions, source[:, None], dimensions)
    whole = whole + 2 * dimensions.vocabulary * dimensions.d_model
    return Flops(
        adaptive=np.where(present, layers + heads, 0).sum(1) + opened * exits.max(1),
        full=np.where(present, whole, 0).sum(1) + opened * depth,
        tokens=np.count_nonzero(present, axis=1).astype(np.int64),
    )


def _source_lengths(given: ArrayLike, batch: int) -> Integers:
    values = _validate.array(given, "source_lengths", ndim=(0, 1))
    lengths = values.astype(np.int64)
    bad = np.atleast_1d((lengths != values) | (lengths < 1))
    if bad.any():
        value = np.atleast_1d(values)[bad][0]
        raise RiskcalError(
            f"source_lengths: {value:g} at index {_validate.first(bad)}; give whole numbers of prompt tokens."
        )
    if lengths.ndim and lengths.size != batch:
        raise RiskcalError(
            f"source_lengths: {lengths.size} given for {batch} prompts; give one, or one per prompt."
        )
    return np.broadcast_to(lengths, (batch,))


def _layer_flops(
    exits: Integers, position: Any, source: Any, dimensions: DecoderDimensions
) -> Integers:
    """Of the layers up to the exit, and of the keys and values of those above."""
    d, a = dimensions.d_model, dimensions.attention
    feed_forward = (6 if dimensions.gated else 4) * dimensions.d_ff * d
    layer = 12 * d * a + feed_forward + 4 * position * a + 4 * source * a
    total: Integers = exits * layer + (dimensions.n_layers - exits) * 4 * d * a
    return total


def _head_flops(
    exits: Integers,
    dimensions: DecoderDimensions,
    predictor: str,
    sizes: ArrayLike | None,
    min_layer: int,
) -> Integers:
    """Of deciding at each layer up to the exit, and of the emitted token's head."""
    d, V = dimensions.d_model, dimensions.vocabulary
    _validate.choice(predictor, "predictor", PREDICTORS)
    if min_layer > dimensions.n_layers:
        raise RiskcalError(
            f"min_layer: {min_layer} is not one of the {dimensions.n_layers} layers."
        )
    tested = exits - min_layer + 1
    if predictor != "head":
        if sizes is not None:
            raise RiskcalError(
                f"head_sizes: means nothing to predictor {predictor!r}; leave it out."
            )
        return 2 * V * d + (2 * d * tested if predictor == "classifier" else np.zeros_like(exits))
    if sizes is None:
        return 2 * V * d * tested
    rows = rows_of(sizes, exits, V)
    at_exit = np.maximum(exits - 1, 0)[..., None]
    unseen = (
        (exits > 0) & (exits >= min_layer) & (np.take_along_axis(rows, at_exit, -1)[..., 0] == 0)
    )
    if unseen.any():
        where = _validate.first(unseen)
        raise RiskcalError(
            f"head_sizes: 0 at the exit of the token at {where}; its head must have looked at some rows."
        )
    multiplied: Integers = np.take_along_axis(np.cumsum(rows, axis=-1), at_exit, -1)[..., 0]
    return 2 * d * multiplied
