"""Runs and Traces as terminals, notebooks and pictures show them. Nothing here is a guarantee."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from riskcal import _showing, plots
from riskcal._validate import RiskcalError
from riskcal.policy.sentences import meaning
from riskcal.records.candidates import on_curves, varying

if TYPE_CHECKING:
    from riskcal.records.runs import Runs
    from riskcal.records.traces import Traces


def runs_sentence(runs: "Runs") -> str:
    """What was recorded, in a line."""
    grid = runs.thresholds
    unit = "clusters" if "cluster" in runs.labels else "prompts"
    return (
        f"Runs: {runs.n} {unit} x {runs.k} candidates ({runs.source}), thresholds {grid[0]:g} to {grid[-1]:g}; "
        f"{', '.join(runs.values)}; full model {'recorded' if runs.full else 'not recorded'}"
    )


def runs_html(runs: "Runs") -> str:
    """The line, and each candidate's mean of everything recorded."""
    settings = [name for name in runs.candidates.columns if name != "threshold"]
    means = {name: runs.unit_means(values).mean(0) for name, values in runs.values.items()}
    table = runs.candidates.reset_index(drop=True).assign(**means)
    return _showing.paragraph(runs_sentence(runs)) + _showing.html(table, settings=settings)


def runs_plot(runs: "Runs", objective: str, ax: Any) -> Any:
    """Mean loss by threshold; a second coordinate has a curve for each of its values."""
    coordinates = varying(runs.candidates)
    others = [name for name in coordinates if name != "threshold"]
    if not on_curves(coordinates):
        raise RiskcalError(
            f"plot: candidates differ in {', '.join(coordinates)}, which curves over thresholds cannot show; "
            "plot columns of to_frame(), or a calibration's costs: riskcal.calibrate(...).plot(cost=...)."
        )
    table = runs.candidates.reset_index(drop=True).assign(loss=runs.losses(objective).mean(0))
    unit = "clusters" if "cluster" in runs.labels else "prompts"
    return plots.risk_curve(
        table,
        lower_is_stricter=runs.lower_is_stricter,
        by=others[0] if others else None,
        meaning=meaning(objective),
        of=f"{runs.n} {unit}",
        ax=ax,
    )


def traces_sentence(traces: "Traces") -> str:
    """What was recorded, in a line."""
    kind = "agrees" if traces.agrees is not None else "loss"
    prompts = len(np.unique(traces.prompt))
    least = traces.n_layers if traces.lengths is None else int(traces.lengths.min())
    span = f"{traces.n_layers}" if least == traces.n_layers else f"{least} to {traces.n_layers}"
    spent = f", {', '.join(traces.costs)}" if traces.costs else ""
    n = len(traces.prompt)
    rows = f"{n} requests" if prompts == n else f"{n} tokens of {prompts} prompts"
    return f"Traces: {rows} x {span} exits; confidence, {kind}{spent}"


def by_exit(traces: "Traces") -> pd.DataFrame:
    """Each exit's decisions that reach it, mean confidence (of those that have one), and mean agreement or loss."""
    outcome = np.asarray(traces.agrees if traces.loss is None else traces.loss, dtype=np.float64)
    name = "agreement" if traces.loss is None else "loss"
    if traces.lengths is None:
        at = np.tile(np.arange(1, traces.n_layers + 1), len(traces.prompt))
    else:
        starts = np.repeat(np.cumsum(traces.lengths) - traces.lengths, traces.lengths)
        at = np.arange(len(traces.confidence)) - starts + 1
    long = pd.DataFrame(
        {"layer": at, "confidence": traces.confidence.ravel(), name: outcome.ravel()}
    )
    means = long.groupby("layer").mean()
    return means.assign(decisions=long.groupby("layer").size())[
        ["decisions", "confidence", name]
    ].reset_index()


def traces_html(traces: "Traces") -> str:
    """The line, and what each exit would say if all stopped there."""
    table = by_exit(traces)
    return _showing.paragraph(traces_sentence(traces)) + _showing.html(table)


def traces_plot(traces: "Traces", ax: Any) -> Any:
    """Mean confidence and agreement or loss of each exit."""
    outcome = "agreement" if traces.loss is None else "loss"
    return plots.agreement_curve(by_exit(traces), outcome=outcome, ax=ax)
