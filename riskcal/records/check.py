"""Every problem of a log at once, with its rows, its remedy and, where a renaming would mend it, the options that do."""

import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal._validate import RiskcalError
from riskcal.records import (
    candidates,
    direction,
    guessing,
    nulls,
    problems,
    reading,
    renaming,
    retries,
    traces,
)
from riskcal.records import costs as costs_
from riskcal.records.preparing import prepared


@dataclass(frozen=True)
class Finding:
    """One problem of a log.

    Attributes
    ----------
    column : str
        Where it is.
    problem : str
        What it is, in the words in which `Runs.from_frame` refuses it.
    rows : tuple of int
        All rows that have it, counted from 0; none where the column itself is missing.
    remedy : str
    mend : tuple of str
        Options of the command line that mend it, ``--columns prompt=request_id``, where some would.

    Examples
    --------
    >>> from riskcal.records import check
    >>> (finding,) = check.findings({"prompt": [1, 2], "threshold": [0.5, 0.5], "dissimilarity": [0.1, 1.3]})
    >>> finding.column, finding.rows
    ('dissimilarity', (1,))
    >>> print(finding.problem)
    1.3 at row 1
    """

    column: str
    problem: str
    rows: tuple[int, ...]
    remedy: str
    mend: tuple[str, ...] = ()


def findings(
    table: Any,
    *,
    candidate_columns: Sequence[str] = (),
    costs: Sequence[str] = (),
    lower_is_stricter: bool = False,
    columns: renaming.Columns | None = None,
    keep: retries.Keep | None = None,
    is_json: bool = False,
) -> list[Finding]:
    """All problems of a table, and none exactly where `Runs.from_frame` with the same arguments reads it.

    What a first problem hides is looked at as if that one were mended. ``is_json`` says that the table was read from JSON
    lines, as `Runs.read` knows.

    Examples
    --------
    >>> from riskcal.records import check
    >>> log = {"request_id": ["a", "b"], "threshold": [0.5, 0.5], "dissimilarity": [0.1, 1.3]}
    >>> for finding in check.findings(log):
    ...     print(finding.column, finding.rows, finding.mend)
    prompt () ('--columns prompt=request_id',)
    dissimilarity (1,) ()
    """
    frame = renaming.of_table(table, columns)
    settings = candidates.column_names(candidate_columns)
    sources = renaming.sources(columns)

    further = costs_.columns_named(costs, settings)

    def accept(given: pd.DataFrame, costs: Sequence[str] = further) -> None:
        direction.of_frame(given, lower_is_stricter)
        reading.fields_of(given, settings, costs)

    refused = _refusal(
        lambda: accept(prepared(table, settings, columns, keep, further, is_json=is_json))
    )
    if refused is None:
        return []
    found = [*_twice_named(frame)]
    frame = frame.loc[:, ~frame.columns.duplicated()]
    proposals = guessing.required(frame)
    guesses = renaming.options([*proposals.values()])
    found += _missing(frame, [*settings, *further], proposals)
    frame = renaming.renamed(frame, guesses)
    further = [cost for cost in further if cost in frame.columns]  # the others are said
    if not {"dissimilarity", "risk"} & set(frame.columns):
        frame = frame.assign(risk=0.0)  # to see what else there is
    sources = renaming.sources(guesses) | sources
    frame = _without_retries(frame, keep, settings, sources, further, found)
    name = sources.get("threshold", "threshold")

    def whole(given: pd.DataFrame) -> pd.DataFrame:
        return nulls.as_full_model(given, is_json=is_json, name=name)

    found += _peeled(frame, whole, partial(accept, costs=further), settings, sources)
    return found or [_of(refused)]


def findings_of_traces(table: Any, *, columns: renaming.Columns | None = None) -> list[Finding]:
    """The first problem of a table of traces; none exactly where `Traces.from_frame` with the same arguments reads it.

    Examples
    --------
    >>> from riskcal.records import check
    >>> log = {"prompt": [1, 2], "position": [0, 0], "confidence": [[0.9, 1.0], [0.4, 1.0]], "agrees": [[1, 1], [2, 1]]}
    >>> for finding in check.findings_of_traces(log):
    ...     print(f"{finding.column}: {finding.problem}")
    agrees: 2 at index [1, 0] is outside [0, 1]
    """
    refused = _refusal(lambda: traces.Traces.from_frame(table, columns=columns))
    return [] if refused is None else [_of(refused)]


