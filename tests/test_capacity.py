"""Capacity: work, batches and engines against brute force and simulation, strata that sum, rows that are always deep."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from riskcal import RiskcalError, efficiency
from riskcal.efficiency import DecoderDimensions, capacity, deepest_row, engine_work, expected_work

SMALL = DecoderDimensions(d_model=16, d_ff=32, vocabulary=50, n_layers=4)


def drawn(seed, requests=200, n_layers=4, longest=6, shares=(0.6, 0.2, 0.1, 0.1)):
    """Exits of requests of unequal lengths, each token's independent of all else."""
    rng = np.random.default_rng(seed)
    exits = 1 + rng.choice(n_layers, size=(requests, longest), p=shares)
    lengths = rng.integers(1, longest + 1, requests)
    return np.where(np.arange(longest) < lengths[:, None], exits, 0)


def equal_lengths(seed, requests, longest, shares):
    rng = np.random.default_rng(seed)
    return 1 + rng.choice(len(shares), size=(requests, longest), p=shares)


def test_half_the_tokens_at_layer_16_of_32_take_24_layers():
    exits = np.array([[16, 32] * 8, [32, 16] * 8])
    found = capacity(exits, 32, rows=[1, 2])
    # the sum over exit depths of their probability times the layers
    assert found.layers.expected == 24.0
    assert found.layers.deepest == 32.0
    table = found.table.set_index(["way", "rows"])
    assert table.loc[("engine", 1), "depth"] == table.loc[("engine", 2), "depth"] == 24.0
    # in step with a row that goes deep whenever the other does not, nothing is saved
    assert table.loc[("regroup", 2), "depth"] == 32.0
    assert table.loc[("regroup", 2), "independent"] == 0.25 * 16 + 0.75 * 32


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=4), st.integers(1, 4))
def test_the_deepest_of_several_rows_is_that_of_all_combinations(weights, rows):
    if not any(weights):
        return
    shares = np.array(weights) / sum(weights)
    by_hand = np.zeros(len(shares))
    for depths in itertools.product(range(len(shares)), repeat=rows):
        by_hand[max(depths)] += np.prod(shares[list(depths)])
    found = deepest_row(shares, rows)
    assert found == pytest.approx(by_hand)
    assert found.sum() == pytest.approx(1.0)
    cost = np.cumsum(np.arange(1.0, len(shares) + 1))
    assert expected_work(shares, cost, rows=rows).expected == pytest.approx(by_hand @ cost)


def test_batches_of_independent_rows_are_as_deep_as_the_deepest_of_them():
    shares = [0.7, 0.2, 0.05, 0.05]
    exits = equal_lengths(0, 960, 8, shares)
    found = capacity(exits, 4, rows=[4, 16], ways=["regroup", "diverge", "deepest"]).table
    for size, own in found.groupby("rows"):
        depths = deepest_row(shares, size)
        mean = depths @ np.arange(1, 5)
        steps = 960 / size * 8
        error = np.sqrt((depths @ np.arange(1, 5) ** 2 - mean**2) / steps)
        assert np.abs(own["depth"] - mean).max() < 4 * error + 1e-12
        assert np.ptp(own["depth"]) == 0  # all modes go to the deepest row


def by_turns(exits, slots, least):
    """The engine's rules with lists: each row is a request, its token and the layer that it waits for."""
    waiting, todo, at = [], list(range(len(exits))), 0
    in_a_row = since = 0
    whole = False
    calls, begun, ended = [], {}, {}
    lengths = [int((row > 0).sum()) for row in exits]
    while True:
        new = 0
        if (slots - len(waiting)) * 8 >= slots:
            while todo and len(waiting) < slots:
                begun[todo[0]] = len(calls)
                waiting.append([todo.pop(0), 0, 0])
                new += 1
        if not waiting:
            return calls, begun, ended
        counts = [sum(row[2] == layer for row in waiting) for layer in range(exits.max())]
        enough = 1 if whole else least
        turn = [layer for layer, count in enumerate(counts) if layer > at > 0 and count >= enough]
        deep = [layer for layer, count in enumerate(counts) if layer > 0 and count]
        if turn:
            at = turn[0]
        else:
            due = in_a_row >= 24 or since >= 64
            is_turn = bool(deep) and (due or 10 * sum(counts[1:]) >= 7 * len(waiting))
            whole = due and is_turn
            since = 0 if whole else since
            at = deep[0] if is_turn else 0
        in_a_row, since = (0 if at else in_a_row + 1), since + 1
        served = [row for row in waiting if row[2] == at]
        for row in served:
            if exits[row[0]][row[1]] == at + 1:
                row[1], row[2] = row[1] + 1, 0
                if row[1] == lengths[row[0]]:
                    ended[row[0]] = len(calls)
                    waiting.remove(row)
            else:
                row[2] += 1
        calls.append((len(served), new))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 12), st.integers(1, 6))
