"""How time and memory grow with the number of token rows: sharded logs -> `riskcal.records.reduce` -> `Runs.read` -> `calibrate`.

Logs of 10^5, 10^6 and so on rows are drawn into shards of a fixed size, so that more rows are more files, and each size is
reduced, read and calibrated in a process of its own, whose largest memory the operating system tells. Prompts have 100
tokens, decisions 6 exits, and there are 20 thresholds: 5 rows of tokens make one of runs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

import command
import riskcal
from riskcal.records import reduce

TOKENS, EXITS, GRID = 100, 6, tuple(np.linspace(0.9731, 0.0231, 20))


def write_shard(folder: Path, number: int, rows: int) -> None:
    """Tokens of prompts of their own difficulty; the surer an exit, the likelier it agrees with the last."""
    rng = np.random.default_rng(number)
    ease = np.repeat(rng.beta(4, 2, rows // TOKENS), TOKENS)[:, None]
    confidence = np.sort(rng.random((rows, EXITS)) ** (1 / (1 + 3 * ease)), axis=1)
    agrees = rng.random((rows, EXITS)) < confidence
    agrees[:, -1] = True
    table = {
        "prompt": np.repeat(np.arange(rows // TOKENS) + number * rows // TOKENS, TOKENS),
        "position": np.tile(np.arange(TOKENS), rows // TOKENS),
        "confidence": pa.FixedSizeListArray.from_arrays(
            confidence.astype(np.float32).ravel(), EXITS
        ),
        "agrees": pa.FixedSizeListArray.from_arrays(agrees.ravel(), EXITS),
    }
    pa.parquet.write_table(pa.table(table), folder / f"{number:06}.parquet", compression="zstd")


def work(folder: Path, processes: int) -> dict[str, float]:
    """Seconds of each step on the logs of a folder; run in a process of its own."""
    moments = [time.perf_counter()]

    def lap() -> float:
        moments.append(time.perf_counter())
        return round(moments[-1] - moments[-2], 2)

    replay = partial(riskcal.replay_traces, thresholds=GRID, exact=True)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            out = reduce(folder / "tokens", folder / "runs", replay, pool=pool)
    else:
        out = reduce(folder / "tokens", folder / "runs", replay)
    seconds = {"reduce": lap()}
    seconds["reduce_mb"] = peak()
    runs = riskcal.Runs.read(out)
    seconds["read"] = lap()
    seconds["read_mb"] = peak()
    threshold = riskcal.calibrate(runs, delta=0.2).threshold
    return seconds | {"calibrate": lap(), "threshold": threshold}


def peak() -> int:
    """The most memory that this process has had so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def measured(rows: int, shard: int, processes: int) -> dict[str, float]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokens").mkdir()
        for number in range(rows // shard):
            write_shard(folder / "tokens", number, shard)
        size = sum(file.stat().st_size for file in (folder / "tokens").iterdir())
        command = [sys.executable, __file__, "--work", name, "--processes", str(processes)]
        report = Path(name) / "time"
        timed = ["/usr/bin/time", "-v", "-o", str(report)] if Path("/usr/bin/time").exists() else []
        child = subprocess.Popen([*timed, *command], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        told = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(child.returncode)
        time_v = [line.strip() for line in report.read_text().splitlines()[1:]] if timed else []
    return {
        "rows": rows,
        "files": rows // shard,
        "prompts": rows // TOKENS,
        "log_mb": round(size / 1e6, 1),
        **json.loads(told),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1e3),
        "time -v": [line for line in time_v if not line.endswith(": 0")],
    }


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--shard", type=int, default=10**5, help="rows of a file")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(options.work, options.processes)))
        return
    lines = []
    for rows in options.rows:
        lines.append(measured(rows, options.shard, options.processes))
        print(pd.DataFrame(lines).drop(columns="time -v").to_string(index=False), flush=True)
    if options.json:
        told = {"shard": options.shard, "processes": options.processes, "exits": EXITS}
        figures = told | {"thresholds": len(GRID), "cores": os.cpu_count(), "sizes": lines}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
