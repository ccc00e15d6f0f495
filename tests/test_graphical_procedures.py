"""Hochberg, fallback and graphical: worked examples of the literature, equalities between procedures, errors."""

from itertools import combinations

import numpy as np
import pytest
from scipy import special, stats

from riskcal import RiskcalError, calibrate, fwer, pvalues

PAIR = [[0, 1], [1, 0]]
# Bretz, Maurer, Brannath and Posch 2009, Figure 2, and Figure 12 with its infinitesimal edges
GATEKEEPING = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0, 0, 0, 1], [0, 0, 1, 0]]
IMPROVED = [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [1e-6, 0, 0, 1 - 1e-6], [0, 1e-6, 1 - 1e-6, 0]]
SUCCESSIVE = [[0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5], [0, 1, 0, 0], [1, 0, 0, 0]]


def chain(k):
    return np.eye(k, k=1)


def uniform(k):
    return (np.ones((k, k)) - np.eye(k)) / max(k - 1, 1)


def rejected(procedure, *arguments):
    return np.flatnonzero(procedure(*arguments)).tolist()


@pytest.mark.parametrize(
    ("p", "epsilon", "weights", "transitions", "expected"),
    [
        # Bretz et al. 2009, Figure 4: Holm's procedure as a graph
        ([0.02, 0.055, 0.012], 0.05, [1 / 3, 1 / 3, 1 / 3], uniform(3), [0, 2]),
        # section 3.3, parallel gatekeeping: H2 needs .025 (the paper's last sentence names it, its steps do not reject it)
        ([0.02, 0.04, 0.01, 0.015], 0.05, [0.5, 0.5, 0, 0], GATEKEEPING, [0, 2, 3]),
        ([0.02, 0.04, 0.01, 0.015], 0.05, [0.5, 0.5, 0, 0], IMPROVED, [0, 1, 2, 3]),
        # Figures 9 and 10: Holm as gatekeeper
        (
            [0.04, 0.01, 0.03],
            0.05,
            [0.5, 0.5, 0],
            [[0, 1, 0], [1 - 1e-6, 0, 1e-6], [0, 0, 0]],
            [0, 1, 2],
        ),
        (
            [0.04, 0.01, 0.03, 0.04],
            0.05,
            [0.5, 0.5, 0, 0],
            [[0, 1, 0, 0], [1 - 1e-6, 0, 0.8e-6, 0.2e-6], [0, 0, 0, 1], [0, 0, 1, 0]],
            [0, 1, 2, 3],
        ),
        # successive procedure of Maurer, Glimm and Bretz 2011: levels .5, .75, .5 and 1 times epsilon in turn
        ([0.018, 0.01, 0.105, 0.006], 0.025, [0.5, 0.5, 0, 0], SUCCESSIVE, [0, 1, 3]),
        ([0.0188, 0.01, 0.105, 0.006], 0.025, [0.5, 0.5, 0, 0], SUCCESSIVE, [0, 1, 3]),
        ([0.0188, 0.0126, 0.001, 0.001], 0.025, [0.5, 0.5, 0, 0], SUCCESSIVE, []),
        ([0.001], 0.05, [1], [[0]], [0]),
        ([0.05, 0.05], 0.05, [1, 0], PAIR, [0, 1]),
        ([0.001, 0.001], 0.05, [0, 1], np.zeros((2, 2)), [1]),
        (
            [0.0, 0.0],
            0.05,
            [0, 1],
            np.zeros((2, 2)),
            [1],
        ),  # without a level not even p = 0 is rejected
    ],
)
def test_graphs_of_the_literature(p, epsilon, weights, transitions, expected):
    assert rejected(fwer.graphical, p, epsilon, weights, transitions) == expected


