"""Objectives of early-exit training: losses against sums by hand, passes against the decoder, and known bugs as mutants."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from t5_reference import LENGTH, prompts

from riskcal import ExitPolicy, RiskcalError
from riskcal.pruning import Pruning
from riskcal_adapters.torch import EarlyExitT5
from riskcal_adapters.torch.training import (
    ExitClassifier,
    classifier_confidence,
    decoder_pass,
    dropout_rates,
    layer_weighted_loss,
    layer_weights,
    pruned_margin,
    softmax_margin,
    state_saturation,
    teacher_forced,
)

KINDS = {
    "linear": [1, 2, 3, 4, 5, 6],
    "uniform": [1, 1, 1, 1, 1, 1],
    "geometric": [2, 4, 8, 16, 32, 64],
}


@pytest.fixture
def batch():
    """Logits (6, 4, 5, 7) and labels of ragged lengths, padded with -100."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 4, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (4, 5), generator=generator)
    for row, length in enumerate((5, 1, 3, 4)):
        labels[row, length:] = -100
    return logits, labels


def shifted(tokens):
    return torch.nn.functional.pad(tokens[:, :-1], (1, 0))


# -- the layer-weighted loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_row_10_layer_weights(kind):
    weights = np.array(KINDS[kind]) / sum(KINDS[kind])
    np.testing.assert_allclose(layer_weights(6, kind), weights, rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_row_10_loss_and_gradient_are_the_sum_by_hand(batch, kind):
    logits, labels = batch
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(layer_weighted_loss(logits, labels, kind), logits)
    real = labels != -100
    by_hand = torch.zeros_like(logits)
    loss = 0.0
    for i, weight in enumerate(KINDS[kind]):
        probabilities = logits[i].detach()[real].softmax(-1)
        said = torch.nn.functional.one_hot(labels[real], 7)
        by_hand[i][real] = weight / sum(KINDS[kind]) * (probabilities - said) / real.sum()
        loss -= weight / sum(KINDS[kind]) * (probabilities.log() * said).sum() / real.sum()
    # the loss is computed in float32
    torch.testing.assert_close(gradient, by_hand, rtol=1e-5, atol=1e-8)
    assert layer_weighted_loss(logits, labels, kind).item() == pytest.approx(float(loss), rel=1e-6)


def padding_counts(loss, logits, labels) -> bool:
    """Whether logits at padding change a loss."""
    other = (
        logits
        + 100
        * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        * (labels == -100)[..., None]
    )
    return not math.isclose(float(loss(logits, labels)), float(loss(other, labels)), rel_tol=1e-6)


def test_row_10_padding_contributes_nothing(batch):
    assert not padding_counts(layer_weighted_loss, *batch)


def test_row_10_a_mask_repeated_flat_counts_padding(batch):
    """The original's suspected bug: ``resize`` of the mask (B, T) to (B, T, L) repeats its flat data instead of broadcasting."""

    def resized(logits, labels):
        losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0).expand(6, 4, 5)[..., None])[
            ..., 0
        ]
        mask = torch.from_numpy(np.resize((labels != -100).numpy(), (4, 5, 6)).astype(float))
        return (losses.permute(1, 2, 0) * mask * layer_weights(6)).sum() / (labels != -100).sum()

    assert padding_counts(resized, *batch)


def test_only_padding_is_refused(batch):
    logits, labels = batch
    with pytest.raises(RiskcalError, match="labels: every position is padding"):
        layer_weighted_loss(logits, torch.full_like(labels, -100))
    with pytest.raises(RiskcalError, match="kind"):
        layer_weights(3, "cubic")


# -- the exit-aware pass -----------------------------------------------------------------------------------------------


def a_classifier(d_model):
    classifier = ExitClassifier(d_model)
    with torch.no_grad():
        classifier.weight.copy_(
            torch.randn(d_model, generator=torch.Generator().manual_seed(5)) * 0.1
        )
        classifier.bias.fill_(0.2)
    return classifier


def measured(model, measure):
    """The decoder, a policy without its threshold, and the training's confidence for a measure."""
    classifier = a_classifier(model.config.d_model)
    decoder = EarlyExitT5(model, classifier=classifier)
    return decoder, *{
        "softmax": ({}, softmax_margin),
        "state": ({"measure": "state"}, state_saturation),
        "classifier": ({"measure": "classifier"}, classifier_confidence(classifier)),
        "pruned": ({"pruning": Pruning("fixed", largest=4, smallest=4)}, pruned_margin(4)),
    }[measure]


