"""Confidence measures: their formulas, when they exit, and the baselines that frame them (oracle, static depth)."""

import copy
import math

import numpy as np
import pytest
import torch
from exit_reference import (
    CLASSIFIER,
    OF_LOGITS,
    Reference,
    assert_agrees,
    cosine,
    expected,
    middling,
    truncated,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_reference import FULL, LENGTH, hugging_face, prompts

from riskcal import ExitPolicy
from riskcal.policy import Contrast
from riskcal.pruning import Pruning
from riskcal_adapters.torch import EarlyExitT5, measures
from riskcal_adapters.torch.confidence import CONTRASTIVE, MEASURES

PRUNED = Pruning("adaptive", largest=30, smallest=4)


# -- formulas ----------------------------------------------------------------------------------------------------------

OF_ARRAYS = {
    "softmax": measures.softmax_margin,
    "max": lambda logits: measures.read(measures.max_probability(logits)),
    "entropy": lambda logits: measures.read(measures.negative_entropy(logits)),
}


@pytest.mark.parametrize("name", OF_ARRAYS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0, 60.0])
def test_row_3_measures_of_logits_are_the_float64_formulas(name, scale):
    logits = torch.randn(60, 68, generator=torch.Generator().manual_seed(0)) * scale
    logits[::3, 5:40] = -math.inf  # as pruning leaves them
    logits[1::3, 3] = logits[1::3].amax(1)  # ties
    exact = [OF_LOGITS[name](row.numpy()) for row in logits]
    # entropies are up to 4
    np.testing.assert_allclose(OF_ARRAYS[name](logits), exact, rtol=5e-7, atol=1e-6)
    assert OF_ARRAYS[name](logits).dtype == np.float32


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e5])
def test_row_3_saturation_is_each_rows_own_cosine(scale):
    generator = torch.Generator().manual_seed(0)
    state, before = (torch.randn(30, 64, generator=generator) * scale for _ in range(2))
    before[10:20] = state[10:20] + 0.01 * before[10:20]
    # rows of very different lengths: a norm over the whole batch would give the short ones 0
    state, before = (x * torch.logspace(-4, 4, 30)[:, None] for x in (state, before))
    exact = [cosine(a, b) for a, b in zip(state, before, strict=True)]
    np.testing.assert_allclose(measures.saturation(state, before), exact, rtol=0, atol=1e-6)


def test_row_3_saturation_is_0_at_layer_1_and_at_length_zero(tiny_t5):
    state = torch.ones(3, 4)
    state[1] = 0.0
    assert measures.saturation(torch.ones(2, 4), None).tolist() == [0.0, 0.0]
    assert measures.saturation(state, torch.ones(3, 4)).tolist() == [1.0, 0.0, 1.0]
    assert measures.saturation(torch.ones(3, 4), state).tolist() == [1.0, 0.0, 1.0]
    decoder = EarlyExitT5(tiny_t5)
    first = decoder.generate(
        *prompts(3), policy=ExitPolicy.static(1, measure="state"), max_new_tokens=3
    )
    assert (first.confidence == 0).all()
    above = decoder.generate(
        *prompts(3), policy=ExitPolicy(measure="state", threshold=1e-9), max_new_tokens=3
    )
    assert (above.exit_layers >= 2).all()


@pytest.mark.parametrize("shape", [(16,), (1, 16), (16, 1)])
def test_row_3_classifier_is_the_logistic_function_of_the_raw_state(tiny_t5, shape):
    generator = torch.Generator().manual_seed(0)
    state, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in [(20, 16), (16,), (1,)]
    )
    classifier = type("Linear", (), {"weight": weight, "bias": bias[0]})
    exact = 1 / (1 + np.exp(-(state @ weight + bias).numpy()))
    np.testing.assert_allclose(
        measures.classifier_probability(state, classifier), exact, rtol=0, atol=1e-6
    )
    # and any shape of d weights and one bias is taken by the decoder, as torch.nn.Linear(d, 1) has them
    linear = torch.nn.Linear(32, 1)
    given = type(
        "Linear",
        (),
        {
            "weight": linear.weight.reshape([32 if n == 16 else n for n in shape]),
            "bias": linear.bias,
        },
    )
    policy = ExitPolicy(measure="classifier", threshold=0.5)
    alike = [
        EarlyExitT5(tiny_t5, classifier=c).generate(*prompts(3), policy=policy, max_new_tokens=4)
        for c in (linear, given)
    ]
    assert alike[0].confidence.equal(alike[1].confidence)


