"""Upper confidence bounds: each inverts its test, holds its units, and refuses what it cannot use."""

import math

import numpy as np
import pytest
from scipy import stats

from riskcal import RiskcalError, bounds, pvalues
from riskcal.pvalues.inversions import default_grid

SMOOTH = [
    "convex_order",
    "hoeffding_bentkus",
    "bentkus",
    "hoeffding",
    "empirical_bernstein",
    "predictable_bernstein",
    "clt",
]
each_smooth = pytest.mark.parametrize("name", SMOOTH)
each_bound = pytest.mark.parametrize(
    "name", [name for name in bounds.METHODS if name != "clopper_pearson"]
)


def test_of(name, level):
    """The test that a bound inverts, at one level."""
    if name in ("betting", "predictable_bernstein"):
        return lambda losses, delta, **given: getattr(pvalues, name)(
            losses, delta, level=level, **given
        )
    return getattr(pvalues, name)


test_of.__test__ = False


@pytest.fixture
def losses():
    rng = np.random.default_rng(3)
    sizes = rng.beta(2, 3, (60, 8))
    losses = np.where(rng.random((60, 8)) < [0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.0, 0.5], sizes, 0.0)
    losses[:, 5], losses[:, 6] = 1.0, np.round(losses[:, 6])
    return losses


@each_smooth
@pytest.mark.parametrize("level", [0.2, 0.05, 1e-3, 1e-7])
def test_a_bound_is_where_its_test_meets_the_level(name, level, losses):
    for column in losses.T:
        bound = getattr(bounds, name)(column, epsilon=level)
        if bound < 1.0:
            assert test_of(name, level)(column, bound) == pytest.approx(level, rel=1e-7)
            assert test_of(name, level)(column, bound * (1 - 1e-4)) > level
        else:
            assert test_of(name, level)(column, 1 - 1e-9) >= level * (1 - 1e-7)


@pytest.mark.parametrize("n", [2, 3, 17, 400, 20_000])
@pytest.mark.parametrize("name", ["convex_order", "hoeffding_bentkus", "bentkus"])
def test_sum_based_bounds_invert_at_any_sum_and_size(name, n):
    rng = np.random.default_rng(n)
    totals = np.concatenate(
        [[0.0, 1.0, n - 1.0, 1e-9, 0.5], rng.random(6) * n, rng.random(4) * min(n, 5)]
    )
    level = 0.05
    columns = np.empty((n, totals.size))
    for j, total in enumerate(totals):
        columns[:, j] = np.clip(total - np.arange(n), 0, 1)
    for column, bound in zip(columns.T, getattr(bounds, name)(columns, epsilon=level), strict=True):
        if bound < 1 - 1e-7:
            assert getattr(pvalues, name)(column, bound) == pytest.approx(level, rel=1e-6)


@pytest.mark.parametrize("n", [2, 30, 1000])
@pytest.mark.parametrize("level", [0.3, 0.05, 1e-6])
def test_clopper_pearson_is_the_beta_quantile(n, level):
    counts = np.unique(np.linspace(0, n, 12).astype(int))
    losses = (np.arange(n)[:, None] < counts).astype(float)
    expected = [1.0 if c == n else stats.beta.ppf(1 - level, c + 1, n - c) for c in counts]
    assert bounds.clopper_pearson(losses, epsilon=level) == pytest.approx(expected, rel=1e-10)
    zero = bounds.clopper_pearson(np.zeros(n), epsilon=level)
    assert zero == pytest.approx(-math.expm1(math.log(level) / n))
    assert pvalues.binomial(losses[:, 0], zero) == pytest.approx(level)


def test_closed_forms(losses):
    n, x = len(losses), math.log(1 / 0.05)
    mean, deviation = losses.mean(0), losses.std(0, ddof=1)
    assert bounds.hoeffding(losses) == pytest.approx(np.minimum(mean + math.sqrt(x / (2 * n)), 1))
    x = math.log(2 / 0.05)
    expected = mean + deviation * math.sqrt(2 * x / n) + 7 * x / (3 * (n - 1))
    assert bounds.empirical_bernstein(losses) == pytest.approx(np.minimum(expected, 1))
    expected = np.maximum(
        mean + stats.norm.ppf(0.95) * deviation / math.sqrt(n), 1 - 0.05 ** (1 / n)
    )
    assert bounds.clt(losses) == pytest.approx(np.minimum(expected, 1))


