"""The exit classifier: its two losses, F1, labels, and training that leaves the backbone alone."""

import hashlib
import math
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import riskcal
from riskcal import ExitPolicy, RiskcalError
from riskcal_adapters.torch import load_example
from riskcal_adapters.torch.training import (
    ExitClassifier,
    consistency_labels,
    decoder_pass,
    do_not_exit_f1,
    geometric_loss,
    independent_loss,
    load_classifier,
    save_classifier,
)

LAYERS, BATCH, LENGTH = 5, 3, 4


@st.composite
def scored(draw):
    """Scores and consistency (L - 1, B, T) with ragged labels."""
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(size=(LAYERS - 1, BATCH, LENGTH)))
    consistent = torch.from_numpy(rng.random((LAYERS - 1, BATCH, LENGTH)) < rng.random())
    labels = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for row in range(BATCH):
        labels[row, draw(st.integers(1, LENGTH)) :] = -100
    return scores.requires_grad_(True), consistent, labels


def positions(labels):
    return [tuple(place) for place in (labels != -100).nonzero().tolist()]


# -- labels ------------------------------------------------------------------------------------------------------------


def known_logits():
    """Layers 1 to 5 say 2, 0, 2, 1, 2 at the one position there is."""
    said = torch.tensor([2, 0, 2, 1, 2])
    return torch.nn.functional.one_hot(said, 3)[:, None, None, :].float()


def test_row_11_labels_exclude_the_last_layer_and_compare_with_it():
    assert consistency_labels(known_logits()).squeeze().tolist() == [True, False, True, False]


def test_row_11_states_in_the_order_of_the_original_code_shift_the_labels():
    """FREE reads states [i - 1] for i from 0: the last first, so that the teacher is the layer before it."""
    logits = known_logits()
    shifted = torch.stack([logits[i - 1] for i in range(len(logits))])
    assert consistency_labels(shifted).squeeze().tolist() == [False, False, False, False]


# -- losses ------------------------------------------------------------------------------------------------------------


@given(scored())
def test_independent_loss_is_the_mean_over_layers_of_cross_entropies(case):
    scores, consistent, labels = case
    places = positions(labels)
    total = 0.0
    for layer in range(LAYERS - 1):
        for place in places:
            c = 1 / (1 + math.exp(-scores[layer][place].item()))
            total -= math.log(c if consistent[layer][place] else 1 - c) / len(places) / (LAYERS - 1)
    assert independent_loss(scores, consistent, labels).item() == pytest.approx(total, rel=1e-9)


@given(scored())
def test_balanced_loss_weighs_both_classes_of_a_layer_alike(case):
    scores, consistent, labels = case
    places = positions(labels)
    total = 0.0
    for layer in range(LAYERS - 1):
        classes = {True: [], False: []}
        for place in places:
            c = 1 / (1 + math.exp(-scores[layer][place].item()))
            classes[bool(consistent[layer][place])].append(
                -math.log(c if consistent[layer][place] else 1 - c)
            )
        if classes[True] and classes[False]:  # a class alone has weight one minus one
            total += (np.mean(classes[True]) + np.mean(classes[False])) / 2 / (LAYERS - 1)
    assert independent_loss(scores, consistent, labels, balanced=True).item() == pytest.approx(
        total, rel=1e-9, abs=1e-12
    )


@given(scored())
def test_row_11_geometric_loss_and_no_gradient_past_the_first_consistent_layer(case):
    scores, consistent, labels = case
    (gradient,) = torch.autograd.grad(geometric_loss(scores, consistent, labels), scores)
    places = positions(labels)
    total = 0.0
    for place in places:
        first = next((layer for layer in range(LAYERS - 1) if consistent[layer][place]), None)
        for layer in range(LAYERS - 1):
            c = 1 / (1 + math.exp(-scores[layer][place].item()))
            if first is None or layer < first:
                total -= math.log(1 - c) / len(places)
                assert gradient[layer][place] > 0
            elif layer == first:
                total -= math.log(c) / len(places)
                assert gradient[layer][place] < 0
            else:
                assert gradient[layer][place] == 0
    assert geometric_loss(scores, consistent, labels).item() == pytest.approx(total, rel=1e-9)


@given(scored(), st.booleans())
def test_padding_trains_no_classifier(case, balanced):
    scores, consistent, labels = case
    for loss in (
        independent_loss(scores, consistent, labels, balanced=balanced),
        geometric_loss(scores, consistent, labels),
    ):
        (gradient,) = torch.autograd.grad(loss, scores)
        assert (gradient[:, labels == -100] == 0).all()


