"""Sending jobs to a pool that may lose a worker: what comes back, and what is said when something does not."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from riskcal import RiskcalError
from riskcal_adapters.recording.job import Recording
from riskcal_adapters.recording.protocol import Pool

_RESUME = (
    "Finished shards are kept: make the same call again, with fewer workers if memory was short."
)
_POLL = 1.0


def mapped(
    pool: Pool | None, function: Callable[[Any], Any], jobs: Sequence[Any], plan: Recording
) -> Iterator[Any]:
    """Results of the jobs as they come, in any order.

    Raises
    ------
    RiskcalError
        If the pool says, or shows, that a worker was lost, or if nothing has been done for ``plan.patience`` seconds.
    """
    if pool is None or not jobs:
        yield from map(function, jobs)
        return
    try:
        # multiprocessing's own map returns only when all is done; results are needed as they come, for the bar
        results = getattr(pool, "imap_unordered", pool.map)(function, jobs)
        for result in _watched(results, pool, plan) if hasattr(results, "next") else results:
            if isinstance(result, BaseException):
                # what a job itself raised is wrapped by Ray, and passed on as from any other pool
                underlying = getattr(result, "underlying", None)
                raise underlying if isinstance(underlying, Exception) else _lost(result)
            yield result
    except BrokenExecutor as error:
        raise _lost(error) from error
    except Exception as error:
        if type(error).__module__.startswith("ray.") and not isinstance(error, RiskcalError):
            raise _lost(error) from error
        raise


def _lost(error: BaseException) -> RiskcalError:
    cause = getattr(error, "cause", None)  # Ray's own errors begin with where they happened
    error = cause if isinstance(cause, BaseException) else error
    what = (
        f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if str(error)
        else type(error).__name__
    )
    return RiskcalError(
        f"pool: a worker died or failed before its shard was done ({what}). {_RESUME}"
    )


def _watched(results: Any, pool: Any, plan: Recording) -> Iterator[Any]:
    """What ``results.next(timeout)`` gives, unless the pool's processes or its pulse say that more will not come."""
    pulse, since = None, time.monotonic()
    processes: set[Any] = set()
    while True:
        # multiprocessing's: those that die are replaced, without a word
        processes.update(getattr(pool, "_pool", ()))
        try:
            result = results.next(_POLL)
        except StopIteration:
            return
        except multiprocessing.TimeoutError:
            killed = [one for one in processes if getattr(one, "exitcode", None) not in (None, 0)]
            if killed:
                raise RiskcalError(
                    f"pool: worker process {killed[0].pid} was killed (exit code {killed[0].exitcode}), often for lack of "
                    f"memory, and its shard will not be done. {_RESUME}"
                ) from None
            latest = plan.pulse.stat().st_mtime_ns if plan.pulse.exists() else None
            if latest != pulse:
                pulse, since = latest, time.monotonic()
            if plan.patience is not None and time.monotonic() - since > plan.patience:
                raise RiskcalError(
                    f"pool: no worker has finished a batch for {plan.patience:g} seconds; was one killed? {_RESUME} If batches "
                    "take longer, give more patience=."
                ) from None
        else:
            since = time.monotonic()
            yield result


def refuse_unwritten(paths: Iterable[Path], results: Sequence[Any]) -> None:
    """Refuse a pool that came back before all was done."""
    lacking = [path.name for path in paths if not path.exists()]
    if not lacking:
        return
    if any(hasattr(one, "result") for one in results):
        raise RiskcalError(
            f"pool: returned before {lacking[0]} was written; its map must give results, not futures."
        )
    raise RiskcalError(
        f"pool: returned without an error, but {lacking[0]} was not written (of {len(lacking)} in all): a worker was lost, or "
        f"writes to a disk that is not seen from here. {_RESUME}"
    )
