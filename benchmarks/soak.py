"""Whether a recording whose workers are killed every 20 seconds, for ten minutes, ends in the table of an undisturbed one.

``python benchmarks/soak.py --minutes 10`` records the shipped spelling-to-phonemes model at 21 thresholds, again and again, each
time into a new folder, with a pool of processes of which one, drawn at random, is killed (SIGKILL) every 20 seconds. The call
that ends with it is made again with a new pool, until the recording is whole. Every finished recording is compared with one
that nothing disturbed: row by row, all columns but ``seconds``, and no file more or fewer. It ends at the first recording that
is finished after the minutes are over.
"""

import json
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch as pytorch

import command
import riskcal
from recipes.g2p import data
from riskcal_adapters import record, torch

GRID = np.round(np.arange(0, 1.0001, 0.05), 2)


@cache
def load() -> torch.EarlyExitT5:
    """The decoder, on one thread. Workers are forked from a process that has it: they live for 20 seconds at most."""
    pytorch.set_num_threads(1)
    return torch.load_example("g2p")


class Killer(threading.Thread):
    """Kills a process of the pool that works at the time, every so many seconds."""

    def __init__(self, every: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.every, self.drawn, self.kills, self.over = every, random.Random(seed), 0, False

    def run(self) -> None:
        """Until it is over."""
        while not self.over:
            time.sleep(self.every)
            workers = multiprocessing.active_children()
            if workers and not self.over:
                victim = self.drawn.choice(workers).pid
                assert victim is not None
                os.kill(victim, signal.SIGKILL)
                self.kills += 1


def table(folder: Path) -> pd.DataFrame:
    """All rows of a recording, and what a disturbance may not change in them."""
    shards = [pd.read_parquet(file) for file in sorted(folder.glob("*.parquet"))]
    return pd.concat(shards, ignore_index=True).drop(columns="seconds")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def finished(call: Any, out: Path, processes: int) -> tuple[int, set[str]]:
    """Make the call with new pools until it returns; how often it ended before, and the words with which it did."""
    lost, told = 0, set()
    context = multiprocessing.get_context("fork")
    while True:
        try:
            with ProcessPoolExecutor(processes, mp_context=context) as pool:
                call(pool=pool)
            return lost, told
        except riskcal.RiskcalError as error:
            lost += 1
            told.add(str(error).partition(":")[2].strip())
            print(
                f"call {lost} of this recording ended; {len(list(out.glob('*.parquet')))} files",
                flush=True,
            )


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=20, help="seconds between two kills")
    parser.add_argument("--words", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="draws who is killed")
    options = parser.parse_args()
    words = data.splits(data.read_dictionary(data.dictionary_path()))["test"].words[: options.words]
    settings = {
        "policy": riskcal.ExitPolicy(batching="regroup"),
        "max_new_tokens": 64,
        "batch_size": 16,
        "shard_prompts": 16,  # on a busy machine too several are finished between two kills
        "progress": False,
    }
    prompts = {"prompt": words, "text": words}
    with tempfile.TemporaryDirectory() as name:
        begun = time.perf_counter()
        whole = record(prompts, load, GRID, Path(name) / "whole", **settings)
        undisturbed = time.perf_counter() - begun
        right = table(whole)
        print(f"undisturbed: {len(right)} rows in {undisturbed:.0f} s", flush=True)
        killer = Killer(options.every, options.seed)
        begun, recordings, lost, different, told = time.perf_counter(), 0, 0, 0, set[str]()
        killer.start()
        while time.perf_counter() - begun < 60 * options.minutes:
            out = Path(name) / f"{recordings}"
            ended, said = finished(
                partial(record, prompts, load, GRID, out, **settings), out, options.processes
            )
            recordings, lost, told = recordings + 1, lost + ended, told | said
            found = table(out)
            same_files = names(out) == names(whole)
            different += 0 if found.equals(right) and same_files else 1
            seconds = time.perf_counter() - begun
            print(
                f"{seconds:.0f} s: {killer.kills} workers killed, {lost} calls ended by it, {recordings} recordings finished, "
                f"{different} of them differ",
                flush=True,
            )
        killer.over = True
    figures = {
        "words": len(words),
        "thresholds": len(GRID),
        "rows": len(right),
        "processes": options.processes,
        "seconds between kills": options.every,
        "torch": pytorch.__version__,
        "seconds": round(seconds, 1),
        "seconds undisturbed, one process": round(undisturbed, 1),
        "workers killed": killer.kills,
        "calls that ended": lost,
        "recordings finished": recordings,
        "recordings that differ": different,
        "messages": sorted(told),
    }
    print(json.dumps(figures, indent=1))
    command.keep(figures, options.json)


if __name__ == "__main__":
    main()
