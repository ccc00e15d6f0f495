import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from riskcal import (
    Constant,
    Decaying,
    ExitPolicy,
    RiskcalError,
    Traces,
    heads,
    pvalues,
    records,
    replay_arrays,
)
from riskcal.heads import inputs as heads_inputs
from riskcal.heads import outlook as heads_outlook
from riskcal.heads import path as heads_path

VECTOR = (
    np.array([0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])[:, None],
    np.array([0, 1, 0, 1, 1, 0, 1, 1])[:, None],
)


@st.composite
def tokens(draw, *, rows=(1, 30), n_heads=(1, 3)):
    """Confidences with many ties and some NaN, and agreements, (N, K) each."""
    shape = (draw(st.integers(*rows)), draw(st.integers(*n_heads)))
    levels = st.integers(0, 6).map(lambda i: i / 8) | st.just(math.nan)
    confidence = draw(hnp.arrays(np.float64, shape, elements=levels))
    return confidence, draw(hnp.arrays(np.bool_, shape))


def lowest_feasible(confidence, agrees, agreement):
    """Valade's rule (2024) by trying every observed confidence."""
    for threshold in np.unique(confidence[~np.isnan(confidence)]):
        if agrees[confidence >= threshold].mean() >= agreement:
            return threshold
    return math.inf


