"""Loops over rows on a CPU in float32, where calling torch's operations would take longer than the work in them.

Rows in flight stand at positions of their own, after prompts of their own. As tensors they would be gathered, padded to the
longest and masked for each layer; here each row reads the keys and values that it has, where they are. What a loop gives for
a row does not depend on the rows beside it.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

# sums may be taken in any order, as vectors need it; NaN and infinities stay what they are
_FAST = {"reassoc", "contract", "nsz", "arcp"}

_PER_OCTAVE = np.float32(math.log2(math.e))
# ln 2 in two parts, the first exact in few bits, and a polynomial for exp between -ln 2 / 2 and ln 2 / 2: Cephes, expf
_LN2, _LN2_REST = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_P3, _P4, _P5 = (
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)
_MOST = np.float32(87.0)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1.0), np.float32(0.0)
#: Measures that `surest` computes.
OF_LOGITS = ("softmax", "max", "entropy")
_SOFTMAX, _MAX = 0, 1
_GELU, _GELU_CUBE = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)


def take(values: Tensor) -> bool:
    """Whether a tensor is one that these loops read."""
    return values.dtype is torch.float32 and values.device.type == "cpu"


@njit(cache=True, fastmath={"contract"})
def _exponentials(values: Any, bits: Any) -> None:
    """Exponentials in place, to a unit in the last place, of numbers from -87 to 87 (beyond, of these); a NaN stays one.

    One loop without a call, so that it becomes vector instructions. ``bits`` is room for as many int32.
    """
    powers = bits.view(np.float32)
    for i in range(len(values)):
        value = values[i]
        value = -_MOST if value < -_MOST else value
        value = _MOST if value > _MOST else value
        n = np.floor(value * _PER_OCTAVE + _HALF)
        rest = value - n * _LN2 - n * _LN2_REST
        power = ((((_P0 * rest + _P1) * rest + _P2) * rest + _P3) * rest + _P4) * rest + _P5
        values[i] = power * rest * rest + rest + _ONE
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for i in range(len(values)):
        values[i] *= powers[i]


@njit(cache=True, fastmath=_FAST)
def _total(values: Any) -> Any:
    """Their sum, in parts as vectors take it: of many thousands it is closer than one after the other."""
    total = _ZERO
    for i in range(len(values)):
        total += values[i]
    return total


@njit(cache=True, fastmath=_FAST)
def attend(
    queries: Any,
    rows: Any,
    starts: Any,
    step: Any,
    counts: Any,
    bias: Any,
    shifts: Any,
    parts: Any,
    columns: Any,
    width: Any,
    scale: Any,
) -> Floats:
    """Softmax attention of each query to keys and values of its own.

    Parameters
    ----------
    queries : (A, >= columns)
        Of H heads, in the first ``columns``.
    rows : (N, w)
        Keys in some columns, values in others.
    starts, counts : (A,)
        A query's keys are rows ``starts``, ``starts + step``, ...: so many.
    step : int
    bias : (H, n)
        Added to products, from column ``shifts`` (A,) on; (H, 0) where there is none.
    parts : (int, int, int)
        The columns where keys begin, where values do, and the query heads that share a key's.
    columns, width : int
        Of all heads, and of one.
    scale : float32
        What products are multiplied with.

    Returns
    -------
    (A, columns)
    """
    heads = columns // width
    out = np.empty((len(counts), columns), dtype=np.float32)
    key_at, value_at, group = parts
    most = 0
    for a in range(len(counts)):
        most = max(most, counts[a])
    products, bits = np.empty(most, dtype=np.float32), np.empty(most, dtype=np.int32)
    for a in range(len(counts)):
        n, start, shift = counts[a], starts[a], shifts[a]
        weights = products[:n]
        for h in range(heads):
            query = queries[a, h * width : (h + 1) * width]
            first = key_at + h // group * width
            for c in range(n):
                key = rows[start + c * step, first : first + width]
                product = _ZERO
                for i in range(width):
                    product += query[i] * key[i]
                weights[c] = product * scale
            if bias.shape[1]:
                added = bias[h, shift : shift + n]
                for c in range(n):
                    weights[c] += added[c]
            largest = weights[0]
            for c in range(n):
                largest = max(largest, weights[c])
            for c in range(n):
                weights[c] -= largest
            _exponentials(weights, bits[:n])
            share = _ONE / _total(weights)
            attended = out[a, h * width : (h + 1) * width]
            attended[:] = _ZERO
            first = value_at + h // group * width
            for c in range(n):
                value = rows[start + c * step, first : first + width]
                weight = weights[c] * share
                for i in range(width):
                    attended[i] += weight * value[i]
    return out


@njit(cache=True)
def catch_up(rows: Any, positions: Any, filled: Any) -> tuple[Ints, Ints]:
    """Rows and positions that lack keys and values: those that were skipped, row by row, then those at hand.

    Whoever asks must write them all: ``filled`` is moved on behind the positions at hand, as if they were there.
    """
    count = len(rows)
    gaps = 0
    for a in range(count):
        gaps += positions[a] - filled[rows[a]]
    all_rows, all_positions = np.empty(gaps + count, np.int64), np.empty(gaps + count, np.int64)
    at = 0
    for a in range(count):
        for position in range(filled[rows[a]], positions[a]):
            all_rows[at], all_positions[at] = rows[a], position
            at += 1
        filled[rows[a]] = positions[a] + 1
        all_rows[gaps + a], all_positions[gaps + a] = rows[a], positions[a]
    return all_rows, all_positions


@njit(cache=True)
def entering(states: Any, rows: Any, positions: Any, state: Any) -> Floats:
    """The ``states`` (T, B, d) of rows at their positions, the last of which are ``state``."""
    gaps = len(rows) - len(state)
    together = np.empty((len(rows), state.shape[1]), dtype=np.float32)
    for i in range(gaps):
        together[i] = states[positions[i], rows[i]]
    for i in range(len(state)):
        together[gaps + i] = state[i]
    return together


@njit(cache=True)
def place(
    rows: Any, positions: Any, asking: Any, offsets: Any, begins: Any, row_step: Any, step: Any
) -> tuple[Ints, Ints, Ints]:
    """Where keys of rows at their positions go, and where those of the last ``asking`` begin, and how many these are.

    Column c of row b is at ``b * row_step + c * step``.
    """
    places = np.empty(len(rows), dtype=np.int64)
    starts, counts = np.empty(asking, dtype=np.int64), np.empty(asking, dtype=np.int64)
    gaps = len(rows) - asking
    for i in range(len(rows)):
        row = rows[i]
        column = offsets[row] + positions[i]
        places[i] = row * row_step + column * step
        if i >= gaps:
            starts[i - gaps] = row * row_step + begins[row] * step
            counts[i - gaps] = column + 1 - begins[row]
    return places, starts, counts


@njit(cache=True)
def put(fresh: Any, places: Any, rows: Any) -> None:
    """The last columns of ``fresh`` into the ``rows`` at these places."""
    skipped = fresh.shape[1] - rows.shape[1]
    for i in range(len(places)):
        for j in range(rows.shape[1]):
            rows[places[i], j] = fresh[i, skipped + j]


@njit(cache=True)
def copy(values: Any, places: Any, targets: Any, rows: Any) -> None:
    """``values`` at some places to the rows of ``targets``."""
    for i in range(len(places)):
        for j in range(values.shape[1]):
            targets[rows[i], j] = values[places[i], j]


@njit(cache=True)
def of(values: Any, places: Any) -> Floats:
    """``values`` at some places."""
    found = np.empty((len(places), values.shape[1]), dtype=np.float32)
    for i in range(len(places)):
        for j in range(values.shape[1]):
            found[i, j] = values[places[i], j]
    return found


@njit(cache=True)
def ranges(starts: Any, counts: Any) -> Ints:
    """All numbers from each start on, so many of each, one after the other."""
    found = np.empty(counts.sum(), dtype=np.int64)
    at = 0
    for i in range(len(counts)):
        for j in range(counts[i]):
            found[at] = starts[i] + j
            at += 1
    return found


@njit(cache=True)
def whole_prompts(lengths: Any) -> tuple[Ints, Ints, Ints]:
    """What `attend` is told for each token of prompts that stand one after the other, to attend to all of its own.

    That is where the prompt begins, its length, and where the biases by distance, from 1 - S on, begin: S is the longest.
    """
    total, longest = lengths.sum(), lengths.max()
    begins, counts = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    shifts = np.empty(total, dtype=np.int64)
    begin = 0
    for length in lengths:
        for i in range(length):
            begins[begin + i], counts[begin + i], shifts[begin + i] = begin, length, longest - 1 - i
        begin += length
    return begins, counts, shifts


@njit(cache=True, fastmath=_FAST)
def rms_norm(states: Any, offset: Any) -> Floats:
    """Each row over the root of its squared length and the offset's square."""
    out = np.empty(states.shape, dtype=np.float32)
    for a in range(len(states)):
        state, normed = states[a], out[a]
        total = offset * offset
        for i in range(len(state)):
            total += state[i] * state[i]
        factor = _ONE / np.sqrt(total)
        for i in range(len(state)):
            normed[i] = state[i] * factor
    return out


