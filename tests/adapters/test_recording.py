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

sys.path.insert(0, str(Path(__file__).parent))  # workers import the toy by name, whatever pytest's import mode

import toy_decoder

import riskcal_adapters
from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy
from riskcal.records import Runs, Traces
from riskcal.schedules import Decaying
from riskcal_adapters import recording, texts

TEXTS = [f"prompt {chr(97 + i)}{'x' * (i % 3)}" for i in range(11)]
GRID = [0.2, 0.9, 0.5, 0.0]
SETTINGS = {"max_new_tokens": 6, "shard_prompts": 4, "progress": False}


def record(out, prompts=TEXTS, load=toy_decoder.load, thresholds=GRID, **settings):
    return riskcal_adapters.record(prompts, load, thresholds, out, **(SETTINGS | settings))


def shards(out, pattern="runs-*.parquet"):
    return sorted(path.name for path in out.glob(pattern))


def merged(out, pattern="runs-*.parquet"):
    """The recording as one table, in bytes, but for its seconds."""
    whole = pa.concat_tables([pa.parquet.read_table(path, partitioning=None) for path in sorted(out.glob(pattern))])
    whole = whole.drop_columns([name for name in ("seconds",) if name in whole.column_names]).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recording") / "out", traces=True)


# What is written


def test_every_row_is_what_a_plain_loop_over_prompts_and_thresholds_gives(undisturbed):
    rows = pd.concat([pd.read_parquet(undisturbed / name) for name in shards(undisturbed)], ignore_index=True)
    expected = []
    for prompt, text in enumerate(TEXTS):
        full = None
        for threshold in [math.inf, 0.9, 0.5, 0.2, 0.0]:
            policy = ExitPolicy.full_model() if math.isinf(threshold) else ExitPolicy(threshold=threshold)
            needed = policy.exit_thresholds(toy_decoder.LAYERS, 6)
            tokens, exits, _ = toy_decoder.generate_alone(text, needed)
            output = " ".join(f"w{token}" for token in tokens if token > toy_decoder.END)
            full = output if full is None else full
            distance = texts.token_distance(output, full)
            expected.append((prompt, threshold, distance, sum(exits) / len(exits), len(tokens)))
    columns = ["prompt", "threshold", "dissimilarity", "layers", "tokens"]
    pd.testing.assert_frame_equal(rows[columns], pd.DataFrame(expected, columns=columns), check_exact=True)
    assert rows["dissimilarity"].nunique() > 5  # the toy is not trivial
    assert list(rows.columns) == [
        *("prompt", "threshold", "min_layer", "measure", "dissimilarity", "layers", "tokens", "seconds", "source")
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


@pytest.mark.parametrize(("shard_prompts", "sizes"), [(1, [1] * 11), (4, [4, 4, 3]), (11, [11]), (50, [11])])
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
    monkeypatch.setattr(recording, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    out = record(tmp_path / "out", batch_size=3)
    seconds = pd.concat([pd.read_parquet(out / name) for name in shards(out)])["seconds"]
    assert seconds.tolist() == np.repeat([1 / 3, 1, 1 / 3, 1, 1 / 3], np.multiply([3, 1, 3, 1, 3], 5)).tolist()


def test_tables_bring_ids_labels_and_references(tmp_path):
    decoder = toy_decoder.ToyDecoder()
    full = decoder.generate(*decoder.encode(TEXTS[:4]), policy=ExitPolicy.full_model(), max_new_tokens=6)
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
    policy = ExitPolicy(threshold=0.7, measure="margin", schedule=Decaying(temperature=2), min_layer=2)
    out = record(tmp_path / "out", table, policy=policy, risk=texts.token_error_rate)
    rows = pd.read_parquet(out / "runs-00000.parquet")
    assert list(rows.columns) == [
        *("prompt", "cluster", "group", "threshold", "temperature", "max_length", "form", "min_layer", "measure"),
        *("dissimilarity", "risk", "layers", "tokens", "seconds", "source"),
    ]
    assert rows["prompt"].tolist() == np.repeat(table["prompt"], 5).tolist()
    assert rows["cluster"].tolist() == np.repeat(table["cluster"], 5).tolist()
    assert set(rows["measure"]) == {"margin"}
    assert set(rows["temperature"]) == {2.0}
    assert rows["layers"].min() >= 2
    runs = Runs.read(out)
    assert runs.n == 3
    assert np.ptp(runs.losses("risk")) > 0
    risks = [texts.token_error_rate(*pair) for pair in zip((a, b, c, d), table["references"], strict=True)]
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
sys.path.insert(0, sys.argv[1])
import toy_decoder, riskcal_adapters
load = functools.partial(toy_decoder.load, delay=0.03)
riskcal_adapters.record({texts!r}, load, {grid!r}, sys.argv[2], traces=True, **{settings!r})
""".format(texts=TEXTS, grid=GRID, settings=SETTINGS | {"shard_prompts": 1})


def test_killed_twice_and_resumed_equals_undisturbed(tmp_path):
    load = functools.partial(toy_decoder.load, delay=0.03)
    out, settings = tmp_path / "killed", {"shard_prompts": 1, "traces": True}
    for wanted in (3, 6):
        command = [sys.executable, "-c", INTERRUPTED, str(Path(toy_decoder.__file__).parent), str(out)]
        process = subprocess.Popen(command)
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
    assert sorted(p.name for p in out.rglob("*")) == sorted(p.name for p in whole.rglob("*"))  # nothing left behind


@pytest.mark.parametrize("cut", range(6))
def test_cut_before_any_write_and_resumed_equals_undisturbed(tmp_path, monkeypatch, undisturbed, cut):
    write, written = recording._tables.write, []

    def interrupted(frame, path):
        if len(written) == cut:
            raise KeyboardInterrupt
        written.append(path)
        write(frame, path)

    with monkeypatch.context() as patch:
        patch.setattr(recording._tables, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
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
    assert decoder.calls - before == 4 * 5 + 2  # four prompts, full model and four thresholds, and two calls to warm up
    assert merged(out) == merged(undisturbed)


# Pools


def test_threads_share_one_decoder_and_give_the_same_tables(tmp_path, undisturbed):
    log = tmp_path / "log"
    with ThreadPoolExecutor(3) as pool:
        out = record(tmp_path / "out", load=functools.partial(toy_decoder.load, log), pool=pool, traces=True)
    assert merged(out) == merged(undisturbed)
    assert merged(out, "traces/*.parquet") == merged(undisturbed, "traces/*.parquet")
    assert len(log.read_text().split()) == 1
    assert recording._slot is None  # no model stays in memory


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


def test_pools_that_only_give_futures_are_refused(tmp_path):
    class Client:
        def map(self, function, jobs):
            return [Future() for _ in jobs]

    with pytest.raises(RiskcalError, match=r"pool: .* runs-00000\.parquet .* not futures"):
        record(tmp_path / "out", pool=Client())


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
        ({"text": ["a", "b", "c"], "prompt": [1, 2, 1]}, "prompt: id 1 stands twice, again at row 2"),
        ({"text": ["a", "b"], "prompt": [1.5, 2]}, "prompt: 1.5 at row 0, in a column of type float64"),
        ({"text": ["a", "b"], "group": ["x", None]}, "group: missing at row 1"),
        ({"text": ["a", "b"], "cluster": [1]}, "unequal length"),
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
        ([0.5, math.inf], "thresholds: inf at index 1; the full model is recorded for every prompt anyway"),
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
        ({"thresholds": [0.5]}, r"thresholds: \[0.9, 0.5, 0.2, 0.0\] in the recording .*, \[0.5\] now"),
        ({"max_new_tokens": 5}, "max_new_tokens: 6 in the recording .*, 5 now"),
        ({"batch_size": 2}, "batch_size: 1 in the recording .*, 2 now"),
        ({"shard_prompts": 5}, "shard_prompts: 4 in the recording .*, 5 now"),
        ({"policy": ExitPolicy(min_layer=2)}, 'policy: .* "min_layer": 1.* in the recording .* "min_layer": 2'),
        ({"policy": ExitPolicy(schedule=Decaying())}, "policy: .*constant.* in the recording .*decaying"),
        (
            {"dissimilarity": texts.token_error_rate},
            "dissimilarity: .*token_distance.* in the recording .*token_error_rate",
        ),
        ({"load": toy_decoder.ToyDecoder}, "decoder: .*toy_decoder.load.* in the recording .*ToyDecoder"),
        ({"traces": True}, "traces: false in the recording .*, true now"),
    ],
)
def test_a_recording_with_other_settings_is_refused(tmp_path, undisturbed, change, message):
    out = tmp_path / "out"
    record(out)
    before = (out / recording.SETTINGS_FILE).read_bytes()
    with pytest.raises(RiskcalError, match=message):
        record(out, **change)
    assert (out / recording.SETTINGS_FILE).read_bytes() == before
    assert not (out / "traces").exists()


def test_a_damaged_settings_file_is_refused(tmp_path):
    out = record(tmp_path / "out")
    for damage in ("{", "[]"):
        (out / recording.SETTINGS_FILE).write_text(damage)
        with pytest.raises(RiskcalError, match=r"recording\.json"):
            record(out)


def test_the_template_s_own_threshold_does_not_matter(tmp_path, undisturbed):
    assert merged(record(tmp_path / "out", policy=ExitPolicy(threshold=0.3))) == merged(undisturbed)


def test_a_first_try_that_recorded_nothing_does_not_block_the_next(tmp_path):
    with pytest.raises(RiskcalError, match="min_layer"):
        record(tmp_path / "out", policy=ExitPolicy(min_layer=9))
    assert len(shards(record(tmp_path / "out"))) == 3
    assert json.loads((tmp_path / "out" / recording.SETTINGS_FILE).read_text())["policy"]["min_layer"] == 1


def test_repeated_texts_warn_unless_they_share_a_cluster(tmp_path):
    table = {"text": ["same", "other", "same"], "prompt": ["a", "b", "c"]}
    with pytest.warns(UserWarning, match="prompt 'c' repeats the text of prompt 'a'.*not independent") as caught:
        record(tmp_path / "warned", table)
    assert caught[0].filename == __file__
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
        ({"dissimilarity": lambda early, full: math.nan}, "dissimilarity: prompt 0, threshold 0.9: is NaN"),
        ({"load": toy_decoder.load_nothing}, r"load: returned a object without \.n_layers"),
    ],
)
def test_bad_callables(tmp_path, settings, message):
    with pytest.raises(RiskcalError, match=message):
        record(tmp_path / "out", **settings)
    assert shards(tmp_path / "out") == []
    assert recording._slot is None


def test_decoders_that_break_the_protocol_are_refused(tmp_path):
    class Impatient(toy_decoder.ToyDecoder):
        def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
            always = ExitPolicy(threshold=0.0)
            return super().generate(input_ids, attention_mask, policy=always, max_new_tokens=max_new_tokens)

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
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
