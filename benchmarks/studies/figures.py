"""The studies' figures, drawn from their committed numbers.

``PYTHONPATH=benchmarks python benchmarks/studies/figures.py`` draws all of them again; the notebook shows them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "studies"
IMAGES = ROOT / "docs" / "images" / "studies"

COLOURS = {
    "softmax": "#1f5a96",
    "max": "#5aa1d8",
    "entropy": "#2a9d8f",
    "state": "#b3261e",
    "classifier": "#e08e0b",
    "weighted": "#6a4c93",
    "contrastive": "#b07cc6",
    "contrastive-code": "#b07cc6",
    "jsd": "#2f7d32",
    "jsd-code": "#2f7d32",
    "static": "#777777",
    "oracle": "#000000",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def read(study: str, label: str) -> dict[str, Any]:
    """A study's numbers."""
    return dict(json.loads((RESULTS / f"{study}-{label}.json").read_text()))


def draw(study: str, label: str) -> Figure:
    """A study's figure."""
    with plt.rc_context(STYLE):
        figure = DRAW[study](read(study, label))
    plt.close(figure)  # so that a notebook does not show it twice
    return figure


def save(path: Path) -> Path:
    """Draw the figure of a file of numbers."""
    study, _, label = path.stem.partition("-")
    figure = draw(study, label)
    IMAGES.mkdir(parents=True, exist_ok=True)
    out = IMAGES / f"{path.stem}.png"
    figure.savefig(out, dpi=110, metadata={"Software": None})
    return out


