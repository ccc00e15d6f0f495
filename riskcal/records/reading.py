"""From a prepared long table, one row per prompt and candidate, to the arrays of `Runs`: every check of what was recorded.

Files are read in `riskcal.records.files`, and their tables made ready in `riskcal.records.preparing`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import CANDIDATE_COLUMNS, Stop
from riskcal.records import advice, columns, names, truths
from riskcal.records import candidates as candidates_
from riskcal.records import costs as costs_
from riskcal.records.columns import plain
from riskcal.records.order import tested_order


def fields_of(
    frame: pd.DataFrame, candidate_columns: Sequence[str], costs: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of `Runs` that a prepared table holds; what it must hold is said in `Runs.from_frame`."""
    candidate_columns = _settings(candidate_columns)
    further = costs_.columns_named(costs, candidate_columns)
    columns.require(frame, ["prompt", "threshold", *candidate_columns, *further])
    frame = _typed(frame, candidate_columns)
    prompt = columns.identifiers(frame["prompt"], "prompt")
    coordinates = [
        "threshold",
        *(c for c in (*CANDIDATE_COLUMNS, *candidate_columns) if c in frame.columns),
    ]
    coordinates = list(dict.fromkeys(coordinates))
    measured = [name for name in ("dissimilarity", "risk") if name in frame.columns]
    if not measured:
        raise RiskcalError("dissimilarity, risk: both columns are missing; record at least one.")
    spent = [*(name for name in costs_.COSTS if name in frame.columns), *further]
    is_full = np.isposinf(frame["threshold"].to_numpy())
    failed = (
        truths.of(frame["failed"], "failed")
        if "failed" in frame.columns
        else np.zeros(len(frame), dtype=bool)
    )
    values = _values(frame, measured, spent, failed, is_full)
    # of each row its prompt's number, by first appearance as in `ids` and `labels`; what is returned is in tested order
    code, ids = pd.factorize(prompt)
    n_prompts = len(ids)
    if n_prompts < 2:
        raise RiskcalError(
            f"prompt: only {n_prompts} prompt ({plain(ids[0])!r}, row {frame.index[0]}); at least two are needed."
        )
    labels = {
        name: label_of(frame, name, code, n_prompts)
        for name in ("cluster", "group", "text")
        if name in frame.columns
    }
    order = tested_order(ids)  # from first appearance to tested order: ids[order]
    rank = np.empty(n_prompts, dtype=np.intp)  # and back: what is in tested order, [rank]
    rank[order] = np.arange(n_prompts)
    prompt_of_row = rank[code]  # its place in tested order
    if failed.any():
        _credit_nobody(values, failed & is_full, is_full, code, n_prompts)
    if "failed" in frame.columns:
        values["failed"] = failed.astype(np.float64)

    for name in coordinates[1:]:
        candidates_.refuse_coordinate(frame.loc[~is_full, name], name)
    ran = np.flatnonzero(~is_full)
    if not ran.size:
        raise RiskcalError(
            "threshold: every row is the full model (inf); record at least one finite threshold."
        )
    candidates, candidate_of_row = candidates_.among(frame[coordinates], ran)
    _refuse_duplicates(
        prompt,
        frame["threshold"],
        prompt_of_row * (len(candidates) + 1) + candidate_of_row,
        is_full,
        full_once=candidates_.only_threshold(candidates),
        failed="failed" in frame,
    )
    place = prompt_of_row[ran], candidate_of_row[ran]
    shape = n_prompts, len(candidates)
    if len(ran) < n_prompts * len(candidates):
        present = np.zeros(shape, dtype=bool)
        present[place] = True
        _refuse_gaps(present[rank], ids, code, candidates, frame.index)

    def matrix(name: str) -> Floats:
        result = np.empty(shape)
        result[place] = values[name][ran]
        return result

    full: dict[str, Floats] = {}
    if is_full.any():
        lacking = np.bincount(code[is_full], minlength=n_prompts) == 0
        if lacking.any():
            which = int(lacking.argmax())
            raise RiskcalError(
                f"prompt: {plain(ids[which])!r} (row {frame.index[int((code == which).argmax())]}) lacks the full model's "
                "row (threshold inf), which other prompts have; record it for all or for none."
            )
        full = {
            name: _full_model(value[is_full], prompt_of_row[is_full], n_prompts, name, ids[order])
            for name, value in values.items()
        }
    source, exact = _provenance(frame)
    return {
        "prompts": np.asarray(ids)[order],
        "candidates": candidates,
        "values": {name: matrix(name) for name in values},
        "full": full,
        "full_risk": _full_risk(frame, full, code, order, rank),
        "labels": {name: label[order] for name, label in labels.items()},
        "source": source,
        "exact": exact,
        "stopped": _stopped(frame),
    }


