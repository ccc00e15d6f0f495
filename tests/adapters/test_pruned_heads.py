"""Vocabulary pruning: which tokens are kept, how many, and that what they say is exact."""

import copy

import numpy as np
import pytest
import torch
from exit_reference import StubBackbone, assert_agrees, judging, middling, tokens_kept
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_reference import FULL, LENGTH, prompts

from riskcal import ExitPolicy
from riskcal.pruning import Pruning
from riskcal_adapters.torch import EarlyExitT5
from riskcal_adapters.torch.heads import PrunedHead
from riskcal_adapters.torch.scores import Scores, likeliest

FORMS = ("fixed", "decaying", "adaptive", "adaptive-code")
EVERYTHING = Pruning("fixed", largest=10**6, smallest=41)


# -- which tokens are kept -----------------------------------------------------------------------------------------------

numbers = st.sampled_from(
    [-np.inf, -3.0, -1e-3, -0.0, 0.0, 1e-38, 0.25, 0.25 + 2**-25, 7.0, np.inf]
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.lists(numbers, min_size=9, max_size=9), min_size=1, max_size=3),
    k=st.integers(1, 9),
)
def test_row_20_the_kept_are_the_largest_by_rank_the_lowest_id_first_among_equals(logits, k):
    kept = likeliest(torch.tensor(logits, dtype=torch.float32), k)
    expected = [
        sorted(range(9), key=lambda token: (-np.float32(row[token]), token))[:k] for row in logits
    ]
    assert kept.tolist() == expected


def test_row_20_equal_logits_are_common_in_a_large_vocabulary_and_ordered_all_the_same():
    logits = torch.randn(4, 32_128, generator=torch.Generator().manual_seed(0))
    assert len(logits[0].unique()) < 32_128
    expected = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :2781]
    np.testing.assert_array_equal(likeliest(logits, 2781), expected)


@pytest.mark.parametrize("form", FORMS)
def test_row_20_sizes_of_the_documents_as_used_by_the_head(form):
    """24 layers, 32,128 words, the authors' k1 and k*; pruning starts at layer 2."""
    generator = torch.Generator().manual_seed(0)
    head = PrunedHead(StubBackbone(torch.randn(3, 32_128, generator=generator), 24), Pruning(form))
    state = torch.randn(2, 3, generator=generator)
    first = head.scores(2, state, None)
    assert first.ids is None
    assert first.logits.shape == (2, 32_128)
    order = first.logits.argsort(descending=True, stable=True)
    surely = np.float32([0.5, 0.99])
    sizes = {}
    for layer in (3, 7, 12, 15, 17, 19, 24):
        later = head.scores(layer, state, surely)
        sizes[layer] = (~later.logits.isneginf()).sum(1).tolist()
        for row, size in enumerate(sizes[layer]):
            assert later.ids[row, :size].equal(order[row, :size])
            torch.testing.assert_close(
                later.logits[row, :size], first.logits[row, order[row, :size]]
            )
    if form == "decaying":
        assert sizes == {
            i: [k, k] for i, k in zip(sizes, (1904, 842, 496, 398, 351, 315, 250), strict=True)
        }
    else:
        # adaptive: floor(2781 (1 - .9 c)); its original's least, a tenth of V, is above what is kept at all
        alike = {"fixed": [2781, 2781], "adaptive": [1529, 303], "adaptive-code": [2781, 2781]}[
            form
        ]
        assert all(size == alike for size in sizes.values())


def test_row_20_adaptive_sizes_depend_on_the_confidence_of_the_layer_before():
    pruning = Pruning("adaptive", largest=40, smallest=3)
    generator = torch.Generator().manual_seed(2)
    head = torch.randn(6, 50, generator=generator) * 1.5
    judge = judging(StubBackbone(head, 6), ExitPolicy(threshold=0.5, pruning=pruning))
    before, sizes = None, []
    for layer in range(1, 7):
        confidence, scores = judge.look(layer, torch.randn(3, 6, generator=generator), None)
        kept = (~scores.logits.isneginf()).sum(1).tolist()
        expected = (
            [50] * 3
            if layer == 1
            else [tokens_kept(pruning, layer, 1, 6, 50, float(c)) for c in before]
        )
        assert kept == expected
        before = confidence
        sizes += kept
    assert len(set(sizes)) > 5


# -- what they say ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("measure", ["softmax", "entropy"])
def test_row_20_decoding_with_a_pruned_head_is_masking_the_full_one(ending, form, measure):
    policy = middling(
        ending, measure=measure, pruning=Pruning(form, largest=30, smallest=4), min_layer=2
    )
    exits = assert_agrees(ending, policy, length=8)
    assert len(set(exits)) > 1


@pytest.mark.parametrize("measure", ["softmax", "jsd", "weighted"])
def test_row_20_keeping_every_token_is_not_pruning(ending, measure):
    decoder = EarlyExitT5(ending)
    plain = ExitPolicy(threshold=0.25, measure=measure)
    one, other = (
        decoder.generate(*prompts(5), policy=policy, max_new_tokens=LENGTH)
        for policy in (plain, plain.model_copy(update={"pruning": EVERYTHING}))
    )
    assert one.tokens.equal(other.tokens)
    assert one.exit_layers.equal(other.exit_layers)
    torch.testing.assert_close(one.confidence, other.confidence, rtol=0, atol=1e-5, equal_nan=True)
    assert len(one.exit_layers.unique()) > 3