@pytest.mark.parametrize("measure", ["softmax", "state", "classifier", "pruned"])
def test_exit_aware_pass_is_what_decoding_sees(tiny_t5, measure):
    decoder, settings, confidence = measured(tiny_t5, measure)
    input_ids, mask = prompts(5)
    full = decoder.generate(input_ids, mask, max_new_tokens=LENGTH).tokens
    with torch.no_grad():
        states, logits = decoder_pass(tiny_t5, input_ids, mask, shifted(full))
        # about half of the tokens exit at layer 2
        threshold = float(confidence(states[:2], logits[:2]).median())
    policy = ExitPolicy(threshold=threshold, **settings)
    generation = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=LENGTH)
    with torch.no_grad():
        states, logits = decoder_pass(
            tiny_t5, input_ids, mask, shifted(generation.tokens), threshold, confidence=confidence
        )
        values = torch.stack(
            [confidence(states[: i + 1], logits[: i + 1]) for i in range(len(states))]
        )
    values[-1] = math.inf  # the last layer always accepts
    first = (values >= threshold).int().argmax(0)
    assert (generation.exit_layers == first + 1).all()
    assert len(first.unique()) > 1
    early = generation.exit_layers < decoder.n_layers
    seen = values.gather(0, first[None])[0]
    torch.testing.assert_close(generation.confidence[early], seen[early], rtol=0, atol=1e-5)
    if measure == "pruned":  # it says the likeliest of the kept tokens only
        kept = logits[0].topk(4).indices
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept.expand(len(logits), *kept.shape),
                                                            logits.gather(-1, kept.expand(len(logits), *kept.shape)))  # fmt: skip
    at_exit = logits.argmax(-1).gather(0, first[None])[0]
    assert (generation.tokens == at_exit).all()


def test_plain_pass_is_exit_aware_for_a_recomputed_cache(tiny_t5):
    """A decoder that recomputes what was skipped sees plain states, so its exit-aware training is the plain one."""
    decoder = EarlyExitT5(tiny_t5)
    input_ids, mask = prompts(5)
    full = decoder.generate(input_ids, mask, max_new_tokens=LENGTH).tokens
    with torch.no_grad():
        states, logits = decoder_pass(tiny_t5, input_ids, mask, shifted(full))
        threshold = float(softmax_margin(states[:2], logits[:2]).median())
    same = {}
    for cache in ("recompute", "project"):
        policy = ExitPolicy(threshold=threshold, cache=cache)
        generation = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=LENGTH)
        with torch.no_grad():
            states, logits = decoder_pass(tiny_t5, input_ids, mask, shifted(generation.tokens))
            margins = torch.stack(
                [softmax_margin(states[:i], logits[:i]) for i in range(1, len(states) + 1)]
            )
        margins[-1] = math.inf
        first = (margins >= threshold).int().argmax(0)
        at_exit = margins.gather(0, first[None])[0]
        early = generation.exit_layers < decoder.n_layers
        same[cache] = bool((generation.exit_layers == first + 1).all()) and torch.allclose(
            generation.confidence[early], at_exit[early], rtol=0, atol=1e-5
        )
    assert same == {"recompute": True, "project": False}