def _settings(candidate_columns: Any) -> list[str]:
    """The names of further columns that tell candidates apart, if they can be settings of a decoder."""
    settings = candidates_.column_names(candidate_columns)
    others = [name for name in settings if name in names.NO_SETTINGS]
    if others:
        raise RiskcalError(
            f"candidate_columns: {others[0]!r} is no setting of the decoder; leave it out."
        )
    for name in settings:
        if name in names.RESULTS or name.startswith("loss_"):
            raise RiskcalError(
                f"candidate_columns: {name!r} is what a calibration's table calls a result; give the setting another name, "
                f"columns={{'my_{name}': {name!r}}} for instance."
            )
    return settings


def _typed(frame: pd.DataFrame, candidate_columns: Sequence[str]) -> pd.DataFrame:
    """The table with thresholds as numbers, and with numpy's types where cells are looked at one by one."""
    if "thresholds" in frame.columns:
        frame = candidates_.with_vectors(frame)
    cells = ("threshold", *CANDIDATE_COLUMNS, *candidate_columns)
    others = ("failed", "source", "exact", "stopped")
    there = [name for name in (*cells, *others) if name in frame.columns]
    numbers = {"threshold", *CANDIDATE_COLUMNS, *candidate_columns} - candidates_.TEXTS
    frame = frame.assign(
        **{
            name: (candidates_.settings if name in numbers else columns.as_numpy)(frame[name], name)
            for name in there
        }
    )
    frame = candidates_.with_objects_as_texts(frame)
    return frame.assign(threshold=candidates_.thresholds(frame["threshold"]))


def _values(
    frame: pd.DataFrame,
    measured: Sequence[str],
    spent: Sequence[str],
    failed: NDArray[np.bool_],
    is_full: NDArray[np.bool_],
) -> dict[str, Floats]:
    """The losses that were ``measured`` of each row, (N,), and what it ``spent``."""
    values = {
        name: columns.numbers(frame[name], name, 0.0, 1.0, failed, is_full) for name in measured
    }
    if "dissimilarity" in values:
        values["dissimilarity"][failed & is_full] = 0.0
    values |= {name: columns.numbers(frame[name], name, 0.0, math.inf) for name in spent}
    if "dissimilarity" in values:
        nonzero = is_full & (values["dissimilarity"] > _validate.TOLERANCE)
        if nonzero.any():
            row = int(nonzero.argmax())
            own = values["dissimilarity"][is_full]
            raise RiskcalError(
                f"dissimilarity: {values['dissimilarity'][row]:g} at row {frame.index[row]}, a full-model row; the full "
                f"model is at distance 0 from itself. {advice.of_own_distances(own, has_risk='risk' in values)}"
            )
    return values


def _credit_nobody(
    values: Mapping[str, Floats],
    failed: NDArray[np.bool_],
    is_full: NDArray[np.bool_],
    code: NDArray[np.intp],
    n_prompts: int,
) -> None:
    """In ``values``, where the full model's own output failed: nothing is near it, and no candidate is credited for its risk."""
    without = np.bincount(code[failed], minlength=n_prompts) > 0
    if "dissimilarity" in values:
        values["dissimilarity"][~is_full & without[code]] = 1.0
    if "risk" in values:
        values["risk"][failed] = 0.0


def _full_model(
    value: Floats, prompt: NDArray[np.intp], n_prompts: int, name: str, ids: Any
) -> Floats:
    """The full model's (P,), of one or more rows of each ``prompt``: with one outcome, and costs that are averaged."""
    # a sum of floats depends on its order, which must not be that of the rows
    together = np.lexsort((value, prompt))
    value, prompt = value[together], prompt[together]
    first = np.searchsorted(prompt, np.arange(n_prompts))
    count = np.diff(np.r_[first, len(prompt)])
    lowest, highest = value[first], value[first + count - 1]
    differs = highest - lowest > _validate.TOLERANCE
    if name in ("dissimilarity", "risk", "failed") and differs.any():
        which = int(differs.argmax())
        raise RiskcalError(
            f"{name}: the full model's rows of prompt {plain(ids[which])!r} differ ({lowest[which]:g} and {highest[which]:g}; "
            f"{int(differs.sum())} such prompts); it has one output for a prompt. Is the decoder deterministic? Settings with "
            "a full model each: calibrate each by itself, from a table of its own."
        )
    return np.where(highest > lowest, np.add.reduceat(value, first) / count, lowest)


