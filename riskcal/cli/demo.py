"""`riskcal demo`: the main job on the bundled real records."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from riskcal import _replacing
from riskcal.calibration import Calibration, calibrate
from riskcal.cli.app import app
from riskcal.cli.calibrate import print_table
from riskcal.examples import load_example
from riskcal.records import Runs


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the policy, the picture and the report.")
    ] = Path("riskcal-demo"),
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
    print_table(calibration)
    print(f"{calibration.message}\n")
    _print_comparison(runs, sorted({delta, 0.05}))
    from matplotlib.figure import Figure  # slow to import

    out.mkdir(parents=True, exist_ok=True)
    policy, picture = out / "policy.json", out / "risk-curve.png"
    calibration.policy().save(policy)
    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    calibration.plot(upper).set_xlabel("")
    calibration.plot(lower, cost="layers")
    figure.suptitle(
        f"Early exit calibrated on {calibration.n} words: expected distance to the full model at most {delta:g},\n"
        f"with probability at least {1 - calibration.epsilon:g} over the draw of the words",
        fontsize=12,
    )
    with _replacing.replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(f"Written: {policy} (read it with riskcal.ExitPolicy.load) and {picture}")
    page = out / "report.html"
    write_report(page, calibration)
    print(f"Report, to be opened in a browser: {page}")
    raise typer.Exit(0 if calibration.certified else 1)


def write_report(path: Path, calibration: Calibration) -> None:
    """The report of the shipped records."""
    calibration.report(
        path,
        traces=load_example("g2p-traces"),
        generations=load_example("g2p-generations"),
        title="Spelling to phonemes: early exit, calibrated",
    )


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
