import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import toy_decoder
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from processes import environment
from recordings import FINE, GRID, MANY, SETTINGS, STOP, TEXTS, interrupted, merged, record, shards

import riskcal
from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy, Sampling, Stop
from riskcal.records import Runs, Traces
from riskcal.schedules import Constant, Decaying
from riskcal_adapters import texts
from riskcal_adapters.recording import folder as recording_folder
from riskcal_adapters.recording import runs as recording_runs
from riskcal_adapters.recording import worker

# What is written


def test_every_row_is_what_a_plain_loop_over_prompts_and_thresholds_gives(undisturbed):
    rows = pd.concat(
        [pd.read_parquet(undisturbed / name) for name in shards(undisturbed)], ignore_index=True
    )
    expected = []
    for prompt, text in enumerate(TEXTS):
        full = None
        for threshold in [math.inf, 0.9, 0.5, 0.2, 0.0]:
            policy = (
                ExitPolicy.full_model()
                if math.isinf(threshold)
                else ExitPolicy(threshold=threshold)
            )
            needed = policy.exit_thresholds(toy_decoder.LAYERS, 6)
            tokens, exits, *_ = toy_decoder.generate_alone(text, needed)
            output = " ".join(f"w{token}" for token in tokens if token > toy_decoder.END)
            full = output if full is None else full
            distance = texts.token_distance(output, full)
            expected.append((prompt, threshold, distance, sum(exits) / len(exits), len(tokens)))
    columns = ["prompt", "threshold", "dissimilarity", "layers", "tokens"]
    pd.testing.assert_frame_equal(
        rows[columns], pd.DataFrame(expected, columns=columns), check_exact=True
    )
    assert rows["dissimilarity"].nunique() > 5  # the toy is not trivial
    assert list(rows.columns) == [
        *("prompt", "threshold", "min_layer", "measure", "policy"),
        *("dissimilarity", "layers", "tokens", "seconds", "source"),
    ]
    assert (rows["seconds"] > 0).all()
    assert set(rows["source"]) == {"generated"}


def test_the_folder_reads_as_runs_and_traces(undisturbed):
    runs, traces = Runs.read(undisturbed), Traces.read(undisturbed / "traces")
    assert runs.thresholds.tolist() == [0.9, 0.5, 0.2, 0.0]
    assert (runs.n, runs.k) == (11, 4)
    assert (runs.full["dissimilarity"] == 0).all()
    assert (runs.full["layers"] == toy_decoder.LAYERS).all()
    assert (runs.values["layers"][:, -1] == 1).all()  # threshold 0: all leave at the first layer
    assert traces.n_layers == toy_decoder.LAYERS
    assert sorted(set(traces.prompt.tolist())) == list(range(11))
    assert len(traces.prompt) == runs.full["tokens"].sum()
    assert traces.agrees[:, -1].all()


@pytest.mark.parametrize(
    ("shard_prompts", "sizes"), [(1, [1] * 11), (4, [4, 4, 3]), (11, [11]), (50, [11])]
)
def test_a_prompt_never_spans_two_files(tmp_path, undisturbed, shard_prompts, sizes):
    out = record(tmp_path / "out", shard_prompts=shard_prompts)
    prompts = [pd.read_parquet(out / name)["prompt"].unique().tolist() for name in shards(out)]
    assert [len(ids) for ids in prompts] == sizes
    assert [i for ids in prompts for i in ids] == list(range(11))
    assert merged(out) == merged(undisturbed)


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batches_do_not_change_the_tables(tmp_path, undisturbed, batch_size):
    out = record(tmp_path / "out", batch_size=batch_size, traces=True)
    assert merged(out) == merged(undisturbed)
    assert merged(out, "traces/*.parquet") == merged(undisturbed, "traces/*.parquet")


def test_seconds_of_a_batch_are_shared_by_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(
        recording_runs, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__)
    )
    out = record(tmp_path / "out", batch_size=3)
    for name, expected in zip(
        shards(out), ([1 / 3] * 3 + [1], [1 / 3] * 3 + [1], [1 / 3] * 3), strict=True
    ):
        for _, rows in pd.read_parquet(out / name).groupby("threshold"):
            assert sorted(rows["seconds"]) == expected


class Clock:
    """Stands for the module time in `record`, which reads it before and after what it counts."""

    running = False

    def perf_counter(self):
        self.running = not self.running
        return float(not self.running)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recording_runs, "time", clock)
    return clock


