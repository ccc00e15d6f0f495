"""`riskcal trials`: how large and how stable the savings are over repeated splits."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from riskcal import _replacing, plots
from riskcal._validate import RiskcalError
from riskcal.calibration import TESTS
from riskcal.cli.app import app
from riskcal.cli.calibrate import new_figure
from riskcal.cli.log_options import (
    ColumnsOption,
    CoordinateOption,
    DirectionOption,
    KeepOption,
    RunsArgument,
    source,
)
from riskcal.records import Runs, files, renaming, retries
from riskcal.trials import run_trials, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@app.command()
def trials(
    runs: RunsArgument,
    delta: Annotated[
        list[float],
        typer.Option(help="Tolerated expected loss; give several by repeating the option."),
    ],
    coordinate: CoordinateOption = None,
    columns: ColumnsOption = None,
    keep: KeepOption = None,
    lower_is_stricter: DirectionOption = False,
    n_trials: Annotated[int, typer.Option(help="Random splits.")] = 50,
    calibration_fraction: Annotated[
        float, typer.Option(help="Share of the prompts that each calibrates on.")
    ] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the splits.")] = 0,
    epsilon: Annotated[float, typer.Option(help="Probability that the guarantee fails.")] = 0.05,
    objective: Annotated[str, typer.Option(help="textual, risk or risk_clipped.")] = "textual",
    test: Annotated[str, typer.Option(help=f"One of {', '.join(TESTS)}.")] = "betting",
    procedure: Annotated[
        str | None, typer.Option(help="fixed_sequence, holm, bonferroni, ...")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write all trials here: .csv, .jsonl or .parquet."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the layers left at each delta here: .png, .pdf, .svg.")
    ] = None,
) -> None:
    """Calibrate on random splits of recorded RUNS: how large the savings are, and how stable.

    This proves nothing about the guarantee, and issues no policy.
    """
    table = run_trials(
        Runs.read(
            source(runs),
            candidate_columns=coordinate or (),
            columns=renaming.options(columns or ()),
            keep=retries.option(keep),
            lower_is_stricter=lower_is_stricter,
        ),
        delta,
        n_trials=n_trials,
        calibration_fraction=calibration_fraction,
        seed=seed,
        epsilon=epsilon,
        objective=objective,
        test=test,
        procedure=procedure,
    )
    figure = None if plot is None else _trials_figure(table, plot)
    _print_trials(
        summary(table),
        f"{n_trials} splits, {calibration_fraction:.0%} to calibrate on, {objective}, {test}",
    )
    with ExitStack() as waiting:  # the picture takes its place once the table has
        if figure is not None and plot is not None:
            temporary = waiting.enter_context(_replacing.replacing(plot))
            figure.savefig(temporary, dpi=120, format=plot.suffix[1:])
        if out is not None:
            files.write(table, out)
    for what, path in (("Trials", out), ("Picture", plot)):
        if path is not None:
            print(f"{what} written to {path}")


def _print_trials(table: pd.DataFrame, title: str) -> None:
    """Mean +- standard deviation over the trials."""
    measured = {"heldout_loss": "held-out loss", "layers": "layers", "saving": "saved"}
    shown = {label: name for name, label in measured.items() if f"{name}_mean" in table}
    view = Table(title=title)
    for name in ("delta", "certified", *shown):
        view.add_column(name, justify="right")
    for _, row in table.iterrows():
        cells = [f"{row[f'{name}_mean']:.3g} +- {row[f'{name}_sd']:.2g}" for name in shown.values()]
        view.add_row(f"{row['delta']:g}", f"{row['certified']:.0%}", *cells)
    Console().print(view)


def _trials_figure(table: pd.DataFrame, path: Path) -> "Figure":
    figure = new_figure(path)
    if "layers" not in table:
        raise RiskcalError("--plot: the runs have no column layers to draw.")
    plots.trials_curve(table, ax=figure.subplots())
    return figure