def label_of(frame: pd.DataFrame, name: str, code: NDArray[np.intp], n: int) -> NDArray[Any]:
    """The label of each of n prompts, in order of first appearance; it may not change within a prompt."""
    column = columns.identifiers(frame[name], name).to_numpy()
    first_row = np.full(n, -1, dtype=np.intp)
    first_row[code[::-1]] = np.arange(len(code))[::-1]
    changed = column != column[first_row[code]]
    if np.any(changed):
        row = int(np.argmax(changed))
        raise RiskcalError(
            f"{name}: {plain(column[row])!r} at row {frame.index[row]}, but {plain(column[first_row[code[row]]])!r} earlier "
            f"for the same prompt {plain(frame['prompt'].iloc[row])!r}; a {name} belongs to the prompt and is constant within it."
            + (f" {advice.of_tasks(name)}" if name == "group" else "")
            + f" {advice.other_meaning(name)}"
        )
    label = column[first_row]
    if name == "text":
        again = pd.Series(label).duplicated()
        if "cluster" in frame.columns:  # the remedy: one text, one cluster
            unit = pd.DataFrame(
                {"text": label, "cluster": frame["cluster"].to_numpy()[first_row]}
            ).drop_duplicates()
            again &= pd.Series(label).isin(unit["text"][unit["text"].duplicated()])
        if again.any():
            _validate.warn(
                f"text: prompt {plain(frame['prompt'].iloc[first_row[int(again.argmax())]])!r} repeats an earlier prompt's text; "
                "identical prompts under two ids are not independent. Drop one, or give both the same cluster.",
            )
    return label


def _refuse_duplicates(
    prompt: pd.Series,
    threshold: pd.Series,
    cell: NDArray[np.intp],
    is_full: NDArray[np.bool_],
    *,
    full_once: bool,
    failed: bool,
) -> None:
    """Refuse rows of one prompt and candidate, which share the number of their ``cell``.

    ``full_once``: the full model's among them. Where settings vary beside the threshold, it may have run beside each.
    """
    again = pd.Series(cell).duplicated().to_numpy()
    if not full_once:
        again = again & ~is_full
    if again.any():
        row = int(again.argmax())
        value = "full" if math.isinf(threshold.iloc[row]) else f"{threshold.iloc[row]:g}"
        # a truth has no average; a source or a cluster that an average lost would be believed to be the default
        average = "" if failed else ", or average them (their numbers; keep all other columns)"
        raise RiskcalError(
            f"prompt: {plain(prompt.iloc[row])!r} with threshold {value} stands twice, again at row {prompt.index[row]} "
            f"({int(again.sum())} such rows). The very same rows again: keep one of each, with drop_duplicates(). Several "
            "samples of one prompt: give each a prompt of its own, and name the prompt they share in a column cluster"
            f"{average}. Retries: keep=('last', 'attempt') keeps the one that was served, by the column that counts them (on "
            "the shell: --keep last:attempt). Other settings: name the column that "
            f"tells them apart in candidate_columns (on the shell: --coordinate NAME). {advice.of_tasks('task')}"
        )


def _refuse_gaps(
    present: NDArray[np.bool_],
    ids: Any,
    code: NDArray[np.intp],
    candidates: pd.DataFrame,
    rows: pd.Index,
) -> None:
    incomplete = ~present.all(1)
    if incomplete.any():
        alone = ~present.any(1)
        if alone.any():
            which = int(alone.argmax())
            raise RiskcalError(
                f"prompt: {plain(ids[which])!r} (row {rows[int((code == which).argmax())]}) has the full model's row alone "
                f"({int(alone.sum())} such prompts); every prompt needs every candidate. If that output was compared with "
                "those of other ids, samples of the prompt for instance, it is the full model's of each: repeat its row under "
                "each of them. If its candidates were tried and failed, add their rows with failed true."
            )
        which = int(incomplete.argmax())
        missing = candidates.iloc[int((~present[which]).argmax())]
        named = ", ".join(f"{name} {missing[name]}" for name in candidates.columns)
        others = candidates.loc[present[which], "threshold"].to_numpy(dtype=np.float64)
        away = np.abs(others - missing["threshold"])
        near = others[(away > 0) & (away <= 1e-6 * max(1.0, abs(missing["threshold"])))]
        if near.size:
            raise RiskcalError(
                f"prompt: {plain(ids[which])!r} (row {rows[int((code == which).argmax())]}) lacks the candidate {named} "
                f"({int(incomplete.sum())} prompts lack one), and has {plain(near[0])}, which differs from it by rounding "
                "alone. If the two are one, write it alike in all rows, rounded to six digits for instance; a row for each "
                "would be of candidates that nobody meant."
            )
        raise RiskcalError(
            f"prompt: {plain(ids[which])!r} (row {rows[int((code == which).argmax())]}) lacks the candidate {named} "
            f"({int(incomplete.sum())} prompts lack one); every prompt needs every candidate. Record it; if it was tried and "
            "failed, add its row with failed true. To leave out what failed would select on the outcome."
        )