def _peeled(
    frame: pd.DataFrame,
    whole: Callable[[pd.DataFrame], pd.DataFrame],
    accept: Callable[[pd.DataFrame], Any],
    settings: Sequence[str],
    sources: Mapping[str, str],
) -> Iterator[Finding]:
    """What reading refuses, one problem after the other, each out of the way before the next is looked for.

    ``whole`` fills the nulls of the full model's rows, or refuses them, and ``accept`` refuses the rest.
    """
    said: set[str] = set()
    unplaced = 0  # rows of unknown prompts, which other prompts then seem to lack
    while {"prompt", "threshold", *settings} <= set(frame.columns):
        error = _refusal(partial(whole, frame))
        if error is None:
            frame = whole(frame)  # so that no row counts whose null says what it should
            error = _refusal(partial(accept, frame))
        if error is None or str(error) in said:
            return
        said.add(str(error))
        one = _of(error)
        rows = problems.rows(frame, one.column, str(error), settings)
        mend = problems.mend(frame, one.column, str(error), rows, sources)
        if "lacks the" not in str(error) or rows.sum() > unplaced:
            yield replace(one, rows=tuple(map(int, frame.index[rows])), mend=mend)
        nameless = one.column == "prompt" and problems.no_labels(frame["prompt"], "prompt").any()
        unplaced += int(rows.sum()) if nameless else 0
        frame = problems.without(frame, one.column, str(error), rows, sources)
        if problems.too_few(frame):
            return


def _refusal(call: Callable[[], Any]) -> RiskcalError | None:
    """What a call refuses, and None if it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except RiskcalError as error:
        return error
    return None


def _of(error: RiskcalError) -> Finding:
    """A finding in the words of a refusal: what is wrong up to the first stop after its row, and what to do."""
    column, _, said = str(error).partition(": ")
    problem, remedy = _split(said)
    return Finding(column, problem, (), remedy)


def _split(said: str) -> tuple[str, str]:
    # what stands before the row is the cell, which may hold stops of its own
    row = re.search(r"\brow \d", said)
    stops = [at for stop in ("; ", ". ") if (at := said.find(stop, row.end() if row else 0)) >= 0]
    if not stops:
        return said.removesuffix("."), ""
    remedy = said[min(stops) + 2 :]
    return said[: min(stops)], remedy[:1].upper() + remedy[1:]


def _twice_named(frame: pd.DataFrame) -> Iterator[Finding]:
    for name in frame.columns[frame.columns.duplicated()].unique():
        yield Finding(str(name), "two columns have this name", (), "Rename or drop one.")


def _missing(
    frame: pd.DataFrame, settings: Sequence[str], proposals: Mapping[str, str]
) -> Iterator[Finding]:
    """The columns that are not there, with the one that is likely to be it."""
    loss = next(
        (name for name in proposals if name in ("dissimilarity", "risk")), "dissimilarity, risk"
    )
    measured = {"dissimilarity", "risk"} & set(frame.columns)
    have = ", ".join(renaming.names_in(frame)) or "none"
    for name in ("prompt", "threshold", *settings, *(() if measured else (loss,))):
        if name in proposals:
            option = f"--columns {shlex.quote(proposals[name])}"
            likely = (
                f"It seems to be {proposals[name].partition('=')[2]}: {option}, if that is right."
            )
            yield Finding(name, "the column is missing", (), likely, (option,))
        elif name not in frame.columns:
            what = (
                "both columns are missing"
                if name == "dissimilarity, risk"
                else "the column is missing"
            )
            remedy = f"Record it, or say with --columns which of these it is: {have}."
            if name == "threshold":
                remedy += " What all stages said of a request, in one row, are traces: riskcal.Traces.from_arrays."
            yield Finding(name, what, (), remedy)


def _without_retries(
    frame: pd.DataFrame,
    keep: retries.Keep | None,
    settings: Sequence[str],
    sources: Mapping[str, str],
    costs: Sequence[str],
    found: list[Finding],
) -> pd.DataFrame:
    """The rows that were served, by the rule given, or by one that is likely."""
    if not {"prompt", "threshold", *settings} <= set(frame.columns):
        return frame
    nameless = problems.no_labels(frame["prompt"], "prompt")
    known = frame[~nameless]
    rules = [keep] if keep else [("last", name) for name in guessing.attempts(frame)]
    for rule in rules:
        try:
            again = retries.repeated(known, settings)
            served = retries.served(known, rule, settings, sources, costs)
        except RiskcalError as error:
            if keep:
                found.append(_of(error))
            continue
        if not keep and again.any():
            found.append(_retried(known, again, rule[1]))
        if keep or again.any():
            return pd.concat([served, frame[nameless]]).sort_index()
    return frame


def _retried(frame: pd.DataFrame, again: NDArray[np.bool_], name: str) -> Finding:
    option = f"--keep {shlex.quote(f'last:{name}')}"
    return Finding(
        "prompt",
        f"{int(again.sum())} rows repeat a prompt and candidate",
        tuple(map(int, frame.index[again])),
        f"They seem to be retries: {option} if {name} puts them in order and the last was served, or first if the first was. "
        "Several samples of one prompt are none: give each a prompt of its own, and name the prompt they share in a column "
        "cluster.",
        (option,),
    )
