"""Exits and what they say: confidence and agreement by layer, paths of heads, policies, bets of a monitor."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from riskcal.plots.styles import current, in_lines, legend_above, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def agreement_curve(
    table: pd.DataFrame, *, outcome: str = "agreement", ax: "Axes | None" = None
) -> "Axes":
    """What each exit would say if all stopped there, beside how confident it is.

    Parameters
    ----------
    table : DataFrame
        One row per exit: ``layer``, mean ``confidence``, and ``outcome``, the mean agreement or loss.
    outcome : str
        The outcome's column and name.
    ax : Axes, optional
        Drawn on if given, else on a new figure.

    Examples
    --------
    >>> import pandas as pd
    >>> traces = riskcal.load_example("g2p-traces")
    >>> table = pd.DataFrame({
    ...     "layer": range(1, 9),
    ...     "confidence": traces.confidence.mean(0),
    ...     "agreement": traces.agrees.mean(0),
    ... })
    >>> axes = riskcal.plots.agreement_curve(table)  # as traces.plot() does
    """
    ax, style = new_axes(ax), current()
    form: dict[str, Any] = {"markersize": style.marker, "linewidth": style.line}
    ax.plot(table["layer"], table[outcome], "o-", color=style.loss, label=f"mean {outcome}", **form)
    label = "mean confidence"
    ax.plot(table["layer"], table["confidence"], "s--", color=style.cost, label=label, **form)
    ax.set_xlabel("exit layer, if all stopped there")
    ax.set_ylabel(f"{outcome}, confidence")
    ax.set_ylim(bottom=min(0.0, float(table[[outcome, "confidence"]].min().min())))
    _whole_numbers(ax)
    legend_above(ax)
    return ax


def heads_curve(
    table: pd.DataFrame,
    *,
    layers: Sequence[int],
    agreement: float,
    chosen: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Agreement of the tokens that left at each head against the share that left early, step by step of the path.

    Each step has a marker, filled where it was certified.

    Parameters
    ----------
    table : DataFrame
        As in `riskcal.heads.HeadCalibration.table`.
    layers : (K,) ints
        The heads' layers.
    agreement : float
        What is demanded, drawn as a line.
    chosen : int, optional
        The step that was chosen, marked.
    ax : Axes, optional
        Drawn on if given, else on a new figure.

    Examples
    --------
    >>> traces = riskcal.load_example("g2p-traces")
    >>> calibration = riskcal.heads.certified(
    ...     traces.confidence[:, :3], traces.agrees[:, :3], prompts=traces.prompt, max_tokens=24, agreement=0.95
    ... )
    >>> axes = riskcal.plots.heads_curve(calibration.table, layers=[1, 2, 3], agreement=0.95)
    """
    ax, style = new_axes(ax), current()
    share, together = table["exits"], table["agreement"]
    # Beneath the heads: with one head in use they are one line.
    band: dict[str, Any] = {"color": style.full, "alpha": 0.25, "linewidth": 4 * style.line}
    ax.plot(share, together, "-", label="all heads", **band)
    for i, layer in enumerate(layers):
        values = table[f"agreement_{layer}"]
        if values.notna().any():
            color, dash = style.several[i % len(style.several)], ("-", "--", ":", "-.")[i % 4]
            label = f"head after layer {layer}"
            ax.plot(share, values, dash, color=color, linewidth=style.line, label=label)
    certified = table["certified"].to_numpy(dtype=bool)
    for kept, fill, label in ((True, "full", "_nolegend_"), (False, "none", "not certified")):
        some = np.flatnonzero(certified == kept)
        if len(some):
            form: dict[str, Any] = {"markersize": style.marker, "fillstyle": fill, "label": label}
            ax.plot(share.iloc[some], together.iloc[some], "o", color=style.full, **form)
    label = f"demanded: {agreement:g}"
    ax.axhline(agreement, color=style.delta, linestyle="--", linewidth=style.line, label=label)
    if chosen is not None:
        at = table.iloc[chosen]
        label = f"chosen: {at['exits']:.0%} leave early"
        large: dict[str, Any] = {"markersize": 2 * style.marker, "color": style.full}
        ax.plot(at["exits"], at["agreement"], "o", label=label, **large)
    ax.set_xlabel("share of tokens that leave early")
    ax.set_ylabel(in_lines("agreement with the full model"))
    legend_above(ax)
    return ax


def needed_confidence(
    needed: Mapping[int, float] | ArrayLike, *, ax: "Axes | None" = None
) -> "Axes":
    """The confidence that a policy asks for: by head, from a mapping of layers, or by position, from one number each.

    Examples
    --------
    >>> axes = riskcal.plots.needed_confidence({2: 0.9, 4: 0.8})  # by head
    >>> schedule = riskcal.Decaying(max_length=64)
    >>> axes = riskcal.plots.needed_confidence(schedule.local_threshold(0.8, np.arange(64)))
    """
    ax, style = new_axes(ax), current()
    if isinstance(needed, Mapping):
        layers = np.array(sorted(needed))
        values = np.array([needed[layer] for layer in layers.tolist()], dtype=float)
        used = np.isfinite(values)
        ax.plot(layers[used], values[used], "o", color=style.loss, label="exit threshold")
        if not used.all():
            top = float(values[used].max()) if used.any() else 1.0
            label = "never exits"
            ax.plot(layers[~used], np.full((~used).sum(), top), "x", color=style.delta, label=label)
        ax.set_xlabel("layer")
        _whole_numbers(ax)
        legend_above(ax)
    else:
        values = np.asarray(needed, dtype=float)
        if math.isfinite(values.max()):
            ax.step(np.arange(len(values)), values, where="mid", color=style.loss)
            ax.set_ylim(min(0.0, float(values.min())), max(1.0, float(values.max())) * 1.05)
        else:
            said = "the full model:\nno token exits early"
            ax.text(0.5, 0.5, said, ha="center", va="center", transform=ax.transAxes)
            ax.set_xlim(0, max(1, len(values) - 1))
        ax.set_xlabel("position of the token")
    ax.set_ylabel(in_lines("confidence needed to exit"))
    return ax


def bets(table: pd.DataFrame, *, limit: float, ax: "Axes | None" = None) -> "Axes":
    """Evidence of a monitor: each bet's capital, their mean, and the limit at which the alarm is raised.

    Parameters
    ----------
    table : DataFrame
        One row per bet: ``share``, of the largest possible stake, and ``capital``.
    limit : float
        Of the mean capital.
    ax : Axes, optional
        Drawn on if given, else on a new figure.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"share": [0.1, 0.3, 0.5], "capital": [1.5, 4.0, 9.0]})
    >>> axes = riskcal.plots.bets(table, limit=20)  # as RiskMonitor.plot draws its own
    """
    ax, style = new_axes(ax), current()
    lowest = (
        1e-9 * limit
    )  # what is lost, or has not begun, stands at the foot of a scale that has no zero
    drawn = table["capital"].clip(lower=lowest)
    ax.plot(table["share"], drawn, "o", color=style.loss, label="one bet")
    mean = float(table["capital"].mean())
    label = f"their mean: {mean:.3g}"
    ax.axhline(max(mean, lowest), color=style.loss, linewidth=style.line, label=label)
    label = f"alarm at {limit:.4g}"
    ax.axhline(limit, color=style.delta, linestyle="--", linewidth=style.line, label=label)
    ax.set_yscale("log")
    ax.set_xlabel("stake, as a share of the largest")
    ax.set_ylabel(in_lines("capital of the bets that the risk is above delta"))
    legend_above(ax)
    return ax


def _whole_numbers(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
