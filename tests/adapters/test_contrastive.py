"""Contrastive confidence: a layer's distribution against an earlier layer's, on the plausible tokens."""

import math

import numpy as np
import pytest
import torch
from exit_reference import (
    StubBackbone,
    amateur_of,
    assert_agrees,
    contrast,
    judging,
    lead,
    middling,
    only,
    softmax,
    tokens_kept,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_reference import ending_early

from riskcal import ExitPolicy
from riskcal.policy import Contrast
from riskcal.pruning import Pruning
from riskcal_adapters.torch import measures
from riskcal_adapters.torch.confidence import CONTRASTIVE, Judge

#: tail, mass: the second is what corrects the authors' code
KINDS = {
    "weighted": (False, True),
    "contrastive": (True, True),
    "contrastive-code": (True, False),
    "jsd": (True, True),
    "jsd-code": (True, False),
}


def scored(p, q, plausible, kind):
    """The confidence of probabilities p, given an amateur's q and the plausible tokens."""
    p, q = (torch.tensor(x, dtype=torch.float64).log().float()[None] for x in (p, q))
    tail, mass = KINDS[kind]
    [confidence] = measures.contrasted(p, q, torch.tensor(plausible)[None], tail=tail, mass=mass)
    return confidence


# -- vectors worked by hand ----------------------------------------------------------------------------------------------


def test_row_21_one_plausible_token_makes_the_original_sure_of_anything():
    """p = (.30, .02, ...): only one token is plausible at alpha = .1, and its share g of the plausible ones is 1.

    The original scores, g on H and p off it, then add up to 1.70, and their margin is .98 where that of p is .28.
    """
    p = [0.30] + [0.02] * 35
    q = [1 / 36] * 36
    head = measures.plausible(torch.tensor([p]), 0.1)[0].tolist()
    assert head == [True] + [False] * 35
    np.testing.assert_allclose(measures.softmax_margin(torch.tensor([p]).log()), [0.28], atol=1e-6)
    expected = {
        "weighted": 0.30,
        "jsd-code": 0.98,
        "contrastive-code": 0.98,
        "jsd": 0.28,
        "contrastive": 0.28,
    }
    for kind, confidence in expected.items():
        np.testing.assert_allclose(scored(p, q, head, kind), confidence, atol=1e-6)


def test_row_21_several_plausible_tokens():
    """Ratios p/q on H = {0, 1, 2} are 4, 1, 1/2, so g = (8, 2, 1)/11; H has probability .9; token 3 keeps its .1."""
    p, q, head = [0.4, 0.3, 0.2, 0.1], [0.1, 0.3, 0.4, 0.2], [True, True, True, False]
    for kind, confidence in {
        "weighted": 0.9 * 6 / 11,
        "contrastive": 0.9 * 6 / 11,
        "jsd": 0.9 * 6 / 11,
        "contrastive-code": 6 / 11,
        "jsd-code": 6 / 11,
    }.items():
        np.testing.assert_allclose(scored(p, q, head, kind), confidence, atol=1e-6)


def test_row_21_an_implausible_token_may_come_second():
    """H = {0, 1} with ratios 8 and 1/8, so g = (64, 1)/65 and H's second scores .7/65; off H .2 is larger but for "weighted"."""
    # the amateur's numbers need not add up to 1: only its ratios count
    p, q, head = [0.4, 0.3, 0.2, 0.1], [0.05, 2.4, 0.2, 0.1], [True, True, False, False]
    np.testing.assert_allclose(scored(p, q, head, "weighted"), 0.7 * 63 / 65, atol=1e-6)
    np.testing.assert_allclose(scored(p, q, head, "contrastive"), 0.7 * 64 / 65 - 0.2, atol=1e-6)
    np.testing.assert_allclose(scored(p, q, head, "contrastive-code"), 64 / 65 - 0.2, atol=1e-6)


def test_row_22_alpha_schedule():
    doubt = 1.0 - torch.tensor([0.5, 0.0, 1.0])
    np.testing.assert_allclose(
        measures.alpha_at(0.1, 1.0, 19, doubt).flatten(), [0.0025, 0.005, 0.0], atol=1e-9
    )
    p = softmax(np.linspace(0, 4, 30))
    sizes = [int(measures.plausible(torch.tensor(p)[None], measures.alpha_at(0.1, 1.0, 3, torch.tensor([1.0 - c]))).sum())
             for c in (0.0, 0.6, 0.9, 1.0)]  # fmt: skip
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 30, "a surer layer has more plausible tokens, a certain one all"


def test_row_22_the_doubt_of_a_nearly_certain_layer_keeps_its_digits():
    """In float32 the margin of these is 1, or one of its last digits away; the definition in double precision is not 0."""
    logits = np.array([[17.0, 0.0, -1.0], [12.0, 0.0, -3.0], [30.0, 1.0, 0.0], [0.2, 0.1, 0.0]])
    found = measures.doubt(torch.softmax(torch.tensor(logits, dtype=torch.float32), -1))
    exact = [1.0 - lead(softmax(row)) for row in logits]
    exact[2] = 2 * math.exp(-29.0) + math.exp(-30.0)  # which double precision loses too
    np.testing.assert_allclose(found, exact, rtol=2e-6)


@pytest.mark.parametrize("measure", CONTRASTIVE)
def test_row_22_alpha_0_and_tokens_at_minus_infinity(measure):
    """A margin of exactly 1 makes every token plausible; those at minus infinity have no ratio, and must not make a NaN."""
    backbone = StubBackbone(torch.eye(4), 4)
    backbone.logits = lambda state: state  # a product would make NaN of infinities
    judge = judging(
        backbone, ExitPolicy(measure=measure, contrast=Contrast(alpha_decay=1.0), threshold=0.5)
    )
    for layer in (1, 2, 3, 4):
        logits = torch.tensor(
            [[200.0 + 30.0 * layer, 0.0, -math.inf, -math.inf], [0.5 * layer, 0.4, 0.3, 0.2]]
        )
        confidence, _ = judge.look(layer, logits, None)
        np.testing.assert_allclose(confidence[0], 1.0, atol=1e-6)
        assert np.isfinite(confidence[1])


def test_row_21_what_the_amateur_rules_out_is_a_lead_not_a_nan():
    expert = torch.tensor([[1.0, 0.9, 0.8]])
    amateur = torch.tensor([[0.0, 0.0, -math.inf]])
    everything = torch.tensor([[True] * 3])
    for tail, mass in KINDS.values():
        [confidence] = measures.contrasted(expert, amateur, everything, tail=tail, mass=mass)
        np.testing.assert_allclose(confidence, 1.0, atol=1e-6)


# -- which layer is the amateur --------------------------------------------------------------------------------------------


def layers_of_logits(seed, n_layers, rows, vocabulary, scale):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n_layers, rows, vocabulary)) * scale
    # layers have something in common
    return logits + 2 * scale * generator.normal(size=(1, rows, vocabulary))