class Clocked(toy_decoder.OpenDecoder):
    """Keeps what it generated while the clock ran, and of every call whether it ran, the batch's shape and the depth."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.clocked, self.calls_of = clock, [], []

    def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
        done = len(self.generated)
        generation = super().generate(
            input_ids, attention_mask, policy=policy, max_new_tokens=max_new_tokens
        )
        if self.clock.running:
            self.clocked += self.generated[done:]
        self.calls_of.append((self.clock.running, input_ids.shape, policy.is_full_model))
        return generation


@pytest.mark.parametrize(
    ("batch_size", "kinds"),
    [  # rows and tokens, rounded up as programs are that are compiled for them
        (1, {(1, 16), (1, 32)}),
        (5, {(8, 16), (1, 32)}),  # five, five and the long one alone
        (10, {(16, 16), (1, 32)}),
    ],
)
def test_no_batch_is_clocked_before_one_of_its_kind_was_generated(
    tmp_path, clock, batch_size, kinds
):
    def kind(rows, tokens):
        return next(size for size in (1, 2, 4, 8, 16) if size >= rows), 16 if tokens <= 16 else 32

    decoder = Clocked(clock)
    texts = [*TEXTS[:10], "long " * 5]
    settings = {"shard_prompts": 11, "batch_size": batch_size}
    record(tmp_path / "out", texts, load=lambda: decoder, thresholds=[0.9, 0.5], **settings)
    warmed = set()
    for running, shape, full in decoder.calls_of:
        if running:
            assert (kind(*shape), full) in warmed
        else:
            assert (kind(*shape), full) not in warmed  # once is enough
            warmed.add((kind(*shape), full))
    assert kinds <= {size for size, _ in warmed}


def test_tables_bring_ids_labels_and_references(tmp_path):
    decoder = toy_decoder.ToyDecoder()
    full = decoder.generate(
        *decoder.encode(TEXTS[:4]), policy=ExitPolicy.full_model(), max_new_tokens=6
    )
    a, b, c, d = decoder.decode(full.tokens)
    table = pd.DataFrame(
        {
            "text": TEXTS[:4],
            "prompt": ["d", "b", "c", "a"],
            "references": [a, ["w4", b], np.array([c + " w2"], dtype=object), ("w9 " * 9, d[3:])],
            "cluster": [7, 7, 8, 9],
            "group": ["short", "long", "short", "long"],
            "unrelated": 1.5,
        }
    )
    policy = ExitPolicy(
        threshold=0.7, measure="margin", schedule=Decaying(temperature=2), min_layer=2
    )
    out = record(tmp_path / "out", table, policy=policy, risk=texts.token_error_rate)
    rows = pd.read_parquet(out / "runs-00000.parquet")
    assert list(rows.columns) == [
        *(
            "prompt",
            "cluster",
            "group",
            "threshold",
            "temperature",
            "max_length",
            "form",
            "min_layer",
            "measure",
        ),
        *("policy", "dissimilarity", "risk", "layers", "tokens", "seconds", "source"),
    ]
    assert rows["prompt"].tolist() == np.repeat(table["prompt"], 5).tolist()
    assert rows["cluster"].tolist() == np.repeat(table["cluster"], 5).tolist()
    assert set(rows["measure"]) == {"margin"}
    assert set(rows["temperature"]) == {2.0}
    assert rows["layers"].min() >= 2
    runs = Runs.read(out)
    assert runs.n == 3
    assert np.ptp(runs.losses("risk")) > 0
    risks = [
        texts.token_error_rate(*pair)
        for pair in zip((a, b, c, d), table["references"], strict=True)
    ]
    assert rows["risk"][::5].tolist() == risks
    assert risks[:2] == [0, 0]
    assert 0 < risks[2] < 1


def test_dicts_and_arrow_tables_are_tables(tmp_path):
    columns = {"text": TEXTS, "prompt": list(range(100, 111))}
    first = merged(record(tmp_path / "dict", columns))
    assert merged(record(tmp_path / "arrow", pa.table(columns))) == first
    assert merged(record(tmp_path / "frame", pd.DataFrame(columns, index=range(5, 16)))) == first


# Interruption

INTERRUPTED = """
import functools, sys
import toy_decoder, riskcal_adapters
load = functools.partial(toy_decoder.load, delay=0.03)
riskcal_adapters.record({texts!r}, load, {grid!r}, sys.argv[1], traces=True, **{settings!r})
""".format(texts=TEXTS, grid=GRID, settings=SETTINGS | {"shard_prompts": 1})


def test_killed_twice_and_resumed_equals_undisturbed(tmp_path):
    load = functools.partial(toy_decoder.load, delay=0.03)
    out, settings = tmp_path / "killed", {"shard_prompts": 1, "traces": True}
    for wanted in (3, 6):
        command = [sys.executable, "-c", INTERRUPTED, str(out)]
        process = subprocess.Popen(command, env=environment())
        while len(shards(out)) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert wanted <= len(shards(out)) < len(TEXTS)
    (out / ".runs-00009.parquet.123.partial").write_bytes(b"half a file")
    kept = {name: (out / name).read_bytes() for name in shards(out)}
    record(out, load=load, **settings)
    whole = record(tmp_path / "whole", load=toy_decoder.load, **settings)
    assert {name: (out / name).read_bytes() for name in kept} == kept
    assert merged(out) == merged(whole)
    assert merged(out, "traces/*.parquet") == merged(whole, "traces/*.parquet")
    # nothing left behind
    assert sorted(p.name for p in out.rglob("*")) == sorted(p.name for p in whole.rglob("*"))


@pytest.mark.parametrize("cut", range(6))
def test_cut_before_any_write_and_resumed_equals_undisturbed(
    tmp_path, monkeypatch, undisturbed, cut
):
    with interrupted(monkeypatch, cut):
        record(tmp_path / "out", traces=True)
    out = record(tmp_path / "out", traces=True)
    assert merged(out) == merged(undisturbed)
    assert merged(out, "traces/*.parquet") == merged(undisturbed, "traces/*.parquet")


def test_finished_recordings_load_nothing_and_touch_nothing(tmp_path):
    log = tmp_path / "log"
    load = functools.partial(toy_decoder.load, log)
    out = record(tmp_path / "out", load=load)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    record(out, load=functools.partial(toy_decoder.load, log))
    assert len(log.read_text().split()) == 1
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_missing_shard_alone_is_recorded_again(tmp_path, undisturbed):
    decoder = toy_decoder.ToyDecoder()
    out = record(tmp_path / "out", load=lambda: decoder)
    (out / "runs-00001.parquet").unlink()
    before = decoder.calls
    record(out, load=lambda: decoder)
    # four prompts, full model and four thresholds, and two calls to warm up
    assert decoder.calls - before == 4 * 5 + 2
    assert merged(out) == merged(undisturbed)


# Pools


def test_threads_share_one_decoder_and_give_the_same_tables(tmp_path, undisturbed):
    log = tmp_path / "log"
    with ThreadPoolExecutor(3) as pool:
        out = record(
            tmp_path / "out", load=functools.partial(toy_decoder.load, log), pool=pool, traces=True
        )
    assert merged(out) == merged(undisturbed)
    assert merged(out, "traces/*.parquet") == merged(undisturbed, "traces/*.parquet")
    assert len(log.read_text().split()) == 1
    assert worker._slot is None  # no model stays in memory


def test_processes_load_once_each_and_give_the_same_tables(tmp_path):
    log = tmp_path / "log"
    load = functools.partial(toy_decoder.load, log, delay=0.02)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        out = record(tmp_path / "out", load=load, pool=pool, shard_prompts=1)
        pool.close()
        pool.join()
    loads = log.read_text().split()
    assert len(loads) == len(set(loads)) <= 2
    assert str(os.getpid()) not in loads
    assert merged(out) == merged(record(tmp_path / "serial", shard_prompts=1))


def test_a_relative_folder_is_the_callers_wherever_the_workers_are(tmp_path, monkeypatch):
    class Elsewhere:
        """As Ray's workers are."""

        def map(self, function, jobs):
            with contextlib.chdir(tmp_path / "elsewhere"):
                return [function(job) for job in jobs]

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert record("out", pool=Elsewhere()) == Path("out")
    assert merged(tmp_path / "out") == merged(record(tmp_path / "alone"))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert record("~/out") == tmp_path / "out"
    assert merged(tmp_path / "out") == merged(record(tmp_path / "alone"))
    assert not (tmp_path / "~").exists()


