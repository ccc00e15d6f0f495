"""Prompts whose ids follow their difficulty: the order in which records stand must not reach the betting test.

Half of the prompts lose nothing, half .2; delta is .1, the true risk. So every certificate is false, and of 300 draws at
most .05 + 3 standard errors (.0126 each) = .088 may be certified.
"""

import numpy as np
import pandas as pd
import pytest

from riskcal import Runs, calibrate, pvalues

DRAWS, N = 300, 200


@pytest.fixture(scope="module")
def draws():
    """Samples (N,) of losses, easy prompts first."""
    rng = np.random.default_rng(0)
    return [np.sort(0.2 * (rng.random(N) < 0.5)) for _ in range(DRAWS)]


def names_by_difficulty(losses, kind):
    if kind == "int":
        return np.arange(N)
    level = np.where(losses > 0, "hard", "easy")
    return np.array([f"{level[i]}-{i:04d}" for i in range(N)], dtype=object)


def test_from_arrays(draws):
    for direction in (1, -1):
        false = sum(
            calibrate(losses[::direction, None], thresholds=[0.5], delta=0.1).certified
            for losses in draws
        )
        assert false <= 0.088 * DRAWS


@pytest.mark.parametrize("kind", ["int", "str"])
def test_from_tables_in_any_row_order(draws, kind):
    rng, false = np.random.default_rng(1), 0
    for losses in draws:
        names = names_by_difficulty(losses, kind)
        frame = pd.DataFrame({"prompt": names, "threshold": 0.5, "dissimilarity": losses})
        orders = (np.arange(N), np.arange(N)[::-1], rng.permutation(N))
        certified = {
            calibrate(Runs.from_frame(frame.iloc[order]), delta=0.1).certified for order in orders
        }
        assert len(certified) == 1
        false += certified.pop()
    assert false <= 0.088 * DRAWS


def test_from_clusters_whose_ids_follow_their_difficulty(draws):
    false = 0
    for losses in draws:
        cluster = names_by_difficulty(losses, "str")
        runs = Runs.from_arrays(
            thresholds=[0.5],
            dissimilarity=np.repeat(losses, 2)[:, None],
            cluster=np.repeat(cluster, 2),
        )
        calibration = calibrate(runs, delta=0.1)
        assert calibration.n == N
        false += calibration.certified
    assert false <= 0.088 * DRAWS


def test_rows_tested_as_they_stand_would_be_wrong_ten_times_too_often(draws):
    """The negative control: sorted rows, as a collector by difficulty would write them; all that saves is the mean seen."""
    sorted_rows = np.column_stack(draws)
    certified = pvalues.betting(sorted_rows, 0.1, level=0.05) <= 0.05
    assert certified.mean() > 0.4
    hard = (sorted_rows > 0).sum(0)
    assert not certified[hard > N // 2].any()
    assert certified[hard < N // 2].mean() > 0.9
