"""What is handed over: tokens of prompts at heads, checked and put in order."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate, records
from riskcal._validate import RiskcalError
from riskcal.records import columns as table_columns
from riskcal.records.alignment import refuse_other_order, refuse_other_rows
from riskcal.records.exits import unequal

#: Beyond any decoder, and within what the kernels count with.
_MOST_TOKENS, _MOST_LAYERS = 2**40, 2**20


Bools = NDArray[np.bool_]


class _Records(NamedTuple):
    """Tokens of n prompts, the first ``n_pilot`` of which, in tested order, are the pilot."""

    confidence: NDArray[np.floating[Any]]  # (N, K)
    agrees: Bools  # (N, K)
    prompt: NDArray[np.intp]  # (N,), place of the token's prompt in tested order
    ids: NDArray[Any]  # (n,)
    n_pilot: int

    @property
    def n(self) -> int:
        """Calibration prompts."""
        return len(self.ids) - self.n_pilot


def _tokens(confidence: ArrayLike, agrees: ArrayLike) -> tuple[NDArray[np.floating[Any]], Bools]:
    ragged = unequal(confidence) is not None
    given = None if ragged else _validate.as_given(confidence, "confidence")
    if given is None or given.ndim == 1:
        # Traces keep rows of unequal numbers of exits flat, so one axis may be either slip
        found = (
            f"has shape {given.shape}; give (tokens, heads)"
            if given is not None and given.dtype != object
            else "rows have unequal numbers of exits"
        )
        raise RiskcalError(
            f"confidence: {found}: a threshold per head needs the same heads in each row. For decisions of any length "
            "certify one threshold: calibrate(replay_traces(traces, thresholds, exact=True), ...)."
        )
    levels, right = (
        _validate.float_matrix(confidence, "confidence"),
        _validate.as_given(agrees, "agrees"),
    )
    if right.dtype != bool or right.ndim != 2:
        right = _validate.float_matrix(agrees, "agrees")
    if right.shape != levels.shape:
        raise RiskcalError(
            f"agrees: has shape {right.shape}, but confidence has {levels.shape}; give one per confidence."
        )
    refuse_other_order(confidence, agrees, "confidence", "agrees")
    refuse_other_rows({"confidence": confidence, "agrees": agrees})
    infinite = np.isinf(levels)
    if infinite.any():
        raise RiskcalError(
            f"confidence: {levels[infinite][0]} at index {_validate.first(infinite)}; give finite confidences, or NaN for a "
            "token that must not exit there."
        )
    other = ~((right == 0.0) | (right == 1.0))
    if other.any():
        raise RiskcalError(
            f"agrees: {right[other][0]:g} at index {_validate.first(other)}; give 1 where the head's token is the full "
            "model's and 0 where it is not. Where that is unknown, give 0."
        )
    return levels, right.astype(bool, copy=False)


def _records(
    confidence: NDArray[np.floating[Any]],
    agrees: Bools,
    prompts: ArrayLike,
    max_tokens: int,
    pilot_fraction: float,
) -> _Records:
    column = table_columns.series(prompts, "prompts")
    if len(column) != len(confidence):
        raise RiskcalError(
            f"prompts: has shape ({len(column)},); give one id for each of the {len(confidence)} tokens."
        )
    code, distinct = pd.factorize(table_columns.identifiers(column, "prompts"))
    ids = np.asarray(distinct)
    tokens = np.bincount(code)
    long = tokens > max_tokens
    if long.any():
        which = int(long.argmax())
        raise RiskcalError(
            f"max_tokens: prompt {ids.tolist()[which]!r} (row {int((code == which).argmax())}) has {tokens[which]} tokens, more "
            f"than {max_tokens}. Give the decoder's length limit, fixed before the data were seen."
        )
    order = _order(ids, code, confidence, agrees)
    rank = np.empty(len(ids), dtype=np.intp)
    rank[order] = np.arange(len(ids))
    share = _validate.level(pilot_fraction, "pilot_fraction")
    n_pilot = math.ceil(share * len(ids))
    if n_pilot < 2 or len(ids) - n_pilot < 2:
        raise RiskcalError(
            f"pilot_fraction: {share:g} of {len(ids)} prompts leaves {n_pilot} for the pilot and {len(ids) - n_pilot} for the "
            "test; each needs at least two."
        )
    return _Records(confidence, agrees, rank[code], ids[order], n_pilot)


def _order(
    ids: NDArray[Any], code: NDArray[np.intp], confidence: NDArray[np.floating[Any]], agrees: Bools
) -> NDArray[np.intp]:
    """The order of prompts: that of their ids, or of the content of all their tokens where ids only number them."""
    if not records.numbered(ids):
        return records.tested_order(ids)
    # one zero
    levels = ((column.astype(np.float64) + 0.0).view(np.int64) for column in confidence.T)
    outcomes = (column.astype(np.int64) for column in agrees.T)
    prints = np.zeros(len(ids), dtype=np.uint64)
    # whatever the order of tokens
    np.add.at(prints, code, records.row_prints(itertools.chain(levels, outcomes)))
    return records.numbered_order(ids, prints)


def _digest(recorded: _Records, layers: NDArray[np.int64]) -> str:
    """A hash of the ids and of their tokens, the same however prompts are interleaved."""
    hasher = hashlib.blake2b("\x1f".join(map(str, recorded.ids.tolist())).encode(), digest_size=16)
    hasher.update(layers.data)
    order = np.argsort(recorded.prompt, kind="stable")
    # in parts: a copy of the whole is as large as the arrays
    for first in range(0, len(order), 65536):
        rows = order[first : first + 65536]
        hasher.update(recorded.prompt[rows].astype(np.int64).data)
        hasher.update(recorded.confidence[rows].astype(np.float64).data)
        hasher.update(recorded.agrees[rows].data)
    return hasher.hexdigest()


def _agreement(value: Any) -> float:
    result = _validate.number(value, "agreement")
    if not 0.0 < result < 1.0:
        raise RiskcalError(
            f"agreement: {result:g} is not strictly between 0 and 1; 0.9 asks that nine of ten exited tokens agree."
        )
    return result


def _most(value: Any) -> int:
    return _validate.count(value, "max_tokens", least=1, most=_MOST_TOKENS)


def _layers(
    layers: Sequence[int] | None, heads: int, named: list[int] | None = None
) -> NDArray[np.int64]:
    """The heads' layers, (heads,); what the columns are ``named`` must not say otherwise."""
    if layers is None:
        if named and min(named) > 0 and named != [*range(1, heads + 1)]:
            raise RiskcalError(
                f"layers: the columns of confidence are numbered {named}, and would be taken for layers 1 to {heads}; say which "
                f"they are, layers={sorted(named)} for instance, with the columns in this order."
            )
        return np.arange(1, heads + 1)
    with _validate.reading("layers", "a list of whole numbers"):
        given = list(_validate.on_the_host(layers))
    numbers = np.array(
        [_validate.count(layer, "layers", least=1, most=_MOST_LAYERS) for layer in given],
        dtype=np.int64,
    )
    if numbers.size != heads:
        raise RiskcalError(
            f"layers: {numbers.size} given for {heads} heads; give one per column of confidence."
        )
    falling = np.diff(numbers) <= 0
    if falling.any():
        raise RiskcalError(
            f"layers: {numbers[1:][falling][0]} at index {int(falling.argmax()) + 1} does not ascend; order heads by depth."
        )
    if named is not None and named != numbers.tolist() and sorted(named) == numbers.tolist():
        raise RiskcalError(
            f"layers: the columns of confidence are numbered {named}, and layers {numbers.tolist()}; give both in one order."
        )
    return numbers