@pytest.mark.parametrize(
    ("p", "weights", "expected"),
    [
        ([0.02, 0.01, 0.04], [0.5, 0.25, 0.25], [0, 1, 2]),  # levels .025, .0375, .05
        ([0.03, 0.012, 0.024], [0.5, 0.25, 0.25], [1, 2]),  # .025 fails, .0125, .025
        (
            [0.02, 0.04, 0.012],
            [0.5, 0.25, 0.25],
            [0, 2],
        ),  # .025, .0375 fails, .0125: nothing is passed on
        ([0.02, 0.04, 0.013], [0.5, 0.25, 0.25], [0]),
        ([0.05, 0.05, 0.05], [1, 0, 0], [0, 1, 2]),
        ([0.06, 0.0, 0.0], [1, 0, 0], []),
        ([0.05, 0.0, 0.0], [0, 0, 1], [2]),
    ],
)
def test_fallback_levels_worked_by_hand(p, weights, expected):
    assert rejected(fwer.fallback, p, 0.05, weights) == expected


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.024, 0.051], [0]),
        ([0.026, 0.051], []),
        ([0.04, 0.05], [0, 1]),
        ([0.01, 0.02, 0.03, 0.05], [0, 1, 2, 3]),
        ([0.01, 0.02, 0.03, 0.051], [0]),
        ([0.013, 0.0165, 0.026, 0.06], [0, 1]),
        ([0.06, 0.0165, 0.026, 0.013], [1, 3]),
        ([0.2], []),
    ],
)
def test_hochberg_steps_up(p, expected):
    assert rejected(fwer.hochberg, p, 0.05) == expected


def random_lists(seed, draws=600):
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        k = int(rng.integers(1, 9))
        weights = rng.dirichlet(np.ones(k)) * (rng.random(k) < 0.8)
        weights = weights / weights.sum() if weights.sum() > 0 else np.full(k, 1 / k)
        yield rng.random(k) ** 3 * 0.3, k, weights, rng


def test_a_graph_that_is_a_chain_is_the_fixed_sequence_and_the_fallback():
    for p, k, weights, _ in random_lists(1):
        first = np.eye(k)[0]
        sequence = fwer.fixed_sequence(p, 0.05).tolist()
        assert fwer.graphical(p, 0.05, first, chain(k)).tolist() == sequence
        assert fwer.fallback(p, 0.05, first).tolist() == sequence
        assert (
            fwer.graphical(p, 0.05, weights, chain(k)).tolist()
            == fwer.fallback(p, 0.05, weights).tolist()
        )


def test_a_uniform_graph_is_holm_and_a_graph_without_edges_is_bonferroni():
    for p, k, _, _ in random_lists(2):
        equal = np.full(k, 1 / k)
        assert fwer.graphical(p, 0.05, equal, uniform(k)).tolist() == fwer.holm(p, 0.05).tolist()
        assert (
            fwer.graphical(p, 0.05, equal, np.zeros((k, k))).tolist()
            == fwer.bonferroni(p, 0.05).tolist()
        )


def test_hochberg_rejects_all_that_holm_rejects_and_no_more_than_simes_could():
    for p, k, _, _ in random_lists(3):
        hochberg = fwer.hochberg(p, 0.05)
        assert (fwer.holm(p, 0.05) <= hochberg).all()
        ascending = np.sort(p)
        assert hochberg.sum() == max(
            (i + 1 for i in range(k) if ascending[i] <= 0.05 / (k - i)), default=0
        )


def closure(p, epsilon, weights, transitions):
    """Closed test with weighted Bonferroni tests; each intersection's weights by solving for where the level ends up."""
    k = len(p)
    kept = set()
    for size in range(1, k + 1):
        for members in map(list, combinations(range(k), size)):
            out = [j for j in range(k) if j not in members]
            inner = np.linalg.inv(np.eye(len(out)) - transitions[np.ix_(out, out)])
            local = weights[members] + weights[out] @ inner @ transitions[np.ix_(out, members)]
            if not (p[members] <= epsilon * local).any():
                kept |= set(members)
    return [j for j in range(k) if j not in kept]


def test_a_graph_is_the_closed_test_that_it_stands_for_in_any_order_of_the_hypotheses():
    for p, k, weights, rng in random_lists(4, draws=250):
        if k > 6:
            continue
        edges = rng.random((k, k)) * (rng.random((k, k)) < 0.6) * (1 - np.eye(k))
        edges *= rng.uniform(0.3, 0.999, k)[:, None] / np.maximum(edges.sum(1), 1e-9)[:, None]
        answer = rejected(fwer.graphical, p, 0.05, weights, edges)
        assert answer == closure(p, 0.05, weights, edges)
        order = rng.permutation(k)
        shuffled = fwer.graphical(p[order], 0.05, weights[order], edges[np.ix_(order, order)])
        assert sorted(order[shuffled].tolist()) == answer


def test_arguments_are_left_as_they_were():
    weights, transitions = np.array([0.5, 0.5]), np.array(PAIR, dtype=float)
    fwer.graphical([0.0, 0.0], 0.05, weights, transitions)
    assert weights.tolist() == [0.5, 0.5]
    assert transitions.tolist() == PAIR


