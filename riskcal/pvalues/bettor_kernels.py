"""The bettor of `riskcal.pvalues.betting`, compiled: his constants, his hedge, and his walks along rows. Imported in functions.

All that calls `stake` stands here: numba keeps compiled code by file, and would not see it change in another one.
"""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import special

FloatArray = NDArray[np.float64]


#: The bettor of `riskcal.pvalues.betting`, and of all that bet as it does. Any values are valid, as the bets look at earlier
#: rows alone; these were found on the grid of ``benchmarks/power.py``.
MARGIN = 1.15  # what the option pays, over 1 / level: a hedge that is renewed now and then falls a little short of it
CAP = 0.99  # the largest stake, over the one that a loss at the upper bound would turn into ruin
PSEUDO_ROWS = 8.0  # rows at the prior variance that the variance starts from
PSEUDO_EVENTS = 0.1  # losses at the upper bound that the size of a loss starts from
OBSERVED = 0.2  # share of the observed variance, where losses of that size would have a larger one at delta
DOUBT = 4.0  # squared standard errors by which a proxy's correlation with the losses is discounted
# Expected losses left: up to few they are counted, as a Poisson number; many count as normal.
FEW, MANY = 5.0, 20.0
_STEPS, _ROWS = 8, 37  # the table's expected numbers: their roots from 0 to 4.5, in eighths
_PLACES, _COLUMNS = 16, 193  # and its log prices: 0 to -12


def _normal_hedge() -> FloatArray:
    """phi(z) / p for z the normal quantile of p, at log p = 0, -1/64, -2/64, ...: what the next bet puts at stake."""
    log_p = -np.arange(64 * 64) / 64.0
    log_p[0] = -1e-12
    z = special.ndtri_exp(log_p)
    table: FloatArray = np.exp(-0.5 * z * z - log_p) / math.sqrt(2.0 * math.pi)
    table[0] = 0.0
    return table


def _poisson_hedge() -> FloatArray:
    """The same where what is left is a Poisson number of equal losses: stakes in their standard deviation, by number and price.

    An option worth p is a mixture of those on at most c - 1 and at most c losses, P(N < c) <= p <= P(N <= c); a loss takes
    from each the probability of just so many.
    """
    price = np.exp(-np.arange(_COLUMNS) / _PLACES)
    table = np.zeros((_ROWS, _COLUMNS))
    for row in range(1, _ROWS):
        expected = (row / _STEPS) ** 2
        number = np.arange(int(expected + 12.0 * math.sqrt(expected)) + 30)
        mass = np.exp(number * math.log(expected) - expected - special.gammaln(number + 1.0))
        upto = np.cumsum(mass)
        c = np.minimum(np.searchsorted(upto, price), number.size - 1)
        below, before = np.where(c > 0, upto[c - 1], 0.0), np.where(c > 0, mass[c - 1], 0.0)
        share = (price - below) / np.maximum(upto[c] - below, 1e-300)
        table[row] = ((1.0 - share) * before + share * mass[c]) / price * math.sqrt(expected)
    table[:, 0] = 0.0
    return table


#: Stakes by price, and by expected number and price. Loops are handed them: numba would compile the numbers into each.
HEDGE = (_normal_hedge(), _poisson_hedge())