def test_pools_that_only_give_futures_are_refused(tmp_path):
    class Client:
        def map(self, function, jobs):
            return [Future() for _ in jobs]

    with pytest.raises(RiskcalError, match=r"pool: .* runs-00000\.parquet .* not futures"):
        record(tmp_path / "out", pool=Client())


# Nothing twice

SCHEDULES = {
    "constant": Constant(),
    "decaying": Decaying(temperature=3, max_length=6),
    "t5x": Decaying(temperature=3, max_length=6, form="t5x"),
}


class Closed(toy_decoder.OpenDecoder):
    """Keeps the confidences that it refused to itself."""

    def generate(self, *encoded, **settings):
        generation = super().generate(*encoded, **settings)
        return toy_decoder.ToyGeneration(
            generation.tokens, generation.exit_layers, generation.confidence
        )


@pytest.mark.parametrize(
    ("schedule", "min_layer", "batch_size"),
    [("constant", 1, 5), ("decaying", 1, 1), ("decaying", 2, 5), ("t5x", 1, 3)],
)
def test_what_is_not_run_again_is_what_running_it_again_gives(
    tmp_path, clock, schedule, min_layer, batch_size
):
    policy = ExitPolicy(schedule=SCHEDULES[schedule], min_layer=min_layer)
    grid, settings = [round(0.05 * i, 2) for i in range(22)], {"policy": policy, "shard_prompts": 8}
    opened, closed = Clocked(clock), Closed()
    record(
        tmp_path / "open", load=lambda: opened, thresholds=grid, batch_size=batch_size, **settings
    )
    record(tmp_path / "closed", load=lambda: closed, thresholds=grid, **settings)
    assert merged(tmp_path / "open") == merged(tmp_path / "closed")
    assert len(closed.generated) == len(TEXTS) * (1 + len(grid)) + 2  # two to warm up
    # what did run made a difference: no run of a prompt is the computation of the one before
    ran = set(opened.clocked)
    for text in TEXTS:
        needed = [
            policy.model_copy(update={"threshold": value}).exit_thresholds(toy_decoder.LAYERS, 6)
            for value in sorted(grid, reverse=True)
            if (text, value) in ran
        ]
        assert needed
        exits = [
            toy_decoder.generate_alone(text, table, toy_decoder.rough_step)[1] for table in needed
        ]
        assert all(here != there for here, there in itertools.pairwise(exits))
    assert len(ran) < 0.8 * len(TEXTS) * len(grid)