# -- in the decoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_row_3_decoding_with_each_measure_is_its_definition(ending, measure):
    exits = assert_agrees(
        ending, middling(ending, measure=measure), classifier=CLASSIFIER, length=8
    )
    late = middling(ending, measure=measure, min_layer=2)
    exits += assert_agrees(ending, late, classifier=CLASSIFIER, batch=2, side="left", length=5)
    assert len(set(exits)) > 2, (
        "every token exited at one or two layers: the threshold tests little"
    )


class Noting(Reference):
    """Notes what every layer of the full model's path says."""

    def __init__(self, model):
        super().__init__(model, CLASSIFIER)
        self.confidences, self.agrees = [], []

    def judged(self, policy, row, thresholds, states):
        exits = super().judged(policy, row, thresholds, states)
        best = [self.logits(state).argmax() for state in states[1:]]
        kept = {layer: logits.argmax() for layer, (*_, logits) in exits.items()}
        best = [kept.get(layer + 1, token) for layer, token in enumerate(best[:-1])] + [best[-1]]
        self.confidences.append(
            [exits[i + 1][0] if i + 1 in exits else math.nan for i in range(self.n_layers)]
        )
        self.agrees.append([token == best[-1] for token in best])
        return exits

    def commit(self, policy, row, step, judged, depth):
        super().commit(
            policy.model_copy(update={"emits": "last"}), row, step, judged, self.n_layers
        )


@pytest.mark.parametrize("pruning", [None, PRUNED], ids=["full head", "pruned head"])
@pytest.mark.parametrize("measure", MEASURES)
def test_row_3_traces_hold_every_layers_confidence_along_the_full_models_path(
    ending, measure, pruning
):
    # else layers before it are told all the same
    min_layer = 2 if pruning is not None or measure in CONTRASTIVE else 1
    policy = ExitPolicy(measure=measure, threshold=9.0, min_layer=min_layer, pruning=pruning)
    decoder = EarlyExitT5(ending, classifier=CLASSIFIER)
    input_ids, mask = prompts(1)
    traces = decoder.trace(input_ids, mask, max_new_tokens=5, policy=policy)
    reference = Noting(ending)
    reference.generate([input_ids[0]], policy, length=5)
    np.testing.assert_allclose(traces.confidence, reference.confidences, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(traces.agrees, reference.agrees)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pruning", [None, PRUNED], ids=["full head", "pruned head"])
def test_row_3_measures_of_other_types_stay_close_to_float32(tiny_t5, dtype, pruning):
    converted = copy.deepcopy(tiny_t5).to(dtype)
    for measure in MEASURES:
        policy = ExitPolicy(thresholds={1: 99.0, 2: -99.0}, measure=measure, pruning=pruning)
        one, other = (
            EarlyExitT5(model, classifier=CLASSIFIER).generate(
                *prompts(5), policy=policy, max_new_tokens=1
            )
            for model in (tiny_t5, converted)
        )
        assert other.confidence.dtype == torch.float32
        # these choose: a tiny difference may change all
        if measure not in ("oracle", "jsd", "jsd-code"):
            tolerance = 0.2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(other.confidence, one.confidence, rtol=0, atol=tolerance)


@pytest.mark.parametrize("measure", MEASURES)
def test_row_2_a_confidence_of_exactly_the_threshold_exits_and_the_next_number_does_not(
    tiny_t5, measure
):
    decoder = EarlyExitT5(tiny_t5, classifier=CLASSIFIER)
    one, _ = prompts(1)
    confidence = decoder.generate(
        one, policy=ExitPolicy.static(2, measure=measure), max_new_tokens=1
    ).confidence.item()
    exactly = ExitPolicy(thresholds={2: confidence}, measure=measure)
    above = ExitPolicy(
        thresholds={2: float(np.nextafter(np.float32(confidence), np.float32(math.inf)))},
        measure=measure,
    )
    assert decoder.generate(one, policy=exactly, max_new_tokens=1).exit_layers.item() == 2
    later = decoder.generate(one, policy=above, max_new_tokens=1)
    assert later.exit_layers.item() == decoder.n_layers
    assert later.refused.item() == np.float32(confidence)


@pytest.mark.parametrize("pruning", [None, PRUNED], ids=["full head", "pruned head"])
@pytest.mark.parametrize(
    "measure", [name for name in MEASURES if name not in ("state", "classifier", "oracle")]
)
def test_row_2_nan_never_exits(tiny_t5, measure, pruning):
    broken = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    policy = ExitPolicy(measure=measure, threshold=-9.0, pruning=pruning)
    generation = EarlyExitT5(broken).generate(*prompts(2), policy=policy, max_new_tokens=3)
    assert (generation.exit_layers == broken.config.num_decoder_layers).all()
    assert generation.refused.isneginf().all()


@pytest.mark.parametrize("measure", ["state", "classifier"])
def test_row_2_nan_states_never_exit(tiny_t5, measure):
    broken = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        broken.decoder.block[0].layer[-1].DenseReluDense.wo.weight[5] = math.nan
    policy = ExitPolicy(measure=measure, threshold=-9.0, min_layer=2)
    generation = EarlyExitT5(broken, classifier=CLASSIFIER).generate(
        *prompts(2), policy=policy, max_new_tokens=3
    )
    assert (generation.exit_layers == broken.config.num_decoder_layers).all()


def test_row_2_a_row_of_nan_spoils_no_other_row(tiny_t5):
    broken = copy.deepcopy(tiny_t5)
    with torch.no_grad():
        # a word that only the first prompt has; tied heads are given their own
        broken.shared.weight[7] = math.nan
        broken.lm_head.weight = torch.nn.Parameter(tiny_t5.lm_head.weight.clone())
    input_ids, mask = prompts(3)
    input_ids[input_ids == 7] = 8
    input_ids[0, 1] = 7
    for policy in (
        ExitPolicy(threshold=0.2),
        ExitPolicy(threshold=0.2, pruning=PRUNED, batching="regroup"),
    ):
        decoder = EarlyExitT5(broken)
        together = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=4)
        assert (together.exit_layers[0] == decoder.n_layers).all()
        others = decoder.generate(input_ids[1:], mask[1:], policy=policy, max_new_tokens=4)
        assert together.tokens[1:].equal(others.tokens)
        assert together.exit_layers[1:].equal(others.exit_layers)