def test_initial_levels_are_the_weights_or_what_the_best_path_brings():
    assert fwer.initial_levels(0.05, [1, 0, 0]).tolist() == [0.05] * 3  # the fixed sequence
    assert fwer.initial_levels(0.05, [0.5, 0, 0.5, 0]).tolist() == [0.025] * 4
    assert fwer.initial_levels(0.05, [0.5, 0.5, 0, 0], SUCCESSIVE).tolist() == [
        0.025,
        0.025,
        0.0125,
        0.0125,
    ]
    assert fwer.initial_levels(0.05, [0.5, 0.5, 0], np.zeros((3, 3))).tolist() == [0.025, 0.025, 0]
    k = 5
    assert fwer.initial_levels(0.05, np.full(k, 1 / k), uniform(k)) == pytest.approx([0.01] * k)
    around = np.roll(np.eye(4), 1, axis=1)  # a cycle must not loop for ever
    assert fwer.initial_levels(0.05, [1, 0, 0, 0], around).tolist() == [0.05] * 4


def test_what_no_rejection_can_reach_is_tuned_at_a_level_all_the_same():
    """Betting cannot be tuned at a level of zero, and what is not reached is not certified, whatever its p-value."""
    fallback = fwer.Fallback(weights=[0, 0.5, 0, 0.5])
    graph = fwer.Graphical(weights=[0, 0.5, 0, 0.5], transitions=np.eye(4, k=1))
    for procedure in (fallback, graph):
        assert procedure.levels(0.06, 4) == pytest.approx([0.015, 0.03, 0.03, 0.03])
        assert procedure.rejected(np.full(4, 1e-9), 0.06).tolist() == [False, True, True, True]
    found = calibrate(np.zeros((200, 4)), thresholds=[4, 3, 2, 1], delta=0.1, procedure=fallback)
    assert found.table["certified"].tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ([0.5, 0.4], "weights: sum to 0.9, not to 1"),
        ([0.5, 0.5 + 1e-8], "weights: sum to 1.00000001, not to 1"),
        ([1.5, -0.5], "weights: -0.5 at index 1 is negative"),
        ([1.0], "weights: 1 given for 2 p-values"),
        ([0.5, 0.25, 0.25], "weights: 3 given for 2 p-values"),
        ([[0.5, 0.5]], "weights: has shape"),
        ([0.5, float("nan")], "weights: nan at index 1"),
        ([0.5, "a"], "weights: not an array of numbers"),
    ],
)
def test_bad_weights_are_refused_by_name(weights, named):
    for call in (
        lambda: fwer.fallback([0.1, 0.2], 0.05, weights),
        lambda: fwer.graphical([0.1, 0.2], 0.05, weights, PAIR),
    ):
        with pytest.raises(RiskcalError) as refusal:
            call()
        assert str(refusal.value).startswith(named)


def test_weights_may_miss_one_by_rounding():
    assert fwer.fallback([0.01, 0.9], 0.05, [0.5, 0.5 + 1e-10]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("transitions", "named"),
    [
        ([[0, -0.1], [1, 0]], "transitions: -0.1 at index [0, 1] is negative"),
        ([[0, 1.1], [1, 0]], "transitions: row 0 sums to 1.1"),
        ([[0, 1], [0.5, 0.5]], "transitions: hypothesis 1 passes to itself"),
        ([[0, 1, 0], [1, 0, 0]], "transitions: has shape (2, 3); expected (2, 2)"),
        ([0, 1], "transitions: has shape (2,)"),
        ([[0, float("nan")], [1, 0]], "transitions: nan at index [0, 1]"),
    ],
)
def test_bad_transitions_are_refused_by_name(transitions, named):
    for call in (
        lambda: fwer.graphical([0.1, 0.2], 0.05, [0.5, 0.5], transitions),
        lambda: fwer.initial_levels(0.05, [0.5, 0.5], transitions),
    ):
        with pytest.raises(RiskcalError) as refusal:
            call()
        assert str(refusal.value).startswith(named)


K = 6
WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1, 0, 0])
EDGES = np.random.default_rng(8).dirichlet(np.ones(K), K) * (1 - np.eye(K))
PROCEDURES = {
    "bonferroni": fwer.bonferroni,
    "holm": fwer.holm,
    "fixed_sequence": fwer.fixed_sequence,
    "two starts": lambda p, epsilon: fwer.fixed_sequence(p, epsilon, starts=2),
    "fallback": lambda p, epsilon: fwer.fallback(p, epsilon, WEIGHTS),
    "graphical": lambda p, epsilon: fwer.graphical(p, epsilon, WEIGHTS, EDGES),
}


