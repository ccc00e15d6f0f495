"""The order in which units are tested: drawn from their ids, or from the content of all of them, never from what a user chose."""

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError

_ORDER_SALT = b"riskcal: order of prompts, version 1\x00"

_FIT_SALT = b"riskcal: prompts to fit on, version 1\x00"

#: How a number of rows is written; no table has 10^18 of them.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")

_MIXERS = np.array([0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93], dtype=np.uint64)

_CONTENT_SALT = b"riskcal: order of rows without ids, version 1\x00"


def tested_order(identifiers: ArrayLike) -> NDArray[np.intp]:
    """The order in which units are tested: ascending BLAKE2b hash of a fixed salt and the unit's id.

    Content-free and not the user's to choose. A betting test in an order that depends on the prompts' content (sorted by
    difficulty, say) is wrong about as often as not. For ids that only number the rows see `numbered`.
    """
    digests = b"".join(
        hashlib.blake2b(_ORDER_SALT + str(i).encode(), digest_size=16).digest()
        for i in np.asarray(identifiers).tolist()
    )
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64)
    # 16 bytes a unit, where Python's own would be 49
    return np.lexsort((halves[:, 1], halves[:, 0]))


def fitted_on(identifiers: ArrayLike, fraction: float) -> NDArray[np.bool_]:
    """Which prompts are set aside to fit a learned risk: this share of all prompts there are, by a hash of the id alone.

    So everyone can tell from an id on which side it is, and nobody can search for a lucky split.
    """
    below = int(fraction * 2.0**64)
    places = [
        hashlib.blake2b(_FIT_SALT + str(i).encode(), digest_size=8).digest()
        for i in np.asarray(identifiers).tolist()
    ]
    return np.array([int.from_bytes(place, "big") < below for place in places], dtype=bool)


def numbered(identifiers: ArrayLike) -> bool:
    """Whether ids are but the numbers of rows, 0 to n - 1 or 1 to n in any order: as good as no ids.

    Whoever numbered the rows may have sorted them by outcome first, and then `tested_order` is one fixed arrangement of the
    sorted rows. Such units are tested in `content_order`.
    """
    ids = np.asarray(identifiers)
    if ids.dtype.kind not in "iu":
        texts = list(map(str, ids.tolist()))
        if not all(map(_NUMBER.fullmatch, texts)):
            return False
        ids = np.array(texts, dtype=np.int64)
    distinct = np.unique(ids)
    return not distinct.size or (
        distinct[0] in (0, 1) and int(distinct[-1]) - int(distinct[0]) == distinct.size - 1
    )


def content_order(*columns: ArrayLike) -> NDArray[np.intp]:
    """The order in which units without ids are tested: a permutation drawn from a digest of all rows as a multiset.

    Parameters
    ----------
    *columns : (n,) or (n, k)
        The losses of each unit, on the unit interval; what counts of one is the multiple of 2^-30 that it is nearest to.

    Returns
    -------
    (n,)
        To be applied to the rows as they stand. It is the same for any order of the rows, which makes it harmless: given the
        multiset, i.i.d. rows are equally likely to stand in any order, and a permutation that the multiset fixes leaves them
        so. Rows that somebody sorted are put into an arrangement that is drawn afresh for each data set, as far as data sets
        differ as multisets. (Losses of two values differ in their count alone: see `riskcal.calibrate`.)
    """
    return order_by_prints(content_prints(*columns))


def numbered_order(numbers: NDArray[Any], prints: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The `content_order` of units that are only `numbered`, however these are given, by the fingerprint (n,) of each."""
    ascending = np.argsort(numbers.astype(np.int64))
    return ascending[order_by_prints(prints)]


def content_prints(*columns: ArrayLike) -> NDArray[np.uint64]:
    """The fingerprint (n,) of each row of what `content_order` takes."""
    return prints_of(
        column
        for matrix in columns
        for column in np.asarray(matrix, dtype=np.float64).reshape(len(np.asarray(matrix)), -1).T
    )


def prints_of(columns: Iterable[Floats]) -> NDArray[np.uint64]:
    """`content_prints` of columns (n,) that are made one at a time."""
    return row_prints(np.rint(column * 2.0**30).astype(np.int64) for column in columns)


def row_prints(columns: Iterable[NDArray[np.int64]]) -> NDArray[np.uint64]:
    """A fingerprint (n,) of each row of columns (n,): a multiply-and-shift mix."""
    prints = np.zeros(1, dtype=np.uint64)
    for column in columns:
        prints = (prints ^ column.view(np.uint64)) * _MIXERS[0]
        prints = (prints ^ (prints >> np.uint64(32))) * _MIXERS[1]
        prints ^= prints >> np.uint64(29)
    return prints


def order_by_prints(prints: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The permutation that the fingerprints (n,) of all units fix, however they stand."""
    digest = hashlib.blake2b(
        _CONTENT_SALT + np.sort(prints).astype("<u8").tobytes(), digest_size=16
    ).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).permutation(len(prints))


def taken(rows: Any, n: int) -> NDArray[np.intp]:
    """Rows of n prompts, given by their numbers, a mask or a slice: at least one, none twice."""
    if isinstance(rows, slice):
        return taken(np.arange(n)[rows], n)
    given = _validate.as_given(rows, "rows")
    if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iub":
        what = (
            _validate.shown(rows)
            if given.ndim == 0
            else f"of shape {given.shape} and type {given.dtype}"
        )
        raise RiskcalError(
            f"rows: {what}; give the numbers of some prompts, whole and from 0, or a mask (n,). Those of ids: "
            "np.flatnonzero(np.isin(runs.prompts, ids))."
        )
    if given.dtype.kind == "b":
        if given.shape != (n,) or not given.any():
            raise RiskcalError(
                f"rows: a mask of {given.size} that is true {int(given.sum())} times, for {n} prompts; give one truth value "
                "for each, at least one of them true."
            )
        return np.flatnonzero(given)
    beyond = (given < -n) | (given >= n)
    if beyond.any():
        raise RiskcalError(
            f"rows: {given[beyond][0]} at index {_validate.first(beyond)}, but there are {n} prompts; give numbers from 0 to "
            f"{n - 1}."
        )
    found = given.astype(np.intp) % n
    again = pd.Series(found).duplicated().to_numpy()
    if again.any():
        raise RiskcalError(
            f"rows: {given[again][0]} stands twice, again at index {_validate.first(again)} ({int(again.sum())} such); a prompt "
            "that is taken twice would count as two that are independent. Take each once, without replacement: "
            "np.unique(rows)."
        )
    return found
