"""Requests that were tried again: of several rows of one prompt and candidate the one that was served, by a rule fixed before."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.policy import CANDIDATE_COLUMNS
from riskcal.records import candidates as candidates_
from riskcal.records import columns as table_columns
from riskcal.records import names as names_
from riskcal.records.costs import COSTS

#: Which attempt was served, the last or the first, and the column that puts attempts in order.
Keep = tuple[Literal["last", "first"], str]

_ZONE = re.compile(r"(Z|z|[+-]\d\d:?\d\d|[T ]\d\d.*[+-]\d\d)$")


def served(
    frame: pd.DataFrame,
    keep: Keep | None,
    candidate_columns: Sequence[str],
    sources: Mapping[str, str],
    costs: Sequence[str] = (),
) -> pd.DataFrame:
    """The rows that were served, under their numbers; where it was the last attempt, what it cost is what all did.

    ``sources`` says how the log called a column that now has another name, ``costs`` which columns are costs of other names.
    Mean layers per token do not add up, and are those of the attempt that was served.
    """
    if keep is None:
        return frame
    which, name = _parsed(keep)
    outcomes = {*names_.OUTCOMES, *COSTS, *costs}
    outcomes |= {sources[column] for column in outcomes if column in sources}
    if name in outcomes:
        raise RiskcalError(
            f"keep: {name} is a result of the attempt, and to keep one by its result would select on the outcome; name the "
            "column that counts the attempts, or says when each began."
        )
    table_columns.require(frame, ["prompt", "threshold", *candidate_columns])
    if name not in frame.columns:
        have = ", ".join(map(str, frame.columns))
        raise RiskcalError(f"keep: the table has no column {name!r}; it has: {have}.")
    _refuse_truths(frame[name], name)
    rank = _ranks(frame[name], name)
    cells = coded(frame, candidate_columns)
    _refuse_ties(frame, name, cells, rank)
    again = np.bincount(cells)[cells] > 1
    if which == "last":
        additive = [name for name in (*COSTS, *costs) if name != "layers" and name in frame.columns]
        frame = frame.assign(**_totals(frame, additive, cells, again))
    order = np.lexsort((rank, cells))
    ends = np.r_[True, np.diff(cells[order]) > 0]
    if which == "last":
        ends = np.r_[ends[1:], True]
    return frame.iloc[np.sort(order[ends])]


def option(text: str | None) -> Keep | None:
    """What the command line says of retries: ``last:attempt``."""
    if text is None:
        return None
    which, _, name = text.partition(":")
    if which not in ("last", "first") or not name:
        raise RiskcalError(f"--keep: {text!r} is neither last:COLUMN nor first:COLUMN.")
    return ("last" if which == "last" else "first"), name


def _parsed(keep: Any) -> Keep:
    pair = keep if isinstance(keep, tuple | list) else ()
    if len(pair) != 2 or pair[0] not in ("last", "first") or not isinstance(pair[1], str):
        raise RiskcalError(
            f"keep: {_validate.shown(keep)} says not which attempt was served; give ('last', 'attempt') or ('first', 'attempt'), "
            "with the name of the column that counts them."
        )
    return pair[0], pair[1]


def _ranks(column: pd.Series, name: str) -> NDArray[np.intp]:
    """Where each row stands in order: by numbers, dates, or texts of one of these; other texts have no order that is sure."""
    missing = _missing(column, name)
    if missing.any():
        raise RiskcalError(
            f"{name}: missing at row {column.index[int(missing.argmax())]} ({int(missing.sum())} such rows); attempts are "
            "kept by it, and every row needs one. Where a request was never tried again, 0 will do."
        )
    values: Any
    texts = [isinstance(value, str) for value in column]
    with _validate.reading(name, "a column of numbers or times"):
        if pd.api.types.is_datetime64_any_dtype(column.dtype):
            values = pd.to_datetime(column, utc=True)
        elif (whole := _whole(column)) is not None:
            values = whole
        elif np.isnan(numbers := table_columns.floats(column)).any():
            if not all(texts):
                raise ValueError(
                    f"it holds {_validate.shown(column.iloc[int(np.isnan(numbers).argmax())])}"
                )
            _refuse_zones(column, name)
            values = _times(column)
        else:
            column = table_columns.as_numpy(column, name)
            values = column if pd.api.types.is_integer_dtype(column.dtype) else numbers
        return np.asarray(pd.factorize(values, sort=True)[0])


def _times(column: pd.Series) -> pd.Series:
    values = pd.to_datetime(column, utc=True, format="ISO8601", errors="coerce")
    if values.isna().any():
        row = int(values.isna().to_numpy().argmax())
        raise ValueError(
            f"{_validate.shown(column.iloc[row])} at row {column.index[row]}, {int(values.isna().sum())} such rows, is neither a "
            "number nor a time as ISO 8601 writes it; number the attempts"
        )
    return values


def _refuse_truths(column: pd.Series, name: str) -> None:
    if any(isinstance(value, bool | np.bool_) for value in column):
        raise RiskcalError(
            f"keep: {name} holds truth values, which put no attempts in order, and often say what came of one; name the column "
            "that counts the attempts, or says when each began."
        )


def _whole(column: pd.Series) -> NDArray[np.object_] | None:
    """Whole numbers of any size as they are, in objects or texts; None where they are others, or numpy has them already."""
    if column.dtype.kind != "O" and not isinstance(column.iloc[0], str):
        return None
    texts = [str(value).strip() for value in column]
    if not all(text.removeprefix("-").isdecimal() and len(text) < 1000 for text in texts):
        return None
    values = np.empty(len(texts), dtype=object)
    values[:] = [int(text) for text in texts]
    return values


def _refuse_zones(column: pd.Series, name: str) -> None:
    """Times of which some have a zone: what those without one mean cannot be known."""
    zoned = np.array([_ZONE.search(value.strip()) is not None for value in column], dtype=bool)
    if zoned.any() and not zoned.all():
        row = int(zoned.argmin())
        raise RiskcalError(
            f"{name}: {_validate.shown(column.iloc[row])} at row {column.index[row]} has no time zone, and others have one "
            f"({int((~zoned).sum())} rows have none); write all of them with theirs."
        )


def _missing(column: pd.Series, name: str) -> NDArray[np.bool_]:
    with _validate.reading(name, "a column of numbers or times"):
        empty = [isinstance(value, str) and not value.strip() for value in column]
        missing: NDArray[np.bool_] = column.isna().to_numpy(dtype=bool) | np.array(
            empty, dtype=bool
        )
        return missing


def repeated(frame: pd.DataFrame, candidate_columns: Sequence[str]) -> NDArray[np.bool_]:
    """The rows whose prompt and candidate stood before."""
    return pd.Series(coded(frame, candidate_columns)).duplicated().to_numpy()


def coded(
    frame: pd.DataFrame, candidate_columns: Sequence[str], *, of_prompts: bool = True
) -> NDArray[np.intp]:
    """The cell, prompt and candidate, of each row as a number, the same for all attempts at it; or its candidate alone."""
    keys = {
        "threshold": candidates_.as_numbers(table_columns.as_numpy(frame["threshold"], "threshold"))
    }
    if of_prompts:
        keys["prompt"] = table_columns.identifiers(frame["prompt"], "prompt").to_numpy()
    further = [name for name in CANDIDATE_COLUMNS if name in frame.columns]
    keys |= {name: frame[name].to_numpy() for name in (*further, *candidate_columns)}
    if "thresholds" in keys:  # lists and objects of layers, which nothing compares as they are
        with _validate.reading("thresholds", "lists or objects of thresholds"):
            texts = [json.dumps(cell, default=_as_list) for cell in keys["thresholds"]]
        keys["thresholds"] = np.array(texts, dtype=object)
    codes = {}
    for name, key in keys.items():
        with _validate.reading(name, "a column of numbers or texts"):
            codes[name] = pd.factorize(key, use_na_sentinel=False)[0]
    together = pd.DataFrame(codes).groupby([*codes], sort=False)
    return np.asarray(together.ngroup(), dtype=np.intp)


def _as_list(cell: Any) -> Any:
    """What JSON has no name for, as numpy reads it."""
    return np.asarray(cell).tolist()


def _refuse_ties(
    frame: pd.DataFrame, name: str, cells: NDArray[np.intp], rank: NDArray[np.intp]
) -> None:
    tied = pd.DataFrame({"cell": cells, "rank": rank}).duplicated().to_numpy()
    if tied.any():
        row = int(tied.argmax())
        value, prompt = (table_columns.plain(frame[c].iloc[row]) for c in (name, "prompt"))
        raise RiskcalError(
            f"{name}: {_validate.shown(value)} stands twice for one candidate of prompt {_validate.shown(prompt)}, again at row "
            f"{frame.index[row]} ({int(tied.sum())} such rows), so that it does not say which attempt was served. The very same "
            "rows again: keep one of each, with drop_duplicates(). Otherwise name a column in keep that counts the attempts."
        )


def _totals(
    frame: pd.DataFrame,
    names: Sequence[str],
    cells: NDArray[np.intp],
    again: NDArray[np.bool_],
) -> dict[str, pd.Series]:
    """What all attempts took together, where there are several; the user waits for all of them."""
    totals = {}
    for name in names:
        column = table_columns.as_numpy(frame[name], name)
        values = table_columns.floats(column)
        unknown = ~((values >= 0.0) & (values < np.inf)) & again
        if unknown.any():
            row = int(unknown.argmax())
            raise RiskcalError(
                f"{name}: {_validate.shown(table_columns.plain(column.iloc[row]))} at row {frame.index[row]} "
                f"({int(unknown.sum())} such rows), one of several attempts. The cost of all counts: give what each took, "
                f"failed or not; or leave {name} out if it is not known of all."
            )
        total = pd.Series(np.bincount(cells, np.where(again, values, 0.0))[cells], frame.index)
        totals[name] = total.where(again, column)
    return totals