def equicorrelated(rng, draws, rho):
    shared, own = rng.standard_normal((draws, 1)), rng.standard_normal((draws, K))
    return special.ndtr(np.sqrt(rho) * shared + np.sqrt(1 - rho) * own)


DEPENDENCE = {
    "independent": lambda rng, draws: rng.random((draws, K)),
    "equal": lambda rng, draws: np.repeat(rng.random((draws, 1)), K, axis=1),
    "correlated": lambda rng, draws: equicorrelated(rng, draws, 0.5),
    "opposed": lambda rng, draws: np.abs(rng.random((draws, 1)) - np.arange(K) % 2),
    "disjoint": lambda rng, draws: (
        (rng.random((draws, 1)) + np.arange(K) / K) % 1
    ),  # Bonferroni's worst case
}


@pytest.mark.parametrize("dependence", DEPENDENCE)
@pytest.mark.parametrize("name", PROCEDURES)
def test_family_wise_error_under_any_dependence(name, dependence):
    """1,500 draws, all or half of the hypotheses true, at epsilon .1: at most epsilon + 3 SE, SE .0077."""
    rng, draws, epsilon = np.random.default_rng(11), 1500, 0.1
    p = DEPENDENCE[dependence](rng, draws)
    for true in (np.ones(K, dtype=bool), np.arange(K) % 2 == 1, np.arange(K) >= K // 2):
        given = np.where(true, p, p**8)  # false hypotheses tend to be rejected, but not always
        errors = sum(bool(PROCEDURES[name](row, epsilon)[true].any()) for row in given)
        assert errors / draws <= epsilon + 3 * np.sqrt(epsilon * (1 - epsilon) / draws)


@pytest.mark.parametrize("dependence", ["independent", "equal", "correlated"])
def test_hochberg_holds_under_prds(dependence):
    rng, draws, epsilon = np.random.default_rng(12), 8000, 0.1
    p = DEPENDENCE[dependence](rng, draws)
    errors = sum(bool(fwer.hochberg(row, epsilon).any()) for row in p)
    assert errors / draws <= epsilon + 3 * np.sqrt(epsilon * (1 - epsilon) / draws)


def test_hochberg_breaks_without_prds_and_holm_does_not():
    """Two uniform p-values, never both below epsilon / 2 but both in (epsilon / 2, epsilon] together: error 1.5 epsilon."""
    rng, draws, epsilon = np.random.default_rng(13), 10000, 0.1
    u = rng.random(draws)
    half = epsilon / 2
    second = np.select(
        [u < half, u < 2 * half, u < 3 * half], [u + 2 * half, 3 * half - u, u - 2 * half], u
    )
    p = np.stack([u, second], axis=1)
    for column in p.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    rate = np.mean([bool(fwer.hochberg(row, epsilon).any()) for row in p])
    assert rate == pytest.approx(1.5 * epsilon, abs=3 * np.sqrt(0.15 * 0.85 / draws))
    assert np.mean([bool(fwer.holm(row, epsilon).any()) for row in p]) <= epsilon + 3 * np.sqrt(
        0.09 / draws
    )


@pytest.mark.parametrize("name", ["fallback", "graphical"])
def test_betting_tuned_at_initial_levels_keeps_the_family_wise_error(name):
    """2,000 draws of 6 dependent candidates, all at expected loss delta: at most epsilon + 3 SE, SE .0049."""
    rng, draws, n, delta, epsilon = np.random.default_rng(14), 2000, 60, 0.2, 0.05
    levels = fwer.initial_levels(epsilon, WEIGHTS, None if name == "fallback" else EDGES)
    assert levels[:4] == pytest.approx(epsilon * WEIGHTS[:4])
    assert (levels[4:] > 0).all()
    shared = rng.random((n, draws, 1))
    losses = (
        np.where(rng.random((n, draws, K)) < 0.7, shared, rng.random((n, draws, K))) < delta
    ) * 1.0
    p = np.empty((draws, K))
    for j in range(K):
        p[:, j] = pvalues.betting(losses[:, :, j], delta, level=levels[j])
    errors = sum(bool(PROCEDURES[name](row, epsilon).any()) for row in p)
    assert errors / draws <= epsilon + 3 * np.sqrt(epsilon * (1 - epsilon) / draws)