def sample(n=800, n_heads=3, *, seed=0, longest=12):
    """Tokens of n prompts whose difficulty they share; deeper heads are better, and confidence is a good guide."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(n), rng.integers(1, longest + 1, n))
    difficulty = rng.normal(size=n)[prompt] + rng.normal(size=len(prompt))
    doubt = difficulty[:, None] - np.linspace(0, 1.5, n_heads)
    confidence = 1 / (1 + np.exp(2 * doubt + 0.3 * rng.normal(size=doubt.shape)))
    return confidence, rng.random(doubt.shape) > 1 / (1 + np.exp(1.5 - 2.5 * doubt)), prompt


def names(numbers):
    """Ids that are not numbers, which have an order of their own."""
    return np.array([f"p{i}" for i in numbers])


def certify(data, **options):
    confidence, agrees, prompts = data
    return heads.certified(
        confidence, agrees, prompts=names(prompts), **({"max_tokens": 12} | options)
    )


@pytest.fixture(scope="module")
def found():
    return certify(sample())


# Valade's rule


@pytest.mark.parametrize(
    ("agreement", "threshold"),
    [
        (0.5, 0.1),
        (0.6, 0.1),
        (0.7, 0.2),
        (0.75, 0.3),
        (0.8, 0.3),
        (0.9, 0.6),
        (1.0, 0.6),
        (0.01, 0.1),
    ],
)
def test_the_rule_on_a_worked_example(agreement, threshold):
    assert heads.self_supervised(*VECTOR, agreement).tolist() == [threshold]


def test_the_rule_tries_equal_confidences_together():
    confidence, agrees = (
        np.array([[0.1], [0.5], [0.5], [0.5], [0.9]]),
        np.array([[0], [0], [0], [1], [1]]),
    )
    assert heads.self_supervised(confidence, agrees, 0.9).tolist() == [0.9]


def test_the_rule_takes_each_head_by_itself_and_never_exits_where_it_cannot_agree():
    confidence = np.array([[0.1, 0.9, math.nan], [0.8, 0.2, math.nan]])
    agrees = np.array([[True, False, True], [True, False, True]])
    assert heads.self_supervised(confidence, agrees).tolist() == [0.1, math.inf, math.inf]


@given(tokens(), st.floats(0.01, 1) | st.sampled_from([0.5, 2 / 3, 0.75, 0.8, 0.9, 1.0]))
def test_the_rule_is_the_lowest_confidence_that_reaches_the_agreement(data, agreement):
    confidence, agrees = data
    expected = [
        lowest_feasible(*columns, agreement) for columns in zip(confidence.T, agrees.T, strict=True)
    ]
    assert heads.self_supervised(confidence, agrees, agreement).tolist() == expected


@given(tokens(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_the_rule_does_not_fall_as_more_agreement_is_asked(data, a, b):
    low, high = (heads.self_supervised(*data, agreement) for agreement in sorted([a, b]))
    assert (low <= high).all()


@given(tokens(), st.randoms(use_true_random=False), st.floats(0.01, 1))
def test_the_rule_does_not_depend_on_the_order_of_tokens(data, random, agreement):
    confidence, agrees = data
    order = random.sample(range(len(confidence)), len(confidence))
    shuffled = heads.self_supervised(confidence[order], agrees[order], agreement)
    assert shuffled.tolist() == heads.self_supervised(confidence, agrees, agreement).tolist()


def test_the_rule_reads_float32_and_lists():
    confidence, agrees = (values.tolist() for values in VECTOR)
    assert heads.self_supervised(confidence, agrees, 0.7).tolist() == [0.2]
    narrow = heads.self_supervised(np.float32(confidence), agrees, 0.7)
    assert narrow.dtype == np.float64
    assert narrow.tolist() == [float(np.float32(0.2))]


# certified thresholds


def test_the_table_holds_what_the_calibration_prompts_show(found):
    confidence, agrees, prompt = sample()
    rest = ~np.isin(names(prompt), found.pilot)
    confidence, agrees, prompt = confidence[rest], agrees[rest], prompt[rest]
    units = records.tested_order(names(range(800)))[160:]
    assert found.n == len(units) == 640
    assert (
        np.isfinite(found.table.filter(like="threshold")).sum(axis=1) > 1
    ).any()  # heads that share the tokens
    for _, row in found.table.iterrows():
        thresholds = row[["threshold_1", "threshold_2", "threshold_3"]].to_numpy(dtype=float)
        reached = confidence >= thresholds
        exits = reached & (np.cumsum(reached, axis=1) == 1)
        assert row["exits"] == pytest.approx(exits.any(1).mean())
        assert row["agreement"] == pytest.approx((exits & agrees).sum() / exits.sum())
        largest = 0.0
        for k in np.flatnonzero(np.isfinite(thresholds)):
            assert row[f"exits_{k + 1}"] == pytest.approx(exits[:, k].mean())
            assert row[f"agreement_{k + 1}"] == pytest.approx(agrees[exits[:, k], k].mean())
            excess = exits[:, k] * (~agrees[:, k] - 0.1) / 12
            losses = np.bincount(prompt, excess, minlength=800)[units] + 0.1
            largest = max(largest, pvalues.betting(losses, 0.1, level=0.05))
        assert row["pvalue"] == pytest.approx(largest, rel=1e-6)
        for k in np.flatnonzero(np.isinf(thresholds)):
            assert row[f"exits_{k + 1}"] == 0
            assert math.isnan(row[f"agreement_{k + 1}"])


def test_the_last_certified_step_is_deployed_and_the_walk_ends_at_the_first_failure(found):
    certified = found.table["certified"].to_numpy()
    assert found.certified
    assert certified.tolist() == (found.table["pvalue"] <= 0.05).tolist()
    assert certified[:-1].all()  # the last step may fail; nothing is tested after it
    last = found.table[certified].iloc[-1]
    assert found.thresholds.tolist() == [last[f"threshold_{layer}"] for layer in (1, 2, 3)]
    assert np.isfinite(found.thresholds).any()


def test_the_pilot_is_the_first_share_in_tested_order(found):
    ids = names(range(800))
    assert found.pilot == tuple(ids[records.tested_order(ids)[:160]].tolist())


def test_the_path_is_the_pilots_alone(found):
    confidence, agrees, prompt = sample()
    rest = ~np.isin(names(prompt), found.pilot)
    rng = np.random.default_rng(5)
    confidence[rest], agrees[rest] = (
        rng.random(agrees[rest].shape),
        rng.random(agrees[rest].shape) < 0.97,
    )
    other = certify((confidence, agrees, prompt))
    columns = ["threshold_1", "threshold_2", "threshold_3"]
    both = min(len(other.table), len(found.table))
    pd.testing.assert_frame_equal(other.table[columns].head(both), found.table[columns].head(both))


@given(st.integers(0, 2**32 - 1))
def test_rows_in_any_order_and_ids_of_either_kind_give_the_same_result(seed):
    confidence, agrees, prompt = sample(60, seed=1)
    order = np.random.default_rng(seed).permutation(len(prompt))
    for ids in (prompt, prompt + 7):  # as good as no ids, and ids
        plain = heads.certified(confidence, agrees, prompts=ids, max_tokens=12)
        mixed = heads.certified(
            confidence[order],
            agrees[order].astype(float),
            prompts=ids[order].astype(str),
            max_tokens=12,
        )
        pd.testing.assert_frame_equal(mixed.table, plain.table)
        assert mixed.pilot == tuple(map(str, plain.pilot))


def test_prompts_that_are_only_numbered_have_no_fixed_order():
    """Sorted by agreement, the pilot of one fixed order would be the same places every time."""
    places = []
    for seed in range(2):
        confidence, agrees, prompt = sample(100, seed=seed)
        worst_first = np.argsort(
            np.bincount(prompt, agrees.mean(1)) / np.bincount(prompt), kind="stable"
        )
        number = np.empty(100, dtype=int)
        number[worst_first] = np.arange(100)
        places.append(
            heads.certified(confidence, agrees, prompts=number[prompt] + 1, max_tokens=12).pilot
        )
    assert set(places[0]) != set(places[1])


@given(tokens(rows=(8, 40)), st.floats(-3, 3), st.sampled_from([1, 4]), st.integers(0, 2**32 - 1))
def test_the_pilots_boldest_thresholds_by_trying_them_all(data, margin, spread, seed):
    confidence, agrees = data
    n_heads = confidence.shape[1]
    rng = np.random.default_rng(seed)
    prompt = np.sort(rng.integers(0, max(len(confidence) // spread, 2), len(confidence)))
    prompt = np.unique(prompt, return_inverse=True)[1]
    used = rng.random(n_heads) < 0.7
    n_pilot, n, most = int(prompt.max()) + 1, 40, len(confidence)
    goal = heads_path._Goal(0.6, 0.05, most)
    ids = np.arange(n_pilot + n)
    recorded = heads_inputs._Records(confidence, agrees, prompt, ids, n_pilot)
    pilot = heads_path._pilot(recorded, np.arange(1, n_heads + 1))

    def projected(waiting, k, threshold):
        exits = waiting & (confidence[:, k] >= threshold)
        excess = np.bincount(prompt, exits * (~agrees[:, k] - 0.4) / most, minlength=n_pilot)
        one = 0.6 / most
        surplus, variance = -(excess.sum() + one) / n_pilot, ((excess**2).sum() + one**2) / n_pilot
        needed = max(1.6448536 * math.sqrt(variance / n), math.log(20) / (0.99 / 0.6 * n))
        return exits, (surplus - needed) / math.sqrt(variance * (1 / n + 1 / n_pilot))

    expected, waiting, saving = (
        np.full(n_heads, math.inf),
        np.ones(len(confidence), dtype=bool),
        0.0,
    )
    for k in np.flatnonzero(used):
        for threshold in np.unique(confidence[~np.isnan(confidence[:, k]), k]):
            exits, projection = projected(waiting, k, threshold)
            if abs(projection - margin) < 1e-6:
                return  # rounding decides
            if exits.any() and projection >= margin:
                expected[k] = threshold
                waiting &= ~exits
                saving += (n_heads - k) * exits.sum()
                break
    value, thresholds = heads_path._boldest(pilot, used, margin, n, goal)
    assert value == pytest.approx(saving)
    assert thresholds.tolist() == expected.tolist()


def test_a_head_without_confidence_is_never_used_and_does_not_stand_in_the_way(found):
    confidence, agrees, prompt = sample()
    without = certify(
        (np.insert(confidence, 1, math.nan, axis=1), np.insert(agrees, 1, True, axis=1), prompt)
    )
    assert without.thresholds[1] == math.inf
    assert without.certified
    assert np.isfinite(without.thresholds).any()


def test_nan_never_exits():
    confidence, agrees, prompt = sample()
    hidden = np.random.default_rng(0).random(confidence.shape) < 0.3
    result = certify((np.where(hidden, math.nan, confidence), agrees | ~hidden, prompt))
    below = certify((np.where(hidden, -1.0, confidence), agrees | ~hidden, prompt))
    assert result.certified
    assert (result.table.filter(like="threshold") > -1).all(axis=None)
    assert result.table["exits"].iloc[0] <= (~hidden).any(1).mean()
    assert below.thresholds.shape == result.thresholds.shape


def test_float32_confidences_are_compared_as_they_are():
    confidence, agrees, prompt = sample()
    narrow = confidence.astype(np.float32)
    wide = certify((narrow.astype(np.float64), agrees, prompt))
    pd.testing.assert_frame_equal(certify((narrow, agrees, prompt)).table, wide.table)


def test_the_policy_carries_its_certificate(tmp_path):
    found = certify(sample(), layers=[2, 4, 6])
    policy = found.policy(n_layers=8)
    certificate = policy.certificate
    assert (certificate.delta, certificate.objective, certificate.lower, certificate.upper) == (
        0.1,
        "agreement",
        0,
        1,
    )
    assert (certificate.test, certificate.procedure, certificate.epsilon_spent) == (
        "betting",
        "fixed_sequence",
        0.05,
    )
    assert (certificate.n, certificate.k, certificate.max_tokens) == (640, len(found.table), 12)
    assert certificate.pvalue == found.table["pvalue"][found.table["certified"]].iloc[-1] <= 0.05
    assert (certificate.pilot_n, certificate.layers_given) == (160, True)
    assert certificate.records_digest == found.records_digest
    policy.save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == policy
    other = policy.model_dump(mode="json") | {"thresholds": {2: 0.1}}
    with pytest.raises(RiskcalError, match="issued for other settings"):
        ExitPolicy(**other)


def test_the_digest_is_of_what_was_given():
    confidence, agrees, prompts = sample(60)
    first = certify((confidence, agrees, prompts)).records_digest
    backwards = np.argsort(-prompts, kind="stable")
    assert (
        certify((confidence[backwards], agrees[backwards], prompts[backwards])).records_digest
        == first
    )
    changed = confidence.copy()
    changed[3, 1] += 1e-9
    assert certify((changed, agrees, prompts)).records_digest != first
    assert certify((confidence, ~agrees, prompts)).records_digest != first
    assert certify((confidence, agrees, prompts), layers=[1, 2, 4]).records_digest != first


def test_a_policy_of_nothing_certified_says_so():
    found = certify(sample(), agreement=0.999, layers=[2, 4, 6])
    policy = found.policy()
    assert not found.certified
    assert policy.is_full_model
    assert policy.certificate.pvalue is None


def test_columns_become_layers_only_where_somebody_says_which(recwarn):
    found = certify(sample())
    assert not found.layers_given
    with pytest.warns(
        UserWarning, match="3 columns are taken for layers 1 to 3.*layers= in certified"
    ):
        policy = found.policy()
    assert sorted(policy.thresholds) == [1, 2, 3]
    assert policy.certificate.layers_given is False
    with pytest.raises(RiskcalError, match="n_layers: 3 heads of a model with 8 layers"):
        found.policy(n_layers=8)
    recwarn.clear()
    assert found.policy(n_layers=4).n_layers == 4
    said = certify(sample(), layers=[2, 4, 6])  # the remedy
    assert (
        sorted(said.policy().thresholds) == sorted(said.policy(n_layers=8).thresholds) == [2, 4, 6]
    )
    assert not recwarn.list


@pytest.mark.parametrize("name", ["{}", "layer_{}"])
def test_columns_that_are_numbered_are_not_taken_for_other_layers(name):
    """A pivot's columns may stand in any order: losses of layer 6 would certify a threshold for layer 2."""
    confidence, agrees, prompts = sample()
    columns = [name.format(layer) for layer in (2, 4, 6)]
    c, a = (pd.DataFrame(matrix, columns=columns) for matrix in (confidence, agrees))
    turned = a.iloc[:, ::-1]
    said = certify((confidence, agrees, prompts), layers=[2, 4, 6])
    assert certify((c, a, prompts), layers=[2, 4, 6]).records_digest == said.records_digest
    with pytest.raises(RiskcalError, match=r"say which they are, layers=\[2, 4, 6\]"):
        certify((c, a, prompts))
    with pytest.raises(RiskcalError, match=r"layers: .* numbered \[6, 4, 2\], and layers \[2, 4"):
        certify((c.iloc[:, ::-1], turned, prompts), layers=[2, 4, 6])
    told = r"its columns are numbered \[6, 4, 2\], and those of confidence \[2, 4, 6\]"
    with pytest.raises(RiskcalError, match=f"agrees: {told}"):
        certify((c, turned, prompts), layers=[2, 4, 6])
    with pytest.raises(RiskcalError, match=f"agrees: {told}"):
        heads.self_supervised(c, turned)
    with pytest.raises(RiskcalError, match=f"loss: {told}"):
        replay_arrays(c, ~turned, [0.5])
    with pytest.raises(RiskcalError, match=f"agrees: {told}"):
        Traces.from_arrays(prompt=prompts, position=np.arange(len(a)), confidence=c, agrees=turned)
    for numbers in (None, [0, 1, 2], [1, 2, 3]):
        nobody = [pd.DataFrame(matrix, columns=numbers) for matrix in (confidence, agrees)]
        assert certify((*nobody, prompts)).layers.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "name", ["threshold", "thresholds", "learned", "coordinates", "certificate"]
)
def test_what_was_calibrated_is_not_overridden(found, name):
    with pytest.raises(RiskcalError, match=f"{name}: is what was calibrated"):
        found.policy(**{name: None})


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("schedule", Decaying(4.0, 10, "t5x"), "makes other exits than were tested"),
        ("lower_is_stricter", True, "makes other exits than were tested"),
        ("min_layer", 4, "leaves out the head after layer 1"),
    ],
)
def test_a_field_that_makes_other_exits_than_were_tested_gets_no_certificate(
    found, name, other, words
):
    with pytest.raises(RiskcalError, match=rf"^{name}: .* {words}.*; leave it out\."):
        found.policy(n_layers=4, **{name: other})
    tested = {"schedule": Constant(), "min_layer": 1, "lower_is_stricter": False}
    said = found.policy(n_layers=4, **{name: tested[name]})
    plain = found.policy(n_layers=4)
    assert said.model_dump(exclude={"certificate"}) == plain.model_dump(exclude={"certificate"})
    assert said.certificate == plain.certificate


