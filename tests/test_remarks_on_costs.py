"""What a calibration remarks on costs must be true: on which prompts, of what, and to how many digits."""

import math

import numpy as np
import pandas as pd
import pytest

from helpers import varied
from riskcal import Runs, calibrate


def costed(n: int = 60, **of_threshold: dict[float, float]) -> Runs:
    """All losses 0, and costs by threshold."""
    rows = [
        {"prompt": f"p{i}", "threshold": t, "dissimilarity": 0.0}
        | {name: of[t] for name, of in of_threshold.items()}
        for i in range(n)
        for t in (math.inf, 0.9, 0.5)
    ]
    return Runs.from_frame(pd.DataFrame(rows))


@pytest.mark.parametrize("cost", ["seconds", "flops"])
def test_settings_that_differ_in_a_cost_are_not_said_to_make_no_difference(cost: str) -> None:
    message = calibrate(costed(**{cost: {math.inf: 3.0, 0.9: 2.0, 0.5: 1.0}}), delta=0.1).message
    assert "no difference" not in message


def test_what_was_the_same_is_named_and_nothing_else() -> None:
    same = dict.fromkeys((math.inf, 0.9, 0.5), 8.0)
    message = calibrate(
        costed(layers=same, seconds={math.inf: 3.0, 0.9: 2.0, 0.5: 1.0}), delta=0.1
    ).message
    assert "the same losses and layers on each of the prompts" in message
    assert "costs" not in message
    bare = calibrate(costed(), delta=0.1).message
    assert "the same losses on each of the prompts" in bare
    assert "no cost was recorded that would tell" in bare
    assert "no difference" in bare


def test_more_flops_than_the_full_model_save_nothing() -> None:
    message = calibrate(costed(flops={math.inf: 1.0, 0.9: 3.0, 0.5: 2.0}), delta=0.1).message
    assert "It saves nothing: 2 FLOPs a prompt, where the full model takes 1." in message


@pytest.mark.parametrize("seed", range(6))
def test_the_full_model_is_compared_on_the_prompts_that_were_tested(seed: int) -> None:
    """Each prompt is faster with exits; that half of them which the pilot takes may be faster still."""
    seconds = np.exp(np.random.default_rng(seed).normal(0, 1.5, 200))
    rows = [
        {
            "prompt": f"{seed}-{i}",
            "threshold": t,
            "dissimilarity": 0.0,
            "seconds": s * (1.0 if t == math.inf else 0.98),
        }
        for i, s in enumerate(seconds)
        for t in (math.inf, 0.9, 0.5)
    ]
    found = calibrate(
        Runs.from_frame(pd.DataFrame(rows)), delta=0.1, procedure="pilot_order", pilot_fraction=0.5
    )
    assert found.chosen["seconds"] == pytest.approx(0.98 * found.full_costs["seconds"])
    assert "slower" not in found.message


def test_costs_over_requests_are_those_of_the_prompts_that_were_tested() -> None:
    cluster = np.repeat(np.arange(90), np.tile([1, 2, 6], 30))
    runs = Runs.from_arrays(
        thresholds=[math.inf, 0.9, 0.5],
        cluster=cluster,
        dissimilarity=np.zeros((len(cluster), 3)),
        layers=np.tile([8.0, 4.0, 3.0], (len(cluster), 1)),
    )
    found = calibrate(
        runs,
        delta=0.3,
        weighting="requests",
        max_cluster=6,
        procedure="pilot_order",
        pilot_fraction=0.3,
    )
    assert found.full_costs["layers"] == pytest.approx(8.0)
    np.testing.assert_allclose(np.sort(found.table["layers"]), [3.0, 4.0])


def test_numbers_of_the_sentence_are_not_rounded_to_others() -> None:
    table = varied("variant", ["a"], n=2000).replace(
        {"threshold": {0.9: 0.99999999, 0.5: 0.9999999}}
    )
    runs = Runs.from_frame(table)
    found = calibrate(runs, delta=0.10000049, epsilon=1e-8)
    assert "with probability at least 1 - 1e-08 over" in found.message
    assert "at threshold 0.9999999 the" in found.message
    assert "is at most 0.10000049 (" in found.message
    # .96960364...
    assert (
        "with probability at least 0.969603 over" in calibrate(runs, delta=0.1, attempt=1).message
    )
    assert "with probability at least 0.95 over" in calibrate(runs, delta=0.1).message


@pytest.mark.parametrize(("seconds", "said"), [(2.0, False), (2.01, True)])
def test_only_what_takes_longer_than_the_full_model_is_called_slower(seconds, said) -> None:
    message = calibrate(costed(seconds={math.inf: 2.0, 0.9: 2.5, 0.5: seconds}), delta=0.1).message
    assert ("It is slower than the full model" in message) is said
