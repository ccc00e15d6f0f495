"""The tree as it is against an older commit of it, paired in one run: p-values, replay, calibration and decoding.

``python benchmarks/against.py COMMIT`` checks the commit out beside the repository, starts one process on each tree, and lets
them do the same jobs in turns, so that a machine's drift meets both alike. The jobs use only what both commits have. A ratio
is the median over rounds of this tree's CPU seconds over the older one's: below 1, this tree is faster. Which goes first
changes with every round. What the jobs give is compared too: a p-value, a table or a token that differs is told.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import command

ROOT = Path(__file__).resolve().parents[1]
#: The last commit of flat modules, before the layout of today.
BEFORE = "c66557f"
DELTA = 0.1
POLICIES = {"full model": None, "threshold .85": 0.85, "threshold .45": 0.45}


def jobs() -> dict[str, Callable[[], Any]]:
    """By name, what is timed; each gives what it found, to be compared."""
    import riskcal

    rng = np.random.default_rng(0)
    losses = rng.beta(0.5, 5.0, size=(5000, 100))
    runs, traces = riskcal.load_example("g2p"), riskcal.load_example("g2p-traces")
    grid = np.linspace(0.005, 0.995, 50).round(3) + 1e-4
    made: dict[str, Callable[[], Any]] = {
        f"p-values, {name}": lambda test=test: test(losses, DELTA)
        for name, test in {
            "Hoeffding-Bentkus": riskcal.pvalues.hoeffding_bentkus,
            "convex order": riskcal.pvalues.convex_order,
            "Bernstein": riskcal.pvalues.empirical_bernstein,
            "betting": lambda given, delta: riskcal.pvalues.betting(given, delta, level=0.05),
        }.items()
    }
    made["calibrate, shipped runs"] = lambda: riskcal.calibrate(runs, delta=DELTA).threshold
    made["replay, shipped traces"] = lambda: riskcal.replay_traces(
        traces, grid, exact=True
    ).losses()
    confidence, loss = rng.random((100_000, 8)), rng.random((100_000, 8))
    made["replay, 100,000 rows"] = lambda: riskcal.replay_arrays(confidence, loss, grid)[0]
    return made | decodings()


def decodings() -> dict[str, Callable[[], Any]]:
    """Words of the shipped model, one by one and in batches."""
    import torch

    import riskcal
    from riskcal_adapters.torch import load_example

    torch.set_num_threads(1)
    decoder = load_example("g2p")
    words = list(dict.fromkeys(map(str, riskcal.load_example("g2p-traces").prompt)))[:256]
    made = {}
    for batch, count in ((1, 40), (64, 256)):
        given = [decoder.encode(words[i : i + batch]) for i in range(0, count, batch)]
        for name, threshold in POLICIES.items():
            policy = (
                riskcal.ExitPolicy.full_model()
                if threshold is None
                else riskcal.ExitPolicy(threshold=threshold)
            )

            def decode(given: list[Any] = given, policy: riskcal.ExitPolicy = policy) -> Any:
                done = [
                    decoder.generate(ids, mask, policy=policy, max_new_tokens=24)
                    for ids, mask in given
                ]
                return [one.tokens.tolist() for one in done]

            made[f"decode {batch} at a time, {name}"] = decode
    return made


def digest(found: Any) -> str:
    """Of what a job found, numbers to nine digits."""
    if isinstance(found, np.ndarray | float):
        found = [f"{one:.9g}" for one in np.ravel(found)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def serve() -> None:
    """Do the jobs that the other end names; answers are lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    table = jobs()
    print(json.dumps(list(table)), file=answers, flush=True)
    for line in sys.stdin:
        before = time.process_time()
        found = table[line.rstrip("\n")]()
        seconds = time.process_time() - before
        print(json.dumps([seconds, digest(found)]), file=answers, flush=True)


def start(tree: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "adapters")]),
        "OMP_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
        "NUMBA_CACHE_DIR": str(tree / ".numba"),
    }
    return subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tree,
    )


def ask(process: subprocess.Popen[str], job: str | None = None) -> Any:
    """The answer to a job, or the list of jobs that a new process begins with."""
    assert process.stdin
    assert process.stdout
    if job is not None:
        print(job, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the process on {process.args} ended; its messages stand above.")
    return json.loads(line)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("commit", nargs="?", default=BEFORE, help=f"{BEFORE} unless told")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="jobs whose names hold this")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return

    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "older"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(old), options.commit], check=True)
        try:
            rows = compare({"old": start(old), "new": start(ROOT)}, options.rounds, options.only)
        finally:
            subprocess.run([*git, "remove", "--force", str(old)], check=True)
    print(f"{'this tree over ' + options.commit:36} ratio  least   most  same result")
    for row in rows:
        print("{job:36} {ratio:5.2f}  {least:5.2f}  {most:5.2f}  {same}".format(**row))
    if options.json:
        figures = {"against": options.commit, "rounds": options.rounds, "rows": rows}
        partial = options.json.with_name(f".{options.json.name}.partial")
        partial.write_text(json.dumps(figures, indent=1) + "\n")
        partial.replace(options.json)


def compare(
    processes: dict[str, subprocess.Popen[str]], rounds: int, only: str
) -> list[dict[str, Any]]:
    """A row for each job; a first round, which compiles and warms, does not count."""
    names = {tree: ask(process) for tree, process in processes.items()}
    rows = []
    for job in (one for one in names["new"] if only in one):
        ratios, found = [], {}
        for turn in range(rounds + 1):
            order = list(processes)[:: 1 if turn % 2 else -1]
            took = {}
            for tree in order:
                took[tree], found[tree] = ask(processes[tree], job)
            if turn:
                ratios.append(took["new"] / took["old"])
        rows.append(
            {
                "job": job,
                "ratio": float(np.median(ratios)),
                "least": min(ratios),
                "most": max(ratios),
                "same": found["new"] == found["old"],
            }
        )
    for process in processes.values():
        process.communicate()
    return rows


if __name__ == "__main__":
    main()