def test_a_min_layer_up_to_the_first_head_changes_no_exit():
    confidence, agrees, prompts = sample()
    found = certify((confidence, agrees, prompts), layers=[2, 4, 6])
    first = min(layer for layer, threshold in found.policy().thresholds.items() if threshold < 1.01)
    policies = [found.policy(n_layers=8, min_layer=least) for least in (1, 2, first)]
    tables = [policy.exit_thresholds(8, 3).tolist() for policy in policies]
    assert tables[0] == tables[1] == tables[2]
    with pytest.raises(RiskcalError, match=rf"^min_layer: {first + 1} leaves out the head after"):
        found.policy(n_layers=8, min_layer=first + 1)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=9),
    st.floats(0.05, 0.95),
)
@example([(0, 20)], 0.7575295507480672)  # which rounds to just below 0
def test_the_loss_of_a_request_is_at_most_delta_in_the_mean_where_the_pooled_agreement_is(
    pairs, agreement
):
    errors, exits = (np.array(column) for column in zip(*map(sorted, pairs), strict=True))
    losses = heads.request_loss(exits, errors, agreement=agreement, max_tokens=20)
    assert losses.min() >= 0
    assert losses.max() <= 1
    excess = (errors - (1 - agreement) * exits).sum() / 20 / len(pairs)
    assert losses.mean() - (1 - agreement) == pytest.approx(excess, abs=1e-12)
    assert (
        heads.request_loss(int(exits[0]), int(errors[0]), agreement=agreement, max_tokens=20)
        == losses[0]
    )


