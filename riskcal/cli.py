"""The command line. Exit status: 0 done, 1 nothing certified, 2 bad input, 3 alarm."""

import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from riskcal import _loss_log, _tables, _validate, heads, plots
from riskcal._validate import RiskcalError
from riskcal.calibration import TESTS, Calibration, calibrate
from riskcal.examples import load_example
from riskcal.monitor import RiskMonitor
from riskcal.policy import ExitPolicy
from riskcal.records import Runs
from riskcal.trials import run_trials, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

app = typer.Typer(
    name="riskcal",
    help="Calibrate early exit: the cheapest threshold whose expected loss is certified.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("calibrate")
def calibrate_command(
    runs: Annotated[
        Path, typer.Argument(help="Runs: .parquet, .csv, .jsonl, or a folder of Parquet shards.")
    ],
    delta: Annotated[float, typer.Option(help="Tolerated expected loss, in the loss's own units.")],
    epsilon: Annotated[float, typer.Option(help="Probability that the guarantee fails.")] = 0.05,
    objective: Annotated[str, typer.Option(help="textual, risk or risk_clipped.")] = "textual",
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
    out: Annotated[Path | None, typer.Option(help="Write the policy here, as JSON.")] = None,
) -> None:
    """Find the cheapest certified threshold in recorded RUNS, and write its policy.

    Exit status 1: nothing could be certified, and the policy written is the full model.
    """
    calibration = calibrate(
        Runs.read(runs),
        delta=delta,
        epsilon=epsilon,
        objective=objective,
        test=test,
        procedure=procedure,
        starts=starts,
        attempt=attempt,
        weighting=weighting,
        max_cluster=max_cluster,
    )
    _print_table(calibration)
    print(calibration.message)
    if out is not None:
        calibration.policy().save(out)
        print(f"Policy written to {out}")
    raise typer.Exit(0 if calibration.certified else 1)


@app.command()
def trials(
    runs: Annotated[
        Path, typer.Argument(help="Runs: .parquet, .csv, .jsonl, or a folder of Parquet shards.")
    ],
    delta: Annotated[
        list[float],
        typer.Option(help="Tolerated expected loss; give several by repeating the option."),
    ],
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
        Path | None, typer.Option(help="Write all trials here: .csv, .jsonl or .parquet.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the layers left at each delta here: .png, .pdf, .svg.")
    ] = None,
) -> None:
    """Calibrate on random splits of recorded RUNS: how large the savings are, and how stable.

    This proves nothing about the guarantee, and issues no policy.
    """
    table = run_trials(
        Runs.read(runs),
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
    if out is not None:
        _tables.write(table, out)
        print(f"Trials written to {out}")
    if figure is not None and plot is not None:
        with _validate.replacing(plot) as temporary:
            figure.savefig(temporary, dpi=120, format=plot.suffix[1:])
        print(f"Picture written to {plot}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the policy and the picture.")] = Path(
        "riskcal-demo"
    ),
    delta: Annotated[
        float, typer.Option(help="Tolerated expected distance to the full model.")
    ] = 0.1,
) -> None:
    """Calibrate the bundled real records, and show what the certificate is worth."""
    runs = load_example("g2p")
    print(
        "Records: an 8-layer early-exit T5 that turns English spelling into phonemes, run for real on held-out words\n"
        f"of the CMU Pronouncing Dictionary at every threshold, and once in full.\n{runs}\n"
        "Loss: normalised edit distance between the phonemes of the early exit and those of the full model.\n"
    )
    calibration = calibrate(runs, delta=delta)
    _print_table(calibration)
    print(f"{calibration.message}\n")
    _print_comparison(runs, sorted({delta, 0.05}))
    out.mkdir(parents=True, exist_ok=True)
    policy, picture = out / "policy.json", out / "risk-curve.png"
    calibration.policy().save(policy)
    figure = plots.calibration_figure(
        calibration.table,
        delta=delta,
        threshold=calibration.threshold,
        full_layers=calibration.full_costs["layers"],
        title=f"Early exit calibrated on {calibration.n} words: expected distance to the full model at most {delta:g},\n"
        f"with probability at least {1 - calibration.epsilon:g} over the draw of the words",
    )
    with _validate.replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(f"Written: {policy} (read it with riskcal.ExitPolicy.load) and {picture}")
    raise typer.Exit(0 if calibration.certified else 1)


