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

#: Prompts that are shown, tokens of each generation, and of all; a page is for reading.
PROMPTS, TOKENS, ALL_TOKENS = 12, 400, 15_000


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


def section(table: Any, threshold: float | None) -> Section:
    """The first prompts of a table of generations, at every threshold that it has.

    ``threshold`` is the one that is seen, None for one in the midst; where it was not generated, the nearest.
    """
    frame = checked(table)
    prompts = list(dict.fromkeys(frame["prompt"]))
    frame, most = _seen(frame)
    deepest = max((max(cell, default=1) for cell in frame["exit_layers"]), default=1)
    grid = np.unique(frame["threshold"].to_numpy())
    finite = grid[np.isfinite(grid)]
    here = math.inf
    if finite.size and threshold != math.inf:
        aim = float(np.median(finite)) if threshold is None else threshold
        here = float(finite[np.abs(finite - aim).argmin()])
    blocks = [_prompt(rows, deepest, here, most) for _, rows in frame.groupby("prompt", sort=False)]
    note = (
        "Each token stands on the colour of the layer that it left at, with the layer's number above it: the darker, the "
        f"earlier, of {deepest}. What is not as the full model has it is underlined, three dots stand where it has more, "
        "and ∎ is an end token. "
    )
    if len(blocks) < len(prompts):
        note += f"Prompts: the first {len(blocks)} of {len(prompts)}."
    legend = tag(
        "p",
        "Layer: ",
        *[tag("span", i, class_="token", style=_colours(i, deepest)) for i in _some(deepest)],
        class_="legend",
    )
    return Section(
        "generations", "Generations, token by token", joined([tag("p", note), legend, *blocks])
    )


def _seen(frame: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows of the first prompts that fit on a page, and how many tokens of each are shown."""
    lengths = frame["tokens"].map(len).clip(upper=TOKENS)
    by_prompt = lengths.groupby(frame["prompt"], sort=False).sum().head(PROMPTS)
    fits = by_prompt.cumsum() <= ALL_TOKENS
    kept = by_prompt.index[fits] if fits.any() else by_prompt.index[:1]
    rows = frame[frame["prompt"].isin(kept)]
    most = TOKENS if fits.any() else max(1, ALL_TOKENS // len(rows))
    return rows, most


def _some(deepest: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(1, deepest, min(deepest, 12))})


def _prompt(rows: pd.DataFrame, deepest: int, here: float, most: int) -> Html:
    first = rows.iloc[0]
    name = first["text"] if "text" in rows and isinstance(first["text"], str) else first["prompt"]
    whole = rows["tokens"][np.isinf(rows["threshold"])]
    full = None if whole.empty else list(whole.iloc[0])
    reference = tag("p", "not recorded")
    if full is not None:
        pieces = [tag("span", _visible(piece)) for piece in full[:most]]
        reference = tag("p", *pieces, _rest(full, most), class_="tokens plain")
    early = [
        tag(
            "div",
            tag("h4", f"Threshold {shown(at)}", tag("small", _depth(layers))),
            tag("p", *_tokens(tokens, layers, full, deepest, most), class_="tokens"),
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
    sides = [tag("div", *early, none), tag("div", tag("h4", "Full model"), reference)]
    return tag("article", tag("h3", name), tag("div", *sides, class_="pair"), class_="generation")


def _depth(layers: Sequence[int]) -> str:
    return f" mean layer {np.mean(layers):.2f}" if len(layers) else ""


def _tokens(
    pieces: Sequence[str], layers: Sequence[int], full: list[str] | None, deepest: int, most: int
) -> list[Html | None]:
    """Early exit's tokens: those that the full model has not are marked, and where it has others, a gap."""
    pieces = list(pieces)
    reference = pieces if full is None else full
    matcher = difflib.SequenceMatcher(None, reference[:most], pieces[:most], autojunk=False)
    found: list[Html | None] = []
    for kind, first, last, start, end in matcher.get_opcodes():
        if kind == "delete":
            gap = f"{last - first} tokens of the full model are not here"
            found.append(tag("span", "…", class_="gap", title=gap))
        for piece, layer in zip(pieces[start:end], layers[start:end], strict=True):
            token = tag("span", _visible(piece), class_="token", style=_colours(layer, deepest))
            mark = None if kind == "equal" else "other"
            found.append(tag("ruby", token, tag("rt", int(layer)), class_=mark))
    return [*found, _rest(pieces, most)]


def _rest(pieces: Sequence[str], most: int) -> Html | None:
    return tag("small", f" and {len(pieces) - most} more") if len(pieces) > most else None


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
