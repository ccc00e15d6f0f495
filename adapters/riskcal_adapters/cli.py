"""`riskcal record`: the command line of `riskcal_adapters.record`."""

import functools
import importlib
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy, Stop
from riskcal.policy.schedules import Constant, Decaying
from riskcal.records import Runs
from riskcal_adapters import texts
from riskcal_adapters.generation_config import DEFAULT_LENGTH
from riskcal_adapters.recording.prompts import check_prompts
from riskcal_adapters.recording.protocol import Decoder
from riskcal_adapters.recording.record import record as record_to_folder

MOST_THRESHOLDS = 10_000


@dataclass(frozen=True)
class NamedDecoder:
    """A decoder by the name of the function that returns it: picklable, and imported only where it is called."""

    module: str
    function: str
    arguments: tuple[str, ...] = ()

    def __call__(self) -> Decoder:
        decoder: Decoder = self.resolve()(*self.arguments)
        return decoder

    def resolve(self) -> Callable[..., Any]:
        """Import the function."""
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)  # the user's own modules, as with `python -m`
        try:
            found: Callable[..., Any] | None = getattr(
                importlib.import_module(self.module), self.function, None
            )
        except ImportError as error:
            raise RiskcalError(
                f"--decoder: module {self.module} cannot be imported ({error})."
            ) from None
        if not callable(found):
            raise RiskcalError(
                f"--decoder: module {self.module} has no function {self.function!r}."
            )
        return found


def record(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="One prompt per line (.txt), or a table (.parquet, .csv, .jsonl) with a column text and optionally "
            "prompt (id), references (in CSV separated by |), cluster and group.",
            show_default=False,
        ),
    ],
    decoder: Annotated[
        str,
        typer.Option(
            help="MODULE:FUNCTION that returns a decoder, or the name of a shipped one: g2p or numbers, jax:g2p for JAX.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the records; goes on with one begun.", show_default=False),
    ],
    thresholds: Annotated[
        str, typer.Option(help="START:STOP:STEP with both ends, or a list: .5,.8,.9")
    ] = "0:1:.05",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Length limit of each generation.", show_default="the template's, else 64"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 1,
    shard_prompts: Annotated[int, typer.Option(help="Prompts per file.")] = 64,
    measure: Annotated[
        str, typer.Option(help="Confidence measure, as the decoder knows it.")
    ] = "softmax",
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Let thresholds decay with the position: tau of CALM's Eq. 5.",
            show_default="no decay",
        ),
    ] = None,
    decay_length: Annotated[
        int | None,
        typer.Option(help="N of Eq. 5; only with --temperature.", show_default="--max-new-tokens"),
    ] = None,
    min_layer: Annotated[int, typer.Option(help="No exit before this layer.")] = 1,
    template: Annotated[
        Path | None,
        typer.Option(
            help="A policy file instead of these: also pruning, caches, batching and sampling.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str, typer.Option(help=f"What outputs are compared by: {', '.join(texts.LOSSES)}.")
    ] = "token-errors",
    risk: Annotated[
        bool, typer.Option("--risk", help="Also record the loss against references.")
    ] = False,
    traces: Annotated[
        bool, typer.Option(help="Also record every exit along the full model's path.")
    ] = False,
    stop_delta: Annotated[
        float | None,
        typer.Option(
            help="Generate no thresholds below the first whose expected loss fixed-sequence testing does not certify "
            "to be at most this.",
            show_default="all thresholds",
        ),
    ] = None,
    stop_epsilon: Annotated[float, typer.Option(help="Error probability of that testing.")] = 0.05,
    stop_objective: Annotated[
        str, typer.Option(help="Its loss: textual, risk or risk_clipped.")
    ] = "textual",
    workers: Annotated[int, typer.Option(help="Processes; each loads the decoder.")] = 1,
) -> None:
    """Run a decoder over prompts at each threshold and with the full model, and write its losses and costs.

    Stopped halfway, it goes on where it stopped when run again.
    """
    table = read_prompts(prompts, references=risk)
    grid = parse_thresholds(thresholds)
    internal.count(workers, "--workers", least=1)
    load = parse_decoder(decoder)
    load.resolve()  # a wrong name must fail here, not in a worker
    distance, error = texts.LOSSES[internal.choice(loss, "--loss", texts.LOSSES)]
    try:
        distance("a", "b")  # so must a missing library
    except ImportError as missing:
        raise RiskcalError(f"--loss: {missing}") from None
    schedule = (
        Constant()
        if temperature is None
        else Decaying(temperature, decay_length or max_new_tokens or DEFAULT_LENGTH)
    )
    policy = ExitPolicy(measure=measure, schedule=schedule, min_layer=min_layer)
    if template is not None:
        if policy != ExitPolicy(measure="softmax"):
            raise RiskcalError(
                "--template: says the measure, the schedule and the first layer itself; give one or the other."
            )
        policy = ExitPolicy.load(template).model_copy(update={"threshold": math.inf})
    settings: dict[str, Any] = {
        "delta": stop_delta,
        "epsilon": stop_epsilon,
        "objective": stop_objective,
    }
    stop = None if stop_delta is None else Stop(**settings)
    with _processes(workers) as pool:
        written = record_to_folder(
            table,
            load,
            grid,
            out,
            pool=pool,
            policy=policy,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            shard_prompts=shard_prompts,
            dissimilarity=distance,
            risk=error if risk else None,
            traces=traces,
            stop=stop,
        )
    _report(written, len(table), len(grid), stop, traces=traces, risk=risk)


