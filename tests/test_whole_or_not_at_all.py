"""Files are replaced whole or not at all, whoever else writes them."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from riskcal import RiskcalError, Runs, _replacing


def runs(n: int) -> Runs:
    return Runs.from_arrays(
        thresholds=[0.9, 0.5], dissimilarity=np.zeros((n, 2)), prompts=[f"p{i}" for i in range(n)]
    )


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path: Path, ending: str) -> None:
    path, both = tmp_path / f"runs.{ending}", [runs(30), runs(50)]
    whole, wrong = {one.digest() for one in both}, []
    both[0].write(path)

    def write(one: Runs) -> None:
        for _ in range(15):
            try:
                one.write(path)
                found = Runs.read(path).digest()
            except Exception as error:
                wrong.append(error)
            else:
                wrong.extend([] if found in whole else [found])

    threads = [threading.Thread(target=write, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]


def test_processes_of_one_id_never_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers that share a folder
    with (
        _replacing.replacing(tmp_path / "file") as first,
        _replacing.replacing(tmp_path / "file") as second,
    ):
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # the outer one is renamed last


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_folder_that_cannot_be_waited_for_is_no_failure_and_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    path, wait = tmp_path / "runs.jsonl", os.fsync
    runs(30).write(path)

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (what == "folder"):
            raise OSError(errno.EINVAL, "Invalid argument")
        wait(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if what == "folder":
        runs(50).write(path)
    else:
        with pytest.raises(
            RiskcalError, match=r"runs\.jsonl: cannot be written \(Invalid argument"
        ):
            runs(50).write(path)
    assert Runs.read(path).n == (50 if what == "folder" else 30)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


WRITER = """
import sys
import numpy as np
from riskcal import Runs
n = int(sys.argv[1])
runs = Runs.from_arrays(thresholds=[0.5], dissimilarity=np.zeros((n, 1)), prompts=[f"p{i}" for i in range(n)])
for _ in range(15):
    runs.write(sys.argv[2])
"""


def test_two_containers_whose_processes_have_the_same_id(tmp_path: Path) -> None:
    """The real thing where process namespaces are permitted; its twin with a faked id stands above."""
    apart = ["unshare", "--pid", "--fork"]
    try:
        permitted = (
            subprocess.run([*apart, "true"], capture_output=True, check=False).returncode == 0
        )
    except FileNotFoundError:
        permitted = False
    command = [*apart, sys.executable] if permitted else [sys.executable]
    path = tmp_path / "runs.jsonl"
    writers = [subprocess.Popen([*command, "-c", WRITER, n, str(path)]) for n in ("30", "50")]
    sizes = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            sizes.add(Runs.read(path).n)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sizes <= {30, 50}
    assert Runs.read(path).n in (30, 50)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), _replacing.replacing(tmp_path / "file") as partial:
        partial.write_text(f"half {1 / 0}")
    assert (tmp_path / "file").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_is_renamed_was_flushed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, flush, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (done.append("flush"), flush(descriptor))[1]
    )
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names))[1])
    with _replacing.replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert done == ["flush", "rename", "flush"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(RiskcalError, match=r"no/file: cannot be written"),
        _replacing.replacing(tmp_path / "no" / "file"),
    ):
        pass


def test_the_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with _replacing.replacing(tmp_path / "file") as partial:
        partial.write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode
