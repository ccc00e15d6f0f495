"""Memory to plan for: it is taken for the deepest path and the longest output, whatever the exits are."""

from collections.abc import Mapping
from dataclasses import dataclass

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.efficiency.flops import DecoderDimensions


@dataclass(frozen=True)
class Memory:
    """Bytes beside the model's own weights.

    Attributes
    ----------
    positions : int
        What is kept of generated positions: each layer's keys and values, and the states.
    prompts : int
        Keys and values of the encoder's states, in each layer.
    thresholds : int
        The confidence needed at each position and layer, in single precision.
    heads : int
        Exit heads of their own.

    Examples
    --------
    >>> dimensions = riskcal.efficiency.DecoderDimensions(d_model=512, d_ff=2048, vocabulary=32_128, n_layers=6)
    >>> needed = riskcal.efficiency.memory(dimensions, rows=64, max_prompt=512, max_new_tokens=128)
    >>> needed.prompts > needed.positions, needed.heads
    (True, 0)
    """

    positions: int
    prompts: int
    thresholds: int
    heads: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.positions + self.prompts + self.thresholds + self.heads


def memory(
    dimensions: DecoderDimensions,
    *,
    rows: int,
    max_prompt: int,
    max_new_tokens: int,
    heads: Mapping[int, int] | None = None,
    number_bytes: int = 4,
) -> Memory:
    """Memory of so many rows of an encoder-decoder model in flight, slots of an engine or rows of a batch.

    Parameters
    ----------
    dimensions : DecoderDimensions
    rows : int
    max_prompt, max_new_tokens : int
        Tokens at most. Prompts are padded: riskcal's decoders in PyTorch take multiples of 8.
    heads : mapping of layer to int, optional
        Parameters of exit heads of their own; a head that all layers share takes nothing more.
    number_bytes : int
        Of a number: 4 in single precision, 2 in half.

    Returns
    -------
    Memory

    Notes
    -----
    Early exit saves none of it: the row that goes to the last layer at the last position may be any. With d, a, L, T new
    tokens, x prompt tokens and B rows: ``B (L (2 T a + 2 x a) + (T + 1) d)`` numbers, keys and values each. Batches that decode
    in step keep queries too, as one product writes the three: 3 instead of the first 2.

    Examples
    --------
    >>> dimensions = riskcal.efficiency.DecoderDimensions(d_model=512, d_ff=2048, vocabulary=32_128, n_layers=6)
    >>> needed = riskcal.efficiency.memory(dimensions, rows=64, max_prompt=512, max_new_tokens=128)
    >>> round(needed.total / 2**30, 2)  # GiB
    0.95
    """
    size = _validate.count(rows, "rows", least=1)
    longest = _validate.count(max_new_tokens, "max_new_tokens", least=1)
    source = _validate.count(max_prompt, "max_prompt", least=1)
    number = _validate.count(number_bytes, "number_bytes", least=1)
    layers, a = dimensions.n_layers, dimensions.attention
    held = layers * 2 * longest * a + (longest + 1) * dimensions.d_model
    return Memory(
        positions=size * held * number,
        prompts=size * layers * 2 * source * a * number,
        thresholds=size * longest * layers * 4,
        heads=head_parameters(heads, layers) * number,
    )


def head_parameters(heads: Mapping[int, int] | None, n_layers: int) -> int:
    """Numbers that exit heads of their own have in all."""
    found = 0
    for layer, parameters in (heads or {}).items():
        if not _validate.is_whole(layer) or not 1 <= layer <= n_layers:
            raise RiskcalError(
                f"heads: {_validate.shown(layer)} is not one of the layers 1 to {n_layers}; give {{layer: parameters}}."
            )
        found += _validate.count(parameters, f"heads: of layer {layer}", least=1)
    return found
