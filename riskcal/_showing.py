"""Tables as terminals and notebooks show them: no column that says the same in every row, the chosen row marked."""

import html as _html
import numbers
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from riskcal import _validate

#: Costs whose names alone would not say what they are per.
PER = {
    "layers": "layers/token",
    "tokens": "tokens/prompt",
    "seconds": "seconds/prompt",
    "flops": "FLOPs/prompt",
}
#: Rows shown of a long table: so many from each end.
_ENDS = 30
#: What a lone row is about.
_WHICH = ("threshold", "thresholds")
_CHOSEN = "font-weight: bold; background: rgba(0, 158, 115, .18)"


def text(table: pd.DataFrame, *, settings: Collection[str] = (), chosen: Any = None) -> str:
    """A table for a terminal, and below it what all of its rows have in common.

    Parameters
    ----------
    table : DataFrame
    settings : names
        Columns that are not shown where they are the same in all rows.
    chosen : label, optional
        Of the index: the row to mark, in the column ``certified``.
    """
    shown, common = _brief(table, settings, chosen)
    return shown.to_string(index=False, justify="right") + ("\n" + common if common else "")


def html(table: pd.DataFrame, *, settings: Collection[str] = (), chosen: Any = None) -> str:
    """As `text`, for a notebook: the chosen row is bold."""
    shown, common = _brief(table, settings, chosen)
    head = "".join(f"<th>{_html.escape(str(name))}</th>" for name in shown.columns)
    body = []
    for label, row in zip(shown.index, shown.to_numpy(), strict=True):
        style = ' style="text-align: right"'
        if chosen is not None and label == chosen:
            style = f' style="text-align: right; {_CHOSEN}"'
        cells = "".join(f"<td>{_html.escape(str(cell))}</td>" for cell in row)
        body.append(f"<tr{style}>{cells}</tr>")
    below = f"<p><small>{_html.escape(common)}</small></p>" if common else ""
    return (
        f'<table border="1" class="dataframe"><thead><tr style="text-align: right">{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>{below}"
    )


def paragraph(sentence: str) -> str:
    """A sentence for a notebook."""
    return f"<p>{_html.escape(sentence)}</p>"


def _brief(table: pd.DataFrame, settings: Collection[str], chosen: Any) -> tuple[pd.DataFrame, str]:
    """The table as texts, without what all rows have in common, and a sentence that tells that."""
    # a prompt that is one decision, of a classifier or a cascade, has no tokens to count, and a depth of its own
    alone = "tokens" in table and len(table) > 0 and bool((table["tokens"] == 1).all())
    hidden = [
        name
        for name in table.columns
        if (name in settings or (alone and name == "tokens"))
        and table[name].nunique(dropna=False) == 1
        and (len(table) > 1 or name not in _WHICH)
    ]
    common = ", ".join(_setting(name, table[name].iloc[0]) for name in hidden)
    shown = table.drop(columns=hidden)
    said = f"In {'every' if len(table) > 1 else 'this'} row: {common}." if common else ""
    if len(shown) > 2 * _ENDS:
        kept = np.r_[np.arange(_ENDS), np.arange(len(shown) - _ENDS, len(shown))]
        if chosen is not None:
            kept = np.union1d(kept, np.flatnonzero(shown.index == chosen))
        said = f"{len(shown) - len(kept)} of {len(shown)} rows are not shown. {said}".rstrip()
        shown = shown.take(kept)
    texts = pd.DataFrame({name: shown[name].map(_cell) for name in shown.columns}, dtype=object)
    if "certified" in texts and chosen is not None and chosen in texts.index:
        texts.loc[chosen, "certified"] = "chosen"
    return texts.rename(columns=PER | ({"layers": "layers/prompt"} if alone else {})), said


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return "-" if value != value else f"{float(value):.4g}"
    return str(value)


def _setting(name: str, value: Any) -> str:
    """A name and its value; an object in JSON as its own names and values, digests by their beginning."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            held = _validate.from_json(value)
        except ValueError:
            held = None
        if isinstance(held, dict):
            return ", ".join(_setting(key, inner) for key, inner in held.items())
    if isinstance(value, dict):
        return f"{name} of {len(value)} settings"
    written = _cell(value)
    return f"{name} {written[:8]}..." if len(written) == 32 else f"{name} {written}"
