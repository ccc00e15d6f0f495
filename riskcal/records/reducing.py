"""`reduce`: from sharded logs of tokens to runs, one file at a time, on as many processes as a pool has."""

import hashlib
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from riskcal import _parquet, _replacing, _validate
from riskcal._validate import RiskcalError
from riskcal.records import files, renaming, resuming
from riskcal.records.columns import plain
from riskcal.records.runs import Runs
from riskcal.records.traces import Traces


class Pool(Protocol):
    """Whatever maps: `multiprocessing.Pool`, `concurrent.futures.ProcessPoolExecutor`, `ray.util.multiprocessing.Pool`."""

    def map(self, function: Callable[[Any], Any], items: Any, /) -> Iterable[Any]:
        """The function's results, in the order of the items."""


class _Shard(NamedTuple):
    """What came of one file: where it went, 64 bits of each prompt's id, and what was measured."""

    source: Path
    name: str
    prints: NDArray[np.uint64]
    columns: frozenset[str]


def reduce(
    source: files.Source,
    out: Any,
    replay: Callable[[Traces], Runs],
    *,
    columns: renaming.Columns | None = None,
    pool: Pool | None = None,
) -> Path:
    """Turn logs of tokens, one row per token, into runs, one row per prompt and threshold, file by file.

    Memory is that of the largest file in each process, beside eight bytes for each prompt. So a prompt's tokens stand in
    one file, which holds at least two prompts; nothing has to be sorted.

    Parameters
    ----------
    source : path, pattern, folder or list of these
        As `Traces.read` takes; every file holds rows of `Traces`.
    out : path
        A folder that does not exist yet. It gets one Parquet file of runs for each file of the source, and appears when all
        are written: `Runs.read` reads it. What is finished of a call that was cut off, by whatever, waits beside it, in
        ``.NAME.unfinished``, and the same call goes on with it: files whose size or time has changed since are reduced anew,
        and all are where ``replay``, what it reads, the file that defines it, ``columns`` or riskcal's version is another.
    replay : function of Traces that returns Runs
        ``functools.partial(riskcal.replay_traces, thresholds=grid, exact=True)``, for instance. A pool of processes needs one
        that it can send to them, which a lambda is not. To be known again it is a function from a file, or a partial of one,
        with numbers, texts, arrays and schedules bound to it; of any other nothing is kept.
    columns : mapping, optional
        The log's own names, as in `Traces.from_frame`.
    pool : object with ``map``, optional
        Where files are reduced at a time. The runs are the same with any pool and with none.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    RiskcalError
        For a file that cannot be read as traces or replayed, and for a prompt in two files, by their names; ``out`` is then
        as it was. Mend a file that cannot be read and make the same call: those that were finished are not reduced again.
        Of files that do not go together none is kept.

    Examples
    --------
    >>> from functools import partial
    >>> from pathlib import Path
    >>> Path("log").mkdir()  # a file of tokens for each worker that wrote one
    >>> riskcal.load_example("g2p-traces").write("log/part-0.parquet")
    >>> replay = partial(riskcal.replay_traces, thresholds=[0.9, 0.5], exact=True)
    >>> riskcal.Runs.read(riskcal.records.reduce("log", "runs", replay)).n
    1000
    """
    target = _replacing.a_path(out)
    if target.exists():
        raise RiskcalError(f"out: {target} exists already; name a folder that does not.")
    found = files.parts(source)
    unfinished = resuming.unfinished(target, replay, columns)
    runs = unfinished / "runs"
    width = len(str(len(found) - 1))
    tasks = [(part, runs / f"{place:0{width}}.parquet") for place, part in enumerate(found)]
    work = _Reduction(replay, columns)
    shards = list(map(work, tasks) if pool is None else pool.map(work, tasks))
    try:
        _refuse_shared(shards, runs)
        _make_alike(shards, runs)
    except RiskcalError:
        shutil.rmtree(unfinished.parent, ignore_errors=True)
        raise
    for other in set(runs.iterdir()) - {file for _, file in tasks}:
        other.unlink()  # half written by a process that was killed, or of a longer list of files
    try:
        runs.rename(target)
    except OSError as error:
        raise RiskcalError(
            f"out: {target} cannot be put in place ({error.strerror}); make one call at a time with one out."
        ) from None
    shutil.rmtree(unfinished.parent, ignore_errors=True)
    return target