def test_a_decoder_that_hides_what_it_refused_is_caught_by_the_comparison(tmp_path):
    class Lying(toy_decoder.OpenDecoder):
        def generate(self, *encoded, **settings):
            generation = super().generate(*encoded, **settings)
            generation.refused = np.where(generation.refused < 0.6, -np.inf, generation.refused)
            return generation

    lying, honest = (
        record(tmp_path / "lying", load=Lying),
        record(tmp_path / "honest", load=toy_decoder.OpenDecoder),
    )
    assert merged(lying) != merged(honest)


@given(
    confidence=hnp.arrays(
        np.float32,
        (5, toy_decoder.LAYERS),
        elements=st.one_of(
            st.sampled_from([np.nan, -1, 0, 0.1, 0.3, 0.7, 0.99, 1]), st.floats(-0.5, 1.5, width=32)
        ),
    ),
    ran_at=st.integers(0, 300).map(lambda i: i / 200),
    asked=st.integers(-20, 300).map(lambda i: i / 200),
    schedule=st.sampled_from(list(SCHEDULES.values())),
    min_layer=st.integers(1, toy_decoder.LAYERS),
)
def test_a_lower_threshold_is_skipped_if_and_only_if_no_exit_would_change(
    confidence, ran_at, asked, schedule, min_layer
):
    def policy_at(threshold):
        return ExitPolicy(threshold=threshold, schedule=schedule, min_layer=min_layer)

    def exits(policy):
        accepted = confidence >= policy.exit_thresholds(toy_decoder.LAYERS, len(confidence))
        return np.column_stack([accepted[:, :-1], np.ones(len(confidence), bool)]).argmax(1)

    policy = policy_at(ran_at)
    needed, taken = policy.exit_thresholds(toy_decoder.LAYERS, len(confidence)), exits(policy)
    before = np.arange(toy_decoder.LAYERS) < taken[:, None]
    refused = (
        np.where(before & np.isfinite(needed) & ~np.isnan(confidence), confidence, -np.inf)
        .max(1)
        .astype(np.float32)
    )
    generation = toy_decoder.OpenGeneration(None, None, None, refused[None])
    (same_above,) = recording_runs._same_above(generation, policy, (1, len(confidence)))
    assert same_above < ran_at
    if asked <= ran_at:
        assert np.array_equal(exits(policy_at(asked)), taken) == (same_above < asked)


def test_where_rows_depend_on_their_batch_all_run_in_the_order_given(tmp_path):
    decoder = toy_decoder.OpenDecoder()
    policy = ExitPolicy(batching="deepest")
    record(tmp_path / "out", load=lambda: decoder, policy=policy, batch_size=3)
    rows = pd.concat(
        [pd.read_parquet(tmp_path / "out" / name) for name in shards(tmp_path / "out")]
    )
    for threshold in GRID:
        needed = policy.model_copy(update={"threshold": threshold}).exit_thresholds(
            toy_decoder.LAYERS, 6
        )
        expected = []
        for batch in (TEXTS[0:3], TEXTS[3:4], TEXTS[4:7], TEXTS[7:8], TEXTS[8:11]):
            together = toy_decoder.generate_deepest(batch, needed, toy_decoder.rough_step)
            expected += [sum(exits) / len(exits) for _, exits, *_ in together]
        assert rows.loc[rows["threshold"] == threshold, "layers"].tolist() == expected
    alone = record(tmp_path / "alone", load=toy_decoder.OpenDecoder, policy=policy)
    assert merged(alone) != merged(tmp_path / "out")


# What candidates and their reference are


