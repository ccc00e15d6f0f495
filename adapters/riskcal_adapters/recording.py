"""`record`: run an early-exit decoder over prompts and thresholds, and write down what it lost and what it cost.

Knows no framework: whatever offers `Decoder` can be recorded.
"""

import math
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import ArrayLike
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.calibration import calibrate
from riskcal.policy import ExitPolicy, Stop
from riskcal.records import Runs, files
from riskcal_adapters import _early, _grid, _plan, _pools, _prompts, texts
from riskcal_adapters._grid import Run
from riskcal_adapters._plan import Plan, Shard
from riskcal_adapters._prompts import Prompt
from riskcal_adapters.protocol import Decoder, Generation, Pool

__all__ = ["Decoder", "Generation", "Pool", "record"]


def record(
    prompts: Any,
    load: Callable[[], Decoder],
    thresholds: ArrayLike,
    out: str | os.PathLike[str],
    *,
    pool: Pool | None = None,
    policy: ExitPolicy | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    shard_prompts: int = 64,
    dissimilarity: Callable[[str, str], float] = texts.token_distance,
    risk: Callable[[str, Sequence[str]], float] | None = None,
    traces: bool = False,
    stop: Stop | None = None,
    progress: bool = True,
    patience: float | None = 1800.0,
) -> Path:
    """Generate every prompt with the full model and at each threshold, and write the losses and costs to a folder.

    The folder holds ``runs-00000.parquet``, ``runs-00001.parquet``, ... with one row per prompt and candidate: the full
    model's first in each prompt, then the thresholds from the highest down. ``riskcal.Runs.read(out)`` reads them.
    Shards appear whole or not at all. A recording that was interrupted, in whatever way, goes on where it stopped when
    the same call is made again, and ends in the same tables but for the column ``seconds``. Shards that are there already
    are read, and one that was damaged since is refused by its name: delete it, and only its prompts are generated anew. A
    call that fails before anything was recorded leaves nothing behind. Make one call per folder at a time: two do each other
    no harm, but the same work.

    No prompt is ever left out. An output that failed (`Generation`) is recorded at the worst loss, 1, with a column
    ``failed`` that says so; so is every output that would have to be compared with a full model's output that failed.

    Nothing is generated twice: a decoder that reports its refused confidences (`Generation`) is not asked again at a
    threshold that none of them reaches.

    Parameters
    ----------
    prompts : sequence of str, or table
        A table (DataFrame, dict of columns, any object with the Arrow PyCapsule interface) has a column ``text`` and
        optionally ``prompt`` (ids, integers or strings; default 0 to n - 1), ``references`` (a string or a list of
        strings per prompt), ``cluster`` (the independent unit, where prompts share a source) and ``group``.
    load : callable
        Returns a `Decoder`; called once in each worker process (once in all with threads, which share the decoder), and
        not at all if nothing is left to do. For a pool of processes it must be importable: a function of a module, or
        a `functools.partial` of one.
    thresholds : (k,) array_like
        Distinct finite numbers in any order, fixed before looking at these prompts. The full model is recorded anyway.
    out : path
        A new or empty folder, or one that holds a recording with the same settings.
    pool : optional
        Anything with ``.map(function, iterable)`` that returns results: the executors of ``concurrent.futures``,
        ``multiprocessing.Pool``, ``ray.util.multiprocessing.Pool``. Shards are its jobs. Default: this process.
    policy : ExitPolicy, optional
        Template: each threshold in turn replaces its own. The full model it is compared with draws with the same noise
        (``sampling``) and is otherwise plain. With ``batching="deepest"`` a row depends on its batch: prompts then run in
        the order given, and ``batch_size`` is part of what is calibrated.
    max_new_tokens : int, optional
        Length limit of every generation. Default: the policy's, else 64; a decoder whose generation config has another limit is
        then refused, which asks for one of the two.
    batch_size : int
        Prompts generated together, at one threshold, within a shard; those alike in length and depth.
    shard_prompts : int
        Prompts per file: what an interruption costs each worker at most. Several batches: some prompts need no run at a
        threshold, and full batches are made of the others.
    dissimilarity : callable
        ``dissimilarity(early, full)`` in [0, 1] of two output texts; 0 by definition for the full model itself.
    risk : callable, optional
        ``risk(output, references)`` in [0, 1], `riskcal_adapters.texts.token_error_rate` for instance; ``references``
        is a tuple of strings.
    traces : bool
        Also write each exit's confidence and agreement along the full model's path, one file per shard in
        ``out/traces``, which ``riskcal.Traces.read`` reads.
    stop : Stop, optional
        Test each threshold as soon as all prompts ran at it, as `riskcal.calibrate` will with a fixed sequence, and generate
        no lower ones after the first that fails. The table then says so in a column ``stopped``, and its certificates do.
    progress : bool
        Show a bar: runs, shards with a pool, or thresholds with ``stop``.
    patience : float, optional
        Seconds after which a pool whose workers have finished no batch is given up; None waits for ever. The job of a worker
        that was killed is never done, and ``multiprocessing.Pool`` does not say so (where its processes can be seen, a
        killed one is noticed within seconds). The executors of ``concurrent.futures`` notice it themselves. Give more than
        loading the decoder takes, and one batch.

    Returns
    -------
    pathlib.Path
        ``out``.

    Raises
    ------
    RiskcalError
        Naming the column, the first offending row (from 0) and the remedy, for prompts that are missing, empty or not
        text, ids that repeat, a ``risk`` without references, thresholds that are none, not finite or not distinct, and
        a folder that holds something else, a recording with other settings or a damaged file, or cannot be written; later,
        for a loss outside [0, 1], a decoder that does not keep to the protocol, and a pool that lost a worker. What a
        decoder raises itself is passed on, with a note that says at which prompts.

    Warns
    -----
    UserWarning
        If one text stands under two ids of different clusters: such prompts are not independent. If (of 20 prompts or more)
        nothing ever exits early, or outputs from the lower half of the layers are about as far from the full model's as
        other prompts' outputs are: the model was then hardly trained for early exit.

    Notes
    -----
    Columns: ``prompt``; ``cluster`` and ``group`` where given; ``threshold`` (``inf`` is the full model);
    ``temperature``, ``max_length`` and ``form`` of a decaying schedule; ``min_layer``; ``measure``; ``policy`` (the other
    fields, as JSON: with the length limit, the model's depth and its weights); ``dissimilarity``; ``risk`` where asked for;
    ``layers`` (mean exit layer over the generated tokens, the end token included); ``tokens``; ``seconds`` (wall-clock of
    ``generate``, a batch's divided by its rows; a row that needed no run has those of the run it equals); ``source``. Each
    worker generates its first batch twice before the clock counts, as first calls are slow. For honest seconds of single
    requests record with ``batch_size=1``.

    ``load``, ``dissimilarity`` and ``risk`` are known to a later call by their names only: after changing what stands
    behind a name, record to another folder.

    Examples
    --------
    >>> from functools import partial
    >>> from riskcal_adapters import record, torch
    >>> load = partial(torch.load_example, "g2p")
    >>> record(["calm", "early", "exit"], load, [0.5, 0.7, 0.9], "runs")  # doctest: +SKIP
    """
    rows = _prompts.check_prompts(prompts, references=risk is not None)
    length = _plan.length(max_new_tokens, policy)
    shard_prompts = _validate.count(shard_prompts, "shard_prompts", least=1)
    if not callable(load):
        raise RiskcalError(
            f"load: a {type(load).__name__} cannot be called; give a function that returns it, as workers load their own."
        )
    if pool is not None and not hasattr(pool, "map"):
        raise RiskcalError(
            f"pool: a {type(pool).__name__} has no .map; give a pool of processes, or None."
        )
    if patience is not None and not _validate.number(patience, "patience") > 0:
        raise RiskcalError(
            f"patience: {patience:g} is not above 0; give seconds, or None to wait for ever."
        )
    plan = Plan(
        out=Path(out),
        load=load,
        session=uuid.uuid4().hex,
        template=_plan.template(policy, length),
        thresholds=_plan.descending(thresholds),
        max_new_tokens=length,
        batch_size=_validate.count(batch_size, "batch_size", least=1),
        dissimilarity=dissimilarity,
        risk=risk,
        traces=traces,
        stop=stop,
        patience=None if pool is None else patience,
        length_given=max_new_tokens is not None
        or (policy is not None and policy.max_new_tokens is not None),
    )
    _plan.check_stop(plan, rows)
    _prompts.warn_of_repeated_texts(rows)
    made = _plan.open_folder(plan, rows, shard_prompts)
    shards = [Shard(plan, i, chunk) for i, chunk in enumerate(_chunks(rows, shard_prompts))]
    try:
        _plan.refuse_damaged(shards)
        found = (
            _record(shards, pool, progress)
            if stop is None
            else _record_until(stop, shards, pool, progress)
        )
        with _plan.writing(plan.out):
            _plan.remove_leftovers(plan)
    except BaseException:
        _plan.close_folder(plan, made)
        raise
    finally:
        _release(plan.session)
    _early.warn([one for one in found if isinstance(one, _early.Evidence)])
    return plan.out