def read_prompts(path: Path, *, references: bool = False) -> pd.DataFrame:
    """The table of prompts in a file, checked; every `RiskcalError` names the file, the column and the row (from 0)."""
    if path.suffix.lower() == ".txt":
        table = pd.DataFrame({"text": _lines(path)}, dtype=object)
    else:
        try:
            table = internal.read_table(path)
        except UnicodeDecodeError as error:
            raise RiskcalError(
                f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})."
            ) from None
    if path.suffix.lower() == ".csv" and "references" in table.columns:
        table["references"] = pd.Series(
            [_split(value) for value in table["references"]], dtype=object
        )
    try:
        check_prompts(table, references=references)
    except RiskcalError as error:
        raise RiskcalError(f"{path}: {error}") from None
    return table


def _split(cell: Any) -> Any:
    return [part.strip() for part in cell.split("|")] if isinstance(cell, str) else [cell]


def _lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except OSError as error:
        raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise RiskcalError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None


def parse_thresholds(text: str) -> list[float]:
    """``start:stop:step`` with both ends, exact in decimals (0.15, not 0.15000000000000002), or a list with commas.

    Raises
    ------
    RiskcalError
        For anything else, an empty range or more than 10,000 thresholds.
    """
    parts = text.split(":")
    if len(parts) == 1:
        return [float(_decimal(part, text)) for part in text.split(",")]
    if len(parts) != 3:
        raise RiskcalError(
            f"--thresholds: {text!r} is neither START:STOP:STEP nor a list such as .5,.8,.9."
        )
    start, stop, step = (_decimal(part, text) for part in parts)
    if step <= 0 or stop < start:
        raise RiskcalError(
            f"--thresholds: {text!r} holds no threshold; give START <= STOP and a positive STEP."
        )
    if (stop - start) / step >= MOST_THRESHOLDS:
        raise RiskcalError(
            f"--thresholds: {text!r} makes more than {MOST_THRESHOLDS} thresholds; give a larger STEP."
        )
    return [float(start + i * step) for i in range(int((stop - start) / step) + 1)]


def _decimal(part: str, text: str) -> Decimal:
    try:
        value = Decimal(part.strip())
    except InvalidOperation:
        raise RiskcalError(f"--thresholds: {part.strip()!r} in {text!r} is not a number.") from None
    if not math.isfinite(value):
        raise RiskcalError(
            f"--thresholds: {part.strip()!r} in {text!r} is not finite; the full model is recorded for every prompt "
            "anyway: leave it out."
        )
    return value


def parse_decoder(text: str) -> NamedDecoder:
    """``MODULE:FUNCTION``, or the short name of a checkpoint that ships: ``g2p`` is ``torch:g2p``, ``jax:g2p`` the other."""
    module, colon, function = text.partition(":")
    if not colon:
        module, function = "torch", text
    if module in ("torch", "jax"):
        return NamedDecoder(f"riskcal_adapters.{module}", "load_example", (function,))
    if not module or not function.isidentifier():
        raise RiskcalError(
            f"--decoder: {text!r} is neither MODULE:FUNCTION nor the name of a shipped decoder (g2p, jax:g2p)."
        )
    return NamedDecoder(module, function)


def _processes(workers: int) -> Any:
    if workers == 1:
        return nullcontext()
    # spawned, as forks of a process that has run torch can hang
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _share_cores, (workers,)
    )


def _share_cores(workers: int) -> None:
    """Before torch is imported: workers that each use all cores are slower than one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def _report(
    out: Path, n_prompts: int, n_thresholds: int, stop: Stop | None, *, traces: bool, risk: bool
) -> None:
    say = functools.partial(Console(soft_wrap=True, highlight=False).print, markup=False)
    files = len(list(out.glob("runs-*.parquet")))
    delta, objective = 0.1, "risk" if risk else "textual"
    if stop is not None:
        delta, objective = stop.delta, stop.objective
        recorded = len(Runs.read(out).thresholds)
        if recorded < n_thresholds:
            say(
                f"Testing failed at threshold {recorded} of {n_thresholds}: lower ones were not generated."
            )
        n_thresholds = recorded
    say(
        f"Recorded {n_prompts} prompts with the full model and {n_thresholds} thresholds; files in {out}: {files}"
    )
    if traces:
        say(f"Traces of every exit: {out / 'traces'}")
    option = "" if objective == "textual" else f" --objective {objective}"
    say(f"Next: riskcal calibrate {out} --delta {delta:g}{option}")
