"""`riskcal report`: one self-contained HTML page of runs, traces, a policy or an event log."""

from pathlib import Path
from typing import Annotated, Any

import typer

from riskcal import report as reports
from riskcal._validate import RiskcalError
from riskcal.calibration import TESTS
from riskcal.cli.app import app
from riskcal.cli.log_options import ColumnsOption, CoordinateOption, DirectionOption, KeepOption
from riskcal.cli.monitor_events import is_event_log, monitor_of
from riskcal.policy import ExitPolicy
from riskcal.records import COSTS, Runs, Traces, files, renaming, retries
from riskcal.records.columns import are_traces
from riskcal.serving.watch import EventWatch


@app.command()
def report(
    source: Annotated[
        Path,
        typer.Argument(
            help="Runs or traces (.parquet, .csv, .jsonl, a folder), a policy (.json) or an event log."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the page goes.")] = Path(
        "report.html"
    ),
    delta: Annotated[
        float | None,
        typer.Option(
            help="Tolerated expected loss, fixed before the records were looked at; default: none, the page's slider alone. "
            "Of an event log: what its monitor tolerates, instead of the policy's."
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Probability that the guarantee fails; default .05.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="textual, risk, risk_clipped or selective.")
    ] = None,
    test: Annotated[str | None, typer.Option(help=f"One of {', '.join(TESTS)}.")] = None,
    attempt: Annotated[int | None, typer.Option(help="Which planned attempt, from 1.")] = None,
    coordinate: CoordinateOption = None,
    cost: Annotated[
        str | None, typer.Option(help="Cost that chooses among certified candidates.")
    ] = None,
    columns: ColumnsOption = None,
    keep: KeepOption = None,
    lower_is_stricter: DirectionOption = False,
    traces: Annotated[
        Path | None,
        typer.Option(help="Of runs: traces of the same decoder, for exits and heads."),
    ] = None,
    generations: Annotated[
        Path | None,
        typer.Option(help="Of runs or traces: tokens with their exit layers, to be coloured."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Of traces: where exits are counted.")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="Of traces: whose exits are counted. Of an event log: what it served."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Write one self-contained HTML page about SOURCE: it loads nothing, and can be mailed, printed and read on a phone.

    Where nothing could be certified, the page says what would help.
    """
    given: dict[str, Any] = {
        "delta": delta,
        "epsilon": epsilon,
        "objective": objective,
        "test": test,
        "attempt": attempt,
        "coordinate": coordinate or None,
        "cost": cost,
        "threshold": threshold,
        "policy": None if policy is None else ExitPolicy.load(policy),
        "traces": None if traces is None else Traces.read(traces),
        "generations": None if generations is None else files.read(generations),
    }
    options = {name: value for name, value in given.items() if value is not None}
    read = _read(
        source,
        options,
        columns=renaming.options(columns or ()),
        keep=retries.option(keep),
        lower_is_stricter=lower_is_stricter,
    )
    reports.write(out, read, title=title, **options)
    print(f"Report written to {out}")


def _read(source: Path, options: dict[str, Any], **reading: Any) -> Any:
    """What a file holds, by what is in it; takes from the options those that belong to reading."""
    if source.suffix == ".json":
        _refuse_unused(reading)
        return ExitPolicy.load(source)
    if is_event_log(str(source)):
        _refuse_unused(reading)
        return _watch(source, options)
    names = reading["columns"]
    frame = files.read(source, renaming.only_renamed(names))
    there = renaming.renamed(frame, names).columns
    if are_traces(there):
        _refuse_unused(reading, "columns")
        return Traces.from_frame(frame, columns=names)
    beside = source / "traces"
    if (source / files.RECORDING).exists() and beside.exists() and "traces" not in options:
        options["traces"] = Traces.read(beside)  # as `riskcal record --traces` leaves them
    cost = options.get("cost")
    costs = () if cost is None or cost in COSTS else (cost,)
    coordinates = options.pop("coordinate", ())
    return Runs.read(source, candidate_columns=coordinates, costs=costs, **reading)


def _refuse_unused(reading: dict[str, Any], *used: str) -> None:
    """Refuse options of runs where the source is none: the page would not heed them."""
    for name, value in reading.items():
        if value and name not in used:
            raise RiskcalError(
                f"--{name.replace('_', '-')}: is of runs, and this source holds none; leave it out."
            )


def _watch(source: Path, options: dict[str, Any]) -> EventWatch:
    policy = options.pop("policy", None)
    certificate = None if policy is None else policy.certificate
    epsilon = options.pop("epsilon", 0.05)
    return EventWatch(monitor_of(certificate, options.pop("delta", None), epsilon=epsilon)).read(
        source
    )
