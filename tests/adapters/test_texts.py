import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskcal_adapters import texts

sentences = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)


def edits(a, b):
    """Levenshtein distance as the textbook has it."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


@given(sentences, sentences)
def test_token_distance_is_the_textbook_distance_over_the_longer_length(a, b):
    longest = max(len(a.split()), len(b.split()))
    expected = edits(a.split(), b.split()) / longest if longest else 0.0
    assert texts.token_distance(a, b) == pytest.approx(expected, abs=1e-12)
    assert texts.token_distance(a, b) == texts.token_distance(b, a)
    assert (texts.token_distance(a, b) == 0) == (a == b)


@given(sentences, st.lists(sentences, min_size=1, max_size=3))
def test_token_error_rate_is_the_best_clipped_rate(output, references):
    rates = [edits(output.split(), r.split()) / max(1, len(r.split())) for r in references]
    assert texts.token_error_rate(output, references) == pytest.approx(min(1.0, *rates), abs=1e-12)


@pytest.mark.parametrize(
    ("early", "full", "expected"),
    [
        ("", "", 0.0),
        ("HH AH", "", 1.0),
        ("K AE T", "K AE T", 0.0),
        ("K AE T", "K AE T S", 0.25),
        ("a  b\n", "a b", 0.0),
    ],
)
def test_token_distance_by_hand(early, full, expected):
    assert texts.token_distance(early, full) == expected


@pytest.mark.parametrize(
    ("output", "references", "expected"),
    [
        ("K AE T", "K AE T", 0.0),
        ("K AE T", ["D AO G Z", "K AA T"], 1 / 3),
        ("a b c d e", ["x"], 1.0),  # five edits against one token: clipped
        ("", ["a b"], 1.0),
        ("", [""], 0.0),
        ("a", [""], 1.0),
    ],
)
def test_token_error_rate_by_hand(output, references, expected):
    assert texts.token_error_rate(output, references) == pytest.approx(expected)


def test_without_rapidfuzz_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match=r"pip install 'riskcal-ltt\[torch\]'"):
        texts.token_distance("a", "b")
