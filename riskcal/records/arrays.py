"""From matrices, one row per prompt and one column per threshold, to the arrays of `Runs`, without a long table between."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.records import alignment, columns, reading
from riskcal.records import costs as costs_
from riskcal.records.tokens import holds_tokens

#: What lies between 0 and 1; all else is a cost, or says what failed.
_IN_RANGE = ("dissimilarity", "risk")


def fields_of(
    thresholds: ArrayLike,
    values: Mapping[str, ArrayLike],
    costs: Mapping[str, ArrayLike] | None,
    labels: Mapping[str, ArrayLike | None],
    source: str,
    exact: bool,
) -> dict[str, Any]:
    """The fields of `Runs` that matrices hold; what they must hold is said in `Runs.from_arrays`.

    The matrices are copied once, column by column. What belongs to a prompt (its id, labels, the full model's row) is checked
    as in a long table, of one candidate.
    """
    grid = _validate.threshold_grid(thresholds, allow_full=True)
    _validate.choice(source, "source", ("generated", "replayed"))
    exact = _validate.truth(exact, "exact")
    further = costs_.named(costs)
    for name in values:
        _validate.choice(name, "argument", ("dissimilarity", "risk", "failed", *costs_.COSTS))
    for name, value in values.items():
        alignment.refuse_other_columns(value, grid, name)
    called = {"prompts" if name == "prompt" else name: label for name, label in labels.items()}
    alignment.refuse_other_rows({**values, **further, **called})
    matrices = _matrices(values, grid.size, source)
    shape = next(iter(matrices.values())).shape
    for name, value in further.items():
        if name in values:
            raise RiskcalError(f"costs: {name!r} is given twice; leave it out there.")
        matrices[name] = costs_.of_shape(value, name, shape, "prompts", grid)
    n = shape[0]
    given = _labels(labels, n)
    descending = np.argsort(-grid)
    is_full = np.isposinf(grid[descending])
    finite = descending[~is_full]
    failed = matrices.get("failed")
    for name, matrix in matrices.items():
        upper = 1.0 if name in _IN_RANGE else np.inf
        fine = (matrix >= 0) & (matrix <= upper) & (matrix < np.inf)
        # only then as a whole, which takes memory: a refusal names the index in it
        if not fine.all():
            _refuse_impossible(name, matrix, failed)

    # the full model's rows first: whatever is refused in them, or in labels, is then named by its own index
    parts = [
        pd.DataFrame(
            given
            | {name: matrix[:, place] for name, matrix in matrices.items()}
            | {"threshold": grid[place]}
        )
        for place in [*descending[is_full], *finite[:1]]
    ]
    fields = reading.fields_of(pd.concat(parts, ignore_index=True), (), list(further))
    order = pd.Index(columns.identifiers(pd.Series(given["prompt"]), "prompts")).get_indexer(
        fields["prompts"]
    )
    measured: dict[str, Floats] = {}
    for name in fields["values"]:
        measured[name] = np.empty((n, finite.size))
        for column, place in enumerate(finite):
            entries = matrices[name][:, place]
            lost = None if failed is None else failed[:, place]
            measured[name][:, column] = _checked(name, entries, lost)[order]
    if "dissimilarity" in measured and "failed" in fields["full"]:  # nothing can be near it
        measured["dissimilarity"][fields["full"]["failed"] > 0] = 1.0
    candidates = pd.DataFrame({"threshold": grid[finite]})
    own = {"candidates": candidates, "values": measured, "source": source, "exact": exact}
    return fields | own


def _matrices(values: Mapping[str, ArrayLike], k: int, source: str) -> dict[str, NDArray[Any]]:
    """Every matrix (P, k), all of one shape; losses and costs are looked at column by column where some outputs failed."""
    matrices: dict[str, NDArray[Any]] = {}
    shape: tuple[int, ...] | None = None
    for name, value in values.items():
        if source == "generated" and holds_tokens(value):
            raise RiskcalError(
                f"{name}: these rows were replayed, and after a first early exit a real decoder's states differ. Record real "
                "generations, or give source='replayed', and exact=True where the exit has no memory; rows that share a "
                "prompt share a cluster=."
            )
        matrix: NDArray[Any] = _validate.shaped(value, name, ndim=(2,))
        if matrix.shape[1] != k or (shape is not None and matrix.shape != shape):
            raise RiskcalError(
                f"{name}: has shape {matrix.shape}; expected {shape or f'(n, {k})'}, one column per threshold."
            )
        shape = matrix.shape
        if name == "failed":
            if not ((matrix == 0) | (matrix == 1)).all():
                where = _validate.first((matrix != 0) & (matrix != 1))
                raise RiskcalError(
                    f"failed: index {where} is neither true nor false; say it of every output."
                )
            matrix = matrix.astype(bool)
        matrices[name] = matrix
        if "failed" in values or name not in _IN_RANGE:
            continue  # an output that failed may have no loss
        _validate.finite(matrix, name)
        _validate.in_range(matrix, name, 0.0, 1.0)
    if shape is None or not {"dissimilarity", "risk"} & set(matrices):
        raise RiskcalError(
            "dissimilarity, risk: neither is given; give at least one (n, k) matrix."
        )
    return matrices


def _labels(labels: Mapping[str, ArrayLike | None], n: int) -> dict[str, Any]:
    """What was given of each prompt, (P,); without ids they are numbered."""
    given: dict[str, Any] = {"prompt": np.arange(n)}
    for name, label in labels.items():
        if label is None:
            continue
        called = "prompts" if name == "prompt" else name
        entries = columns.series(label, called)
        if len(entries) != n:
            raise RiskcalError(
                f"{called}: has shape ({len(entries)},); expected ({n},), one entry per row."
            )
        given[name] = entries.to_numpy()
    ids = columns.identifiers(pd.Series(given["prompt"]), "prompts")
    if (again := ids.duplicated()).any():
        row = int(again.argmax())
        raise RiskcalError(
            f"prompts: {columns.plain(ids[row])!r} stands twice, again at index {row} ({int(again.sum())} such rows); a row of "
            "the matrices is a prompt. Several samples of one prompt: give each an id of its own, and the prompt they share as "
            "cluster=."
        )
    return given


def _refuse_impossible(name: str, matrix: NDArray[Any], failed: NDArray[np.bool_] | None) -> None:
    """Refuse losses outside [0, 1], but for those of outputs that failed, and costs that cannot be, with the index."""
    numbers = columns.floats(pd.Series(matrix.ravel(), name=name)).reshape(matrix.shape)
    if name not in _IN_RANGE:
        costs_.refuse_impossible(numbers, name)
        return
    bad = ~((numbers >= -_validate.TOLERANCE) & (numbers <= 1 + _validate.TOLERANCE))
    bad &= True if failed is None else ~failed
    if bad.any():
        raise RiskcalError(
            f"{name}: {numbers[bad][0]:g} at index {_validate.first(bad)} ({int(bad.sum())} such values), which did not fail; "
            "every loss is in [0, 1]. Say in failed which outputs failed, all of them, or repair or rescale it."
        )


def _checked(name: str, entries: NDArray[Any], failed: NDArray[np.bool_] | None) -> Floats:
    """Entries of a matrix, 1-D, with the worst loss where its output failed."""
    if name == "failed":
        return entries.astype(np.float64)
    upper = 1.0 if name in _IN_RANGE else np.inf
    lost = failed if name in _IN_RANGE else None
    if entries.dtype.kind in "fiu":
        values = entries.astype(np.float64) if lost is None else np.where(lost, upper, entries)
        if ((values >= 0) & (values <= upper) & (values < np.inf)).all():
            return values
    return columns.numbers(pd.Series(entries, name=name), name, 0.0, upper, lost)
