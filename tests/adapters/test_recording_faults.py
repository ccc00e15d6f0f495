"""What goes wrong while recording: damaged files, lost workers, two at once, disks that refuse, outputs that failed."""

import errno
import functools
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import toy_decoder
import typer
from processes import environment
from recordings import FINE, MANY, STOP, STOPPED, TEXTS, interrupted, merged, record, shards
from typer.testing import CliRunner

import riskcal
from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy
from riskcal.records import Runs
from riskcal_adapters import cli, texts
from riskcal_adapters.recording import pools, worker


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return record(tmp_path_factory.mktemp("short") / "out", traces=True, stop=STOP)


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Damaged files


@pytest.mark.parametrize("name", ["runs-00001.parquet", "traces/traces-00002.parquet"])
def test_flipped_bits_are_refused_by_name_or_change_nothing_and_the_remedy_works(
    tmp_path, undisturbed, name
):
    out = copy_of(undisturbed, tmp_path)
    whole, pattern = (out / name).read_bytes(), name.replace("-00001", "-*").replace("-00002", "-*")
    refused = 0
    for place in np.random.default_rng(1).choice(8 * len(whole), 150, replace=False):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        (out / name).write_bytes(bytes(broken))
        try:
            record(out, traces=True)
        except RiskcalError as error:
            assert str(error).startswith(f"{out / name}: "), error  # noqa: PT017
            assert "delete it and make the same call" in str(error)  # noqa: PT017
            refused += 1
            if refused % 25 == 1:
                (out / name).unlink()
                record(out, traces=True)
        else:
            assert merged(out, pattern) == merged(undisturbed, pattern)
    assert refused > 140
    (out / name).unlink()
    record(out, traces=True)
    for table in ("runs-*.parquet", "traces/*.parquet"):
        assert merged(out, table) == merged(undisturbed, table)


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_files_cut_short_are_refused_by_name(tmp_path, undisturbed, cut):
    out = copy_of(undisturbed, tmp_path)
    path = out / "runs-00000.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        RiskcalError, match=r"runs-00000\.parquet: .*delete it and make the same call"
    ):
        record(out, traces=True)
    path.unlink()
    assert merged(record(out, traces=True)) == merged(undisturbed)


def test_a_shard_of_other_prompts_or_thresholds_is_refused(tmp_path, undisturbed):
    out = copy_of(undisturbed, tmp_path)
    path = out / "runs-00001.parquet"
    rows = pd.read_parquet(path)
    for other in (
        pd.read_parquet(out / "runs-00000.parquet"),
        rows[:-1],
        rows[rows["threshold"] != 0.5],
    ):
        riskcal.records.files.write(other, path)
        with pytest.raises(
            RiskcalError, match=r"runs-00001\.parquet: holds other rows than were recorded there"
        ):
            record(out, traces=True)
    path.unlink()
    assert merged(record(out, traces=True)) == merged(undisturbed)


def test_damaged_columns_of_a_recording_that_will_stop_are_refused_by_name(
    tmp_path, monkeypatch, stopped
):
    with interrupted(monkeypatch, 12) as written:
        record(tmp_path / "out", MANY, **STOPPED)
    for path in (written[-1], next(path for path in written if "unfinished" in str(path))):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(bytes(content))
        with pytest.raises(RiskcalError, match=rf"{path.name}: .*delete it and make the same call"):
            record(tmp_path / "out", MANY, **STOPPED)
        path.unlink()
    assert merged(record(tmp_path / "out", MANY, **STOPPED)) == merged(stopped)


# Lost workers


def a_pool(kind):
    spawn = multiprocessing.get_context("spawn")
    return spawn.Pool(2) if kind == "pool" else ProcessPoolExecutor(2, spawn)


