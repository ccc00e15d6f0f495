"""A T5's weights, rearranged once so that decoding a token takes as few and as small operations as possible.

At batch 1 a CPU spends more time on calling operations than in them. So projections of one input are one product, weights
are stored as ``torch.mm`` reads them fastest, and each norm's gain is multiplied into the weights that follow it.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    MT5ForConditionalGeneration,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)

from riskcal import RiskcalError
from riskcal_adapters.torch.kernels import Floats
from riskcal_adapters.torch.modules import Block, Map, blocks

#: A T5 of any of these classes. mT5 is T5 v1.1; UMT5 has a bias on positions in each layer, where the others share one.
T5 = T5ForConditionalGeneration | MT5ForConditionalGeneration | UMT5ForConditionalGeneration


class Layer(NamedTuple):
    """One block, every matrix (inputs, outputs): d the model's width, h that of all heads together, f the feed-forward's."""

    self_in: Tensor  #: (d, 3h): queries, keys, values
    self_out: Tensor  #: (h, d)
    ff_in: Tensor  #: (d, f), or (d, 2f): gate and linear part
    ff_out: Tensor  #: (f, d)


class CrossAttention(NamedTuple):
    """A decoder layer's attention to the encoded prompt."""

    query: Tensor  #: (d, h)
    memory: Tensor  #: (d, 2h): keys and values, from the encoder's normed output
    out: Tensor  #: (h, d)


Matrices = TypeVar("Matrices", Layer, CrossAttention)


def encoder_layers(model: T5, dtype: torch.dtype) -> Layer:
    """The encoder's layers: each matrix is that of all (L, inputs, outputs), so that a loop over them needs to be given few."""
    return _stacked(model.encoder, lambda block: _self_and_feed_forward(block, dtype))


def decoder_layers(model: T5, dtype: torch.dtype) -> tuple[Layer, CrossAttention]:
    """The decoder's, and between self-attention and feed-forward the attention of each to the prompt."""
    memory_norm = model.encoder.final_layer_norm

    def to_prompt(block: Block) -> CrossAttention:
        cross, norm = block.layer[1].EncDecAttention, block.layer[1].layer_norm
        return CrossAttention(
            query=_after_norm(norm, [cross.q], dtype),
            memory=_after_norm(memory_norm, [cross.k, cross.v], dtype),
            out=_plain(cross.o, dtype),
        )

    own = _stacked(model.decoder, lambda block: _self_and_feed_forward(block, dtype))
    return own, _stacked(model.decoder, to_prompt)


def layer_by_layer(matrices: Matrices) -> list[Matrices]:
    """The matrices of all layers apart, on the same memory."""
    return [type(matrices)._make(of_one) for of_one in zip(*matrices, strict=True)]


def head(model: T5, dtype: torch.dtype) -> Tensor:
    """(d, V): the output projection after the decoder's final norm."""
    scale = model.config.d_model**-0.5 if scales_outputs(model) else 1.0
    return _after_norm(model.decoder.final_layer_norm, [model.lm_head], dtype, scale)


def scales_outputs(model: T5) -> bool:
    """Whether the class divides the head's input by sqrt(d)."""
    if isinstance(model, UMT5ForConditionalGeneration):
        return bool(model.config.tie_word_embeddings)
    return bool(getattr(model.config, "scale_decoder_outputs", False))


def only_t5(model: object) -> T5:
    """The model, unless it is no T5, or of a class that has no place for all position biases of its checkpoint."""
    if not isinstance(model, T5):
        raise RiskcalError(
            f"model: {type(model).__name__} is not a T5ForConditionalGeneration (nor MT5 or UMT5). Take the model out of what "
            "wraps it; adapters are merged first (peft: merge_and_unload())."
        )
    written = getattr(model.config, "architectures", None) or []
    own = isinstance(model, UMT5ForConditionalGeneration)
    foreign = [
        name
        for name in written
        if name.endswith("T5ForConditionalGeneration") and name.startswith("UMT5") != own
    ]
    if foreign:
        raise RiskcalError(
            f"model: {type(model).__name__}, but the checkpoint is of class {foreign[0]}, whose layers "
            f"{'share one bias' if own else 'each have a bias'} on positions; load it with {foreign[0]}.from_pretrained."
        )
    return model