@pytest.mark.parametrize("measure", MEASURES)
def test_row_19_nothing_exits_before_the_minimum_layer(tiny_t5, measure):
    decoder = EarlyExitT5(tiny_t5, classifier=CLASSIFIER)
    for pruning in (None, PRUNED):
        policy = ExitPolicy(measure=measure, threshold=-9.0, min_layer=3, pruning=pruning)
        generation = decoder.generate(*prompts(3), policy=policy, max_new_tokens=5)
        assert (generation.exit_layers == 3).all()


@pytest.mark.parametrize("pruning", [None, PRUNED], ids=["full head", "pruned head"])
def test_row_19_no_head_before_the_minimum_layer_but_an_amateurs(tiny_t5, monkeypatch, pruning):
    decoder = EarlyExitT5(tiny_t5)
    asked, head = [], decoder._backbone.logits
    monkeypatch.setattr(
        decoder._backbone, "logits", lambda state: asked.append(len(state)) or head(state)
    )
    policy = ExitPolicy(threshold=9.0, min_layer=3, pruning=pruning)
    decoder.generate(*prompts(3), policy=policy, max_new_tokens=2)
    assert asked == [3] * 2 * (1 if pruning else decoder.n_layers - 2)
    asked.clear()
    decoder.generate(
        *prompts(3), policy=policy.model_copy(update={"measure": "weighted"}), max_new_tokens=1
    )
    # the amateur of layers 3 is layer 1, that of 4 and 5 layer 2; a pruned head gathers its own
    assert asked == [3] * (2 if pruning else decoder.n_layers)


# -- the oracle --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["project", "deferred"])
def test_row_7_oracle_emits_the_full_steps_token_at_the_first_layer_that_agrees(ending, cache):
    policy = ExitPolicy(measure="oracle", threshold=1.0, cache=cache)
    exits = assert_agrees(ending, policy, length=8)
    assert len(set(exits)) > 2
    decoder = EarlyExitT5(ending)
    generation = decoder.generate(*prompts(4), policy=policy, max_new_tokens=LENGTH)
    # emitting the last layer's token on the same cache changes nothing: it is that token
    last = decoder.generate(
        *prompts(4), policy=policy.model_copy(update={"emits": "last"}), max_new_tokens=LENGTH
    )
    assert generation.tokens.equal(last.tokens)
    assert generation.exit_layers.equal(last.exit_layers)