@pytest.mark.parametrize(
    ("kind", "stop"),
    [("pool", None), ("pool", STOP), ("executor", None)],
    ids=["pool", "pool with stop", "executor"],
)
def test_a_killed_worker_is_said_and_the_same_call_ends_in_the_same_tables(tmp_path, kind, stop):
    flag = tmp_path / "flag"
    flag.touch()
    settings = {
        "load": functools.partial(toy_decoder.load_killed, str(flag)),
        "shard_prompts": 2,
        "stop": stop,
    }
    wanted = "was killed .exit code -9." if kind == "pool" else "a worker died or failed"
    with (
        a_pool(kind) as pool,
        pytest.raises(RiskcalError, match=f"pool: .*{wanted}.*make the same call again"),
    ):
        record(tmp_path / "out", pool=pool, **settings)
    assert not flag.exists()
    with a_pool(kind) as pool:
        record(tmp_path / "out", pool=pool, **settings)
    whole = record(tmp_path / "whole", **settings)
    assert merged(tmp_path / "out") == merged(whole)
    assert names(tmp_path / "out") == names(whole)


def test_a_killed_worker_of_the_command_line_is_said_and_the_same_command_goes_on(
    tmp_path, monkeypatch
):
    app = typer.Typer()
    app.command("record")(cli.record)
    app.command("other")(lambda: None)
    words, flag = tmp_path / "words.txt", tmp_path / "flag"
    words.write_text("".join(f"{text}\n" for text in TEXTS))
    flag.touch()
    monkeypatch.setenv("TOY_FLAG", str(flag))
    command = ["record", str(words), "--out", str(tmp_path / "out"), "--decoder", "toy_decoder:load_killed", "--workers", "2",
               "--thresholds", ".9,.5,.2,0", "--max-new-tokens", "6", "--shard-prompts", "2"]  # fmt: skip
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, RiskcalError), result.exception
    assert "with fewer workers if memory was short" in str(result.exception)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    assert merged(tmp_path / "out") == merged(record(tmp_path / "whole", shard_prompts=2))


class Silent:
    """A pool that gives nothing back: of its jobs some are done, and some beats come, before it falls silent."""

    def __init__(self, done, beats=0):
        self.done, self.beats, self.waited = done, beats, 0

    def map(self, function, jobs):
        raise AssertionError

    def imap_unordered(self, function, jobs):
        self.results = iter([function(job) for job in list(jobs)[: self.done]])
        self.plan = jobs[0].plan
        return self

    def next(self, timeout):
        for one in self.results:
            return one
        self.waited += 1
        if self.waited <= self.beats:
            self.plan.beat()
            os.utime(self.plan.pulse, (self.waited, self.waited))
        raise multiprocessing.TimeoutError


def test_a_pool_that_falls_silent_is_given_up_after_the_given_patience(
    tmp_path, monkeypatch, undisturbed
):
    clock = iter(range(10**6))
    monkeypatch.setattr(pools.time, "monotonic", lambda: next(clock))
    short, long = Silent(1), Silent(1, beats=50)
    for pool, folder in ((short, "short"), (long, "long")):
        with pytest.raises(
            RiskcalError,
            match=r"no worker has finished a batch for 20 seconds.*make the same call again.*patience=",
        ):
            record(tmp_path / folder, pool=pool, patience=20, traces=True)
        assert len(shards(tmp_path / folder)) == 1
        out = record(tmp_path / folder, traces=True)
        assert merged(out) == merged(undisturbed)
        assert names(out) == names(undisturbed)
    assert short.waited < 25
    assert 50 < long.waited < 75
    for patience in (0, -1, math.nan, "long"):
        with pytest.raises(RiskcalError, match="patience: "):
            record(tmp_path / "new", pool=short, patience=patience)


class ActorDied(Exception):
    __module__ = "ray.exceptions"


class TaskFailed(Exception):
    __module__ = "ray.exceptions"

    def __init__(self):
        super().__init__("\x1b[36mray::PoolActor.run_batch()\x1b[39m (pid=1)\nand a traceback")
        self.cause = ImportError("No module named 'mine'")


