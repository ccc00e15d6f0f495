import csv
import functools
import itertools
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats

from riskcal import RiskcalError, calibrate, pvalues
from riskcal.pvalues import bettor, bettor_kernels, kernels, sums
from riskcal.pvalues.bettor import prior_variance
from riskcal.pvalues.methods import Clt
from riskcal.pvalues.sampled import rough_size

with (Path(__file__).parent / "data" / "hb_reference.csv").open(newline="") as file:
    REFERENCE = [
        {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
    ]

SUM_BASED = {
    "hoeffding": pvalues.hoeffding,
    "bentkus": pvalues.bentkus,
    "hoeffding_bentkus": pvalues.hoeffding_bentkus,
    "convex_order": pvalues.convex_order,
}
PLANNED = SUM_BASED | {
    "betting": lambda losses, delta, **bounds: pvalues.betting(losses, delta, level=0.05, **bounds),
    "binomial": pvalues.binomial,
}
BOUNDED = {name: test for name, test in PLANNED.items() if name != "binomial"} | {
    "empirical_bernstein": pvalues.empirical_bernstein,
    "predictable_bernstein": lambda losses, delta, **bounds: pvalues.predictable_bernstein(
        losses, delta, level=0.05, **bounds
    ),
}
EVERY = BOUNDED | {"binomial": pvalues.binomial}
each = pytest.mark.parametrize("test", EVERY.values(), ids=EVERY.keys())
each_bounded = pytest.mark.parametrize("test", BOUNDED.values(), ids=BOUNDED.keys())
each_sum_based = pytest.mark.parametrize("test", SUM_BASED.values(), ids=SUM_BASED.keys())

deltas = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5, 0.9]) | st.floats(0.001, 0.999)
unit = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.1, 0.5])
columns = hnp.arrays(np.float64, st.integers(2, 60), elements=unit)


def ones(k, n, dtype=np.float64):
    """K ones among n losses, not all in one place."""
    losses = np.zeros(n, dtype=dtype)
    losses[np.linspace(0, n - 1, k).astype(int)] = 1
    assert losses.sum() == k
    return losses


# The 60-digit reference


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, bool])
def test_hoeffding_bentkus_equals_the_reference_in_every_row(dtype):
    assert len(REFERENCE) == 84
    for row in REFERENCE:
        losses = ones(int(row["k"]), int(row["n"]), dtype)
        assert pvalues.hoeffding_bentkus(losses, row["alpha"]) == pytest.approx(
            row["hb"], rel=1e-10
        ), row
        assert pvalues.bentkus(losses, row["alpha"]) == pytest.approx(
            row["bentkus_e_clip1"], rel=1e-10
        ), row
        assert pvalues.binomial(losses, row["alpha"]) == pytest.approx(
            row["binomial_exact"], rel=1e-10
        ), row


@pytest.mark.parametrize(
    ("n", "delta", "expected"), [(100, 0.05, 0.95**100), (29, 0.1, 0.9**29), (3, 0.5, 0.125)]
)
def test_zero_loss_gives_the_probability_of_no_loss_at_all(n, delta, expected):
    zeros = np.zeros(n)
    for name in ("hoeffding_bentkus", "convex_order", "binomial"):
        assert EVERY[name](zeros, delta) == pytest.approx(expected, rel=1e-12), name
    assert pvalues.hoeffding(zeros, delta) == pytest.approx(math.exp(-2 * n * delta**2), rel=1e-12)
    assert pvalues.bentkus(zeros, delta) == pytest.approx(min(1, math.e * expected), rel=1e-12)


@pytest.mark.parametrize(("delta", "smallest"), [(0.02, 149), (0.05, 59), (0.1, 29), (0.25, 11)])
def test_the_smallest_sample_that_certifies_at_zero_loss(delta, smallest):
    for name in ("hoeffding_bentkus", "convex_order", "binomial"):
        assert (
            EVERY[name](np.zeros(smallest), delta)
            <= 0.05
            < EVERY[name](np.zeros(smallest - 1), delta)
        ), name


