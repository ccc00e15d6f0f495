"""`riskcal calibrate`: the cheapest certified threshold in recorded runs, and its policy."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from riskcal import _replacing
from riskcal._validate import RiskcalError
from riskcal.calibration import TESTS, Calibration, calibrate
from riskcal.cli.app import app
from riskcal.cli.log_options import (
    ColumnsOption,
    CoordinateOption,
    DirectionOption,
    KeepOption,
    RunsArgument,
    only_delta,
    source,
)
from riskcal.records import COSTS, Runs, on_curves, renaming, retries

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@app.command("calibrate")
def calibrate_command(
    runs: RunsArgument,
    delta: Annotated[
        list[float], typer.Option(help="Tolerated expected loss, in the loss's own units.")
    ],
    epsilon: Annotated[float, typer.Option(help="Probability that the guarantee fails.")] = 0.05,
    objective: Annotated[
        str, typer.Option(help="textual, risk, risk_clipped or selective.")
    ] = "textual",
    test: Annotated[str, typer.Option(help=f"One of {', '.join(TESTS)}.")] = "betting",
    procedure: Annotated[
        str | None, typer.Option(help="fixed_sequence, holm, bonferroni, pilot_order, pareto, ...")
    ] = None,
    starts: Annotated[int, typer.Option(help="Starting points of the fixed sequence.")] = 1,
    attempt: Annotated[
        int | None,
        typer.Option(help="Which planned attempt this is, from 1; default: the only one."),
    ] = None,
    weighting: Annotated[
        str | None,
        typer.Option(
            help="With clusters: clusters or requests, what the certified mean is taken over."
        ),
    ] = None,
    max_cluster: Annotated[
        int | None,
        typer.Option(
            help="With --weighting requests: most requests of a cluster, fixed beforehand."
        ),
    ] = None,
    coordinate: CoordinateOption = None,
    columns: ColumnsOption = None,
    keep: KeepOption = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help="Cost that chooses among certified candidates. Default: layers; with one coordinate the least strict threshold."
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Certify a mean cost too: layers=5, or seconds=0.4:2 with the largest; may be repeated."
        ),
    ] = None,
    lower_is_stricter: DirectionOption = False,
    measure: Annotated[
        str | None,
        typer.Option(
            help="Confidence measure that the runs were made with, where they do not say: riskcal's decoders ask for it, "
            "and for --cache and --batching."
        ),
    ] = None,
    cache: Annotated[str | None, typer.Option(help="The same of the cache: project, ...")] = None,
    batching: Annotated[
        str | None, typer.Option(help="The same of batches: diverge, regroup or deepest.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the policy here, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the risk curve here, or without one the cost against the loss: .png, .pdf or .svg."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the outcome as one JSON object, and nothing else.")
    ] = False,
) -> None:
    """Find the cheapest certified threshold in recorded RUNS, and write its policy.

    Exit status 1: nothing could be certified, and the policy written is the full model.
    """
    budgets = dict(map(_budget, budget or ()))
    calibration = calibrate(
        Runs.read(
            source(runs),
            candidate_columns=coordinate or (),
            costs=_named(cost, budgets),
            lower_is_stricter=lower_is_stricter,
            columns=renaming.options(columns or ()),
            keep=retries.option(keep),
        ),
        delta=only_delta(delta),
        epsilon=epsilon,
        objective=objective,
        test=test,
        procedure=procedure,
        starts=starts,
        attempt=attempt,
        weighting=weighting,
        max_cluster=max_cluster,
        cost=cost,
        budget=budgets or None,
    )
    figure = None if plot is None else _figure(calibration, plot)
    if as_json:
        print(_as_json(calibration))
    else:
        print_table(calibration)
        print(calibration.message)
    written = [("Policy", out), ("Picture", plot)]
    said = {"measure": measure, "cache": cache, "batching": batching}
    with ExitStack() as waiting:  # the picture takes its place once the policy has
        if plot is not None and figure is not None:
            temporary = waiting.enter_context(_replacing.replacing(plot))
            figure.savefig(temporary, dpi=120, format=plot.suffix[1:])
        if out is not None:
            named = {name: value for name, value in said.items() if value is not None}
            calibration.policy(**named).save(out)
    for what, path in written:
        if path is not None and not as_json:
            print(f"{what} written to {path}")
    raise typer.Exit(0 if calibration.certified else 1)


def _named(cost: str | None, budgets: dict[str, Any]) -> list[str]:
    """Columns that are read as costs since options name them."""
    return [name for name in (cost, *budgets) if name not in (None, *COSTS)]


def _budget(text: str) -> tuple[str, Any]:
    """A cost and its mean, or its mean and its largest value."""
    name, _, numbers = text.partition("=")
    try:
        values = [float(number) for number in numbers.split(":")]
    except ValueError:
        values = []
    if not name or len(values) not in (1, 2):
        raise RiskcalError(f"--budget: {text!r} is neither NAME=MEAN nor NAME=MEAN:LARGEST.")
    return name, values[0] if len(values) == 1 else tuple(values)


def new_figure(path: Path) -> "Figure":
    """For a picture that is written there."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise RiskcalError(f"--plot: {path} ends in none of .png, .pdf and .svg.")
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4), layout="constrained")


