"""Columns of records that are fields of a policy: what stands in which, and which are refused."""

import json

import pytest

from helpers import varied
from riskcal import ExitPolicy, RiskcalError, Runs, calibrate
from riskcal.forbidden import Inside


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("cache", ["project", "copy"]),
        ("batching", ["diverge", "deepest"]),
        ("emits", ["exit", "last"]),
        ("max_new_tokens", [24, 48]),
        ("n_layers", [8]),
        ("dtype", ["float32", "bfloat16"]),
        ("weights", ["a", "b"]),
    ],
)
def test_a_column_that_is_a_field_of_policies_stands_in_that_field(
    name: str, values: list[object]
) -> None:
    found = calibrate(Runs.from_frame(varied(name, values), candidate_columns=[name]), delta=0.1)
    policy = found.policy()
    assert getattr(policy, name) == values[-1]
    assert policy.coordinates is None
    other = {"cache": "first", "batching": "regroup", "emits": "exit"}.get(
        name, 7 if values[-1] in (8, 48) else "z"
    )
    with pytest.raises(
        RiskcalError, match=rf"{name}: {other!r} is not the recorded {values[-1]!r}"
    ):
        found.policy(**{name: other})


def test_a_field_that_needs_another_says_so_and_is_held_once_that_is_given() -> None:
    found = calibrate(
        Runs.from_frame(varied("max_pending", [2, 4]), candidate_columns=["max_pending"]), delta=0.1
    )
    with pytest.raises(
        RiskcalError, match="max_pending: means nothing to cache None; name cache 'deferred'"
    ):
        found.policy()
    assert found.policy(cache="deferred").max_pending == 4


@pytest.mark.parametrize(
    "name", ["schedule", "pruning", "contrast", "sampling", "config", "certificate"]
)
def test_a_column_with_the_name_of_a_field_that_it_cannot_fill_is_refused_and_the_remedy_works(
    name: str,
) -> None:
    table = varied(name, ["a", "b"])
    found = calibrate(Runs.from_frame(table, candidate_columns=[name]), delta=0.1)
    with pytest.raises(
        RiskcalError, match=rf"{name}: 'b' cannot stand in the policy's field.*Rename the column"
    ):
        found.policy()
    renamed = Runs.from_frame(
        table.rename(columns={name: "variant"}), candidate_columns=["variant"]
    )
    assert calibrate(renamed, delta=0.1).policy().coordinates == {"variant": "b"}


def test_a_column_and_the_column_policy_may_not_contradict_each_other() -> None:
    table = varied("cache", ["project", "copy"])
    agrees = table.assign(policy=[json.dumps({"cache": value}) for value in table["cache"]])
    assert (
        calibrate(Runs.from_frame(agrees, candidate_columns=["cache"]), delta=0.1).policy().cache
        == "copy"
    )
    silent = calibrate(
        Runs.from_frame(table.assign(policy="{}"), candidate_columns=["cache"]), delta=0.1
    ).policy()
    assert (silent.cache, silent.batching) == ("copy", "diverge")
    contradicts = Runs.from_frame(
        table.assign(policy='{"cache": "first"}'), candidate_columns=["cache"]
    )
    with pytest.raises(
        RiskcalError, match="cache: 'copy' in its column, but 'first' in the column policy"
    ):
        calibrate(contradicts, delta=0.1).policy()


def test_the_full_model_does_not_take_the_settings_of_a_candidate_that_failed() -> None:
    table = varied("emits", ["exit", "last"]).assign(dissimilarity=0.9)
    policy = calibrate(Runs.from_frame(table, candidate_columns=["emits"]), delta=0.1).policy()
    assert policy.is_full_model
    assert policy.emits == "exit"


@pytest.mark.parametrize(("name", "value"), [("max_pending", 2), ("config", "a"), ("n_layers", 8)])
def test_the_full_model_is_not_refused_for_what_only_exits_need(name: str, value: object) -> None:
    table = varied(name, [value]).assign(dissimilarity=0.9)
    policy = calibrate(Runs.from_frame(table, candidate_columns=[name]), delta=0.1).policy()
    assert policy.is_full_model
    assert policy.n_layers == (8 if name == "n_layers" else None)


def test_forbidden_classes_in_a_list_are_those_that_were_recorded_as_such() -> None:
    ran = ExitPolicy(measure="softmax", forbidden=[Inside("json_string")]).to_columns()
    table = varied("variant", ["a", "b"]).assign(measure=ran["measure"], policy=ran["policy"])
    found = calibrate(Runs.from_frame(table, candidate_columns=["variant"]), delta=0.1)
    policy = found.policy(forbidden=[Inside("json_string")])
    assert policy.forbidden == (Inside("json_string"),)
    with pytest.raises(RiskcalError, match=r"forbidden: \[\] is not the recorded"):
        found.policy(forbidden=[])
