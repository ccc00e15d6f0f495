"""FLOPs against published integers and a loop over tokens and blocks; batches against a simulated decoder; paired times."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskcal import RiskcalError, efficiency
from riskcal.efficiency import BatchWork, DecoderDimensions
from riskcal.pruning import Pruning

T5_SMALL = DecoderDimensions(d_model=512, d_ff=1024, vocabulary=32128, n_layers=8)


@st.composite
def exit_arrays(draw, n_layers=4, lowest=1):
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    exits = np.zeros((len(lengths), max(lengths)), dtype=int)
    for row, length in enumerate(lengths):
        exits[row, :length] = draw(
            st.lists(st.integers(lowest, n_layers), min_size=length, max_size=length)
        )
    return exits


@st.composite
def dimensions(draw):
    small = st.integers(1, 12)
    return DecoderDimensions(
        d_model=draw(small),
        d_ff=draw(small),
        vocabulary=draw(st.integers(2, 30)),
        n_layers=4,
        d_attention=draw(st.none() | small),
        d_encoder=draw(st.none() | small),
        gated=draw(st.booleans()),
    )


def by_loops(exits, dims, sources, predictor, sizes, min_layer):
    """A decoder that counts a multiplication and an addition for every pair of numbers that meet."""
    d, a, e = dims.d_model, dims.d_attention or dims.d_model, dims.d_encoder or dims.d_model

    def product(rows, inner, columns):
        return 2 * rows * inner * columns

    total = []
    for exit_row, source in zip(exits, sources, strict=True):
        flops, opened = 0, set()
        for t, q in enumerate(exit_row[exit_row > 0], 1):
            for layer in range(1, dims.n_layers + 1):
                if layer > q:
                    flops += 2 * product(1, d, a)  # the skipped layer's key and value
                    continue
                if layer not in opened:
                    opened.add(layer)
                    flops += 2 * product(source, e, a)  # the prompt's keys and values
                flops += 3 * product(1, d, a) + product(1, a, d)  # query, key, value, output
                flops += product(1, a, t) + product(1, t, a)  # scores, and their mean of values
                flops += (
                    product(1, d, a)
                    + product(1, a, source)
                    + product(1, source, a)
                    + product(1, a, d)
                )
                flops += (2 if dims.gated else 1) * product(1, d, dims.d_ff) + product(
                    1, dims.d_ff, d
                )
                if predictor == "head":
                    flops += product(1, d, sizes[layer - 1])
                elif predictor == "classifier" and layer >= min_layer:
                    flops += product(1, d, 1)
            if predictor != "head":
                flops += product(1, d, dims.vocabulary)
        total.append(flops)
    return total


@given(exit_arrays(), dimensions(), st.sampled_from(efficiency.PREDICTORS), st.data())
def test_flops_are_those_of_a_loop_over_tokens_and_blocks(exits, dims, predictor, data):
    sources = data.draw(st.lists(st.integers(1, 9), min_size=len(exits), max_size=len(exits)))
    sizes = data.draw(st.lists(st.integers(1, dims.vocabulary), min_size=4, max_size=4))
    given_sizes = sizes if predictor == "head" else None
    found = efficiency.decoder_flops(
        exits, dims, sources, predictor=predictor, head_sizes=given_sizes
    )
    assert found.adaptive.tolist() == by_loops(exits, dims, sources, predictor, sizes, 1)
    whole = np.where(exits > 0, 4, 0)
    assert found.full.tolist() == by_loops(whole, dims, sources, "none", None, 1)
    assert found.tokens.tolist() == (exits > 0).sum(1).tolist()


@given(exit_arrays(lowest=2), dimensions(), st.sampled_from(efficiency.PREDICTORS))
def test_no_predictor_works_below_min_layer(exits, dims, predictor):
    sources = [3] * len(exits)
    found = efficiency.decoder_flops(exits, dims, sources, predictor=predictor, min_layer=2)
    expected = by_loops(exits, dims, sources, predictor, [0] + [dims.vocabulary] * 3, 2)
    assert found.adaptive.tolist() == expected


@pytest.mark.parametrize(
    ("exit_layer", "predictor", "per_token"),
    [
        (1, "head", 87_840_768),
        (2, "head", 167_292_928),
        (2, "none", 134_393_856),
        (8, "head", 644_005_888),
        (8, "none", 413_712_384),
    ],
)
def test_row_16_integers_of_the_documents_short(exit_layer, predictor, per_token):
    found = efficiency.decoder_flops(
        np.full((1, 5), exit_layer), T5_SMALL, 200, predictor=predictor
    )
    assert found.per_token == per_token
    assert found.full_per_token == 413_712_384
    assert found.ratio == pytest.approx(413_712_384 / per_token, rel=1e-15)


@pytest.mark.parametrize(("predictor", "ratio"), [("head", 0.672), ("classifier", 1.397)])
def test_row_16_integers_of_the_documents_long(predictor, ratio):
    found = efficiency.decoder_flops(np.full((1, 82), 5), T5_SMALL, 800, predictor=predictor)
    assert int(found.full_per_token) == 170_469_326
    assert round(found.ratio, 3) == ratio


def test_ratios_of_the_documents():
    ratio = {q: efficiency.decoder_flops(np.full((1, 5), q), T5_SMALL, 200).ratio for q in (1, 8)}
    assert (round(ratio[1], 2), round(ratio[8], 2)) == (4.71, 0.64)


@given(exit_arrays(), dimensions())
def test_all_layers_without_a_predictor_are_the_full_model(exits, dims):
    found = efficiency.decoder_flops(np.where(exits > 0, 4, 0), dims, 7, predictor="none")
    assert found.adaptive.tolist() == found.full.tolist()
    assert found.ratio == 1.0


@given(exit_arrays(n_layers=3), dimensions(), st.sampled_from(efficiency.PREDICTORS), st.data())
def test_a_deeper_exit_costs_more(exits, dims, predictor, data):
    row = data.draw(st.integers(0, len(exits) - 1))
    token = data.draw(st.integers(0, int((exits[row] > 0).sum()) - 1))
    deeper = exits.copy()
    deeper[row, token] += 1
    before = efficiency.decoder_flops(exits, dims, 2, predictor=predictor)
    after = efficiency.decoder_flops(deeper, dims, 2, predictor=predictor)
    changed = after.adaptive - before.adaptive
    assert changed[row] > 0
    assert not np.delete(changed, row).any()
    assert after.full.tolist() == before.full.tolist()


def test_a_block_never_run_never_pays_for_the_prompt():
    exits = np.array([[2, 1, 3, 1]])
    short, long = (
        efficiency.decoder_flops(exits, T5_SMALL, x, predictor="none").adaptive[0] for x in (1, 2)
    )
    per_source_token = 4 * exits.sum() * 512 + 3 * 4 * 512 * 512
    assert long - short == per_source_token


def test_gated_layers_cost_a_matrix_more():
    exits = np.full((1, 5), 3)
    plain, gated = (
        efficiency.decoder_flops(exits, replace(T5_SMALL, gated=gated), 10).adaptive[0]
        for gated in (False, True)
    )
    assert gated - plain == 5 * 3 * 2 * 1024 * 512


@given(exit_arrays(), dimensions(), st.sampled_from(efficiency.PREDICTORS))
def test_token_flops_add_up_to_decoder_flops_but_for_first_calls(exits, dims, predictor):
    row = exits[:1]
    steps = [
        efficiency.token_flops(dims, t, 6, predictor=predictor)[q - 1]
        for t, q in enumerate(row[row > 0], 1)
    ]
    first_calls = (
        4 * 6 * (dims.d_attention or dims.d_model) * (dims.d_encoder or dims.d_model) * row.max()
    )
    assert efficiency.decoder_flops(row, dims, 6, predictor=predictor).adaptive.tolist() == [
        sum(steps) + first_calls
    ]


def test_token_flops_start_at_min_layer():
    flops = efficiency.token_flops(T5_SMALL, 1, 5, min_layer=3)
    assert (flops[:2] == 0).all()
    assert (np.diff(flops[2:]) > 0).all()


def test_dimensions_of_a_configuration():
    config = SimpleNamespace(
        d_model=512,
        d_ff=1024,
        vocab_size=32128,
        num_decoder_layers=8,
        num_heads=6,
        d_kv=64,
        is_gated_act=True,
    )
    found = DecoderDimensions.from_config(config)
    assert found == replace(T5_SMALL, d_attention=384, gated=True)
    del config.d_kv
    with pytest.raises(RiskcalError, match="config: has no whole number d_kv"):
        DecoderDimensions.from_config(config)


def test_dimensions_of_a_hugging_face_t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        num_layers=3, num_decoder_layers=5, feed_forward_proj="gated-gelu", num_heads=6
    )
    expected = DecoderDimensions(512, 2048, 32128, 5, d_attention=384, gated=True)
    assert DecoderDimensions.from_config(config) == expected


# ---- Heads


def test_row_20_the_k_table_of_the_documents():
    sizes = efficiency.head_sizes(
        Pruning(form="decaying", largest=35_000, smallest=250), 24, 32_128, start=1
    )
    shown = {2: 2781, 3: 1904, 7: 842, 12: 496, 15: 398, 17: 351, 19: 315, 24: 250}
    assert {layer: sizes[layer - 1] for layer in shown} == shown
    assert sizes[0] == 32_128  # the first pass is whole, though k(1) = 5153 rows are kept
    assert (efficiency.head_sizes(Pruning(form="fixed"), 24, 32_128, start=2)[2:] == 2781).all()
    assert efficiency.head_sizes(Pruning(), 24, 32_128, start=7)[5:8].tolist() == [0, 32_128, 739]


def test_the_true_head_ratio_counts_the_whole_pass():
    sizes = efficiency.head_sizes(Pruning(), 24, 32_128, start=1)
    exits = np.array([[3, 1, 0], [24, 2, 5]])
    calls = sum(q for q in (3, 1, 24, 2, 5))
    multiplied = sum(sum([32_128, *(k for k in sizes[1:q])]) for q in (3, 1, 24, 2, 5))
    assert efficiency.head_ratio(exits, sizes, 32_128) == calls * 32_128 / multiplied
    assert efficiency.head_ratio(exits, np.full(24, 32_128), 32_128) == 1.0
    # the published "x100" counts later layers only
    assert efficiency.head_ratio([[24]], sizes, 32_128) < 16


def test_adaptive_sizes_follow_each_tokens_confidence():
    confidence = np.array([[[0.0, 1.0, 0.5, np.nan], [np.nan, 0.2, 0.9, 0.4]]])
    pruning = Pruning(form="adaptive", largest=400, smallest=20)
    sizes = efficiency.head_sizes(pruning, 4, 1000, start=2, confidence=confidence)
    first = pruning.kept(2, 4, 1000, start=2)
    assert sizes[..., :2].tolist() == [[[0, 1000], [0, 1000]]]
    for token, layer in itertools.product(range(2), (3, 4)):
        expected = max(
            20, np.floor(first * (1 - 0.9 * np.nan_to_num(confidence[0, token, layer - 2])))
        )
        assert sizes[0, token, layer - 1] == expected
    dims = replace(T5_SMALL, n_layers=4, vocabulary=1000)
    exits = np.array([[3, 4]])
    pruned = efficiency.decoder_flops(exits, dims, 5, head_sizes=sizes, min_layer=2).adaptive[0]
    whole = efficiency.decoder_flops(exits, dims, 5, min_layer=2).adaptive[0]
    assert whole - pruned == 2 * 512 * (5 * 1000 - sizes[0, 0, :3].sum() - sizes[0, 1].sum())


# ---- Layers and expected work


@given(exit_arrays())
def test_layers_per_token_by_hand_and_by_shares(exits):
    rows = [row[row > 0] for row in exits]
    assert efficiency.layers_per_token(exits) == pytest.approx(np.concatenate(rows).mean())
    assert efficiency.layers_per_token(exits, average="sequence") == pytest.approx(
        np.mean([r.mean() for r in rows])
    )
    shares = efficiency.exit_shares(exits, 4)
    work = efficiency.expected_work(shares)
    assert work.expected == pytest.approx(efficiency.layers_per_token(exits))
    assert work.deepest == exits.max()


def test_token_and_sequence_averages_differ_where_lengths_do():
    exits = [[8, 8, 8, 8], [1, 0, 0, 0]]
    assert efficiency.layers_per_token(exits) == 33 / 5
    assert efficiency.layers_per_token(exits, average="sequence") == 4.5


def test_row_39_worked_example():
    shares = np.zeros(32)
    shares[[15, 31]] = 0.5
    work = efficiency.expected_work(shares)
    assert (work.expected, work.quantile, work.deepest) == (24.0, 32.0, 32.0)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=4).filter(any), st.integers(1, 4))
def test_expected_work_of_rows_is_the_mean_over_all_their_draws(counts, rows):
    shares = np.array(counts) / sum(counts)
    cost = np.array([1.0, 5.0, 6.0, 20.0])[: len(counts)]
    depths = list(itertools.product(range(len(counts)), repeat=rows))
    chances = [np.prod(shares[list(drawn)]) for drawn in depths]
    deepest = np.array([cost[max(drawn)] for drawn in depths])
    work = efficiency.expected_work(shares, cost, rows=rows, quantile=0.9)
    assert work.expected == pytest.approx(np.dot(chances, deepest))
    assert work.deepest == cost[np.flatnonzero(shares).max()]
    covered = np.dot(chances, deepest <= work.quantile)
    assert covered >= 0.9 - 1e-8
    if work.quantile > cost[0]:
        assert np.dot(chances, deepest < work.quantile) < 0.9


def test_a_rare_deep_exit_shows_in_the_deepest_path_only():
    shares = [0.5, 0.499, 0.0, 0.001]
    one, many = efficiency.expected_work(shares), efficiency.expected_work(shares, rows=64)
    assert (one.quantile, one.deepest) == (2.0, 4.0)
    assert many.quantile == 4.0
    assert many.expected > 2.0 > one.expected


# ---- Batches


def decode(exits, mode):
    """A decoder that only counts: steps, and the rows computed in each call of a layer."""
    rows, kept = [], len(exits)
    for position in range(exits.shape[1]):
        waiting = {row for row in range(len(exits)) if exits[row, position]}
        if len(waiting) <= kept / 2:
            kept = len(waiting)
        for layer in itertools.count(1):
            rows.append(len(waiting) if mode == "regroup" else kept)
            waiting -= {row for row in waiting if exits[row, position] == layer}
            if not waiting:
                break
    return BatchWork(exits.shape[1], tuple(rows))


@given(exit_arrays(), st.sampled_from(efficiency.BATCH_MODES))
def test_batch_work_is_what_a_counting_decoder_does(exits, mode):
    assert efficiency.batch_work(exits, mode) == decode(exits, mode)


@given(exit_arrays())
def test_regrouping_never_computes_more_rows_in_as_many_calls(exits):
    diverge, regroup, deepest = (
        efficiency.batch_work(exits, mode) for mode in efficiency.BATCH_MODES
    )
    assert regroup.calls == diverge.calls
    assert sum(regroup.rows) <= sum(diverge.rows)
    assert deepest == diverge
    if len(exits) == 1:
        assert regroup == diverge


# ---- Time


def measured(speeds, drift, runs=3):
    """Rounds of a machine whose speed drifts; round 0 is slow and differs by setting."""
    rows = []
    for round_, factor in enumerate(drift):
        for run, (setting, seconds) in itertools.product(range(runs), speeds.items()):
            slow = 10.0 * (setting == "fast") + 1.0 if round_ == 0 else 1.0
            rows.append((round_, run, setting, seconds * (run + 1) * factor * slow, 5 * (run + 1)))
    return pd.DataFrame(rows, columns=["round", "run", "setting", "seconds", "tokens"])


def test_row_17_paired_ratios_do_not_drift_and_the_first_round_is_dropped():
    times = measured({"own full": 4.0, "cached": 8.0, "fast": 1.0}, drift=[1, 1, 3, 2])
    table = efficiency.speed_table(times, ["cached", "own full"]).set_index("setting")
    assert list(table.index) == ["own full", "cached", "fast"]
    for column in ("x own full", "x own full low", "x own full high"):
        assert table[column].tolist() == pytest.approx([1.0, 0.5, 4.0])
    assert table.loc["fast", "x cached"] == pytest.approx(8.0)
    kept = times[(times["setting"] == "fast") & (times["round"] > 0)]["seconds"]
    assert table.loc["fast", "p50"] == kept.median()
    assert table.loc["fast", "p95"] == pytest.approx(np.quantile(kept, 0.95))
    assert table.loc["fast", "mean"] == pytest.approx(kept.mean())
    # the median round has drift 2
    assert table.loc["fast", "tokens_per_second"] == pytest.approx(5.0 / 2)


def test_the_spread_of_ratios_is_over_rounds():
    times = measured({"full": 2.0, "early": 1.0}, drift=[1, 1, 1, 1])
    times.loc[(times["round"] == 2) & (times["setting"] == "early"), "seconds"] *= 4
    early = (
        efficiency.speed_table(times.drop(columns="tokens"), ["full"])
        .set_index("setting")
        .loc["early"]
    )
    assert (early["x full"], early["x full low"], early["x full high"]) == pytest.approx(
        (2.0, 0.5, 2.0)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="run"), "run: the column is missing"),
        (lambda t: t.drop(index=len(t) - 1), "exactly once"),
        (lambda t: pd.concat([t, t.tail(1)], ignore_index=True), "exactly once on each run"),
        (lambda t: t.assign(seconds=t["seconds"].where(t.index != 4, 0.0)), "seconds: 0 at row 4"),
        (lambda t: t[t["round"] == 0], "drops every round"),
        (lambda t: t[t["setting"] != "full"], "baselines: 'full' was not measured"),
    ],
)
def test_timings_that_are_not_paired_are_refused(change, message):
    times = measured({"full": 2.0, "early": 1.0}, drift=[1, 1])
    with pytest.raises(RiskcalError, match=message):
        efficiency.speed_table(change(times), ["full"])


# ---- Bad input


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([[1, 9]], r"exit_layers: 9 at index \[0, 1\]; give whole numbers from 1 to 8"),
        ([[1, 1.5]], r"exit_layers: 1.5 at index \[0, 1\]"),
        ([[1, -1]], r"exit_layers: -1 at index \[0, 1\]"),
        ([[1, 2], [0, 0]], "exit_layers: row 1 has no token"),
        ([[1, 0, 2]], r"a token follows a 0 at index \[0, 1\]"),
        ([1, 2], "2-D"),
    ],
)
def test_exit_layers_that_cannot_be_are_refused(exits, message):
    with pytest.raises(RiskcalError, match=message):
        efficiency.decoder_flops(exits, T5_SMALL, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_lengths": 0}, "source_lengths: 0 at index 0"),
        ({"source_lengths": [3, 2.5]}, "source_lengths: 2.5 at index 1"),
        ({"source_lengths": [3, 3, 3]}, "3 given for 2 prompts"),
        ({"predictor": "softmax"}, "predictor: 'softmax' is unknown"),
        ({"predictor": "none", "head_sizes": [5] * 8}, "means nothing to predictor 'none'"),
        ({"head_sizes": [5] * 4}, r"head_sizes: has shape \(4,\)"),
        ({"head_sizes": [0, *[5] * 7]}, r"head_sizes: 0 at the exit of the token at \[0, 0\]"),
        ({"head_sizes": [40_000] * 8}, "head_sizes: 40000 at index 0"),
        ({"min_layer": 2}, r"exit_layers: 1 at index \[0, 0\] is below min_layer 2"),
        ({"min_layer": 0}, "min_layer: 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(RiskcalError, match=message):
        efficiency.decoder_flops([[1, 2], [5, 0]], T5_SMALL, **({"source_lengths": 5} | arguments))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: efficiency.expected_work([0.5, 0.4]), "sum to 0.9"),
        (lambda: efficiency.expected_work([1.5, -0.5]), "shares: -0.5 at index 1"),
        (lambda: efficiency.expected_work([0.5, 0.5], [2, 1]), "cost: falls after index 0"),
        (lambda: efficiency.expected_work([0.5, 0.5], [2]), "1 given for 2 layers"),
        (lambda: efficiency.batch_work([[1]], "flat"), "mode: 'flat' is unknown"),
        (lambda: efficiency.layers_per_token([[1]], average="mean"), "average: 'mean' is unknown"),
        (lambda: efficiency.head_ratio([[2]], [0, 0], 9), "called at no layer"),
        (
            lambda: efficiency.head_sizes(Pruning(), 4, 99, confidence=[[0.1]]),
            "last axis must be the 4 layers",
        ),
        (
            lambda: efficiency.token_flops(T5_SMALL, 1, 5, min_layer=9),
            "min_layer: 9 is not one of the 8 layers",
        ),
        (lambda: DecoderDimensions(0, 1, 1, 1), "d_model: 0"),
        (lambda: DecoderDimensions(1, 1, 1, 1, d_encoder=0), "d_encoder: 0"),
    ],
)
def test_other_bad_input(call, message):
    with pytest.raises(RiskcalError, match=message):
        call()
