"""Classes of tokens in a policy: kept in its JSON, in its digest where there are any, and refused with their place."""

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskcal import ExitPolicy, RiskcalError
from riskcal.forbidden import Guard
from riskcal.serving import Inside, Pattern, Tokens

RULES = st.one_of(
    st.builds(
        Inside,
        st.sampled_from(["json_string", "code_block", "number", "identifier"]),
        st.booleans(),
    ),
    st.builds(Tokens, st.lists(st.integers(0, 99), min_size=1)),
    st.sampled_from([r"\d", "^ ", "[aeiou]"]).map(Pattern),
)


@given(st.lists(RULES, max_size=4))
def test_a_policy_keeps_its_classes_in_json_and_in_the_columns_of_records(rules):
    policy = ExitPolicy(threshold=0.5, forbidden=rules).named()
    assert ExitPolicy(**json.loads(policy.model_dump_json())) == policy
    table = pd.DataFrame([policy.to_columns()])
    assert ExitPolicy.from_columns(table, table.iloc[0]) == policy


@given(st.lists(RULES, max_size=3), st.lists(RULES, max_size=3))
def test_digests_differ_where_classes_do_and_are_the_old_ones_without(one, other):
    digests = [ExitPolicy(threshold=0.5, forbidden=rules).digest() for rules in (one, other, [])]
    assert (digests[0] == digests[1]) == (one == other)
    assert digests[2] == "25b92126ac3844179a0e8a97d82d12f7"  # as before there were classes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Inside("number"), r"^forbidden: Inside.* is no list of classes of tokens; put it in one$"),
        ("number", "^forbidden: 'number' is no list of classes"),
        (
            [Pattern("a"), "number"],
            r"^forbidden\.1: is no class of tokens; give riskcal\.serving\.",
        ),
        ([{"ids": [3, -2]}], r"^forbidden\.0\.tokens\.ids: -2 at index 1 is no token"),
        ([{"context": "number", "size": 3}], r"^forbidden\.0\.inside\.size: is not a field"),
    ],
)
def test_what_is_no_class_is_refused_with_its_place(given, message):
    with pytest.raises(RiskcalError, match=message):
        ExitPolicy(forbidden=given)


def test_a_guard_asks_every_class_and_reads_prompts_only_for_those_that_say_so():
    words = ['{"', "a", '"', "7"]
    guard = Guard(
        (Inside("json_string", prompt=True), Inside("number"), Tokens([1])), words.__getitem__
    )
    states = guard.start([0, 1])
    assert guard.forbids(states, 2)  # in the prompt's string
    states = guard.after(states, 2)
    assert [guard.forbids(states, token) for token in range(4)] == [True, True, True, True]
    assert guard.forbids(guard.after(states, 3), 2)  # follows a digit
    outside = Guard((Inside("json_string"),), words.__getitem__)
    assert not outside.forbids(outside.start([0]), 1)