@njit(cache=True, inline="always")
def next_look(t, n):  # type: ignore[no-untyped-def]
    """The row before which bets are renewed next, of n, after row t."""
    return t + min(max((n - t) // 20, 1), 16)


@njit(cache=True, inline="always")
def stake(log_price, left, margin, width, total, squares, rows, prior, hedge, kept=1.0):  # type: ignore[no-untyped-def]
    """What the hedge of the option stakes at its log price, log capital plus ``opening``; none from 0 on.

    ``opening`` is the log price at capital 1, ``log(level / MARGIN)``. ``left`` rows are to come.

    ``margin`` is delta and ``width`` the upper bound, ``total`` and ``squares`` are sums over the earlier ``rows``, of losses and
    of their squares, all above the lower bound. At delta, losses of the size seen would have the variance ``margin (size -
    margin)``, which few losses so far do not make smaller; the observed variance about delta takes over where it is larger.
    ``kept`` is the share of the variance that a proxy leaves.
    """
    if log_price >= 0.0:
        return 0.0
    spread = max(squares - 2.0 * margin * total + rows * margin * margin, 0.0)
    variance = (PSEUDO_ROWS * prior + spread) / (PSEUDO_ROWS + rows)
    size = (PSEUDO_EVENTS * width * width + squares) / (PSEUDO_EVENTS * width + total)
    of_events = margin * (size - margin)
    if of_events > variance:
        variance = OBSERVED * variance + (1.0 - OBSERVED) * of_events
    variance *= kept
    normal, poisson = hedge
    place = -64.0 * log_price
    index = min(int(place), normal.size - 2)
    share = min(place - index, 1.0)
    hedged = normal[index] * (1.0 - share) + normal[index + 1] * share
    deviation = math.sqrt(left * variance)
    root = left * margin / deviation  # of the expected number of losses of a size
    if root * root < MANY:
        across, along = root * _STEPS, min(-_PLACES * log_price, _COLUMNS - 1.0001)
        i, j = int(across), int(along)
        u, v = across - i, along - j
        counted = (poisson[i, j] * (1.0 - v) + poisson[i, j + 1] * v) * (1.0 - u)
        counted += (poisson[i + 1, j] * (1.0 - v) + poisson[i + 1, j + 1] * v) * u
        weight = min((MANY - root * root) / (MANY - FEW), 1.0)
        hedged = weight * counted + (1.0 - weight) * hedged
    return hedged / deviation


@njit(cache=True)
def stakes(log_price, left, margin, width, totals, squares, rows, prior, hedge):  # type: ignore[no-untyped-def]
    """`stake` of each of several candidates (k,), at most the cap."""
    wanted = np.empty(totals.size)
    for j in range(totals.size):
        one = stake(log_price[j], left, margin, width, totals[j], squares[j], rows, prior, hedge)
        wanted[j] = min(one, CAP / (width - margin))
    return wanted


@njit(cache=True)
def betting_log_capital(losses, delta, lower, upper, opening, prior, hedge):  # type: ignore[no-untyped-def]
    """Largest log capital of the option-hedged bettor (`stake`) against each column's null, along the rows in order.

    Bets are renewed every ``clip(rows left / 20, 1, 16)`` rows, from earlier rows alone, and the capital is looked at then,
    last after the last row. It is kept as a logarithm, so that no run of bad losses can make it vanish. Columns are walked in
    tiles, so that a tile's state stays in the nearest cache.
    """
    n, k = losses.shape
    tile, margin, width = 256, delta - lower, upper - lower
    largest = np.zeros(k)
    cap = CAP / (upper - delta)
    for first in range(0, k, tile):
        size = min(tile, k - first)
        log_capital, best, bet = np.zeros(size), np.zeros(size), np.zeros(size)
        factor, total, squares = np.ones(size), np.zeros(size), np.zeros(size)
        t = 0
        while t < n:
            left = n - t
            for j in range(size):
                wanted = stake(
                    log_capital[j] + opening,
                    left,
                    margin,
                    width,
                    total[j],
                    squares[j],
                    t,
                    prior,
                    hedge,
                )
                bet[j] = min(wanted, cap)
            until = next_look(t, n)
            for i in range(t, until):
                for j in range(size):
                    loss = losses[i, first + j] - lower
                    factor[j] *= 1.0 + bet[j] * (margin - loss)
                    total[j] += loss
                    squares[j] += loss * loss
            for j in range(size):
                if bet[j] > 0.0:
                    log_capital[j] += math.log(factor[j])
                    best[j] = max(best[j], log_capital[j])
                    factor[j] = 1.0
            t = until
        # a loop: the check of shapes in a slice's assignment takes longer to compile than all else
        for j in range(size):
            largest[first + j] = best[j]
    return largest


@njit(cache=True)
def helped(rows, total, squares, product, gaps, square_gaps, prior):  # type: ignore[no-untyped-def]
    """How much of a proxy's gap to take off a loss, from the sums of earlier rows, and the share of the variance then left.

    The regression's coefficient, shrunk by a factor ``1 - DOUBT / z^2`` with z the correlation in standard errors: a proxy that
    has not yet shown that it helps is left alone.
    """
    spread = squares - total * total / max(rows, 1)
    shared = product - total * gaps / max(rows, 1)
    if spread * square_gaps <= 0.0:
        return 0.0, 1.0
    explained = min(shared * shared / (spread * square_gaps), 1.0)
    if explained * rows <= DOUBT * (1.0 - explained):
        return 0.0, 1.0
    taken = (1.0 - DOUBT * (1.0 - explained) / (explained * rows)) * shared / square_gaps
    before = spread + PSEUDO_ROWS * prior
    return taken, 1.0 - taken * (2.0 * shared - taken * square_gaps) / before


@njit(cache=True)
def helped_log_capital(losses, gaps, delta, lower, upper, opening, prior, hedge):  # type: ignore[no-untyped-def]
    """As `betting_log_capital`, but each bet is on the loss less a part of the proxy's ``gaps`` (n, k), within [-1, 1].

    Also returned is the mean of what was bet on. Where the smaller variance asks for a larger stake than the wider range
    allows, the stake is the one without a proxy, and the proxy is taken into account as far as that leaves room.
    """
    n, k = losses.shape
    margin, width = delta - lower, upper - lower
    largest, mean = np.zeros(k), np.zeros(k)
    for j in range(k):
        log_capital, t = 0.0, 0
        total, squares, product, of_gaps, square_gaps = 0.0, 0.0, 0.0, 0.0, 0.0
        while t < n:
            log_price, left = log_capital + opening, n - t
            taken, kept = helped(t, total, squares, product, of_gaps, square_gaps, prior)
            bet = stake(log_price, left, margin, width, total, squares, t, prior, hedge, kept)
            cap = CAP / (upper - delta + abs(taken))
            if bet > cap:
                bet = cap
                if taken != 0.0:
                    plain = stake(log_price, left, margin, width, total, squares, t, prior, hedge)
                    plain = min(plain, CAP / (upper - delta))
                    if plain > cap:
                        bet = plain
                        room = max(CAP / plain - (upper - delta), 0.0)
                        taken = math.copysign(min(room, abs(taken)), taken)
            until, factor = next_look(t, n), 1.0
            for i in range(t, until):
                loss, gap = losses[i, j] - lower, gaps[i, j]
                factor *= 1.0 + bet * (margin - loss + taken * gap)
                total += loss
                squares += loss * loss
                product += loss * gap
                of_gaps += gap
                square_gaps += gap * gap
                mean[j] += (loss - taken * gap) / n
            if bet > 0.0:
                log_capital += math.log(factor)
                largest[j] = max(largest[j], log_capital)
            t = until
        mean[j] += lower
    return largest, mean


@njit(cache=True)
def wins(column, rows, delta, lower, upper, level, prior, hedge):  # type: ignore[no-untyped-def]
    """Whether the bettor of `betting_log_capital` reaches ``1 / level`` on one column (n,), its ``rows`` in tested order.

    The walk ends where he does, or where even winning every bet that is left would not bring him there: mostly after a
    small part of the rows.
    """
    m, margin, width = rows.size, delta - lower, upper - lower
    needed, opening, cap = -math.log(level), math.log(level / MARGIN), CAP / (upper - delta)
    fastest = math.log1p(cap * margin)
    log_capital, total, squares, t = 0.0, 0.0, 0.0, 0
    while t < m:
        left = m - t
        if log_capital + left * fastest < needed - 1e-6:
            return False
        bet = min(
            stake(log_capital + opening, left, margin, width, total, squares, t, prior, hedge), cap
        )
        until = next_look(t, m)
        factor = 1.0
        for i in range(t, until):
            loss = column[rows[i]] - lower
            factor *= 1.0 + bet * (margin - loss)
            total += loss
            squares += loss * loss
        if bet > 0.0:
            log_capital += math.log(factor)
            if math.exp(-log_capital) <= level:
                return True
        t = until
    return False


@njit(cache=True, fastmath={"reassoc"})
def sum_of(column, rows):  # type: ignore[no-untyped-def]
    """The sum of the column's ``rows``."""
    total = 0.0
    for i in range(rows.size):
        total += column[rows[i]]
    return total


@njit(cache=True)
def rejected_deltas(columns, deltas, lower, upper, level, priors, hedge):  # type: ignore[no-untyped-def]
    """Per row of ``columns`` (k, n), how many leading ``deltas`` (descending) betting rejects before one that it does not.

    As in `riskcal.pvalues.betting`, a mean that is not below delta is not rejected, whatever the capital.
    """
    n = columns.shape[1]
    rejected = np.zeros(columns.shape[0], dtype=np.int64)
    rows = np.arange(n)
    for j in range(columns.shape[0]):
        total = sum_of(columns[j], rows)
        for d in range(deltas.size):
            if total >= n * deltas[d] or not wins(
                columns[j], rows, deltas[d], lower, upper, level, priors[d], hedge
            ):
                break
            rejected[j] += 1
    return rejected


@njit(cache=True)
def betting_prefix(columns, splits, deltas, lower, upper, level, priors, hedge):  # type: ignore[no-untyped-def]
    """Per delta and split: how many leading columns betting certifies before one that it does not.

    ``columns`` is (k, n), ``splits`` (T, m) holds the rows of each split in the order in which they are tested. As in
    `riskcal.pvalues.betting`, a mean that is not below delta is not rejected, whatever the capital.
    """
    certified = np.zeros((deltas.size, len(splits)), dtype=np.int64)
    for d in range(deltas.size):
        for s in range(len(splits)):
            for j in range(len(columns)):
                if not wins(
                    columns[j], splits[s], deltas[d], lower, upper, level, priors[d], hedge
                ):
                    break
                if sum_of(columns[j], splits[s]) >= splits.shape[1] * deltas[d]:
                    break
                certified[d, s] += 1
    return certified