@pytest.mark.parametrize(("delta", "smallest"), [(0.02, 3745), (0.05, 600), (0.1, 150), (0.25, 24)])
def test_the_smallest_sample_that_hoeffding_alone_certifies_at_zero_loss(delta, smallest):
    assert (
        pvalues.hoeffding(np.zeros(smallest), delta)
        <= 0.05
        < pvalues.hoeffding(np.zeros(smallest - 1), delta)
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("delta", [0.1, 0.2, 0.53, 0.9])
def test_no_count_loses_a_step_to_rounding(delta, dtype):
    """``ceil(n * mean)`` slips by a whole step at 7, 14, 28, 55 and 56 of 100 in float64, at half of all in float32."""
    n = 100
    for k in range(n + 1):
        losses = ones(k, n, dtype)
        exact = stats.binom.cdf(k, n, delta)
        below = k < n * delta
        assert pvalues.binomial(losses, delta) == pytest.approx(exact, rel=1e-11)
        assert pvalues.bentkus(losses, delta) == pytest.approx(
            min(1, math.e * exact) if below else 1, rel=1e-11
        )
        if 0 < k < n and below:
            entropy = k / n * math.log(k / n / delta) + (1 - k / n) * math.log(
                (1 - k / n) / (1 - delta)
            )
            expected = min(math.exp(-n * entropy), math.e * exact)
            assert pvalues.hoeffding_bentkus(losses, delta) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_sum_of_fractions_that_makes_an_integer_is_that_integer(dtype):
    """Seventy losses of a tenth sum to 7.000000000000005 in float64, and to 7.0000001 as float32 tenths."""
    tenths = np.r_[np.full(70, 0.1), np.zeros(30)].astype(dtype)
    if dtype == np.float64:
        assert tenths.sum() != 7
        assert pvalues.bentkus(tenths, 0.2) == pytest.approx(
            math.e * stats.binom.cdf(7, 100, 0.2), rel=1e-11
        )
        assert pvalues.bentkus(np.r_[tenths[:-1], 1e-6], 0.2) == pytest.approx(
            min(1, math.e * stats.binom.cdf(8, 100, 0.2)), rel=1e-11
        )
    seven = pvalues.convex_order(ones(7, 100), 0.2)
    assert pvalues.convex_order(tenths, 0.2) == pytest.approx(seven, rel=1e-5)


# The exact test


@given(st.integers(2, 12), st.fractions(Fraction(1, 50), Fraction(49, 50), max_denominator=50))
def test_binomial_equals_the_enumeration_of_all_outcomes(n, delta):
    for k in range(n + 1):
        exact = sum(math.comb(n, j) * delta**j * (1 - delta) ** (n - j) for j in range(k + 1))
        assert pvalues.binomial(ones(k, n), float(delta)) == pytest.approx(float(exact), rel=1e-12)


def test_binomial_is_accurate_far_into_the_tail():
    n = 5000
    for k in (0, 3, 100, 200):
        exact = sum(math.comb(n, j) * 9 ** (n - j) for j in range(k + 1))  # over 10^n
        expected = float(Fraction(exact, 10**n))
        assert 0 < expected < 1e-100 or k >= 200
        assert pvalues.binomial(ones(k, n), 0.1) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("loss", [0.5, 1e-6, 1 - 1e-6])
def test_binomial_refuses_what_is_neither_0_nor_1_and_names_its_place(loss):
    losses = np.zeros((5, 2))
    losses[3, 1] = loss
    with pytest.raises(
        RiskcalError, match=r"^losses: .* at row \[3, 1\] is neither 0 nor 1; use betting"
    ):
        pvalues.binomial(losses, 0.1)
    losses[3, 1] = 1 + 5e-10
    assert pvalues.binomial(losses, 0.1)[1] == pytest.approx(stats.binom.cdf(1, 5, 0.1))


# The convex-order bound


def brute_force(total, n, delta):
    """Min over integers t of E max(0, t - B) / (t - total), by direct summation."""
    mass = stats.binom.pmf(np.arange(n + 1), n, delta)
    ratios = [
        math.fsum(mass[j] * (t - j) for j in range(t)) / (t - total)
        for t in range(math.floor(total) + 1, n + 1)
    ]
    return min([1.0, *ratios])


@settings(max_examples=200)
@given(columns, deltas)
def test_convex_order_equals_brute_force(losses, delta):
    total = float(losses.sum())
    expected = 1.0 if total >= len(losses) * delta else brute_force(total, len(losses), delta)
    assert pvalues.convex_order(losses, delta) == pytest.approx(expected, rel=1e-10, abs=1e-300)


@pytest.mark.parametrize(
    ("n", "delta"), [(2, 0.5), (30, 0.1), (100, 0.05), (500, 0.1), (2000, 0.3), (2000, 0.01)]
)
def test_convex_order_is_never_above_hoeffding_bentkus(n, delta):
    sums = np.concatenate(
        [np.linspace(0, n * delta, 400), np.arange(min(n, 60)), np.arange(min(n, 60)) + 1e-7]
    )
    losses = np.zeros((n, len(sums)))
    losses += np.clip(sums - np.arange(n)[:, None], 0, 1)  # as many ones as fit, then the rest
    ratio = pvalues.convex_order(losses, delta) / pvalues.hoeffding_bentkus(losses, delta)
    assert ratio.max() <= 1 + 1e-9
    assert ratio.min() < 0.7  # and clearly below where it matters


@pytest.mark.parametrize(("n", "delta"), [(20, 0.3), (100, 0.05), (500, 0.1)])
def test_convex_order_is_continuous_in_the_sum_where_bentkus_jumps(n, delta):
    sums = np.arange(1, math.floor(n * delta), dtype=float)
    losses = np.clip(np.r_[sums - 1e-7, sums, sums + 1e-7] - np.arange(n)[:, None], 0, 1)
    below, at, above = pvalues.convex_order(losses, delta).reshape(3, -1)
    assert (below <= at).all()
    assert (at <= above).all()
    assert (above / below).max() < 1 + 1e-5
    jump = pvalues.bentkus(losses, delta).reshape(3, -1)
    assert (jump[2] / jump[1]).max() > 1.05


# All tests that bound a mean


@given(st.data())
@each
def test_the_answer_is_a_p_value_a_float_for_one_column_and_an_array_for_several(test, data):
    n, k = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 5))
    losses = data.draw(hnp.arrays(np.float64, (n, k), elements=st.sampled_from([0.0, 1.0])))
    delta = data.draw(deltas)
    several = test(losses, delta)
    assert isinstance(several, np.ndarray)
    assert several.shape == (k,)
    assert ((several > 0) & (several <= 1)).all()
    for j in range(k):
        one = test(losses[:, j], delta)
        assert isinstance(one, float)
        assert one == several[j]