def test_row_20_ids_map_back_to_the_vocabulary():
    """A token whose logit is largest at every layer is emitted under its own id, wherever it ranks."""
    head = torch.eye(12)
    judge = judging(
        StubBackbone(head, 4),
        ExitPolicy(threshold=0.5, pruning=Pruning("decaying", largest=8, smallest=2)),
    )
    states = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    winners = [11, 0, 7]
    for row, winner in enumerate(winners):
        states[row, winner] = 4.0
    judge.look(1, states, None)
    for layer in (2, 3, 4):
        # the winner stays among the kept but is not the first of the first ranking
        second = states.clone()
        second[torch.arange(3), states.topk(2).indices[:, 1]] = 5.0
        _, scores = judge.look(layer, second, None)
        assert scores.best().tolist() == states.topk(2).indices[:, 1].tolist()


def test_row_20_a_pruned_token_cannot_be_emitted():
    judge = judging(
        StubBackbone(torch.eye(6), 3),
        ExitPolicy(pruning=Pruning("fixed", largest=3, smallest=3), threshold=0.1),
    )
    judge.look(1, torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]), None)
    confidence, scores = judge.look(2, torch.tensor([[0.0, 0.5, 0.0, 0.0, 0.0, 9.0]]), None)
    assert scores.best().tolist() == [1]
    weights = np.exp([0.5, 0.0, 0.0])
    np.testing.assert_allclose(confidence, [(weights[0] - weights[1]) / weights.sum()], atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS), seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 6.0])
)
def test_row_20_a_margin_over_fewer_tokens_is_never_smaller(form, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    backbone = StubBackbone(torch.randn(5, 60, generator=generator) * scale, 6)
    pruned, full = (
        judging(backbone, ExitPolicy(threshold=0.1, pruning=p))
        for p in (Pruning(form, largest=50, smallest=2), None)
    )
    for layer in range(1, 7):
        state = torch.randn(4, 5, generator=generator)
        (kept, scores), (everything, all_scores) = (
            judge.look(layer, state, None) for judge in (pruned, full)
        )
        best = scores.best() == all_scores.best()  # else the margin is that of another token
        assert (kept >= everything - 1e-6)[best.numpy()].all()


def test_row_20_equal_logits_emit_the_lowest_id_kept(tiny_t5):
    tied = copy.deepcopy(tiny_t5)
    tied.lm_head.weight = torch.nn.Parameter(torch.zeros_like(tied.lm_head.weight))
    for form in FORMS:
        policy = ExitPolicy(threshold=0.5, pruning=Pruning(form, largest=20, smallest=3))
        generation = EarlyExitT5(tied).generate(*prompts(3), policy=policy, max_new_tokens=2)
        assert (generation.tokens == 0).all()
        assert (generation.confidence == 0).all()
        assert (generation.exit_layers == tied.config.num_decoder_layers).all()


def test_best_is_argmax_with_nan_the_largest():
    nan = float("nan")
    logits = torch.tensor([[1.0, 3.0, 3.0], [nan, 9.0, nan], [-np.inf, -np.inf, -np.inf]])
    scores = Scores(logits, torch.tensor([[5, 4, 2], [7, 1, 3], [8, 6, 9]]))
    assert scores.best().tolist() == [2, 3, 6]
    assert Scores(logits).best().tolist() == logits.argmax(1).tolist()


# -- what they cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["diverge", "regroup"])
def test_row_20_one_full_head_and_one_gather_per_position(tiny_t5, monkeypatch, batching):
    decoder = EarlyExitT5(tiny_t5)
    full, gathered = [], []
    logits, select = decoder._backbone.logits, torch.Tensor.index_select
    monkeypatch.setattr(
        decoder._backbone, "logits", lambda state: full.append(len(state)) or logits(state)
    )
    head = decoder._backbone.head_by_token

    def counting(tensor, axis, index):
        if tensor is head:
            gathered.append(len(index))
        return select(tensor, axis, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counting)
    policy = ExitPolicy(
        threshold=9.0, batching=batching, pruning=Pruning("fixed", largest=6, smallest=6)
    )
    decoder.generate(*prompts(3), policy=policy, max_new_tokens=4)
    assert full == [3] * 4
    assert gathered == [3 * 6] * 4


def test_a_full_model_policy_with_pruning_is_the_full_model(ending):
    decoder = EarlyExitT5(ending)
    full = decoder.generate(*prompts(4), policy=FULL, max_new_tokens=LENGTH)
    pruned = FULL.model_copy(
        update={"pruning": Pruning("fixed", largest=2, smallest=2), "measure": "jsd"}
    )
    same = decoder.generate(*prompts(4), policy=pruned, max_new_tokens=LENGTH)
    assert same.tokens.equal(full.tokens)
    torch.testing.assert_close(same.confidence, full.confidence, rtol=0, atol=0, equal_nan=True)
