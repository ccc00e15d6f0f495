"""What candidates lose and what they cost, against their thresholds."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from riskcal._validate import RiskcalError
from riskcal.plots.styles import current, in_lines, legend_above, new_axes, width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How a cost's curve and axis are labelled where its name alone would not say what it is per.
_PER = {
    "layers": "decoder layers per token",
    "flops": "FLOPs per prompt",
    "tokens": "tokens per prompt",
    "seconds": "seconds per prompt",
}


def risk_curve(
    table: pd.DataFrame,
    *,
    delta: float | None = None,
    threshold: float = math.inf,
    lower_is_stricter: bool = False,
    by: str | None = None,
    meaning: str = "loss",
    of: str = "prompts",
    ax: "Axes | None" = None,
) -> "Axes":
    """Mean loss of every candidate against its threshold, with the tolerance and the certified thresholds.

    Parameters
    ----------
    table : DataFrame
        As in `riskcal.Calibration.table`: ``threshold``, ``loss``; ``certified``, whose markers are filled and, without
        ``by``, shaded; ``bound``, an upper confidence bound of each candidate's expected loss, drawn as a band; and with
        ``by`` ``chosen``, true for the candidate to mark.
    delta : float, optional
        The tolerance, drawn as a line.
    threshold : float
        The chosen threshold, marked if it is finite.
    lower_is_stricter : bool
        Whether low thresholds are the strict ones.
    by : str, optional
        A further coordinate: one curve for each of its values.
    meaning : str
        What the loss is, in words: the vertical axis is the mean of it.
    of : str
        What the mean was taken over, in words.
    ax : Axes, optional
        Drawn on if given, else on a new figure.

    Raises
    ------
    RiskcalError
        For a table without rows.

    Examples
    --------
    >>> calibration = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1)
    >>> axes = riskcal.plots.risk_curve(calibration.table, delta=0.1, threshold=calibration.threshold)
    >>> axes.figure.savefig("risk.png")
    """
    if not len(table):
        raise RiskcalError("table: has no row, so that there is nothing to draw yet.")
    ax, style = new_axes(ax), current()
    rows = table.sort_values("threshold")
    if by is None:
        if "certified" in rows:
            _shade_certified(rows, ax)
        if "bound" in rows:
            ax.fill_between(
                rows["threshold"],
                rows["loss"],
                rows["bound"],
                color=style.loss,
                alpha=0.2,
                linewidth=0.6,
                label="upper confidence bound",
            )
        _candidates(rows, "loss", f"mean over {of}", style.loss, "o", ax)
    else:
        _curves(rows, "loss", by, ax)
    if delta is not None:
        label = f"tolerance delta = {delta:g}"
        ax.axhline(delta, color=style.delta, linestyle="--", linewidth=style.line, label=label)
    chosen = rows[rows["threshold"] == threshold]
    if len(chosen) and by is None:
        label = f"chosen: threshold {threshold:g}, {chosen['loss'].iloc[0]:.3g}"
        _mark(chosen, "loss", label, style.loss, "o", ax)
    ax.set_ylim(bottom=min(0.0, float(rows["loss"].min()) * 1.1))
    _label_thresholds(lower_is_stricter, ax)
    ax.set_ylabel(in_lines(f"mean {meaning}"))
    legend_above(ax)
    return ax


def cost_curve(
    table: pd.DataFrame,
    *,
    full: float | None = None,
    cost: str = "layers",
    threshold: float = math.inf,
    lower_is_stricter: bool = False,
    by: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Mean cost of every candidate, decoder layers per token or another, against the full model's if that is known.

    Examples
    --------
    >>> calibration = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1)
    >>> axes = riskcal.plots.cost_curve(calibration.table, full=8, threshold=calibration.threshold)
    """
    ax, style = new_axes(ax), current()
    rows = table.sort_values("threshold")
    per = _per(cost, table)
    if by is None:
        if "certified" in rows:
            _shade_certified(rows, ax)
        _candidates(rows, cost, f"mean {per}", style.cost, "s", ax)
    else:
        _curves(rows, cost, by, ax)
    if full is not None:
        ax.axhline(full, color=style.full, linestyle=":", label=f"full model: {_amount(full)}")
    chosen = rows[rows["threshold"] == threshold]
    if len(chosen) and by is None:
        spent = float(chosen[cost].iloc[0])
        label = f"chosen: {_amount(spent)}" + (f", {1 - spent / full:.0%} saved" if full else "")
        _mark(chosen, cost, label, style.cost, "s", ax)
    _costs_from_nothing(max(full or 0.0, float(rows[cost].max())), ax)
    _label_thresholds(lower_is_stricter, ax)
    ax.set_ylabel(in_lines(per))
    legend_above(ax)
    return ax


