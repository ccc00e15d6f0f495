"""Digests of certificates: blind to what rounding leaves, to nothing else; compared with what was printed elsewhere."""

import json

import numpy as np
import pandas as pd
import pytest

import determinism
from determinism import DIGITS, digest

TABLE = pd.DataFrame(
    {"threshold": [0.9, 0.1], "pvalue": [1.2345e-9, 0.5], "certified": [True, False]}
)
LINES = ["records 12ab", "delta=0.05: 0.5, 3 certified, digits aa, bits 01"]


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("column", ["threshold", "pvalue"])
def test_a_last_bit_changes_the_bits_alone_and_a_digit_changes_both(row: int, column: str) -> None:
    value = TABLE.loc[row, column]
    for other, digits_too in ((np.nextafter(value, 2.0), False), (value * (1.0 + 1e-8), True)):
        changed = TABLE.copy()
        changed.loc[row, column] = other
        assert (digest(changed, DIGITS) != digest(TABLE, DIGITS)) == digits_too
        assert digest(changed, None) != digest(TABLE, None)


def test_verdicts_and_names_are_part_of_a_digest() -> None:
    others = (TABLE.assign(certified=True), TABLE.rename(columns={"pvalue": "p"}), TABLE[::-1])
    assert len({digest(table, DIGITS) for table in (TABLE, *others)}) == 4


@pytest.mark.parametrize("kept", ["txt", "json"])
@pytest.mark.parametrize(
    ("there", "code", "told"),
    [
        (LINES, 0, "0 of 2 lines differ in digits, 0 in bits"),
        ([LINES[0], LINES[1].replace("01", "02")], 0, "0 of 2 lines differ in digits, 1 in bits"),
        ([LINES[0], LINES[1].replace("aa", "ab")], 1, "1 of 2 lines differ in digits, 1 in bits"),
    ],
)
def test_what_was_printed_elsewhere_is_compared_as_text_and_as_a_result(
    kept, there, code, told, tmp_path, monkeypatch, capsys
) -> None:
    file = tmp_path / f"there.{kept}"
    text = ["# elsewhere", *there]
    file.write_text(
        "\n".join(text) if kept == "txt" else json.dumps({"commit": "", "printed": text})
    )
    monkeypatch.setattr(determinism, "lines", lambda: iter(LINES))
    monkeypatch.setattr("sys.argv", ["determinism.py", "--against", str(file)])
    with pytest.raises(SystemExit) as ended:
        determinism.main()
    assert ended.value.code == code
    assert f"Against elsewhere: {told}" in capsys.readouterr().out


def test_what_was_itself_compared_serves_as_well(tmp_path, monkeypatch, capsys) -> None:
    """`.ci/versions` keeps what it printed last, which ends in a comparison, for the next time."""
    file = tmp_path / "there.txt"
    file.write_text("\n".join(["# elsewhere", *LINES, "", "Against another: 0 of 2 lines differ"]))
    monkeypatch.setattr(determinism, "lines", lambda: iter(LINES))
    monkeypatch.setattr("sys.argv", ["determinism.py", "--against", str(file)])
    with pytest.raises(SystemExit) as ended:
        determinism.main()
    assert ended.value.code == 0
    assert "Against elsewhere: 0 of 2 lines differ in digits" in capsys.readouterr().out
