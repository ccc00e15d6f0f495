"""`Runs` as a long table: its columns, made one at a time, and the digest of everything that stands in them."""

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from riskcal.records import direction
from riskcal.records.order import tested_order

if TYPE_CHECKING:
    from riskcal.records.runs import Runs

#: Rows whose text is made at a time: that of a long table is many times its size.
_PART = 4096


def columns(runs: "Runs") -> Iterator[tuple[str, Any]]:
    """Names and columns (n (k + 1),), or one value for all rows; prompts as they stand, the full model's row first in each."""
    n, k, has_full = len(runs.prompts), runs.k, bool(runs.full)
    yield "prompt", np.repeat(runs.prompts, k + has_full)
    for name, label in runs.labels.items():
        yield name, np.repeat(label, k + has_full)
    coordinates = runs.candidates
    if has_full:
        reference = runs.candidates.iloc[[0]].assign(threshold=math.inf)
        coordinates = pd.concat([reference, runs.candidates], ignore_index=True)
    for name in coordinates.columns:
        yield name, np.tile(coordinates[name].to_numpy(), n)
    for name, value in runs.values.items():
        whole = np.column_stack([runs.full[name], value]) if has_full else value
        whole = whole.astype(np.int64) if name == "tokens" and not (whole % 1).any() else whole
        whole = whole.astype(bool) if name == "failed" else whole
        yield name, whole.ravel()
    if not has_full and runs.full_risk is not None:
        yield "full_risk", np.repeat(runs.full_risk, k)
    yield "source", runs.source
    if runs.exact:
        yield "exact", True
    if runs.lower_is_stricter:
        yield direction.COLUMN, True
    if runs.stopped is not None:
        yield "stopped", runs.stopped.model_dump_json()


def digest(runs: "Runs") -> str:
    """BLAKE2b of all columns, prompts in tested order."""
    order = tested_order(runs.prompts)
    if not np.array_equal(order, np.arange(len(order))):  # numbered prompts stand in another
        return digest(runs.take(order))
    hasher = hashlib.blake2b(digest_size=16)
    rows = len(runs.prompts) * (runs.k + bool(runs.full))
    for name, value in columns(runs):
        column = np.broadcast_to(value, rows)
        hasher.update(name.encode() + b"\x00")
        if column.dtype.kind in "biuf" and name not in ("prompt", *runs.labels):
            hasher.update(np.ascontiguousarray(column, dtype=np.float64).data)
            continue
        for first in range(0, rows, _PART):
            text = "\x1f".join(map(str, column[first : first + _PART].tolist()))
            hasher.update((("\x1f" if first else "") + text).encode())
    return hasher.hexdigest()
