"""Read many thresholds off one recorded path: what would have exited where, had the path not changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, overload

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy.columns import CANDIDATE_COLUMNS, schedule_columns
from riskcal.policy.schedules import Constant, Decaying, Schedule
from riskcal.records import Runs, TokenLosses, Traces, alignment, prompt_labels
from riskcal.records import costs as costs_
from riskcal.records import exits as exits_
from riskcal.records.columns import plain
from riskcal.records.exits import PerExit
from riskcal.replay import rule as rules
from riskcal.replay import walk
from riskcal.replay.rule import Rule

#: One number per exit, of all rows or of each, or several such by name.
Costs = ArrayLike | Mapping[str, ArrayLike]

#: Buckets that a confidence is sorted into before it is compared with thresholds: few hold one, and all fit the nearest cache.
_BUCKETS = 4096

_BUCKETS_BY_POSITION = 512


@overload
def replay_arrays(
    confidence: ArrayLike,
    loss: ArrayLike,
    thresholds: ArrayLike,
    *,
    schedule: Schedule = ...,
    position: ArrayLike | None = ...,
    min_layer: int = ...,
    lengths: ArrayLike | None = ...,
    give_up: ArrayLike | None = ...,
    lower_is_stricter: bool = ...,
    costs: None = ...,
) -> tuple[Floats, NDArray[np.int64]]: ...
@overload
def replay_arrays(
    confidence: ArrayLike,
    loss: ArrayLike,
    thresholds: ArrayLike,
    *,
    schedule: Schedule = ...,
    position: ArrayLike | None = ...,
    min_layer: int = ...,
    lengths: ArrayLike | None = ...,
    give_up: ArrayLike | None = ...,
    lower_is_stricter: bool = ...,
    costs: Costs,
) -> tuple[Floats, NDArray[np.int64], dict[str, Floats]]: ...
def replay_arrays(
    confidence: ArrayLike,
    loss: ArrayLike,
    thresholds: ArrayLike,
    *,
    schedule: Schedule = Constant(),
    position: ArrayLike | None = None,
    min_layer: int = 1,
    lengths: ArrayLike | None = None,
    give_up: ArrayLike | None = None,
    lower_is_stricter: bool = False,
    costs: Costs | None = None,
) -> Any:
    """Loss and exit layer of each token under each threshold, on one recorded path.

    Parameters
    ----------
    confidence : (N, L)
        Confidence at each exit; NaN never exits. Or a list of N lists of unequal length, each row's last the full model's.
    loss : (N, L), or lists
        Loss of each exit's token.
    thresholds : (k,), or (k, L - 1) for one per exit before the last
        In any order; ``inf`` is the full model, layer L, and in a vector an exit that is never taken.
    schedule : Constant or Decaying
    position : (N,), optional
        Index of each token in its generation, from 0; needed by `Decaying`.
    min_layer : int
        No exit before this layer.
    lengths : (N,), optional
        Exits of each row of an (N, L) array; what stands behind them is padding.
    give_up : (k,) or (k, L - 1), optional
        A second threshold of each candidate: a request also leaves where its confidence is at most this, with the loss that
        it has there.
    lower_is_stricter : bool
        Exit where the value is at most the threshold, as with an entropy.
    costs : (L,) or (N, L), or a mapping of names to such, optional
        What a row has cost in all if it stops at that exit; a single array is named ``cost``.

    Returns
    -------
    losses : (N, k)
        Token rows: dependent within a prompt, so not to be tested as they are. They are marked, and `riskcal.calibrate`
        refuses them; numpy keeps the mark, but a copy into a plain array, a list or a DataFrame loses it.
    exits : (N, k)
        Exit layers 1..L; a row that never reaches its threshold takes its own last exit.
    costs : dict of name to (N, k)
        Where ``costs`` were given: what each row then costs.

    Notes
    -----
    The path is the recorded one throughout. A real decoder's states differ after its first early exit; only for an exit
    without memory (a classifier, a cascade of models) is replay what would have happened.

    Examples
    --------
    >>> confidence = [[0.6, 0.9, 1.0], [0.2, 0.4, 1.0]]  # two requests of a cascade of three models
    >>> loss = [[1, 0, 0], [1, 1, 0]]
    >>> losses, exits = riskcal.replay_arrays(confidence, loss, [0.8, 0.5])
    >>> losses.tolist(), exits.tolist()
    ([[0.0, 1.0], [0.0, 0.0]], [[2, 1], [3, 3]])
    """
    schedule = rules.as_schedule(schedule)
    given = exits_.given_lengths(lengths)
    levels = PerExit.read(confidence, "confidence", given).as_numbers()
    outcome = PerExit.read(loss, "loss", given).as_numbers()
    exits_.refuse_other_lengths(outcome, levels, "loss", "confidence")
    alignment.refuse_other_exits(confidence, loss, "confidence", "loss")
    alignment.refuse_other_rows({"confidence": confidence, "loss": loss, "position": position})
    _validate.finite(outcome.values, "loss")
    spent = {
        name: costs_.per_exit(value, name, given, levels)
        for name, value in costs_.named(costs).items()
    }
    counts = levels.counts
    where = np.zeros(len(counts), dtype=np.int64)
    if position is not None:
        where = _validate.as_given(position, "position")
        if where.shape != (len(counts),) or where.dtype.kind not in "iu" or (where < 0).any():
            raise RiskcalError(
                f"position: has shape {where.shape} and type {where.dtype}; give one whole number from 0 for each of "
                f"{len(counts)} tokens."
            )
        where = where.astype(np.int64)
    elif isinstance(schedule, Decaying):
        raise RiskcalError(
            "position: a decaying schedule needs each token's position; give position=."
        )
    rule = rules.of(
        thresholds,
        schedule=schedule,
        min_layer=min_layer,
        n_layers=int(counts.max()),
        position=where,
        allow_full=True,
        lower_is_stricter=lower_is_stricter,
        give_up=give_up,
    )
    begin = np.cumsum(counts) - counts
    exits = rule.exits(levels.values.reshape(-1), begin, counts, where)
    place = begin[:, None] + exits - 1
    losses = outcome.values.reshape(-1)[place].view(TokenLosses)
    # a copy that owns its memory, so that plain views of it lead back to it
    losses = losses.astype(np.float64)
    if costs is None:
        return losses, exits
    taken = {
        name: value.values.reshape(-1)[place] if isinstance(value, PerExit) else value[exits - 1]
        for name, value in spent.items()
    }
    return losses, exits, taken


def replay_traces(
    traces: Traces,
    thresholds: ArrayLike,
    *,
    schedule: Schedule = Constant(),
    min_layer: int = 1,
    exact: bool = False,
    give_up: ArrayLike | None = None,
    lower_is_stricter: bool = False,
    costs: Costs | None = None,
) -> Runs:
    """Turn traces into runs: the mean over each prompt's tokens of the loss at the exit, for every threshold at once.

    Parameters
    ----------
    traces : Traces
        Read once, prompt by prompt.
    thresholds : (k,), or (k, L - 1) for one per exit before the last
        Finite; in a vector ``inf`` is an exit that is never taken. Fix them before seeing the traces; ones that equal a
        confidence at which a token exits are warned about.
    schedule : Constant or Decaying
    min_layer : int
    exact : bool
        Declares that the exit has no memory, so that replay is what would have happened. Without it `riskcal.calibrate`
        refuses the runs: after a first early exit a real decoder's states differ.
    give_up : (k,) or (k, L - 1), optional
        A second threshold of each candidate: a request also leaves where its confidence is at most this, with the loss that
        it has there.
    lower_is_stricter : bool
        Exit where the value is at most the threshold, as with an entropy.
    costs : (L,), or mapping of names to (L,), optional
        What a decision has cost in all if it stops at that exit, the same for every row, beside the traces' own ``costs``;
        a single array is named ``cost``.

    Returns
    -------
    Runs
        ``source="replayed"``. From ``agrees`` the dissimilarity is the share of tokens that disagree with the last layer;
        a ``loss`` becomes the risk, and the dissimilarity too where it is zero at the last layer throughout. ``layers`` is the
        mean number of the exit, ``tokens`` counts the prompt's rows (unless a cost has one of these names), and a cost is the
        sum over them; one called ``layers`` is the mean, as that column is. Vectors of thresholds stand in a candidate's
        coordinate ``thresholds``, and ``threshold`` numbers the candidates from k, the first, down to 1; what is given
        up at in ``give_up``, or ``give_up_1`` and so on.
        A row that never reaches its threshold takes its own last exit, which is the reference. A prompt's cluster and text are
        the runs', and one that failed has the worst loss.

    Examples
    --------
    >>> traces = riskcal.load_example("g2p-traces")
    >>> runs = riskcal.replay_traces(traces, [0.9, 0.5, 0.1])
    >>> runs
    Runs: 1000 prompts x 3 candidates (replayed), thresholds 0.9 to 0.1; dissimilarity, layers, tokens; full model
    recorded
    >>> [round(layers, 1) for layers in runs.mean_costs()["layers"]]
    [2.4, 1.4, 1.0]
    """
    if not isinstance(traces, Traces):
        raise RiskcalError(
            f"traces: give Traces, not {type(traces).__name__}; Traces.from_arrays makes them of matrices, from_frame of a "
            "table."
        )
    rule = rules.of(
        thresholds,
        schedule=schedule,
        min_layer=min_layer,
        n_layers=traces.n_layers,
        position=traces.position,
        allow_full=False,
        lower_is_stricter=lower_is_stricter,
        give_up=give_up,
    ).from_the_strictest()
    spent: dict[str, NDArray[Any]] = {**traces.costs, **_of_exits(costs, traces)}
    start = np.flatnonzero(np.r_[True, traces.prompt[1:] != traces.prompt[:-1], True])
    prompts = traces.prompt[start[:-1]]
    _distinct(prompts)
    tokens = np.diff(start).astype(np.float64)
    if isinstance(rule, Rule) and traces.lengths is None and not rule.lower_is_stricter:
        losses, layers, met = _prompt_means(traces, rule.grid, schedule, start, rule.min_layer - 1)
        met = met[::-1]
        sums = walk.summed(traces, rule, start, spent).sums if spent else {}
    else:
        outcome = cast(Any, traces.agrees if traces.loss is None else traces.loss)
        sums, met = walk.summed(traces, rule, start, spent | {" outcome": outcome})
        losses, layers = sums[" outcome"] / tokens[:, None], sums[walk.EXITS] / tokens[:, None]
        losses = 1.0 - losses if traces.loss is None else losses
    _warn_of_peeking(rule.grid[met], rule.k, math.inf if rule.lower_is_stricter else 1.0)

    full = np.zeros(len(prompts))  # the full model agrees with itself
    if traces.loss is not None:
        last = PerExit(traces.loss, traces.lengths).last()
        full = np.add.reduceat(last.astype(np.float64), start[:-1]) / tokens
    labels, failed = prompt_labels.of_prompts(traces.labels, start)
    losses[failed], full[failed] = 1.0, 0.0  # nothing is near it, and nobody is credited for it
    lost = {"failed": failed.astype(np.float64)} if "failed" in traces.labels else {}
    names = ["dissimilarity"] * (not full.any()) + ["risk"] * (traces.loss is not None)
    # a policy needs what the thresholds were replayed with
    ran_with = {"min_layer": rule.min_layer, **schedule_columns(schedule)}
    at_full = dict.fromkeys(names, full)
    whole = {name: _at_last(traces, cost, start) for name, cost in spent.items()}
    depth = np.full(len(prompts), float(traces.n_layers))
    if traces.lengths is not None:
        depth = np.add.reduceat(traces.lengths.astype(np.float64), start[:-1]) / tokens
    counted = {"layers": depth, "tokens": tokens}
    taken = {name: sums[name] for name in spent}
    if "layers" in spent:  # a mean per row by its meaning, whoever gives it
        taken["layers"] = taken["layers"] / tokens[:, None]
        whole["layers"] = whole["layers"] / tokens
    return Runs(
        prompts=prompts,
        candidates=_in_order(rule.candidates.assign(**ran_with)),
        values=dict.fromkeys(names, losses)
        | {"layers": layers, "tokens": np.broadcast_to(tokens[:, None], layers.shape)}
        | taken
        | {name: np.broadcast_to(of[:, None], layers.shape) for name, of in lost.items()},
        full=at_full | counted | whole | lost,
        full_risk=at_full.get("risk"),
        labels=labels,
        source="replayed",
        exact=exact,
        lower_is_stricter=rule.lower_is_stricter,
    ).in_content_order()


def _in_order(candidates: pd.DataFrame) -> pd.DataFrame:
    """Candidates with their columns as a table of runs is read."""
    known = [name for name in ("threshold", *CANDIDATE_COLUMNS) if name in candidates.columns]
    return candidates[[*known, *(n for n in candidates.columns if n not in known)]]


def _of_exits(given: Costs | None, traces: Traces) -> dict[str, Floats]:
    """Costs (L,) that hold for all rows."""
    found = {}
    for name, value in costs_.named(given).items():
        if name in traces.costs:
            raise RiskcalError(
                f"costs: the traces have a cost {name!r} of their own; leave it out."
            )
        one_for_all = exits_.of_all_rows(value, f"costs: {name}", traces.n_layers)
        if one_for_all is None:
            raise RiskcalError(
                f"costs: {name!r} must have one number for each of the {traces.n_layers} exits, ({traces.n_layers},). Costs that "
                "differ from row to row belong into the traces, which sort their rows: "
                f"Traces.from_arrays(..., cost={{{name!r}: ...}})."
            )
        found[name] = costs_.refuse_no_totals(one_for_all, value, f"costs: {name}")
    return found


def _at_last(traces: Traces, cost: NDArray[Any], start: NDArray[np.intp]) -> Floats:
    """What the full model costs each prompt, (P,): its rows' last exits."""
    if cost.shape == traces.confidence.shape:
        last = PerExit(cost, traces.lengths).last()
    else:
        last = cost[traces.counts - 1]
    totals: Floats = np.add.reduceat(last, start[:-1])
    return totals


