"""The one place where arguments are checked: every refusal names the argument, the first offending index and the remedy."""

import json
import math
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

#: How far outside its range a loss may stand before it is refused: rounding, not error.
TOLERANCE = 1e-9


class RiskcalError(ValueError):
    """Input that riskcal refuses. The message names what is wrong, where it first occurs, and what to do.

    Examples
    --------
    >>> try:
    ...     riskcal.calibrate(np.array([[0.2], [np.nan]]), thresholds=[0.5], delta=0.1)
    ... except riskcal.RiskcalError as error:
    ...     print(error)
    losses: nan at index [1, 0]; every value must be finite; an output that failed has the worst loss.
    """


def first(mask: NDArray[np.bool_]) -> str:
    """The first true index of a mask, written as a reader would: ``3`` or ``[3, 1]``."""
    index = [int(i) for i in np.argwhere(mask)[0]]
    return str(index[0]) if len(index) == 1 else str(index)


def array(values: ArrayLike, name: str, *, ndim: Collection[int]) -> Floats:
    """Finite float64 array of one of the allowed numbers of dimensions, none of them empty."""
    result = shaped(values, name, ndim=ndim)
    finite(result, name)
    return result


def shaped(values: ArrayLike, name: str, *, ndim: Collection[int]) -> Floats:
    """As `array`, but NaN and infinities are let through."""
    result = as_numbers(values, name)
    if result.ndim not in ndim:
        wanted = " or ".join(f"{d}-D" for d in sorted(ndim))
        raise RiskcalError(f"{name}: has shape {result.shape}; give a {wanted} array.")
    if result.size == 0:
        raise RiskcalError(f"{name}: is empty (shape {result.shape}); give at least one value.")
    return result


def float_matrix(values: Any, name: str) -> NDArray[np.floating[Any]]:
    """A nonempty 2-D array, tokens by layers; float32 and float64 as they are, all else as float64. NaN is let through."""
    result: NDArray[np.floating[Any]] = as_given(values, name, "an array of numbers")
    if result.dtype not in (np.float32, np.float64) or not result.dtype.isnative:
        single = result.dtype.kind == "f" and result.dtype.itemsize == 4  # in the other byte order
        result = as_numbers(result, name).astype(np.float32 if single else np.float64, copy=False)
    if result.ndim != 2 or result.size == 0:
        raise RiskcalError(
            f"{name}: has shape {result.shape}; give (tokens, layers), at least one of each."
        )
    return result


def warn(message: str) -> None:
    """Warn at the line that called riskcal, however many of its own functions stand between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "riskcal":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@contextmanager
def reading(name: str, what: str) -> Iterator[None]:
    """Refuse whatever another library raises while its object is read: there is no telling which kinds it may be."""
    try:
        yield
    except (RiskcalError, MemoryError):
        raise
    except Exception as error:
        raise RiskcalError(f"{name}: not {what} ({reason(error)}).") from None


class Repeated(dict[str, Any]):
    """An object of JSON in which a name stood twice, with the last values; who reads it refuses it by what is ``said``."""

    said: str


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found, twice = Repeated(found), next(name for name in names if names.count(name) > 1)
        found.said = f"{twice!r} stands in it {names.count(twice)} times; keep one"
    return found


_MARKING = json.JSONDecoder(object_pairs_hook=_marked)


def from_json(text: Any, *, each_name_once: bool = False) -> Any:
    """What JSON holds; a ValueError for all that is none, and for brackets nested too deep; `Repeated` if asked."""
    try:
        return _MARKING.decode(text) if each_name_once else json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def of_one_meaning(found: Any) -> Any:
    """What JSON held, if no object in it, however deep, is `Repeated`; a ValueError otherwise."""
    left = [found]
    while left:
        if isinstance(one := left.pop(), Repeated):
            raise ValueError(one.said)
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return found


def reason(error: BaseException) -> str:
    """What another library says of it, in one line."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if said.startswith("setting an array element with a sequence"):
        return "its rows are not of one length" if "inhomogeneous" in said else "it holds lists"
    return said