@each
@given(
    columns=hnp.arrays(np.float64, st.integers(2, 40), elements=st.sampled_from([0.0, 1.0])),
    delta=deltas,
)
def test_types_and_containers_of_the_same_losses_give_the_same_answer(test, columns, delta):
    expected = test(columns, delta)
    for same in (
        columns.astype(np.float32),
        columns.astype(int),
        columns.astype(bool),
        columns.tolist(),
    ):
        assert test(same, delta) == expected
    assert test(pd.Series(columns, dtype="Float64"), delta) == expected
    assert test(columns.astype(">f8"), delta) == expected
    matrix = np.column_stack([columns, columns[::-1]])
    assert test(np.asfortranarray(matrix), delta).tolist() == test(matrix, delta).tolist()
    assert test(np.repeat(matrix, 3, 1)[:, ::3], delta).tolist() == test(matrix, delta).tolist()


@each
def test_the_losses_are_left_as_they_were(test):
    losses = np.array([[0.0, 1.0], [1.0, 0.0], [1 + 5e-10, -5e-10]])
    before = losses.copy()
    test(losses, 0.3)
    assert (losses == before).all()


@each_sum_based
@given(columns=columns, delta=deltas, data=st.data())
def test_a_sum_based_test_does_not_see_the_order_of_the_rows(test, columns, delta, data):
    """Dyadic losses, so that their sum is exact in any order."""
    columns = np.round(columns * 1024) / 1024
    shuffled = columns[np.array(data.draw(st.permutations(range(len(columns)))))]
    assert test(shuffled, delta) == test(columns, delta)


def test_betting_does_see_the_order_of_the_rows():
    losses = ones(12, 200)
    assert BOUNDED["betting"](np.sort(losses), 0.1) != BOUNDED["betting"](losses, 0.1)


@each_sum_based
@given(columns=columns, delta=deltas, data=st.data())
def test_a_sum_based_p_value_never_falls_when_a_loss_rises(test, columns, delta, data):
    row = data.draw(st.integers(0, len(columns) - 1))
    higher = columns.copy()
    higher[row] = data.draw(st.floats(columns[row], 1))
    assert test(higher, delta) >= test(columns, delta) * (1 - 1e-12)


@each_sum_based
@given(columns=columns, delta=deltas, data=st.data())
def test_a_sum_based_p_value_never_rises_with_delta(test, columns, delta, data):
    larger = data.draw(st.floats(delta, 0.9995))
    assert test(columns, larger) <= test(columns, delta) * (1 + 1e-9)


@given(st.integers(2, 60), st.data(), deltas)
def test_binomial_is_monotone_in_the_losses_and_in_delta(n, data, delta):
    k = data.draw(st.integers(0, n - 1))
    assert pvalues.binomial(ones(k, n), delta) <= pvalues.binomial(ones(k + 1, n), delta)
    larger = data.draw(st.floats(delta, 0.9995))
    assert pvalues.binomial(ones(k, n), larger) <= pvalues.binomial(ones(k, n), delta) * (1 + 1e-12)


@each_bounded
@given(columns=columns, delta=st.sampled_from([0.0625, 0.25, 0.5, 0.75]), power=st.integers(-8, 8))
def test_losses_delta_and_bounds_may_be_scaled_together(test, columns, delta, power):
    """By powers of two, and of dyadic losses, so that scaling itself rounds nothing."""
    columns, scale = np.round(columns * 256) / 256, 2.0**power
    assert test(columns * scale, delta * scale, lower=0.0, upper=scale) == pytest.approx(
        test(columns, delta), rel=1e-9
    )


@each_sum_based
@given(
    columns=columns,
    delta=st.sampled_from([0.0625, 0.25, 0.5]),
    shift=st.integers(-8, 8),
    power=st.integers(-3, 3),
)
def test_sum_based_tests_may_be_shifted_too(test, columns, delta, shift, power):
    columns, scale = np.round(columns * 256) / 256, 2.0**power
    moved = test(
        (columns + shift) * scale,
        (delta + shift) * scale,
        lower=shift * scale,
        upper=(1 + shift) * scale,
    )
    assert moved == pytest.approx(test(columns, delta), rel=1e-9)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 5.0), (-3.0, -1.0)])