def _figure(calibration: Calibration, path: Path) -> "Figure":
    figure = new_figure(path)
    curves = on_curves(calibration.coordinates)
    calibration.plot(ax=figure.subplots(), cost=None if curves else calibration.asked.cost)
    return figure


def _as_json(calibration: Calibration) -> str:
    """The outcome, with the table's rows; an infinite threshold is "full", NaN is null."""

    def plain(value: Any) -> Any:
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return "full" if value == math.inf else None

    rows = calibration.table.to_dict("records")
    chosen = None if calibration.chosen is None else calibration.chosen.to_dict()
    found = {
        "certified": calibration.certified,
        "threshold": plain(calibration.threshold),
        "message": calibration.message,
        "chosen": None if chosen is None else {name: plain(v) for name, v in chosen.items()},
        "table": [{str(name): plain(v) for name, v in row.items()} for row in rows],
        "full_costs": calibration.full_costs,
    }
    return json.dumps(found, allow_nan=False)


def print_table(calibration: Calibration) -> None:
    """One row per candidate in tested order, the chosen one bold."""
    cost = calibration.asked.cost
    full = calibration.full_costs.get(cost)
    table = Table(
        title=f"delta {_deltas(calibration.delta)}, epsilon {calibration.epsilon:g}, {calibration.objective}: "
        f"{calibration.test} test, {calibration.procedure.replace('_', ' ')}, n = {calibration.n}"
    )
    rows = calibration.table
    shown = {name: rows[name] for name in calibration.coordinates}
    losses = [name for name in rows.columns if name == "loss" or name.startswith("loss_")]
    shown |= {name: rows[name].map("{:.4f}".format) for name in losses}
    shown |= {"p-value": rows["pvalue"].map("{:.2g}".format)}
    if "layers" in rows:
        shown["layers"] = rows["layers"].map("{:.2f}".format)
    if cost in rows and cost not in ("layers", "seconds"):
        shown[cost] = rows[cost].map("{:.4g}".format)
    if full and cost in rows:
        shown["saved"] = (1 - rows[cost] / full).map("{:.0%}".format)
    if "seconds" in rows:
        shown["ms/prompt"] = (1000 * rows["seconds"]).map("{:.2f}".format)
    for name in calibration.costs:
        if name not in (*COSTS, cost):
            shown[name] = rows[name].map("{:.4g}".format)
    chosen = None if calibration.chosen is None else calibration.chosen.name
    for name in (*shown, "certified"):
        table.add_column(name, justify="right")
    for index, *cells in pd.DataFrame(shown).itertuples():
        verdict = "chosen" if index == chosen else "yes" if rows["certified"].iloc[index] else "no"
        texts = [f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells]
        table.add_row(*texts, verdict, style="bold" if index == chosen else None)
    Console().print(table)


def _deltas(delta: Any) -> str:
    if isinstance(delta, dict):
        return ", ".join(f"{name} {value:g}" for name, value in delta.items())
    return f"{delta:g}"