@njit(cache=True, fastmath={"contract"})
def gated_gelu(hidden: Any) -> Floats:
    """The second half of each row, times the tanh form of GELU of the first half: x / (1 + exp(-2u)), u as in ``gelu_new``."""
    width = hidden.shape[1] // 2
    out = np.empty((len(hidden), width), dtype=np.float32)
    bits = np.empty(width, dtype=np.int32)
    for a in range(len(out)):
        gate, linear, made = hidden[a, :width], hidden[a, width:], out[a]
        for i in range(width):
            x = gate[i]
            made[i] = -_GELU * (x + _GELU_CUBE * x * x * x)
        _exponentials(made, bits)
        for i in range(width):
            made[i] = gate[i] * linear[i] / (_ONE + made[i])
    return out


@njit(cache=True, fastmath={"contract"})
def surest(measure: Any, logits: Any) -> tuple[Floats, Ints]:
    """How sure each row is by a measure, told by its place in `OF_LOGITS`, and its most probable token, the lowest of equals.

    A row with a NaN has confidence NaN, and its first NaN is the best, as ``argmax`` has it.
    """
    width = logits.shape[1]
    confidence, best = np.empty(len(logits), np.float32), np.empty(len(logits), np.int64)
    powers, bits = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.int32)
    for a in range(len(logits)):
        row = logits[a]
        largest, second, at = row[0], np.float32(-np.inf), 0
        for i in range(1, width):
            value = row[i]
            if value > largest or (value != value and largest == largest):
                second, largest, at = largest, value, i
            elif value > second:
                second = value
        for i in range(width):
            powers[i] = row[i] - largest
        _exponentials(powers, bits)
        total = _total(powers)
        if measure == _SOFTMAX:
            confidence[a] = (_ONE - np.exp(second - largest)) / total
        elif measure == _MAX:
            confidence[a] = _ONE / total
        else:
            confidence[a] = _total_behind(row, largest, powers) / total - np.log(total)
        best[a] = at
    return confidence, best


@njit(cache=True, fastmath=_FAST)
def _total_behind(row: Any, largest: Any, powers: Any) -> Any:
    """How far each logit is behind the largest, weighted by the exponential of it; 0 times minus infinity is 0."""
    total = _ZERO
    for i in range(len(row)):
        behind = row[i] - largest
        total += powers[i] * behind if behind > -_MOST else _ZERO
    return total
