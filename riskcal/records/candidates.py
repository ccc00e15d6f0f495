"""What tells candidates apart: the threshold, and every further setting that was recorded."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import SCHEDULE_COLUMNS
from riskcal.policy.columns import recorded_limit
from riskcal.records import advice, columns
from riskcal.records.columns import plain

#: Coordinates that are texts: names, and objects of JSON.
TEXTS = frozenset(("measure", "form", "policy", "thresholds", "learned"))


def varying(candidates: pd.DataFrame) -> list[str]:
    """The columns that tell candidates apart; the threshold, if there is but one candidate.

    Vectors of thresholds of one learned risk are told apart, and ordered, by the one number that they stand for.
    """
    names = [str(name) for name in candidates.columns if candidates[name].nunique(dropna=False) > 1]
    if "learned" in names and len({recorded_limit(t).risk for t in candidates["learned"]}) == 1:
        names = [name for name in names if name not in ("thresholds", "learned")]
    return names or ["threshold"]


def only_threshold(candidates: pd.DataFrame) -> bool:
    """Whether candidates differ in their thresholds alone, which have an order of their own."""
    return varying(candidates) == ["threshold"]


def on_curves(coordinates: Sequence[str]) -> bool:
    """Whether a curve over thresholds shows candidates, or one for each value of a further coordinate.

    Not of vectors, which a ``threshold`` only numbers.
    """
    return "threshold" in coordinates and "thresholds" not in coordinates and len(coordinates) <= 2


def column_names(given: Any, what: str = "candidate_columns") -> list[str]:
    """The names of further columns, those that tell candidates apart for instance, as a list, if they are one."""
    listed = isinstance(given, Iterable) and not isinstance(given, str)
    names = list(given) if listed else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise RiskcalError(f"{what}: {_validate.shown(given)} is no list of names of columns.")
    return names


def as_numbers(column: pd.Series) -> Floats:
    """Thresholds as numbers, ``"full"`` as ``inf``; NaN where a cell is none."""
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return columns.floats(column)
    given = [math.inf if columns.is_full(v) else v for v in column]
    return columns.floats(
        pd.Series([None if isinstance(v, bool) else v for v in given], dtype=object)
    )


def thresholds(column: pd.Series) -> Floats:
    """Numbers, with ``"full"`` read as ``inf``; NaN and minus infinity are refused."""
    values = as_numbers(column)
    bad = np.isnan(values) | np.isneginf(values)
    if bad.any():
        row = int(bad.argmax())
        word = plain(column.iloc[row])
        said = (
            f" If {word!r} means that, replace it before reading."
            if isinstance(word, str) and word
            else ""
        )
        raise RiskcalError(
            f"threshold: {word!r} at row {column.index[row]} is not a threshold; give a number, or 'full' for "
            f"the full model.{said}"
        )
    return values


def settings(column: pd.Series, name: str) -> pd.Series:
    """A column of settings as `columns.as_numpy` has it: decimals are numbers, as is ``"full"``, infinity, beside numbers.

    A column of texts stays one: certificates say which candidates there were, as they were read.
    """
    column = columns.as_numpy(column, name)
    kinds = set(map(type, column)) if column.dtype == object else set()
    decimal = any(issubclass(kind, Decimal | Fraction) for kind in kinds)
    if not decimal and not (len(kinds) > 1 and any(issubclass(kind, str) for kind in kinds)):
        return column
    given = [
        _float(value, name, row) if isinstance(value, Decimal | Fraction) else value
        for row, value in column.items()
    ]
    full = np.array([columns.is_full(value) for value in given])
    number = np.array([_validate.is_number(value) and value == value for value in given])
    # the full model's rows need none; where another lacks it, `refuse_coordinate` says so
    missing = np.array([columns.is_missing(value) for value in given])
    if full.any() and number.any() and (full | number | missing).all():
        given = [
            math.inf if word else math.nan if none else value
            for value, word, none in zip(given, full, missing, strict=True)
        ]
    return pd.Series(given, column.index, dtype=object).infer_objects()


def _float(value: Decimal | Fraction, name: str, row: Any) -> Any:
    """The float nearest to a decimal; one that is missing as it is."""
    number = columns.as_number(value)
    if number is None and not (isinstance(value, Decimal) and value.is_nan()):
        raise RiskcalError(
            f"{name}: {_validate.shown(value)} at row {row} is beyond what a float holds, 1.8e308; give 'full' for a threshold "
            "that nothing reaches."
        )
    return value if number is None else number


def with_objects_as_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with settings that are JSON, which JSON lines may hold as objects, as texts throughout."""
    texts = {
        name: pd.Series(
            [_as_text(cell, name, row) for row, cell in frame[name].items()],
            frame.index,
            dtype=object,
        )
        for name in ("policy", "learned")
        if name in frame.columns and frame[name].dtype == object
    }
    return frame.assign(**texts)


