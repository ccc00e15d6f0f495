"""The tables and figures of docs/training.md, from ``benchmarks/results/exit_aware.json``.

``python benchmarks/exit_aware_figures.py`` writes SVGs to ``docs/images`` and prints the tables. Thresholds of different models
and measures are not alike, so models are compared at equal depth: errors are interpolated linearly between decoded thresholds,
the full model being the last one.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

RESULTS = Path(__file__).parent / "results" / "exit_aware.json"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
DEPTHS = (1.5, 2.0, 2.5, 3.0)


def adaptive(table: pd.DataFrame) -> pd.DataFrame:
    """The full model and the thresholds, from shallow to deep."""
    return table[~table["policy"].str.startswith("static")].sort_values("layers")


def static(table: pd.DataFrame) -> pd.DataFrame:
    """The static exits."""
    return table[table["policy"].str.startswith("static")].sort_values("layers")


def at_depth(table: pd.DataFrame, column: str, depth: float) -> float:
    """A column at a mean depth, interpolated between thresholds; NaN below the shallowest of them."""
    points = adaptive(table)
    return float(np.interp(depth, points["layers"], points[column], left=np.nan))


def error_of(table: pd.DataFrame) -> str:
    """The column of the task's error."""
    return next(column for column in table if column.endswith("_error"))


def summary(rows: list[dict]) -> pd.DataFrame:
    """One line per model and decoding: the full model's error, and error and distance at equal depths, in percent."""
    lines = []
    for row in rows:
        table = pd.DataFrame(row["table"])
        error = error_of(table)
        line = {
            "training": row["training"],
            "decoding": row["decoding"],
            "CPU s": row["cpu_seconds"],
        }
        line["full"] = 100 * table[error].iloc[0]
        for depth in DEPTHS:
            line[f"error {depth:g}"] = 100 * at_depth(table, error, depth)
        for depth in DEPTHS:
            line[f"distance {depth:g}"] = 100 * at_depth(table, "distance", depth)
        lines.append(line)
    return pd.DataFrame(lines)


def draw(
    axes: plt.Axes,
    rows: dict[tuple[str, str], pd.DataFrame],
    chosen: dict[str, tuple[str, str]],
    column: str,
) -> None:
    """Curves over mean depth; hollow marks are static exits of the same models."""
    for colour, (label, key) in enumerate(chosen.items()):
        if key not in rows:
            continue
        table = rows[key]
        name = error_of(table) if column == "error" else column
        points, fixed = adaptive(table), static(table)
        axes.plot(
            points["layers"],
            100 * points[name],
            "o-",
            color=f"C{colour}",
            label=label,
            markersize=3,
        )
        axes.plot(
            fixed["layers"],
            100 * fixed[name],
            "s",
            color=f"C{colour}",
            markerfacecolor="none",
            markersize=4,
        )
    axes.set_xlabel("mean layers per token")
    axes.grid(alpha=0.3)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    mpl.rcParams["svg.hashsalt"] = "riskcal"  # the same figure is the same file
    results = json.loads(RESULTS.read_text())
    rows = {
        (row["training"], row["decoding"]): pd.DataFrame(row["table"]) for row in results["rows"]
    }
    print(json.dumps({key: value for key, value in results.items() if key != "rows"}))
    print(summary(results["rows"]).to_string(index=False, float_format="{:.1f}".format))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    trained = {
        "plain stage": ("recipe, plain", "softmax"),
        "plain stage, recomputed cache": ("recipe, plain", "softmax, recomputed cache"),
        "400 steps more, plain": ("plain", "softmax"),
        "400 steps more, exit-aware": ("exit-aware", "softmax"),
        "shipped: 6,000 more, exit-aware": ("recipe, shipped", "softmax"),
    }
    for ax, column, title in zip(
        axes,
        ("error", "distance"),
        ("phoneme error, %", "distance to the full model, %"),
        strict=True,
    ):
        draw(ax, rows, trained, column)
        ax.set(title=title, xlim=(1, 5))
    axes[0].set_ylim(0, 45)
    axes[1].set_ylim(0, 25)
    axes[0].legend()
    figure.savefig(IMAGES / "exit-aware.svg", metadata={"Date": None})
    carried = {
        "numbers": {
            "plain stage": ("numbers, plain", "softmax"),
            "exit-aware": ("numbers, exit-aware", "softmax"),
            "plain, as many steps": ("numbers, control", "softmax"),
        },
        "12 layers": {
            "plain": ("12 layers, plain", "softmax"),
            "exit-aware": ("12 layers, exit-aware", "softmax"),
        },
    }
    carried = {
        name: chosen for name, chosen in carried.items() if rows.keys() & set(chosen.values())
    }
    figure, axes = plt.subplots(
        1, len(carried), figsize=(4.5 * len(carried), 3.6), layout="constrained", squeeze=False
    )
    for ax, (name, chosen) in zip(axes[0], carried.items(), strict=True):
        draw(ax, rows, chosen, "distance")
        ax.set(title=f"{name}: distance to the full model, %", xlim=(1, 6), ylim=(0, 30))
        ax.legend()
    figure.savefig(IMAGES / "exit-aware-carried.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
