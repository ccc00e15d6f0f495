"""`record`: run an early-exit decoder over prompts and thresholds, and write down what it lost and what it cost.

Knows no framework: whatever offers `Decoder` can be recorded.
"""

import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.typing import ArrayLike
from tqdm.auto import tqdm

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy, Stop
from riskcal_adapters import texts
from riskcal_adapters.recording import folder, job, pools, untrained_exits, worker
from riskcal_adapters.recording.job import Recording, Shard
from riskcal_adapters.recording.prompts import (
    check_prompts,
    needs_references,
    warn_of_repeated_texts,
)
from riskcal_adapters.recording.protocol import Decoder, Pool


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
    engine: bool = False,
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
        is a tuple of strings. One with an attribute ``needs_references`` that is False does without.
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
    engine : bool
        Decode each batch depth-wise (`riskcal_adapters.torch.Engine`): the same rows, and sooner where ``batch_size`` is large.
        For the decoders and policies that an engine takes; ``seconds`` are then shares of a batch's.

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
    ``generate``, a batch's divided by its rows; a row that needed no run has those of the run it equals); ``source``. First
    calls are slow: each worker generates its first batch of a size by the full model and at the lowest threshold before the
    clock counts (of sizes rounded: rows to 1, 2, 4, 8 and multiples of 8, prompt tokens to powers of two from 16). For honest
    seconds of single requests record with ``batch_size=1``.

    ``load``, ``dissimilarity`` and ``risk`` are known to a later call by their names only: after changing what stands
    behind a name, record to another folder.

    Examples
    --------
    >>> from functools import partial
    >>> from riskcal_adapters import record, torch
    >>> load = partial(torch.load_example, "g2p")
    >>> folder = record(["calm", "early", "exit"], load, [0.5, 0.7, 0.9], "runs", max_new_tokens=24, progress=False)
    >>> riskcal.Runs.read(folder).losses("textual").shape
    (3, 3)
    """
    rows = check_prompts(prompts, references=needs_references(risk))
    length = job.length(max_new_tokens, policy)
    shard_prompts = internal.count(shard_prompts, "shard_prompts", least=1)
    if not callable(load):
        raise RiskcalError(
            f"load: a {type(load).__name__} cannot be called; give a function that returns it, as workers load their own."
        )
    if pool is not None and not hasattr(pool, "map"):
        raise RiskcalError(
            f"pool: a {type(pool).__name__} has no .map; give a pool of processes, or None."
        )
    if patience is not None and not internal.number(patience, "patience") > 0:
        raise RiskcalError(
            f"patience: {patience:g} is not above 0; give seconds, or None to wait for ever."
        )
    out = internal.a_path(out)
    plan = Recording(
        out=out if pool is None else out.absolute(),  # workers may be in another folder
        load=load,
        session=uuid.uuid4().hex,
        template=job.template(policy, length),
        thresholds=job.descending(thresholds),
        max_new_tokens=length,
        batch_size=internal.count(batch_size, "batch_size", least=1),
        dissimilarity=dissimilarity,
        risk=risk,
        traces=traces,
        stop=stop,
        engine=engine,
        patience=None if pool is None else patience,
        length_given=max_new_tokens is not None
        or (policy is not None and policy.max_new_tokens is not None),
    )
    job.check_stop(plan, rows)
    job.check_engine(plan)
    warn_of_repeated_texts(rows)
    made = folder.open_folder(plan, rows, shard_prompts)
    shards = [Shard(plan, i, chunk) for i, chunk in enumerate(worker.chunks(rows, shard_prompts))]
    try:
        folder.refuse_damaged(shards)
        found = (
            _record(shards, pool, progress)
            if stop is None
            else _record_until(stop, shards, pool, progress)
        )
        with folder.writing(plan.out):
            folder.remove_leftovers(plan)
    except BaseException:
        folder.close_folder(plan, made)
        raise
    finally:
        worker.release(plan.session)
    untrained_exits.warn([one for one in found if isinstance(one, untrained_exits.Evidence)])
    return out


def _record(
    shards: Sequence[Shard], pool: Pool | None, progress: bool
) -> list[untrained_exits.Evidence]:
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
            return [worker.record_shard(shard, bar.update) for shard in pending]
    with tqdm(
        total=len(shards),
        initial=len(shards) - len(pending),
        desc="record",
        unit="shard",
        disable=not progress,
    ) as bar:
        found = []
        for one in pools.mapped(pool, worker.record_shard, pending, plan):
            found.append(one)
            bar.update()
    pools.refuse_unwritten((shard.runs_path for shard in pending), found)
    return found


def _record_until(
    stop: Stop, shards: Sequence[Shard], pool: Pool | None, progress: bool
) -> list[untrained_exits.Evidence]:
    """Threshold by threshold, each over all shards, until the test of one fails or none is left."""
    plan = shards[0].plan
    if all(shard.finished for shard in shards):
        worker.remove_columns(shards)
        return []
    recorded: list[pd.DataFrame] = []
    thresholds = [math.inf, *plan.thresholds]
    for index in tqdm(
        range(len(thresholds)), desc="record", unit="threshold", disable=not progress
    ):
        jobs = [(shard, index) for shard in shards if not worker.has_column(shard, index)]
        done = list(pools.mapped(pool, worker.record_column, jobs, plan))
        pools.refuse_unwritten(
            (shard.column_path(index) for shard, _ in jobs if not shard.finished), done
        )
        recorded += [worker.column(shard, index, thresholds[index]) for shard in shards]
        if index > 0 and worker.fails(stop, recorded):
            break
    stopped = stop if index < len(thresholds) - 1 else None
    pending = [(shard, index, stopped) for shard in shards if not shard.finished]
    found = list(pools.mapped(pool, worker.join_columns, pending, plan))
    pools.refuse_unwritten((shard.runs_path for shard, *_ in pending), found)
    worker.remove_columns(shards)
    return found
