import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from riskcal import RiskcalError, fwer
from riskcal.fwer import procedures
from riskcal.fwer.procedures import Fallback, FixedSequence, pilot_size, refuse_options

PROCEDURES = {
    "bonferroni": fwer.bonferroni,
    "holm": fwer.holm,
    "fixed_sequence": fwer.fixed_sequence,
    "three starts": lambda p, epsilon: fwer.fixed_sequence(p, epsilon, starts=min(3, len(p))),
}
lists = st.lists(
    st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.0125, 0.025, 0.05, 0.1, 1.0]),
    min_size=1,
    max_size=12,
)
levels = st.floats(0.001, 0.5)


def rejected(procedure, pvalues, epsilon, **options):
    return np.flatnonzero(procedure(pvalues, epsilon, **options)).tolist()


@pytest.mark.parametrize(
    ("procedure", "pvalues", "epsilon", "expected"),
    [
        (fwer.fixed_sequence, [0.001, 0.003, 0.01, 0.02, 0.2], 0.1, [0, 1, 2, 3]),
        (fwer.fixed_sequence, [0.001, 0.2, 0.001], 0.05, [0]),
        (fwer.fixed_sequence, [0.2, 0.001, 0.001], 0.05, []),
        (fwer.fixed_sequence, [0.5, 0.01, 0.9, 0.05], 0.05, []),
        (fwer.fixed_sequence, [0.05, 0.05], 0.05, [0, 1]),
        (fwer.holm, [0.001, 0.01, 0.2], 0.05, [0, 1]),
        (fwer.holm, [0.02, 0.02, 0.02], 0.05, []),
        (fwer.holm, [0.2, 0.01, 0.03, 0.005], 0.05, [1, 3]),
        (fwer.holm, [0.05], 0.05, [0]),
        (fwer.bonferroni, [0.001, 0.01, 0.2, 0.0126, 0.0125], 0.0625, [0, 1, 4]),
        (fwer.bonferroni, [0.024, 0.026], 0.05, [0]),
    ],
)
def test_hand_worked_lists(procedure, pvalues, epsilon, expected):
    assert rejected(procedure, pvalues, epsilon) == expected


def test_three_starts_walk_on_past_the_next_start_until_their_own_first_failure():
    pvalues = [0.03, 0.004, 0.005, 0.25, 0.005, 0.2, 0.8, 0.08, 0.009, 0.005, 0.006, 0.007]
    assert rejected(fwer.fixed_sequence, pvalues, 0.09, starts=3) == [0, 1, 2, 4, 8, 9, 10, 11]


@given(lists, levels)
def test_a_fixed_sequence_rejects_the_longest_prefix_that_passes(pvalues, epsilon):
    expected = 0
    while expected < len(pvalues) and pvalues[expected] <= epsilon:
        expected += 1
    assert rejected(fwer.fixed_sequence, pvalues, epsilon) == list(range(expected))


@given(lists, levels, st.integers(1, 12))
def test_several_starts_are_the_union_of_walks_at_their_share_of_the_level(
    pvalues, epsilon, starts
):
    starts = min(starts, len(pvalues))
    expected = set()
    for i in range(starts):
        j = i * len(pvalues) // starts
        while j < len(pvalues) and pvalues[j] <= epsilon / starts:
            expected.add(j)
            j += 1
    assert rejected(fwer.fixed_sequence, pvalues, epsilon, starts=starts) == sorted(expected)


@given(lists, levels)
def test_as_many_starts_as_hypotheses_are_bonferroni(pvalues, epsilon):
    every = rejected(fwer.fixed_sequence, pvalues, epsilon, starts=len(pvalues))
    assert every == rejected(fwer.bonferroni, pvalues, epsilon)


@given(lists, levels)
def test_holm_rejects_all_that_bonferroni_rejects(pvalues, epsilon):
    assert set(rejected(fwer.bonferroni, pvalues, epsilon)) <= set(
        rejected(fwer.holm, pvalues, epsilon)
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), levels)
def test_holm_is_the_closure_of_bonferroni(pvalues, epsilon):
    """A hypothesis is rejected if and only if Bonferroni rejects every intersection that holds it."""
    k = len(pvalues)
    sets = [[i for i in range(k) if mask >> i & 1] for mask in range(1, 2**k)]
    kept = {
        i
        for members in sets
        if min(pvalues[i] for i in members) > epsilon / len(members)
        for i in members
    }
    assert rejected(fwer.holm, pvalues, epsilon) == [i for i in range(k) if i not in kept]