def test_the_reference_is_the_plain_full_model_with_the_template_s_noise(tmp_path):
    asked = []

    class Listening(toy_decoder.OpenDecoder):
        def generate(self, *encoded, policy, max_new_tokens):
            asked.append(policy)
            return super().generate(*encoded, policy=policy, max_new_tokens=max_new_tokens)

    template = ExitPolicy(
        measure="entropy",
        min_layer=2,
        cache="deferred",
        max_pending=3,
        batching="deepest",
        sampling=Sampling(seed=5),
    )
    record(tmp_path / "out", load=Listening, policy=template)
    bound = {"max_new_tokens": 6, "n_layers": toy_decoder.LAYERS, "weights": "toy"}
    assert {policy.threshold for policy in asked} == {math.inf, *GRID}
    for policy in asked:
        full = ExitPolicy(sampling=Sampling(seed=5), **bound).named()
        assert policy == (
            full
            if policy.is_full_model
            else template.model_copy(update=bound | {"threshold": policy.threshold})
        )


def test_common_noise_leaves_the_full_model_at_distance_zero_from_a_threshold_that_nothing_reaches(
    tmp_path,
):
    tables = []
    for seed in (1, 2):
        out = record(
            tmp_path / str(seed),
            load=toy_decoder.OpenDecoder,
            policy=ExitPolicy(sampling=Sampling(seed=seed)),
            thresholds=[2.0, 0.5],
        )
        runs = Runs.read(out)
        assert (runs.losses()[:, 0] == 0).all()
        assert runs.losses()[:, 1].any()
        tables.append(merged(out))
    assert tables[0] != tables[1]


def test_calibrated_policies_are_bound_to_length_depth_and_weights(tmp_path):
    template = ExitPolicy(cache="deferred", sampling=Sampling(temperature=0.5))
    out = record(tmp_path / "out", load=toy_decoder.OpenDecoder, policy=template)
    policy = riskcal.calibrate(Runs.read(out), delta=0.99).policy()
    assert (policy.max_new_tokens, policy.n_layers, policy.weights) == (
        6,
        toy_decoder.LAYERS,
        "toy",
    )
    assert (policy.cache, policy.sampling) == ("deferred", Sampling(temperature=0.5))
    plain = riskcal.calibrate(Runs.read(record(tmp_path / "plain")), delta=0.99).policy()
    assert (plain.n_layers, plain.weights) == (toy_decoder.LAYERS, None)


def test_a_classifier_is_named_where_the_measure_reads_it_and_nowhere_else(tmp_path):
    policy = ExitPolicy(measure="classifier")
    out = record(tmp_path / "out", load=lambda: toy_decoder.OpenDecoder(), policy=policy)
    calibration = riskcal.calibrate(Runs.read(out), delta=0.99)
    assert calibration.policy().classifier_weights == "linear toy"
    other = record(tmp_path / "other", load=lambda: toy_decoder.OpenDecoder())
    assert riskcal.calibrate(Runs.read(other), delta=0.99).policy().classifier_weights is None

    class Retrained(toy_decoder.OpenDecoder):
        classifier_weights = "linear, trained longer"

    (out / "runs-00001.parquet").unlink()
    with pytest.raises(RiskcalError, match='classifier_weights: "linear toy" in the recording'):
        record(out, load=lambda: Retrained(), policy=policy)
    (other / "runs-00001.parquet").unlink()
    record(other, load=lambda: Retrained())


def test_other_weights_do_not_go_on_with_a_recording(tmp_path):
    class Other(toy_decoder.OpenDecoder):
        weights = "other"

    out = record(tmp_path / "out", load=lambda: toy_decoder.OpenDecoder())
    (out / "runs-00001.parquet").unlink()
    with pytest.raises(RiskcalError, match=r'weights: "toy" in the recording that .*, "other" now'):
        record(out, load=lambda: Other())
    assert len(shards(out)) == 2
    record(out, load=lambda: toy_decoder.OpenDecoder())
    with pytest.raises(
        RiskcalError, match="weights: 'toy' in the policy, but the decoder has 'other'"
    ):
        record(tmp_path / "new", load=Other, policy=ExitPolicy(weights="toy"))
    with pytest.raises(RiskcalError, match="n_layers: 3 in the policy, but the decoder has 4"):
        record(tmp_path / "deep", load=Other, policy=ExitPolicy(n_layers=3))


# Early exits that know nothing


class Untrained(toy_decoder.ToyDecoder):
    """Exits whose tokens have nothing to do with the last layer's."""

    def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
        generation = super().generate(
            input_ids, attention_mask, policy=policy, max_new_tokens=max_new_tokens
        )
        early = (generation.exit_layers > 0) & (generation.exit_layers < toy_decoder.LAYERS)
        return dataclasses.replace(
            generation, tokens=np.where(early, 90 + generation.tokens, generation.tokens)
        )


def test_exits_at_chance_level_are_warned_of(tmp_path):
    with pytest.warns(
        UserWarning,
        match=r"chance level: their mean dissimilarity is 1.00, .*train its early exits",
    ) as caught:
        record(tmp_path / "out", MANY, load=Untrained, shard_prompts=7)
    assert caught[0].filename == record.__code__.co_filename
    with ThreadPoolExecutor(2) as pool, pytest.warns(UserWarning, match="chance level"):
        record(tmp_path / "pool", MANY, load=Untrained, shard_prompts=7, pool=pool)