def test_the_convex_order_is_never_looser_than_hoeffding_bentkus_nor_that_than_its_parts(losses):
    for level in (0.3, 0.05, 1e-5):
        best, both = (
            bounds.convex_order(losses, epsilon=level),
            bounds.hoeffding_bentkus(losses, epsilon=level),
        )
        assert (best <= both + 1e-12).all()
        assert (both <= bounds.bentkus(losses, epsilon=level) + 1e-12).all()
        assert (both <= bounds.hoeffding(losses, epsilon=level) + 1e-12).all()


def test_clt_says_first_that_it_is_asymptotic_and_is_never_the_mean_of_equal_losses():
    assert bounds.clt.__doc__.splitlines()[0].startswith(
        "Asymptotic, without any finite-sample guarantee"
    )
    assert bounds.clt(np.zeros(5), epsilon=0.05) == pytest.approx(1 - 0.05**0.2)
    assert bounds.clt(np.full(5, -1.0), epsilon=0.05, lower=-1.0) == pytest.approx(
        -1 + 2 * (1 - 0.05**0.2)
    )


def test_betting_returns_the_point_above_the_highest_that_is_not_rejected(losses):
    grid = np.linspace(0.005, 0.995, 199)
    for level in (0.1, 0.01):
        found = bounds.betting(
            losses, epsilon=level, grid=np.random.default_rng(0).permutation(grid)
        )
        rejected = (
            np.array([pvalues.betting(losses, delta, level=level) for delta in grid]) <= level
        )
        for j, bound in enumerate(found):
            kept = np.flatnonzero(~rejected[:, j])
            assert bound == (1.0 if kept[-1] == len(grid) - 1 else grid[kept[-1] + 1])


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.0), (2.0, 9.0)])
@pytest.mark.parametrize("n", [2, 20, 21, 333])
def test_betting_bounds_decide_as_betting_p_values_do(lower, upper, n):
    """One point of grid: the bound is at most delta if and only if p is at most the level."""
    rng = np.random.default_rng(n)
    losses = lower + (upper - lower) * np.where(
        rng.random((n, 150)) < 0.5, rng.random((n, 150)) ** 3, rng.random(150)
    )
    for share in (0.3, 0.5, 0.6):
        delta = lower + share * (upper - lower)
        p = pvalues.betting(losses, delta, level=0.05, lower=lower, upper=upper)
        decided = (
            bounds.betting(losses, epsilon=0.05, lower=lower, upper=upper, grid=[delta]) <= delta
        )
        assert np.array_equal(decided, p <= 0.05)


def test_a_finer_grid_gains_little():
    """The default grid costs at most .06 of the distance between the mean and the bound, on average, in four worlds."""
    rng = np.random.default_rng(9)
    shape = (400, 60)
    worlds = [
        (rng.random(shape) < 0.1) * 1.0,
        rng.beta(2, 18, shape),
        np.where(rng.random(shape) < 0.25, rng.beta(2, 3, shape), 0.0),
        np.where(rng.random(shape) < 0.4, rng.normal(0, 0.25, shape).clip(-1, 1), 0.0),
    ]
    for losses in worlds:
        lower = -1.0 if losses.min() < 0 else 0.0
        bound = bounds.betting(losses, lower=lower)
        fine = bounds.betting(losses, lower=lower, grid=np.linspace(lower, 0.4, 6000)[1:])
        assert 0 <= (bound - fine).mean() <= 0.06 * (fine - losses.mean(0)).mean()


@each_bound
def test_scaling_losses_and_range_scales_the_bound(name, losses):
    bound = getattr(bounds, name)(losses, epsilon=0.1)
    scaled = getattr(bounds, name)(losses * 40 + 2, epsilon=0.1, lower=2.0, upper=42.0)
    assert (scaled - 2) / 40 == pytest.approx(bound, rel=1e-6)


@each_bound
def test_a_column_and_a_matrix_agree_and_bounds_lie_between_mean_and_upper(name, losses):
    together = getattr(bounds, name)(losses)
    alone = [getattr(bounds, name)(losses[:, j]) for j in range(losses.shape[1])]
    assert all(type(bound) is float for bound in alone)
    assert together == pytest.approx(alone, rel=1e-12)
    assert (together >= losses.mean(0)).all()
    assert (together <= 1).all()
    assert together[5] == 1.0  # all losses are 1
    assert (getattr(bounds, name)(losses, epsilon=0.01) >= together).all()