def _record(shards: Sequence[Shard], pool: Pool | None, progress: bool) -> list[_early.Evidence]:
    """Shard by shard, each down the whole grid."""
    plan = shards[0].plan
    pending = [shard for shard in shards if not shard.finished]
    if pool is None:
        columns = 1 + len(plan.thresholds)
        total, left = (
            columns * sum(len(shard.prompts) for shard in some) for some in (shards, pending)
        )
        with tqdm(
            total=total, initial=total - left, desc="record", unit="run", disable=not progress
        ) as bar:
            return [_record_shard(shard, bar.update) for shard in pending]
    with tqdm(
        total=len(shards),
        initial=len(shards) - len(pending),
        desc="record",
        unit="shard",
        disable=not progress,
    ) as bar:
        found = []
        for one in _pools.mapped(pool, _record_shard, pending, plan):
            found.append(one)
            bar.update()
    _pools.refuse_unwritten((shard.runs_path for shard in pending), found)
    return found


def _record_until(
    stop: Stop, shards: Sequence[Shard], pool: Pool | None, progress: bool
) -> list[_early.Evidence]:
    """Threshold by threshold, each over all shards, until the test of one fails or none is left."""
    plan = shards[0].plan
    if all(shard.finished for shard in shards):
        _remove_columns(shards)
        return []
    recorded: list[pd.DataFrame] = []
    thresholds = [math.inf, *plan.thresholds]
    for index in tqdm(
        range(len(thresholds)), desc="record", unit="threshold", disable=not progress
    ):
        jobs = [(shard, index) for shard in shards if not _has_column(shard, index)]
        done = list(_pools.mapped(pool, _record_column, jobs, plan))
        _pools.refuse_unwritten(
            (shard.column_path(index) for shard, _ in jobs if not shard.finished), done
        )
        recorded += [_column(shard, index, thresholds[index]) for shard in shards]
        if index > 0 and _fails(stop, recorded):
            break
    stopped = stop if index < len(thresholds) - 1 else None
    pending = [(shard, index, stopped) for shard in shards if not shard.finished]
    found = list(_pools.mapped(pool, _join_columns, pending, plan))
    _pools.refuse_unwritten((shard.runs_path for shard, *_ in pending), found)
    _remove_columns(shards)
    return found


