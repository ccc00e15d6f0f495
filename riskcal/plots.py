"""Pictures of calibration tables. Takes DataFrames, imports nothing of riskcal, and matplotlib only when called."""

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOSS, _DELTA, _CERTIFIED, _LAYERS = "#1f5a96", "#b3261e", "#dcefe1", "#6a4c93"


def risk_curve(
    table: pd.DataFrame,
    *,
    delta: float,
    threshold: float = math.inf,
    lower_is_stricter: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Mean loss of every candidate against its threshold, with the tolerance and the certified thresholds.

    Parameters
    ----------
    table : DataFrame
        As in `riskcal.Calibration.table`: ``threshold``, ``loss``, ``certified``.
    delta : float
        The tolerance, drawn as a line.
    threshold : float
        The chosen threshold, marked if it is finite.
    lower_is_stricter : bool
        Whether low thresholds are the strict ones.
    ax : Axes, optional
        Drawn on if given, else on a new figure.
    """
    ax = ax or _new_axes()
    rows = table.sort_values("threshold")
    _shade_certified(rows, ax)
    ax.plot(
        rows["threshold"],
        rows["loss"],
        "o-",
        color=_LOSS,
        markersize=4,
        label="mean loss on the calibration prompts",
    )
    ax.axhline(
        delta, color=_DELTA, linestyle="--", linewidth=1.5, label=f"tolerance delta = {delta:g}"
    )
    if math.isfinite(threshold):
        chosen = rows.loc[rows["threshold"] == threshold].iloc[0]
        ax.plot(
            chosen["threshold"],
            chosen["loss"],
            "o",
            color=_LOSS,
            markersize=11,
            markeredgecolor="black",
        )
        ax.annotate(
            f"chosen threshold {threshold:g}\nmean loss {chosen['loss']:.3f}",
            (chosen["threshold"], chosen["loss"]),
            xytext=(22, 42),
            textcoords="offset points",
            arrowprops={"arrowstyle": "->", "color": "black"},
        )
    ax.set_ylim(bottom=min(0.0, float(rows["loss"].min()) * 1.1))
    ax.set_xlabel(f"exit threshold ({'lower' if lower_is_stricter else 'higher'}: more cautious)")
    ax.set_ylabel("loss")
    ax.legend(loc="upper right")
    return ax


#: How a cost's curve and axis are labelled where its name alone would not say what it is per.
_PER = {
    "layers": "decoder layers per token",
    "flops": "decoder FLOPs",
    "tokens": "tokens generated",
}


def cost_curve(
    table: pd.DataFrame,
    *,
    full: float | None = None,
    cost: str = "layers",
    threshold: float = math.inf,
    lower_is_stricter: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Mean cost of every candidate, decoder layers per token or another, against the full model's if that is known."""
    ax = ax or _new_axes()
    rows = table.sort_values("threshold")
    _shade_certified(rows, ax)
    ax.plot(
        rows["threshold"],
        rows[cost],
        "s-",
        color=_LAYERS,
        markersize=4,
        label=f"mean {_PER.get(cost, cost)}",
    )
    if full is not None:
        ax.axhline(full, color="black", linestyle=":", label=f"full model: {full:g} {cost}")
    if math.isfinite(threshold):
        chosen = rows.loc[rows["threshold"] == threshold].iloc[0]
        ax.plot(
            chosen["threshold"],
            chosen[cost],
            "s",
            color=_LAYERS,
            markersize=10,
            markeredgecolor="black",
        )
        spent = f"{chosen[cost]:.2f}" if cost == "layers" else f"{chosen[cost]:.4g}"
        ax.annotate(
            f"{spent} {cost}" + (f"\n({1 - chosen[cost] / full:.0%} fewer)" if full else ""),
            (chosen["threshold"], chosen[cost]),
            xytext=(-130, 40),
            textcoords="offset points",
            arrowprops={"arrowstyle": "->", "color": "black"},
        )
    ax.set_ylim(0, max(full or 0.0, float(rows[cost].max())) * 1.12 or 1.0)
    ax.set_xlabel(f"exit threshold ({'lower' if lower_is_stricter else 'higher'}: more cautious)")
    ax.set_ylabel(cost)
    ax.legend(
        loc="upper left", bbox_to_anchor=(0, 0.88)
    )  # below the full model's line, above the curve's start
    return ax


def calibration_figure(
    table: pd.DataFrame, *, delta: float, threshold: float, full_layers: float, title: str = ""
) -> "Figure":
    """The two curves above one another, sharing the threshold axis: what is lost, and what is saved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    risk_curve(table, delta=delta, threshold=threshold, ax=upper)
    cost_curve(table, full=full_layers, threshold=threshold, ax=lower)
    upper.set_xlabel("")
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def trials_curve(trials: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Mean decoder layers per token that each trial's calibration left, against delta: every trial, and mean +- deviation.

    Parameters
    ----------
    trials : DataFrame
        As `riskcal.run_trials` returns it, with ``layers``; with ``full_layers`` the full model is drawn as well.
    ax : Axes, optional
        Drawn on if given, else on a new figure.
    """
    ax = ax or _new_axes()
    layers = trials.groupby("delta")["layers"].agg(["mean", "std"])
    ax.plot(
        trials["delta"],
        trials["layers"],
        ".",
        color=_LAYERS,
        alpha=0.25,
        label="one trial, held-out prompts",
    )
    ax.errorbar(
        layers.index,
        layers["mean"],
        yerr=layers["std"].fillna(0.0),
        fmt="s-",
        color=_LAYERS,
        capsize=4,
        label="mean and standard deviation",
    )
    if "full_layers" in trials:
        full = trials["full_layers"].mean()
        ax.axhline(full, color="black", linestyle=":", label=f"full model: {full:g} layers")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tolerance delta")
    ax.set_ylabel("layers per token")
    ax.legend()
    return ax


def _new_axes() -> "Axes":
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4), layout="constrained")[1]


def _shade_certified(rows: pd.DataFrame, ax: "Axes") -> None:
    """Shade from the first to the last threshold of each run of certified ones: what lies between grid points is not."""
    grid = rows["threshold"].to_numpy(dtype=float)
    flags = rows["certified"].to_numpy(dtype=bool)
    pad = 0.004 * (grid[-1] - grid[0])  # so that a lone certified threshold is seen
    label = "certified thresholds"
    for first in np.flatnonzero(flags & ~np.r_[False, flags[:-1]]):
        length = int((~flags[first:]).argmax()) or len(flags) - first
        ax.axvspan(
            grid[first] - pad,
            grid[first + length - 1] + pad,
            color=_CERTIFIED,
            zorder=0,
            label=label,
        )
        label = "_nolegend_"
