import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from riskcal import (
    Constant,
    Decaying,
    RiskcalError,
    Runs,
    Traces,
    calibrate,
    replay_traces,
    verify,
)

#: Confidences as measures give them, with ties, edges and neighbours of edges; far beyond [0, 1] too (cosines, margins).
edges = st.sampled_from(
    [0.0, -0.0, 1.0, 0.1, 0.9, 1e-300, 5e-324, math.inf, -math.inf, math.nan, -0.5, 0.9 + 0.1]
)
confidences = st.floats(0, 1) | st.floats(0, 1, width=32) | st.floats(-1e6, 1e6) | edges
finite = st.floats(0, 1) | st.floats(-1e6, 1e6) | st.floats(allow_nan=False, allow_infinity=False)
decaying = st.builds(
    Decaying,
    temperature=st.floats(0, 50) | st.sampled_from([0, 4, 4.0]),
    max_length=st.integers(1, 4096),
    form=st.sampled_from(["paper", "t5x"]),
)
schedules = st.just(Constant()) | decaying


@pytest.mark.parametrize(
    ("position", "paper", "t5x"), [(0, 0.910, 0.900), (64, 0.8235, 0.8222), (128, 0.8118, 0.8116)]
)
def test_the_published_values_at_threshold_nine_tenths_and_temperature_four(position, paper, t5x):
    assert Decaying(4.0, 128, "paper").local_threshold(0.9, position) == pytest.approx(
        paper, abs=5e-5
    )
    assert Decaying(4.0, 128, "t5x").local_threshold(0.9, position) == pytest.approx(t5x, abs=5e-5)


def test_without_temperature_the_paper_shifts_and_the_code_does_not():
    threshold, position = np.array([0.0, 0.3, 0.9, 1.0]), np.arange(5)[:, None]
    paper = Decaying(0.0, 10, "paper").local_threshold(threshold, position)
    assert paper == pytest.approx(np.tile(0.9 * threshold + 0.1, (5, 1)))
    assert Decaying(0.0, 10, "t5x").local_threshold(threshold, position) == pytest.approx(
        np.tile(threshold, (5, 1))
    )


@given(position=st.integers(0, 5000), temperature=st.floats(0, 50), length=st.integers(1, 5000))
def test_the_two_forms_agree_at_threshold_one_and_differ_below(position, temperature, length):
    paper, t5x = (Decaying(temperature, length, form) for form in ("paper", "t5x"))
    assert paper.local_threshold(1.0, position) == pytest.approx(
        t5x.local_threshold(1.0, position), rel=1e-15
    )
    decay = 0.1 * math.exp(-temperature * position / length)
    assert paper.local_threshold(0.5, position) == pytest.approx(0.45 + decay, rel=1e-14)
    assert t5x.local_threshold(0.5, position) == pytest.approx(0.5 * (0.9 + decay), rel=1e-14)


def test_at_threshold_zero_the_first_token_needs_a_tenth_in_the_paper_and_nothing_in_the_code():
    assert Decaying(form="paper").local_threshold(0.0, 0) == pytest.approx(0.1, rel=1e-15)
    assert Decaying(form="t5x").local_threshold(0.0, 0) == 0.0


def test_the_paper_clips_to_the_unit_interval_and_the_code_does_not():
    assert Decaying(form="paper").local_threshold([-5.0, 5.0], 0).tolist() == [0.0, 1.0]
    assert Decaying(form="t5x").local_threshold([-5.0, 5.0], 0).tolist() == [-5.0, 5.0]


@given(schedules, st.integers(0, 5000))
def test_the_full_model_stays_out_of_reach_at_every_position(schedule, position):
    assert schedule.local_threshold(math.inf, position) == math.inf


@given(decaying, st.integers(1, 5000))
def test_a_threshold_of_one_decays_below_one_so_it_is_not_the_full_model(schedule, position):
    local = float(schedule.local_threshold(1.0, position))
    assert local <= 1.0
    assert local < math.inf
    if schedule.temperature * position / schedule.max_length > 1e-10:
        assert local < 1.0


@given(schedules, confidences, finite, st.integers(0, 5000))
@example(Decaying(4.0, 128, "paper"), 0.91, 0.9, 0)
@example(Decaying(4.0, 128, "t5x"), 0.9, 0.9, 0)
def test_a_token_exits_at_every_threshold_up_to_the_critical_one_and_at_none_above(
    schedule, confidence, other, position
):
    critical = float(schedule.critical_threshold(confidence, position))
    assert not math.isnan(critical)
    near = [critical, math.nextafter(critical, math.inf), math.nextafter(critical, -math.inf)]
    near += [critical + 1e-9, critical - 1e-9, confidence, other, 0.0, 1.0, -1.0, 1e300, -1e300]
    for threshold in near:
        if math.isfinite(threshold):
            exits = confidence >= float(schedule.local_threshold(threshold, position))
            assert exits == (threshold <= critical), (threshold, critical)


@given(schedules, st.integers(0, 500))
def test_nan_never_exits(schedule, position):
    assert schedule.critical_threshold(math.nan, position) == -math.inf


