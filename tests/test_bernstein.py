"""Empirical Bernstein, its predictable form, and the z-test: references, invariances, refusals."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from riskcal import RiskcalError, pvalues

TESTS = {
    "empirical_bernstein": pvalues.empirical_bernstein,
    "predictable_bernstein": lambda losses, delta, **bounds: pvalues.predictable_bernstein(
        losses, delta, level=0.05, **bounds
    ),
    "clt": pvalues.clt,
}
each_test = pytest.mark.parametrize("test", TESTS.values(), ids=TESTS.keys())


@pytest.fixture
def losses():
    rng = np.random.default_rng(5)
    sizes = rng.beta(2, 3, (80, 6))
    return np.where(rng.random((80, 6)) < [0.0, 0.05, 0.1, 0.3, 0.6, 1.0], sizes, 0.0)


def test_empirical_bernstein_is_the_level_at_which_the_bound_meets_delta(losses):
    n, delta = len(losses), 0.55
    expected = []
    for column in losses.T:
        mean, variance = column.mean(), column.var(ddof=1)

        def excess(x, mean=mean, variance=variance):
            return mean + math.sqrt(2 * variance * x / n) + 7 * x / (3 * (n - 1)) - delta

        x = optimize.brentq(excess, 0, 1000, xtol=1e-14) if mean < delta else 0.0
        expected.append(min(1.0, 2 * math.exp(-x)))
    assert pvalues.empirical_bernstein(losses, delta) == pytest.approx(expected, rel=1e-9)


def test_empirical_bernstein_by_hand():
    """Two losses of 0: 7 x / 3 = delta."""
    assert pvalues.empirical_bernstein([0.0, 0.0], 0.7) == pytest.approx(min(1, 2 * math.exp(-0.3)))
    assert pvalues.empirical_bernstein(np.zeros(1000), 0.5) == pytest.approx(
        2 * math.exp(-0.5 * 3 * 999 / 7)
    )
    assert pvalues.empirical_bernstein([0.5, 0.7], 0.6) == 1.0


def plain_predictable(losses, delta, level):
    """The process as it is written, one loss after the other."""
    n, log_process, best = len(losses), 0.0, 0.0
    means, square = [], 0.25
    for t, loss in enumerate(losses):
        before = (0.5 + sum(losses[:t])) / (t + 1)
        bet = min(math.sqrt(2 * math.log(1 / level) / (n * square / (t + 1))), 0.5)
        psi = (-math.log(1 - bet) - bet) / 4
        log_process += bet * (delta - loss) - 4 * (loss - before) ** 2 * psi
        best = max(best, log_process)
        means.append((0.5 + sum(losses[: t + 1])) / (t + 2))
        square += (loss - means[-1]) ** 2
    return math.exp(-best)


@pytest.mark.parametrize("level", [0.1, 0.05, 0.001])
def test_predictable_bernstein_is_the_plain_process(losses, level):
    expected = [plain_predictable(column.tolist(), 0.3, level) for column in losses.T]
    assert pvalues.predictable_bernstein(losses, 0.3, level=level) == pytest.approx(
        expected, rel=1e-9
    )


def test_so_it_is_where_bets_follow_the_variance_and_none_is_capped() -> None:
    losses = np.random.default_rng(6).beta(0.5, 0.5, (400, 3))
    expected = [plain_predictable(column.tolist(), 0.62, 0.05) for column in losses.T]
    found = pvalues.predictable_bernstein(losses, 0.62, level=0.05)
    assert found == pytest.approx(expected, rel=1e-9)
    assert max(expected) < 0.9  # the process went somewhere


def test_each_step_of_the_predictable_process_shrinks_on_average_at_the_null():
    """E exp(bet (delta - loss) + (loss - m)^2 (log(1 - bet) + bet)) <= 1 for every two-point law of mean delta: on a grid."""
    low, high, m, bet = np.meshgrid(
        np.linspace(0, 0.3, 13),
        np.linspace(0.3001, 1, 15),
        np.linspace(0, 1, 21),
        np.linspace(0, 0.5, 11),
    )
    delta = 0.3
    share = (delta - low) / (high - low)

    def factor(loss):
        return np.exp(bet * (delta - loss) + (loss - m) ** 2 * (np.log1p(-bet) + bet))

    assert ((1 - share) * factor(low) + share * factor(high)).max() <= 1 + 1e-12


def test_clt_is_the_z_test_where_the_losses_vary(losses):
    delta = 0.12
    z = (losses.mean(0) - delta) / (losses.std(0, ddof=1) / math.sqrt(len(losses)) + 1e-300)
    assert pvalues.clt(losses, delta) == pytest.approx(
        np.maximum(stats.norm.cdf(z), (1 - delta) ** len(losses))
    )


def test_clt_says_first_that_it_is_asymptotic():
    assert pvalues.clt.__doc__.splitlines()[0].startswith(
        "Asymptotic, without any finite-sample guarantee"
    )


def test_clt_of_losses_that_do_not_vary_is_the_exact_answer_to_zeros_not_0():
    assert pvalues.clt(np.zeros(5), 0.01) == pytest.approx(0.99**5)
    assert pvalues.clt(np.full(5, -1.0), -0.98, lower=-1.0) == pytest.approx(0.99**5)
    assert pvalues.clt([0.0, 0.0, 0.0, 0.0, 1e-12], 0.01) == pytest.approx(0.99**5)
    assert pvalues.clt(np.full(50, 0.3), 0.2) == 1.0
    assert pvalues.clt(np.full(4, 0.25), 0.25) == 0.5


@each_test
def test_a_column_and_a_matrix_agree(test, losses):
    together = test(losses, 0.2)
    assert isinstance(together, np.ndarray)
    alone = [test(losses[:, j], 0.2) for j in range(losses.shape[1])]
    assert all(type(p) is float for p in alone)
    assert together == pytest.approx(alone, rel=1e-12)


@each_test
def test_scaling_losses_delta_and_bounds_together_changes_nothing(test, losses):
    expected = test(losses, 0.2)
    assert test(losses * 40 - 7, 0.2 * 40 - 7, lower=-7.0, upper=33.0) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("test", [pvalues.empirical_bernstein, pvalues.clt])
def test_the_order_of_rows_does_not_matter(test, losses):
    shuffled = np.random.default_rng(1).permuted(losses, axis=0)
    assert test(shuffled, 0.2) == pytest.approx(test(losses, 0.2), rel=1e-9)


@each_test
def test_p_values_fall_as_delta_rises_and_never_leave_the_unit_interval(test, losses):
    along = np.array([test(losses, delta) for delta in np.linspace(0.01, 0.99, 40)])
    assert (along > 0).all()
    assert (along <= 1).all()
    assert (np.diff(along, axis=0) <= 1e-12).all()


@each_test
def test_many_losses_of_zero_do_not_underflow(test):
    assert 0 < test(np.zeros(200_000), 0.5) < 1e-12


@each_test
@pytest.mark.parametrize(
    ("given", "delta", "bounds", "named"),
    [
        ([0.1, float("nan")], 0.2, {}, "losses: nan at index"),
        ([0.1, float("inf")], 0.2, {}, "losses: inf at index"),
        ([0.1, 1.2], 0.2, {}, "losses: 1.2 at index"),
        ([0.1, -0.2], 0.2, {}, "losses: -0.2 at index"),
        ([0.1], 0.2, {}, "losses: one row only"),
        ([], 0.2, {}, "losses: is empty"),
        ([0.1, 0.2], 0.0, {}, "delta: 0 is not strictly between"),
        ([0.1, 0.2], 1.0, {}, "delta: 1 is not strictly between"),
        ([0.1, 0.2], float("nan"), {}, "delta: is NaN"),
        ([0.1, 0.2], 0.2, {"lower": 1.0, "upper": 0.0}, "lower, upper"),
    ],
)
def test_bad_input_is_refused_by_name(test, given, delta, bounds, named):
    with pytest.raises(RiskcalError) as refusal:
        test(given, delta, **bounds)
    assert str(refusal.value).startswith(named)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, float("nan"), "x"])
def test_predictable_bernstein_needs_a_level(level):
    with pytest.raises(RiskcalError, match=r"^level: "):
        pvalues.predictable_bernstein([0.1, 0.2], 0.3, level=level)