def _full_risk(
    frame: pd.DataFrame,
    full: Mapping[str, Floats],
    code: NDArray[np.intp],
    order: NDArray[np.intp],
    rank: NDArray[np.intp],
) -> Floats | None:
    """The full model's risk (P,) in tested order, which ``order`` puts prompts into and ``rank`` takes them out of."""
    if "full_risk" not in frame.columns:
        return full.get("risk")
    given = frame["full_risk"]
    if "failed" in full:  # there no candidate is credited, whatever is stated
        given = given.mask(full["failed"][rank][code] > 0, 0.0)
    column = columns.numbers(given, "full_risk", 0.0, 1.0)
    per_prompt = np.empty(len(order))
    per_prompt[code] = column
    changed = column != per_prompt[code]
    if changed.any():
        row = int(changed.argmax())
        raise RiskcalError(
            f"full_risk: {column[row]:g} at row {frame.index[row]} differs within prompt {plain(frame['prompt'].iloc[row])!r}."
        )
    stated = per_prompt[order]
    if "risk" in full and not np.allclose(stated, full["risk"], rtol=0, atol=_validate.TOLERANCE):
        raise RiskcalError(
            "full_risk: differs from the risk in the full model's rows; keep one of the two."
        )
    return stated


def _provenance(frame: pd.DataFrame) -> tuple[Any, bool]:
    kinds = _first_of_each(frame, "source") or [(0, "generated")]
    for row, kind in kinds:
        if not isinstance(kind, str) or kind not in ("generated", "replayed"):
            raise RiskcalError(
                f"source: {kind!r} at row {row}; it is 'generated' or 'replayed'. {advice.other_meaning('source')}"
            )
        if kind != kinds[0][1]:
            raise RiskcalError(
                f"source: {kind!r} at row {row}, but {kinds[0][1]!r} at row {frame.index[0]}; keep replayed and "
                "generated rows in separate tables."
            )
    stated = _first_of_each(frame, "exact") or [(0, False)]
    for row, value in stated:
        if not isinstance(value, bool) or value != stated[0][1]:
            raise RiskcalError(
                f"exact: {value!r} at row {row}; it is true throughout or false throughout. {advice.other_meaning('exact')}"
            )
    return kinds[0][1], bool(stated[0][1])


def _first_of_each(frame: pd.DataFrame, name: str) -> list[tuple[Any, Any]]:
    """The cells of a column with their rows, of texts and truths the first of each; none where there is no such column."""
    if name not in frame.columns:
        return []
    column = frame[name]
    if isinstance(column.dtype, pd.StringDtype) or column.dtype == bool:
        column = column.drop_duplicates()
    return list(zip(column.index, column.tolist(), strict=True))


def _stopped(frame: pd.DataFrame) -> Stop | None:
    if "stopped" not in frame.columns:
        return None
    cells = _first_of_each(frame, "stopped")
    for row, value in cells:
        if not isinstance(value, str) or value != cells[0][1]:
            raise RiskcalError(
                f"stopped: {plain(value)!r} at row {row}; it says how the recording of all rows ended. Keep recordings that "
                f"ended differently in separate tables. {advice.other_meaning('stopped')}"
            )
    text = str(cells[0][1])
    try:
        return Stop(**_validate.from_json(text))
    except (TypeError, ValueError) as error:
        raise RiskcalError(
            f"stopped: {text!r} at row {frame.index[0]} is not how a recording stops ({_validate.reason(error)}). "
            f"{advice.other_meaning('stopped')}"
        ) from None
