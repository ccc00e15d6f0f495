"""Arguments of serving and calibration that are of another kind altogether are refused by name; nothing else escapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from riskcal import (
    AdaptiveCalibration,
    Constant,
    ExitPolicy,
    Pruning,
    RiskcalError,
    RiskMonitor,
    Runs,
    Traces,
    bounds,
    calibrate,
    calibrate_groups,
    compare,
    efficiency,
    fwer,
    heads,
    replay_arrays,
    replay_traces,
    split_pilot,
    verify,
)
from riskcal.serving import (
    Drift,
    EventLog,
    EventWatch,
    KillSwitch,
    PolicyBook,
    alarm_delays,
    read_events,
)

RUNS = Runs.from_arrays(
    thresholds=[0.9, 0.5], dissimilarity=np.zeros((9, 2)), costs={"price": [2.0, 1.0]}
)

CALLS: dict[str, Callable[[Any], Any]] = {
    "policies": PolicyBook,
    "path": EventLog,
    "path of a switch": lambda value: KillSwitch(path=value),
    "budget": lambda value: calibrate(RUNS, delta=0.5, budget=value),
    "cost": lambda value: calibrate(RUNS, delta=0.5, cost=value),
}


@pytest.mark.parametrize("value", [3, ["price"], [("price", 0.5)]], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_they_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RiskcalError, match=rf"^{name.split()[0]}: "):
        CALLS[name](value)


GROUPED = Runs.from_arrays(
    thresholds=[0.9], dissimilarity=np.zeros((8, 1)), group=["a", "b"] * 4, prompts=list("abcdefgh")
)
TRACES = Traces.from_arrays(
    prompt=["a", "a", "b"],
    position=[0, 1, 0],
    confidence=np.full((3, 2), 0.7),
    loss=np.zeros((3, 2)),
)
OTHERS: dict[str, Callable[[Any], Any]] = {
    "policy": lambda value: verify(value, RUNS),
    "traces": lambda value: replay_traces(value, [0.5]),
    "schedule": lambda value: replay_traces(TRACES, [0.5], schedule=value),
    "schedule of arrays": lambda value: replay_arrays(
        TRACES.confidence, TRACES.loss, [0.5], schedule=value, position=[0, 1, 0]
    ),
    "runs": split_pilot,
    "runs to compare": lambda value: compare(value, [0.5]),
    "path": ExitPolicy.load,
    "path of a learned risk": heads.LearnedRisk.load,
    "path of events": read_events,
    "path of a reference": Drift.from_log,
    "path of a watch": EventWatch.load,
    "path of a log": Runs.read,
    "monitors": RiskMonitor.merge,
    "monitor": lambda value: alarm_delays(value, [1.0], rate=0.5),
    "dimensions": lambda value: efficiency.decoder_flops([[1]], value, source_lengths=3),
    "dimensions of a token": lambda value: efficiency.token_flops(value, 1, 1),
    "pruning": lambda value: efficiency.head_sizes(value, n_layers=4, vocabulary=9),
    "group": GROUPED.of_group,
    "how": lambda value: RiskMonitor.merge([RiskMonitor(0.1)], how=value),
    "prompts": lambda value: AdaptiveCalibration(value, [0.5], delta=0.1),
    "joint": lambda value: calibrate_groups(GROUPED, delta=0.5, joint=value),
    "prompt": lambda value: AdaptiveCalibration(["a", "b"], [0.5], delta=0.1).update(value, [0.0]),
}
KINDS = {
    "int": 3,
    "float": 2.5,
    "object": object(),
    "matrix": np.zeros((2, 2)),
    "empty": np.zeros(0),
    "class": Constant,
    "complex": 1 + 2j,
}


@pytest.mark.parametrize("value", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", OTHERS)
def test_what_has_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RiskcalError, match=rf"^{name.split()[0]}: "):
        OTHERS[name](value)


@pytest.mark.parametrize("value", [None, 3, 2.5, np.zeros((2, 2)), Constant], ids=str)
def test_what_lists_no_columns_is_refused(value: Any) -> None:
    with pytest.raises(RiskcalError, match=r"^candidate_columns: "):
        Runs.from_frame(RUNS.to_frame(), candidate_columns=value)


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("path")])
def test_no_path_at_all_is_refused(name: str) -> None:
    for value in (None, b"policy.json"):
        with pytest.raises(RiskcalError, match=r"^path: "):
            OTHERS[name](value)


def test_a_path_that_no_file_can_have_is_refused() -> None:
    for use in (ExitPolicy().save, ExitPolicy.load):
        with pytest.raises(RiskcalError, match=r"^path: "):
            use("a\0b")


def test_numbers_beyond_any_count_are_refused() -> None:
    with pytest.raises(RiskcalError, match=r"^attempt: "):
        calibrate(RUNS, delta=0.5, attempt=10**400)
    with pytest.raises(RiskcalError, match=r"^starts: "):
        fwer.FixedSequence(starts=10**400)
    with pytest.raises(RiskcalError, match=r"^threshold: .* beyond all floats"):
        ExitPolicy(threshold=10**400)


@pytest.mark.parametrize("count", [0, -1, 2.0, None, "4", 10**30, [4]], ids=str)
def test_what_counts_no_layers_or_tokens_is_refused(count: Any) -> None:
    with pytest.raises(RiskcalError, match=r"^n_layers: "):
        efficiency.exit_shares([[1, 1]], n_layers=count)
    with pytest.raises(RiskcalError, match=r"^n_layers: "):
        efficiency.head_sizes(Pruning("fixed"), n_layers=count, vocabulary=9)
    with pytest.raises(RiskcalError, match=r"^vocabulary: "):
        efficiency.head_sizes(Pruning("fixed"), n_layers=4, vocabulary=count)


def test_ragged_losses_are_refused_by_bounds_of_all_candidates() -> None:
    with pytest.raises(RiskcalError, match=r"^losses: "):
        bounds.simultaneous([[0.1, 0.2], [0.3]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            np.tile(np.arange(12), 20),
            r"0 stands twice, again at index 12 \(228 such\); .*np\.unique",
        ),
        ([3, -9], "-9 stands twice, again at index 1"),
        (["p1"], r"of shape \(1,\) and type <U2; .*np\.flatnonzero\(np\.isin\(runs\.prompts, ids"),
        ([0.0, 1.0], r"of shape \(2,\) and type float64; give the numbers"),
        ([0, 1000], "1000 at index 1, but there are 12 prompts; give numbers from 0 to 11"),
        ([-13], "-13 at index 0, but there are 12 prompts"),
        (np.array([]), r"of shape \(0,\)"),
        (slice(3, 3), r"of shape \(0,\)"),
        ([True, False], "a mask of 2 that is true 1 times, for 12 prompts"),
        (np.zeros(12, dtype=bool), "a mask of 12 that is true 0 times"),
        (None, "None; give the numbers of some prompts"),
        (3, "3; give the numbers of some prompts"),
        (np.zeros((2, 2), dtype=int), r"of shape \(2, 2\) and type int64"),
    ],
    ids=str,
)
def test_what_chooses_no_prompts_is_refused(rows: Any, message: str) -> None:
    """A prompt taken twice would count as two: 12 prompts taken 20 times were certified as 240."""
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.5], dissimilarity=np.zeros((12, 2)), prompts=[f"p{i}" for i in range(12)]
    )
    with pytest.raises(RiskcalError, match=f"^rows: {message}"):
        runs.take(rows)


def test_prompts_are_chosen_by_numbers_masks_and_slices() -> None:
    runs = Runs.from_arrays(
        thresholds=[0.9, 0.5], dissimilarity=np.zeros((12, 2)), prompts=[f"p{i}" for i in range(12)]
    )
    ids, mask = runs.prompts, np.arange(12) < 5
    for rows in (mask, mask.tolist(), slice(5), [0, 1, 2, 3, -8], np.arange(5, dtype=np.uint8)):
        assert runs.take(rows).prompts.tolist() == ids[:5].tolist()
    chosen = runs.take(np.flatnonzero(np.isin(runs.prompts, ["p1", "p7"])))  # as a refusal says
    assert set(chosen.prompts) == {"p1", "p7"}
    assert runs.take(np.arange(11, -1, -1)).prompts.tolist() == ids[::-1].tolist()