@pytest.mark.parametrize(
    ("exits", "errors", "message"),
    [
        ([3, 21], [0, 0], "exits: 21 at index 1; give a whole number of tokens, 0 to max_tokens"),
        (
            [3, 4],
            [0, 5],
            "errors: 5 at index 1; give a whole number of tokens, 0 to the request's exits",
        ),
        ([3, -1], [0, 0], "exits: -1 at index 1"),
        ([3, 4], [0.5, 0], "errors: 0.5 at index 0"),
        ([3, 4], [0], "errors: 1 given for 2 exits"),
        ([3, math.nan], [0, 0], "exits: nan at index 1"),
    ],
)
def test_counts_that_cannot_be_are_refused(exits, errors, message):
    with pytest.raises(RiskcalError, match=message):
        heads.request_loss(exits, errors, agreement=0.9, max_tokens=20)


def test_the_rule_makes_no_certificate():
    thresholds = heads.self_supervised(*VECTOR)
    assert ExitPolicy(thresholds=dict(zip([2], thresholds, strict=True))).certificate is None


def test_the_policy_has_one_threshold_per_layer():
    found = certify(sample(), layers=[6, 12, 18])
    policy = found.policy(measure="margin")
    assert isinstance(policy, ExitPolicy)
    assert policy.measure == "margin"
    assert policy.thresholds == dict(zip((6, 12, 18), found.thresholds.tolist(), strict=True))
    assert [c for c in found.table.columns if c.startswith("threshold")] == [
        f"threshold_{i}" for i in (6, 12, 18)
    ]
    assert not policy.is_full_model


