"""How pictures look: one set of colours and sizes, which users change for a while with `style`."""

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from riskcal._validate import RiskcalError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Style:
    """Colours and sizes of all pictures.

    The colours are told apart by readers with any of the common colour blindnesses (Okabe and Ito 2008), and no meaning
    rests on a colour alone: lines differ in dashes, candidates in fill. Fonts, sizes of figures and all else are matplotlib's.

    Attributes
    ----------
    loss, delta, certified, cost, full : str
        Of the mean loss and its bound, the tolerance, the certified thresholds, what it costs, and the full model.
    several : tuple of str
        Of curves beside one another: heads, or values of a second coordinate.
    marker : float
        Size of a candidate's marker, in points; the chosen one's is twice that.
    line : float
        Width of lines, in points.

    Examples
    --------
    >>> style = riskcal.plots.Style(loss="black", line=2)
    >>> style.loss, style.marker
    ('black', 4.0)
    """

    loss: str = "#0072B2"
    delta: str = "#D55E00"
    certified: str = "#009E73"
    cost: str = "#7A5195"
    full: str = "#000000"
    several: tuple[str, ...] = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
    marker: float = 4.0
    line: float = 1.2


_CURRENT: ContextVar[Style] = ContextVar("riskcal_style")


def current() -> Style:
    """The style in force here."""
    return _CURRENT.get(Style())


@contextmanager
def style(**changes: Any) -> Iterator[Style]:
    """Draw in other colours and sizes: ``with riskcal.plots.style(loss="black", marker=3): ...``.

    Parameters
    ----------
    **changes
        Fields of `Style`. Within another ``with``, what is not named is that one's.

    Raises
    ------
    RiskcalError
        For a name that is no field of `Style`.

    Examples
    --------
    >>> import riskcal
    >>> with riskcal.plots.style(delta="black", marker=3) as style:
    ...     style.delta
    'black'
    """
    names = [field.name for field in fields(Style)]
    for name in changes:
        if name not in names:
            raise RiskcalError(f"{name}: is nothing of a style; there is {', '.join(names)}.")
    token = _CURRENT.set(replace(current(), **changes))
    try:
        yield current()
    finally:
        _CURRENT.reset(token)


def new_axes(ax: "Axes | None") -> "Axes":
    """The axes given, else those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4), layout="constrained")[1]


def legend_above(ax: "Axes") -> None:
    """A legend that covers nothing, in axes of any width."""
    from matplotlib.font_manager import FontProperties

    handles, labels = ax.get_legend_handles_labels()
    inches = width(ax)
    columns = 2 if inches > 4 else 1
    per_inch = 100 / FontProperties(size="small").get_size_in_points()
    room = inches / columns * per_inch - 6  # what stands before a label is six letters wide
    characters = 200 if math.isinf(room) else max(12, int(room))
    ax.legend(
        handles,
        ["\n".join(textwrap.wrap(label, characters)) for label in labels],
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize="small",
        borderaxespad=0.2,
    )


def in_lines(label: str, longest: int = 24) -> str:
    """A vertical axis's label in as few lines as do for a small figure, and those about equally long."""
    lines = max(1, len(textwrap.wrap(label, longest)))  # none of blanks alone
    widths = range(math.ceil(len(label) / lines), longest)
    even = next((w for w in widths if len(textwrap.wrap(label, w)) == lines), longest)
    return "\n".join(textwrap.wrap(label, even))


def width(ax: "Axes") -> float:
    """Of axes, in inches."""
    figure = ax.get_figure(root=True)
    return math.inf if figure is None else float(ax.get_window_extent().width / figure.dpi)
