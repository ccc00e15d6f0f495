"""Tags of HTML. Whatever is not `Html` already is text, and is escaped where the tag is made: none can be forgotten."""

import html
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd


class Html(str):
    """Markup, put on the page as it is."""

    __slots__ = ()


def text(value: Any) -> Html:
    """A value as text of a page; bytes that no page can hold (NUL, lone surrogates) become a replacement character."""
    if isinstance(value, Html):
        return value
    whole = str(value).replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(whole))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element. Attributes are written ``class_`` and ``data_at``; True stands alone, None and False are left out."""
    opened = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{opened}>{joined(children)}</{name}>")


def joined(children: Iterable[Any]) -> Html:
    """Children one after the other; None is nothing."""
    return Html("".join(text(child) for child in children if child is not None))


def shown(value: Any) -> str:
    """A number as tables have it: four digits, ``full`` for an infinite threshold, a dash for what is not there."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "-"
    if isinstance(value, float | np.floating):
        return "full" if value == math.inf else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)


def table(
    frame: pd.DataFrame,
    caption: str,
    *,
    row: Callable[[int], dict[str, Any]] = lambda index: {},
    **attributes: Any,
) -> Html:
    """A table with a caption, the first column as heads of the rows; ``row`` gives each row's attributes.

    It stands in a region of its own that scrolls, by keys too, where the page is narrow.
    """
    heads = [tag("th", name, scope="col") for name in frame.columns]
    rows = []
    for index, (first, *rest) in enumerate(frame.itertuples(index=False, name=None)):
        cells = [tag("td", shown(value)) for value in rest]
        rows.append(tag("tr", tag("th", shown(first), scope="row"), *cells, **row(index)))
    inner = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *rows),
        **attributes,
    )
    return tag("div", inner, class_="scrolls", tabindex="0", role="region", aria_label=caption)


def details(summary: str, *children: Any) -> Html:
    """What is there for who asks for it; printed open."""
    return tag("details", tag("summary", summary), *children)
