"""Batches: rows as if alone in "diverge" and "regroup", all as deep as the deepest in "deepest"; and what is refused."""

import copy
import math

import pytest
import torch
from exit_reference import CLASSIFIER, assert_agrees, assert_same, expected, middling
from hypothesis import given, settings
from hypothesis import strategies as st
from t5_reference import DECAYING, FULL, LENGTH, assert_row, ending_early, hugging_face, prompts
from transformers import T5Config, T5ForConditionalGeneration

from riskcal import Constant, ExitPolicy, RiskcalError
from riskcal.policy import Contrast, Sampling
from riskcal.pruning import Pruning
from riskcal_adapters import request_checks
from riskcal_adapters.torch import EarlyExitT5
from riskcal_adapters.torch.caches import Cache
from riskcal_adapters.torch.confidence import MEASURES


@pytest.fixture(scope="module")
def deep():
    """12 decoder layers over 2 encoder layers, tied (T5 v1.0)."""
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=41,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=12,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    torch.nn.init.normal_(model.decoder.final_layer_norm.weight, std=1.5)
    return model


@pytest.mark.parametrize("ends", ["at the limit", "at the end token"])
@pytest.mark.parametrize(("batch", "side"), [(1, "right"), (7, "left")])
def test_row_1_twelve_layers_are_hugging_face_generate(deep, batch, side, ends):
    model = deep if ends == "at the limit" else ending_early(deep)
    input_ids, mask = prompts(batch, side)
    generation = EarlyExitT5(model).generate(input_ids, mask, policy=FULL, max_new_tokens=LENGTH)
    assert generation.tokens.equal(hugging_face(model, input_ids, mask))
    assert set(generation.exit_layers.unique().tolist()) <= {0, 12}


def test_row_1_twelve_layers_exit_as_defined(deep):
    assert len(set(assert_agrees(deep, middling(deep, measure="state"), batch=2, length=5))) > 2


@pytest.mark.parametrize("batch", [1, 4])
def test_row_1_the_full_model_is_a_threshold_that_nothing_reaches(tiny_t5, batch):
    for model in (tiny_t5, ending_early(tiny_t5)):
        decoder, given_ = EarlyExitT5(model), prompts(batch, "left")
        full, never = (
            decoder.generate(*given_, policy=policy, max_new_tokens=LENGTH)
            for policy in (FULL, ExitPolicy(threshold=9.0))
        )
        assert full.tokens.equal(never.tokens)
        assert full.exit_layers.equal(never.exit_layers)
        torch.testing.assert_close(
            full.confidence, never.confidence, rtol=0, atol=1e-6, equal_nan=True
        )
        assert full.refused.isneginf().all()  # nobody was asked


# -- rows as alone ---------------------------------------------------------------------------------------------------------

thresholds = st.sampled_from([0.03, 0.12, 0.3, 0.5])
prunings = st.none() | st.builds(
    Pruning,
    st.sampled_from(["fixed", "decaying", "adaptive"]),
    st.sampled_from([12, 40]),
    st.just(3),
)
contrasts = st.builds(
    Contrast, alpha=st.sampled_from([0.1, 0.5]), alpha_decay=st.sampled_from([0.0, 1.0])
)


def legal(fields):
    """A policy that a decoder takes, else None."""
    try:
        return request_checks.policies(ExitPolicy(**fields), 1, MEASURES)[0]
    except RiskcalError:
        return None


