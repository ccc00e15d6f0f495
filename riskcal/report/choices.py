"""Every delta at once: what bounds that hold together certify at each, for the slider and its table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from riskcal._validate import Floats, RiskcalError
from riskcal.calibration import Calibration
from riskcal.calibration.calibrate import refuse_cut_grid, refuse_for_list
from riskcal.calibration.problem import Problem
from riskcal.calibration.simultaneous import simultaneous
from riskcal.policy import sentences
from riskcal.pvalues import methods
from riskcal.report.html import Html, details, joined, shown, table, tag
from riskcal.report.sections import Section

#: Steps of the slider as shares of the way from no loss to the largest, fixed here and so before any data were seen.
SHARES = np.round(np.r_[np.arange(1, 21) / 200, np.arange(11, 51) / 100], 3)

#: Costs as tables and charts name them, in their order there.
UNITS = {
    "layers": "layers per token",
    "seconds": "seconds per prompt",
    "flops": "FLOPs per prompt",
    "tokens": "tokens per prompt",
}


def units(calibration: Calibration) -> dict[str, str]:
    """Recorded costs and what they are per, in their order in tables and charts: that which chooses, then the known ones.

    Where every prompt is one decision, there are no tokens to count, and its depth is its own.
    """
    costs = calibration.costs
    alone = "tokens" in costs and bool((calibration.table["tokens"] == 1).all())
    known = UNITS | ({"layers": "layers per prompt"} if alone else {})
    costs = sorted(costs, key=[calibration.asked.cost, *UNITS, *costs].index)
    return {
        name: known.get(name, f"{name} per prompt")
        for name in costs
        if not (alone and name == "tokens")
    }


def saved(name: str) -> str:
    """How a table says that some of a cost was saved."""
    return f"{'FLOPs' if name == 'flops' else name} saved"


@dataclass(frozen=True)
class Choices:
    """One calibration per delta, all of which hold together; the slider begins at ``step``."""

    calibrations: Sequence[Calibration]
    step: int

    @property
    def candidates(self) -> list[int | None]:
        """The row of the table that each delta chooses; None for the full model."""
        chosen = [one.chosen for one in self.calibrations]
        return [None if row is None else int(row.name) for row in chosen]  # type: ignore[call-overload]

    @property
    def bounds(self) -> Floats:
        """(k,) upper bounds on the expected losses, on the grid of the deltas."""
        return self.calibrations[0].table["bound"].to_numpy(dtype=np.float64)


def choices(
    problem: Problem, test: str, cost: str | None, told: dict[str, Any], delta: float | None
) -> Choices:
    """What is certified at each step of the slider, and at ``delta``, fixed beforehand, if there is one.

    Raises
    ------
    RiskcalError
        Where there is no single loss for which bounds could hold together, or lower thresholds were left out by the losses.
    """
    refuse_for_list(problem, None, {})
    if len(problem.risks) > 1:
        raise RiskcalError(
            "delta: bounds that hold for every delta at once are of one risk, and here are "
            f"{len(problem.risks)}; give one."
        )
    refuse_cut_grid(problem.stopped, one_sequence=False)
    risk = problem.risks[0]
    low = 0.0 if risk.lower < 0.0 < risk.upper else risk.lower
    inside = low + SHARES * (risk.upper - low)
    deltas = np.unique(np.append(inside, inside if delta is None else delta)).tolist()
    every = simultaneous(problem, deltas, methods.named(test), cost, told)
    first = next((i for i, one in enumerate(every) if one.certified), len(deltas) - 1)
    return Choices(every, first if delta is None else deltas.index(delta))


def table_of(chosen: Choices, full: dict[str, float]) -> pd.DataFrame:
    """One row per delta: what it certifies, what that loses, costs and saves."""
    rows = []
    for one in chosen.calibrations:
        row: dict[str, Any] = {"delta": float(one.delta)} if not isinstance(one.delta, dict) else {}
        at, names = one.chosen, one.coordinates
        if names != ["threshold"]:  # as charts and the table of candidates number them
            row["candidate"] = "full" if at is None else int(at.name) + 1  # type: ignore[call-overload]
        for name in names:
            if name != "threshold" or "thresholds" not in names:  # which it only numbers
                row[name] = "full" if at is None else at[name]
        row["observed loss"] = 0.0 if at is None else float(at["loss"])
        row["upper bound"] = 0.0 if at is None else float(at["bound"])
        for name, per in units(one).items():
            spent = full.get(name, np.nan) if at is None else float(at[name])
            row[per] = spent
            if name in ("layers", "flops", one.asked.cost) and name != "seconds" and full.get(name):
                row[saved(name)] = f"{1 - spent / full[name]:.0%}"
            if name == "seconds" and full.get(name) and spent > 0:
                row["speed"] = f"{full[name] / spent:.2f}x"
        rows.append(row)
    return pd.DataFrame(rows)


def section(chosen: Choices, full: dict[str, float], *, fixed: float | None) -> Section:
    """The slider, what stands at it now, and the table that it walks along."""
    frame = table_of(chosen, full)
    said = [_said(one) for one in chosen.calibrations]
    level = chosen.calibrations[0].epsilon_spent

    def row(index: int) -> dict[str, Any]:
        at = chosen.calibrations[index]
        key = "full" if at.chosen is None else shown(float(at.threshold))
        here = index == chosen.step
        return {"data_say": said[index], "data_key": key, "class_": "chosen" if here else None}

    note = (
        "Move delta, the loss that you would tolerate. What is certified here holds for every delta at once, with probability "
        f"at least {sentences.at_least(level)}: you may look at all of them, and choose afterwards. Costs and speed are observed "
        "means. Charts and generations below move along. "
    )
    if fixed is not None:
        note += (
            "That freedom has a price: where delta was fixed beforehand, the guarantee above can certify more. The two are "
            "separate statements; who takes the better of them after looking has to add their epsilons."
        )
    return Section(
        "delta",
        "What each delta would buy",
        joined([tag("p", note), _slider(frame, said, chosen.step), _every(frame, row)]),
    )


def _said(one: Calibration) -> str:
    """What is certified at one delta; nothing is simulated for those where nothing is."""
    if one.certified:
        return one.message
    return f"Nothing is certified at delta {one.delta:g} by bounds that hold for every delta: run the full model."


def _slider(frame: pd.DataFrame, said: list[str], step: int) -> Html:
    label = tag("label", "Tolerated loss, delta", for_="delta-slider")
    value = shown(frame["delta"].iloc[step])
    slider = tag(
        "input",
        id="delta-slider",
        type="range",
        min=0,
        max=len(frame) - 1,
        step=1,
        value=step,
        aria_valuetext=f"delta {value}",
    ).removesuffix("</input>")
    cards = [
        tag("div", tag("dt", name), tag("dd", shown(frame[name].iloc[step]), data_cell=column))
        for column, name in enumerate(frame.columns)
        if column
    ]
    return tag(
        "div",
        tag("p", label, " ", tag("output", value, data_cell=0, for_="delta-slider")),
        Html(slider),
        tag("dl", *cards, class_="cards"),
        tag("p", said[step], id="statement", aria_live="polite"),
        class_="slider",
    )


def _every(frame: pd.DataFrame, row: Any) -> Html:
    caption = "What is certified at every delta, all of it at once"
    return details("Every delta, as a table", table(frame, caption, row=row, id="deltas"))
