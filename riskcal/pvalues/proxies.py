"""Betting helped by a proxy: a number known of every request, also of those whose loss nobody measured."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.pvalues.bettor import prior_variance
from riskcal.pvalues.losses import TINY, matrix_and_sums

#: One in so many unlabelled rows fixes the range that proxies are clipped to, and is no labelled row's partner.
_ASIDE = 10


class Paired(NamedTuple):
    """Proxies of labelled rows, each beside the mean proxy of unlabelled rows that are its own; all in [0, 1]."""

    proxies: Floats  # (n, k)
    partners: Floats  # (n, k)

    @property
    def gaps(self) -> Floats:
        """By how much a row's proxy exceeds its partners' mean (n, k): zero on average, whatever the proxy is."""
        return np.ascontiguousarray(self.proxies - self.partners)

    def sliced(self, rows: Any = slice(None), columns: Any = slice(None)) -> Self:
        """The same of some rows and candidates."""
        return type(self)(*(values[rows][:, columns] for values in self))


def paired(proxy: Floats, unlabelled: Floats) -> Paired:
    """Give each row of ``proxy`` (n, k) equally many of the rows of ``unlabelled`` (m, k), in the order in which they stand."""
    n, m = len(proxy), len(unlabelled)
    each = (m - math.ceil(m / _ASIDE)) // n
    if each == 0:
        raise RiskcalError(
            f"unlabelled: {m} rows for {n} labelled ones; each needs one of its own or more, and a tenth are set aside: give at "
            f"least {math.ceil(n * _ASIDE / (_ASIDE - 1))}."
        )
    aside = 0.5 * unlabelled[each * n :]  # halves: the difference of two floats may overflow
    low, high = aside.min(0), aside.max(0)
    reach = np.where(high > low, high - low, 1.0)

    def scaled(values: Floats) -> Floats:
        result: Floats = (np.clip(0.5 * values, low, high) - low) / reach
        return result

    return Paired(scaled(proxy), scaled(unlabelled[: each * n]).reshape(n, each, -1).mean(1))


def betting_with_proxy(
    losses: ArrayLike,
    proxy: ArrayLike,
    unlabelled: ArrayLike,
    delta: float,
    *,
    level: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> float | Floats:
    """`betting` on losses less what a proxy foretells of them: prediction-powered, and valid in finite samples for any proxy.

    Parameters
    ----------
    losses : (n,) or (n, k)
        As in `betting`, in an order that does not depend on their content.
    proxy : (n,) or (n, k)
        A number known of each of these rows; any scale. It must have been fixed before these losses were seen.
    unlabelled : (m,) or (m, k)
        The same number of other rows from the same population, whose losses are not known, in an order that does not depend
        on it either; 10 n / 9 of them or more, the more the better (ten times as many are nearly all that helps).
    delta, level, lower, upper
        As in `betting`.

    Returns
    -------
    float or (k,)
        Valid for i.i.d. rows, whether the proxy foretells the loss, has nothing to do with it, or its opposite.

    Notes
    -----
    Each labelled row i has r unlabelled rows of its own, and f being the proxy, ``gap_i = f_i - mean of their f``. The two
    terms have one mean, so that ``x_i = loss_i - c gap_i`` has that of the loss, given the earlier rows, for any c that these
    fix. Hence ``prod (1 + bet (delta - x_i))`` is a nonnegative supermartingale under H, and one over its maximum a p-value
    (Ville 1939). No part of the level is spent on the proxy's mean.

    A tenth of the unlabelled rows is set aside; all proxies are clipped to the range seen there, which is mapped to [0, 1].
    That is a proxy too, and ``|gap| <= 1`` bounds the stake: ``bet <= 0.99 / (upper - delta + |c|)``. The c is the coefficient
    of the regression of earlier losses on gaps, times ``1 - 4 / z^2`` with z the correlation in standard errors, or 0 where z
    is below 2: an idle proxy leaves the bets of `betting` as they are. The stake is that of `betting` for the share of the
    variance that c leaves. Where the bound forbids it, the stake is the one without a proxy, and c as large as that leaves
    room for: so the wider range costs no power. With large n and m the variance is that of prediction-powered inference
    (Angelopoulos, Bates, Fannjiang, Jordan and Zrnic 2023), ``var(loss - c f) / n + c^2 var(f) / (n r)``.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> wrong = rng.random(4400) < 0.08
    >>> judge = 0.8 * wrong + 0.2 * rng.random(4400)  # scores every answer; 400 were checked by hand
    >>> p = riskcal.pvalues.betting_with_proxy(wrong[:400], judge[:400], judge[400:], delta=0.1, level=0.05)
    >>> p <= 0.05, riskcal.pvalues.betting(wrong[:400], delta=0.1, level=0.05) <= 0.05
    (True, False)
    """
    level = _validate.level(level, "level")
    low, high = _validate.bounds(lower, upper)
    matrix, _ = matrix_and_sums(losses, low, high)
    tolerated = _validate.tolerance(delta, low, high)
    known = broadcast(proxy, "proxy", matrix.shape[1])
    if len(known) != len(matrix):
        raise RiskcalError(
            f"proxy: {len(known)} rows for {len(matrix)} of losses; give one for each."
        )
    pairs = paired(known, broadcast(unlabelled, "unlabelled", matrix.shape[1]))
    p = of_pairs(matrix, pairs, tolerated, level=level, lower=low, upper=high)
    return float(p[0]) if np.ndim(losses) == 1 else p


def of_pairs(
    losses: Floats, pairs: Paired, delta: float, *, level: float, lower: float, upper: float
) -> Floats:
    """`betting_with_proxy` (k,) where the unlabelled rows have been dealt out."""
    from riskcal.pvalues import bettor_kernels

    opening, prior = math.log(level / bettor_kernels.MARGIN), prior_variance(delta, lower, upper)
    bounds = (delta, lower, upper)
    log_capital, mean = bettor_kernels.helped_log_capital(
        losses, pairs.gaps, *bounds, opening, prior, bettor_kernels.HEDGE
    )
    return np.where(mean >= delta, 1.0, np.maximum(np.exp(-log_capital), TINY))


def variance_left(losses: Floats, pairs: Paired) -> Floats:
    """The share (k,) of the losses' variance that remains when the proxy is taken into account."""
    gaps, centred = pairs.gaps, losses - losses.mean(0)
    scale = (centred**2).sum(0) * (gaps**2).sum(0)
    shared = (centred * gaps).sum(0)
    share: Floats = 1.0 - np.divide(shared**2, scale, out=np.zeros_like(scale), where=scale > 0.0)
    return np.maximum(share, 0.0)


def broadcast(values: ArrayLike, name: str, k: int) -> Floats:
    """A proxy (rows, k), or one (rows,) that is the same for all candidates, as (rows, k)."""
    given = _validate.array(values, name, ndim=(1, 2))
    if given.ndim == 1:
        return np.repeat(given[:, None], k, axis=1)
    if given.shape[1] != k:
        raise RiskcalError(
            f"{name}: {given.shape[1]} columns for {k} candidates; give one for each, or one number a row for all of them."
        )
    return given