def measures(found: dict[str, Any]) -> Figure:
    """Quality over layers: probabilities and the like on the left, contrasts on the right, the same baselines in both."""
    rows = pd.DataFrame(found["rows"])
    unit = found["conditions"]["unit"]
    groups = [
        ("softmax", "max", "entropy", "state", "classifier"),
        ("softmax", "weighted", "contrastive", "contrastive-code", "jsd", "jsd-code"),
    ]
    groups = [group for group in groups if rows["series"].isin(group[1:]).any()]
    size = (4.75 * max(len(groups), 1.5), 6.6)
    figure, axes = plt.subplots(
        2, len(groups), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    full = rows[rows["series"] == "full"].iloc[0]
    adaptive = rows[rows["series"].isin(COLOURS) & ~rows["series"].isin(["static", "oracle"])]
    for i, value in enumerate(("error", "distance")):
        for ax, group in zip(axes[i], groups, strict=True):
            static = rows[rows["series"] == "static"].sort_values("layers")
            ax.plot(
                static["layers"],
                static[value],
                "s--",
                color=COLOURS["static"],
                markersize=4,
                label="static",
            )
            for name in ("static", "softmax"):  # the others' standard errors are alike
                one = rows[rows["series"] == name]
                ax.errorbar(
                    one["layers"],
                    one[value],
                    one[f"{value}_se"],
                    fmt="none",
                    color=COLOURS[name],
                    elinewidth=0.9,
                )
            for name in group:
                one = rows[rows["series"] == name].sort_values("layers")
                if len(one):
                    code = name.endswith("-code")
                    ax.plot(
                        one["layers"],
                        one[value],
                        ":" if code else "-",
                        marker="x" if code else "o",
                        markersize=4 if code else 3,
                        linewidth=1.2,
                        color=COLOURS[name],
                        label=name,
                    )
            oracle = rows[rows["series"] == "oracle"].iloc[0]
            ax.plot(
                oracle["layers"], oracle[value], "*", color="black", markersize=11, label="oracle"
            )
            ax.axhline(full[value], color="black", linewidth=0.8)
            useful = pd.concat([adaptive[value], static[value]])
            useful = useful[pd.concat([adaptive["layers"], static["layers"]]) >= 1.8]
            ax.set_ylim(
                -0.02 * useful.max() if value == "distance" else 0.93 * full[value],
                1.05 * useful.max(),
            )
            if i:
                ax.set_xlabel("mean layers per token")
        axes[i][0].set_ylabel(f"{unit} error" if value == "error" else "distance to the full model")
    for ax in axes[0]:
        ax.legend(fontsize=8, ncol=2)
    figure.suptitle(
        f"{_title(found)}: the line is the full model, bars are a standard error", fontsize=10
    )
    return figure


def decay(found: dict[str, Any]) -> Figure:
    """The courses of the local threshold, and quality over layers for each schedule."""
    rows = pd.DataFrame(found["rows"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for (name, course), (colour, line) in zip(found["courses"].items(), SCHEDULES, strict=True):
        left.plot(range(len(course)), course, line, color=colour, label=name, linewidth=1.4)
        one = rows[rows["schedule"] == name].sort_values("layers")
        right.plot(
            one["layers"], one["distance"], line, color=colour, marker="o", markersize=3, label=name
        )
    left.set_xlabel(f"position of the token, of at most {found['length']}")
    left.set_ylabel(f"local threshold, of {found['threshold']:g}")
    left.legend(fontsize=8)
    one = rows[rows["schedule"] == "constant"]
    right.errorbar(
        one["layers"],
        one["distance"],
        one["distance_se"],
        fmt="none",
        color="black",
        elinewidth=0.9,
    )
    right.set_xlim(0.95 * rows["layers"].min(), 4.2)  # beyond it, the full model alone
    right.set_xlabel("mean layers per token; bars are a standard error")
    right.set_ylabel("distance to the full model")
    figure.suptitle(f"{_title(found)}: decaying thresholds", fontsize=10)
    return figure


SCHEDULES = (
    ("black", "-"),
    ("#b3261e", "--"),
    ("#1f5a96", "-"),
    ("#6a4c93", "-"),
    ("#1f5a96", ":"),
)


def perturbation(found: dict[str, Any]) -> Figure:
    """Similarity over the position of one wrong token, and the edits that it causes."""
    rows = pd.DataFrame(found["rows"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for (name, one), colour in zip(rows.groupby("kind"), ("#1f5a96", "#b3261e"), strict=True):
        left.errorbar(
            one["position"],
            one["similarity"],
            one["error"],
            fmt="o-",
            color=colour,
            markersize=4,
            label=name,
        )
        left.plot(
            one["position"],
            one["alone"],
            ":",
            color=colour,
            label=f"{name}, were it the only change",
        )
        right.errorbar(
            one["position"],
            one["edits"],
            one["edits_se"],
            fmt="o-",
            color=colour,
            markersize=4,
            label=name,
        )
    right.axhline(1, color="black", linewidth=0.8)
    left.set_ylabel("similarity to the undisturbed output")
    right.set_ylabel("edits per token that was replaced by another")
    right.set_ylim(bottom=0)
    for ax in (left, right):
        ax.set_xlabel("position t of the one wrong token")
        ax.legend(fontsize=8)
    figure.suptitle(f"{_title(found)}: one local error", fontsize=10)
    return figure


def calibration(found: dict[str, Any]) -> Figure:
    """Held-out loss and layers over the tolerance, for both consistencies and both protocols."""
    rows = pd.DataFrame(found["trials"])
    figure, axes = plt.subplots(
        2, 4, figsize=(12, 5.6), sharex="col", sharey="row", layout="constrained"
    )
    panels = [(c, p) for c in ("textual", "risk") for p in ("documents", "riskcal")]
    for j, (consistency, protocol) in enumerate(panels):
        some = rows[(rows["consistency"] == consistency) & (rows["protocol"] == protocol)]
        if consistency == "risk":
            some = some[some["delta"] <= 0.2]
        for measure, one in some.groupby("measure", sort=False):
            colour = COLOURS.get(measure, "#5aa1d8")
            for i, value in enumerate(("loss", "layers")):
                axes[i][j].plot(
                    one["delta"], one[value], "o-", color=colour, markersize=3, label=measure
                )
                low, high = one[value] - one[f"{value}_sd"], one[value] + one[f"{value}_sd"]
                axes[i][j].fill_between(
                    one["delta"], low, high, color=colour, alpha=0.15, linewidth=0
                )
        top = some["delta"].max()
        axes[0][j].plot([0, top], [0, top], "k--", linewidth=0.8)
        tests = {"documents": "as the documents", "riskcal": "riskcal's defaults"}
        axes[0][j].set_title(f"{consistency} consistency,\n{tests[protocol]}", fontsize=9)
        axes[1][j].set_xlabel("delta")
    axes[0][0].set_ylabel("held-out loss")
    axes[1][0].set_ylabel("mean layers")
    axes[1][0].legend(fontsize=8)
    figure.suptitle(
        f"{_title(found)}: 50 trials, epsilon .05; bands are a standard deviation over trials",
        fontsize=10,
    )
    return figure


def ranks(found: dict[str, Any]) -> Figure:
    """One column per model: ranks of the final token and shares by layer, and agreement over confidence."""
    models = found["models"]
    figure, axes = plt.subplots(
        3,
        len(models),
        figsize=(max(6.5, 3.8 * len(models) + 1), 8.4),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    names = ("whislo", "q1", "med", "q3", "whishi")
    for column, (name, of_model) in zip(axes.T, models.items(), strict=True):
        layers = of_model["layers"]
        numbers = [one["layer"] for one in layers]
        boxes = [dict(zip(names, one["rank"], strict=True)) for one in layers]
        column[0].bxp(boxes, positions=numbers, showfliers=False, widths=0.6)
        column[0].plot(
            numbers, [one["mean_rank"] for one in layers], "x", color="#b3261e", label="mean"
        )
        column[0].set_yscale("log")
        column[0].yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 50, 100]))
        column[0].yaxis.set_major_formatter("{x:g}")
        column[0].yaxis.set_minor_locator(NullLocator())
        column[0].set_title(f"trained {name}", fontsize=9)
        for key, style, colour, what in (
            ("agreement", "o-", "#1f5a96", "agrees with the last layer"),
            ("margin", "s--", "#e08e0b", "mean softmax margin"),
            ("static_accuracy", "^:", "#2f7d32", "1 - mean error, all exits here"),
        ):
            column[1].plot(
                numbers, [one[key] for one in layers], style, color=colour, markersize=4, label=what
            )
        for i, colour in ((0, "#b3261e"), (1, "#e08e0b"), (3, "#1f5a96")):
            margin = [
                m
                for m, n in zip(layers[i]["bin_margin"], layers[i]["bin_counts"], strict=True)
                if n >= 10
            ]
            agrees = [
                m
                for m, n in zip(layers[i]["bin_agreement"], layers[i]["bin_counts"], strict=True)
                if n >= 10
            ]
            column[2].plot(margin, agrees, "o-", color=colour, markersize=4, label=f"layer {i + 1}")
        column[2].plot([0, 1], [0, 1], "k--", linewidth=0.8)
        for ax in column[:2]:
            ax.set_xticks(numbers)
            ax.set_xlabel("layer")
        column[2].set_xlabel("softmax margin, in tenths")
    axes[0][0].set_ylabel(f"rank of the final token, of {found['vocabulary']}")
    axes[1][0].set_ylabel("share")
    axes[2][0].set_ylabel("agrees with the last layer")
    for row in axes:
        row[0].legend(fontsize=8, loc="best")
    figure.suptitle(
        f"{_title(found)}: boxes are quartiles, whiskers 5% and 95% of tokens", fontsize=10
    )
    return figure


def pruning(found: dict[str, Any]) -> Figure:
    """Over the minimum exit layer: layers beyond it, error and FLOPs, contrasts above, prunings below."""
    rows = pd.DataFrame(found["rows"])
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), sharex=True, layout="constrained")
    large = next(name for name in rows.columns if name.startswith("head_flops_32"))
    rows["mega"] = (rows[large] + rows[large.replace("head", "body")]) / 1e6
    rows["beyond"] = rows["layers"] - rows["min_layer"]
    for measure, one in rows[rows["pruning"] == "none"].groupby("measure", sort=False):
        _over_min_layer(axes[0], one, measure, ":" if measure.endswith("-code") else "-", measure)
    pruned = rows[rows["measure"].isin(["softmax", "jsd"])]
    for (measure, form), one in pruned.groupby(["measure", "pruning"], sort=False):
        line = {"none": "-", "fixed": "--", "decaying": "-.", "adaptive": ":"}[form]
        _over_min_layer(axes[1], one, measure, line, f"{measure}, {form}")
    full = found["full"]
    unit = found["conditions"]["unit"]
    for row in axes:
        row[0].set_ylabel("mean exit minus minimum exit layer")
        row[1].set_ylabel(f"mean {unit} error")
        row[1].axhline(full["risk"], color="black", linewidth=0.8)
        row[2].set_ylabel("MFLOPs per token, 32,128-token head")
        row[2].set_ylim(bottom=0)
        row[0].legend(fontsize=7)
    for ax in axes[1]:
        ax.set_xlabel("minimum exit layer")
    figure.suptitle(
        f"{_title(found)}: threshold {found['threshold']:g}; the line is the full model, bars: standard error of the difference",
        fontsize=10,
    )
    return figure


def _over_min_layer(axes: Any, one: pd.DataFrame, measure: str, line: str, label: str) -> None:
    marker = {"softmax": "o", "weighted": "^", "jsd": ".", "jsd-code": "x"}[measure]
    colour = COLOURS[measure]
    for ax, value in zip(axes, ("beyond", "risk", "mega"), strict=True):
        ax.plot(
            one["min_layer"],
            one[value],
            line,
            marker=marker,
            markersize=7 if measure == "softmax" else 5,
            markerfacecolor="none" if measure == "softmax" else colour,
            color=colour,
            label=label,
            linewidth=1.2,
        )
    if label == "softmax":  # the others' are alike
        axes[1].errorbar(
            one["min_layer"],
            one["risk"],
            one["excess_se"],
            fmt="none",
            color=colour,
            elinewidth=0.9,
        )


def second_thread(found: dict[str, Any]) -> Figure:
    """Speed-ups over computing one by one, with the spread over rounds and the ideal."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for ax, (name, of_model) in zip(axes, found["models"].items(), strict=True):
        size = found["sizes"][name]
        for i, ratio in enumerate(of_model["speedup"].values()):
            spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            ax.bar(i, ratio["median"], 0.6, color=("#1f5a96", "#2f7d32")[i], yerr=spread, capsize=4)
            ax.annotate(f"{ratio['median']:.2f}", (i + 0.06, ratio["median"] + 0.02), fontsize=9)
        ax.axhline(1, color="black", linewidth=0.8)
        ideal = of_model["ideal_speedup"]
        ax.plot([-0.3, 0.3], [ideal, ideal], "k--", linewidth=1.2)
        ax.annotate(f"ideal {ideal:.2f}", (-0.3, ideal + 0.02), fontsize=8)
        ax.set_xticks(range(2), ["second thread\ndecides", "both cores in\neach operation"])
        ax.set_title(f"width {size['d_model']}, {size['vocabulary']:,} tokens", fontsize=9)
    axes[0].set_ylabel("times faster than one by one")
    return figure


def classifiers(found: dict[str, Any]) -> Figure:
    """F1 of "do not exit" by layer, and decoding with each classifier."""
    table, curves = pd.DataFrame(found["f1"]), pd.DataFrame(found["curves"])
    static = pd.DataFrame(found["static"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for name, colour in (
        ("independent", "#1f5a96"),
        ("balanced", "#2f7d32"),
        ("geometric", "#b3261e"),
    ):
        left.plot(table["layer"], table[name], "o-", color=colour, markersize=4, label=name)
        one = curves[curves["objective"] == name].sort_values("layers")
        right.plot(one["layers"], one["risk"], "o-", color=colour, markersize=3, label=name)
    left.plot(
        table["layer"], table["inconsistent"], ":", color="black", label="share of such tokens"
    )
    right.plot(
        static["layers"],
        static["risk"],
        "s--",
        color=COLOURS["static"],
        markersize=4,
        label="static",
    )
    left.set_xlabel("layer")
    left.set_ylabel('F1 of "do not exit"')
    right.set_xlabel("mean layers per token")
    right.set_ylabel(f"mean {found['conditions']['unit']} error")
    for ax in (left, right):
        ax.legend(fontsize=8)
    figure.suptitle(f"{_title(found)}: exit classifiers", fontsize=10)
    return figure


def _title(found: dict[str, Any]) -> str:
    known = found["conditions"]
    return f"{known.get('label', known['model'])}, {known['layers']} layers, {known['prompts']} prompts"


DRAW: dict[str, Callable[[dict[str, Any]], Figure]] = {
    one.__name__: one
    for one in (
        measures,
        decay,
        perturbation,
        calibration,
        ranks,
        pruning,
        second_thread,
        classifiers,
    )
}


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        print(save(path).relative_to(ROOT))


if __name__ == "__main__":
    main()