@given(lists, levels, st.randoms(use_true_random=False))
def test_holm_and_bonferroni_do_not_see_the_order(pvalues, epsilon, random):
    order = list(range(len(pvalues)))
    random.shuffle(order)
    for procedure in (fwer.holm, fwer.bonferroni):
        shuffled = procedure([pvalues[i] for i in order], epsilon)
        assert shuffled.tolist() == procedure(pvalues, epsilon)[order].tolist()


@pytest.mark.parametrize("procedure", PROCEDURES.values(), ids=PROCEDURES.keys())
@given(pvalues=lists, epsilon=levels, data=st.data())
def test_a_smaller_p_value_or_a_larger_level_never_loses_a_rejection(
    procedure, pvalues, epsilon, data
):
    smaller = [data.draw(st.floats(0, p)) for p in pvalues]
    before = procedure(pvalues, epsilon)
    assert not (before & ~procedure(smaller, epsilon)).any()
    assert not (before & ~procedure(pvalues, data.draw(st.floats(epsilon, 0.9)))).any()


@pytest.mark.parametrize("procedure", PROCEDURES.values(), ids=PROCEDURES.keys())
@given(pvalues=lists, epsilon=levels)
def test_nothing_above_the_level_is_rejected_and_the_answer_is_one_boolean_each(
    procedure, pvalues, epsilon
):
    answer = procedure(pvalues, epsilon)
    assert answer.dtype == bool
    assert answer.shape == (len(pvalues),)
    assert not answer[np.array(pvalues) > epsilon].any()


def single_null_rate(procedure, k, position, epsilon, draws, rng):
    """How often a true null at a position is rejected where all other p-values are 0."""
    pvalues = np.zeros((draws, k))
    pvalues[:, position] = rng.random(draws)
    return sum(procedure(row, epsilon)[position] for row in pvalues)


@pytest.mark.parametrize(
    ("name", "k", "expected"),
    [
        ("fixed_sequence", 8, 0.1),
        ("holm", 8, 0.1),
        ("bonferroni", 8, 0.1 / 8),
        ("three starts", 9, 0.1 / 3),
    ],
)
def test_one_true_null_among_false_ones_is_rejected_at_exactly_its_level(name, k, expected):
    """Both sides of an exact binomial interval: an error of too much or too little power is seen alike."""
    draws = 6000
    count = single_null_rate(PROCEDURES[name], k, k - 2, 0.1, draws, np.random.default_rng(20))
    assert stats.binomtest(int(count), draws, expected).pvalue > 1e-4


