"""What an `EventLog` does with its two files while others rename, delete, fork and die around it."""

import datetime
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskcal import RiskcalError
from riskcal.serving import EventLog, read_events
from riskcal.serving.events import Encoded, rotated

SERVED = "riskcal.request.served"
OPEN = Path("/proc/self/fd")


def _ids(path):
    return [event["attributes"]["n"] for event in read_events(path).events]


@pytest.mark.parametrize("how", ["renamed", "deleted", "emptied", "folder"])
def test_events_go_where_the_path_is_whatever_became_of_the_file_before(tmp_path, how):
    folder = tmp_path / "logs"
    folder.mkdir()
    log, other = (EventLog(folder / "events.jsonl") for _ in range(2))
    log.write(SERVED, {"n": 0})
    other.write(SERVED, {"n": 1})
    if how == "renamed":
        log.path.rename(folder / "old")
    elif how == "deleted":
        log.path.unlink()
    elif how == "emptied":
        log.path.write_bytes(b"")
    else:
        folder.rename(tmp_path / "old")
        folder.mkdir()
    log.write(SERVED, {"n": 2})
    other.write(SERVED, {"n": 3})
    log.write(SERVED, {"n": 4})
    assert _ids(log.path) == [2, 3, 4]
    if how == "renamed":
        assert _ids(folder / "old") == [0, 1]


def test_a_file_that_another_log_rotated_is_left_alone(tmp_path):
    path = tmp_path / "events.jsonl"
    log, other = EventLog(path), EventLog(path, max_bytes=1)
    for n in range(5):
        (other if n % 2 else log).write(SERVED, {"n": n})
    assert [n for file in [*rotated(path), path] for n in _ids(file)] == list(range(5))
    assert len(rotated(path)) == 2


@pytest.mark.parametrize("gone", ["lock", "folder"])
def test_writers_take_turns_though_the_lock_was_deleted(tmp_path, gone):
    """One that still had the lock that is gone would not wait for a writer that has the new one."""
    import fcntl

    folder = tmp_path / "logs"
    folder.mkdir()
    log = EventLog(folder / "events.jsonl")
    log.write(SERVED, {"n": 0})
    lock = folder / ".events.jsonl.lock"
    if gone == "lock":
        lock.unlink()
    else:
        shutil.move(folder, tmp_path / "old")
        folder.mkdir()
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=log.write, args=(SERVED, {"n": 1}), daemon=True)
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
    writer.join()
    assert _ids(log.path)[-1] == 1


#: Forks while another thread is in the midst of writing; the child writes too, then lives on while the parent is killed in
#: the midst of writing.
FORKED = """
import os, signal, sys, threading
from riskcal.serving import EventLog
from riskcal.serving import events
signal.alarm(60)  # nothing waits for ever
log = EventLog(sys.argv[1])
log.write("riskcal.request.served", {"n": 0})
whole, within, go_on = events._write_whole, threading.Event(), threading.Event()

def slowly(*given):
    within.set()
    go_on.wait()
    whole(*given)

events._write_whole = slowly
writer = threading.Thread(target=log.write, args=("riskcal.request.served", {"n": 1}))
writer.start()
within.wait()
events._write_whole = whole
reading, writing = os.pipe()
if not os.fork():
    signal.alarm(60)
    os.close(writing)
    os.read(reading, 1)  # until the parent has written
    log.write("riskcal.request.served", {"n": 2})
    print("child", flush=True)
    sys.stdin.read()  # lives until the test has seen enough
    os._exit(0)
go_on.set()
writer.join()
os.write(writing, b"x")
while len(open(sys.argv[1], "rb").readlines()) < 3:  # until the child has
    pass
events._write_whole = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
log.write("riskcal.request.served", {"n": 3})
"""


def test_a_fork_has_a_log_of_its_own_and_keeps_no_lock_of_a_parent_that_was_killed(tmp_path):
    path = tmp_path / "events.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", FORKED, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout.readline() == b"child\n"
        # it killed itself while it had the lock; its child lives
        assert parent.wait() == -signal.SIGKILL
        writer = threading.Thread(target=EventLog(path).write, args=(SERVED, {"n": 4}), daemon=True)
        writer.start()
        writer.join(20)
        assert not writer.is_alive()
        assert _ids(path) == [0, 1, 2, 4]


_TEXT = st.text() | st.sampled_from(["NaN", "\ud800", "\u2028", "\x85", '"}\n'])
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


@given(_TEXT, st.dictionaries(_TEXT, _VALUES, max_size=4), st.booleans())
def test_a_line_holds_what_was_written(name, attributes, encoded):
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(f"{folder}/events.jsonl")
        log.write_all([(name, Encoded.of(attributes) if encoded else attributes)] * 2)
        lines = log.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    for line in lines:
        assert line.isascii()
        event = json.loads(line)
        assert event.pop("time_unix_nano") > 0
        assert event == {"name": name, "attributes": attributes}


@pytest.mark.parametrize("attributes", [["a"], "a", 3, {"a": 1}.items(), [], "", 0, ()])
def test_attributes_that_are_no_dictionary_are_refused(tmp_path, attributes):
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(RiskcalError, match=r"attributes: .* is no dictionary"):
        log.write(SERVED, attributes)
    assert not log.path.exists()


_ROUND: dict = {}
_ROUND["itself"] = _ROUND


def _deep() -> dict:
    """As deep as nobody's JSON goes: Python 3.14 writes, and reads, tens of thousands."""
    value: dict = {}
    for _ in range(1_000_000):
        value = {"in": value}
    return value


_REFUSED = {
    "nan": float("nan"),
    "inf": -float("inf"),
    "inf below": {"a": float("inf")},
    "set": {1},
    "bytes": b"x",
    "object": object(),
    "numpy's": np.int64(3),
    "path": Path("x"),
    "tuple": (1j,),
    "date": datetime.date(2026, 1, 1),
    "set below": {"a": {"b": {1}}},
    "set listed": [{1}],
    "odd key": {(1, 2): 3},
    "itself": _ROUND,
    "deep": _deep,
}


@pytest.mark.parametrize("value", _REFUSED.values(), ids=_REFUSED)
def test_what_json_does_not_hold_is_refused_however_deep(tmp_path, value):
    log = EventLog(tmp_path / "events.jsonl")
    with pytest.raises(RiskcalError, match="attributes"):
        log.write(SERVED, {"a": value() if callable(value) else value})
    assert not log.path.exists()


@pytest.mark.skipif(not OPEN.is_dir(), reason="counts descriptors there")
def test_a_log_that_nobody_holds_leaves_no_descriptor_open(tmp_path):
    before = len(list(OPEN.iterdir()))
    for n in range(50):
        EventLog(tmp_path / f"{n}.jsonl").write(SERVED, {"n": n})
    assert len(list(OPEN.iterdir())) <= before + 2


@pytest.mark.skipif(not OPEN.is_dir(), reason="counts descriptors there")
def test_a_lock_that_cannot_be_given_up_leaves_no_descriptor_open(tmp_path, monkeypatch):
    """As on a network's file system whose lock daemon is gone."""
    import fcntl

    log, locked = EventLog(tmp_path / "events.jsonl"), fcntl.flock

    def refusing(descriptor, how):
        if how == fcntl.LOCK_UN:
            raise OSError(37, "No locks available")
        locked(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refusing)
    before = len(list(OPEN.iterdir()))
    for n in range(5):
        log.write(SERVED, {"n": n})
    assert len(list(OPEN.iterdir())) == before
    assert _ids(log.path) == [*range(5)]