@each_bounded
def test_wider_bounds_never_help_beyond_what_the_losses_show(test, bounds):
    """Losses at the lower bound throughout: certified at last, at any bounds."""
    low, high = bounds
    delta = low + 0.1 * (high - low)
    for n, certified in ((5, False), (600, True)):
        assert (test(np.full(n, low), delta, lower=low, upper=high) <= 0.05) == certified
    assert test(np.full(600, high), delta, lower=low, upper=high) == 1.0
    assert test(np.full(600, delta), delta, lower=low, upper=high) > 0.05


@each_bounded
def test_a_mean_at_or_above_delta_is_no_evidence(test):
    rng = np.random.default_rng(0)
    losses = rng.random((300, 6)) * np.linspace(0.3, 1, 6)
    p = test(losses, 0.1)
    assert (p > 0.5).all()
    if test in SUM_BASED.values() or test is EVERY["betting"]:
        assert (p == 1.0).all()


@pytest.mark.parametrize("test", [*SUM_BASED.values(), EVERY["betting"]])
@pytest.mark.parametrize("losses", [[0.0] * 30 + [0.25] * 30, [0.0, 0.25] * 60])
def test_a_mean_of_delta_to_the_last_bit_is_no_evidence_either(test, losses):
    assert test(losses, 0.125) == 1.0


@pytest.mark.parametrize("delta", [1e-6, 0.1, 0.7])
def test_the_binomial_tail_is_scipys_below_within_and_above_its_range(delta):
    counts = np.array([-1.0, 0.0, 1.0, 4.0, 39.0, 40.0, 41.0, 60.0])
    found = sums.binomial_cdf(counts, 40, delta)
    np.testing.assert_allclose(found, stats.binom.cdf(counts, 40, delta), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 7, 60])
@pytest.mark.parametrize("p", [0.03, 0.5, 0.97])
def test_the_table_behind_convex_order_is_scipys(n, p):
    mode = min(int((n + 1) * p), n)
    upto, shortfall = kernels.binomial_shortfall(n, p, float(stats.binom.logpmf(mode, n, p)))
    t = np.arange(1, n + 1)
    np.testing.assert_allclose(upto, stats.binom.cdf(t, n, p), rtol=1e-11)
    below = np.maximum(t[:, None] - np.arange(n + 1), 0) @ stats.binom.pmf(np.arange(n + 1), n, p)
    np.testing.assert_allclose(shortfall, below, rtol=1e-11)


def test_who_walks_rejects_no_mean_of_delta_to_the_last_bit_however_well_he_bet():
    """His capital would do: the losses come last."""
    losses = np.array([[0.0] * 100 + [0.25] * 100])
    given_ = {"lower": 0.0, "upper": 1.0, "level": 0.05}
    for delta, wins in ((0.125, 0), (0.1251, 1)):
        deltas = np.array([delta])
        assert bettor.count_rejected(losses, deltas, **given_) == wins
        certified = bettor.count_certified(losses, np.arange(200)[None], deltas, **given_)
        assert certified == wins
    assert bettor_kernels.sum_of(losses[0], np.arange(98, 103)) == 0.75


@pytest.mark.parametrize("width", [0.5, 1.0, 4.0])
def test_the_boldest_stake_leaves_capital_after_the_worst_loss(width):
    margin, nothing = 0.02 * width, np.zeros(1)
    [boldest] = bettor_kernels.stakes(
        np.array([-0.5]), 1, margin, width, nothing, nothing, 10**6, 1e-6, bettor_kernels.HEDGE
    )
    assert boldest * (width - margin) == pytest.approx(bettor_kernels.CAP)
    assert bettor_kernels.CAP < 1.0


@each
@pytest.mark.parametrize("delta", [1e-300, 1e-17, 1e-9, 1 - 1e-9, 1 - 2.0**-53])
@pytest.mark.parametrize("n", [2, 3, 1000])
def test_extreme_deltas_and_sizes_give_p_values(test, delta, n):
    losses = np.column_stack([np.zeros(n), np.ones(n), ones(1, n), ones(n - 1, n)])
    p = test(losses, delta)
    assert ((p > 0) & (p <= 1)).all()
    assert p[1] == 1.0
    if delta < 0.5:
        assert (p > 0.999).all()
    elif n == 1000:
        assert p[0] <= 0.05


@each_bounded
def test_a_delta_that_rounds_to_the_bound_when_mapped_is_still_tested(test):
    delta = math.nextafter(1.0, 0.0)
    p = test(np.zeros((50, 2)), delta, lower=-1e6, upper=1.0)
    assert ((p > 0) & (p <= 1)).all()


