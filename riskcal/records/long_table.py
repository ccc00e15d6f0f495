"""`Runs` as a long table: its columns, made one at a time, and the digest of everything that stands in them."""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal.records import direction
from riskcal.records.order import tested_order

if TYPE_CHECKING:
    from riskcal.records.runs import Runs

#: Rows of a column that are made at a time: all of them, and their text the more so, are large beside the runs.
_PART = 2**13

#: Some of the prompts, or all.
_Prompts = NDArray[np.intp] | slice


def columns(runs: "Runs") -> Iterator[tuple[str, Callable[[_Prompts], Any]]]:
    """Names of columns, and what makes each for some of the prompts: (n (k + 1),), or one value for all rows.

    Prompts stand as they are given, the full model's row first in each.
    """
    has_full = bool(runs.full)
    times = runs.k + has_full
    yield "prompt", partial(_repeated, runs.prompts, times)
    for name, label in runs.labels.items():
        yield name, partial(_repeated, label, times)
    coordinates = runs.candidates
    if has_full:
        reference = runs.candidates.iloc[[0]].assign(threshold=math.inf)
        coordinates = pd.concat([reference, runs.candidates], ignore_index=True)
    for name in coordinates.columns:
        setting = coordinates[name].to_numpy()
        yield name, partial(_tiled, setting, runs.prompts)
    for name in runs.values:
        yield name, partial(_measured, runs, name)
    if not has_full and (risk := runs.full_risk) is not None:
        yield "full_risk", partial(_repeated, risk, runs.k)
    yield "source", lambda some: runs.source
    if runs.exact:
        yield "exact", lambda some: True
    if runs.lower_is_stricter:
        yield direction.COLUMN, lambda some: True
    if (stopped := runs.stopped) is not None:
        yield "stopped", lambda some: stopped.model_dump_json()


def _repeated(of_prompts: NDArray[Any], times: int, some: _Prompts) -> NDArray[Any]:
    return np.repeat(of_prompts[some], times)


def _tiled(setting: NDArray[Any], prompts: NDArray[Any], some: _Prompts) -> NDArray[Any]:
    return np.tile(setting, len(prompts[some]))


def _measured(runs: "Runs", name: str, some: _Prompts) -> NDArray[Any]:
    whole: NDArray[Any] = runs.values[name][some]
    if runs.full:
        whole = np.column_stack([runs.full[name][some], whole])
    if name == "tokens" and not (whole % 1).any():
        whole = whole.astype(np.int64)
    return (whole.astype(bool) if name == "failed" else whole).ravel()


def digest(runs: "Runs") -> str:
    """BLAKE2b of all columns, prompts in tested order."""
    order = tested_order(runs.prompts)
    times = runs.k + bool(runs.full)
    prompts = max(1, _PART // times)
    hasher = hashlib.blake2b(digest_size=16)
    for name, of in columns(runs):
        hasher.update(name.encode() + b"\x00")
        for first in range(0, len(order), prompts):
            some = order[first : first + prompts]
            column = np.broadcast_to(of(some), times * len(some))
            if column.dtype == object and name not in ("prompt", *runs.labels):
                # truth values and numbers of which the full model's rows had none, as files keep them
                column = pd.Series(column).infer_objects().to_numpy()
            if column.dtype.kind in "biuf" and name not in ("prompt", *runs.labels):
                hasher.update(np.ascontiguousarray(column, dtype=np.float64).data)
            else:
                text = "\x1f".join(map(str, column.tolist()))
                hasher.update((("\x1f" if first else "") + text).encode())
    return hasher.hexdigest()