@dataclass(frozen=True)
class _Reduction:
    """What a process does with one file."""

    replay: Callable[[Traces], Runs]
    columns: renaming.Columns | None

    def __call__(self, task: tuple[files.Part, Path]) -> _Shard:
        part, target = task
        with _validate.reading("source", "files that are there"):
            state = resuming.state(part)  # before it is read: a later change is noticed
        if (found := resuming.finished(target, state)) is not None:
            prompts, measured = found
        else:
            resuming.forget(target)
            prompts, measured = self._made(part, target)
            resuming.finish(target, state, measured)
        return _Shard(part.file, target.name, _prints(prompts), measured)

    def _made(self, part: files.Part, target: Path) -> tuple[NDArray[Any], frozenset[str]]:
        """The prompts and what was measured in the runs of a file, which are written."""
        frame = files.read_part(part, renaming.only_renamed(self.columns))
        try:
            traces = Traces.from_frame(frame, columns=self.columns)
            del frame
            runs = self.replay(traces)
        except RiskcalError as error:
            raise RiskcalError(f"{part.file}: {error}") from None
        if not isinstance(runs, Runs):
            raise RiskcalError(
                f"replay: gives a {type(runs).__name__}, not Runs; partial(replay_traces, thresholds=...) does."
            )
        runs.write(target)
        return runs.prompts, frozenset((*runs.values, *runs.candidates.columns, *runs.labels))


def _prints(prompts: NDArray[Any]) -> NDArray[np.uint64]:
    """64 bits of each id and its type, since 7 is another prompt than "7"."""
    ids = (f"{type(one).__name__}\x00{one}".encode() for one in prompts.tolist())
    digests = b"".join(hashlib.blake2b(one, digest_size=8).digest() for one in ids)
    return np.frombuffer(digests, dtype=np.uint64)


def _refuse_shared(shards: list[_Shard], folder: Path) -> None:
    """Refuse a prompt whose tokens stand in two files: its mean would be taken twice, of parts."""
    prints = np.concatenate([shard.prints for shard in shards])
    order = np.argsort(prints, kind="stable")
    twice = np.flatnonzero(np.diff(prints[order]) == 0)
    ends = np.cumsum([len(shard.prints) for shard in shards])
    for place in twice:
        one, other = (
            shards[int(np.searchsorted(ends, row, side="right"))]
            for row in order[place : place + 2]
        )
        ids = [set(Runs.read(folder / shard.name).prompts.tolist()) for shard in (one, other)]
        shared = sorted(ids[0] & ids[1], key=str)  # none, where two ids have the same 64 bits
        if shared:
            raise RiskcalError(
                f"prompt: {plain(shared[0])!r} has tokens in {one.source} and in {other.source} ({len(shared)} prompts have); "
                "write all tokens of a prompt into one file."
            )


def _make_alike(shards: list[_Shard], folder: Path) -> None:
    """Leave out distances that some files lack, and refuse files that differ in anything else: together they are no table.

    Of logged losses a file says distances too where its own full model's losses happen to be 0 throughout.
    """
    all_have = frozenset.intersection(*(shard.columns for shard in shards))
    if "risk" in all_have and "dissimilarity" not in all_have:
        for shard in (shard for shard in shards if "dissimilarity" in shard.columns):
            resuming.forget(folder / shard.name)  # its file's runs have them
            table = _parquet.read(folder / shard.name)
            _parquet.write(table.drop_columns("dissimilarity"), folder / shard.name)
        shards = [one._replace(columns=one.columns - {"dissimilarity"}) for one in shards]
    first = shards[0]
    for shard in shards:
        if differ := shard.columns ^ first.columns:
            having, lacking = (first, shard) if differ & first.columns else (shard, first)
            raise RiskcalError(
                f"{min(differ)}: the runs of {having.source} have it, those of {lacking.source} do not; log the same of every "
                "token, or reduce the two by themselves."
            )