@app.command()
def monitor(
    log: Annotated[
        str,
        typer.Argument(
            help="CSV, JSON lines or a JSON array of losses, oldest first; - reads stdin."
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
) -> None:
    """Watch the losses in LOG, and stop with exit status 3 as soon as they exceed the policy's delta.

    For a policy of certified heads the log may have columns exits and errors instead: tokens that left early, and those of
    them that are not the full model's.
    """
    certificate = None if policy is None else ExitPolicy.load(policy).certificate
    if delta is None:
        if certificate is None or isinstance(certificate.delta, dict):
            raise RiskcalError(
                "delta: neither given nor certified for one risk; give --delta, or a --policy that is."
            )
        delta = certificate.delta
    bounds = {} if certificate is None else {"lower": certificate.lower, "upper": certificate.upper}
    watch = RiskMonitor(
        delta,
        epsilon=epsilon,
        average_run_length=average_run_length,
        sampling_rate=sampling_rate,
        **bounds,
    )
    counted = None
    if certificate is not None and certificate.max_tokens is not None:
        counted = partial(
            heads.request_loss, agreement=1.0 - delta, max_tokens=certificate.max_tokens
        )
    if state is not None and state.exists():
        watch = _restored(state, watch)
    before = watch.n
    try:
        row = _feed(watch, log, counted)
    except KeyboardInterrupt:  # the usual end of a stream
        row = None
    if watch.n == before and not watch.alarm:
        raise RiskcalError(
            f"{log}: was left before its first loss, so that nothing can be said of the requests."
        )
    if state is not None:
        with _validate.replacing(state) as temporary:
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
    raise typer.Exit(3 if watch.alarm else 0)


def _print_table(calibration: Calibration) -> None:
    full_layers = calibration.full_costs.get("layers")
    table = Table(
        title=f"delta {calibration.delta:g}, epsilon {calibration.epsilon:g}, {calibration.objective}: "
        f"{calibration.test} test, {calibration.procedure.replace('_', ' ')}, n = {calibration.n}"
    )
    rows = calibration.table.assign(loss=calibration.table["loss"].map("{:.4f}".format))
    shown = {name: rows[name] for name in calibration.coordinates}
    shown |= {"loss": rows["loss"], "p-value": rows["pvalue"].map("{:.2g}".format)}
    if "layers" in rows:
        shown["layers"] = rows["layers"].map("{:.2f}".format)
    if full_layers and "layers" in rows:
        shown["saved"] = (1 - rows["layers"] / full_layers).map("{:.0%}".format)
    if "seconds" in rows:
        shown["ms/prompt"] = (1000 * rows["seconds"]).map("{:.2f}".format)
    chosen = None if calibration.chosen is None else calibration.chosen.name
    for name in (*shown, "certified"):
        table.add_column(name, justify="right")
    for index, *cells in pd.DataFrame(shown).itertuples():
        verdict = "chosen" if index == chosen else "yes" if rows["certified"].iloc[index] else "no"
        texts = [f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells]
        table.add_row(*texts, verdict, style="bold" if index == chosen else None)
    Console().print(table)


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
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise RiskcalError(f"--plot: {path} ends in none of .png, .pdf and .svg.")
    if "layers" not in table:
        raise RiskcalError("--plot: the runs have no column layers to draw.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    plots.trials_curve(table, ax=figure.subplots())
    return figure


def _print_comparison(runs: Runs, deltas: list[float]) -> None:
    """Layers saved by the default test, beside CALM's own: Hoeffding-Bentkus, on clipped differences for the risk."""
    table = Table(title="Decoder layers per token under each certificate (@ its threshold)")
    for name in ("loss", "delta", "full", "CALM's test", "riskcal", "saved"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    cases = [("distance to full model", "textual", "textual", delta) for delta in deltas]
    cases += [("rise in phoneme error", "risk_clipped", "risk", delta) for delta in (0.02, 0.05)]
    for name, clipped, objective, delta in cases:
        calm = calibrate(runs, delta=delta, objective=clipped, test="hoeffding_bentkus")
        ours = calibrate(runs, delta=delta, objective=objective)
        full = ours.full_costs["layers"]
        left = [full if c.chosen is None else float(c.chosen["layers"]) for c in (calm, ours)]
        cells = [
            f"{layers:.2f} @ {_threshold(c)}" for layers, c in zip(left, (calm, ours), strict=True)
        ]
        table.add_row(name, f"{delta:g}", f"{full:g}", *cells, f"{1 - left[1] / full:.0%}")
    Console().print(table)
    print(
        "CALM's test: Hoeffding-Bentkus, on max(0, rise). riskcal: betting, on the signed rise. Saved: riskcal's, of full.\n"
    )


def _threshold(calibration: Calibration) -> str:
    return "full" if math.isinf(calibration.threshold) else f"{calibration.threshold:g}"


def _restored(path: Path, fresh: RiskMonitor) -> RiskMonitor:
    try:
        saved = RiskMonitor.from_json(path.read_bytes())
    except OSError as error:
        raise RiskcalError(f"{path}: cannot be read ({error.strerror}).") from None
    except RiskcalError as error:
        raise RiskcalError(f"{path}: {error}") from None
    for name, value in fresh.parameters.items():
        if saved.parameters[name] != value:
            raise RiskcalError(
                f"{path}: {name} is {saved.parameters[name]} there but {value} here; use the same options, or another file."
            )
    return saved


def _feed(
    watch: RiskMonitor, log: str, counted: Callable[[float, float], Any] | None
) -> int | None:
    """Update from a log until the alarm; the row that raised it. Blocks of a file, single lines of a stream."""
    if watch.alarm:
        return None
    with _loss_log.opened(log) as file:
        rows = _loss_log.entries(file, log, watch.sampling_rate, counted)
        while block := list(itertools.islice(rows, 1 if log == "-" else 4096)):
            before = watch.n
            try:
                watch.update([entry.loss for entry in block], rates=[entry.rate for entry in block])
            except RiskcalError:
                _refuse_row(block, watch, log)
            if watch.alarm_at is not None:
                return block[watch.alarm_at - before - 1].row
    return None


def _refuse_row(block: list[_loss_log.Entry], watch: RiskMonitor, log: str) -> None:
    """Say which row of a refused block is to blame."""
    for number, loss, rate in block:
        try:
            RiskMonitor(**watch.parameters).update(loss, rates=rate)  # type: ignore[arg-type]
        except RiskcalError as error:
            reason = str(error).replace(" at index 0", "")
            raise RiskcalError(f"{log}: row {number}: {reason}") from None


def main() -> None:
    """Entry point: bad input ends with one line on stderr and status 2, whatever the command."""
    for command in metadata.entry_points(group="riskcal.commands"):
        app.command(command.name)(command.load())
    try:
        app()
    except RiskcalError as error:
        print(f"riskcal: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