def test_an_engine_calls_layers_as_its_rules_say(seed, requests, slots, least):
    exits = drawn(seed, requests)
    work = engine_work(exits, slots, least=least)
    calls, begun, ended = by_turns(exits, slots, least)
    assert list(zip(work.rows.tolist(), work.admitted.tolist(), strict=True)) == calls
    assert work.begun.tolist() == [begun[i] for i in range(requests)]
    assert work.ended.tolist() == [ended[i] for i in range(requests)]
    assert work.rows.sum() == exits.sum()  # each row is computed as deep as it goes, and no deeper
    assert work.admitted.sum() == requests
    took, each = work.seconds((2.0, 0.5), request=3.0)
    assert took == pytest.approx(2 * work.calls + 0.5 * exits.sum() + 3 * requests)
    clock, end = 0.0, {}
    start = {}
    for number, (rows, new) in enumerate(calls):
        start[number] = clock
        clock += 2.0 + 0.5 * rows + 3.0 * new
        end[number] = clock
    assert each == pytest.approx([end[ended[i]] - start[begun[i]] for i in range(requests)])


def test_one_row_that_is_always_deep_holds_up_a_batch_and_not_an_engine():
    exits = equal_lengths(1, 640, 8, [0.95, 0.05, 0.0, 0.0])
    found = capacity(exits, 4, rows=[1, 64], ways=["engine", "regroup"], call=(1.0, 0.1))
    usual, stressed = (part.set_index(["way", "rows"]) for part in (found.table, found.stress))
    assert (stressed.loc[("regroup", 64), "depth"], usual.loc[("regroup", 64), "depth"]) == (
        4.0,
        pytest.approx(2, abs=0.2),
    )
    mean = exits.mean()
    assert stressed.loc[("engine", 64), "depth"] == pytest.approx(mean * 63 / 64 + 4 / 64, rel=0.01)
    assert (stressed.loc[:, "depth"].xs(1, level="rows") == 4.0).all()
    kept = stressed["requests_per_second"] / usual["requests_per_second"]
    assert kept["engine", 64] > 1.15 * kept["regroup", 64]
    assert stressed.loc[("regroup", 64), "p99"] > usual.loc[("regroup", 64), "p99"]
    rows = 64
    deep = np.vstack([np.full((1, 8), 4), exits[1:rows]])
    assert stressed.loc[("regroup", 64), "calls"] * rows == pytest.approx(
        efficiency.batch_work(deep, "regroup").calls
    )


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.sampled_from(["code", "news", "chat"]), min_size=30, max_size=30),
)
def test_strata_sum_to_the_total(seed, group):
    exits = drawn(seed, 30)
    strata = capacity(exits, 4, rows=[1], group=group).strata.set_index("group")
    assert sorted(strata.index.drop("all")) == sorted(set(group))
    parts = strata.drop("all")
    for name in ("requests", "tokens", "layers"):
        assert parts[name].sum() == strata.loc["all", name]
    assert parts["work"].sum() == pytest.approx(1.0)
    assert strata.loc["all", "layers"] == exits.sum()
    assert strata.loc["all", "tokens"] == (exits > 0).sum()
    code = np.array(group) == group[0]
    assert strata.loc[group[0], "depth"] == pytest.approx(efficiency.layers_per_token(exits[code]))
    whole = capacity(exits, 4, rows=[1])
    assert whole.layers.expected == pytest.approx(strata.loc["all", "depth"])
    assert whole.strata["group"].tolist() == ["all"]


