"""`riskcal monitor`: watch a log of losses, and stop as soon as they exceed what was certified."""

import io
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from riskcal import _replacing, heads
from riskcal._validate import RiskcalError
from riskcal.cli import loss_log
from riskcal.cli.app import app
from riskcal.cli.monitor_events import (
    begun,
    is_event,
    is_event_log,
    monitor_of,
    refuse_other_options,
    watch_events,
)
from riskcal.cli.standard_input import arriving
from riskcal.monitor import RiskMonitor
from riskcal.policy import ExitPolicy
from riskcal.policy.certificate import Certificate
from riskcal.serving.drift import Drift
from riskcal.serving.watch import EventWatch


@app.command()
def monitor(
    log: Annotated[
        str,
        typer.Argument(
            help="CSV, JSON lines or a JSON array of losses, oldest first, or an event log; - reads stdin."
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(help="Policy whose certificate says delta and the losses' bounds."),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Tolerated expected loss, instead of the certificate's.")
    ] = None,
    epsilon: Annotated[
        float, typer.Option(help="Probability that a false alarm is ever raised.")
    ] = 0.05,
    average_run_length: Annotated[
        float | None,
        typer.Option(help="Instead of epsilon: mean number of losses to a false alarm."),
    ] = None,
    sampling_rate: Annotated[
        float,
        typer.Option(
            help="Rate of shadow sampling; the smallest, if a column rate says it per row."
        ),
    ] = 1.0,
    state: Annotated[
        Path | None,
        typer.Option(help="Go on from here if it exists, and leave the new state here."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Of an event log: the log of requests like those of the calibration, from which others must not drift."
        ),
    ] = None,
) -> None:
    """Watch the losses in LOG, and stop with exit status 3 as soon as they exceed the policy's delta.

    With --reference the exit status is 3 too where requests drifted; that has its own epsilon.

    For a policy of certified heads the log may have columns exits and errors instead: tokens that left early, and those of
    them that are not the full model's.
    """
    certificate = None if policy is None else ExitPolicy.load(policy).certificate
    options: dict[str, Any] = {"epsilon": epsilon, "average_run_length": average_run_length}
    watch = monitor_of(certificate, delta, sampling_rate=sampling_rate, **options)
    if certificate is not None and (remark := _to_feed(certificate)):
        print(remark)
    drift = None if reference is None else Drift.from_log(reference, **options)
    alarm = _watched(log, EventWatch(watch, drift=drift), certificate, state)
    raise typer.Exit(3 if alarm else 0)


def _watched(
    log: str, fresh: EventWatch, certificate: Certificate | None, state: Path | None
) -> bool:
    """Print what a log says, of whichever kind it is; whether there is an alarm."""
    if log != "-" and is_event_log(log):
        return _alarm(watch_events(log, fresh, state), log)
    with loss_log.opened(log) as file:
        start = loss_log.first_line(file)
        if log == "-":
            start, events = begun(start, file)
            if events:
                text = itertools.chain(io.StringIO(start, newline=""), file)
                lines = (line.encode("utf-8", "surrogateescape") for line in text)
                return _alarm(watch_events(log, fresh, state, lines, arriving(file)), log)
        elif is_event(start):
            unpack = "zstdcat" if log.lower().endswith(".zst") else "zcat"
            raise RiskcalError(
                f"{log}: holds events, which are read as they are or from standard input: {unpack} {log} | riskcal monitor -"
            )
        if fresh.drift is not None:
            raise RiskcalError(
                f"reference: is for event logs, and {log} holds losses; leave it out."
            )
        return _watch_losses(start, file, log, fresh.monitor, certificate, state)


def _to_feed(certificate: Certificate) -> str:
    """Which losses a certificate is about, where those of all requests are others."""
    if certificate.objective == "selective":
        return (
            "The certificate is about the requests that stopped early: give their losses alone. Those of all requests have a "
            "lower mean, so that no alarm over them says little."
        )
    if certificate.weighting == "clusters":
        return (
            "The certificate is about the mean over clusters, each counting alike: give one loss for each cluster, its mean. "
            "The mean over requests is another."
        )
    return ""


def _alarm(seen: EventWatch, log: str) -> bool:
    if seen.monitor.n == 0 and not seen.alarm:
        told = loss_log.evaluations(" ".join(seen.events), log)
        raise RiskcalError(
            f"{log}: holds no loss of a shadowed request, so that nothing can be said of the requests. {told}".rstrip()
        )
    return seen.alarm


def _watch_losses(
    start: str,
    file: TextIO,
    log: str,
    watch: RiskMonitor,
    certificate: Certificate | None,
    state: Path | None,
) -> bool:
    delta, counted = watch.delta, None
    if certificate is not None and certificate.max_tokens is not None:
        counted = partial(
            heads.request_loss, agreement=1.0 - delta, max_tokens=certificate.max_tokens
        )
    if state is not None and state.exists():
        watch = _restored(state, watch)
    before = watch.n
    try:
        row = _feed(watch, start, file, log, counted)
    except KeyboardInterrupt:  # the usual end of a stream
        row = None
    if watch.n == before and not watch.alarm:
        raise RiskcalError(
            f"{log}: was left before its first loss, so that nothing can be said of the requests."
        )
    if state is not None:
        with _replacing.replacing(state) as temporary:
            temporary.write_text(watch.to_json() + "\n", encoding="utf-8")
    print(watch)
    if counted is not None and certificate is not None:
        print(
            f"Loss of a request: {delta:g} + (errors - {delta:g} exits) / {certificate.max_tokens}. Its mean is at most "
            f"{delta:g} exactly where at least {1 - delta:g} of the tokens that left early are the full model's."
        )
    if watch.alarm:
        where = f"row {row} of {log} (counted from 0)" if row is not None else "an earlier log"
        print(f"Alarm at {where}. Serve the full model, and calibrate afresh on requests of today.")
    return watch.alarm


def _restored(path: Path, fresh: RiskMonitor) -> RiskMonitor:
    try:
        saved = RiskMonitor.from_json(path.read_bytes())
    except OSError as error:
        raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
    except RiskcalError as error:
        raise RiskcalError(f"{path}: {error}") from None
    refuse_other_options(path, saved, fresh)
    return saved


def _feed(
    watch: RiskMonitor,
    start: str,
    file: TextIO,
    log: str,
    counted: Callable[[float, float], Any] | None,
) -> int | None:
    """Update from a log until the alarm and no further; the row that raised it. Blocks of a file, single lines of a stream."""
    if watch.alarm:
        return None
    rows = loss_log.entries(start, file, log, watch.sampling_rate, counted, watch.upper)
    while True:
        block, refused = _block(rows, 1 if log == "-" else 4096)
        before, ahead = watch.n, RiskMonitor.from_json(watch.to_json())
        try:
            _take(ahead, block)
        except RiskcalError:
            block, refused = _until_refused(block, watch, log)
            _take(ahead, block)
        if ahead.alarm_at is not None:
            block = block[: ahead.alarm_at - before]
            _take(watch, block)
            return block[-1].row
        if refused is not None:
            raise refused
        if not block:
            return None
        _take(watch, block)


def _block(
    rows: Iterator[loss_log.Entry], size: int
) -> tuple[list[loss_log.Entry], RiskcalError | None]:
    """The next rows, and why one after them cannot be read: an alarm before it is one all the same."""
    block: list[loss_log.Entry] = []
    try:
        block.extend(itertools.islice(rows, size))
    except RiskcalError as error:
        return block, error
    return block, None


def _take(watch: RiskMonitor, block: list[loss_log.Entry]) -> None:
    watch.update([entry.loss for entry in block], rates=[entry.rate for entry in block])


def _until_refused(
    block: list[loss_log.Entry], watch: RiskMonitor, log: str
) -> tuple[list[loss_log.Entry], RiskcalError | None]:
    """The rows of a block before the one that a monitor refuses, and the refusal, which names its row."""
    for place, (number, loss, rate) in enumerate(block):
        try:
            RiskMonitor(**watch.parameters).update(loss, rates=rate)
        except RiskcalError as error:
            reason = _on_the_shell(str(error).replace(" at index 0", ""))
            return block[:place], RiskcalError(f"{log}: row {number}: {reason}")
    return block, None


def _on_the_shell(reason: str) -> str:
    """A monitor's refusal, with the options that do here what it advises."""
    reason = reason.replace(
        "Declare the true bounds with lower= and upper=, or rescale.",
        "Rescale it, or give the --policy whose certificate has the true bounds.",
    )
    return reason.replace(
        "construct the monitor with the smallest rate as sampling_rate.",
        "give the smallest rate with --sampling-rate.",
    )