def shown(value: Any) -> str:
    """A value as messages show it: in one line, not a long one; some objects cannot even be written."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 100 else f"{text[:100]}..."


def is_number(value: Any) -> bool:
    """Whether a single value is a real number or a truth value; numpy counts durations among its integers."""
    if isinstance(value, np.generic):
        return value.dtype.kind in "fbiu"
    return isinstance(value, bool | int | float | Decimal | Fraction)


def is_whole(value: Any) -> bool:
    """Whether a single value is an integer, of Python or numpy."""
    return is_number(value) and isinstance(value, int | np.integer) and not isinstance(value, bool)


def on_the_host(values: Any) -> Any:
    """What another framework holds on a device or for its gradients, as numpy can read it; all else as it is."""
    for step in ("detach", "cpu"):
        if hasattr(values, step) and hasattr(values, "dtype"):
            values = getattr(values, step)()
    # numpy has no such type
    if str(getattr(values, "dtype", "")) in ("torch.bfloat16", "bfloat16"):
        return values.float() if hasattr(values, "float") else np.asarray(values).astype(np.float32)
    return values


def as_given(values: Any, name: str, what: str = "an array") -> NDArray[Any]:
    """An array of whatever type, as numpy reads it; a masked value is refused, since its place would hold any number."""
    with reading(name, what):
        result = on_the_host(values)
        if np.ma.is_masked(result):
            where = first(np.ma.getmaskarray(np.ma.asarray(result)))
            raise RiskcalError(f"{name}: masked at index {where}; every value must be given.")
        array = np.asarray(result)
        if array.dtype == object and array.ndim == 0 and not (result is None or is_number(result)):
            raise TypeError(f"a {type(values).__name__} is none; give a list")
        return array


def as_numbers(values: Any, name: str) -> Floats:
    """float64 of booleans, whole and real numbers of any size and byte order, and objects that are such.

    Dates, durations, complex numbers and text are refused: each would need a meaning to become a number.
    """
    result = as_given(values, name, "an array of numbers")
    with reading(name, "an array of numbers"):
        if result.dtype.kind not in "fbiuO":
            raise TypeError(f"its type is {result.dtype}")
        if result.dtype.kind == "O":
            for value in result.ravel():
                if isinstance(
                    value,
                    str
                    | bytes
                    | complex
                    | np.complexfloating
                    | np.timedelta64
                    | np.datetime64
                    | timedelta
                    | date,
                ):
                    raise TypeError(f"it holds {shown(value)}")
        return result.astype(np.float64, copy=False)


def finite(values: NDArray[Any], name: str) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        value = values[bad][0]
        raise RiskcalError(
            f"{name}: {value} at index {first(bad)}; every value must be finite; an output that failed has the worst loss."
        )


def losses(values: ArrayLike, *, lower: float, upper: float) -> Floats:
    """Losses (n,) or (n, k) within [lower, upper], as (n, k) float64; values a rounding error outside are clipped."""
    matrix = array(values, "losses", ndim=(1, 2))
    in_range(matrix, "losses", lower, upper)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.shape[0] < 2:
        raise RiskcalError(
            "losses: one row only; a test needs at least two independent prompts (rows)."
        )
    if matrix.min() < lower or matrix.max() > upper:
        matrix = np.clip(matrix, lower, upper)
    return matrix


def binary(values: ArrayLike) -> Floats:
    """Losses (n,) or (n, k), each 0 or 1 up to rounding, as exact counts (n, k)."""
    matrix = losses(values, lower=0.0, upper=1.0)
    counts: Floats = np.rint(matrix)
    error = matrix - counts
    if max(error.max(), -error.min()) > TOLERANCE:
        fractional = np.abs(error) > TOLERANCE
        where = first(fractional if np.ndim(values) == 2 else fractional[:, 0])
        raise RiskcalError(
            f"losses: {matrix[fractional][0]:g} at row {where} is neither 0 nor 1; "
            "use betting or convex_order for losses in between."
        )
    return counts


def in_range(values: NDArray[np.floating[Any]], name: str, lower: float, upper: float) -> None:
    slack = TOLERANCE * (upper - lower)
    if values.size and values.min() >= lower - slack and values.max() <= upper + slack:
        return
    bad = (values < lower - slack) | (values > upper + slack)
    if bad.any():
        remedy = (
            "Declare the true bounds with lower= and upper=, or rescale."
            if name == "losses"
            else "Repair or rescale it."
        )
        raise RiskcalError(
            f"{name}: {values[bad][0]:.12g} at index {first(bad)} is outside [{lower:g}, {upper:g}]. {remedy}"
        )


def number(value: Any, name: str) -> float:
    try:
        scalar = on_the_host(value)
        if getattr(getattr(scalar, "dtype", None), "kind", "f") in "mMcSV" or isinstance(
            scalar, bytes
        ):
            raise TypeError
        result = float(scalar)
    except Exception:  # of whatever library it is
        raise RiskcalError(f"{name}: {shown(value)} is not a number.") from None
    if math.isnan(result):
        raise RiskcalError(f"{name}: is NaN; give a number.")
    return result


def several(value: Any, name: str) -> bool:
    """Whether a list or an array is given, rather than one number."""
    return isinstance(value, list | tuple) or as_given(value, name).ndim > 0


def numbers(values: Any, name: str) -> list[float]:
    """One number or a list of them, at least one."""
    found = (
        list(values)
        if isinstance(values, list | tuple)
        else as_given(values, name).ravel().tolist()
    )
    if not found:
        raise RiskcalError(f"{name}: the list is empty; give at least one.")
    return [number(value, name) for value in found]


def bounds(lower: Any, upper: Any) -> tuple[float, float]:
    low, high = number(lower, "lower"), number(upper, "upper")
    if not (
        math.isfinite(low) and math.isfinite(high) and low < high and math.isfinite(high - low)
    ):
        raise RiskcalError(
            f"lower, upper: [{low:g}, {high:g}] is not a finite range; give lower < upper."
        )
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
        raise RiskcalError(
            f"{name}: {result:g} is not strictly between 0 and 1{'; 0.05 is customary' if name in ('epsilon', 'level') else ''}."
        )
    return result


def truth(value: Any, name: str) -> bool:
    """A truth value."""
    if not isinstance(value, bool | np.bool_):
        raise RiskcalError(f"{name}: {shown(value)} is neither True nor False.")
    return bool(value)


def listed(values: Any, name: str, what: str) -> list[Any]:
    """What can be gone through, as a list."""
    with reading(name, what):
        return list(values)


def count(value: Any, name: str, *, least: int, most: int = 2**53) -> int:
    """A whole number; beyond 2^53 floats do not count."""
    if not is_whole(value) or value < least:
        raise RiskcalError(f"{name}: {shown(value)} is not a whole number of at least {least}.")
    if value > most:
        raise RiskcalError(
            f"{name}: {shown(value)} is more than {most}, the most that is possible."
        )
    return int(value)


def choice(value: Any, name: str, options: Collection[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise RiskcalError(
            f"{name}: {shown(value)} is unknown; choose one of {', '.join(map(repr, options))}."
        )
    return str(value)


def shares(values: ArrayLike, name: str) -> Floats:
    """Parts (k,) of one whole: none negative, one in total."""
    result = array(values, name, ndim=(1,))
    bad = result < 0
    if bad.any():
        raise RiskcalError(
            f"{name}: {result[bad][0]:g} at index {first(bad)} is negative; a share is not."
        )
    if abs(result.sum() - 1.0) > TOLERANCE:
        raise RiskcalError(
            f"{name}: sum to {result.sum():.12g}, not to 1; divide them by their sum."
        )
    return result


def threshold_grid(values: ArrayLike, *, allow_full: bool) -> Floats:
    """Thresholds (k,), distinct and none NaN; ``inf`` (the full model) only where ``allow_full``."""
    grid = as_given(values, "thresholds", "an array of numbers")
    if grid.dtype.kind == "b":
        raise RiskcalError(
            "thresholds: not an array of numbers (true and false are no thresholds)."
        )
    grid = as_numbers(grid, "thresholds")
    if grid.ndim != 1 or grid.size == 0:
        raise RiskcalError(
            f"thresholds: has shape {grid.shape}; give a 1-D array of at least one threshold."
        )
    bad = np.isnan(grid) | np.isneginf(grid) | (np.isposinf(grid) & (not allow_full))
    if bad.any():
        remedy = (
            "the full model is never a hypothesis: leave it out"
            if np.isposinf(grid[bad][0])
            else "give a number (inf, the full model's, also where low thresholds are the strict ones)"
            if allow_full
            else "give a number"
        )
        raise RiskcalError(f"thresholds: {grid[bad][0]} at index {first(bad)}; {remedy}.")
    _, where, counts = np.unique(grid, return_index=True, return_counts=True)
    if (counts > 1).any():
        raise RiskcalError(
            f"thresholds: {grid[where[counts > 1][0]]:g} is given more than once; list each once."
        )
    return grid
