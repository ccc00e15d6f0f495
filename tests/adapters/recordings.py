"""Recordings of the toy decoder that several tests share, and what they are compared by."""

import contextlib

import pyarrow as pa
import pyarrow.parquet
import pytest
import toy_decoder

import riskcal_adapters
from riskcal.policy import Stop
from riskcal_adapters.recording import worker

TEXTS = [f"prompt {chr(97 + i)}{'x' * (i % 3)}" for i in range(11)]
GRID = [0.2, 0.9, 0.5, 0.0]
SETTINGS = {"max_new_tokens": 6, "shard_prompts": 4, "progress": False}
MANY = [f"text {i}" for i in range(24)]
FINE = [round(0.1 * i, 1) for i in range(11)]
STOP = Stop(delta=0.45, epsilon=0.2)
#: A recording of ``MANY`` that stops.
STOPPED = {"thresholds": FINE, "traces": True, "stop": STOP, "shard_prompts": 7}


def record(out, prompts=TEXTS, load=toy_decoder.load, thresholds=GRID, **settings):
    return riskcal_adapters.record(prompts, load, thresholds, out, **(SETTINGS | settings))


@contextlib.contextmanager
def interrupted(monkeypatch, cut):
    """What is recorded here is stopped before it writes the table numbered ``cut``; the paths of those before it."""
    write, written = worker.internal.write_table, []

    def write_or_stop(frame, path):
        if len(written) == cut:
            raise KeyboardInterrupt
        written.append(path)
        write(frame, path)

    with monkeypatch.context() as patch:
        patch.setattr(worker.internal, "write_table", write_or_stop)
        with pytest.raises(KeyboardInterrupt):
            yield written


def shards(out, pattern="runs-*.parquet"):
    return sorted(path.name for path in out.glob(pattern))


def merged(out, pattern="runs-*.parquet"):
    """The recording as one table, in bytes, but for its seconds."""
    whole = pa.concat_tables(
        [pa.parquet.read_table(path, partitioning=None) for path in sorted(out.glob(pattern))]
    )
    whole = whole.drop_columns(
        [name for name in ("seconds",) if name in whole.column_names]
    ).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema) as writer:
        writer.write_table(whole)
    return sink.getvalue().to_pybytes()