def test_a_model_that_never_exits_is_warned_of(tmp_path):
    with pytest.warns(
        UserWarning, match="no token of 24 prompts left before the last layer at any threshold"
    ):
        record(tmp_path / "out", MANY, thresholds=[1.5, 2])


def test_exits_that_know_something_and_few_prompts_are_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(tmp_path / "trained", MANY)
        record(tmp_path / "few", MANY[:19], load=Untrained)
        record(tmp_path / "never", MANY[:19], thresholds=[1.5])


# Stopping where fixed-sequence testing fails


def outcome(runs, **settings):
    calibration = riskcal.calibrate(runs, procedure="fixed_sequence", **settings)
    return calibration.threshold, calibration.table.loc[
        calibration.table["certified"], "threshold"
    ].tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return record(tmp_path_factory.mktemp("whole") / "out", MANY, thresholds=FINE, traces=True)


def test_a_stopped_recording_is_the_whole_one_cut_off_below_the_first_failure(whole, stopped):
    full, cut = Runs.read(whole), Runs.read(stopped)
    threshold, certified = outcome(full, delta=STOP.delta, epsilon=STOP.epsilon)
    assert 0 < len(certified) < len(FINE) - 1
    assert cut.thresholds.tolist() == full.thresholds[: len(certified) + 1].tolist()
    frame = full.to_frame().drop(columns="seconds")
    frame = frame[frame["threshold"] >= cut.thresholds.min()].reset_index(drop=True)
    assert cut.stopped == STOP
    pd.testing.assert_frame_equal(cut.to_frame().drop(columns=["seconds", "stopped"]), frame)
    assert merged(stopped, "traces/*.parquet") == merged(whole, "traces/*.parquet")
    assert not (stopped / "unfinished").exists()
    assert outcome(cut, delta=STOP.delta, epsilon=STOP.epsilon) == (threshold, certified)


@pytest.mark.parametrize("test", ["betting", "hoeffding_bentkus"])
@pytest.mark.parametrize("delta", [0.05, 0.3, 0.45, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("epsilon", [0.01, 0.2, 0.5])
def test_on_a_stopped_recording_no_test_certifies_what_it_would_not_on_the_whole_grid(
    whole, stopped, test, delta, epsilon
):
    _, ours = outcome(Runs.read(stopped), delta=delta, epsilon=epsilon, test=test)
    _, theirs = outcome(Runs.read(whole), delta=delta, epsilon=epsilon, test=test)
    assert ours == [value for value in theirs if value >= Runs.read(stopped).thresholds.min()]


@pytest.mark.parametrize(
    "settings",
    [
        {"procedure": "holm"},
        {"starts": 2},
        {"order": range(3)},
        {"delta": [0.3, 0.5]},
        {"procedure": "pilot_order"},
    ],
)
def test_procedures_that_need_the_whole_grid_are_refused_on_a_stopped_one(stopped, settings):
    with pytest.raises(
        RiskcalError, match=r"procedure: the recording stopped .* only a fixed sequence"
    ):
        riskcal.calibrate(Runs.read(stopped), **({"delta": 0.5} | settings))


def test_a_stop_is_in_the_message_the_certificate_and_every_file_format(tmp_path, stopped):
    runs = Runs.read(stopped)
    calibration = riskcal.calibrate(runs, delta=STOP.delta, epsilon=STOP.epsilon)
    assert calibration.policy().certificate.stopped == STOP
    lowest = runs.thresholds.min()
    assert f"Thresholds below {lowest:g} were never run" in calibration.message
    assert "a lower one might do" not in calibration.message
    assert "a lower one might do" in riskcal.calibrate(runs, delta=0.99).message
    calibration.policy().save(tmp_path / "policy.json")
    assert ExitPolicy.load(tmp_path / "policy.json") == calibration.policy()
    for ending in ("parquet", "csv", "jsonl"):
        runs.write(tmp_path / f"runs.{ending}")
        again = Runs.read(tmp_path / f"runs.{ending}")
        assert (again.stopped, again.digest()) == (runs.stopped, runs.digest())
    assert (
        riskcal.calibrate(
            Runs.from_frame(runs.to_frame().drop(columns="stopped")), delta=0.5
        ).stopped
        is None
    )


def test_a_recording_that_nothing_stops_has_the_whole_grid_and_says_nothing(tmp_path, whole):
    out = record(tmp_path / "out", MANY, thresholds=FINE, stop=Stop(delta=0.99), traces=True)
    assert merged(out) == merged(whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )


@pytest.mark.parametrize("cut", [0, 1, 5, 13, 23, 24, 27])
def test_stopped_recordings_cut_before_any_write_and_resumed_equal_undisturbed(
    tmp_path, monkeypatch, stopped, cut
):
    def again():
        return record(
            tmp_path / "out", MANY, thresholds=FINE, traces=True, stop=STOP, shard_prompts=7
        )

    with interrupted(monkeypatch, cut):
        again()
    assert merged(again()) == merged(stopped)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == sorted(
        p.name for p in stopped.rglob("*")
    )


def test_stopped_recordings_go_on_in_pools_and_are_not_touched_when_finished(tmp_path, stopped):
    with ThreadPoolExecutor(3) as pool:
        out = record(
            tmp_path / "out",
            MANY,
            thresholds=FINE,
            traces=True,
            stop=STOP,
            shard_prompts=7,
            pool=pool,
        )
    assert merged(out) == merged(stopped)
    settings = {"thresholds": FINE, "traces": True, "shard_prompts": 7}
    record(out, MANY, load=toy_decoder.load, stop=STOP, **settings)
    (out / "runs-00002.parquet").unlink()
    assert merged(record(out, MANY, stop=STOP, **settings)) == merged(stopped)
    with pytest.raises(
        RiskcalError, match=r'stop: .*"delta": 0.45.* in the recording .*, null now'
    ):
        record(out, MANY, **settings)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (Stop(delta=0.1, test="sign"), "test: "),
        (Stop(delta=0.1, objective="risk"), "stop: objective 'risk' is about a risk; give risk="),
    ],
)
def test_bad_stops(tmp_path, stop, message):
    with pytest.raises(RiskcalError, match=message):
        record(tmp_path / "out", stop=stop)
    with pytest.raises(RiskcalError, match="stop: a test needs at least two prompts"):
        record(tmp_path / "out", ["one"], stop=STOP)
    assert not (tmp_path / "out").exists()