def test_row_7_oracle_with_an_exact_cache_is_the_full_model(ending):
    decoder = EarlyExitT5(ending)
    full = decoder.generate(*prompts(7), policy=FULL, max_new_tokens=LENGTH)
    for cache in ("deferred", "recompute"):
        policy = ExitPolicy(measure="oracle", threshold=1.0, cache=cache)
        exact = decoder.generate(*prompts(7), policy=policy, max_new_tokens=LENGTH)
        assert exact.tokens.equal(full.tokens)
        assert exact.exit_layers.float().mean() < full.exit_layers.float().mean()
        # and the noisy one decides as the exact one from the same states, but the cache is another
        exits = decoder.trace(
            *prompts(7), max_new_tokens=LENGTH, policy=ExitPolicy(measure="oracle")
        )
        first = np.asarray(exits.agrees).argmax(1) + 1
        assert exact.exit_layers[exact.exit_layers > 0].sum().item() == first.sum()


@pytest.mark.parametrize("measure", ["softmax", "state"])
@pytest.mark.parametrize("cache", ["project", "deferred", "copy"])
def test_row_7_noisy_cache_emits_the_last_layers_token_on_the_exits_cache(ending, measure, cache):
    policy = middling(ending, measure=measure, emits="last", cache=cache)
    assert len(set(assert_agrees(ending, policy, length=7))) > 1
    if cache == "deferred":
        full = hugging_face(ending, *prompts(4))
        generation = EarlyExitT5(ending).generate(*prompts(4), policy=policy, max_new_tokens=LENGTH)
        assert generation.tokens.equal(full)


# -- static depth ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["project", "deferred"])
def test_row_8_static_k_is_the_model_without_its_upper_layers(ending, cache):
    decoder = EarlyExitT5(ending)
    input_ids, mask = prompts(7, "left")
    for layer in range(1, decoder.n_layers + 1):
        policy = ExitPolicy.static(layer, cache=cache)
        generation = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=LENGTH)
        assert generation.tokens.equal(hugging_face(truncated(ending, layer), input_ids, mask))
        assert set(generation.exit_layers.unique().tolist()) <= {0, layer}


# -- what was refused --------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    measure=st.sampled_from(["softmax", "state", "jsd"]),
    quantiles=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    cache=st.sampled_from(["project", "deferred"]),
)
def test_a_lower_threshold_above_all_refused_confidences_generates_the_same(
    tiny_t5, measure, quantiles, cache
):
    """What `record` relies on to skip thresholds, and the reverse: at or below the largest, some token exits earlier."""
    decoder = EarlyExitT5(tiny_t5)
    one, _ = prompts(1, seed=int(1000 * quantiles[0]))
    low, high = {"softmax": (0.0, 0.6), "state": (0.2, 1.0), "jsd": (0.0, 0.6)}[measure]
    threshold = low + (high - low) * quantiles[1]
    policy = ExitPolicy(
        measure=measure, threshold=threshold, cache=cache, contrast=Contrast(alpha=0.2)
    )
    run = decoder.generate(one, policy=policy, max_new_tokens=6)
    largest = run.refused.max().item()
    if not math.isfinite(largest):
        return
    same = policy.model_copy(
        update={"threshold": float(np.nextafter(np.float32(largest), np.float32(2.0)))}
    )
    again = decoder.generate(one, policy=same, max_new_tokens=6)
    for name in ("tokens", "exit_layers", "confidence"):
        assert getattr(again, name).equal(getattr(run, name))
    lower = decoder.generate(
        one, policy=policy.model_copy(update={"threshold": largest}), max_new_tokens=6
    )
    assert lower.exit_layers.tolist() != run.exit_layers.tolist()


def test_the_full_model_refuses_nothing_and_the_definition_says_what_others_refuse(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    assert decoder.generate(*prompts(3), policy=FULL, max_new_tokens=3).refused.isneginf().all()
    policy = ExitPolicy(thresholds={1: 0.5, 3: 0.2})
    generation = decoder.generate(*prompts(3), policy=policy, max_new_tokens=5)
    for row, definition in zip(
        generation.refused, expected(tiny_t5, policy, length=5), strict=True
    ):
        np.testing.assert_allclose(row, definition.refused, rtol=0, atol=1e-5)