def test_hopeless_heads_leave_the_full_model():
    confidence, agrees, prompt = sample()
    found = certify((confidence, np.zeros_like(agrees), prompt))
    assert not found.certified
    assert np.isinf(found.thresholds).all()
    assert found.table.empty
    assert "certified" in found.table.columns
    assert found.policy().is_full_model
    assert found.message.startswith(
        "Nothing was certified at agreement 0.9: run the full model. At no head do the exits"
    )
    assert found.message in repr(found)


def test_a_pilot_that_promised_too_much_ends_the_walk_at_its_first_step():
    confidence, agrees, prompt = sample()
    pilot = np.isin(prompt, records.tested_order(names(range(800)))[:160])
    broken = certify((confidence, agrees & pilot[:, None], prompt))
    assert broken.table["certified"].tolist() == [False]
    assert np.isinf(broken.thresholds).all()
    assert "more prompts alone may not help" in broken.message


@pytest.mark.parametrize(("n", "seed", "agreement"), [(60, 1, 0.9), (100, 5, 0.93)])
def test_the_fresh_sample_that_it_names_certifies_in_four_draws_of_five(n, seed, agreement):
    """Prompts drawn whole from those recorded, 150 times, SE .033; the size itself is good for about .05 in the share."""
    confidence, agrees, prompt = sample(n, seed=seed)
    options = {"max_tokens": 24, "agreement": agreement}
    few = certify((confidence, agrees, prompt), **options)
    assert not few.certified
    assert "new attempt" in few.message
    size = int(re.search(r"fresh sample of about (\d+) prompts", few.message)[1])
    tokens, certified = [np.flatnonzero(prompt == i) for i in range(n)], 0
    for drawn in np.random.default_rng(7).integers(0, n, (150, size)):
        rows = np.concatenate([tokens[i] for i in drawn])
        fresh = np.repeat(np.arange(size), [tokens[i].size for i in drawn])
        certified += certify((confidence[rows], agrees[rows], fresh), **options).certified
    assert abs(certified / 150 - 0.8) <= 0.05 + 2.5 * 0.033


