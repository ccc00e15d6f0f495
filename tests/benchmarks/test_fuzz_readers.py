"""The fuzz of readers can tell: every valid file is read, damage is noticed, and a defect is reported with what was read."""

import contextlib
import json

import pytest

import fuzz_readers
from fuzz_readers import READERS, Reader, Tried, fuzzed, tried
from riskcal import RiskcalError


@pytest.mark.parametrize("name", READERS)
def test_what_is_damaged_was_valid_and_damaged_it_is_read_or_refused(name, tmp_path) -> None:
    reader = READERS[name]
    reader.read(reader.write(tmp_path))
    found = Tried()
    tried(reader, tmp_path, 0, 40, found)
    assert found.foreign == {}
    assert found.counts["cases"] == 40 == found.counts["read"] + found.counts["refused"]
    if "events" not in name:  # what is no event is counted there, not refused
        assert found.counts["refused"] >= 5


@pytest.mark.parametrize("name", READERS)
def test_brackets_nested_too_deep_are_read_as_damage(name, tmp_path) -> None:
    path = READERS[name].write(tmp_path)
    for start in (b"[", b'{"a":'):
        path.write_bytes(start * 100_000)
        with contextlib.suppress(RiskcalError):
            READERS[name].read(path)


@pytest.mark.parametrize("row", ["1" + "0" * 400, '{"loss": 0, "rate": 1' + "0" * 400 + "}"])
def test_a_whole_number_beyond_all_floats_is_no_loss_and_no_rate(row, tmp_path) -> None:
    path = tmp_path / "losses.jsonl"
    path.write_text(f'{{"loss": 0.5}}\n{row}\n')
    with pytest.raises(RiskcalError, match="row 1 cannot be read"):
        READERS["losses.jsonl"].read(path)


def test_a_foreign_exception_is_reported_with_the_file_and_ends_in_failure(
    tmp_path, monkeypatch, capsys
) -> None:
    careless = Reader(READERS["losses.jsonl"].write, lambda path: json.loads(path.read_bytes()))
    monkeypatch.setattr(fuzz_readers, "READERS", {"careless": careless})
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["fuzz_readers.py", "--minutes", "0", "--json", str(out)])
    with pytest.raises(SystemExit) as ended:
        fuzz_readers.main()
    assert ended.value.code == 1
    assert "JSONDecodeError" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["total"]["foreign"] == figures["readers"]["careless"]["foreign"] > 0
    assert any("JSONDecodeError" in name for name in figures["foreign"]["careless"])


def test_rounds_differ_and_are_repeated_by_their_number(tmp_path) -> None:
    def content(number: int) -> list[bytes]:
        read: list[bytes] = []
        reader = Reader(READERS["runs.csv"].write, lambda path: read.append(path.read_bytes()))
        tried(reader, tmp_path, number, 10, Tried())
        return read

    assert content(0) == content(0) != content(1)
    assert list(fuzzed(["losses.csv"], 0.0, 5)) == ["losses.csv"]