@pytest.mark.parametrize("measure", ["softmax", "state", "classifier", "pruned"])
def test_threshold_never_reached_is_the_plain_pass(tiny_t5, measure):
    confidence = measured(tiny_t5, measure)[-1]
    input_ids, mask = prompts(4)
    targets = torch.randint(2, 41, (4, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = decoder_pass(tiny_t5, input_ids, mask, shifted(targets))
        aware = decoder_pass(tiny_t5, input_ids, mask, shifted(targets), 2.0, confidence=confidence)
    for mine, other in zip(aware, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_an_exit_changes_what_others_see_but_not_its_own_path(tiny_t5):
    input_ids, mask = prompts(3)
    targets = torch.randint(2, 41, (3, 6), generator=torch.Generator().manual_seed(1))

    def only_the_third(states, logits):
        value = torch.zeros(3, 6)
        value[:, 2] = 1.0
        return value

    with torch.no_grad():
        plain, _ = decoder_pass(tiny_t5, input_ids, mask, shifted(targets))
        aware, _ = decoder_pass(
            tiny_t5, input_ids, mask, shifted(targets), 0.5, confidence=only_the_third
        )
    torch.testing.assert_close(aware[:, :, :3], plain[:, :, :3], rtol=0, atol=2e-5)
    torch.testing.assert_close(aware[0], plain[0], rtol=0, atol=2e-5)
    assert ((aware - plain)[-1, :, 3:].abs().amax(-1) > 1e-4).all()


def test_no_gradient_flows_through_the_decision(tiny_t5):
    states = [torch.randn(2, 3, 32, requires_grad=True) for _ in range(2)]
    logits = [torch.randn(2, 3, 41, requires_grad=True) for _ in range(2)]
    for measure in ("softmax", "state", "classifier", "pruned"):
        assert not measured(tiny_t5, measure)[-1](states, logits).requires_grad


def test_pruned_margin_needs_two_tokens():
    with pytest.raises(RiskcalError, match="kept: 1"):
        pruned_margin(1)


# -- dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [math.inf, 2.0])
def test_dropout_acts_where_hugging_face_has_it(tiny_t5, monkeypatch, threshold):
    """In training mode the last layer's logits are those of the model's own forward, dropout for dropout."""
    model = copy.deepcopy(tiny_t5).train()
    model.set_attn_implementation("eager")
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.3
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    calls = []

    def striped(values, p=0.5, training=True, inplace=False):
        assert (p, training) == (0.3, True)
        calls.append(tuple(values.shape))
        dropped = torch.arange(values.numel()).view(values.shape) % 3 == 0
        return values.masked_fill(dropped, 0.0) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", striped)
    input_ids, mask = prompts(3)
    mask[0, -2:] = 0
    given = shifted(torch.randint(2, 41, (3, 6), generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        own = model(input_ids=input_ids, attention_mask=mask, decoder_input_ids=given).logits
        of_the_model, calls[:] = sorted(calls), []
        _, logits = decoder_pass(model, input_ids, mask, given, threshold)
    torch.testing.assert_close(logits[-1], own, rtol=0, atol=2e-5)
    # every layer has one, dropped out anew
    heads = [(*given.shape, model.config.d_model)] * (len(logits) - 1)
    assert sorted(calls) == sorted(of_the_model + heads)


# -- layer dropout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_pass_gives_the_last_logits_of_every_class_that_a_decoder_takes(kind, tied):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=41,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=3,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    ids, targets = torch.randint(2, 41, (2, 6)), torch.randint(2, 41, (2, 5))
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": targets}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_(0, 2)
        own = model(**known).logits
        torch.testing.assert_close(decoder_pass(model, **known)[1][-1], own, rtol=1e-4, atol=1e-4)


def test_dropout_rates_rise_to_the_largest():
    expected = [0.5 * 0.2 * (math.exp(layer * math.log(2) / 7) - 1) for layer in range(8)]
    np.testing.assert_allclose(
        dropout_rates(8, 0.2, progress=0.5), expected, rtol=1e-12, atol=1e-15
    )
    assert float(dropout_rates(8, 0.2)[-1]) == pytest.approx(0.2)
    assert dropout_rates(2, 0.2, progress=0).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0.1), "n_layers: 1 is not a whole number of at least 2"),
        ((8, 1.5), r"largest: 1.5 is not in \[0, 1\]"),
        ((8, 0.1, -1), r"progress: -1 is not in \[0, 1\]"),
    ],
)
def test_dropout_rates_that_are_none_are_refused(arguments, message):
    with pytest.raises(RiskcalError, match=message):
        dropout_rates(*arguments)


def test_a_dropped_layer_leaves_its_rows_as_they_were(tiny_t5):
    input_ids, mask = prompts(3)
    targets = torch.randint(2, 41, (3, 6), generator=torch.Generator().manual_seed(1))
    dropped = torch.zeros(tiny_t5.config.num_decoder_layers, 3, dtype=torch.bool)
    dropped[2, 1] = True
    with torch.no_grad():
        plain, _ = decoder_pass(tiny_t5, input_ids, mask, shifted(targets))
        states, logits = decoder_pass(tiny_t5, input_ids, mask, shifted(targets), dropped=dropped)
        exits_at_2 = teacher_forced(tiny_t5, input_ids, mask, shifted(targets))[1]
    assert (states[2, 1] == states[1, 1]).all()
    torch.testing.assert_close(logits[2, 1], exits_at_2[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(states[:, [0, 2]], plain[:, [0, 2]], rtol=0, atol=1e-6)
    assert not torch.allclose(states[3, 1], plain[3, 1])
