"""Recorded exit layers, what is counted from them alone: the mean layer and the shares of the layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError

Integers = NDArray[np.int64]


def layers_per_token(exit_layers: ArrayLike, *, average: str = "token") -> float:
    """Mean exit layer.

    Parameters
    ----------
    exit_layers : (B, T) int
        1..L, 0 after the last token of a prompt.
    average : {"token", "sequence"}
        ``"token"``: over all tokens, so that long outputs count for more. ``"sequence"``: over the prompts' own means.

    Returns
    -------
    float

    Raises
    ------
    RiskcalError
        For exit layers of another form, and a prompt without tokens.

    Examples
    --------
    >>> exits = [[2, 1, 8, 0], [1, 1, 1, 1]]  # two outputs of 3 and 4 tokens
    >>> round(riskcal.efficiency.layers_per_token(exits), 3)
    2.143
    >>> round(riskcal.efficiency.layers_per_token(exits, average="sequence"), 3)
    2.333
    """
    exits = exit_array(exit_layers)
    _validate.choice(average, "average", ("token", "sequence"))
    if average == "token":
        return float(exits.sum() / np.count_nonzero(exits))
    return float((exits.sum(1) / np.count_nonzero(exits, axis=1)).mean())


def exit_shares(exit_layers: ArrayLike, n_layers: int) -> Floats:
    """The exit distribution: which share of the tokens left at each layer.

    Parameters
    ----------
    exit_layers : (B, T) int
    n_layers : int
        L.

    Returns
    -------
    (L,)
        Shares of layers 1..L, one in total.

    Examples
    --------
    >>> riskcal.efficiency.exit_shares([[2, 1, 4, 0], [1, 2, 1, 1]], n_layers=4).round(2).tolist()
    [0.57, 0.29, 0.0, 0.14]
    """
    n_layers = _validate.count(n_layers, "n_layers", least=1)
    exits = exit_array(exit_layers, n_layers)
    counts = np.bincount(exits[exits > 0], minlength=n_layers + 1)[1:]
    shares: Floats = counts / counts.sum()
    return shares


def exit_array(exit_layers: ArrayLike, n_layers: int | None = None) -> Integers:
    """Exit layers (B, T) as integers, checked: 1..L, then zeros."""
    values = _validate.array(exit_layers, "exit_layers", ndim=(2,))
    exits = values.astype(np.int64)
    top = np.inf if n_layers is None else _validate.count(n_layers, "n_layers", least=1)
    bad = (exits != values) | (exits < 0) | (exits > top)
    if bad.any():
        remedy = (
            "give whole numbers from 1"
            + ("" if n_layers is None else f" to {n_layers}")
            + ", 0 after the last token"
        )
        raise RiskcalError(
            f"exit_layers: {values[bad][0]:g} at index {_validate.first(bad)}; {remedy}."
        )
    if (empty := exits[:, 0] == 0).any():
        raise RiskcalError(
            f"exit_layers: row {_validate.first(empty)} has no token; an output that failed counts as one "
            "token of the last layer, since leaving it out would make the rest look cheaper."
        )
    if (holes := (exits[:, 1:] > 0) & (exits[:, :-1] == 0)).any():
        row, before = np.argwhere(holes)[0]
        raise RiskcalError(
            f"exit_layers: a token follows a 0 at index [{row}, {before}]; 0 is for what follows the last."
        )
    return exits