@given(
    schedules,
    st.lists(confidences, min_size=1, max_size=5),
    st.lists(st.integers(0, 300), min_size=1, max_size=4),
)
def test_arrays_broadcast_to_the_same_values_as_single_calls(schedule, levels, positions):
    grid, where = np.array(levels), np.array(positions)[:, None]
    critical = schedule.critical_threshold(grid, where)
    assert critical.shape == (len(positions), len(levels))
    singly = [[float(schedule.critical_threshold(c, t)) for c in levels] for t in positions]
    assert critical.tolist() == singly
    numbers = np.nan_to_num(grid, nan=0.5, neginf=-1.0)
    local = schedule.local_threshold(numbers, where)
    assert local.tolist() == [
        [float(schedule.local_threshold(x, t)) for x in numbers] for t in positions
    ]


@given(decaying, st.lists(finite, min_size=2, max_size=6), st.integers(0, 5000))
def test_a_higher_threshold_never_needs_less_confidence(schedule, thresholds, position):
    local = schedule.local_threshold(np.sort(thresholds), position)
    assert (np.diff(local) >= 0).all()


@given(decaying, st.floats(0, 1))
def test_the_confidence_needed_never_grows_along_the_generation(schedule, threshold):
    assert (np.diff(schedule.local_threshold(threshold, np.arange(300))) <= 0).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature: -1"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"temperature": math.nan}, "temperature: is NaN"),
        ({"temperature": "x"}, "temperature: 'x'"),
        ({"max_length": 0}, "max_length: 0"),
        ({"max_length": 12.5}, "max_length: 12.5"),
        ({"max_length": True}, "max_length: True"),
        ({"form": "calm"}, "form: 'calm' is unknown; choose one of 'paper', 't5x'"),
        ({"form": None}, "form: None"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused_by_name(settings, named):
    with pytest.raises(RiskcalError) as refusal:
        Decaying(**settings)
    assert str(refusal.value).startswith(named)


# What a schedule that was or was not replayed certifies


CONSTANT, DECAYING = Constant(), Decaying(4.0, 10, "t5x")


def replayed(schedule: Constant | Decaying = CONSTANT) -> Runs:
    """Every token is right at its first exit from confidence .8 on, and wrong below."""
    n, tokens = 400, 10
    confidence = np.where(np.arange(n * tokens) % 10 < 9, 0.9, 0.75)
    traces = Traces.from_arrays(
        prompt=np.repeat([f"p{i}" for i in range(n)], tokens),
        position=np.tile(np.arange(tokens), n),
        confidence=np.column_stack([confidence, np.ones(n * tokens)]),
        agrees=np.column_stack([confidence > 0.8, np.ones(n * tokens, dtype=bool)]),
        group=np.repeat(["a", "b"], n * tokens // 2),
    )
    return replay_traces(traces, [0.8], schedule=schedule, exact=True)


def test_runs_that_were_replayed_without_a_schedule_certify_none(tmp_path: Path) -> None:
    runs = replayed()
    assert replayed(DECAYING).losses().mean() > 0.05  # by which nothing would be certified
    runs.write(tmp_path / "runs.parquet")
    for one in (runs, Runs.read(tmp_path / "runs.parquet")):
        found = calibrate(one, delta=0.05)
        assert found.policy(schedule=CONSTANT) == found.policy()
        assert found.certified
        with pytest.raises(
            RiskcalError, match=r"^schedule: .*replayed without one.*: leave it out.*from_frame\."
        ):
            found.policy(schedule=DECAYING)
    frame = runs.to_frame().assign(
        temperature=4.0, max_length=10, form="t5x"
    )  # who replayed with one
    found = calibrate(Runs.from_frame(frame), delta=0.05)
    assert found.policy().schedule == found.policy(schedule=DECAYING).schedule == DECAYING


def test_who_replays_by_other_means_says_with_which_schedule() -> None:
    """Arrays say nothing of the rule: what is given is the caller's word, and `verify` says that it is in no record."""
    runs = Runs.from_arrays(
        thresholds=[0.8, 0.5],
        dissimilarity=np.zeros((200, 2)),
        prompts=np.arange(200),
        source="replayed",
        exact=True,
    )
    policy = calibrate(runs, delta=0.05).policy(schedule=DECAYING)
    assert policy.schedule == DECAYING
    found = verify(policy, runs)
    assert (found.agrees, found.unrecorded) == (True, ("schedule",))


def test_what_was_replayed_with_a_schedule_keeps_it_and_the_full_model_has_any() -> None:
    found = calibrate(replayed(DECAYING), delta=0.2)
    assert found.policy(schedule=DECAYING) == found.policy()
    assert found.policy().schedule == DECAYING
    nothing = calibrate(replayed(), delta=1e-6)
    assert nothing.policy(schedule=DECAYING).is_full_model


def test_a_schedule_that_was_not_replayed_is_told_by_verify_whoever_made_the_policy() -> None:
    runs = replayed()
    policy = calibrate(runs, delta=0.05).policy()
    assert verify(policy, runs).agrees
    assert policy.certificate is not None
    bare = policy.model_copy(update={"certificate": None, "schedule": DECAYING})
    earlier = bare.certified(policy.certificate)  # as versions before this one made it
    [difference] = verify(earlier, runs).differences
    assert (difference.name, difference.found) == ("schedule", CONSTANT)
