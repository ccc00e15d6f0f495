"""Which mean a certificate of clusters is about, and the mean over requests where that is wanted."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riskcal import RiskcalError, Runs, calibrate
from riskcal.calibration import posing

DRAWS = 400


def heavy_users(
    rng: np.random.Generator, clusters: int, *, heavy: float, light: float
) -> pd.DataFrame:
    """A tenth of the users sends 10 requests each, of which more fail; the others send one."""
    size = np.where(rng.random(clusters) < 0.1, 10, 1)
    user = np.repeat(np.arange(clusters), size)
    fails = rng.random(user.size) < np.where(size[user] == 10, heavy, light)
    return pd.DataFrame(
        {
            "prompt": np.arange(user.size),
            "cluster": user,
            "threshold": 0.5,
            "dissimilarity": fails * 1.0,
        }
    )


def test_sizes_that_follow_difficulty_break_the_mean_over_requests_and_weighting_mends_it() -> None:
    """Mean over requests exactly .1 (10 x .17 and 9 x .022 of 19), over clusters .037; epsilon .05.

    400 draws: three standard errors of a rate of .05 are .033.
    """
    heavy, light = 0.17, (0.1 * 19 - 1.7) / 9
    false = {"clusters": 0, "requests": 0}
    for seed in range(DRAWS):
        runs = Runs.from_frame(
            heavy_users(np.random.default_rng(seed), 400, heavy=heavy, light=light)
        )
        false["clusters"] += calibrate(runs, delta=0.1, weighting="clusters").certified
        false["requests"] += calibrate(
            runs, delta=0.1, weighting="requests", max_cluster=10
        ).certified
    assert false["requests"] / DRAWS <= 0.05 + 0.033
    assert false["clusters"] / DRAWS > 0.5  # what "a new prompt" would have been worth


def test_weighting_by_requests_certifies_what_is_well_below_delta() -> None:
    certified = 0
    for seed in range(50):
        runs = Runs.from_frame(
            heavy_users(np.random.default_rng(seed), 400, heavy=0.05, light=0.02)
        )
        found = calibrate(runs, delta=0.1, weighting="requests", max_cluster=10)
        certified += found.certified
    assert certified >= 40


@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=12),
    seed=st.integers(0, 1000),
    objective=st.sampled_from(["textual", "risk"]),
)
@settings(deadline=None, max_examples=40)
def test_the_unit_loss_has_the_losses_bounds_and_its_mean_the_sign_of_the_mean_over_requests(
    sizes: list[int], seed: int, objective: str
) -> None:
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    n = len(cluster)
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.5],
        cluster=cluster,
        dissimilarity=rng.random((n, 2)),
        risk=rng.random((n, 2)),
        full_risk=rng.random(n),
        layers=rng.random((n, 2)),
    )
    delta = 0.3
    problem = posing.from_runs(runs, {objective: delta}, weighting="requests", max_cluster=6)
    [risk] = problem.risks
    mean = runs.prompt_losses(objective).mean(0)
    assert (risk.losses >= risk.lower - 1e-12).all()
    assert (risk.losses <= risk.upper + 1e-12).all()
    np.testing.assert_allclose(problem.mean(risk), mean)
    assert np.array_equal(risk.losses.mean(0) > delta + 1e-12, mean > delta + 1e-12)
    np.testing.assert_allclose(problem.costs["layers"].mean(0), runs.values["layers"].mean(0))


def users(sizes: list[int]) -> Runs:
    user = np.repeat(np.arange(len(sizes)), sizes)
    return Runs.from_arrays(
        thresholds=[0.9, 0.5], cluster=user, dissimilarity=np.zeros((len(user), 2))
    )


def test_unequal_sizes_are_warned_about_once_and_equal_ones_are_not() -> None:
    with pytest.warns(
        UserWarning,
        match=r"cluster: sizes differ, from 1 to 3 prompts.*random cluster, not of a random prompt",
    ):
        calibrate(users([1, 3] * 30), delta=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(users([2] * 60), delta=0.1)
        calibrate(users([1, 3] * 30), delta=0.1, weighting="clusters")
        calibrate(users([1, 3] * 30), delta=0.1, weighting="requests", max_cluster=3)


def test_the_sentence_and_the_certificate_say_which_mean() -> None:
    of_clusters = calibrate(users([2] * 60), delta=0.1)
    assert (
        "as the mean over clusters, each cluster counting alike whatever its size"
        in of_clusters.message
    )
    assert of_clusters.policy().certificate.weighting == "clusters"
    of_requests = calibrate(users([1, 3] * 30), delta=0.1, weighting="requests", max_cluster=3)
    assert "as the mean over requests" in of_requests.message
    certificate = of_requests.policy().certificate
    assert (certificate.weighting, certificate.max_cluster) == ("requests", 3)
    prompts = calibrate(
        Runs.from_arrays(thresholds=[0.5], dissimilarity=np.zeros((60, 1))), delta=0.1
    )
    assert prompts.policy().certificate.weighting == "prompts"
    assert "as the mean" not in prompts.message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "requests"}, "max_cluster: weighting='requests' needs"),
        (
            {"weighting": "requests", "max_cluster": 2},
            r"max_cluster: cluster \d+ has 3 prompts \(30 clusters exceed 2\)",
        ),
        ({"max_cluster": 3}, "max_cluster: belongs to weighting='requests'"),
        ({"weighting": "prompts"}, "weighting: 'prompts' is unknown"),
        (
            {"weighting": "requests", "max_cluster": 3, "delta": [0.1, 0.2]},
            "weighting: 'requests' is for one delta",
        ),
    ],
)
def test_weighting_is_refused_where_it_means_nothing(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(RiskcalError, match=words):
        calibrate(users([1, 3] * 30), **({"delta": 0.1} | options))


def test_so_does_that_of_arrays_whose_prompts_have_rows_in_unequal_numbers() -> None:
    """Ten users with five requests each that lose .2, ninety with one that loses .02: .084 a request, .038 a user."""
    user = np.repeat(np.arange(100), np.where(np.arange(100) < 10, 5, 1))
    losses = np.where(user < 10, 0.2, 0.02)[:, None]
    found = calibrate(losses, thresholds=[0.5], delta=0.1, prompts=user)
    assert found.certified
    assert (
        "(observed 0.038), as the mean over prompts, each counting alike however" in found.message
    )
    other = calibrate(losses, thresholds=[0.5], delta=0.1, prompts=user.astype(">i8"))
    assert other.message == found.message
    even = calibrate(
        np.full((200, 1), 0.02), thresholds=[0.5], delta=0.1, prompts=np.arange(200) // 2
    )
    assert "counting alike" not in even.message


def test_weighting_is_for_runs_with_clusters() -> None:
    runs = Runs.from_arrays(thresholds=[0.5], dissimilarity=np.zeros((60, 1)))
    with pytest.raises(RiskcalError, match="weighting: 'requests' is for runs with clusters"):
        calibrate(runs, delta=0.1, weighting="requests", max_cluster=3)
    with pytest.raises(RiskcalError, match="weighting: is for Runs with clusters"):
        calibrate(np.zeros((60, 1)), thresholds=[0.5], delta=0.1, weighting="requests")


def test_two_clusters_can_be_tested_and_one_cannot() -> None:
    assert calibrate(users([2, 2]), delta=0.9, epsilon=0.5).n == 2
    with pytest.raises(RiskcalError, match="cluster: all prompts are of one, 0; a test needs"):
        calibrate(users([4]), delta=0.9, epsilon=0.5)
    with pytest.raises(RiskcalError, match=r"has 3 prompts \(1 clusters exceed 2\)"):
        calibrate(users([2] * 20 + [3]), delta=0.9, weighting="requests", max_cluster=2)


def test_the_mean_over_requests_is_what_the_table_and_the_sentence_show() -> None:
    """The one in three users who send three requests lose all of them: 3 of 5, and by risk 1 at all."""
    user = np.repeat(np.arange(90), np.tile([3, 1, 1], 30))
    lost = np.bincount(user)[user] == 3
    runs = Runs.from_arrays(
        thresholds=[0.9],
        cluster=user,
        dissimilarity=lost[:, None] * 0.5,
        risk=np.ones((len(user), 1)),
        full_risk=np.zeros(len(user)),
    )
    asked = {"weighting": "requests", "max_cluster": 3}
    found = calibrate(runs, delta={"textual": 0.4, "risk": 0.5}, **asked)
    assert found.table["loss_textual"].tolist() == pytest.approx([0.3])
    assert found.table["loss_risk"].tolist() == pytest.approx([1.0])
    alone = calibrate(runs, delta=0.45, **asked)
    assert "(observed 0.3), as the mean over requests" in alone.message


def test_clusters_of_one_request_each_are_bounded_by_one() -> None:
    runs = users([1] * 60)
    found = calibrate(runs, delta=0.1, weighting="requests", max_cluster=1)
    assert found.threshold == 0.5
    assert found.table.equals(calibrate(runs, delta=0.1).table)


def test_clusters_that_are_only_numbered_have_no_names() -> None:
    assert posing.pose(users([2] * 30), 0.1).nameless
    table = users([2] * 30).to_frame()
    names = table["cluster"].map("user {}".format)
    named = posing.pose(Runs.from_frame(table.assign(cluster=names)), 0.1)
    assert [named.nameless, named.uneven, named.lower_is_stricter] == [False] * 3
