"""Counts of two-valued losses: whatever the two values are, the answer is that of zeros and ones."""

import numpy as np
import pytest

from riskcal import pvalues
from riskcal.calibration import counts, problem
from riskcal.calibration.counts import bounds_of_counts, count_pvalue, of_counts
from riskcal.pvalues.proxies import Paired, paired


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 0.5), (2.0, 9.0)])
def test_the_two_values_only_scale_what_the_count_says(low: float, high: float) -> None:
    ones = (np.random.default_rng(0).random((60, 3)) < [0.1, 0.3, 0.6]).astype(float)
    plain = bounds_of_counts(ones, 0.05)
    assert (plain > ones.mean(0)).all()
    assert (plain < 1.0).all()
    scaled = bounds_of_counts(low + (high - low) * ones, 0.05)
    assert scaled == pytest.approx(low + (high - low) * plain)
    for count in (0, 3, 20):
        found = count_pvalue(count, 60, (low, high), low + (high - low) * 0.2)
        assert found == pytest.approx(count_pvalue(count, 60, (0.0, 1.0), 0.2))


def test_a_count_says_nothing_more_where_a_proxy_tells_rows_of_equal_losses_apart() -> None:
    """Their order is then drawn from the proxies too, and whatever the bets are worth, they are worth alone."""
    rng = np.random.default_rng(1)
    losses = (rng.random((90, 3)) < [0.05, 0.1, 0.1]).astype(float)
    losses[:, 2] = rng.random(90)  # of more than two values: no claim either
    alone = problem.TestedRisk("losses", losses, 0.3, 0.0, 1.0)
    counted = of_counts(alone)
    assert (counted[:2] > 0.0).all()
    assert counted[2] == 0.0
    proxy, others = rng.random((90, 3)), rng.random((400, 3))
    assert of_counts(alone._replace(pairs=paired(proxy, others))).tolist() == [0.0] * 3
    proxy[:, 0], others[:, 0] = 0.4, 0.4  # tells nothing apart
    told = of_counts(alone._replace(pairs=paired(proxy, others)))
    assert told.tolist() == [counted[0], 0.0, 0.0]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.2, 0.7), (-1.0, 1.0), (2.0, 7.0), (2e6, 7e6)]
)
def test_losses_of_two_values_have_the_exact_p_value_of_their_count(
    low: float, high: float
) -> None:
    """Also where rounding has made more values of the two."""
    rng = np.random.default_rng(0)
    wrong = (rng.random((80, 5)) < [0.02, 0.1, 0.2, 0.3, 0.6]).astype(float)
    wrong[0], wrong[1] = 0.0, 1.0
    expected = pvalues.binomial(wrong, 0.25)
    for noise in (0.0, 1e-12):
        losses = low + (high - low) * wrong + noise * max(1.0, high) * rng.random(wrong.shape)
        found = [counts.of_count(column, low + 0.25 * (high - low)) for column in losses.T]
        assert found == pytest.approx(expected)
    assert counts.of_count(np.array([low, high, 0.9 * low + 0.1 * high]), 0.5 * (low + high)) == 0.0


@pytest.mark.parametrize("proxy_of", [(0.5, 0.0), (0.0, 0.5), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 1e-6), (-3.0, 9.0)])
def test_a_proxy_that_only_says_the_loss_over_again_takes_no_count_away(
    proxy_of: tuple[float, float], low: float, high: float
) -> None:
    """Rows of one loss have one proxy, and stand as without it, though loss and proxy may add up to one number."""
    wrong = (np.random.default_rng(2).random((90, 1)) < 0.1).astype(float)
    alone = problem.TestedRisk("l", low + (high - low) * wrong, 0.7 * low + 0.3 * high, low, high)
    proxies = np.where(wrong == 1.0, proxy_of[1], proxy_of[0])
    told = of_counts(alone._replace(pairs=Paired(proxies, np.zeros_like(proxies))))
    assert told.tolist() == of_counts(alone).tolist()
    assert (told > 0.0).all()
