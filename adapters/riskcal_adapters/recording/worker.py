"""What a worker does: its shard of the prompts at one threshold or down the whole grid, with the process's one decoder."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from riskcal import RiskcalError, internal
from riskcal.calibration import calibrate
from riskcal.policy import ExitPolicy, Stop
from riskcal.records import Runs
from riskcal_adapters.recording import folder, runs, untrained_exits
from riskcal_adapters.recording.job import Recording, Shard
from riskcal_adapters.recording.prompts import Prompt
from riskcal_adapters.recording.protocol import Decoder
from riskcal_adapters.recording.runs import Run, Warmed


def record_shard(
    shard: Shard, advance: Callable[[int], Any] = lambda n: None
) -> untrained_exits.Evidence:
    """Job: one shard's prompts down the whole grid, and all its files."""
    plan = shard.plan
    warmed = _warmed(shard)
    policies = plan.policies(warmed.decoder)
    columns: list[list[Run]] = []
    for policy in policies:
        last = columns[-1] if columns else None
        columns.append(
            runs.next_runs(warmed, policy, shard.prompts, last, plan.batch_size, plan.beat)
        )
        advance(len(shard.prompts))
    if plan.traces:
        _write_traces(shard, warmed.decoder, policies[-1])
    return _write_runs(shard, _table(shard, policies, columns, columns[0], template=policies[-1]))


def record_column(job: tuple[Shard, int]) -> None:
    """Job: one shard's prompts at one threshold; nothing where another process has finished the shard meanwhile."""
    shard, index = job
    if shard.finished:
        return
    plan = shard.plan
    warmed = _warmed(shard)
    policies = plan.policies(warmed.decoder)
    with _unless_finished(shard):
        earlier = [
            runs.runs_of(folder.read_shard(shard.column_path(i)))
            for i in (0, index - 1)
            if index > 0
        ]
        last = earlier[-1] if earlier else None
        here = runs.next_runs(
            warmed, policies[index], shard.prompts, last, plan.batch_size, plan.beat
        )
        if index == 0 and plan.traces:
            _write_traces(shard, warmed.decoder, policies[-1])
        full = earlier[0] if earlier else here
        rows = _table(shard, policies[index : index + 1], [here], full, template=policies[-1])
        path = shard.column_path(index)
        with folder.writing(path):
            path.parent.mkdir(exist_ok=True)
        _write(rows, path)


def join_columns(job: tuple[Shard, int, Stop | None]) -> untrained_exits.Evidence | None:
    """Job: the columns of one shard, up to the last that was recorded, as its file."""
    shard, last, stopped = job
    if shard.finished:
        return None
    with _unless_finished(shard):
        columns = [folder.read_shard(shard.column_path(i)) for i in range(last + 1)]
        rows = pd.concat([column.assign(place=range(len(column))) for column in columns])
        rows = rows.sort_values("place", kind="stable", ignore_index=True).drop(columns="place")
        if stopped is not None:
            rows["stopped"] = stopped.model_dump_json()
        return _write_runs(shard, rows)
    return None


@contextmanager
def _unless_finished(shard: Shard) -> Iterator[None]:
    """Columns go when their shard is finished: that another process did so first is no failure."""
    try:
        yield
    except RiskcalError:
        if not shard.finished:
            raise


def _table(shard: Shard, *columns: Any, template: ExitPolicy) -> pd.DataFrame:
    losses: dict[str, Any] = {"dissimilarity": shard.plan.dissimilarity, "risk": shard.plan.risk}
    return runs.table(shard.prompts, *columns, template=template, **losses)


def _write_runs(shard: Shard, rows: pd.DataFrame) -> untrained_exits.Evidence:
    _write(rows.drop(columns=list(runs.WORKING)), shard.runs_path)
    return untrained_exits.evidence(rows, shard.plan.dissimilarity)