policies = (
    st.fixed_dictionaries(
        {"measure": st.sampled_from(MEASURES)},
        optional={
            "schedule": st.sampled_from([Constant(), DECAYING]),
            "min_layer": st.integers(1, 3),
            "pruning": prunings,
            "contrast": contrasts,
            "cache": st.sampled_from(["project", "deferred", "recompute", "copy", "first"]),
            "max_pending": st.integers(1, 3),
            "emits": st.sampled_from(["exit", "last"]),
            "batching": st.sampled_from(["diverge", "regroup", "regroup"]),
            "sampling": st.builds(
                Sampling, top_p=st.sampled_from([0.8, 1.0]), seed=st.integers(0, 2)
            ),
        },
    )
    .flatmap(
        lambda fields: st.one_of(
            thresholds.map(lambda value: {"threshold": value}),
            st.dictionaries(st.integers(1, 4), thresholds, min_size=1).map(
                lambda table: {"thresholds": table}
            ),
        ).map(lambda needed: fields | needed)
    )
    .map(legal)
    .filter(bool)
)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    template=policies,
    others=st.lists(st.none() | policies | st.just(FULL), min_size=1, max_size=4),
    values=st.lists(thresholds, min_size=5, max_size=5),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 50),
)
def test_row_9_a_row_is_its_run_alone_whatever_it_and_the_others_ask(
    ending, template, others, values, side, seed
):
    """Rows of one policy at other thresholds are decoded together; rows of other policies stand between them."""
    rows = [
        template.model_copy(update={"threshold": value} if template.thresholds is None else {})
        if other is None
        else other
        for other, value in zip([None, *others, None], values, strict=False)
    ]
    decoder = EarlyExitT5(ending, classifier=CLASSIFIER)
    input_ids, mask = prompts(len(rows), side, seed)
    together = decoder.generate(input_ids, mask, policy=rows, max_new_tokens=6)
    for row, (policy, real) in enumerate(zip(rows, mask.bool(), strict=True)):
        alone = decoder.generate(input_ids[row : row + 1, real], policy=policy, max_new_tokens=6)
        assert_row(together, row, alone)
        size = alone.tokens.shape[1]
        torch.testing.assert_close(
            together.refused[row, :size], alone.refused[0], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"cache": "deferred", "max_pending": 2, "pruning": Pruning("fixed", 20, 3)},
        {"cache": "recompute", "max_pending": 2, "measure": "jsd"},
        {"measure": "state", "pruning": Pruning("fixed", 6, 3)},
        {"measure": "classifier", "pruning": Pruning("fixed", 6, 3), "batching": "regroup"},
        {"measure": "jsd", "pruning": Pruning("adaptive", 20, 3), "batching": "regroup"},
        {"cache": "copy"},
        {"cache": "first"},
    ],
    ids=str,
)
def test_row_9_what_a_layer_does_depends_on_no_other_row(tiny_t5, fields):
    """Settings in which rows at other depths, or at other times, once changed what a row saw."""
    decoder = EarlyExitT5(tiny_t5, classifier=CLASSIFIER)
    values = (
        [0.45, 0.6, 0.75, 0.9]
        if fields.get("measure") in ("state", "classifier")
        else [0.05, 0.2, 0.4, 0.6]
    )
    rows = [ExitPolicy(threshold=value, **fields) for value in values]
    input_ids, mask = prompts(4)
    together = decoder.generate(input_ids, mask, policy=rows, max_new_tokens=LENGTH)
    assert len(together.exit_layers.unique()) > 1
    for row, (policy, real) in enumerate(zip(rows, mask.bool(), strict=True)):
        assert_row(
            together,
            row,
            decoder.generate(input_ids[row : row + 1, real], policy=policy, max_new_tokens=LENGTH),
        )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sampling": Sampling(seed=1)},
        {"batching": "regroup", "measure": "jsd"},
        {"cache": "deferred", "max_pending": 2},
        {"cache": "recompute", "pruning": Pruning("fixed", 20, 3)},
        {"emits": "last"},
        {"measure": "oracle"},
    ],
    ids=str,
)
def test_row_9_rows_go_on_as_alone_without_those_that_ended(tiny_t5, fields, monkeypatch):
    model = copy.deepcopy(tiny_t5)
    # rows end one after the other
    model.generation_config.eos_token_id = list(range(1, tiny_t5.config.vocab_size, 5))
    decoder, kept = EarlyExitT5(model), []
    keep = Cache.keep
    monkeypatch.setattr(
        Cache,
        "keep",
        lambda cache, *rows: kept.append((cache.batch, len(rows[0]))) or keep(cache, *rows),
    )
    input_ids, mask = prompts(24, "left")
    policy = ExitPolicy(threshold=0.2, **fields)
    together = decoder.generate(input_ids, mask, policy=policy, max_new_tokens=20)
    assert kept
    assert all(1 <= after <= before / 2 for before, after in kept)
    for row, real in enumerate(mask.bool()):
        alone = decoder.generate(input_ids[row : row + 1, real], policy=policy, max_new_tokens=20)
        assert_row(together, row, alone)
        size = alone.tokens.shape[1]
        torch.testing.assert_close(
            together.refused[row, :size], alone.refused[0], rtol=0, atol=1e-5
        )