@given(scored(), st.floats(0.1, 0.9))
def test_f1_of_do_not_exit(case, threshold):
    scores, consistent, labels = case
    found = do_not_exit_f1(scores, consistent, labels, threshold)
    places = positions(labels)
    for layer in range(LAYERS - 1):
        kept = {
            place
            for place in places
            if 1 / (1 + math.exp(-scores[layer][place].item())) < threshold
        }
        wanted = {place for place in places if not consistent[layer][place]}
        if kept | wanted:
            precision = len(kept & wanted) / max(len(kept), 1)
            recall = len(kept & wanted) / max(len(wanted), 1)
            expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
            assert float(found[layer]) == pytest.approx(expected, abs=1e-6)
        else:
            assert math.isnan(found[layer])


# -- training ----------------------------------------------------------------------------------------------------------


def digest(model) -> str:
    parts = [
        name.encode() + value.detach().numpy().tobytes()
        for name, value in sorted(model.state_dict().items())
    ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_an_objective_that_there_is_not_is_refused_before_anything_is_written(tiny_t5, tmp_path):
    from riskcal_adapters.torch.training.trainer import train_classifier

    with pytest.raises(RiskcalError, match=r"objective: .*geometric"):
        train_classifier(tiny_t5, [([5, 1], [7, 1])], tmp_path / "run", "geometrical")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["independent", "balanced", "geometric"])
def test_row_11_training_a_classifier_leaves_the_backbone_untouched(tiny_t5, tmp_path, objective):
    from riskcal_adapters.torch.training.trainer import train_classifier

    rng = np.random.default_rng(0)
    some = [(rng.integers(2, 41, 5).tolist(), rng.integers(2, 41, 4).tolist()) for _ in range(24)]
    before = digest(tiny_t5)
    classifier = train_classifier(tiny_t5, some, tmp_path, objective, steps=4, batch_size=8)
    assert digest(tiny_t5) == before
    assert all(parameter.grad is None for parameter in tiny_t5.parameters())
    assert {name: tuple(value.shape) for name, value in classifier.state_dict().items()} == {
        "weight": (32,),
        "bias": (),
    }
    assert classifier.weight.abs().sum() > 0


# -- files and the shipped classifiers ---------------------------------------------------------------------------------


def test_a_classifier_comes_back_from_its_file(tmp_path):
    classifier = ExitClassifier(6)
    with torch.no_grad():
        classifier.weight.copy_(torch.arange(6.0))
        classifier.bias.fill_(-1.5)
    save_classifier(classifier, tmp_path / "c.safetensors")
    again = load_classifier(tmp_path / "c.safetensors")
    states = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(states), (states * torch.arange(6.0)).sum(-1) - 1.5)
    assert torch.sigmoid(ExitClassifier(6)(states)).eq(0.5).all()


def test_files_that_hold_no_classifier_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(RiskcalError, match=r"text\.safetensors: cannot be read"):
        load_classifier(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(())}, tmp_path / "wide.safetensors")
    with pytest.raises(RiskcalError, match="does not hold weight"):
        load_classifier(tmp_path / "wide.safetensors")


@pytest.fixture(scope="module")
def example():
    return load_example("g2p")


WORDS = [
    "phoneme",
    "calibrate",
    "early",
    "exit",
    "thresholds",
    "layer",
    "rhythm",
    "queue",
    "colonel",
    "hiccough",
]


def test_the_example_exits_by_its_classifier(example):
    full = example.generate(*example.encode(WORDS))
    depths = []
    for threshold in (0.999, 0.95, 0.8):
        policy = ExitPolicy(threshold=threshold, measure="classifier")
        generation = example.generate(*example.encode(WORDS), policy=policy)
        depths.append(generation.exit_layers[generation.exit_layers > 0].float().mean().item())
    assert example.n_layers > depths[0] > depths[1] > depths[2] >= 1
    closer = example.generate(
        *example.encode(WORDS), policy=ExitPolicy(threshold=0.999, measure="classifier")
    )
    same = [
        a == b
        for a, b in zip(example.decode(full.tokens), example.decode(closer.tokens), strict=True)
    ]
    assert sum(same) >= 8


@pytest.mark.parametrize("objective", ["independent", "geometric"])
def test_shipped_classifiers_rank_consistent_layers_higher(example, objective):
    folder = resources.files("riskcal_adapters") / "g2p" / "checkpoint"
    classifier = load_classifier(folder / f"classifier-{objective}.safetensors")
    # 100 held-out words
    input_ids, mask = example.encode(sorted(riskcal.load_example("g2p").prompts.tolist())[::30])
    tokens = example.generate(input_ids, mask).tokens
    with torch.no_grad():
        shifted = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
        states, logits = decoder_pass(example.model, input_ids, mask, shifted)
        scores = classifier(states[:-1])[:, tokens != 0]
        consistent = consistency_labels(logits)[:, tokens != 0]
    for layer in range(3):  # above them nearly all is consistent
        better = scores[layer][consistent[layer]][:, None] > scores[layer][~consistent[layer]][None]
        assert (~consistent[layer]).sum() >= 10
        assert better.float().mean() > 0.6  # about .69 to .84 on 1,000 words; chance is .5