# Refusals


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "text: the table is empty"),
        (["a", " "], "text: row 1 is empty"),
        (["a", None], "text: row 1 is None, not a string"),
        ("one string", "prompts: a single string"),
        (5, "prompts: a int"),
        ({"prompt": [1]}, "text: the column is missing; the table has: prompt"),
        (
            {"text": ["a", "b", "c"], "prompt": [1, 2, 1]},
            "prompt: id 1 stands twice, again at row 2",
        ),
        (
            {"text": ["a", "b"], "prompt": [1.5, 2]},
            "prompt: 1.5 at row 0, in a column of type float64",
        ),
        ({"text": ["a", "b"], "group": ["x", None]}, "group: missing at row 1"),
        ({"text": ["a", "b"], "cluster": [1]}, "columns of one length"),
    ],
)
def test_bad_prompts(tmp_path, prompts, message):
    with pytest.raises(RiskcalError, match=message):
        record(tmp_path / "out", prompts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (None, "references: the column is missing"),
        (["x", None], "references: row 1 has none"),
        ([["x"], []], "references: row 1 has none"),
        (["x", math.nan], "references: row 1 has none"),
        ([["x"], ["y", 3]], "references: row 1 holds 3"),
        (["", "x"], "references: row 0 holds ''"),
    ],
)
def test_risk_without_references(tmp_path, references, message):
    table = {"text": ["a", "b"]} | ({} if references is None else {"references": references})
    with pytest.raises(RiskcalError, match=message):
        record(tmp_path / "out", table, risk=texts.token_error_rate)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([], "thresholds: .* at least one"),
        (0.5, "thresholds: .* 1-D"),
        ([0.5, math.nan], "thresholds: nan at index 1"),
        ([0.5, -math.inf], "thresholds: -inf at index 1"),
        ([0.5, 0.7, 0.5], "thresholds: 0.5 is given more than once"),
        (
            [0.5, math.inf],
            "thresholds: inf at index 1; the full model is recorded for every prompt anyway",
        ),
    ],
)
def test_bad_thresholds(tmp_path, thresholds, message):
    with pytest.raises(RiskcalError, match=message) as caught:
        record(tmp_path / "out", thresholds=thresholds)
    assert "full model is recorded" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"shard_prompts": True}, "shard_prompts"),
        ({"policy": ExitPolicy(thresholds={1: 0.5})}, "policy: has thresholds per layer"),
        ({"policy": ExitPolicy(max_new_tokens=9)}, "max_new_tokens: 6, but 9 in the policy"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(RiskcalError, match=message):
        record(tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RiskcalError, match="cannot be used as a folder"):
        record(tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note.txt").write_text("mine")
    with pytest.raises(RiskcalError, match="is not empty and holds no recording"):
        record(tmp_path / "notes")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["note.txt"]
    (tmp_path / "empty").mkdir()
    assert len(shards(record(tmp_path / "empty"))) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompts": [*TEXTS[:-1], "another"]},
            "prompts: other texts, ids, references, clusters or groups in the recording",
        ),
        ({"prompts": TEXTS[:-1]}, "n_prompts: 11 in the recording .*, 10 now"),
        (
            {"thresholds": [0.5]},
            r"thresholds: \[0.9, 0.5, 0.2, 0.0\] in the recording .*, \[0.5\] now",
        ),
        ({"max_new_tokens": 5}, "max_new_tokens: 6 in the recording .*, 5 now"),
        ({"batch_size": 2}, "batch_size: 1 in the recording .*, 2 now"),
        ({"shard_prompts": 5}, "shard_prompts: 4 in the recording .*, 5 now"),
        (
            {"policy": ExitPolicy(min_layer=2)},
            'policy: .* "min_layer": 1.* in the recording .* "min_layer": 2',
        ),
        (
            {"policy": ExitPolicy(schedule=Decaying())},
            "policy: .*constant.* in the recording .*decaying",
        ),
        (
            {"dissimilarity": texts.token_error_rate},
            "dissimilarity: .*token_distance.* in the recording .*token_error_rate",
        ),
        (
            {"load": toy_decoder.ToyDecoder},
            "decoder: .*toy_decoder.load.* in the recording .*ToyDecoder",
        ),
        ({"traces": True}, "traces: false in the recording .*, true now"),
    ],
)
def test_a_recording_with_other_settings_is_refused(tmp_path, undisturbed, change, message):
    out = tmp_path / "out"
    record(out)
    before = (out / recording_folder.SETTINGS_FILE).read_bytes()
    with pytest.raises(RiskcalError, match=message):
        record(out, **change)
    assert (out / recording_folder.SETTINGS_FILE).read_bytes() == before
    assert not (out / "traces").exists()