class Fragile:
    """As Ray's pool is seen from here when an actor dies: an exception, raised or given back as a result, or nothing at all."""

    def __init__(self, how):
        self.how = how

    def map(self, function, jobs):
        for i, job in enumerate(jobs):
            if i != 1:
                yield function(job)
            elif self.how == "wrapped":
                raise TaskFailed
            elif self.how == "raised":
                raise ActorDied("the actor died: its process was killed\nand much more")
            elif self.how == "given":
                yield ActorDied("the actor died: its process was killed\nand much more")
            else:
                yield None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "raised",
            r"pool: a worker died or failed .* \(ActorDied: the actor died: its process was killed\)",
        ),
        (
            "given",
            r"pool: a worker died or failed .* \(ActorDied: the actor died: its process was killed\)",
        ),
        ("wrapped", r"pool: a worker died or failed .* \(ImportError: No module named 'mine'\)"),
        (
            "silent",
            r"pool: returned without an error, but runs-00001\.parquet was not written .*a worker was lost",
        ),
    ],
)
def test_what_a_pool_of_actors_shows_is_said_as_it_is(tmp_path, undisturbed, how, message):
    with pytest.raises(RiskcalError, match=message) as refusal:
        record(tmp_path / "out", pool=Fragile(how), traces=True)
    assert "futures" not in str(refusal.value)
    assert "make the same call again" in str(refusal.value)
    assert merged(record(tmp_path / "out", traces=True)) == merged(undisturbed)


def test_what_a_job_of_a_pool_of_actors_raised_is_passed_on_as_it_is(tmp_path):
    class Wrapped(Exception):
        __module__ = "ray.util.multiprocessing.pool"

        def __init__(self, underlying):
            self.underlying = underlying

    class Actors:
        def map(self, function, jobs):
            return [Wrapped(RiskcalError("risk: is 2; losses lie in [0, 1]."))]

    with pytest.raises(RiskcalError, match=r"^risk: is 2; losses lie in \[0, 1\]\.$"):
        record(tmp_path / "out", pool=Actors())


def test_what_a_decoder_raises_in_a_worker_is_passed_on(tmp_path):
    class Picky(toy_decoder.ToyDecoder):
        def generate(self, input_ids, attention_mask, **settings):
            if self.calls > 30:
                raise MemoryError("out of memory")
            return super().generate(input_ids, attention_mask, **settings)

    for opened in (nullcontext(), ThreadPoolExecutor(1)):
        with opened as pool, pytest.raises(MemoryError) as failure:
            record(tmp_path / str(pool is None), load=lambda: Picky(), pool=pool)
        (note,) = failure.value.__notes__
        assert note.startswith("while recording prompt ")
        assert "Do not drop prompts that fail" in note
        assert "`failed`" in note


# Two at once

TWO = """
import functools, sys
import toy_decoder, riskcal, riskcal_adapters
load = functools.partial(toy_decoder.load, delay=0.01)
print("ready", flush=True)
sys.stdin.readline()
riskcal_adapters.record({texts!r}, load, {grid!r}, sys.argv[1], traces=True, shard_prompts=7, max_new_tokens=6, progress=False,
                        stop={stop})
""".format(texts=MANY, grid=FINE, stop="riskcal." + repr(STOP))


@pytest.mark.parametrize("columns", [0, 3, 9])
def test_two_processes_that_record_the_same_with_stop_both_succeed(tmp_path, stopped, columns):
    out = tmp_path / "out"
    command = [sys.executable, "-c", TWO, str(out)]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment(),
    }
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
        while len(list(out.glob("unfinished/runs-*.parquet"))) < columns and process.poll() is None:
            pass
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert merged(out) == merged(stopped)
    assert merged(out, "traces/*.parquet") == merged(stopped, "traces/*.parquet")
    assert names(out) == names(stopped)


MOMENTS = [
    *itertools.product(["record_column", "column", "_write", "_table"], [0, 1, 5, 9]),
    *itertools.product(["join_columns", "fails"], [0, 1]),  # which are called once for each shard
]


