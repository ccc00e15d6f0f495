"""Charts as SVG inside the page, drawn by matplotlib, which riskcal needs anyway: nothing to load, and no script to see them.

Colours are the page's CSS variables, so that charts are light, dark or printed as the page is; text is text, in its font. A
`Mark` is what the page's slider moves: it says where it stands at each of the slider's steps.
"""

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from riskcal._validate import Floats
from riskcal.report.html import Html, tag, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What matplotlib is told to draw in, and the variable of the page's style that stands there afterwards.
INK, QUIET, GRID, LOSS, COST, BAD, SURE = (f"#0102{i:02x}" for i in range(1, 8))
_VARIABLES = dict(
    zip(
        (INK, QUIET, GRID, LOSS, COST, BAD, SURE),
        ("ink", "quiet", "grid", "loss", "cost", "bad", "sure"),
        strict=True,
    )
)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "the same bytes each time",
    "font.size": 10.8,  # on a phone of 390 pixels these are 11.7, and a legend's 11.3
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.constrained_layout.w_pad": 0.06,  # of less, tall letters of a label leave the picture
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10.4,
}
WIDE, SMALL = (4.6, 2.9), (2.3, 1.9)  # inches of 72 units
#: Letters of a small chart, which the page draws at 160 pixels for its 165.6 units and upwards.
_SMALL_LETTERS = {"font.size": 11.5}


@dataclass(frozen=True)
class Mark:
    """Where a dot, or a level line across the chart, stands at each step of the slider; None where it is not there."""

    colour: str
    at: Sequence[tuple[float, float] | None]
    level: bool = False


def chart(
    draw: Callable[["Axes"], Any],
    label: str,
    *,
    size: tuple[float, float] = WIDE,
    marks: Sequence[Mark] = (),
    step: int = 0,
) -> Html:
    """An image of what ``draw`` draws on axes; ``label`` says in words what is seen, ``step`` where the slider begins."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator

    # other fonts, sizes and grids of a user's own are for figures on paper
    with style.context(["default", _STYLE, _SMALL_LETTERS if size == SMALL else {}]):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        figure.draw_without_rendering()
        for axis in (axes.xaxis, axes.yaxis):
            # the room for labels moves the axes, which would choose other ticks, whose labels have no room
            axis.set_major_locator(FixedLocator(axis.get_majorticklocs().tolist()))
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        height = 72 * size[1]
        moved = [_element(mark, axes, height, step) for mark in marks]
    body = _cleaned(buffer.getvalue(), salt=label)
    opened = f'<svg viewBox="0 0 {72 * size[0]:g} {height:g}" role="img" aria-label="{text(label)}" class="chart">'
    return Html(opened + body + "".join(moved) + "</svg>")


def _element(mark: Mark, axes: "Axes", height: float, step: int) -> Html:
    """A mark as an element that knows all its places."""

    def place(x: float, y: float) -> str:
        right, up = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        return f"{0 if mark.level else right:.1f},{height - up:.1f}"

    places = ["-" if at is None else place(*at) for at in mark.at]
    style = f"--mark: var(--{_VARIABLES[mark.colour]})"
    now = places[step]
    known: dict[str, Any] = {
        "data_at": " ".join(places),
        "style": style + ("; display: none" if now == "-" else ""),
        "transform": None if now == "-" else f"translate({now})",
    }
    if mark.level:
        left, right = axes.transAxes.transform([(0, 0), (1, 0)])[:, 0] * 72 / axes.figure.dpi
        return tag("line", x1=f"{left:.1f}", x2=f"{right:.1f}", y1=0, y2=0, class_="level", **known)
    return tag("circle", r=6, class_="dot", **known)


def _cleaned(svg: str, salt: str) -> str:
    """What stands inside a figure's ``<svg>``: in the page's colours and font, short, with ids of its own."""
    inner = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    inner = re.sub(r"<defs>\s*<style.*?</defs>|<!--.*?-->", "", inner, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", partial(_tag, salt), inner)).replace("> <", "><")


def _tag(salt: str, match: re.Match[str]) -> str:
    """One tag; ids that nothing refers to, which matplotlib gives to every group, are left out."""
    tag_ = re.sub(r' id="(?![mpC][0-9a-f_]{6})[^"]*"', "", match[0])
    tag_ = re.sub(r'(?<= id=")[^"]+|(?<=href="#)[^"]+|(?<=url\(#)[^)]+', partial(_own, salt), tag_)
    for colour, variable in _VARIABLES.items():
        tag_ = tag_.replace(colour, f"var(--{variable})")
    tag_ = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", tag_)
    tag_ = re.sub(r" font-family: [^;\"]+;?", "", tag_)
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag_)


def _own(salt: str, match: re.Match[str]) -> str:
    return f"c{_number(salt + match[0])}"


def _number(name: str) -> int:
    """A number that is the same in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest())


def legend_above(ax: "Axes") -> None:
    """A legend in two columns that covers nothing, whichever way the curves go."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=2,
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.6,
    )


def amounts(ax: "Axes", top: float) -> None:
    """A vertical axis of amounts up to ``top``: 8 M where it would be 8 and a power of ten apart from it."""
    if top >= 1e5 or 0 < top < 1e-3:
        from matplotlib.ticker import EngFormatter

        ax.yaxis.set_major_formatter(EngFormatter(sep=" "))


def bars(ax: "Axes", counts: ArrayLike, *, first: int = 1) -> None:
    """Shares by layer, the layers numbered."""
    heights: Floats = np.asarray(counts, dtype=np.float64)
    layers = np.arange(first, first + len(heights))
    ax.bar(layers, 100 * heights / max(heights.sum(), 1.0), color=LOSS, width=0.8)
    ax.set_ylim(0, 100)
    ax.set_xticks(layers[:: max(1, len(layers) // 8)])
    ax.grid(axis="x", visible=False)