@pytest.mark.parametrize("rho", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", PROCEDURES)
def test_the_family_wise_error_is_at_most_epsilon_under_dependence(name, rho):
    """Ten true nulls with equicorrelated normal scores; error above .1 would be seen, by an exact binomial test."""
    rng, draws, k = np.random.default_rng(3), 4000, 10
    shared, own = rng.standard_normal((draws, 1)), rng.standard_normal((draws, k))
    pvalues = special.ndtr(np.sqrt(rho) * shared + np.sqrt(1 - rho) * own)
    errors = sum(bool(PROCEDURES[name](row, 0.1).any()) for row in pvalues)
    assert stats.binomtest(errors, draws, 0.1, alternative="greater").pvalue > 1e-4


def test_testing_every_p_value_at_the_whole_level_would_be_caught():
    """The negative control of the test above: not stopping at a failure has an error of 1 - .9^10 = .65."""
    pvalues = np.random.default_rng(3).random((4000, 10))
    errors = int((pvalues <= 0.1).any(1).sum())
    assert stats.binomtest(errors, 4000, 0.1, alternative="greater").pvalue < 1e-4


@pytest.mark.parametrize("procedure", PROCEDURES.values(), ids=PROCEDURES.keys())
@pytest.mark.parametrize(
    ("pvalues", "epsilon", "named"),
    [
        ([0.1, float("nan")], 0.05, "pvalues: nan at index 1"),
        ([0.1, 1.5], 0.05, "pvalues: 1.5 at index 1"),
        ([-0.1], 0.05, "pvalues: -0.1 at index 0"),
        ([], 0.05, "pvalues: is empty"),
        ([[0.1]], 0.05, "pvalues: has shape"),
        (["a"], 0.05, "pvalues: not an array of numbers"),
        ([0.1], 0.0, "epsilon: 0 is not"),
        ([0.1], 1.0, "epsilon: 1 is not"),
        ([0.1], float("nan"), "epsilon: is NaN"),
        ([0.1], "x", "epsilon: 'x' is not a number"),
    ],
)
def test_bad_input_is_refused_by_name(procedure, pvalues, epsilon, named):
    with pytest.raises(RiskcalError) as refusal:
        procedure(pvalues, epsilon)
    assert str(refusal.value).startswith(named)


@pytest.mark.parametrize("starts", [0, -1, 4, 1.0, True, "2"])
def test_starts_must_be_a_whole_number_from_one_to_the_count(starts):
    with pytest.raises(RiskcalError, match=r"^starts: "):
        fwer.fixed_sequence([0.1, 0.2, 0.3], 0.05, starts=starts)


def test_options_that_would_change_nothing_are_refused_and_what_is_not_given_is_not() -> None:
    for left_out in ({"starts": None}, {"starts": 1}, {"weights": None}, {}):
        refuse_options(left_out, "holm")
    for told in ({"starts": 2}, {"weights": [1.0]}, {"starts": None, "weights": np.array([1.0])}):
        with pytest.raises(RiskcalError, match="holm does not use it, only"):
            refuse_options(told, "holm")
    with pytest.raises(TypeError, match="no procedure has an option of that name"):
        refuse_options({"nothing": None}, "holm")


@given(st.integers(4, 1000), st.floats(0.01, 0.99))
def test_a_pilot_is_the_smallest_that_holds_its_share(n, fraction) -> None:
    size = pilot_size(n, fraction)
    smallest = next(m for m in range(n + 1) if m >= fraction * n)
    assert size == (smallest if 2 <= smallest <= n - 2 else None)


def test_a_pilot_leaves_two_for_itself_and_two_to_test() -> None:
    assert [pilot_size(10, share) for share in (0.1, 0.2, 0.8, 0.81)] == [None, 2, 8, None]


def test_each_start_begins_with_its_share_of_the_level() -> None:
    assert FixedSequence(starts=3).begins(0.06, 9) == pytest.approx([0.02, 0, 0] * 3)


def test_what_was_fixed_beforehand_has_a_digest_and_nothing_has_none() -> None:
    found = [Fallback(weights=w).preregistered for w in (None, [0.5, 0.5], [0.25, 0.75])]
    assert found[0] is None
    assert None not in found[1:]
    assert found[1] != found[2]


K = 4
UNIFORM = np.where(np.eye(K), 0.0, 1 / (K - 1))
DIGEST = "7fcdd0d5dd4ee4c506130d0aef0826bb"


@pytest.mark.parametrize(
    "procedure",
    [
        fwer.FixedSequence(),
        fwer.FixedSequence(starts=2),
        fwer.Bonferroni(),
        fwer.Holm(),
        fwer.Hochberg(),
        Fallback(),
        Fallback(weights=[0.5, 0.25, 0.25, 0.0]),
        fwer.Graphical(transitions=UNIFORM),
    ],
    ids=lambda one: f"{one.name}-{one.options}",
)
def test_the_p_value_that_begins_certifies_alone_and_a_larger_one_only_where_all_count(procedure):
    """What plans and outlooks read of a procedure is what it does."""
    first = procedure.begins(0.05, K)
    assert first.max() > 0
    for j in range(K):
        alone = np.ones(K)
        alone[j] = first[j]
        assert procedure.rejected(alone, 0.05)[j] == (first[j] > 0)
        alone[j] = np.nextafter(first[j], 1.0) * (1 + 1e-9)
        assert not procedure.rejected(alone, 0.05).any()
    above = np.where(first > 0, first * 1.001, 0.0)
    assert procedure.rejected(above, 0.05).any() == procedure.step_up


@pytest.mark.parametrize("name", sorted(procedures.BY_NAME))
def test_candidates_that_were_put_in_order_are_tested_as_they_stand(name):
    """The order goes, all other options stay."""
    given = {"order": [2, 0, 1], "starts": 2, "weights": [0.5, 0.25, 0.25], "pilot_fraction": 0.3}
    given["transitions"] = np.eye(3, k=1)
    kind = procedures.BY_NAME[name]
    before = kind(**{option: given[option] for option in procedures.options_of(name)})
    after = before.in_order()
    assert after.arranged(3) is None
    assert after.options == {k: v for k, v in before.options.items() if k != "order"}


def test_the_digest_of_what_was_preregistered_is_the_one_in_older_certificates():
    ordered = fwer.FixedSequence(order=[2, 0, 1])
    assert ordered.preregistered == DIGEST
    assert fwer.FixedSequence(order=np.array([2, 0, 1])).preregistered == DIGEST
    assert Fallback(order=[2, 0, 1]).preregistered == DIGEST  # of what was given alone
    assert fwer.FixedSequence(order=[2, 1, 0]).preregistered != DIGEST
    assert fwer.FixedSequence(starts=3).preregistered is None