def test_throughput_and_waiting_times_are_those_of_the_calls():
    exits = drawn(3, 96)
    call = {"engine": (1.0, 0.05), "diverge": (0.5, 0.1)}
    table = capacity(
        exits, 4, rows=[8], ways=list(call), call=call, request=0.25, quantile=0.9
    ).table
    engine, batches = (row for _, row in table.iterrows())
    took, each = engine_work(exits, 8).seconds(call["engine"], 0.25)
    assert engine["requests_per_second"] == pytest.approx(96 / took)
    assert engine["tokens_per_second"] == pytest.approx((exits > 0).sum() / took)
    assert (engine["p50"], engine["p90"]) == pytest.approx(
        (np.median(each), np.quantile(each, 0.9))
    )
    assert engine["rows_per_call"] * engine["calls"] * 96 == pytest.approx(exits.sum())
    works = [efficiency.batch_work(_short(exits[i : i + 8]), "diverge") for i in range(0, 96, 8)]
    seconds = [0.5 * work.calls + 0.1 * sum(work.rows) + 0.25 * 8 for work in works]
    assert batches["requests_per_second"] == pytest.approx(96 / sum(seconds))
    assert batches["p50"] == pytest.approx(np.median(np.repeat(seconds, 8)))


def _short(exits):
    return exits[:, : (exits > 0).sum(1).max()]


def test_work_in_flops_and_parameters_of_heads():
    exits = drawn(4, 64)
    found = capacity(
        exits,
        4,
        rows=[2],
        dimensions=SMALL,
        source_lengths=7,
        heads={1: 800, 3: 900},
        number_bytes=2,
    )
    flops = efficiency.decoder_flops(exits, SMALL, 7)
    assert found.flops.expected == flops.per_token
    assert found.flops.expected < found.flops.quantile <= found.flops.deepest
    deep = efficiency.decoder_flops(np.where(exits > 0, 4, 0), SMALL, 7)
    assert found.flops.deepest == (deep.adaptive / deep.tokens).max()
    assert (found.head_parameters, found.head_bytes) == (1700, 3400)
    held = efficiency.memory(
        SMALL, rows=2, max_prompt=7, max_new_tokens=6, heads={1: 800, 3: 900}, number_bytes=2
    )
    assert held.heads == 3400
    assert found.table["bytes"].tolist() == [held.total] * 3
    # in words: of 2 rows and 4 layers keys and values of 6 positions and of 7 prompt tokens, 16 wide; 7 states; 6 x 4 thresholds
    numbers = 2 * (4 * (2 * 6 + 2 * 7) * 16 + 7 * 16)
    assert held.total == 2 * numbers + 4 * 2 * 6 * 4 + 3400
    assert "Capacity:" in repr(found)
    assert capacity(exits, 4, rows=[2]).flops is None


def test_what_no_capacity_can_be_told_of_is_refused_by_name():
    exits = drawn(0, 8)
    for arguments, message in (
        ({"rows": [9]}, "rows: 9 in flight of 8 requests"),
        ({"rows": []}, "rows: 0 in flight"),
        ({"ways": ["serial"]}, "ways"),
        ({"call": (1.0,)}, r"call: \(1.0,\) for 'engine'"),
        ({"call": {"engine": (1.0, 1.0)}}, "call: None for 'regroup'"),
        ({"call": (-1.0, 1.0)}, "a call takes time"),
        ({"call": (0.0, 0.0)}, "a call takes time"),
        ({"request": 1.0}, "request: seconds of reading"),
        ({"dimensions": SMALL}, "source_lengths: dimensions need"),
        ({"heads": {5: 10}}, "heads: 5 is not one of the layers 1 to 4"),
        ({"heads": {2: 0}}, "heads: of layer 2"),
        ({"group": ["a"]}, "group: 1 given for 8 requests"),
        ({"group": ["all"] * 8}, "group: 'all' is the row"),
        ({"quantile": 1.5}, "quantile"),
    ):
        with pytest.raises(RiskcalError, match=message):
            capacity(exits, 4, **({"rows": [2]} | arguments))
    with pytest.raises(RiskcalError, match="exit_layers"):
        capacity(exits, 3)
    with pytest.raises(RiskcalError, match="slots"):
        engine_work(exits, 0)
