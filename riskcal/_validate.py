"""The one place where arguments are checked: every refusal names the argument, the first offending index and the remedy."""

import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: How far outside its range a loss may stand before it is refused: rounding, not error.
TOLERANCE = 1e-9


class RiskcalError(ValueError):
    """Input that riskcal refuses. The message names what is wrong, where it first occurs, and what to do."""


def first(mask: NDArray[np.bool_]) -> str:
    """The first true index of a mask, written as a reader would: ``3`` or ``[3, 1]``."""
    index = [int(i) for i in np.argwhere(mask)[0]]
    return str(index[0]) if len(index) == 1 else str(index)


def array(values: ArrayLike, name: str, *, ndim: Collection[int]) -> Floats:
    """Finite float64 array of one of the allowed numbers of dimensions, none of them empty."""
    try:
        result = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RiskcalError(f"{name}: not an array of numbers ({error}).") from None
    if result.ndim not in ndim:
        wanted = " or ".join(f"{d}-D" for d in sorted(ndim))
        raise RiskcalError(f"{name}: has shape {result.shape}; give a {wanted} array.")
    if result.size == 0:
        raise RiskcalError(f"{name}: is empty (shape {result.shape}); give at least one value.")
    finite(result, name)
    return result


def finite(values: NDArray[Any], name: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        value = values[bad][0]
        raise RiskcalError(f"{name}: {value} at index {first(bad)}; every value must be finite. Drop or repair it.")


def losses(values: ArrayLike, *, lower: float, upper: float) -> Floats:
    """Losses (n,) or (n, k) within [lower, upper], as (n, k) float64; values a rounding error outside are clipped."""
    matrix = array(values, "losses", ndim=(1, 2))
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    in_range(matrix, "losses", lower, upper)
    if matrix.shape[0] < 2:
        raise RiskcalError("losses: one row only; a test needs at least two independent prompts (rows).")
    if matrix.min() < lower or matrix.max() > upper:
        matrix = np.clip(matrix, lower, upper)
    return matrix


def in_range(values: Floats, name: str, lower: float, upper: float) -> None:
    slack = TOLERANCE * (upper - lower)
    if values.size and values.min() >= lower - slack and values.max() <= upper + slack:
        return
    bad = (values < lower - slack) | (values > upper + slack)
    if bad.any():
        raise RiskcalError(
            f"{name}: {values[bad][0]:g} at index {first(bad)} is outside [{lower:g}, {upper:g}]. "
            "Rescale the losses or declare their true bounds with lower= and upper=."
        )


def number(value: Any, name: str) -> float:
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise RiskcalError(f"{name}: {value!r} is not a number.") from None
    if math.isnan(result):
        raise RiskcalError(f"{name}: is NaN; give a number.")
    return result


def bounds(lower: Any, upper: Any) -> tuple[float, float]:
    low, high = number(lower, "lower"), number(upper, "upper")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise RiskcalError(f"lower, upper: [{low:g}, {high:g}] is not a finite range; give lower < upper.")
    return low, high


def tolerance(delta: Any, lower: float, upper: float) -> float:
    """Delta strictly inside the losses' range: at or below it nothing can be certified, at or above it nothing is claimed."""
    result = number(delta, "delta")
    if not lower < result < upper:
        raise RiskcalError(
            f"delta: {result:g} is not strictly between the losses' bounds {lower:g} and {upper:g}; "
            "give the tolerated expected loss in the loss's own units."
        )
    return result


def level(value: Any, name: str) -> float:
    result = number(value, name)
    if not 0.0 < result < 1.0:
        raise RiskcalError(f"{name}: {result:g} is not strictly between 0 and 1; 0.05 is customary.")
    return result


def count(value: Any, name: str, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise RiskcalError(f"{name}: {value!r} is not a whole number of at least {least}.")
    return int(value)


def choice(value: Any, name: str, options: Collection[str]) -> str:
    if value not in options:
        raise RiskcalError(f"{name}: {value!r} is unknown; choose one of {', '.join(map(repr, options))}.")
    return str(value)


def pvalues(values: ArrayLike) -> Floats:
    result = array(values, "pvalues", ndim=(1,))
    bad = (result < 0) | (result > 1)
    if bad.any():
        raise RiskcalError(f"pvalues: {result[bad][0]:g} at index {first(bad)} is outside [0, 1].")
    return result


def threshold_grid(values: ArrayLike, *, allow_full: bool) -> Floats:
    """Thresholds (k,), distinct and none NaN; ``inf`` (the full model) only where ``allow_full``."""
    try:
        grid = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RiskcalError(f"thresholds: not an array of numbers ({error}).") from None
    if grid.ndim != 1 or grid.size == 0:
        raise RiskcalError(f"thresholds: has shape {grid.shape}; give a 1-D array of at least one threshold.")
    bad = np.isnan(grid) | np.isneginf(grid) | (np.isposinf(grid) & (not allow_full))
    if bad.any():
        remedy = "the full model is never a hypothesis: leave it out" if np.isposinf(grid[bad][0]) else "give a number"
        raise RiskcalError(f"thresholds: {grid[bad][0]} at index {first(bad)}; {remedy}.")
    _, where, counts = np.unique(grid, return_index=True, return_counts=True)
    if (counts > 1).any():
        raise RiskcalError(f"thresholds: {grid[where[counts > 1][0]]:g} is given more than once; list each once.")
    return grid


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write to a temporary neighbour and rename it into place, so that a crash leaves the old file or the new one whole."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise RiskcalError(f"{target}: cannot be written ({error.strerror or error}).") from None
    finally:
        partial.unlink(missing_ok=True)
