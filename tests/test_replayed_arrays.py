"""Replayed tokens are refused as arrays where they are refused as Runs."""

import numpy as np
import pytest

import riskcal
from riskcal import RiskcalError, calibrate


def replayed(prompts: int = 100, tokens: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    confidence = rng.random((prompts * tokens, 4))
    loss = (rng.random((prompts * tokens, 4)) < 0.02) * 1.0
    losses, _ = riskcal.replay_arrays(confidence, loss, [0.9, 0.5])
    return losses, np.repeat(np.arange(prompts), tokens)


PASSED_ON = {
    "as they are": lambda losses: losses,
    "copied": lambda losses: losses.copy(),
    "sliced": lambda losses: losses[::1],
    "multiplied": lambda losses: losses * 1.0,
    "clipped": lambda losses: np.minimum(losses, 1.0),
    "concatenated": lambda losses: np.concatenate([losses]),
    "seen as a plain array": np.asarray,
    "a part of it seen as a plain array": lambda losses: np.asarray(losses[::1])[:, :],
    "contiguous": np.ascontiguousarray,
    "chosen by a condition": lambda losses: np.where(losses > 1.0, 1.0, losses),
    "copied by numpy": np.copy,
}


@pytest.mark.parametrize("pass_on", PASSED_ON.values(), ids=PASSED_ON)
def test_several_rows_a_prompt_need_the_word_exact(pass_on: object) -> None:
    losses, prompts = replayed()
    with pytest.raises(
        RiskcalError, match=r"losses: 500 rows of 100 prompts were replayed.*exact=True"
    ):
        calibrate(pass_on(losses), thresholds=[0.9, 0.5], delta=0.1, prompts=prompts)


def test_the_remedy_works() -> None:
    losses, prompts = replayed()
    assert calibrate(losses, thresholds=[0.9, 0.5], delta=0.1, prompts=prompts, exact=True).n == 100


def test_a_classifiers_rows_are_requests_and_its_message_says_how_to_say_so() -> None:
    losses, _ = replayed(tokens=1)
    with pytest.raises(RiskcalError, match=r"prompts=np.arange\(n\)"):
        calibrate(losses, thresholds=[0.9, 0.5], delta=0.1)
    assert calibrate(losses, thresholds=[0.9, 0.5], delta=0.1, prompts=np.arange(100)).n == 100


def test_exact_is_not_for_runs() -> None:
    runs = riskcal.Runs.from_arrays(thresholds=[0.5], dissimilarity=np.zeros((60, 1)))
    with pytest.raises(RiskcalError, match="exact: Runs carry their own"):
        calibrate(runs, delta=0.1, exact=True)


@pytest.mark.parametrize("pass_on", PASSED_ON.values(), ids=PASSED_ON)
def test_replayed_rows_do_not_become_runs_that_were_generated(pass_on: object) -> None:
    losses, prompts = replayed()
    given = {"thresholds": [0.9, 0.5], "dissimilarity": pass_on(losses), "cluster": prompts}
    with pytest.raises(
        RiskcalError, match=r"dissimilarity: these rows were replayed.*exact=True.*cluster="
    ):
        riskcal.Runs.from_arrays(**given)
    with pytest.raises(RiskcalError, match="declare a memoryless exit"):
        calibrate(riskcal.Runs.from_arrays(source="replayed", **given), delta=0.1)
    # as the message says
    declared = riskcal.Runs.from_arrays(source="replayed", exact=True, **given)
    assert calibrate(declared, delta=0.1).n == 100