settings_of_contrast = st.builds(
    Contrast,
    alpha=st.sampled_from([1e-3, 0.1, 0.5, 1.0]),
    alpha_decay=st.sampled_from([0.0, 0.3, 1.0]),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    measure=st.sampled_from(CONTRASTIVE),
    contrasting=settings_of_contrast,
    pruning=st.none()
    | st.builds(
        Pruning, st.sampled_from(["fixed", "decaying", "adaptive"]), st.just(11), st.just(3)
    ),
    mixed=st.booleans(),
    first=st.integers(1, 4),
    regroups=st.booleans(),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_row_21_every_layers_confidence_by_brute_force(
    measure, contrasting, pruning, mixed, first, regroups, seed, scale
):
    """All measures, settings, prunings and starting layers, row by row and token by token; rows may be dropped midway."""
    n_layers, rows, vocabulary = 7, 4, 13
    if mixed and pruning is not None:
        contrasting = Contrast(alpha=contrasting.alpha, plausible="kept")
    policy = ExitPolicy(measure=measure, contrast=contrasting, pruning=pruning, threshold=0.5)
    logits = layers_of_logits(seed, n_layers, rows, vocabulary, scale).astype(np.float32)
    judge = judging(StubBackbone(torch.eye(vocabulary), n_layers), policy)
    left, before, order = list(range(rows)), None, None
    for layer in range(1, n_layers + 1):
        state = torch.from_numpy(logits[layer - 1][left])
        if layer < first:
            judge.pass_by(state)
            continue
        confidence, scores = judge.look(layer, state, None)
        expected = []
        for place, row in enumerate(left):
            kept = np.arange(vocabulary)
            if order is not None:
                size = tokens_kept(
                    pruning, layer, first, n_layers, vocabulary, float(before[place])
                )
                kept = order[row][:size]
            amateurs = {m: only(logits[m - 1, row].astype(float), kept) for m in range(1, layer)}
            compared = only(logits[layer - 1, row].astype(float), kept)
            expected.append(contrast(measure, contrasting, layer, first, compared, amateurs))
            assert scores.best()[place] == compared.argmax()
        np.testing.assert_allclose(confidence, expected, rtol=0, atol=2e-5)
        before = confidence
        if order is None and pruning is not None:
            order = {row: np.argsort(-logits[layer - 1, row], kind="stable") for row in left}
        if regroups and len(left) > 2:
            judge.keep(torch.tensor([2, 0]))
            left, before = [left[2], left[0]], confidence[[2, 0]]


@pytest.mark.parametrize("measure", ["jsd", "jsd-code"])
def test_row_21_the_amateur_is_the_most_distant_layer_per_layer_of_distance(monkeypatch, measure):
    """m* itself, not only what comes of it; over the draws every candidate is somebody's, in one and the same batch too."""
    given_to = []
    contrasted = measures.contrasted
    monkeypatch.setattr(
        measures,
        "contrasted",
        lambda expert, amateur, *a, **k: (
            given_to.append(amateur) or contrasted(expert, amateur, *a, **k)
        ),
    )
    chosen = []
    for seed in range(8):
        logits = layers_of_logits(seed, 6, 5, 9, 1.5).astype(np.float32)
        judge = judging(StubBackbone(torch.eye(9), 6), ExitPolicy(measure=measure, threshold=0.5))
        for layer in range(1, 7):
            given_to.clear()
            judge.look(layer, torch.from_numpy(logits[layer - 1]), None)
            if layer < 3:
                assert not given_to, "there is no candidate at layers 1 and 2"
                continue
            for row in range(5):
                p = softmax(logits[layer - 1, row])
                plausible = np.flatnonzero(p >= 0.1 * p.max())
                amateurs = {m: logits[m - 1, row].astype(float) for m in range(1, layer)}
                m = amateur_of(measure, layer, 1, p, amateurs, plausible)
                np.testing.assert_allclose(given_to[0][row], logits[m - 1, row], atol=1e-6)
                chosen.append((layer, m))
    assert set(chosen) == {(layer, m) for layer in range(3, 7) for m in range(2, layer)}


def test_row_21_the_corrected_form_looks_back_to_the_first_exit_and_the_original_to_layer_2(
    monkeypatch,
):
    compared = {}
    for measure in ("jsd", "jsd-code"):
        judge = judging(StubBackbone(torch.eye(5), 6), ExitPolicy(measure=measure, threshold=0.5))
        asked, original = [], Judge._again
        monkeypatch.setattr(
            Judge,
            "_again",
            lambda self, layer, scores, to=asked, call=original: (
                to.append(layer) or call(self, layer, scores)
            ),
        )
        for layer in range(1, 7):
            state = torch.randn(2, 5, generator=torch.Generator().manual_seed(layer))
            if layer < 4:
                judge.pass_by(state)
            else:
                judge.look(layer, state, None)
        compared[measure] = asked
        monkeypatch.setattr(Judge, "_again", original)
    assert compared == {"jsd": [4, 4, 5], "jsd-code": [2, 3, 2, 3, 4, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("measure", "without"), [("jsd", 2), ("jsd-code", 2), ("weighted", 1), ("contrastive", 1)]
)
def test_row_21_layers_without_an_amateur_fall_back_to_the_softmax_margin(measure, without):
    logits = layers_of_logits(3, 4, 6, 8, 2.0).astype(np.float32)
    judge = judging(StubBackbone(torch.eye(8), 4), ExitPolicy(measure=measure, threshold=0.5))
    for layer in range(1, 5):
        confidence, _ = judge.look(layer, torch.from_numpy(logits[layer - 1]), None)
        margins = [lead(softmax(row)) for row in logits[layer - 1]]
        assert np.allclose(confidence, margins, rtol=0, atol=1e-6) == (layer <= without)


# -- in the decoder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", CONTRASTIVE)
@pytest.mark.parametrize(
    "fields",
    [
        {"contrast": Contrast(alpha=0.3, alpha_decay=1.0), "min_layer": 2},
        {
            "contrast": Contrast(plausible="kept"),
            "pruning": Pruning("decaying", largest=30, smallest=4),
        },
    ],
    ids=["alpha schedule", "mixed"],
)
def test_row_21_decoding_is_the_definition(tiny_t5, measure, fields):
    ending = ending_early(tiny_t5)
    exits = assert_agrees(ending, middling(ending, measure=measure, **fields), length=6)
    assert len(set(exits)) > 1


def test_the_emitted_token_is_the_layers_own_argmax_not_that_of_the_contrast():
    """p = (.45, .35, .2), amateur (.8, .1, .1): the contrast prefers token 1, the layer token 0, which is emitted."""
    states = [torch.tensor([p]).log() for p in ([0.8, 0.1, 0.1], [0.45, 0.35, 0.2])]
    judge = judging(StubBackbone(torch.eye(3), 3), ExitPolicy(measure="weighted", threshold=0.1))
    judge.look(1, states[0], None)
    confidence, scores = judge.look(2, states[1], None)
    ratios = np.array([0.45 / 0.8, 3.5, 2.0])
    np.testing.assert_allclose(confidence, [1.5 / ratios.sum()], atol=1e-6)
    assert scores.best().tolist() == [0]
