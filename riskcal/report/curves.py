"""What early exit loses and saves at each candidate: the risk curve with its bounds, and the costs."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from riskcal._validate import Floats
from riskcal.calibration import Calibration
from riskcal.calibration.problem import Problem, TestedRisk
from riskcal.policy import sentences
from riskcal.report import charts
from riskcal.report.charts import Mark
from riskcal.report.choices import Choices, units
from riskcal.report.html import Html, details, joined, table, tag
from riskcal.report.sections import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def section(
    problem: Problem, calibration: Calibration | None, chosen: Choices | None
) -> list[Section]:
    """Loss and costs against the candidates, drawn and as one table."""
    source = calibration if chosen is None else chosen.calibrations[chosen.step]
    assert source is not None  # the page has at least one of the two
    x, axis = _axis(problem)
    costs = units(source)
    drawn = [
        _risk(problem, risk, x, axis, calibration, chosen)
        for risk in problem.risks
        if not risk.is_cost  # which has a chart as a cost
    ]
    drawn += [
        _cost(problem, x, axis, name, per, calibration, chosen)
        for name, per in costs.items()
        if name != "tokens" or name == source.asked.cost
    ]
    marked = _marked(calibration)

    def row(index: int) -> dict[str, Any]:
        return {"class_": "chosen" if index == marked else None}

    frame = _table(problem, source.table, costs, calibration, chosen)
    body = [tag("div", *drawn, class_="charts"), tag("p", _reading(problem, chosen))]
    body.append(
        details("Every candidate, as a table", table(frame, "Candidates, in tested order", row=row))
    )
    return [Section("risk", "Risk and cost of each threshold", joined(body))]


def _axis(problem: Problem) -> tuple[Floats, str]:
    """Where candidates stand: at their thresholds, or one beside the other where these alone do not tell them apart."""
    if problem.several_coordinates:
        return np.arange(1.0, problem.k + 1), "candidate, as numbered in the table"
    cautious = "lower" if problem.lower_is_stricter else "higher"
    x = problem.candidates["threshold"].to_numpy(dtype=np.float64)
    return x, f"exit threshold ({cautious}: more cautious)"


def _stand_alone(problem: Problem) -> bool:
    """Whether no line may join candidates: what is between two of them is none, or there is but one."""
    return problem.several_coordinates or problem.k == 1


def _marked(calibration: Calibration | None) -> int | None:
    """The row that is certified for the delta that was fixed beforehand, if there is one."""
    at = None if calibration is None else calibration.chosen
    return None if at is None else int(at.name)  # type: ignore[call-overload]


def _fixed(calibration: Calibration | None, x: Floats, y: Floats) -> tuple[float, float] | None:
    """Where the candidate of the delta that was fixed beforehand stands, if any is certified."""
    at = _marked(calibration)
    return None if at is None else (float(x[at]), float(y[at]))


def _dots(colour: str, chosen: Choices | None, x: Floats, y: Floats) -> list[Mark]:
    if chosen is None:
        return []
    return [
        Mark(colour, [None if i is None else (float(x[i]), float(y[i])) for i in chosen.candidates])
    ]


def _risk(
    problem: Problem,
    risk: TestedRisk,
    x: Floats,
    axis: str,
    calibration: Calibration | None,
    chosen: Choices | None,
) -> Html:
    loss, name = problem.mean(risk), sentences.meaning(risk.name)
    order = np.argsort(x)
    finite = loss[np.isfinite(loss)]
    high = 1.15 * max(float(finite.max(initial=0.0)), 1e-9)
    delta = None if calibration is None else risk.delta
    if delta is not None:
        high = max(high, 1.6 * delta)
    high = min(high, risk.upper)

    alone = _stand_alone(problem)

    def draw(ax: "Axes") -> None:
        if chosen is not None and alone:
            bound = np.minimum(chosen.bounds[order], 2 * high)
            said = "up to its upper bound"
            ax.vlines(x[order], loss[order], bound, color=charts.LOSS, linewidth=1, label=said)
        elif chosen is not None:
            bound = np.minimum(chosen.bounds[order], 2 * high)
            ax.fill_between(
                x[order], loss[order], bound, color=charts.LOSS, alpha=0.18, linewidth=0
            )
            ax.plot(
                x[order],
                bound,
                color=charts.LOSS,
                linewidth=1,
                linestyle="--",
                label="upper bound",
            )
        form = "o" if alone else "o-"
        ax.plot(
            x[order], loss[order], form, color=charts.LOSS, markersize=3.5, label="observed mean"
        )
        if delta is not None:
            ax.axhline(
                delta,
                color=charts.BAD,
                linewidth=1.2,
                linestyle=":",
                label=f"delta {delta:g}, fixed",
            )
        at = _fixed(calibration, x, loss)
        if at is not None:
            ax.plot(*at, "s", color=charts.SURE, markersize=8, label="certified for it")
        ax.set_ylim(min(0.0, 1.1 * float(finite.min(initial=0.0))), high)
        ax.set_xlabel(axis)
        ax.set_ylabel("loss")
        charts.legend_above(ax)

    marks = []
    if chosen is not None:
        deltas = [float(one.delta) for one in chosen.calibrations]  # type: ignore[arg-type]
        middle = float(x.mean())
        levels = [(middle, d) if d <= high else None for d in deltas]
        marks = [Mark(charts.BAD, levels, level=True), *_dots(charts.BAD, chosen, x, loss)]
    low, top = float(np.nanmin(loss)), float(np.nanmax(loss))
    label = f"Chart: {name} from {low:.3g} to {top:.3g} over {problem.k} candidates; the table below has every value."
    title = tag("figcaption", f"Mean {name}")
    return tag("figure", title, charts.chart(draw, label, marks=marks, step=_step(chosen)))


def _cost(
    problem: Problem,
    x: Floats,
    axis: str,
    name: str,
    per: str,
    calibration: Calibration | None,
    chosen: Choices | None,
) -> Html:
    mean, order = problem.costs[name].mean(0), np.argsort(x)
    full = problem.full_costs.get(name)

    def draw(ax: "Axes") -> None:
        form = "o" if _stand_alone(problem) else "o-"
        ax.plot(x[order], mean[order], form, color=charts.COST, markersize=3.5, label="early exit")
        if full is not None:
            ax.axhline(full, color=charts.INK, linewidth=1, linestyle=":", label="full model")
        at = _fixed(calibration, x, mean)
        if at is not None:
            ax.plot(*at, "s", color=charts.SURE, markersize=8)
        top = max(float(mean.max()), full or 0.0, 1e-12)
        ax.set_ylim(0, 1.08 * top)
        charts.amounts(ax, top)
        ax.set_xlabel(axis)
        ax.set_ylabel(per)
        charts.legend_above(ax)

    said = f"Chart: {per} from {mean.min():.3g} to {mean.max():.3g} over {problem.k} candidates"
    said += "." if full is None else f"; the full model takes {full:.3g}."
    picture = charts.chart(draw, said, marks=_dots(charts.BAD, chosen, x, mean), step=_step(chosen))
    return tag("figure", tag("figcaption", f"Mean {per}"), picture)


def _step(chosen: Choices | None) -> int:
    return 0 if chosen is None else chosen.step


def _reading(problem: Problem, chosen: Choices | None) -> str:
    said = f"Means over {problem.n:,} {problem.unit}. "
    if chosen is None:
        return said
    level = sentences.at_least(chosen.calibrations[0].epsilon_spent)
    drawn = "Each thin line goes up to" if _stand_alone(problem) else "The dashed line is"
    return said + (
        f"{drawn} an upper bound: with probability at least {level} the expected losses of all candidates lie below "
        "theirs. It stands on the slider's grid of deltas, and rises beyond the chart where no delta of the slider is certified. "
        "The moving dot and the solid line are the slider's delta and the threshold that it certifies."
    )


def _table(
    problem: Problem,
    source: pd.DataFrame,
    costs: dict[str, str],
    calibration: Calibration | None,
    chosen: Choices | None,
) -> pd.DataFrame:
    """One row per candidate: what tells them apart, losses, p-value and bound, costs."""
    whole, coordinates = source if calibration is None else calibration.table, problem.coordinates
    names = whole.columns.tolist()
    told = [name for name in coordinates if name != "threshold" or "thresholds" not in coordinates]
    found = [name for name in names[names.index("n") + 1 :] if name not in problem.costs]
    shown = whole[[*told, *found, *costs]]
    if calibration is None:
        shown = shown.drop(columns="certified")  # that is for each delta to say
    if chosen is not None and "bound" not in shown:
        shown.insert(shown.columns.tolist().index("certified"), "bound", chosen.bounds)
    if coordinates != ["threshold"]:
        shown.insert(0, "candidate", np.arange(1, len(shown) + 1))
    return shown.rename(columns={"bound": "upper bound", "pvalue": "p-value", **costs})