def _write_traces(shard: Shard, decoder: Decoder, policy: ExitPolicy) -> None:
    paths = []
    for batch in chunks(shard.prompts, shard.plan.batch_size):
        ids: list[Any] = [row.prompt for row in batch]
        encoded = decoder.encode([row.text for row in batch])
        traced = decoder.trace(
            *encoded, max_new_tokens=shard.plan.max_new_tokens, prompts=ids, policy=policy
        )
        paths.append(traced.to_frame())
        shard.plan.beat()
    # Traces sorts within each batch: undo that
    place = {row.prompt: i for i, row in enumerate(shard.prompts)}
    whole = pd.concat(paths).sort_values(
        "prompt", key=lambda ids: ids.map(place), kind="stable", ignore_index=True
    )
    _write(whole, shard.traces_path)


def _write(rows: pd.DataFrame, path: Path) -> None:
    try:
        internal.write_table(rows, path)
    except RiskcalError:
        if not path.exists():  # if it does, another process has recorded the same
            raise


def has_column(shard: Shard, index: int) -> bool:
    return shard.finished or shard.column_path(index).exists()


def column(shard: Shard, index: int, threshold: float) -> pd.DataFrame:
    """A shard's rows at one threshold, from wherever they stand."""
    if not shard.finished:
        with _unless_finished(shard):
            return folder.read_shard(shard.column_path(index))
    rows = folder.read_shard(shard.runs_path).drop(columns="stopped", errors="ignore")
    return rows[rows["threshold"] == threshold]


def fails(stop: Stop, recorded: Sequence[pd.DataFrame]) -> bool:
    """Whether a fixed sequence ends at the last threshold of the rows, or before."""
    rows = pd.concat(recorded, ignore_index=True)
    so_far = Runs.from_frame(rows.drop(columns=list(runs.WORKING), errors="ignore"))
    calibration = calibrate(so_far, **stop.model_dump(), procedure="fixed_sequence")
    return not calibration.table["certified"].iloc[-1]


def remove_columns(shards: Sequence[Shard]) -> None:
    waiting = shards[0].column_path(0).parent
    # another process that records the same may be quicker
    with folder.writing(waiting), suppress(FileNotFoundError):
        for path in waiting.iterdir():
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or another process still writes to it
        waiting.rmdir()


_slot: tuple[tuple[int, str], Warmed] | None = None
_slot_lock = threading.Lock()


def _warmed(shard: Shard) -> Warmed:
    """Load the process's decoder, or find it loaded.

    Kept by process and call of `record`, not by ``load``: a partial is another object each time that a job brings it.
    One at a time, so that a second recording does not hold two models in memory.
    """
    global _slot
    plan = shard.plan
    key = (os.getpid(), plan.session)
    with _slot_lock:
        if _slot is None or _slot[0] != key:
            _slot = None
            decoder = _depth_wise(plan.load()) if plan.engine else plan.load()
            _refuse_incomplete(decoder, plan)
            folder.bind(plan, decoder)
            policies = plan.policies(decoder)
            plan.beat()
            _slot = key, Warmed(decoder, (policies[0], policies[-1]))
        return _slot[1]


def _depth_wise(decoder: Any) -> Decoder:
    try:  # here, so that other decoders are recorded without it
        from riskcal_adapters import torch
        from riskcal_adapters.torch.engine import DepthWise
    except ImportError as missing:
        raise RiskcalError(f"engine: {missing}") from None

    if not isinstance(decoder, torch.EarlyExitT5 | torch.EarlyExitCausalLM):
        raise RiskcalError(
            f"engine: drives decoders of riskcal_adapters.torch, and load returned a {type(decoder).__name__}; leave it out."
        )
    return DepthWise(decoder)


def _refuse_incomplete(decoder: Any, plan: Recording) -> None:
    needed = ["n_layers", "encode", "generate", "decode"] + ["trace"] * plan.traces
    lacking = [name for name in needed if not hasattr(decoder, name)]
    if lacking:
        kind = type(decoder).__name__
        raise RiskcalError(
            f"load: returned a {kind} without .{lacking[0]}; it must return a decoder."
        )


def release(session: str) -> None:
    global _slot
    with _slot_lock:
        if _slot is not None and _slot[0] == (os.getpid(), session):
            _slot = None


def chunks(rows: tuple[Prompt, ...], size: int) -> list[tuple[Prompt, ...]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
