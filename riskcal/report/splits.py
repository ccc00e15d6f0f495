"""How large the savings are over repeated splits, and how often a held-out mean lies above delta."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from riskcal._validate import RiskcalError
from riskcal.calibration.calibrate import procedure_for
from riskcal.calibration.problem import Problem, minimised
from riskcal.pvalues import methods
from riskcal.report import charts
from riskcal.report.choices import saved as saved_of
from riskcal.report.html import Html, details, joined, table, tag
from riskcal.report.sections import Section
from riskcal.trials import run as trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPLITS = 20
FRACTION = 0.8
#: Tolerances that are tried beside the one that was asked for, as shares of the way from no loss to the largest.
SHARES = (0.02, 0.05, 0.1, 0.2)


def section(
    problem: Problem, test: str, epsilon: float, cost: str | None, delta: float | None
) -> list[Section]:
    """Trials of a problem of one risk; none where `riskcal.run_trials` has none for it."""
    risk = problem.risks[0]
    if (
        len(problem.risks) > 1
        or risk.early is not None
        or problem.weighting == "requests"
        or problem.n < 10
        or test not in methods.BY_NAME  # one of the user's own, of which only the name is kept
        or minimised(problem, cost) not in (None, *problem.costs)
    ):
        return []
    low = 0.0 if risk.lower < 0.0 < risk.upper else risk.lower
    tried = {low + share * (risk.upper - low) for share in SHARES}
    deltas = sorted(tried if delta is None else tried | {delta})
    heldout = trials.splits(problem.n, SPLITS, FRACTION, 0)
    try:
        procedure = procedure_for(problem, None, {})
    except RiskcalError:  # several coordinates of a recording that stopped
        return []
    found = trials.of_problem(
        problem, deltas, heldout, methods.named(test), procedure, epsilon, cost
    )
    sequence = procedure.name.replace("_", " ")
    note = (
        f"The {problem.unit} were split {SPLITS} times at random: {FRACTION:.0%} to calibrate on, by {test.replace('_', ' ')} "
        f"and {sequence}, the rest held out. This shows how much savings depend on the draw; it proves nothing, since splits "
        "overlap, and a held-out mean is above delta by chance now and then even where the expected loss is not."
    )
    saving = next((one for one in (cost, "layers") if {one, f"full_{one}"} <= set(found)), None)
    saved = None if saving is None else 100 * (1 - found[saving] / found[f"full_{saving}"])
    name = "" if saving is None else saved_of(saving)
    body = [tag("p", note), *_drawn(found, name, saved), _table(found, name, saved)]
    return [Section("splits", "Savings and violations over repeated splits", joined(body))]


def _drawn(found: pd.DataFrame, name: str, saved: pd.Series | None) -> list[Html]:
    places = {delta: i for i, delta in enumerate(sorted(found["delta"].unique()))}
    x = found["delta"].map(places).to_numpy(dtype=np.float64)
    x += (found["trial"].to_numpy() / SPLITS - 0.5) * 0.5  # side by side, so that none hides others

    def ticks(ax: "Axes") -> None:
        ax.set_xticks(list(places.values()), [f"{delta:g}" for delta in places])
        ax.set_xlabel("delta")
        ax.grid(axis="x", visible=False)

    def losses(ax: "Axes") -> None:
        over = (found["heldout_loss"] > found["delta"]).to_numpy()
        ax.plot(x[~over], found["heldout_loss"][~over], "o", color=charts.LOSS, markersize=3.5)
        ax.plot(
            x[over],
            found["heldout_loss"][over],
            "X",
            color=charts.BAD,
            markersize=6,
            label="above delta",
        )
        for delta, place in places.items():
            ax.plot([place - 0.35, place + 0.35], [delta, delta], color=charts.INK, linewidth=1.2)
        ax.plot([], [], color=charts.INK, linewidth=1.2, label="delta")
        ax.set_ylabel("held-out mean loss")
        ax.legend(loc="upper left")
        ticks(ax)

    def savings(ax: "Axes", saved: pd.Series) -> None:
        ax.plot(x, saved, "o", color=charts.COST, markersize=3.5)
        ax.set_ylim(min(-2.0, 1.1 * float(saved.min())), 100)
        ax.set_ylabel(f"{name}, %")
        ticks(ax)

    drawn = [
        tag(
            "figure",
            tag("figcaption", "Held-out loss of each split"),
            charts.chart(losses, "Chart: held-out loss of each split at each delta; table below."),
        )
    ]
    if saved is not None:
        title = f"{name[0].upper()}{name[1:]} by each split"
        label = f"Chart: {name} by each split at each delta; table below."
        picture = charts.chart(partial(savings, saved=saved), label)
        drawn.append(tag("figure", tag("figcaption", title), picture))
    return [tag("div", *drawn, class_="charts")]


def _table(found: pd.DataFrame, name: str, saved: pd.Series | None) -> Html:
    means = trials.summary(found).set_index("delta")
    over = (found["heldout_loss"] > found["delta"]).groupby(found["delta"]).sum()
    frame = pd.DataFrame(
        {
            "delta": means.index,
            "splits": means["n_trials"].to_numpy(),
            "certified in": (means["certified"] * means["n_trials"]).round().astype(int).to_numpy(),
            "held-out mean above delta in": over.to_numpy(),
            "held-out loss": means["heldout_loss_mean"].to_numpy(),
        }
    )
    if saved is not None:
        by_delta = saved.groupby(found["delta"])
        frame[name] = by_delta.mean().map("{:.1f}%".format).to_numpy()
        frame["standard deviation"] = by_delta.std().map("{:.1f}%".format).to_numpy()
    return details("Splits, as a table", table(frame, "Repeated splits, by delta"))
