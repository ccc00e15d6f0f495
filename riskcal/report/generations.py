"""Generations, each token coloured by the layer that it left at, beside the full model's."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import candidates, columns
from riskcal.report.html import Html, joined, shown, tag
from riskcal.report.sections import Section

#: Prompts that are shown, and tokens of each; a page is for reading.
PROMPTS, TOKENS = 12, 400


def checked(table: Any) -> pd.DataFrame:
    """A table of generations, checked: one row per prompt and threshold, the full model's (``inf``) among them.

    Parameters
    ----------
    table : DataFrame or any object with the Arrow PyCapsule interface
        Columns ``prompt``, ``threshold``, ``tokens`` (a list of pieces of text, with their spaces) and ``exit_layers`` (a list
        of as many layers, from 1); optionally ``text``, the prompt as it was given.

    Raises
    ------
    RiskcalError
        Naming the column, the first offending row, how many there are and what to do.
    """
    frame = columns.from_object(table).reset_index(drop=True)
    columns.require(frame, ["prompt", "threshold", "tokens", "exit_layers"])
    frame = frame.assign(threshold=candidates.thresholds(frame["threshold"]))
    frame["prompt"] = columns.identifiers(frame["prompt"], "prompt").to_numpy()
    for name, fits, what in (
        ("tokens", lambda one: isinstance(one, str), "of pieces of text"),
        ("exit_layers", lambda one: _validate.is_whole(one) and one >= 1, "of layers, from 1"),
    ):
        bad = np.array(
            [not (_is_list(cell) and all(map(fits, cell))) for cell in frame[name]], dtype=bool
        )
        if bad.any():
            raise RiskcalError(
                f"{name}: row {int(bad.argmax())} holds no list {what} ({int(bad.sum())} such rows); give one entry per token."
            )
    uneven = frame["tokens"].map(len) != frame["exit_layers"].map(len)
    if uneven.any():
        row = int(uneven.to_numpy().argmax())
        raise RiskcalError(
            f"exit_layers: row {row} holds {len(frame['exit_layers'][row])} for {len(frame['tokens'][row])} tokens "
            f"({int(uneven.sum())} such rows); give one layer per token."
        )
    again = frame.duplicated(["prompt", "threshold"]).to_numpy()
    if again.any():
        row = int(again.argmax())
        raise RiskcalError(
            f"threshold: {shown(float(frame['threshold'][row]))} of prompt {frame['prompt'][row]!r} stands twice, again at row "
            f"{row} ({int(again.sum())} such rows); keep one row per prompt and threshold."
        )
    return frame


def _is_list(cell: Any) -> bool:
    return isinstance(cell, list | tuple) or (isinstance(cell, np.ndarray) and cell.ndim == 1)


def section(table: Any, threshold: float) -> Section:
    """The first prompts of a table of generations, at every threshold that it has; ``threshold`` is the one that is seen."""
    frame = checked(table)
    full = frame[np.isinf(frame["threshold"])].set_index("prompt")["tokens"]
    deepest = max((max(cell, default=1) for cell in frame["exit_layers"]), default=1)
    prompts = list(dict.fromkeys(frame["prompt"]))
    grid = np.unique(frame["threshold"].to_numpy())
    finite = grid[np.isfinite(grid)]
    here = threshold
    if math.isfinite(threshold) and finite.size:  # the nearest that was generated
        here = float(finite[np.abs(finite - threshold).argmin()])
    blocks = [
        _prompt(rows, full.get(prompt), deepest, here)
        for prompt, rows in frame[frame["prompt"].isin(prompts[:PROMPTS])].groupby(
            "prompt", sort=False
        )
    ]
    note = (
        "Each token stands on the colour of the layer that it left at, with the layer's number above it: the darker, the "
        f"earlier, of {deepest}. What is not as the full model has it is underlined, three dots stand where it has more, "
        "and ∎ is an end token. "
    )
    if len(prompts) > PROMPTS:
        note += f"The first {PROMPTS} of {len(prompts)} prompts."
    legend = tag(
        "p",
        "Layer: ",
        *[tag("span", i, class_="token", style=_colours(i, deepest)) for i in _some(deepest)],
        class_="legend",
    )
    return Section(
        "generations", "Generations, token by token", joined([tag("p", note), legend, *blocks])
    )


def _some(deepest: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(1, deepest, min(deepest, 12))})


def _prompt(rows: pd.DataFrame, full: Any, deepest: int, here: float) -> Html:
    first = rows.iloc[0]
    name = first["text"] if "text" in rows and isinstance(first["text"], str) else first["prompt"]
    shown_full = (
        tag("p", *map(_piece, full[:TOKENS]), class_="tokens plain")
        if full is not None
        else tag("p", "not recorded")
    )
    early = [
        tag(
            "div",
            tag("h4", f"Threshold {shown(at)}", tag("small", _depth(layers))),
            tag("p", *_tokens(tokens, layers, full, deepest), class_="tokens"),
            data_key=shown(at),
            hidden=at != here,
        )
        for at, tokens, layers in zip(
            rows["threshold"].tolist(), rows["tokens"], rows["exit_layers"], strict=True
        )
    ]
    none = tag(
        "p",
        "No generation was recorded at this threshold.",
        class_="absent",
        hidden=here in rows["threshold"].to_numpy(),
    )
    return tag(
        "article",
        tag("h3", name),
        tag(
            "div",
            tag("div", *early, none),
            tag("div", tag("h4", "Full model"), shown_full),
            class_="pair",
        ),
        class_="generation",
    )


def _depth(layers: Sequence[int]) -> str:
    return f" mean layer {np.mean(layers):.2f}" if len(layers) else ""


def _tokens(pieces: Sequence[str], layers: Sequence[int], full: Any, deepest: int) -> list[Html]:
    """Early exit's tokens: those that the full model has not are marked, and where it has others, a gap."""
    pieces, layers = list(pieces)[:TOKENS], list(layers)[:TOKENS]
    reference = pieces if full is None else list(full)[:TOKENS]
    matcher = difflib.SequenceMatcher(None, reference, pieces, autojunk=False)
    found = []
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind == "delete":
            gap = f"{last - first} tokens of the full model are not here"
            found.append(tag("span", "…", class_="gap", title=gap))
        for piece, layer in zip(pieces[start:end], layers[start:end], strict=True):
            token = tag("span", _visible(piece), class_="token", style=_colours(layer, deepest))
            mark = None if kind == "equal" else "other"
            found.append(tag("ruby", token, tag("rt", int(layer)), class_=mark))
    return found


def _piece(piece: str) -> Html:
    return tag("span", _visible(piece))


def _visible(piece: str) -> str:
    """A piece of which nothing could be seen gets a sign: the end token, a line break."""
    return piece.replace("\n", "⏎") if piece.strip() else {"": "∎"}.get(piece, "␣" * len(piece))


def _colours(layer: int, deepest: int) -> str:
    """Background and text: cividis, which all kinds of colour vision order alike, with black or white, whichever reads better."""
    from matplotlib import colormaps, colors

    share = (layer - 1) / max(deepest - 1, 1)
    rgb = np.array(colormaps["cividis"](0.08 + 0.92 * min(max(share, 0.0), 1.0))[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    light = float(linear @ (0.2126, 0.7152, 0.0722))
    ink = "#000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#fff"
    return f"background:{colors.to_hex(rgb.tolist())};color:{ink}"
