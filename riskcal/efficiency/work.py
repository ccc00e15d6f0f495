"""Work to plan for: of a token under an exit distribution, and of a batch whose rows exit at different depths."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.efficiency.layers import exit_array

BATCH_MODES = ("diverge", "regroup", "deepest")


@dataclass(frozen=True)
class Work:
    """What to expect, and what to plan for.

    Attributes
    ----------
    expected : float
        Mean cost of a token.
    quantile : float
        The least cost that covers the wanted share of tokens.
    deepest : float
        Cost at the deepest layer that has any share: memory must suffice for it, however rare.

    Examples
    --------
    >>> work = riskcal.efficiency.expected_work([0.9, 0.06, 0.04])
    >>> round(work.expected, 2), work.quantile, work.deepest
    (1.14, 3.0, 3.0)
    """

    expected: float
    quantile: float
    deepest: float


def expected_work(
    shares: ArrayLike, cost: ArrayLike | None = None, *, rows: int = 1, quantile: float = 0.99
) -> Work:
    """Work under an exit distribution.

    Parameters
    ----------
    shares : (L,)
        Share of tokens that exit at each layer, one in total; `exit_shares` counts them.
    cost : (L,), optional
        Cost of a token that exits there, not falling with the layer: FLOPs (`token_flops`), seconds, bytes. Default: the
        layers, 1 to L.
    rows : int
        Rows that a step computes together and to its deepest one, drawn independently: the more, the deeper the step.
    quantile : float
        Share of steps that ``Work.quantile`` covers.

    Returns
    -------
    Work
        In units of ``cost``.

    Raises
    ------
    RiskcalError
        For shares that are negative or do not sum to one, and costs that fall or do not fit.

    Examples
    --------
    >>> shares = np.zeros(32)
    >>> shares[[15, 31]] = 0.5
    >>> riskcal.efficiency.expected_work(shares).expected
    24.0
    """
    deepest = deepest_row(shares, rows)
    share, reached = _validate.shares(shares, "shares"), np.cumsum(deepest)
    price = (
        np.arange(1.0, share.size + 1) if cost is None else _validate.array(cost, "cost", ndim=(1,))
    )
    if price.size != share.size:
        raise RiskcalError(f"cost: {price.size} given for {share.size} layers; give one per layer.")
    if (falls := np.diff(price) < 0).any():
        raise RiskcalError(
            f"cost: falls after index {_validate.first(falls)}; a deeper exit cannot cost less."
        )
    wanted = _validate.level(quantile, "quantile")
    used = np.flatnonzero(share > 0)
    return Work(
        expected=float(deepest @ price),
        quantile=float(price[np.argmax(reached >= wanted - _validate.TOLERANCE)]),
        deepest=float(price[used[-1]]),
    )


def deepest_row(shares: ArrayLike, rows: int) -> Floats:
    """How deep the deepest of several rows goes, where each leaves at its own layer: the depth of a synchronous batch's step.

    Parameters
    ----------
    shares : (L,)
        Share of tokens that exit at each layer, one in total.
    rows : int
        B, drawn independently. Rows that hard prompts have in common go deeper together, and so less often.

    Returns
    -------
    (L,)
        The probability that the deepest row leaves at each layer: with F the running sum of shares, the steps of ``F ** B``.

    Examples
    --------
    >>> riskcal.efficiency.deepest_row([0.9, 0.0, 0.1], rows=10).round(2).tolist()
    [0.35, 0.0, 0.65]
    """
    share = _validate.shares(shares, "shares")
    reached = np.minimum(np.cumsum(share), 1.0) ** _validate.count(rows, "rows", least=1)
    reached[np.flatnonzero(share > 0)[-1] :] = 1.0
    depths: Floats = np.diff(reached, prepend=0.0)
    return depths


@dataclass(frozen=True)
class BatchWork:
    """What a batch made the decoder do.

    Attributes
    ----------
    steps : int
        Positions generated, until the last row ended.
    rows : tuple of int
        Rows computed in each call of a layer, in the order of the calls: each step goes to its deepest row's exit.

    Examples
    --------
    >>> work = riskcal.efficiency.batch_work([[1, 1], [1, 3]], "regroup")
    >>> work.steps, work.rows
    (2, (2, 2, 1, 1))
    """

    steps: int
    rows: tuple[int, ...]

    @property
    def calls(self) -> int:
        """Layers called."""
        return len(self.rows)


def batch_work(exit_layers: ArrayLike, mode: str) -> BatchWork:
    """The work of one batch, from its rows' exits.

    Parameters
    ----------
    exit_layers : (B, T) int
        Of the rows that were, or would be, decoded together.
    mode : {"diverge", "regroup", "deepest"}
        ``"diverge"``: a call computes all rows, those that exited ride along; those that ended do until half of the rows
        have, and the others go on alone. ``"regroup"``: a call computes the rows that have not exited. ``"deepest"``: the
        work of ``"diverge"``, but all rows emit at the deepest exit: the tokens differ, and with them later exits, so that
        from other modes' exits this is an estimate.

    Returns
    -------
    BatchWork

    Examples
    --------
    >>> exits = [[1, 1, 1], [1, 4, 0]]  # one row leaves early, the other does not
    >>> for mode in ("diverge", "regroup"):
    ...     print(mode, sum(riskcal.efficiency.batch_work(exits, mode).rows))
    diverge 11
    regroup 8
    """
    exits = exit_array(exit_layers)
    _validate.choice(mode, "mode", BATCH_MODES)
    layers = np.arange(1, exits.max(initial=0) + 1)[:, None]
    # (T, layers): rows that go so deep
    waiting = np.array([(step >= layers).sum(1) for step in exits.T])
    rows = waiting
    if mode != "regroup":
        size, sizes = len(exits), []
        for going in waiting[:, 0].tolist():
            size = going if 2 * going <= size else size
            sizes.append(size)
        rows = np.broadcast_to(np.array(sizes)[:, None], waiting.shape)
    return BatchWork(steps=exits.shape[1], rows=tuple(rows[waiting > 0].tolist()))
