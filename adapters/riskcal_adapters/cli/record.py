"""`riskcal record`: the command line of `riskcal_adapters.record`."""

import functools
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy, Stop
from riskcal.policy.schedules import Constant, Decaying
from riskcal.records import Runs
from riskcal_adapters import texts
from riskcal_adapters.cli.decoders import DecoderOption, HeadsOption, ModelOption, asked_decoder
from riskcal_adapters.cli.losses import parse_loss
from riskcal_adapters.cli.prompts import read_prompts
from riskcal_adapters.generation_config import DEFAULT_LENGTH
from riskcal_adapters.recording.prompts import needs_references
from riskcal_adapters.recording.record import record as record_to_folder

MOST_THRESHOLDS = 10_000


def record(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="One prompt per line (.txt), or a table (.parquet, .csv, .jsonl) with a column text and optionally "
            "prompt (id), references (in CSV separated by |), cluster and group.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the records; goes on with one begun.",
            show_default=False,
        ),
    ],
    decoder: DecoderOption = None,
    model: ModelOption = None,
    heads: HeadsOption = None,
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
        str,
        typer.Option(
            help=f"What outputs are compared by: {', '.join(texts.LOSSES)}; or what makes one valid: json-schema:FILE, "
            "regex:PATTERN, valid:MODULE:FUNCTION."
        ),
    ] = "token-errors",
    risk: Annotated[
        bool,
        typer.Option("--risk", help="Also record the loss against references, or what is invalid."),
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
    engine: Annotated[
        bool,
        typer.Option(
            "--engine",
            help="Each prompt of a batch at its own layer and position: the same rows, sooner.",
        ),
    ] = False,
) -> None:
    """Run a decoder over prompts at each threshold and with the full model, and write its losses and costs.

    Stopped halfway, it goes on where it stopped when run again.
    """
    distance, error = parse_loss(loss)
    table = read_prompts(prompts, references=risk and needs_references(error))
    grid = parse_thresholds(thresholds)
    internal.count(workers, "--workers", least=1)
    load = asked_decoder(decoder, model, heads)
    load.resolve()  # a wrong name must fail here, not in a worker
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
            engine=engine,
        )
    _report(written, len(table), len(grid), stop, traces=traces, risk=risk)


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