@pytest.mark.parametrize(("step", "call"), MOMENTS)
def test_another_process_may_finish_at_any_moment(tmp_path, monkeypatch, stopped, step, call):
    out, real, calls = tmp_path / "out", getattr(worker, step), []

    def overtaken(*arguments, **settings):
        calls.append(step)
        if len(calls) - 1 == call:
            with monkeypatch.context() as patch:
                patch.setattr(worker, step, real)
                patch.setattr(worker, "_slot", None)
                record(out, MANY, **STOPPED)
        return real(*arguments, **settings)

    monkeypatch.setattr(worker, step, overtaken)
    record(out, MANY, **STOPPED)
    assert len(calls) > call, "nobody was overtaken"
    assert merged(out) == merged(stopped)
    assert names(out) == names(stopped)


# Folders that nothing was recorded to, and disks that refuse


class Broken(toy_decoder.ToyDecoder):
    def generate(self, *encoded, **settings):
        raise ValueError("no such device")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"policy": ExitPolicy(min_layer=9)}, RiskcalError),
        ({"load": Broken}, ValueError),
        ({"load": toy_decoder.load_nothing}, RiskcalError),
        ({"dissimilarity": lambda early, full: 1.5, "traces": False}, RiskcalError),
        ({"policy": ExitPolicy(min_layer=9), "stop": STOP}, RiskcalError),
    ],
)
def test_a_run_that_failed_before_anything_was_recorded_leaves_nothing_behind(
    tmp_path, settings, error
):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new" / "deep", tmp_path / "empty"):
        with pytest.raises(error):
            record(out, **({"traces": True} | settings))
    assert names(tmp_path) == ["empty"]


def test_a_run_that_failed_later_keeps_what_was_recorded(tmp_path, undisturbed):
    class Late(toy_decoder.ToyDecoder):
        def generate(self, *encoded, **settings):
            if self.calls == 40:
                raise ValueError("no such device")
            return super().generate(*encoded, **settings)

    decoder = [Late(), toy_decoder.ToyDecoder()]
    load = lambda: decoder.pop(0)  # noqa: E731
    with pytest.raises(ValueError, match="no such device"):
        record(tmp_path / "out", load=load, traces=True)
    assert len(shards(tmp_path / "out")) == 1
    assert merged(record(tmp_path / "out", load=load, traces=True)) == merged(undisturbed)


@pytest.mark.parametrize(
    "call",
    [
        "mkdir",
        "unlink",
        "rmdir",
        "iterdir",
        "touch",
        "write_text",
        "write_bytes",
        "replace",
        "open",
    ],
)
@pytest.mark.parametrize("stop", [None, STOP], ids=["all", "stop"])
@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_what_the_system_refuses_is_said_with_its_path(
    tmp_path, monkeypatch, undisturbed, short, call, stop, skipped
):
    """Whichever call fails, from the first, second or fourth on, what leaves `record` is a `RiskcalError`."""
    out, calls = tmp_path / "out", []
    where = os if call == "replace" else Path
    real = getattr(where, call)

    def refused(path, *arguments, **settings):
        if str(path).startswith(str(out)):
            calls.append(path)
            if len(calls) > skipped:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(where, call, refused)
        try:
            with ThreadPoolExecutor(1) as pool:
                record(out, TEXTS, traces=True, stop=stop, pool=pool)
        except RiskcalError as error:
            message = str(error)
            assert str(out) in message
            assert "Read-only file system" in message
        else:
            message = None
    assert message or len(calls) <= skipped or call in ("touch", "rmdir", "unlink")
    assert merged(record(out, TEXTS, traces=True, stop=stop)) == merged(
        undisturbed if stop is None else short
    )