def test_hundreds_of_thousands_of_rows_are_no_trouble():
    losses = np.zeros(300_000)
    losses[::20] = 1.0
    for name, test in EVERY.items():
        assert test(losses, 0.06) < 0.05, name
        assert test(losses, 0.0499) > 0.4, name
    exact = stats.binom.cdf(15_000, 300_000, 0.0505)
    assert pvalues.binomial(losses, 0.0505) == pytest.approx(exact, rel=1e-9)
    assert (
        exact <= pvalues.convex_order(losses, 0.0505) <= pvalues.hoeffding_bentkus(losses, 0.0505)
    )


# Betting


def plain_normal(price):
    """What the hedge of a normal option stakes, in standard deviations of what is left."""
    z = stats.norm.ppf(price)
    return stats.norm.pdf(z) / price


def plain_poisson(price, expected):
    """The same of the option on a Poisson number, mixed of the two whose prices lie around this one."""
    number = stats.poisson(expected)
    c = int(number.ppf(price))
    while number.cdf(c - 1) > price:
        c -= 1
    share = (price - number.cdf(c - 1)) / number.pmf(c)
    return ((1 - share) * number.pmf(c - 1) + share * number.pmf(c)) / price * math.sqrt(expected)


@functools.cache
def tabled_poisson(across, along):
    return (
        0.0
        if along == 0 or across == 0
        else plain_poisson(math.exp(-along / 16), (across / 8) ** 2)
    )


def plain_stake(price, left, delta, spread, total, squares, t, low, high):
    """The documented stake, in the losses' own units; Poisson options are read between the nodes of a table."""
    if price >= 1:
        return 0.0
    margin, width = delta - low, high - low
    prior = (0.05 if low < 0 < high else 1.0) * margin * (high - delta)
    variance = (8 * prior + spread) / (8 + t)
    size = (0.1 * width**2 + squares) / (0.1 * width + total)
    of_events = margin * (size - margin)
    if of_events > variance:
        variance = 0.2 * variance + 0.8 * of_events
    stake, expected = plain_normal(price), left * margin**2 / variance
    if expected < 20:
        across, along = 8 * math.sqrt(expected), min(-16 * math.log(price), 191.9999)
        i, j = int(across), int(along)
        u, v = across - i, along - j
        corners = [
            (i, j, (1 - u) * (1 - v)),
            (i + 1, j, u * (1 - v)),
            (i, j + 1, (1 - u) * v),
            (i + 1, j + 1, u * v),
        ]
        counted = sum(tabled_poisson(a, b) * weight for a, b, weight in corners)
        weight = min((20 - expected) / 15, 1.0)
        stake = weight * counted + (1 - weight) * stake
    return min(stake / math.sqrt(left * variance), 0.99 / (high - delta))


