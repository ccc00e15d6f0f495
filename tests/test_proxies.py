"""A proxy of the loss, known of requests that nobody labelled: power where it is good, no harm where it lies."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from helpers import allowed
from riskcal import RiskcalError, Runs, calibrate, pvalues
from riskcal.calibration.proxies import _on_unit as on_unit
from riskcal.pvalues import bettor_kernels
from riskcal.pvalues.bettor import prior_variance
from riskcal.pvalues.proxies import Paired, of_pairs, paired, variance_left

DELTA, LEVEL = 0.1, 0.05


def even(rng, shape):
    """Losses that are mostly zero, else even up to .8: mean .1."""
    return np.where(rng.random(shape) < 0.25, 0.8 * rng.random(shape), 0.0)


def coins(rng, shape):
    return (rng.random(shape) < DELTA).astype(float)


PROXIES = {
    "good": lambda losses, rng: losses + 0.1 * rng.standard_normal(losses.shape),
    "useless": lambda losses, rng: rng.random(losses.shape),
    "lying": lambda losses, rng: 1 - losses + 0.1 * rng.standard_normal(losses.shape),
    "the loss": lambda losses, rng: losses,
    "heavy": lambda losses, rng: losses * rng.pareto(1.2, losses.shape),
}


def drawn(law, proxy, n, m, draws, rng, *, scale=1.0):
    """Losses, proxies and unlabelled proxies of so many draws, one a column."""
    both = scale * law(rng, (n + m, draws))
    known = PROXIES[proxy](both, rng)
    return both[:n], known[:n], known[n:]


@pytest.mark.parametrize("law", [even, coins])
@pytest.mark.parametrize("proxy", PROXIES)
def test_false_rejections_at_the_boundary(law, proxy):
    """2,000 draws at a mean of exactly delta: at most .05 and three standard errors (.015)."""
    given = drawn(law, proxy, 120, 300, 2000, np.random.default_rng(1))
    p = pvalues.betting_with_proxy(*given, DELTA, level=LEVEL)
    assert (p <= LEVEL).mean() <= 0.065


def test_a_good_proxy_gives_power_and_an_idle_one_takes_none():
    """300 draws, mean .08, paired: a difference of .3 has a standard error of .027, that of the idle proxy is below .01."""
    rng = np.random.default_rng(2)
    for proxy, least in (("good", 0.2), ("lying", 0.2), ("useless", -0.01)):
        losses, *known = drawn(even, proxy, 300, 3000, 300, rng, scale=0.8)
        plain = pvalues.betting(losses, DELTA, level=LEVEL) <= LEVEL
        helped = pvalues.betting_with_proxy(losses, *known, DELTA, level=LEVEL) <= LEVEL
        assert helped.mean() - plain.mean() >= least, proxy


def test_small_samples_lose_nothing_to_the_wider_range():
    """Forty zeros, which plain bets certify at their cap, are certified with any proxy."""
    rng = np.random.default_rng(3)
    losses = np.zeros((40, 1))
    p = pvalues.betting_with_proxy(losses, rng.random(40), rng.random(400), DELTA, level=LEVEL)
    assert p == pvalues.betting(losses, DELTA, level=LEVEL) <= LEVEL


def test_a_constant_proxy_changes_no_bet_and_a_scale_is_of_no_account():
    rng = np.random.default_rng(4)
    losses, proxy, unlabelled = drawn(even, "good", 300, 900, 20, rng, scale=0.8)
    plain = pvalues.betting(losses, DELTA, level=LEVEL)
    constant = pvalues.betting_with_proxy(losses, 0 * proxy, 0 * unlabelled, DELTA, level=LEVEL)
    assert constant == pytest.approx(plain, rel=1e-9)
    helped = pvalues.betting_with_proxy(losses, proxy, unlabelled, DELTA, level=LEVEL)
    moved = pvalues.betting_with_proxy(
        losses, 5 - 8 * proxy, 5 - 8 * unlabelled, DELTA, level=LEVEL
    )
    assert helped == pytest.approx(moved, rel=1e-6)
    assert (helped != plain).any()


GRID = [0.9, 0.6, 0.3]


def world(n, m, rng, *, mean=0.07):
    """Losses (n, 3) that grow as the threshold falls, proxies of them, and proxies of m other requests."""
    hard = rng.random((n + m, 1))
    losses = np.minimum(1.0, hard**4 * np.array([2.0, 5.0, 9.0]) * mean * 2.2)
    noisy = losses + 0.05 * rng.standard_normal(losses.shape)
    return losses[:n], noisy[:n], noisy[n:]


def named(n):
    return [f"request {i}" for i in range(n)]


def test_calibrate_certifies_more_with_a_proxy_and_says_what_it_saved():
    losses, proxy, unlabelled = world(250, 2500, np.random.default_rng(5))
    given = {"thresholds": GRID, "delta": 0.17, "prompts": named(250)}
    plain = calibrate(losses, **given)
    found = calibrate(losses, **given, proxy=proxy, unlabelled=unlabelled)
    assert plain.threshold > found.threshold
    assert found.certificate.test == "betting_with_proxy"
    share = float(found.chosen["variance_left"])
    assert share < 0.5
    assert f"{250 * (1 / share - 1):,.0f} labels beside these 250" in found.message


def test_arrays_and_runs_agree_whatever_the_order_of_rows_and_columns():
    rng = np.random.default_rng(6)
    losses, proxy, unlabelled = world(200, 1000, rng)
    proxy, unlabelled = abs(proxy), abs(unlabelled)
    ids = np.array(named(200))
    runs = Runs.from_arrays(
        thresholds=GRID, dissimilarity=losses, prompts=ids, costs={"guess": proxy}
    )
    of_runs = calibrate(runs, delta=0.2, proxy="guess", unlabelled=unlabelled)
    rows, columns = rng.permutation(200), [2, 0, 1]
    of_arrays = calibrate(
        losses[rows][:, columns],
        delta=0.2,
        thresholds=np.array(GRID)[columns],
        prompts=ids[rows],
        proxy=proxy[rows][:, columns],
        unlabelled=unlabelled[:, columns],
    )
    assert of_runs.table["pvalue"].to_numpy() == pytest.approx(of_arrays.table["pvalue"].to_numpy())
    assert of_runs.certified


def test_rows_and_unlabelled_rows_that_somebody_sorted_do_no_harm():
    """120 draws of 0/1 losses at exactly delta, all sorted: at most .05 and three standard errors (.06)."""
    rng, false = np.random.default_rng(7), 0
    for _ in range(120):
        losses, proxy, unlabelled = drawn(coins, "good", 100, 300, 1, rng)
        order = np.lexsort((proxy[:, 0], losses[:, 0]))
        found = calibrate(
            losses[order],
            delta=DELTA,
            thresholds=[0.5],
            proxy=proxy[order],
            unlabelled=np.sort(unlabelled, axis=0),
        )
        false += found.certified
    assert false / 120 <= 0.05 + 0.06


def test_a_pilot_takes_its_share_of_the_pairs():
    losses, proxy, unlabelled = world(300, 3000, np.random.default_rng(8))
    found = calibrate(
        losses,
        delta=0.2,
        thresholds=GRID,
        prompts=named(300),
        proxy=proxy,
        unlabelled=unlabelled,
        procedure="pilot_order",
    )
    assert found.certified
    assert found.n + len(found.pilot) == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unlabelled": None}, "unlabelled: a proxy is of use where"),
        ({"proxy": None}, "proxy: a proxy is of use where"),
        ({"test": "convex_order"}, "proxy: test 'convex_order' would not use it"),
        ({"delta": [0.1, 0.2]}, "delta: a proxy is for one delta"),
        ({"proxy": np.zeros((59, 3))}, "proxy: 59 rows for 60 labelled ones"),
        ({"proxy": np.zeros((60, 2))}, "proxy: 2 columns for 3 candidates"),
        ({"proxy": "layers"}, "proxy: 'layers' names a column"),
        ({"proxy": np.full((60, 3), np.nan)}, "proxy: nan at index"),
        ({"unlabelled": np.zeros((66, 3))}, "unlabelled: 66 rows for 60 .* give at least 67"),
        ({"prompts": ["a"] * 30 + ["b"] * 30}, "proxy: 60 rows of 2 prompts"),
    ],
)
def test_what_is_refused(change, message):
    losses, proxy, unlabelled = world(60, 67, np.random.default_rng(9))
    given = {"delta": 0.1, "thresholds": GRID, "proxy": proxy, "unlabelled": unlabelled}
    calibrate(losses, **given)  # 67 unlabelled rows are enough
    with pytest.raises(RiskcalError, match=message):
        calibrate(losses, **(given | change))


def test_labelled_requests_among_the_unlabelled_are_refused():
    losses, proxy, unlabelled = world(60, 600, np.random.default_rng(10))
    with pytest.raises(RiskcalError, match="all 60 labelled requests are among these 660"):
        calibrate(
            losses,
            delta=0.1,
            thresholds=GRID,
            proxy=proxy,
            unlabelled=np.concatenate([unlabelled, proxy]),
        )


def test_other_unlabelled_requests_than_the_labelled_ones_are_refused():
    losses, proxy, unlabelled = world(300, 3000, np.random.default_rng(11))
    for strange in (unlabelled + 0.5, unlabelled[:, ::-1]):
        with pytest.raises(RiskcalError, match="standard errors apart"):
            calibrate(losses, delta=0.1, thresholds=GRID, proxy=proxy, unlabelled=strange)


def test_a_table_of_unlabelled_requests_is_read_by_its_thresholds():
    losses, proxy, unlabelled = world(300, 3000, np.random.default_rng(12))
    given = {"delta": 0.2, "thresholds": GRID, "proxy": proxy}
    table = pd.DataFrame(unlabelled, columns=GRID)
    of_array = calibrate(losses, **given, unlabelled=unlabelled)
    of_table = calibrate(losses, **given, unlabelled=table[sorted(GRID)])
    assert of_array.table.equals(of_table.table)
    written = table.set_axis([f"{threshold:.2f}" for threshold in GRID], axis=1)  # "0.90" is 0.9
    of_texts = calibrate(losses, **given, unlabelled=written[written.columns[::-1]])
    assert of_array.table.equals(of_texts.table)
    with pytest.raises(RiskcalError, match=r"unlabelled: the table's columns are .*one each"):
        calibrate(losses, **given, unlabelled=table.set_axis([GRID[0]] * len(GRID), axis=1))
    with pytest.raises(RiskcalError, match=r"unlabelled: the table's columns are a, b, c"):
        calibrate(losses, **given, unlabelled=table.set_axis(["a", "b", "c"], axis=1))


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.8, 1.0])
def test_exact_by_counting_all_outcomes(agreement):
    """Five rows of a 0/1 loss, its proxy (the loss in so many of ten cases) and its partner: 32,768 outcomes, no chance left."""
    mean = 0.4
    outcomes = np.array(list(itertools.product(itertools.product([0.0, 1.0], repeat=3), repeat=5)))
    losses, proxies, partners = outcomes.transpose(2, 1, 0)
    same = np.where(losses == proxies, agreement, 1 - agreement)
    share = agreement * mean + (1 - agreement) * (1 - mean)  # of proxies that are 1
    chances = np.where(losses == 1, mean, 1 - mean) * same
    chances = (chances * np.where(partners == 1, share, 1 - share)).prod(0)
    assert chances.sum() == pytest.approx(1)
    pairs = Paired(proxies, partners)
    p = of_pairs(np.ascontiguousarray(losses), pairs, mean, level=0.3, lower=0.0, upper=1.0)
    order = np.argsort(p, kind="stable")
    reached, values = np.cumsum(chances[order]), p[order]
    last = np.r_[values[1:] != values[:-1], True]
    assert (reached[last] <= values[last] + 1e-9).all()
    assert len(np.unique(p.round(9))) > 20


def test_a_direction_told_to_calibrate_turns_the_proxies_with_the_losses():
    """Were a candidate's losses set beside another's partners, whose mean is .015 higher, 39 of these 40 would be certified."""
    n, m, grid, certified = 1000, 10_000, [0.1, 0.9], 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        losses = rng.random((n + m, 1)) * np.array([0.4, 0.4])
        guess = losses + rng.normal(0, 0.02, losses.shape) + np.array([0.2, 0.215])
        runs = Runs.from_arrays(
            thresholds=grid,
            dissimilarity=losses[:n],
            prompts=[f"r{i}" for i in range(n)],
            costs={"guess": guess[:n]},
        )
        others = pd.DataFrame(guess[n:], columns=grid)
        found = calibrate(runs, delta=0.2, proxy="guess", unlabelled=others, lower_is_stricter=True)
        certified += found.certified
        assert "variance_left" not in found.costs
    assert certified <= allowed(0.05, 40) * 40


def test_clusters_are_refused_and_their_means_are_what_helps():
    rng = np.random.default_rng(20)
    sources = rng.random((400, 1)) * 0.15
    losses = np.repeat(sources, 3, axis=0) + 0.01 * rng.random((1200, 2))
    runs = Runs.from_arrays(
        thresholds=[0.7, 0.5],
        dissimilarity=losses,
        layers=8 - 8 * losses,
        prompts=[f"q{i}" for i in range(1200)],
        cluster=[f"c{i // 3}" for i in range(1200)],
    )
    others = 8 - 8 * (rng.random((3000, 1)) * 0.15 + 0.01 * rng.random((3000, 2)))
    with pytest.raises(RiskcalError, match=r"proxy: .*clusters; leave it out, or .*unit_means"):
        calibrate(runs, delta=0.1, proxy="layers", unlabelled=others)
    assert calibrate(runs, delta=0.1).certified  # left out
    found = calibrate(
        runs.losses(),
        thresholds=runs.thresholds,
        prompts=runs.units,
        delta=0.1,
        proxy=runs.unit_means(runs.values["layers"]),
        unlabelled=others,
    )
    assert found.n == 400
    assert (found.table["variance_left"] < 0.2).all()


def test_a_proxy_that_says_the_same_of_every_row_leaves_the_bets_as_they_were() -> None:
    """Its gaps are zero, so that every sum that begins at nothing stays there."""
    rng = np.random.default_rng(4)
    losses = rng.beta(1, 15, (120, 4))
    arguments = (0.1, 0.0, 1.0, math.log(0.05 / bettor_kernels.MARGIN), 0.09, bettor_kernels.HEDGE)
    plain = bettor_kernels.betting_log_capital(losses, *arguments)
    capital, mean = bettor_kernels.helped_log_capital(losses, np.zeros_like(losses), *arguments)
    assert capital == pytest.approx(plain)
    assert plain.min() > 0.0
    assert mean == pytest.approx(losses.mean(0))


@pytest.mark.parametrize(
    ("lower", "upper", "delta"),
    [
        *[(lower, 1.0, delta) for lower in (0.0, -1.0) for delta in (0.02, 0.1, 0.3)],
        (-1.0, 1.0, -0.3),  # the losses' reach above delta is more than 1
        (0.0, 5.0, 0.5),
        (2.0, 3.0, 2.2),
    ],
)
@pytest.mark.parametrize("level", [0.05, 1e-6])
def test_no_losses_and_no_proxy_bring_the_capital_below_nothing(lower, upper, delta, level):
    """The largest stakes come after good rows, and then every row is the worst: more than all would have been at stake."""
    rng, prior = np.random.default_rng(0), prior_variance(delta, lower, upper)
    opening = math.log(level / bettor_kernels.MARGIN)
    # as Python, whose logarithm raises below 0: compiled, the largest capital would hide it
    walk = getattr(bettor_kernels.helped_log_capital, "py_func", bettor_kernels.helped_log_capital)
    for good in (5, 20, 60, 200):
        n = good + 40
        best = np.full(n, lower)
        best[good:] = upper
        some = np.where((rng.random(n) < 0.1) & (np.arange(n) < good), lower + 0.3, best)
        coin = np.where(rng.random(n) < 0.5, 0.01, -0.01)
        # a proxy that told all of the losses, until it is as wrong as it can be
        told = np.where(np.arange(n) < good, some - lower, -1.0)
        for losses, gaps in [(best, coin), (some, coin), (some, some - some.mean()), (some, told)]:
            capital, _ = walk(
                *(losses[:, None], gaps[:, None], delta, lower, upper),
                *(opening, prior, bettor_kernels.HEDGE),
            )
            assert np.isfinite(capital).all()


def test_the_variance_that_a_proxy_leaves_is_what_it_does_not_explain():
    """One less the squared cosine of gaps and losses about their mean: all where there are no gaps, none where they tell all."""
    rng = np.random.default_rng(14)
    for n in (5, 50):
        losses = rng.random((n, 5))
        centred = losses - losses.mean(0)
        gaps = centred + rng.random((n, 5)) * [0.0, 0.2, 1.0, 5.0, 0.0]
        gaps[:, 4] = 0.0
        share = variance_left(losses, Paired(gaps + 0.5, np.full_like(gaps, 0.5)))
        for j in range(4):
            length = np.linalg.norm(centred[:, j]) * np.linalg.norm(gaps[:, j])
            assert share[j] == pytest.approx(1 - (centred[:, j] @ gaps[:, j] / length) ** 2)
        assert share[0] == pytest.approx(0)
        assert share[4] == 1.0
        assert share.min() >= 0.0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rows_and_partners_lie_in_the_unit_interval_and_those_set_aside_are_no_partners(scale):
    """By a loop; of 47 unlabelled rows 5 are set aside and 10 labelled ones have four each, so that two more are too."""
    rng = np.random.default_rng(15)
    proxy, unlabelled = scale * rng.normal(1, 2, (10, 3)), scale * rng.normal(1, 2, (47, 3))
    pairs = paired(proxy, unlabelled)
    low, high = unlabelled[40:].min(0), unlabelled[40:].max(0)

    def scaled(row):
        return (np.clip(row, low, high) - low) / (high - low)

    for i in range(10):
        partners = [scaled(unlabelled[j]) for j in range(4 * i, 4 * i + 4)]
        assert pairs.proxies[i] == pytest.approx(scaled(proxy[i]))
        assert pairs.partners[i] == pytest.approx(np.mean(partners, axis=0))
    for values in pairs:
        assert values.min() >= 0.0
        assert values.max() <= 1.0
    assert pairs.gaps == pytest.approx(pairs.proxies - pairs.partners)


def test_a_mean_of_delta_to_the_last_bit_has_the_p_value_one_with_a_proxy_too():
    rng = np.random.default_rng(17)
    losses = np.array([0.0] * 30 + [0.25] * 30)
    proxy, unlabelled = losses + rng.random(60), 0.25 * rng.integers(0, 2, 600) + rng.random(600)
    assert pvalues.betting_with_proxy(losses, proxy, unlabelled, 0.125, level=0.05) == 1.0


@pytest.mark.parametrize("shift", [-1.0, 2.0])
def test_losses_delta_and_bounds_may_be_shifted_beside_a_proxy(shift):
    rng = np.random.default_rng(19)
    losses = rng.integers(0, 2, 80) * 0.25
    proxy, unlabelled = losses + 0.1 * rng.random(80), 0.25 * rng.integers(0, 2, 800)
    plain = pvalues.betting_with_proxy(losses, proxy, unlabelled, 0.25, level=0.05)
    moved = pvalues.betting_with_proxy(
        losses + shift, proxy, unlabelled, 0.25 + shift, level=0.05, lower=shift, upper=1 + shift
    )
    assert plain < 1.0
    assert moved == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_each_candidate_has_the_partners_of_its_own_column(k):
    rng = np.random.default_rng(18)
    proxy, unlabelled = rng.random((20, k)), rng.random((200, k))
    pairs = paired(proxy, unlabelled)
    assert pairs.proxies.shape == pairs.partners.shape == (20, k)
    for j in range(k):
        alone = paired(proxy[:, [j]], unlabelled[:, [j]])
        np.testing.assert_allclose(alone.partners, pairs.partners[:, [j]], rtol=1e-12)
        np.testing.assert_array_equal(alone.proxies, pairs.proxies[:, [j]])


def test_a_mean_that_is_not_below_delta_has_the_p_value_one():
    rng = np.random.default_rng(16)
    losses = np.where(np.arange(60)[:, None] < 40, 0.0, [[0.2, 0.4]])
    p = pvalues.betting_with_proxy(losses, rng.random(60), rng.random(600), 0.1, level=0.05)
    assert p[0] < 1.0
    assert p[1] == 1.0
    rng = np.random.default_rng(16)
    alone = pvalues.betting_with_proxy(
        losses[:, 0], rng.random(60), rng.random(600), 0.1, level=0.05
    )
    assert alone == p[0]
    assert isinstance(alone, float)


def test_a_budget_beside_the_loss_does_not_hide_that_a_proxy_helped():
    losses, proxy, unlabelled = world(250, 2500, np.random.default_rng(5))
    runs = Runs.from_arrays(
        thresholds=GRID, dissimilarity=losses, prompts=named(250), costs={"price": 0.1 + 0 * losses}
    )
    given = {"delta": 0.17, "proxy": proxy, "unlabelled": unlabelled}
    found = calibrate(runs, **given, budget={"price": (0.5, 1.0)})
    assert found.certificate.test == "betting_with_proxy"
    assert "The proxy " in found.message


def test_proxies_on_both_sides_of_zero_are_those_above_it():
    losses, proxy, unlabelled = (
        np.round(16 * a) for a in world(60, 600, np.random.default_rng(17))
    )
    given = {"delta": 0.3, "thresholds": GRID, "prompts": named(60)}
    proxy, unlabelled = np.clip(proxy, 0, 16), np.clip(unlabelled, 0, 16)
    unlabelled[0], unlabelled[1] = 0, 16
    plain, moved = (
        calibrate(losses / 16, **given, proxy=s * proxy - t, unlabelled=s * unlabelled - t)
        for s, t in ((1, 0), (2, 16))
    )
    assert moved.table.equals(plain.table)


def shares_of_ones(n, *shares):
    """Columns (n, k) of zeros and ones of which so many are ones."""
    return (np.arange(n)[:, None] < np.array(shares)).astype(float)


@pytest.mark.parametrize(("ones", "apart"), [(344, "8"), (310, None)])
def test_the_first_candidate_that_is_strange_is_named_with_its_distance(ones, apart):
    """Of 100 labelled and 400 others that are 0 or 1, the second column's means stand 7.9 or 5.5 of its standard errors apart."""
    proxy, unlabelled = shares_of_ones(100, 50, 50), shares_of_ones(400, 200, ones)
    p = (50 + ones) / 500
    error = math.sqrt(p * (1 - p) * (1 / 100 + 1 / 400))
    distance = (ones / 400 - 0.5) / error
    given = {
        "thresholds": [0.9, 0.5],
        "delta": 0.1,
        "proxy": proxy,
        "unlabelled": unlabelled,
    }
    if apart is None:
        assert distance < 6.0
        assert calibrate(np.zeros((100, 2)), **given).certified
        return
    assert f"{distance:.0f}" == apart
    said = f"at threshold 0.5 the mean of their proxies .* are {apart} standard errors apart .1 candidates so"
    with pytest.raises(RiskcalError, match=said):
        calibrate(np.zeros((100, 2)), **given)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_proxy_that_is_one_number_bets_as_none_does_and_is_said_to_have_saved_nothing(value):
    losses = coins(np.random.default_rng(14), (200, 1)) * 0.5
    given = {"thresholds": [0.5], "delta": 0.2, "prompts": named(200)}
    idle = {"proxy": np.full(200, value), "unlabelled": np.full(900, value)}
    found = calibrate(losses, **given, **idle)
    assert found.table["variance_left"].tolist() == [1.0]
    assert "The proxy saved no labels" in found.message
    halved = calibrate(losses, **given, proxy=losses[:, 0] > 0, unlabelled=shares_of_ones(900, 90))
    assert "The proxy saved no labels" not in halved.message


def test_proxies_of_a_few_values_are_no_sign_that_requests_stand_on_both_sides():
    losses = coins(np.random.default_rng(15), (100, 1))
    unlabelled = coins(np.random.default_rng(16), (900, 1))
    found = calibrate(losses, thresholds=[0.5], delta=0.3, proxy=losses, unlabelled=unlabelled)
    assert found.certified


@pytest.mark.parametrize("scale", [1.0, 1e-300, 8e307])
def test_labelled_and_other_proxies_are_mapped_to_the_unit_interval_by_their_common_range(scale):
    """A column of one number goes to 0; whichever sample holds the ends of the others, and however far apart they are."""
    known = np.array([[-1.0, 0.0, -1.0, 0.0, 2.0], [1.0, 0.5, 0.0, 1.0, 2.0]])
    others = np.array([[0.0, -1.0, 0.0, -1.0, 2.0], [0.5, 1.0, 1.0, 0.0, 2.0]])
    with np.errstate(all="raise"):
        found = on_unit(scale * known, scale * others)
    for one, raw in zip(found, (known, others), strict=True):
        assert one[:, :4] == pytest.approx(0.5 + 0.5 * raw[:, :4])
        assert one[:, 4].tolist() == [0.0, 0.0]