def _record_shard(shard: Shard, advance: Callable[[int], Any] = lambda n: None) -> _early.Evidence:
    """Job: one shard's prompts down the whole grid, and all its files."""
    plan = shard.plan
    decoder = _decoder(shard)
    policies = plan.policies(decoder)
    columns: list[list[Run]] = []
    for policy in policies:
        last = columns[-1] if columns else None
        columns.append(
            _grid.next_runs(decoder, policy, shard.prompts, last, plan.batch_size, plan.beat)
        )
        advance(len(shard.prompts))
    if plan.traces:
        _write_traces(shard, decoder, policies[-1])
    return _write_runs(shard, _table(shard, policies, columns, columns[0], template=policies[-1]))


def _record_column(job: tuple[Shard, int]) -> None:
    """Job: one shard's prompts at one threshold; nothing where another process has finished the shard meanwhile."""
    shard, index = job
    if shard.finished:
        return
    plan = shard.plan
    decoder = _decoder(shard)
    policies = plan.policies(decoder)
    with _unless_finished(shard):
        earlier = [
            _grid.runs_of(_plan.read_shard(shard.column_path(i)))
            for i in (0, index - 1)
            if index > 0
        ]
        last = earlier[-1] if earlier else None
        runs = _grid.next_runs(
            decoder, policies[index], shard.prompts, last, plan.batch_size, plan.beat
        )
        if index == 0 and plan.traces:
            _write_traces(shard, decoder, policies[-1])
        full = earlier[0] if earlier else runs
        rows = _table(shard, policies[index : index + 1], [runs], full, template=policies[-1])
        path = shard.column_path(index)
        with _plan.writing(path):
            path.parent.mkdir(exist_ok=True)
        _write(rows, path)


