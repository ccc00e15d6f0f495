"""All numba loops. Imported inside the functions that need them, since importing numba takes half a second."""

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import special

FloatArray = NDArray[np.float64]


@njit(cache=True, fastmath={"nnan", "nsz"})
def column_summary(losses):  # type: ignore[no-untyped-def]
    """Sum of each column, and the smallest and largest value of all, in one pass over a C-ordered (n, k) matrix.

    Four rows at a time: the running sums and extremes would else be read and written as often as the matrix is.
    """
    n, k = losses.shape
    total, low, high = np.zeros(k), np.empty(k), np.empty(k)
    for j in range(k):
        low[j] = high[j] = losses[0, j]
    for i in range(0, n - 3, 4):
        for j in range(k):
            a, b, c, d = losses[i, j], losses[i + 1, j], losses[i + 2, j], losses[i + 3, j]
            total[j] += (a + b) + (c + d)
            low[j] = min(min(min(a, b), min(c, d)), low[j])
            high[j] = max(max(max(a, b), max(c, d)), high[j])
    for i in range(n - n % 4, n):
        for j in range(k):
            total[j] += losses[i, j]
            low[j] = min(losses[i, j], low[j])
            high[j] = max(losses[i, j], high[j])
    for j in range(1, k):  # a loop: numba takes a second to compile each of numpy's own min and max
        low[0], high[0] = min(low[j], low[0]), max(high[j], high[0])
    return total, low[0], high[0]


@njit(cache=True)
def binomial_shortfall(n, p, log_mode):  # type: ignore[no-untyped-def]
    """For B ~ Bin(n, p) and t = 1..n: P(B <= t) and E max(0, t - B). ``log_mode`` is the log probability of the mode."""
    mass = np.empty(n + 1)
    mode = min(int((n + 1) * p), n)
    mass[mode] = math.exp(log_mode)
    for j in range(mode, 0, -1):
        mass[j - 1] = mass[j] * (j * (1.0 - p)) / ((n - j + 1) * p)
    for j in range(mode, n):
        mass[j + 1] = mass[j] * ((n - j) * p) / ((j + 1) * (1.0 - p))
    upto, shortfall = np.empty(n), np.empty(n)
    below, area = mass[0], 0.0
    for t in range(1, n + 1):
        area += below
        below += mass[t]
        upto[t - 1], shortfall[t - 1] = min(below, 1.0), area
    return upto, shortfall


#: The bettor of `riskcal.pvalues.betting`, and of all that bet as it does. Any values are valid, as the bets look at earlier
#: rows alone; these were found on the grid of ``benchmarks/power.py``.
MARGIN = 1.15  # what the option pays, over 1 / level: a hedge that is renewed now and then falls a little short of it
CAP = 0.99  # the largest stake, over the one that a loss at the upper bound would turn into ruin
PSEUDO_ROWS = 8.0  # rows at the prior variance that the variance starts from
PSEUDO_EVENTS = 0.1  # losses at the upper bound that the size of a loss starts from
OBSERVED = 0.2  # share of the observed variance, where losses of that size would have a larger one at delta
FEW, MANY = (
    5.0,
    20.0,
)  # expected losses left: up to few they are counted, as a Poisson number; many count as normal
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


@njit(cache=True, inline="always")
def stake(short_of_target, left, margin, width, total, squares, rows, prior, hedge):  # type: ignore[no-untyped-def]
    """What the option's hedge stakes at this log capital (less the target's), with so many rows left.

    ``margin`` is delta and ``width`` the upper bound, ``total`` and ``squares`` are sums over the earlier ``rows``, of losses and
    of their squares, all above the lower bound. At delta, losses of the size seen would have the variance ``margin (size -
    margin)``, which few losses so far do not make smaller; the observed variance about delta takes over where it is larger.
    """
    if short_of_target >= 0.0:
        return 0.0
    spread = max(squares - 2.0 * margin * total + rows * margin * margin, 0.0)
    variance = (PSEUDO_ROWS * prior + spread) / (PSEUDO_ROWS + rows)
    size = (PSEUDO_EVENTS * width * width + squares) / (PSEUDO_EVENTS * width + total)
    of_events = margin * (size - margin)
    if of_events > variance:
        variance = OBSERVED * variance + (1.0 - OBSERVED) * of_events
    normal, poisson = hedge
    place = -64.0 * short_of_target
    index = min(int(place), normal.size - 2)
    share = min(place - index, 1.0)
    hedged = normal[index] * (1.0 - share) + normal[index + 1] * share
    deviation = math.sqrt(left * variance)
    root = left * margin / deviation  # of the expected number of losses of a size
    if root * root < MANY:
        across, along = root * _STEPS, min(-_PLACES * short_of_target, _COLUMNS - 1.0001)
        i, j = int(across), int(along)
        u, v = across - i, along - j
        counted = (poisson[i, j] * (1.0 - v) + poisson[i, j + 1] * v) * (1.0 - u)
        counted += (poisson[i + 1, j] * (1.0 - v) + poisson[i + 1, j + 1] * v) * u
        weight = min((MANY - root * root) / (MANY - FEW), 1.0)
        hedged = weight * counted + (1.0 - weight) * hedged
    return hedged / deviation