def trade_off(
    table: pd.DataFrame,
    *,
    cost: str = "layers",
    delta: float | None = None,
    full: float | None = None,
    chosen: int | None = None,
    meaning: str = "loss",
    of: str = "prompts",
    ax: "Axes | None" = None,
) -> "Axes":
    """Mean cost of every candidate against its mean loss: also of candidates that curves over one threshold cannot show.

    Parameters
    ----------
    table : DataFrame
        As in `riskcal.Calibration.table`: ``loss``, the cost's column, and ``certified``, whose markers are filled.
    cost : str
        The column of the cost.
    delta : float, optional
        The tolerance, drawn as a line.
    full : float, optional
        What the full model costs, drawn as a line.
    chosen : int, optional
        The row of the table, by its index, to mark.
    meaning, of, ax
        As in `risk_curve`.

    Examples
    --------
    >>> traces = riskcal.load_example("cascade")
    >>> pairs = [[first, second] for first in (0.9, 0.7, 0.5) for second in (0.9, 0.7, 0.5)]
    >>> runs = riskcal.replay_traces(traces, pairs, exact=True)
    >>> found = riskcal.calibrate(runs, delta=0.1, cost="price")
    >>> axes = riskcal.plots.trade_off(found.table, cost="price", delta=0.1, chosen=found.chosen.name)
    """
    ax, style = new_axes(ax), current()
    per = _per(cost, table)
    filled = table["certified"].to_numpy(dtype=bool) if "certified" in table else None
    parts = (("all", slice(None)),) if filled is None else (("", filled), ("not ", ~filled))
    for said, rows in parts:
        some = table[rows]
        if len(some):
            ax.scatter(
                some["loss"],
                some[cost],
                s=style.marker**2,
                marker="s",
                facecolors="none" if said == "not " else style.cost,
                edgecolors=style.cost,
                label="candidates" if said == "all" else f"{said}certified",
            )
    if delta is not None:
        label = f"tolerance delta = {delta:g}"
        ax.axvline(delta, color=style.delta, linestyle="--", linewidth=style.line, label=label)
    if full is not None:
        ax.axhline(full, color=style.full, linestyle=":", label=f"full model: {_amount(full)}")
    if chosen is not None:
        row = table.loc[[chosen]]
        lost, spent = (float(row[name].iloc[0]) for name in ("loss", cost))
        label = f"chosen: {_amount(spent)}" + (f", {1 - spent / full:.0%} saved" if full else "")
        _mark_at(lost, spent, label, style.cost, "s", ax)
    ax.set_xlim(left=min(0.0, float(table["loss"].min()) * 1.1))
    ax.locator_params(axis="x", nbins=5)  # of as many digits, in a column's width
    _costs_from_nothing(max(full or 0.0, float(table[cost].max())), ax)
    ax.set_xlabel(in_lines(f"mean {meaning} over {of}", 48))
    ax.set_ylabel(in_lines(f"mean {per}"))
    legend_above(ax)
    return ax


