"""A policy holds every coordinate that told candidates apart, and says nothing that its records do not."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import riskcal
from helpers import ladder
from riskcal import ExitPolicy, RiskcalError, Runs, calibrate


def cascade(n: int = 80) -> pd.DataFrame:
    """Two thresholds in a row; the second alone decides whether the loss is tolerable."""
    return pd.DataFrame(
        [
            {
                "prompt": i,
                "threshold": a,
                "threshold_2": b,
                "dissimilarity": 0.6 if b < 0.5 else 0.0,
                "layers": a + b,
            }
            for i in range(n)
            for a in (0.9, 0.5)
            for b in (0.8, 0.2)
        ]
    )


def plain(n: int = 80, **columns: object) -> pd.DataFrame:
    return ladder(n, lowest=0.02, **columns)


def test_the_second_threshold_of_a_cascade_stands_in_the_policy_and_in_its_file(
    tmp_path: Path,
) -> None:
    found = calibrate(Runs.from_frame(cascade(), candidate_columns=["threshold_2"]), delta=0.1)
    policy = found.policy()
    assert policy.threshold == found.chosen["threshold"] == 0.5
    assert policy.coordinates == {"threshold_2": 0.8}
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy


def test_two_policies_that_differ_in_a_free_coordinate_have_other_digests_and_no_certificate_serves_both() -> (
    None
):
    policy = calibrate(
        Runs.from_frame(cascade(), candidate_columns=["threshold_2"]), delta=0.1
    ).policy()
    other = policy.model_dump() | {"coordinates": {"threshold_2": 0.2}}
    with pytest.raises(RiskcalError, match="issued for other settings"):
        ExitPolicy(**other)


@pytest.mark.parametrize(
    ("value", "held"),
    [("a", "a"), (2, 2), (np.float32(0.25), 0.25), (True, True), (math.inf, "full")],
)
def test_a_constant_candidate_column_stands_in_the_policy_too(value: object, held: object) -> None:
    found = calibrate(
        Runs.from_frame(plain(variant=value), candidate_columns=["variant"]), delta=0.1
    )
    assert found.policy().coordinates == {"variant": held}
    assert json.loads(found.policy().model_dump_json())["coordinates"] == {"variant": held}


def test_the_full_model_has_no_coordinates() -> None:
    table = cascade().assign(dissimilarity=0.9)
    policy = calibrate(
        Runs.from_frame(table, candidate_columns=["threshold_2"]), delta=0.1
    ).policy()
    assert policy.is_full_model
    assert policy.coordinates is None


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (
            "measure",
            None,
            r"measure: missing at row 4 \(1 such rows\).*leave the column measure out",
        ),
        ("measure", 3, "measure: 3 at row 4 is not a text"),
        ("min_layer", 2.7, r"min_layer: 2.7 at row 4 is not a whole number"),
        ("min_layer", 0, "min_layer: 0 at row 4 is not a whole number"),
        ("min_layer", math.nan, r"min_layer: missing at row 4 \(1 such rows\)"),
        ("variant", None, r"variant: missing at row 4"),
        ("variant", [0.9, 0.8], r"variant: \[0.9, 0.8\] at row 4.*a column of its own"),
        ("variant", 2, "variant: 2 at row 4 is of another type than 'a' at row 1"),
    ],
)
def test_nulls_fractions_and_lists_in_coordinates_are_refused_where_they_are_read(
    column: str, value: object, words: str
) -> None:
    usual = {"measure": "max", "min_layer": 1, "variant": "a"}[column]
    table = plain()
    table[column] = [value if row == 4 else usual for row in range(240)]
    with pytest.raises(RiskcalError, match=words):
        Runs.from_frame(table, candidate_columns=[column] if column == "variant" else [])


def test_what_the_full_models_rows_say_of_coordinates_does_not_matter() -> None:
    table = plain().assign(measure="max")
    table.loc[np.isinf(table["threshold"]), "measure"] = None
    assert calibrate(Runs.from_frame(table), delta=0.1).policy().measure == "max"


def test_records_that_name_no_measure_make_a_policy_that_names_none_and_drives_no_decoder() -> None:
    policy = calibrate(Runs.from_frame(plain()), delta=0.1).policy()
    assert (policy.measure, policy.cache, policy.batching) == (None, None, None)
    with pytest.raises(
        RiskcalError,
        match=r"measure: the certified policy does not name it.*calibration.policy\(measure=",
    ):
        policy.named()


def test_the_remedy_of_an_unnamed_policy_is_to_say_what_the_records_were_made_with() -> None:
    found = calibrate(Runs.from_frame(plain()), delta=0.1)
    with pytest.raises(RiskcalError) as refusal:
        found.policy().named()
    # as it says
    policy = eval(
        str(refusal.value).split(": calibration.", 1)[1].rstrip("."), {}, {"policy": found.policy}
    )
    assert (policy.measure, policy.cache, policy.batching) == ("softmax", "project", "diverge")
    assert policy.named() == policy


def test_a_measure_alone_is_not_enough() -> None:
    policy = calibrate(Runs.from_frame(plain(measure="softmax")), delta=0.1).policy()
    with pytest.raises(RiskcalError, match="cache: the certified policy does not name it"):
        policy.named()


def test_records_with_a_column_policy_name_everything() -> None:
    policy = calibrate(Runs.from_frame(plain(measure="softmax", policy="{}")), delta=0.1).policy()
    assert policy.named() == policy
    assert (policy.measure, policy.cache, policy.batching) == ("softmax", "project", "diverge")


def test_a_policy_written_by_hand_has_the_usual_settings_and_the_full_model_needs_none() -> None:
    named = ExitPolicy(threshold=0.9).named()
    assert (named.measure, named.cache, named.batching) == ("softmax", "project", "diverge")
    risky = plain()
    risky["risk"] = np.where(np.isinf(risky["threshold"]), 0.0, 1.0)
    assert (
        calibrate(Runs.from_frame(risky), delta=0.1, objective="risk")
        .policy()
        .named()
        .is_full_model
    )


def test_coordinates_are_no_setting_of_a_decoder() -> None:
    with pytest.raises(
        RiskcalError, match="coordinates: 'threshold_2' is no setting of this decoder"
    ):
        ExitPolicy(threshold=0.5, coordinates={"threshold_2": 0.8}).named()


def test_what_was_calibrated_cannot_be_overruled() -> None:
    found = calibrate(Runs.from_frame(cascade(), candidate_columns=["threshold_2"]), delta=0.1)
    with pytest.raises(RiskcalError, match="coordinates: is what was calibrated"):
        found.policy(coordinates={"threshold_2": 0.2})


@pytest.mark.parametrize(
    "other",
    [
        {"sampling": riskcal.Sampling()},
        {"pruning": riskcal.Pruning()},
        {"emits": "last"},
        {"contrast": riskcal.Contrast(alpha=0.5)},
        {"forbidden": [riskcal.serving.Tokens((3,))]},
        {"schedule": riskcal.Decaying(4.0, 32)},
        {"lower_is_stricter": True},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_records_that_name_everything_leave_out_had_its_default_and_is_not_certified_otherwise(
    other: dict[str, Any],
) -> None:
    found = calibrate(Runs.from_frame(plain(measure="softmax", policy="{}")), delta=0.1)
    name = next(iter(other))
    with pytest.raises(RiskcalError, match=rf"^{name}: .* is not the recorded"):
        found.policy(**other)
    named = {"max_new_tokens": 9, "n_layers": 4, "weights": "a", "config": {"a": 1}}
    assert found.policy(**named, **{name: getattr(found.policy(), name)}).certificate is not None


def test_a_candidate_whose_threshold_does_not_decay_is_certified_as_it_ran() -> None:
    found = calibrate(Runs.from_frame(plain(temperature=np.nan)), delta=0.1)
    assert found.policy().schedule == riskcal.Constant()
    with pytest.raises(RiskcalError, match=r"^schedule: Decaying.* is not the recorded Constant"):
        found.policy(schedule=riskcal.Decaying(4.0, 32))


def test_a_policy_has_the_direction_of_its_records() -> None:
    found = calibrate(np.zeros((50, 1)), thresholds=[0.3], delta=0.1, lower_is_stricter=True)
    assert found.policy(lower_is_stricter=True) == found.policy()
    with pytest.raises(RiskcalError, match=r"^lower_is_stricter: False is not the recorded True"):
        found.policy(lower_is_stricter=False)


def test_a_path_of_threshold_vectors_in_the_column_policy_makes_a_policy_with_the_vector() -> None:
    path = {1.0: {4: 0.99, 8: 0.95}, 0.5: {4: 0.9, 8: 0.8}, 0.2: {4: 0.7, 8: 0.5}}
    rows = [
        {
            "prompt": i,
            "threshold": step,
            "policy": json.dumps({"thresholds": vector}),
            "dissimilarity": 0.0 if step > 0.3 else 0.3,
            "layers": step,
        }
        for i in range(80)
        for step, vector in path.items()
    ]
    table = pd.DataFrame(rows)
    policy = calibrate(Runs.from_frame(table), delta=0.1).policy()
    assert policy.thresholds == path[0.5]
    assert math.isinf(policy.threshold)
    # one number may have several texts, which say what else was varied
    other = [text.replace("}}", '}, "emits": "last"}') for text in table["policy"]]
    both = pd.concat([table, table.assign(policy=other, layers=0.1 * table["layers"])])
    found = calibrate(Runs.from_frame(both), delta=0.1).policy()
    assert (found.thresholds, found.emits) == (path[0.5], "last")


def test_thresholds_that_every_candidate_has_in_the_column_policy_are_no_vectors_of_a_path() -> (
    None
):
    same = plain(policy='{"thresholds": {"4": 0.9}}')
    found = calibrate(Runs.from_frame(same), delta=0.1)
    with pytest.raises(RiskcalError, match="thresholds: the column policy holds the same where"):
        found.policy()
    alone = same[same["threshold"].isin([0.5, math.inf])]
    assert calibrate(Runs.from_frame(alone), delta=0.1).policy().thresholds == {4: 0.9}


#: Written by the commit before policies could leave the measure open, from the shipped records at delta .1.
OLD_FILE = {
    "schema_version": 1,
    "threshold": 0.45,
    "thresholds": None,
    "measure": "softmax",
    "schedule": {"kind": "constant"},
    "min_layer": 1,
    "pruning": None,
    "contrast": {"alpha": 0.1, "alpha_decay": 0.0, "plausible": "alpha"},
    "cache": "project",
    "max_pending": None,
    "emits": "exit",
    "batching": "diverge",
    "sampling": None,
    "max_new_tokens": 24,
    "n_layers": 8,
    "weights": "ff99666538e2336ff4002421ce386c39",
    "classifier_weights": None,
    "certificate": None,
}


def test_an_old_file_loads_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(OLD_FILE))
    policy = ExitPolicy.load(tmp_path / "old.json")
    assert policy.digest() == "61aa00111f822b30e5889ede81ddd80e"
    assert policy.named() == policy
    named = policy.model_copy(update={"batching": "regroup"})
    assert named.digest() == policy.digest()
    assert policy.model_copy(update={"measure": None}).digest() != policy.digest()


@pytest.mark.parametrize("name", ["min_layer", "variant"])
def test_one_threshold_and_another_coordinate_varies(name: str) -> None:
    values = {"min_layer": [2, 1], "variant": ["a", "b"]}[name]
    rows = [
        {"prompt": i, "threshold": 0.5, "dissimilarity": 0.02, "layers": 4.0 - j, name: value}
        for i in range(300)
        for j, value in enumerate(values)
    ]
    runs = Runs.from_frame(
        pd.DataFrame(rows), candidate_columns=["variant"] if name == "variant" else []
    )
    found = calibrate(runs, delta=0.1)
    assert found.procedure == "holm"  # no order of these is known beforehand
    assert found.chosen[name] == values[1]
    assert f"at {name} {values[1]}" in found.message
    policy = found.policy()
    assert policy.coordinates == {"variant": "b"} if name == "variant" else policy.min_layer == 1
    with pytest.raises(RiskcalError, match=f"plot: candidates differ in {name}"):
        found.plot()
    trials = riskcal.run_trials(runs, [0.1], n_trials=3)
    assert trials[name].tolist() == [values[1]] * 3


def test_a_picture_has_a_curve_for_each_second_threshold_and_refuses_a_third() -> None:
    table = cascade()
    found = calibrate(Runs.from_frame(table, candidate_columns=["threshold_2"]), delta=0.1)
    labels = [text.get_text() for text in found.plot().get_legend().get_texts()]
    for value in found.table["threshold_2"].unique():
        assert any(label.startswith(f"threshold_2 {value}") for label in labels)
    more = pd.concat([table.assign(threshold_3=level) for level in (0.5, 0.6)])
    more.loc[np.isinf(more["threshold"]), "threshold_3"] = np.inf
    more = more.drop_duplicates(["prompt", "threshold", "threshold_2", "threshold_3"])
    runs = Runs.from_frame(more, candidate_columns=["threshold_2", "threshold_3"])
    with pytest.raises(
        RiskcalError, match="plot: candidates differ in threshold, threshold_2, threshold_3"
    ):
        calibrate(runs, delta=0.1).plot()


def test_a_setting_that_changes_nothing_is_said() -> None:
    table = plain().assign(dissimilarity=0.0, layers=8.0)
    message = calibrate(Runs.from_frame(table), delta=0.1).message
    assert "made no difference" in message
    assert "It saves nothing: 8 layers a token, where the full model takes 8" in message
    assert "difference" not in calibrate(Runs.from_frame(plain()), delta=0.1).message


def test_a_certified_policy_that_is_slower_than_the_full_model_is_said() -> None:
    table = plain()
    full = np.isinf(table["threshold"])
    slow = calibrate(
        Runs.from_frame(table.assign(seconds=np.where(full, 1.0, 1.5))), delta=0.1
    ).message
    assert (
        "slower than the full model that was recorded beside it: 1.5 seconds a prompt, where that takes 1"
        in slow
    )
    fast = calibrate(
        Runs.from_frame(table.assign(seconds=np.where(full, 1.5, 1.0))), delta=0.1
    ).message
    assert "slower" not in fast


def test_a_stratum_of_one_prompt_does_not_block_the_others() -> None:
    table = plain(60)
    table["group"] = np.where(table["prompt"] == "p59", "rare", "common")
    found = riskcal.calibrate_groups(Runs.from_frame(table), delta=0.3)
    assert found["common"].certified
    assert found["common"].epsilon == found["rare"].epsilon == 0.025
    assert not found["rare"].certified
    assert "1 prompts are too few for a test" in found["rare"].message
    assert found["rare"].policy().is_full_model


def test_a_stratum_too_small_for_its_pilot_does_not_block_the_others() -> None:
    table = plain(60)
    table["group"] = np.where(table["prompt"].isin(["p57", "p58", "p59"]), "rare", "common")
    found = riskcal.calibrate_groups(Runs.from_frame(table), delta=0.3, procedure="pareto")
    assert found["common"].certified
    assert not found["rare"].certified