def compute_dtype(model: T5) -> torch.dtype:
    """The widest of the weights' types, and at least bfloat16's range: T5's feed-forward layers overflow float16."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    foreign = [dtype for dtype in dtypes if not dtype.is_floating_point]
    if foreign:
        raise RiskcalError(
            f"model: has weights of type {foreign[0]}; load it with floating-point weights."
        )
    widest = functools.reduce(torch.promote_types, dtypes)
    return torch.float32 if widest is torch.float16 else widest


def device(model: torch.nn.Module) -> torch.device:
    """Where all the weights are."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise RiskcalError(
            f"model: weights on {', '.join(sorted(map(str, devices)))}; load it whole, on one device."
        )
    return devices.pop()


def norm_offset(model: T5, dtype: torch.dtype) -> Tensor:
    """What `rms_norm` needs to know of the model: the square root of ``d * epsilon``, in float32 or wider."""
    value = math.sqrt(model.config.d_model * model.config.layer_norm_epsilon)
    return torch.tensor(value, dtype=torch.promote_types(dtype, torch.float32), device=model.device)


def versions(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    """What changes when a weight is replaced or written to, short of reading them all."""
    named = model.state_dict().items()
    return [
        (name, held.data_ptr(), 0 if held.is_inference() else held._version) for name, held in named
    ]


def rms_norm(state: Tensor, offset: Tensor) -> Tensor:
    """T5's norm without its gain, over ``sqrt(d)``; both are in the weights that follow. Three operations, not nine."""
    length = torch.linalg.vector_norm(state, dim=-1, keepdim=True, dtype=offset.dtype)
    normed = state / torch.hypot(length, offset)
    # asking is dearer than looking
    return normed if normed.dtype == state.dtype else normed.to(state.dtype)


def activation(model: T5) -> Map:
    """The feed-forward layers' nonlinearity, as one operation where there is one."""
    fused: dict[str, Map] = {
        "relu": torch.relu,
        "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    }
    own = blocks(model.decoder)[0].layer[-1].DenseReluDense.act
    return fused.get(model.config.dense_act_fn, own)


#: Entries: attention's kernels read a bias in pieces of 16 bytes, of which none may begin in the middle of another.
ALIGNMENT = 8


def whole_pieces(entries: int) -> int:
    """So many entries, and what fills the last piece."""
    return -(-entries // ALIGNMENT) * ALIGNMENT


class PositionBias:
    """The bias on attention between two positions, by their distance, of a stack's first layer.

    All layers share it in a T5; ``layers`` are those of each layer where they have their own (UMT5), else this one alone.
    Threads may share a decoder, and replace what is kept here: each call reads it once.
    """

    def __init__(self, stack: torch.nn.Module, dtype: torch.dtype, layer: int = 0) -> None:
        own = [block.layer[0].SelfAttention for block in blocks(stack)]
        attention = own[layer]
        # beyond it the bias stays the same
        self._reach: int = attention.relative_attention_max_distance
        with torch.no_grad():
            around = attention.compute_bias(1, 2 * self._reach + 1, past_seen_tokens=self._reach)
        self._by_offset = around[0, :, 0].to(dtype)  # (heads, 2 * reach + 1)
        self._square = self._between(0, 0)
        self._rows: list[Tensor] = []
        # by length, as they are asked for
        self._around: dict[int, Floats] = {}
        self._last: dict[int, Floats] = {}
        others = (
            [i for i, one in enumerate(own) if i and one.has_relative_attention_bias]
            if layer == 0
            else []
        )
        self.layers = [self, *(PositionBias(stack, dtype, i) for i in others)]

    def square(self, length: int) -> Tensor:
        """(1, heads, length, length): of every position to every other. Kept for the longest length asked for."""
        square = self._square
        if square.shape[-1] < length:
            self._square = square = self._between(0, length)
        return square[:, :, :length, :length].contiguous()  # a part's rows may begin anywhere

    def rows(self, length: int) -> list[Tensor]:
        """(1, heads, 1, n) for n = 1 to at least ``length``: of the last of n positions to all of them.

        All begin at an address that attention on a GPU can read (`ALIGNMENT`; elsewhere it ends in "misaligned address"):
        they are views of as many copies as there are remainders, not copies of their own.
        """
        rows = self._rows
        if len(rows) < length:
            last = self._between(length - 1, length)
            # for any shift, rows apart by whole pieces
            room = (length + 2 * ALIGNMENT - 2) // ALIGNMENT * ALIGNMENT
            copies = [last.new_zeros(*last.shape[:-1], room) for _ in range(ALIGNMENT)]
            for shift, copy in enumerate(copies):
                copy[..., shift : shift + length] = last
            starts = [(length - n, -(length - n) % ALIGNMENT) for n in range(1, length + 1)]
            self._rows = rows = [
                copies[shift][..., start + shift : length + shift] for start, shift in starts
            ]
        return rows

    def around(self, length: int) -> Floats:
        """(1 or L, heads, 2 S - 1): of all layers, by how far ahead a position is, from 1 - S on; S is the ``length``."""
        known = self._around.get(length)
        if known is None:
            squares = [own.square(length)[0] for own in self.layers]
            tables = [torch.cat([one[:, 1:, 0].flip(1), one[:, 0]], 1) for one in squares]
            self._around[length] = known = torch.stack(tables).numpy()
        return known

    def last(self, length: int) -> Floats:
        """(1 or L, heads, length): of all layers, of the last of so many positions to all of them."""
        known = self._last.get(length)
        if known is None:
            rows = [own.rows(length)[length - 1][0, :, 0] for own in self.layers]
            self._last[length] = known = torch.stack(rows).numpy()
        return known

    def _between(self, first: int, length: int) -> Tensor:
        """(1, heads, length - first, length): of the positions from ``first`` on to all."""
        positions = torch.arange(length, device=self._by_offset.device)
        offsets = (positions - positions[first:, None]).clamp(-self._reach, self._reach)
        return self._by_offset[:, offsets + self._reach][None]


def _stacked(stack: torch.nn.Module, read: Callable[[Block], Matrices]) -> Matrices:
    """Read one block after the other, each into its place: no more than one is held twice."""
    own = blocks(stack)
    first = read(own[0])
    held = type(first)._make(matrix.new_empty(len(own), *matrix.shape) for matrix in first)
    for index, block in enumerate(own):
        for whole, matrix in zip(held, read(block), strict=True):
            whole[index] = matrix
    return held


def _self_and_feed_forward(block: Block, dtype: torch.dtype) -> Layer:
    attention, norm = block.layer[0].SelfAttention, block.layer[0].layer_norm
    dense, dense_norm = block.layer[-1].DenseReluDense, block.layer[-1].layer_norm
    entries = [dense.wi_0, dense.wi_1] if hasattr(dense, "wi_0") else [dense.wi]
    return Layer(
        self_in=_after_norm(norm, [attention.q, attention.k, attention.v], dtype),
        self_out=_plain(attention.o, dtype),
        ff_in=_after_norm(dense_norm, entries, dtype),
        ff_out=_plain(dense.wo, dtype),
    )


def _after_norm(
    norm: Map, linears: Iterable[Map], dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    fine = torch.promote_types(dtype, torch.float32)
    weight = numbers_of(norm)
    gain = weight.to(fine) * (math.sqrt(weight.shape[0]) * scale)
    joined = torch.cat([numbers_of(linear).to(fine) for linear in linears])
    return (joined * gain).to(dtype).t().contiguous()


def _plain(linear: Map, dtype: torch.dtype) -> Tensor:
    return numbers_of(linear).to(dtype).t().contiguous()


def numbers_of(module: Map) -> Tensor:
    """A module's weight as numbers; quantized modules pack theirs, and adapters put it elsewhere."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise RiskcalError(
            f"model: holds a {kind}, which has no floating-point weight; load the model without quantization, and merge "
            "adapters into its weights (peft: merge_and_unload())."
        )
    return weight.detach()