@pytest.mark.parametrize(
    "name",
    ["convex_order", "hoeffding_bentkus", "bentkus", "hoeffding", "empirical_bernstein", "clt"],
)
def test_the_order_of_rows_does_not_matter(name, losses):
    shuffled = np.random.default_rng(1).permuted(losses, axis=0)
    assert getattr(bounds, name)(shuffled) == pytest.approx(getattr(bounds, name)(losses), rel=1e-9)


@each_bound
@pytest.mark.parametrize(
    ("given", "options", "named"),
    [
        ([0.1, float("nan")], {}, "losses: nan at index"),
        ([0.1, 1.2], {}, "losses: 1.2 at index"),
        ([0.1], {}, "losses: one row only"),
        ([], {}, "losses: is empty"),
        ([0.1, 0.2], {"epsilon": 0.0}, "epsilon: 0 is not"),
        ([0.1, 0.2], {"epsilon": 1.0}, "epsilon: 1 is not"),
        ([0.1, 0.2], {"lower": 1.0, "upper": 0.0}, "lower, upper"),
        ([0.1, 0.2], {"lower": 0.15}, "losses: 0.1 at index"),
    ],
)
def test_bad_input_is_refused_by_name(name, given, options, named):
    for call in (getattr(bounds, name), lambda *a, **b: bounds.simultaneous(*a, method=name, **b)):
        with pytest.raises(RiskcalError) as refusal:
            call(given, **options)
        assert str(refusal.value).startswith(named)


@pytest.mark.parametrize("grid", [[0.0], [1.0], [0.5, -0.1], [float("nan")], [], [[0.5]], "x"])
def test_a_bad_grid_is_refused(grid):
    with pytest.raises(RiskcalError, match=r"^grid: "):
        bounds.betting([0.1, 0.2], grid=grid)


def test_clopper_pearson_refuses_losses_between_0_and_1():
    with pytest.raises(RiskcalError, match=r"^losses: 0\.5 at row 1 is neither 0 nor 1"):
        bounds.clopper_pearson([0.0, 0.5])


@pytest.mark.parametrize("name", bounds.METHODS)
def test_simultaneous_bounds_share_epsilon_among_the_candidates(name, losses):
    losses = np.round(losses) if name == "clopper_pearson" else losses
    k = losses.shape[1]
    together = bounds.simultaneous(losses, epsilon=0.1, method=name)
    assert together == pytest.approx(getattr(bounds, name)(losses, epsilon=0.1 / k))
    assert bounds.simultaneous(losses[:, 2], epsilon=0.1, method=name).tolist() == [
        getattr(bounds, name)(losses[:, 2], epsilon=0.1)
    ]


def test_simultaneous_takes_the_deltas_that_a_user_would_settle_for(losses):
    deltas = [0.1, 0.3, 0.5]
    found = bounds.simultaneous(losses, method="betting", grid=deltas)
    assert set(found) <= {*deltas, 1.0}
    highest = pvalues.betting(losses, 0.5, level=0.05 / losses.shape[1])
    assert np.array_equal(found <= 0.5, highest <= 0.05 / losses.shape[1])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "wsr"}, "method: 'wsr' is unknown"),
        ({"method": "convex_order", "grid": [0.5]}, "grid: it belongs to method='betting'"),
        (
            {"method": "clopper_pearson", "lower": -1.0},
            "method: 'clopper_pearson' is for 0/1 losses",
        ),
        ({"epsilon": 2}, "epsilon: 2 is not"),
    ],
)
def test_simultaneous_refuses_by_name(options, named):
    with pytest.raises(RiskcalError) as refusal:
        bounds.simultaneous([[0.0, 1.0], [0.0, 0.0]], **options)
    assert str(refusal.value).startswith(named)


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.0), (2.0, 9.0)])
@pytest.mark.parametrize("n", [2, 50, 2000])
def test_the_default_grid_fills_the_range_and_is_finest_where_a_mean_varies_least(lower, upper, n):
    points = np.unique(default_grid(n, lower, upper))
    gaps = np.diff(points, prepend=lower, append=upper)
    assert lower < points[0] <= points[-1] < upper
    assert gaps.max() < (upper - lower) / (10.0 * math.sqrt(n))
    finest = 0.0 if lower < 0.0 < upper else upper
    # at a bound, or at zero, steps shrink with the square
    assert gaps[np.abs(points - finest).argmin()] < gaps.max() / (2.0 * math.sqrt(n))