@njit(cache=True)
def betting_log_capital(losses, delta, lower, upper, target, prior, hedge):  # type: ignore[no-untyped-def]
    """Largest log capital of the option-hedged bettor against each column's null, along the rows in order.

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
                    log_capital[j] + target,
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
            until = t + min(max(left // 20, 1), 16)
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
        for j in range(
            size
        ):  # a loop: the check of shapes in a slice's assignment takes longer to compile than all else
            largest[first + j] = best[j]
    return largest


def option_hedged_betting(
    losses: FloatArray, delta: float, *, level: float, lower: float, upper: float, prior: float
) -> FloatArray:
    """Largest log capital per column of C-ordered ``losses`` (n, k); see `riskcal.pvalues.betting`."""
    target = math.log(level / MARGIN)
    largest: FloatArray = betting_log_capital(losses, delta, lower, upper, target, prior, HEDGE)
    return largest


#: Stakes by price, and by expected number and price.
HEDGE = (_normal_hedge(), _poisson_hedge())


@njit(cache=True)
def stakes(short_of_target, left, margin, width, totals, squares, rows, prior, hedge):  # type: ignore[no-untyped-def]
    """`stake` of each of several candidates (k,), at most the cap."""
    wanted = np.empty(totals.size)
    for j in range(totals.size):
        one = stake(
            short_of_target[j], left, margin, width, totals[j], squares[j], rows, prior, hedge
        )
        wanted[j] = min(one, CAP / (width - margin))
    return wanted


@njit(cache=True)
def wins(column, rows, delta, lower, upper, level, prior, hedge):  # type: ignore[no-untyped-def]
    """Whether the bettor of `betting_log_capital` reaches ``1 / level`` on one column (n,), its ``rows`` in tested order.

    The walk ends where he does, or where even winning every bet that is left would not bring him there: mostly after a
    small part of the rows.
    """
    m, margin, width = rows.size, delta - lower, upper - lower
    needed, target, cap = -math.log(level), math.log(level / MARGIN), CAP / (upper - delta)
    fastest = math.log1p(cap * margin)
    log_capital, total, squares, t = 0.0, 0.0, 0.0, 0
    while t < m:
        left = m - t
        if log_capital + left * fastest < needed - 1e-6:
            return False
        bet = min(
            stake(log_capital + target, left, margin, width, total, squares, t, prior, hedge), cap
        )
        until = t + min(max(left // 20, 1), 16)
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


def count_rejected(
    columns: FloatArray,
    deltas: FloatArray,
    *,
    lower: float,
    upper: float,
    level: float,
    priors: FloatArray,
) -> NDArray[np.int64]:
    """Leading ``deltas`` (descending) that betting rejects, per row of ``columns`` (k, n); see `riskcal.bounds.betting`."""
    result: NDArray[np.int64] = rejected_deltas(columns, deltas, lower, upper, level, priors, HEDGE)
    return result


@njit(cache=True)
def predictable_plug_in(losses, delta, log_target):  # type: ignore[no-untyped-def]
    """Per column of ``losses`` (n, k) on the unit interval: largest log capital against ``delta``, smallest upper bound.

    The bets are those of the predictable plug-in empirical Bernstein process for n rows at ``exp(-log_target)``; they do
    not depend on delta, so one walk gives the capital and the bound.
    """
    n, k = losses.shape
    largest, bound = np.zeros(k), np.ones(k)
    total, square = np.full(k, 0.5), np.full(k, 0.25)
    weight, drift = np.zeros(k), np.zeros(k)
    for t in range(n):
        for j in range(k):
            gap = losses[t, j] - total[j] / (t + 1)
            bet = min(math.sqrt(2.0 * log_target * (t + 1) / (n * square[j])), 0.5)
            weight[j] += bet
            drift[j] += bet * losses[t, j] - gap * gap * (math.log1p(-bet) + bet)
            largest[j] = max(largest[j], weight[j] * delta - drift[j])
            bound[j] = min(bound[j], (drift[j] + log_target) / weight[j])
            total[j] += losses[t, j]
            square[j] += (losses[t, j] - total[j] / (t + 2)) ** 2
    return largest, bound


def predictable_bernstein(
    losses: FloatArray, delta: float, *, level: float
) -> tuple[FloatArray, FloatArray]:
    """Largest log capital and smallest bound per column; see `riskcal.pvalues.predictable_bernstein`."""
    largest, bound = predictable_plug_in(np.ascontiguousarray(losses), delta, -math.log(level))
    return largest, bound


@njit(cache=True)
def watch(losses, weights, delta, bets, growth, totals, restarts, limit):  # type: ignore[no-untyped-def]
    """Multiply each bettor's capital by ``1 + bet weight (loss - delta)``, loss by loss, and return the first alarm.

    Updated in place: ``growth`` (m,), the logarithms of the capitals, and ``totals`` (2,), the sums of weight times loss and
    of weights. With ``restarts`` each bettor starts with one unit and is given the weight of every loss after it, to bet with
    from the next on (Shiryaev-Roberts). Returned is the first loss after which the mean of ``exp(growth)`` is at least
    ``exp(limit)``, or -1.
    """
    alarm = -1
    for t in range(losses.size):
        gap = weights[t] * (losses[t] - delta)
        largest = -np.inf
        for b in range(bets.size):
            grown = growth[b] + math.log1p(bets[b] * gap)
            if restarts:
                fresh = math.log(weights[t])
                grown = max(grown, fresh) + math.log1p(math.exp(-abs(grown - fresh)))
            growth[b] = grown
            largest = max(largest, grown)
        if alarm < 0 and largest >= limit:
            capital = 0.0
            for b in range(bets.size):
                capital += math.exp(growth[b] - largest)
            if largest + math.log(capital / bets.size) >= limit:
                alarm = t
        totals[0] += weights[t] * losses[t]
        totals[1] += weights[t]
    return alarm


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


def count_certified(
    columns: FloatArray,
    splits: NDArray[np.intp],
    deltas: FloatArray,
    *,
    lower: float,
    upper: float,
    level: float,
    priors: FloatArray,
) -> NDArray[np.int64]:
    """Leading rows of ``columns`` (k, n) that betting certifies, per delta and split; see `riskcal.trials.run_trials`."""
    result: NDArray[np.int64] = betting_prefix(
        columns, splits, deltas, lower, upper, level, priors, HEDGE
    )
    return result


@njit(cache=True)
def head_exits(confidence, agrees, prompt, thresholds, exits, errors):  # type: ignore[no-untyped-def]
    """Per prompt and head (n, K): tokens that exit there, at the first head whose threshold they reach, and wrong ones."""
    for i in range(confidence.shape[0]):
        for k in range(thresholds.size):
            if confidence[i, k] >= thresholds[k]:
                exits[prompt[i], k] += 1
                if not agrees[i, k]:
                    errors[prompt[i], k] += 1
                break


@njit(cache=True)
def head_levels(  # type: ignore[no-untyped-def]
    level,
    count,
    agrees,
    start,
    used,
    weight,
    agreement,
    max_tokens,
    n,
    quantile,
    target,
    margin,
    chosen,
):
    """The boldest level of each used head, one after the other, that a pilot projects to be certified; returns the saving.

    ``level`` (K, N) is the first of a head's ``count`` descending thresholds that a token reaches; ``start`` bounds each
    pilot prompt's tokens. On n further prompts the surplus of agreement per prompt must exceed both ``quantile`` standard
    errors and what lets the largest bet reach the log capital ``target``; the projection must clear this by ``margin`` of
    its own standard errors, with one wrong exit more than was seen. A head without such a level is passed over (-1).
    """
    waiting = np.ones(level.shape[1], dtype=np.bool_)
    prompts = start.size - 1
    one = agreement / max_tokens
    saving = 0.0
    for k in range(level.shape[0]):
        chosen[k] = -1
        if not used[k]:
            continue
        total, first, second = np.zeros(count[k]), np.zeros(count[k]), np.zeros(count[k])
        exits, errors = np.zeros(count[k]), np.zeros(count[k])
        for p in range(prompts):
            for i in range(start[p], start[p + 1]):
                if waiting[i] and level[k, i] < count[k]:
                    exits[level[k, i]] += 1.0
                    if not agrees[k, i]:
                        errors[level[k, i]] += 1.0
            excess = 0.0
            for g in range(count[k]):
                if exits[g] > 0.0:
                    step = (errors[g] - (1.0 - agreement) * exits[g]) / max_tokens
                    total[g] += exits[g]
                    first[g] += step
                    second[g] += step * (
                        step + 2.0 * excess
                    )  # by how much the square of the excess grows
                    excess += step
                    exits[g], errors[g] = 0.0, 0.0
        total, first, second = np.cumsum(total), np.cumsum(first), np.cumsum(second)
        for g in range(count[k] - 1, -1, -1):
            if total[g] == 0.0:
                break
            surplus = -(first[g] + one) / prompts
            variance = (second[g] + one * one) / prompts
            needed = max(quantile * math.sqrt(variance / n), target * agreement / (0.99 * n))
            if surplus - needed >= margin * math.sqrt(variance * (1.0 / n + 1.0 / prompts)):
                chosen[k] = g
                saving += weight[k] * total[g]
                break
        for i in range(level.shape[1]):
            if level[k, i] <= chosen[k]:
                waiting[i] = False
    return saving


@njit(cache=True)
def column_squares(losses, mean):  # type: ignore[no-untyped-def]
    """Per column of C-ordered ``losses`` (n, k), the sum of squared differences from ``mean`` (k,)."""
    n, k = losses.shape
    squares = np.zeros(k)
    for i in range(n):
        for j in range(k):
            gap = losses[i, j] - mean[j]
            squares[j] += gap * gap
    return squares


def sample_deviation(losses: FloatArray, mean: FloatArray) -> FloatArray:
    """Standard deviation (n - 1 in the denominator) per column: no copy, and the same for a column alone or among others."""
    deviation: FloatArray = np.sqrt(column_squares(losses, mean) / (len(losses) - 1))
    return deviation