def trials_curve(trials: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Mean decoder layers per token that each trial's calibration left, against delta: every trial, and mean +- deviation.

    Parameters
    ----------
    trials : DataFrame
        As `riskcal.run_trials` returns it, with ``layers``; with ``full_layers`` the full model is drawn as well.
    ax : Axes, optional
        Drawn on if given, else on a new figure.

    Examples
    --------
    >>> trials = riskcal.run_trials(riskcal.load_example("g2p"), deltas=[0.05, 0.1], n_trials=5)
    >>> axes = riskcal.plots.trials_curve(trials)
    """
    ax, style = new_axes(ax), current()
    layers = trials.groupby("delta")["layers"].agg(["mean", "std"])
    ax.plot(
        trials["delta"],
        trials["layers"],
        ".",
        color=style.cost,
        alpha=0.25,
        label="one trial, held-out prompts",
    )
    ax.errorbar(
        layers.index,
        layers["mean"],
        yerr=layers["std"].fillna(0.0),
        fmt="s-",
        markersize=style.marker,
        linewidth=style.line,
        color=style.cost,
        capsize=4,
        label="mean and standard deviation",
    )
    if "full_layers" in trials:
        full = trials["full_layers"].mean()
        ax.axhline(full, color=style.full, linestyle=":", label=f"full model: {full:g} layers")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tolerance delta")
    ax.set_ylabel("layers per token")
    legend_above(ax)
    return ax


def _candidates(
    rows: pd.DataFrame, column: str, label: str, color: str, marker: str, ax: "Axes"
) -> None:
    """Measured candidates as markers, filled where certified; the thin line between them was not measured."""
    style = current()
    filled = rows["certified"].to_numpy(dtype=bool) if "certified" in rows else np.ones(len(rows))
    grid, values = rows["threshold"].to_numpy(dtype=float), rows[column].to_numpy(dtype=float)
    if len(grid) > 1:
        ax.plot(grid, values, "-", color=color, linewidth=style.line / 2, alpha=0.6)
    for certified in (True, False):
        some = np.flatnonzero(filled == certified)
        ax.scatter(  # not lines: of these the one that is chosen alone has a single point
            grid[some],
            values[some],
            s=style.marker**2,
            marker=marker,
            facecolors=color if certified else "none",
            edgecolors=color,
            zorder=2.5,
            label=label if certified == bool(filled.any()) else "_nolegend_",
        )


def _literal(name: str) -> str:
    """A name that users gave, which is no formula to be set: two dollars would make it one."""
    return name.replace("$", r"\$")


def _curves(rows: pd.DataFrame, column: str, by: str, ax: "Axes") -> None:
    """One curve for each value of a further coordinate; the row that is ``chosen``, if there is such a column, is marked."""
    colors = current().several
    for i, (value, own) in enumerate(rows.groupby(by, dropna=False)):
        color, marker = colors[i % len(colors)], "os^Dvp"[i % 6]
        of = "none" if pd.isna(value) else str(value)  # a schedule that does not decay
        _candidates(own, column, _literal(f"{by} {of}"), color, marker, ax)
        chosen = own[own["chosen"]] if "chosen" in own else own[:0]
        if len(chosen):
            value = float(chosen[column].iloc[0])
            label = f"chosen: {value:.3g}" if column == "loss" else f"chosen: {_amount(value)}"
            _mark(chosen, column, label, color, marker, ax)
    if "certified" in rows and not rows["certified"].all():
        ax.scatter([], [], facecolors="none", edgecolors="0.4", label="not certified")


def _mark(
    chosen: pd.DataFrame, column: str, label: str, color: str, marker: str, ax: "Axes"
) -> None:
    _mark_at(chosen["threshold"], chosen[column], label, color, marker, ax)


def _mark_at(x: Any, y: Any, label: str, color: str, marker: str, ax: "Axes") -> None:
    ax.plot(
        x,
        y,
        marker,
        color=color,
        markersize=2 * current().marker,
        markeredgecolor="black",
        label=label,
    )


def _per(cost: str, table: pd.DataFrame) -> str:
    """A cost and what it is per; where a prompt is one decision, as a classifier's, its depth is not one of tokens."""
    if cost == "layers" and "tokens" in table and (table["tokens"] == 1).all():
        return "layers per prompt"
    return _PER.get(cost, _literal(cost))


def _costs_from_nothing(top: float, ax: "Axes") -> None:
    """A vertical axis of costs from 0 to a little above the largest."""
    ax.set_ylim(0, top * 1.08 or 1.0)
    if not _plain(top):  # matplotlib would put a power of ten where the legend stands
        from matplotlib.ticker import EngFormatter

        ax.yaxis.set_major_formatter(EngFormatter(sep=" "))


def _amount(value: float) -> str:
    """A cost in a few letters: 1.398, 8.05 M."""
    from matplotlib.ticker import EngFormatter

    return f"{value:.4g}" if _plain(value) else EngFormatter(sep=" ")(float(f"{value:.3g}"))


def _plain(value: float) -> bool:
    """Whether it is read at a glance without a prefix."""
    return value == 0 or 1e-3 <= abs(value) < 1e5


def _label_thresholds(lower_is_stricter: bool, ax: "Axes") -> None:
    ax.set_xlabel(
        "exit threshold"
        + ("\n" if width(ax) < 3.5 else " ")
        + f"({'lower' if lower_is_stricter else 'higher'}: more cautious)"
    )


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
            color=current().certified,
            alpha=0.12,
            linewidth=0,
            zorder=0,
            label=label,
        )
        label = "_nolegend_"
