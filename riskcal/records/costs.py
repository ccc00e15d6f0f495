"""Costs of any name: what may be one, and the numbers that it may have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import CANDIDATE_COLUMNS
from riskcal.records import alignment, candidates, exits
from riskcal.records import names as names_
from riskcal.records.advice import ROUNDING
from riskcal.records.exits import Lengths, PerExit

#: Costs that a table of runs has columns for without being told.
COSTS = ("layers", "tokens", "seconds", "flops")

#: Names that mean something else in records or in a calibration's table.
_TAKEN = frozenset(
    ("threshold", *CANDIDATE_COLUMNS, *names_.NO_SETTINGS, *names_.OF_TRACES, *names_.RESULTS)
)

#: Of a cost that was given without one.
UNNAMED = "cost"


def among(names: Iterable[str]) -> list[str]:
    """The costs among what was measured: those that every table knows first, then others as they stand."""
    given = [name for name in names if name not in names_.OUTCOMES]
    return [*(name for name in COSTS if name in given), *(n for n in given if n not in COSTS)]


def refuse_name(name: Any) -> str:
    """The name of a cost, if it can be one."""
    if not isinstance(name, str) or not name:
        raise RiskcalError(f"costs: {_validate.shown(name)} is no name of a cost; give a text.")
    if name in _TAKEN or name.startswith(("loss_", "full_")):
        raise RiskcalError(f"costs: {name!r} has a meaning of its own; give the cost another name.")
    return name


def named(costs: Any) -> dict[str, Any]:
    """Costs by name, of a mapping; a single array has the name ``cost``."""
    if costs is None:
        return {}
    given = costs if isinstance(costs, Mapping) else {UNNAMED: costs}
    return {refuse_name(name): value for name, value in given.items()}


def refuse_impossible(values: NDArray[Any], name: str, where: Any = _validate.first) -> None:
    """Refuse costs that are negative, beyond rounding, or not finite."""
    bad = ~((values >= -_validate.TOLERANCE) & (values < np.inf))
    if bad.any():
        raise RiskcalError(
            f"{name}: {values[bad][0]} at index {where(bad)} ({int(bad.sum())} such values); a cost is a finite number of at "
            "least 0. Give what was spent, failed or not."
        )


def of_shape(given: Any, name: str, shape: tuple[int, ...], rows: str, grid: Floats) -> Floats:
    """A cost (n, k), or of each candidate (k,), alike for all of what ``rows`` are called; its names are not another ``grid``."""
    alignment.refuse_other_thresholds(given, grid, f"costs: {name}")
    cost = _validate.array(given, f"costs: {name}", ndim=(1, 2))
    if cost.shape not in (shape, shape[1:]):
        raise RiskcalError(
            f"costs: {name!r} has shape {cost.shape}; expected {shape}, or {shape[1:]} for all {rows}."
        )
    refuse_impossible(cost, f"costs: {name}")
    return np.broadcast_to(_not_negative(cost), shape)


def _not_negative(costs: NDArray[Any]) -> NDArray[Any]:
    """Costs without the errors of rounding that `refuse_impossible` lets below 0."""
    return np.maximum(costs, 0) if costs.size and costs.min() < 0 else costs


def per_exit(given: Any, name: str, lengths: Lengths | None, levels: PerExit) -> Any:
    """A cost of each row at each exit (`PerExit`), or of each exit for all rows (L,)."""
    label = name if name == UNNAMED else f"cost {name}"
    longest = int(levels.counts.max())
    one_for_all = exits.of_all_rows(given, label, longest)
    if one_for_all is not None:
        return refuse_no_totals(one_for_all, given, label)
    alignment.refuse_unordered_exits(given, label)
    found = PerExit.read(given, label, lengths).as_numbers()
    exits.refuse_other_lengths(found, levels, label, "confidence")
    refuse_impossible(found.values, label, found.where)
    found = PerExit(_not_negative(found.values), found.lengths)
    call = "{}(prices, axis=1)" if found.lengths is None else "[{}(row) for row in prices]"
    _refuse_falling(found, label, call)
    return PerExit(found.values.astype(np.float64), found.lengths)


def refuse_no_totals(values: Floats, given: Any, name: str) -> Floats:
    """Costs (L,) of all rows, if each is what a decision has cost in all by that exit; ``given`` may name the exits."""
    alignment.refuse_unordered_exits(given, name, one_row=True)
    refuse_impossible(values, name)
    values = _not_negative(values)
    _refuse_falling(PerExit(values[None]), name, "{}(prices)")
    return values


def _refuse_falling(costs: PerExit, name: str, call: str) -> None:
    """Refuse costs that are less at an exit than at the one before, which whoever stops there has paid, too.

    ``call`` is how a function of numpy goes over the exits.
    """
    flat = costs.values.reshape(-1)
    falls = np.zeros(flat.shape, dtype=bool)
    falls[1:] = flat[1:] < flat[:-1] * (1.0 - ROUNDING)
    falls[np.cumsum(costs.counts[:-1])] = False  # another row's first exit
    if falls.any():
        place = int(falls.argmax())
        one_row = len(costs.counts) == 1
        where = place if one_row else costs.where(falls.reshape(costs.values.shape))
        raise RiskcalError(
            f"{name}: {flat[place]:g} at index {where} is less than {flat[place - 1]:g} at the exit before; a cost is what a "
            "decision has cost in all if it stops at that exit, everything before it included. If these are the prices of the "
            f"stages, give their sums, {call.format('np.cumsum')}. If they are totals that were measured, which fall by noise, "
            f"give the largest so far, {call.format('np.maximum.accumulate')}."
        )


def columns_named(names: Any, candidate_columns: Sequence[str]) -> list[str]:
    """The columns of a table that were named as costs, beside those of `COSTS`."""
    found = [refuse_name(name) for name in candidates.column_names(names, "costs")]
    for name in found:
        if name in candidate_columns:
            raise RiskcalError(
                f"costs: {name!r} tells candidates apart; a cost is what a run took."
            )
    return [name for name in dict.fromkeys(found) if name not in COSTS]