def _join_columns(job: tuple[Shard, int, Stop | None]) -> _early.Evidence | None:
    """Job: the columns of one shard, up to the last that was recorded, as its file."""
    shard, last, stopped = job
    if shard.finished:
        return None
    with _unless_finished(shard):
        columns = [_plan.read_shard(shard.column_path(i)) for i in range(last + 1)]
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


def _table(shard: Shard, *runs: Any, template: ExitPolicy) -> pd.DataFrame:
    losses: dict[str, Any] = {"dissimilarity": shard.plan.dissimilarity, "risk": shard.plan.risk}
    return _grid.table(shard.prompts, *runs, template=template, **losses)


def _write_runs(shard: Shard, rows: pd.DataFrame) -> _early.Evidence:
    _write(rows.drop(columns=list(_grid.WORKING)), shard.runs_path)
    return _early.evidence(rows, shard.plan.dissimilarity)


def _write_traces(shard: Shard, decoder: Decoder, policy: ExitPolicy) -> None:
    paths = []
    for batch in _chunks(shard.prompts, shard.plan.batch_size):
        ids: list[Any] = [row.prompt for row in batch]
        encoded = decoder.encode([row.text for row in batch])
        traced = decoder.trace(
            *encoded, max_new_tokens=shard.plan.max_new_tokens, prompts=ids, policy=policy
        )
        paths.append(traced.to_frame())
        shard.plan.beat()
    place = {
        row.prompt: i for i, row in enumerate(shard.prompts)
    }  # Traces sorts within each batch: undo that
    whole = pd.concat(paths).sort_values(
        "prompt", key=lambda ids: ids.map(place), kind="stable", ignore_index=True
    )
    _write(whole, shard.traces_path)


def _write(rows: pd.DataFrame, path: Path) -> None:
    try:
        files.write(rows, path)
    except RiskcalError:
        if not path.exists():  # if it does, another process has recorded the same
            raise


def _has_column(shard: Shard, index: int) -> bool:
    return shard.finished or shard.column_path(index).exists()


def _column(shard: Shard, index: int, threshold: float) -> pd.DataFrame:
    """A shard's rows at one threshold, from wherever they stand."""
    if not shard.finished:
        with _unless_finished(shard):
            return _plan.read_shard(shard.column_path(index))
    rows = _plan.read_shard(shard.runs_path).drop(columns="stopped", errors="ignore")
    return rows[rows["threshold"] == threshold]


def _fails(stop: Stop, recorded: Sequence[pd.DataFrame]) -> bool:
    """Whether a fixed sequence ends at the last threshold of the rows, or before."""
    runs = Runs.from_frame(pd.concat(recorded, ignore_index=True))
    calibration = calibrate(runs, **stop.model_dump(), procedure="fixed_sequence")
    return not calibration.table["certified"].iloc[-1]


def _remove_columns(shards: Sequence[Shard]) -> None:
    folder = shards[0].column_path(0).parent
    with _plan.writing(folder):
        for path in folder.glob("*"):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or another process still writes to it
        folder.rmdir()


_slot: tuple[tuple[int, str], Decoder] | None = None
_slot_lock = threading.Lock()


def _decoder(shard: Shard) -> Decoder:
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
            decoder = plan.load()
            _refuse_incomplete(decoder, plan)
            _plan.bind(plan, decoder)
            policies = plan.policies(decoder)
            batch = shard.prompts[: plan.batch_size]
            encoded = decoder.encode([row.text for row in batch])
            for policy in (policies[0], policies[-1]):
                with _grid.noting(batch, policy):
                    decoder.generate(*encoded, policy=policy, max_new_tokens=plan.max_new_tokens)
            plan.beat()
            _slot = key, decoder
        return _slot[1]


def _refuse_incomplete(decoder: Any, plan: Plan) -> None:
    needed = ["n_layers", "encode", "generate", "decode"] + ["trace"] * plan.traces
    lacking = [name for name in needed if not hasattr(decoder, name)]
    if lacking:
        kind = type(decoder).__name__
        raise RiskcalError(
            f"load: returned a {kind} without .{lacking[0]}; it must return a decoder."
        )


def _release(session: str) -> None:
    global _slot
    with _slot_lock:
        if _slot is not None and _slot[0] == (os.getpid(), session):
            _slot = None


def _chunks(rows: tuple[Prompt, ...], size: int) -> list[tuple[Prompt, ...]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