def test_a_finished_recording_on_a_disk_that_cannot_be_written_is_found_finished(
    tmp_path, monkeypatch, undisturbed
):
    out = copy_of(undisturbed, tmp_path)

    def refused(path, *arguments, **settings):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for call in ("touch", "write_text", "write_bytes", "rename", "rmdir"):
        monkeypatch.setattr(Path, call, refused)
    monkeypatch.setattr(os, "replace", refused)
    assert record(out, traces=True) == out


# Outputs that failed


class Failing(toy_decoder.OpenDecoder):
    """Rows whose early run gets long time out, and so does the full model on one prompt; a failed row may have no token."""

    asked: list[tuple[str, float]] = []  # noqa: RUF012

    def generate(self, input_ids, attention_mask, *, policy, max_new_tokens):
        whole = super().generate(
            input_ids, attention_mask, policy=policy, max_new_tokens=max_new_tokens
        )
        texts = self.texts(input_ids, attention_mask)
        self.asked.extend((text, policy.threshold) for text in texts)
        whole.failed = np.array([self.fails(text, policy) for text in texts])
        for row in np.flatnonzero(whole.failed):
            whole.tokens[row] = whole.exit_layers[row] = 0
            whole.refused[row] = -np.inf
        return whole

    @staticmethod
    def fails(text, policy):
        if policy.is_full_model:
            return text == TEXTS[3]
        return policy.threshold < 0.8 and text in (TEXTS[1], TEXTS[6])


@pytest.mark.parametrize("stop", [None, riskcal.Stop(delta=0.99)], ids=["all", "stop"])
def test_an_output_that_failed_is_the_worst_loss_and_no_prompt_is_left_out(tmp_path, stop):
    table = {"text": TEXTS, "references": ["w2 w3"] * len(TEXTS)}
    Failing.asked.clear()
    out = record(
        tmp_path / "out",
        table,
        load=lambda: Failing(),
        risk=texts.token_error_rate,
        batch_size=3,
        stop=stop,
    )
    plain = record(
        tmp_path / "plain", table, load=toy_decoder.OpenDecoder, risk=texts.token_error_rate
    )
    rows, honest = (
        pd.concat([pd.read_parquet(o / name) for name in shards(o)], ignore_index=True)
        for o in (out, plain)
    )
    text = rows["prompt"].map(lambda i: TEXTS[i])
    full = np.isposinf(rows["threshold"])
    failed = (full & (text == TEXTS[3])) | (
        ~full & (rows["threshold"] < 0.8) & text.isin([TEXTS[1], TEXTS[6]])
    )
    assert rows["failed"].tolist() == failed.tolist()
    assert (rows.loc[failed, "risk"] == 1).all()
    # also what would be compared with an output that failed
    lost = ~full & (failed | (text == TEXTS[3]))
    assert (rows.loc[lost, "dissimilarity"] == 1).all()
    assert (rows.loc[full, "dissimilarity"] == 0).all()
    same = ["prompt", "threshold", "dissimilarity", "risk", "layers", "tokens"]
    pd.testing.assert_frame_equal(
        rows.loc[~(failed | lost), same], honest.loc[~(failed | lost), same]
    )
    assert (rows.loc[failed, "tokens"] == 0).all()
    assert (rows.loc[failed, "layers"] == toy_decoder.LAYERS).all()  # nothing was saved by it
    # each had its chance
    assert {threshold for asked, threshold in Failing.asked if asked == TEXTS[1]} >= {0.5, 0.2, 0.0}
    assert "failed" not in honest
    assert Runs.read(out).n == len(TEXTS)


@pytest.mark.parametrize("failed", [np.zeros(2, bool), np.zeros(1), None])
def test_decoders_that_do_not_say_properly_what_failed_are_refused(tmp_path, failed):
    class Unclear(toy_decoder.OpenDecoder):
        def generate(self, *encoded, **settings):
            whole = super().generate(*encoded, **settings)
            whole.failed = failed
            return whole

    with pytest.raises(
        RiskcalError, match=r"decoder: gave failed of shape .* each needs one true or false"
    ):
        record(tmp_path / "out", load=Unclear)