def test_where_no_sample_that_can_be_simulated_is_enough_it_says_so(monkeypatch):
    monkeypatch.setattr(heads_outlook, "_TOKENS", 1)
    few = certify(sample(20, seed=2), max_tokens=12_000)
    assert "More than 40 fresh prompts would be needed" in few.message


def test_message_and_policy_say_that_the_agreement_is_that_of_recorded_text(found):
    """A decoder that left early goes on from other states: on the shipped model .83 agree where .9 was certified."""
    assert "along the recorded text" in found.message
    assert "along the recorded text" in str(found.policy(n_layers=4))


def test_reprs_say_what_was_found_and_leave_out_heads_that_were_never_used(found):
    text = repr(found)
    opening = "HeadCalibration: 3 heads, agreement 0.9, epsilon 0.05\nCertified: with probability at least 0.95"
    assert text.startswith(opening)
    assert "640 calibration prompts" in found.message
    assert found.message in text
    assert "<table" in found._repr_html_()
    confidence, agrees, prompt = sample()
    idle = certify(
        (np.c_[confidence, np.full(len(prompt), math.nan)], np.c_[agrees, agrees[:, :1]], prompt)
    )
    for shown in (repr(idle), idle._repr_html_()):
        assert "threshold_1" in shown
        assert "_4" not in shown
    assert "threshold_4" in idle.table.columns


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"confidence": np.zeros((4, 2, 1))}, r"confidence: has shape \(4, 2, 1\)"),
        ({"confidence": np.zeros((0, 2))}, r"confidence: has shape \(0, 2\)"),
        ({"confidence": [["a", "b"]] * 40}, "confidence: not an array of numbers"),
        (
            {"confidence": np.r_[np.zeros((3, 2)), [[0, math.inf]], np.zeros((36, 2))]},
            r"confidence: inf at index \[3, 1\]",
        ),
        (
            {"agrees": np.zeros((40, 3))},
            r"agrees: has shape \(40, 3\), but confidence has \(40, 2\)",
        ),
        (
            {"agrees": np.r_[np.ones((2, 2)), [[math.nan, 1]], np.ones((37, 2))]},
            r"agrees: nan at index \[2, 0\]",
        ),
        ({"agrees": np.full((40, 2), 0.5)}, r"agrees: 0.5 at index \[0, 0\]"),
        ({"agreement": math.nan}, "agreement: is NaN"),
        ({"agreement": 0}, "agreement: 0 is not"),
        ({"agreement": 1.5}, "agreement: 1.5 is not"),
        ({"agreement": "most"}, "agreement: 'most' is not a number"),
    ],
)
def test_bad_input_of_both(change, message):
    given = {"confidence": np.zeros((40, 2)), "agrees": np.ones((40, 2))} | change
    with pytest.raises(RiskcalError, match=message):
        heads.self_supervised(**given)
    with pytest.raises(RiskcalError, match=message):
        heads.certified(**given, prompts=np.repeat(np.arange(10), 4), max_tokens=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agreement": 1.0}, "agreement: 1 is not strictly between 0 and 1"),
        ({"epsilon": 0.0}, "epsilon: 0 is not strictly between 0 and 1"),
        ({"prompts": None}, r"prompts: has shape \(\); give one entry per row"),
        ({"prompts": np.arange(39)}, r"prompts: has shape \(39,\)"),
        ({"prompts": [0, None] * 20}, "prompts: missing at row 1"),
        ({"prompts": np.linspace(0, 1, 40)}, "prompts: 0.0 at row 0"),
        (
            {"prompts": ["a"] * 5 + ["b"] * 35},
            "max_tokens: prompt 'a' .row 0. has 5 tokens, more than 4",
        ),
        (
            {"prompts": [0, 1, 2, 3] + [7] * 36},
            "max_tokens: prompt 7 .row 4. has 36 tokens, more than 4",
        ),
        ({"max_tokens": 0}, "max_tokens: 0 is not a whole number of at least 1"),
        ({"max_tokens": 3.5}, "max_tokens: 3.5 is not a whole number"),
        ({"pilot_fraction": 0.0}, "pilot_fraction: 0 is not strictly between 0 and 1"),
        (
            {"pilot_fraction": 0.1},
            "pilot_fraction: 0.1 of 10 prompts leaves 1 for the pilot and 9 for the test",
        ),
        (
            {"pilot_fraction": 0.9},
            "pilot_fraction: 0.9 of 10 prompts leaves 9 for the pilot and 1 for the test",
        ),
        ({"layers": [1]}, "layers: 1 given for 2 heads"),
        ({"layers": [4, 4]}, "layers: 4 at index 1 does not ascend"),
        ({"layers": [0, 4]}, "layers: 0 is not a whole number of at least 1"),
    ],
)
def test_bad_input_of_certified(change, message):
    given = {"prompts": np.repeat(np.arange(10), 4), "max_tokens": 4} | change
    with pytest.raises(RiskcalError, match=message):
        heads.certified(np.zeros((40, 2)), np.ones((40, 2)), **given)


def test_the_arguments_are_left_as_they_were():
    data = sample(60)
    copies = [values.copy() for values in data]
    certify(data)
    for values, copy in zip(data, copies, strict=True):
        np.testing.assert_array_equal(values, copy)