def test_a_damaged_settings_file_is_refused(tmp_path):
    out = record(tmp_path / "out")
    for damage in ("{", "[]"):
        (out / recording_folder.SETTINGS_FILE).write_text(damage)
        with pytest.raises(RiskcalError, match=r"recording\.json"):
            record(out)


def test_the_template_s_own_threshold_does_not_matter(tmp_path, undisturbed):
    assert merged(record(tmp_path / "out", policy=ExitPolicy(threshold=0.3))) == merged(undisturbed)


def test_a_first_try_that_recorded_nothing_does_not_block_the_next(tmp_path):
    with pytest.raises(RiskcalError, match="min_layer"):
        record(tmp_path / "out", policy=ExitPolicy(min_layer=9))
    assert len(shards(record(tmp_path / "out"))) == 3
    assert (
        json.loads((tmp_path / "out" / recording_folder.SETTINGS_FILE).read_text())["policy"][
            "min_layer"
        ]
        == 1
    )


def test_repeated_texts_warn_unless_they_share_a_cluster(tmp_path):
    table = {"text": ["same", "other", "same"], "prompt": ["a", "b", "c"]}
    with pytest.warns(
        UserWarning, match="prompt 'c' repeats the text of prompt 'a'.*not independent"
    ) as caught:
        record(tmp_path / "warned", table)
    assert caught[0].filename == record.__code__.co_filename
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(tmp_path / "clustered", table | {"cluster": [1, 2, 1]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dissimilarity": lambda early, full: 1.5},
            r"dissimilarity: 1.5 for prompt 0 at threshold 0.9 is outside \[0, 1\]",
        ),
        (
            {"dissimilarity": lambda early, full: math.nan},
            "dissimilarity: prompt 0, threshold 0.9: is NaN",
        ),
        ({"load": toy_decoder.load_nothing}, r"load: returned a object without \.n_layers"),
        ({"load": toy_decoder.ToyDecoder()}, "load: a ToyDecoder cannot be called"),
        ({"pool": 3}, "pool: a int has no .map"),
    ],
)
def test_bad_callables(tmp_path, settings, message):
    with pytest.raises(RiskcalError, match=message):
        record(tmp_path / "out", **settings)
    assert shards(tmp_path / "out") == []
    assert worker._slot is None


def test_decoders_that_break_the_protocol_are_refused(tmp_path):
    class Impatient(toy_decoder.ToyDecoder):
        def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
            always = ExitPolicy(threshold=0.0)
            return super().generate(
                input_ids, attention_mask, policy=always, max_new_tokens=max_new_tokens
            )

    class Mute(toy_decoder.ToyDecoder):
        def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
            empty = np.zeros((len(input_ids), 0), dtype=int)
            return toy_decoder.ToyGeneration(empty, empty, empty)

    class Short(toy_decoder.ToyDecoder):
        def decode(self, tokens):
            return []

    for decoder, message in (
        (Impatient, "left at layer 1 of 4"),
        (Mute, "no token for prompt 0"),
        (Short, "0 texts for 1"),
    ):
        with pytest.raises(RiskcalError, match=message):
            record(tmp_path / decoder.__name__, load=decoder)


def test_no_framework_is_imported():
    frameworks = "{'torch', 'jax', 'ray', 'transformers'} & set(sys.modules)"
    script = f"import sys, riskcal_adapters, riskcal_adapters.cli; print({frameworks})"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"