def plain_betting(losses, delta, level, low=0.0, high=1.0):
    """The documented recursion, one number at a time, in the losses' own units."""
    n = len(losses)
    log_capital, smallest, t = 0.0, 0.0, 0
    spread = total = squares = 0.0
    while t < n:
        left = n - t
        price = math.exp(log_capital) * level / 1.15
        bet = plain_stake(price, left, delta, spread, total, squares, t, low, high)
        for _ in range(min(max(left // 20, 1), 16)):
            log_capital += math.log1p(bet * (delta - losses[t]))
            spread += (losses[t] - delta) ** 2
            total += losses[t] - low
            squares += (losses[t] - low) ** 2
            t += 1
        smallest = min(smallest, -log_capital)
    return math.exp(smallest) if sum(losses) < n * delta else 1.0


@settings(max_examples=60)
@given(
    hnp.arrays(np.float64, st.integers(2, 120), elements=unit),
    st.sampled_from([0.02, 0.1, 0.3, 0.7]),
    st.sampled_from([0.5, 0.1, 0.05, 0.01, 1e-4]),
)
def test_betting_equals_its_documentation_in_plain_python(losses, delta, level):
    losses = losses * 0.5
    expected = plain_betting(losses.tolist(), delta, level)
    assert pvalues.betting(losses, delta, level=level) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("low", "high", "delta"), [(0, 1, 0.1), (-1, 1, 0.05), (-1, 1, -0.2), (0, 4, 0.5), (2, 3, 2.2)]
)
@pytest.mark.parametrize("level", [0.05, 0.0025, 1e-6])
def test_betting_equals_its_documentation_on_longer_samples_and_other_bounds(
    low, high, delta, level
):
    rng = np.random.default_rng(8)
    share = (delta - low) / (high - low)
    losses = low + (high - low) * rng.beta(6 * share, 10 * (1 - share), (700, 8))
    expected = [plain_betting(losses[:, j].tolist(), delta, level, low, high) for j in range(8)]
    found = pvalues.betting(losses, delta, level=level, lower=low, upper=high)
    assert found == pytest.approx(expected, rel=5e-3)
    assert min(expected) < 0.2  # the cell tells something


def test_every_bet_uses_earlier_rows_alone_so_that_a_later_loss_changes_nothing_before_it():
    """Equal losses up to row 200 give the same largest capital there, whatever follows, in a sample of the same size."""
    rng = np.random.default_rng(1)
    start = rng.beta(1, 19, 200)  # mean .05
    p = [
        pvalues.betting(np.r_[start, np.full(100, end)], 0.1, level=0.05)
        for end in (0.16, 0.18, 0.19)
    ]
    assert p[0] == p[1] == p[2] < 0.5


@pytest.mark.parametrize(("margin", "width"), [(0.1, 1.0), (1e-6, 1.0), (0.9, 1.0), (2.5, 5.0)])
def test_no_stake_is_negative_whatever_was_seen(margin, width):
    """A negative one would win where losses are high, so that a p-value would be small for being wrong."""
    rng, stake = np.random.default_rng(6), bettor_kernels.stake
    stake = getattr(stake, "py_func", stake)
    prior = margin * (width - margin)
    for log_price in [0.5, 0.0, -1e-9, -0.01, -1.0, -11.9, -12.1, -63.9, -64.1, -1e3]:
        for rows in (0, 1, 30, 10_000):
            seen = [np.zeros(rows), np.full(rows, width), width * rng.beta(1, 9, rows)]
            for losses, left in itertools.product(seen, (1, 7, 1_000, 1_000_000)):
                known = (losses.sum(), (losses**2).sum(), rows, prior, bettor_kernels.HEDGE)
                for kept in (1.0, 0.2):
                    wanted = stake(log_price, left, margin, width, *known, kept)
                    assert 0.0 <= wanted < math.inf


def exact_by_counting(capital, chance):
    """Whether no 1 / capital is smaller than the chance of all that are as small."""
    order = np.argsort(-capital, kind="stable")
    reached, p = np.cumsum(chance[order]), np.exp(-capital[order])
    last = np.r_[p[1:] > p[:-1] * (1 + 1e-12), True]
    return (reached[last] <= p[last] * (1 + 1e-9)).all()


@pytest.mark.parametrize("level", [0.5, 0.05])
@pytest.mark.parametrize(
    ("values", "chances", "n"),
    [([0.0, 1.0], [0.6, 0.4], 10), ([-1.0, 0.0, 1.0], [0.3, 0.5, 0.2], 7), ([2, 5], [0.9, 0.1], 9)],
)
def test_betting_is_exact_by_counting_all_outcomes(values, chances, n, level):
    """Every sequence of n losses, with its chance at a mean of exactly delta; no luck and no rule about means."""
    rows = np.array(list(itertools.product(range(len(values)), repeat=n))).T
    low, high, delta = float(values[0]), float(values[-1]), float(np.dot(values, chances))
    losses, chance = np.array(values, dtype=float)[rows], np.array(chances)[rows].prod(0)
    assert chance.sum() == pytest.approx(1)
    opening, prior = math.log(level / bettor_kernels.MARGIN), prior_variance(delta, low, high)
    capital = bettor_kernels.betting_log_capital(
        losses, delta, low, high, opening, prior, bettor_kernels.HEDGE
    )
    assert exact_by_counting(capital, chance)
    assert not exact_by_counting(capital + 0.7, chance)  # what twice the money would give


def test_an_order_that_follows_the_losses_cannot_certify_a_mean_that_is_too_high():
    """Ids chosen after the losses were seen can put the good rows first; what they cannot do is lower the mean."""
    losses = np.sort(np.random.default_rng(3).random((500, 40)) < 0.12, axis=0).astype(float)
    p = pvalues.betting(losses, 0.1, level=0.05)
    high = losses.mean(0) >= 0.1
    assert high.sum() > 20
    assert (p[high] == 1.0).all()
    assert (p[~high] <= 0.05).all()  # sorted like this, all would else have been certified


def test_the_capital_after_the_last_row_counts():
    """At n = 29 and delta .1 the last zero of an all-zero sample still adds evidence, as does any last row below delta."""
    for n in range(2, 40):
        shown = pvalues.betting(np.zeros(n), 0.1, level=0.05)
        hidden = pvalues.betting(np.r_[np.zeros(n - 1), 1.0], 0.1, level=0.05)
        assert shown < hidden or shown <= 0.05 / 1.15 * 1.001


def test_a_long_run_of_ones_does_not_ruin_the_capital_for_good():
    """The capital after 3000 ones is about 1e-30 or less; it must not become zero, and later zeros must be able to win."""
    ruin = pvalues.betting(np.ones(3000), 0.5, level=0.05)
    assert ruin == 1.0
    losses = np.r_[np.ones(1500), np.zeros(4000)]
    assert pvalues.betting(losses, 0.5, level=0.05) <= 0.05
    losses = np.r_[np.ones(40_000), np.zeros(400_000)]
    p = pvalues.betting(losses, 0.5, level=0.05)
    assert math.isfinite(p)
    assert p <= 0.05


def test_the_p_value_of_betting_barely_falls_below_its_level():
    rng = np.random.default_rng(2)
    losses = rng.beta(1, 19, (2000, 50))
    for level in (0.1, 0.05, 0.0025):
        p = pvalues.betting(losses, 0.1, level=level)
        assert (p <= level).all()
        assert p.min() > level / 2
    assert (
        pvalues.betting(losses, 0.1, level=0.05) > 0.0025
    ).all()  # so Bonferroni over 20 needs tuning at .05 / 20


def test_many_columns_are_as_single_ones():
    """More columns than the kernel walks at a time, of a length that is no multiple of anything."""
    losses = np.random.default_rng(4).random((101, 600)) < 0.05
    together = pvalues.betting(losses, 0.1, level=0.05)
    for j in (0, 1, 255, 256, 257, 511, 512, 599):
        assert together[j] == pvalues.betting(losses[:, j], 0.1, level=0.05)
        for name in ("binomial", "convex_order", "hoeffding_bentkus"):
            assert EVERY[name](losses, 0.1)[j] == EVERY[name](losses[:, j], 0.1), name


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan, "x", None])
def test_betting_refuses_a_level_that_is_none(level):
    with pytest.raises(RiskcalError, match=r"^level: "):
        pvalues.betting([0.1, 0.2], 0.3, level=level)