def test_row_9_rows_that_look_at_other_layers_prune_by_their_own(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    tables = [{1: 0.9, 3: 0.3}, {1: 0.9, 2: 0.9, 3: 0.3}, {2: 0.8, 3: 0.6}, {3: 0.2}]
    rows = [ExitPolicy(thresholds=table, pruning=Pruning("adaptive", 30, 3)) for table in tables]
    input_ids, mask = prompts(4, "left")
    together = decoder.generate(input_ids, mask, policy=rows, max_new_tokens=LENGTH)
    for row, (policy, real) in enumerate(zip(rows, mask.bool(), strict=True)):
        assert_row(
            together,
            row,
            decoder.generate(input_ids[row : row + 1, real], policy=policy, max_new_tokens=LENGTH),
        )


@pytest.mark.parametrize("measure", ["softmax", "state", "jsd"])
def test_row_9_regrouped_rows_are_the_definition(ending, measure):
    policy = middling(ending, measure=measure, batching="regroup")
    assert len(set(assert_agrees(ending, policy, batch=4, length=8))) > 2


def test_row_9_regroup_computes_only_rows_that_go_deeper(tiny_t5, monkeypatch):
    decoder = EarlyExitT5(tiny_t5)
    computed = []
    layer = decoder._backbone.layer_of_rows
    monkeypatch.setattr(
        decoder._backbone,
        "layer_of_rows",
        lambda i, state, rows, positions, cache: (
            computed.append((i, len(state))) or layer(i, state, rows, positions, cache)
        ),
    )
    policies_ = [ExitPolicy.static(depth, batching="regroup") for depth in (1, 3, 2)]
    generation = decoder.generate(*prompts(3), policy=policies_, max_new_tokens=2)
    assert generation.exit_layers.tolist() == [[1, 1], [3, 3], [2, 2]]
    # static exits at other layers are other settings only where pruning or contrasts remember what was looked at
    assert computed == [(0, 3), (1, 2), (2, 1)] * 2


# -- deepest -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["softmax", "state", "oracle", "jsd"])
@pytest.mark.parametrize("cache", ["project", "deferred"])
def test_row_9_deepest_exits_at_the_maximum_of_the_first_passing_layers(ending, measure, cache):
    policy = middling(ending, 0.4, measure=measure, batching="deepest", cache=cache)
    input_ids, mask = prompts(3, "left")
    generation = EarlyExitT5(ending).generate(input_ids, mask, policy=policy, max_new_tokens=8)
    going = generation.exit_layers > 0
    for depths, real in zip(generation.exit_layers.T, going.T, strict=True):
        assert len(depths[real].unique()) == 1
    rows = expected(ending, policy, side="left", length=8)
    for i, row in enumerate(rows):
        assert generation.tokens[i, : len(row.tokens)].tolist() == row.tokens
        assert generation.exit_layers[i, : len(row.exits)].tolist() == row.exits
    if measure != "oracle":  # three rows seldom agree before the last layer
        assert len(generation.exit_layers[going].unique()) > 1


@pytest.mark.parametrize("cache", ["copy", "first"])
def test_row_9_deepest_holds_for_the_negative_controls_too(ending, cache):
    policy = middling(ending, 0.4, batching="deepest", cache=cache)
    generation = EarlyExitT5(ending).generate(*prompts(3), policy=policy, max_new_tokens=8)
    going = generation.exit_layers > 0
    assert all(
        len(depths[real].unique()) == 1
        for depths, real in zip(generation.exit_layers.T, going.T, strict=True)
    )
    for i, row in enumerate(expected(ending, policy, length=8)):
        assert generation.tokens[i, : len(row.tokens)].tolist() == row.tokens


def test_row_9_a_batch_of_one_is_its_own_deepest(ending):
    policy = middling(ending)
    one, _ = prompts(1)
    alone, deepest = (
        EarlyExitT5(ending).generate(
            one, policy=policy.model_copy(update={"batching": mode}), max_new_tokens=LENGTH
        )
        for mode in ("diverge", "deepest")
    )
    assert alone.tokens.equal(deepest.tokens)
    assert alone.confidence.equal(deepest.confidence)


def test_row_9_an_always_deep_row_takes_the_batch_with_it(tiny_t5):
    shallow, deep_ = (ExitPolicy(threshold=value, batching="deepest") for value in (-9.0, 9.0))
    decoder = EarlyExitT5(tiny_t5)
    generation = decoder.generate(*prompts(3), policy=[shallow, deep_, shallow], max_new_tokens=4)
    assert (generation.exit_layers == decoder.n_layers).all()
    without = decoder.generate(*prompts(3), policy=shallow, max_new_tokens=4)
    assert (without.exit_layers == 1).all()


# -- the full model, and what is refused -------------------------------------------------------------------------------------


def test_a_policy_that_never_exits_is_the_full_model_whatever_else_it_says(ending):
    decoder = EarlyExitT5(ending, classifier=CLASSIFIER)
    expected_ = hugging_face(ending, *prompts(5))
    for fields in (
        {"pruning": Pruning("fixed", 2, 2), "measure": "jsd"},
        {"cache": "copy", "measure": "classifier"},
        {"cache": "deferred", "max_pending": 1, "emits": "last"},
        {"batching": "deepest", "min_layer": 2, "schedule": DECAYING},
        {"thresholds": {1: math.inf, 2: math.inf}},
        {"thresholds": {}},
    ):
        generation = decoder.generate(
            *prompts(5), policy=ExitPolicy(**fields), max_new_tokens=LENGTH
        )
        assert generation.tokens.equal(expected_)
        assert set(generation.exit_layers.unique().tolist()) <= {0, decoder.n_layers}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"weights": "0" * 32}, "weights"),
        ({"n_layers": 9}, "n_layers"),
        ({"min_layer": 9}, "min_layer"),
        ({"thresholds": {9: 0.5}, "threshold": math.inf}, "thresholds"),
        ({"measure": "classifier"}, "measure"),
        ({"measure": "margin"}, "measure"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"measure": "oracle", "batching": "regroup"}, "batching"),
        ({"emits": "last", "batching": "regroup"}, "batching"),
        ({"measure": "oracle", "sampling": Sampling()}, "sampling"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["for all rows", "of row 1"])
def test_row_32_a_policy_for_another_model_is_refused_by_the_field(tiny_t5, fields, field, place):
    decoder = EarlyExitT5(tiny_t5)
    policy = ExitPolicy(**{"threshold": 0.5} | fields)
    asked = policy if place == "for all rows" else [ExitPolicy(threshold=0.5), policy]
    with pytest.raises(RiskcalError, match=f"^{field}: "):
        decoder.generate(*prompts(2), policy=asked, max_new_tokens=4)


def test_row_32_a_policy_for_this_model_is_taken(tiny_t5):
    decoder = EarlyExitT5(tiny_t5)
    policy = ExitPolicy(
        threshold=0.5, weights=decoder.weights, n_layers=decoder.n_layers, max_new_tokens=4
    )
    assert decoder.generate(*prompts(2), policy=policy).tokens.shape == (2, 4)
    assert decoder.generate(*prompts(2), policy=policy, max_new_tokens=4).tokens.shape == (2, 4)
    assert_same(
        decoder.generate(*prompts(2), policy=policy), expected(tiny_t5, policy, batch=2, length=4)
    )