def _as_text(cell: Any, name: str, row: Any) -> Any:
    if not isinstance(cell, dict):
        return cell
    return json.dumps(_of_one_meaning(cell, cell, name, row), sort_keys=True)


def with_vectors(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with its column ``thresholds``, a list or an object of layers and thresholds in each row, as texts.

    The column ``threshold`` names the vectors, by numbers along a path, say, and tells which rows are the full model's.
    """
    threshold = columns.as_numpy(frame["threshold"], "threshold")
    is_full = np.isposinf(thresholds(threshold))
    column = columns.as_numpy(frame["thresholds"], "thresholds")
    texts = [
        "" if full else json.dumps(_vector(cell, row))
        for row, cell, full in zip(frame.index, column, is_full, strict=True)
    ]
    return frame.assign(thresholds=texts)


def _vector(cell: Any, row: int) -> dict[int, float]:
    """Thresholds by layer, ascending; an exit that is never taken (inf, ``"full"``, null) is left out.

    So is NaN in an array: Arrow's nulls become that in numpy's, and nothing tells the two apart. In a list it is refused.
    """
    given = cell
    if isinstance(cell, str):
        try:
            given = _validate.from_json(cell, each_name_once=True)
        except ValueError:
            given = None
    if hasattr(given, "tolist"):  # an array or a tensor
        held = given.tolist()
        given = (
            [None if columns.is_missing(v) else v for v in held] if isinstance(held, list) else held
        )
    if isinstance(given, list | tuple):
        pairs = all(isinstance(entry, tuple) and len(entry) == 2 for entry in given)  # Arrow's maps
        given = dict(given if pairs else enumerate(given, start=1))
    if not isinstance(given, dict):
        raise RiskcalError(
            f"thresholds: {_validate.shown(plain(cell))} at row {row} is neither a list of one threshold per exit nor an object "
            "of layers and thresholds. If the column means something else here, leave it out or name it otherwise, with "
            "columns={'thresholds_logged': 'thresholds'}."
        )
    if isinstance(given, _validate.Repeated):
        raise RiskcalError(
            f"thresholds: {_validate.shown(plain(cell))} at row {row}: {given.said}."
        )
    found = {}
    for layer, value in given.items():
        whole = _validate.is_whole(layer) or (
            isinstance(layer, str) and layer.isdecimal() and len(layer) < 10
        )
        if not whole or not 1 <= int(layer) < 2**31 or isinstance(value, bool | np.bool_):
            raise RiskcalError(
                f"thresholds: {_validate.shown(plain(cell))} at row {row}; give a number for each layer, from 1."
            )
        never = value is None or columns.is_full(value)
        place = f"thresholds: layer {_validate.shown(layer)} at row {row}"
        number = math.inf if never else _validate.number(value, place)
        if number == -math.inf:
            raise RiskcalError(f"{place}: -inf is no threshold; give a finite number.")
        if number < math.inf:
            found[int(layer)] = number
    if not found:
        raise RiskcalError(
            f"thresholds: {_validate.shown(plain(cell))} at row {row} exits nowhere; that is the full model, threshold 'full'."
        )
    return dict(sorted(found.items()))


def refuse_coordinate(column: pd.Series, name: str) -> None:
    """Refuse what cannot tell candidates apart, or would be rounded on its way into a policy; rows keep their numbers.

    A schedule's columns alone may be empty: such a candidate's threshold does not decay. An empty text is a CSV's null.
    """
    empty = np.array([isinstance(value, str) and not value for value in column], dtype=bool)
    with _validate.reading(name, "a column of numbers or texts"):
        missing = column.isna().to_numpy() | empty
    if missing.any() and name not in SCHEDULE_COLUMNS:
        raise RiskcalError(
            f"{name}: missing at row {column.index[int(missing.argmax())]} ({int(missing.sum())} such rows); every candidate "
            f"has one. Fill it in ('full' for a threshold that nothing reaches), or leave the column {name} out if nothing is "
            "known of it."
        )
    given = column[~missing]
    with suppress(TypeError):  # a list has no hash, and is refused below
        given = given.drop_duplicates()
    for row, value in given.items():
        if not isinstance(
            value, str | bool | int | float | np.bool_ | np.integer | np.floating
        ) or isinstance(value, np.timedelta64):  # which numpy calls an integer
            raise RiskcalError(
                f"{name}: {value!r} at row {row}; a coordinate of a candidate is a number, a text or a truth value. Give each "
                "of several a column of its own, and name it in candidate_columns."
            )
        if name in TEXTS and not isinstance(value, str):
            raise RiskcalError(
                f"{name}: {plain(value)!r} at row {row} is not a text; write its name."
            )
        if name in ("policy", "learned") and not _is_json_object(str(value), name, row):
            raise RiskcalError(
                f"{name}: the records hold {_validate.shown(plain(value))} at row {row}, which is no JSON object, as it is in a "
                f"recording. {advice.other_meaning(name)} Where it tells candidates apart, columns={{'arm': {name!r}}} and "
                f"candidate_columns=['arm'] (--columns arm={name} --coordinate arm)."
            )
        _refuse_what_no_policy_can_hold(value, name, row)
        if name in ("min_layer", "max_length") and (
            isinstance(value, str | bool | np.bool_) or value % 1 or value < 1
        ):
            raise RiskcalError(
                f"{name}: {plain(value)!r} at row {row} is not a whole number of at least 1; repair it."
            )
    kinds = [
        str if isinstance(value, str) else bool if isinstance(value, bool | np.bool_) else float
        for value in given
    ]
    other = [row for row, kind in zip(given.index, kinds, strict=True) if kind is not kinds[0]]
    if other:
        raise RiskcalError(
            f"{name}: {plain(given[other[0]])!r} at row {other[0]} is of another type than {plain(given.iloc[0])!r} at row "
            f"{given.index[0]}; give numbers throughout, texts, or truth values."
        )


def _is_json_object(text: str, name: str, row: Any) -> bool:
    found: Any = None
    with suppress(ValueError):
        found = _validate.from_json(text, each_name_once=True)
    return isinstance(_of_one_meaning(found, text, name, row), dict)


def _of_one_meaning(found: Any, cell: Any, name: str, row: Any) -> Any:
    """What JSON held, unless a name stands twice in an object of it."""
    try:
        return _validate.of_one_meaning(found)
    except ValueError as error:
        raise RiskcalError(f"{name}: {_validate.shown(cell)} at row {row}: {error}.") from None


def _refuse_what_no_policy_can_hold(value: Any, name: str, row: Any) -> None:
    """Values of a coordinate that could be recorded, and neither written nor decoded with."""
    if isinstance(value, str):
        if name == "temperature":
            raise RiskcalError(f"{name}: {value!r} at row {row} is a text; write a number.")
        if not columns.is_unicode(value):
            raise RiskcalError(
                f"{name}: {value!r} at row {row} is not valid Unicode (a lone surrogate); repair it."
            )
        return
    if isinstance(value, float | np.floating) and value == -math.inf:
        raise RiskcalError(
            f"{name}: -inf at row {row}; a policy and JSON hold no such number: give a finite one."
        )
    if isinstance(value, int | np.integer) and not -(2**63) <= int(value) < 2**63:
        raise RiskcalError(
            f"{name}: {plain(value)!r} at row {row} is not a number of 64 bits; give another, or a text."
        )
    if name == "temperature" and (isinstance(value, bool | np.bool_) or not 0 < value < math.inf):
        raise RiskcalError(
            f"{name}: {plain(value)!r} at row {row} is no finite number above 0; leave it empty where nothing decays. It is that "
            f"of a decaying schedule, not of sampling. {advice.other_meaning(name)}"
        )


def among(frame: pd.DataFrame, ran: NDArray[np.intp]) -> tuple[pd.DataFrame, NDArray[np.intp]]:
    """The distinct candidates, from the highest threshold down, and which of them each row is.

    ``frame`` has the columns that tell candidates apart, the threshold first. Rows other than ``ran`` are the full model's,
    whose coordinates mean nothing: they are -1.
    """
    rows = frame if len(ran) == len(frame) else frame.iloc[ran]
    found = pd.factorize(rows["threshold"])[0]
    for name in rows.columns[1:]:
        own, distinct = pd.factorize(rows[name])
        found = pd.factorize(found * (len(distinct) + 1) + own + 1)[0]
    first = np.empty(found.max() + 1, dtype=np.intp)
    first[found[::-1]] = np.arange(len(ran))[::-1]
    names = list(rows.columns)
    ascending = [name != "threshold" for name in names]
    candidates = rows.iloc[first].reset_index(drop=True).sort_values(names, ascending=ascending)
    place = np.empty(len(first), dtype=np.intp)
    place[candidates.index] = np.arange(len(first))
    code = np.full(len(frame), -1, dtype=np.intp)
    code[ran] = place[found]
    return candidates.reset_index(drop=True), code