# Bad input


@each
@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ([0.0, math.nan, 1.0], "losses: nan at index 1"),
        ([0.0, 1.0, math.inf], "losses: inf at index 2"),
        ([0.0, -math.inf], "losses: -inf at index 1"),
        ([[0.0, 1.0], [1.0, math.nan]], "losses: nan at index [1, 1]"),
        ([0.0, 1.0, 1 + 1e-8], "losses: 1.00000001 at index 2 is outside [0, 1]"),
        ([0.0, -1e-8], "losses: -1e-08 at index 1 is outside [0, 1]"),
        ([0.0], "losses: one row only"),
        ([[0.0, 1.0]], "losses: one row only"),
        ([], "losses: is empty"),
        (np.empty((3, 0)), "losses: is empty"),
        (np.zeros((2, 2, 2)), "losses: has shape (2, 2, 2)"),
        (0.5, "losses: has shape ()"),
        (["a", "b"], "losses: not an array of numbers"),
        (["0.0", "1.0"], "losses: not an array of numbers"),
        ([[0.0], [0.0, 1.0]], "losses: not an array of numbers"),
        ([0j, 1j], "losses: not an array of numbers"),
        ([None, 1.0], "losses: nan at index 0"),
        (np.ma.masked_array([0.0, 1.0, 0.0], mask=[0, 1, 0]), "losses: masked at index 1"),
        (pd.array([0.0, None], dtype="Float64"), "losses: "),
    ],
)
def test_bad_losses_are_refused_by_place(test, losses, named):
    with pytest.raises(RiskcalError) as refusal:
        test(losses, 0.1)
    assert str(refusal.value).startswith(named)


@each
@pytest.mark.parametrize("shape", [(2, 1), (3, 4), (4, 4), (5, 300), (257, 3)])
def test_nan_is_refused_wherever_it_stands(test, shape):
    for row, column in itertools.product(
        {0, 1, shape[0] // 2, shape[0] - 1}, {0, shape[1] // 2, shape[1] - 1}
    ):
        losses = np.zeros(shape)
        losses[row, column] = math.nan
        with pytest.raises(RiskcalError) as refusal:
            test(losses, 0.1)
        assert str(refusal.value).startswith(f"losses: nan at index [{row}, {column}]")


@each
def test_losses_a_rounding_error_outside_are_taken_as_the_bound(test):
    losses, moved = np.tile([0.0, 1.0, 0.0, 0.0], 5), np.tile([-9e-10, 1 + 9e-10, 0.0, 0.0], 5)
    assert test(moved, 0.4) == test(losses, 0.4)


@each
@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, 1.1, math.nan, math.inf, "x", None, [0.1, 0.2]])
def test_a_delta_not_inside_the_bounds_is_refused(test, delta):
    with pytest.raises(RiskcalError, match=r"^delta: "):
        test([0.0, 1.0], delta)


@each_bounded
@pytest.mark.parametrize(
    "bounds",
    [(1.0, 0.0), (0.5, 0.5), (-math.inf, 1.0), (0.0, math.inf), (math.nan, 1.0), (-1e308, 1e308)],
)
def test_bounds_that_are_no_range_are_refused(test, bounds):
    with pytest.raises(RiskcalError, match=r"^lower"):
        test([0.2, 0.3], 0.1, lower=bounds[0], upper=bounds[1])


