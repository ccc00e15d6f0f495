"""Read many thresholds off one recorded path: what would have exited where, had the path not changed."""

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy.columns import schedule_columns
from riskcal.policy.schedules import Constant, Decaying, Schedule
from riskcal.records import Runs, TokenLosses, Traces
from riskcal.records.columns import plain

#: Buckets that a confidence is sorted into before it is compared with thresholds: few hold one, and all fit the nearest cache.
_BUCKETS = 4096

_BUCKETS_BY_POSITION = 512


def replay_arrays(
    confidence: ArrayLike,
    loss: ArrayLike,
    thresholds: ArrayLike,
    *,
    schedule: Schedule = Constant(),
    position: ArrayLike | None = None,
    min_layer: int = 1,
) -> tuple[Floats, NDArray[np.int64]]:
    """Loss and exit layer of each token under each threshold, on one recorded path.

    Parameters
    ----------
    confidence : (N, L)
        Confidence at each exit; NaN never exits.
    loss : (N, L)
        Loss of each exit's token.
    thresholds : (k,)
        In any order; ``inf`` is the full model, layer L.
    schedule : Constant or Decaying
    position : (N,), optional
        Index of each token in its generation, from 0; needed by `Decaying`.
    min_layer : int
        No exit before this layer.

    Returns
    -------
    losses : (N, k)
        Token rows: dependent within a prompt, so not to be tested as they are. They are marked, and `riskcal.calibrate`
        refuses them; numpy keeps the mark, but a copy into a plain array, a list or a DataFrame loses it.
    exits : (N, k)
        Exit layers 1..L.

    Notes
    -----
    The path is the recorded one throughout. A real decoder's states differ after its first early exit; only for an exit
    without memory (a classifier, a cascade of models) is replay what would have happened.
    """
    levels, outcome = _pair(confidence, loss)
    grid = _validate.threshold_grid(thresholds, allow_full=True)
    min_layer = _validate.count(min_layer, "min_layer", least=1)
    if min_layer > levels.shape[1]:
        raise RiskcalError(f"min_layer: {min_layer} exceeds the {levels.shape[1]} recorded layers.")
    if position is None:
        if not isinstance(schedule, Constant):
            raise RiskcalError(
                "position: a decaying schedule needs each token's position; give position=."
            )
        where = np.zeros(len(levels), dtype=np.int64)
    else:
        where = _validate.as_given(position, "position")
        if where.shape != (len(levels),) or where.dtype.kind not in "iu" or (where < 0).any():
            raise RiskcalError(
                f"position: has shape {where.shape} and type {where.dtype}; give one whole number from 0 for each of "
                f"{len(levels)} tokens."
            )
        where = where.astype(np.int64)
    from riskcal.replay import kernels

    order, local = _local_table(grid, schedule, where)
    sorted_exits = np.full((len(levels), grid.size), levels.shape[1], dtype=np.int64)
    kernels.exit_layers(levels, local, where, min_layer, sorted_exits[:, : local.shape[1]])
    exits = np.empty_like(sorted_exits)
    exits[:, order] = sorted_exits
    losses = np.take_along_axis(outcome, exits - 1, axis=1).view(TokenLosses)
    return losses.astype(
        np.float64
    ), exits  # a copy that owns its memory, so that plain views of it lead back to it


def replay_traces(
    traces: Traces,
    thresholds: ArrayLike,
    *,
    schedule: Schedule = Constant(),
    min_layer: int = 1,
    exact: bool = False,
) -> Runs:
    """Turn traces into runs: the mean over each prompt's tokens of the loss at the exit, for every threshold at once.

    Parameters
    ----------
    traces : Traces
        Read once, prompt by prompt.
    thresholds : (k,)
        Finite. Fix them before seeing the traces; ones that equal a confidence at which a token exits are warned about.
    schedule : Constant or Decaying
    min_layer : int
    exact : bool
        Declares that the exit has no memory, so that replay is what would have happened. Without it `riskcal.calibrate`
        refuses the runs: after a first early exit a real decoder's states differ.

    Returns
    -------
    Runs
        ``source="replayed"``. From ``agrees`` the dissimilarity is the share of tokens that disagree with the last layer;
        a ``loss`` becomes the risk, and the dissimilarity too where it is zero at the last layer throughout.
    """
    grid = np.sort(_validate.threshold_grid(thresholds, allow_full=False))[::-1]
    min_layer = _validate.count(min_layer, "min_layer", least=1)
    if min_layer > traces.n_layers:
        raise RiskcalError(f"min_layer: {min_layer} exceeds the {traces.n_layers} recorded layers.")
    start = np.flatnonzero(np.r_[True, traces.prompt[1:] != traces.prompt[:-1], True])
    prompts = traces.prompt[start[:-1]]
    _distinct(prompts)
    losses, layers, met = _prompt_means(traces, grid, schedule, start, min_layer - 1)
    _warn_of_peeking(grid[met[::-1]], grid.size)

    tokens = np.diff(start).astype(np.float64)
    full = np.zeros(len(prompts))  # the full model agrees with itself
    if traces.loss is not None:
        full = np.add.reduceat(traces.loss[:, -1].astype(np.float64), start[:-1]) / tokens
    names = ["dissimilarity"] * (not full.any()) + ["risk"] * (traces.loss is not None)
    # a policy needs what the thresholds were replayed with
    ran_with = {"min_layer": min_layer, **schedule_columns(schedule)}
    at_full = dict.fromkeys(names, full)
    return Runs(
        prompts=prompts,
        candidates=pd.DataFrame({"threshold": grid}).assign(**ran_with),
        values=dict.fromkeys(names, losses)
        | {"layers": layers, "tokens": np.broadcast_to(tokens[:, None], layers.shape)},
        full=at_full | {"layers": np.full(len(prompts), float(traces.n_layers)), "tokens": tokens},
        full_risk=at_full.get("risk"),
        source="replayed",
        exact=exact,
    ).in_content_order()


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
    with np.errstate(
        over="ignore", divide="ignore"
    ):  # a degenerate scale puts all in one bucket, and all are compared
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


def _local_table(
    grid: Floats, schedule: Schedule, position: NDArray[np.int64]
) -> tuple[NDArray[np.intp], Floats]:
    """Finite thresholds ascending (their columns in ``order``), and the confidence each needs at every position."""
    order = np.argsort(grid)
    finite = grid[order][np.isfinite(grid[order])]
    table = schedule.local_threshold(finite[None, :], np.arange(position.max() + 1)[:, None])
    return order, np.ascontiguousarray(table)


def _pair(
    confidence: ArrayLike, loss: ArrayLike
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    levels, outcome = (
        _validate.float_matrix(confidence, "confidence"),
        _validate.float_matrix(loss, "loss"),
    )
    if levels.shape != outcome.shape:
        raise RiskcalError(
            f"loss: has shape {outcome.shape}, but confidence has {levels.shape}; give the same for both."
        )
    _validate.finite(outcome, "loss")
    return levels, outcome


def _warn_of_peeking(met: Floats, k: int) -> None:
    """Thresholds strictly inside (0, 1) that a token meets exactly look as if they came from these very data."""
    seen = met[(met > 0) & (met < 1)]
    if seen.size:
        warnings.warn(
            f"thresholds: {seen.size} of {k} (first {seen[0]:g}) equal a recorded confidence. A grid must be fixed "
            "before the calibration data are seen; take it from a regular grid or from other data.",
            stacklevel=3,
        )