def _prompt_means(
    traces: Traces, grid: Floats, schedule: Schedule, start: NDArray[np.intp], first: int
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Mean loss and mean exit layer (prompts, k), and which thresholds, ascending, a token meets exactly (k,)."""
    from riskcal.replay import kernels

    decays = isinstance(schedule, Decaying)
    position = np.arange(traces.position.max() + 1) if decays else np.zeros(1, dtype=np.int64)
    local = schedule.local_threshold(grid[::-1], position[:, None])
    needed = np.column_stack([local, np.full(len(position), math.nan)])
    top = _BUCKETS_BY_POSITION if decays else _BUCKETS
    low = float(local.min())
    # a degenerate scale puts all in one bucket, and all are compared
    with np.errstate(over="ignore", divide="ignore"):
        scale = float(np.divide(top - 1, local.max() - low))
    table = kernels.ranks_by_bucket(needed, low, scale, top)
    outcome = np.ascontiguousarray(traces.agrees if traces.loss is None else traces.loss)
    if traces.loss is None:
        offset, sign, outcome = 1, -1, outcome.view(np.int8)
    else:
        offset, sign = 0, 1
    sums = np.zeros(grid.size + 1, dtype=np.int64 if traces.loss is None else np.float64)
    means = np.empty((len(start) - 1, grid.size)), np.empty((len(start) - 1, grid.size))
    met = np.zeros(grid.size, dtype=bool)
    row_of = traces.position if decays else traces.position[:0]
    kernels.replay_means(
        traces.confidence,
        outcome,
        start,
        row_of,
        first,
        needed,
        table,
        low,
        scale,
        offset,
        sign,
        sums,
        *means,
        met,
    )
    return *means, met


def _distinct(prompts: NDArray[Any]) -> None:
    """Traces made by their constructors keep a prompt's tokens together; anything else would count it twice."""
    again = pd.Series(prompts).duplicated()
    if again.any():
        raise RiskcalError(
            f"traces: the tokens of prompt {plain(prompts[int(again.argmax())])!r} do not stand together; build the traces with "
            "Traces.from_arrays, from_frame or read, which put them in order."
        )
    if len(prompts) < 2:
        raise RiskcalError(
            f"traces: only 1 prompt ({plain(prompts[0])!r}); at least two are needed."
        )


def _warn_of_peeking(met: Floats, k: int, upper: float) -> None:
    """Thresholds strictly inside (0, upper) that a token meets exactly look as if they came from these very data."""
    seen = met[(met > 0) & (met < upper)]
    if seen.size:
        _validate.warn(
            f"thresholds: {seen.size} of {k} (first {seen[0]:g}) equal a recorded confidence. A grid must be fixed "
            "before the calibration data are seen; take it from a regular grid or from other data. If it was, all is well: "
            "confidences that were rounded meet a regular grid.",
        )