@each_bounded
def test_losses_are_held_to_the_declared_bounds(test):
    assert 0 < test([-0.5, 0.5], 0.1, lower=-1.0, upper=1.0) <= 1
    for outside in ([-0.5, 0.5], [0.5, 2.5]):
        with pytest.raises(RiskcalError, match=r"^losses: .* is outside \[0, 2\]"):
            test(outside, 0.1, lower=0.0, upper=2.0)


# Planning


@pytest.mark.parametrize("name", PLANNED)
def test_the_planned_sample_certifies_about_as_often_as_planned(name):
    """Losses of 1 at probability .05 against .1: the normal approximation is rough, the share must not be."""
    n = pvalues.sample_size(name, 0.05, math.sqrt(0.05 * 0.95), 0.1, 0.05, power=0.8)
    losses = np.random.default_rng(6).random((n, 4000)) < 0.05
    assert 0.65 < (EVERY[name](losses, 0.1) <= 0.05).mean() < 0.93


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_for_the_impossible_is_finite(name):
    for mean, delta in ((0.0999999, 0.1), (0.0, 1e-300), (0.5, math.nextafter(0.5, 1))):
        assert 1000 < pvalues.sample_size(name, mean, 0.5, delta, 0.05) <= 2**20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1.5, -0.5])
@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (64, 257), (1001, 9)])
def test_one_bad_value_is_found_wherever_it_stands(bad, shape):
    rng = np.random.default_rng(5)
    for _ in range(20):
        losses = rng.random(shape)
        place = tuple(int(rng.integers(size)) for size in shape)
        losses[place] = bad
        with pytest.raises(RiskcalError, match=rf"index \[{place[0]}, {place[1]}\]"):
            pvalues.hoeffding(losses, 0.5)


def test_nothing_is_certified_by_an_asymptotic_test():
    with pytest.raises(RiskcalError, match="'clt' is asymptotic, and nothing may be certified"):
        calibrate(np.zeros((50, 1)), thresholds=[0.5], delta=0.1, test=Clt())


def test_the_hedges_are_those_of_options_on_a_normal_and_on_a_poisson_number() -> None:
    """Their tables' rows by scipy's distributions: phi(z) / p, and the mixture of two options on a count."""
    normal, poisson = bettor_kernels.HEDGE
    for place in (1, 64, 200, 640, 4000):
        z = stats.norm.isf(0.0) if place == 0 else special.ndtri_exp(-place / 64.0)
        assert normal[place] == pytest.approx(np.exp(stats.norm.logpdf(z) + place / 64.0), rel=1e-9)
    assert normal[0] == poisson[:, 0].max() == 0.0
    for row in (1, 3, 8, 20, 36):
        law = stats.poisson((row / 8) ** 2)
        for place in (1, 5, 16, 40, 100):
            price = math.exp(-place / 16)
            c = next(c for c in range(1000) if law.cdf(c) >= price)
            share = (price - law.cdf(c - 1)) / law.pmf(c)
            staked = ((1.0 - share) * law.pmf(c - 1) + share * law.pmf(c)) / price
            assert poisson[row, place] == pytest.approx(staked * row / 8, rel=1e-6)


@pytest.mark.parametrize(("width", "delta", "level"), [(1.0, 0.1, 0.05), (2.0, 0.3, 0.001)])
def test_the_search_for_a_size_begins_at_what_zeros_alone_need(width, delta, level) -> None:
    """(1 - delta / width)^n = level: what the exact test of 0/1 losses takes."""
    found = rough_size(0.0, 0.0, delta, level, 0.9, width=width)
    assert found == pytest.approx(math.log(level) / math.log(1.0 - delta / width))
    assert rough_size(0.0, 0.2, delta, level, 0.9, width=width) > found
    assert rough_size(delta, 0.2, delta, level, 0.9, width=width) == math.inf


@pytest.mark.parametrize(
    "test", ["hoeffding", "bentkus", "hoeffding_bentkus", "convex_order", "binomial"]
)
def test_losses_that_are_all_the_worst_have_the_p_value_one(test) -> None:
    assert getattr(pvalues, test)(np.ones((7, 2)), 0.3).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("test", [*SUM_BASED, "binomial"])
@pytest.mark.parametrize(
    ("low", "high", "delta"), [(0.0, 1.0, 0.3), (-1.0, 3.0, 0.2), (2.0, 7.0, 4.5)]
)
def test_p_values_of_sums_are_those_of_losses(test, low, high, delta):
    if test == "binomial" and (low, high) != (0.0, 1.0):
        return
    wrong = np.random.default_rng(1).random((30, 6)) < [0.0, 0.1, 0.2, 0.3, 0.5, 1.0]
    losses, method = low + (high - low) * wrong, pvalues.BY_NAME[test]
    bounds = {"lower": low, "upper": high}
    expected = method.pvalues(losses, delta, level=0.05, **bounds)
    found = method.of_totals(losses.sum(0).reshape(2, 3), 30, delta, **bounds)
    assert found.ravel() == pytest.approx(expected)
    assert found.shape == (2, 3)
    assert len(np.unique(expected)) > 2
