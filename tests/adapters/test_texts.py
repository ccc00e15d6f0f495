"""Each measure against the library or definition it stands for, and what `record` needs: pickling, names, equal texts."""

import functools
import json
import pickle
import re
import string
import sys
from collections import Counter

import pytest
import text_scores
import toy_decoder
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

from riskcal import RiskcalError
from riskcal_adapters import record, texts

sentences = st.lists(st.sampled_from("abcd"), max_size=8).map(" ".join)
prose = st.lists(
    st.sampled_from(["The", "cat", "sat,", "a", "mat.", "it's", "x_1", "--", "42"]), max_size=8
).map(" ".join)
any_text = st.text(max_size=12) | prose
MEASURES = {
    "rouge_l": texts.rouge_l,
    "token_f1": texts.token_f1,
    "exact_match": texts.exact_match,
    "sentence_bleu": texts.sentence_bleu,
    "chrf": texts.chrf,
}


# ---- Against the reference libraries


@given(st.text(st.characters(max_codepoint=127), max_size=30) | prose, prose)
def test_rouge_l_is_rouge_scores_on_ascii_texts(candidate, reference):
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(reference, candidate)["rougeL"].fmeasure
    if candidate != reference:
        assert texts.rouge_l(candidate, reference) == expected
        assert texts.rouge_l(candidate, reference, tokens="ascii") == expected


@given(any_text, any_text)
def test_ascii_tokens_are_rouge_scores_on_any_text(candidate, reference):
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(reference, candidate)["rougeL"].fmeasure
    found = texts.rouge_l(candidate, reference, tokens="ascii")
    assert found == (1.0 if candidate == reference else expected)


@given(any_text, any_text, st.sampled_from(["13a", "char", "none"]))
def test_sentence_bleu_is_sacrebleus(candidate, reference, tokenize):
    expected = (
        BLEU(effective_order=True, tokenize=tokenize).sentence_score(candidate, [reference]).score
        / 100
    )
    found = texts.sentence_bleu(candidate, reference, tokenize=tokenize)
    assert found == pytest.approx(1.0 if candidate == reference else expected, abs=1e-12)


@given(any_text, any_text, st.sampled_from([0, 2]), st.booleans())
def test_chrf_is_sacrebleus(candidate, reference, word_order, whitespace):
    expected = (
        CHRF(word_order=word_order, whitespace=whitespace)
        .sentence_score(candidate, [reference])
        .score
        / 100
    )
    found = texts.chrf(candidate, reference, word_order=word_order, whitespace=whitespace)
    assert found == pytest.approx(1.0 if candidate == reference else expected, abs=1e-12)


def squad_tokens(text):
    """SQuAD's normalisation, step by step."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split()).split()


@given(any_text, any_text)
def test_token_f1_and_exact_match_are_squads(candidate, reference):
    said, wanted = squad_tokens(candidate), squad_tokens(reference)
    assert texts.exact_match(candidate, reference) == (" ".join(said) == " ".join(wanted))
    shared = sum(min(n, Counter(wanted)[token]) for token, n in Counter(said).items())
    if not said or not wanted:
        expected = float(said == wanted)
    elif not shared:
        expected = 0.0
    else:
        precision, recall = shared / len(said), shared / len(wanted)
        expected = 2 * precision * recall / (precision + recall)
    assert texts.token_f1(candidate, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("candidate", "reference", "f1", "match"),
    [
        ("The Norman conquest", "norman conquest.", 1.0, 1.0),
        ("a cat sat", "the cat", 2 / 3, 0.0),
        ("cat cat", "cat", 2 / 3, 0.0),
        ("the", "an", 1.0, 1.0),  # nothing but articles is left of either
        ("", "cat", 0.0, 0.0),
    ],
)
def test_token_f1_and_exact_match_by_hand(candidate, reference, f1, match):
    assert texts.token_f1(candidate, reference) == pytest.approx(f1)
    assert texts.exact_match(candidate, reference) == match


# ---- What every measure owes the guarantee


@pytest.mark.parametrize("name", MEASURES)
@given(any_text, any_text, any_text)
def test_losses_are_in_range_and_equal_texts_lose_nothing(name, early, full, other):
    distance, risk = getattr(texts, f"{name}_distance"), getattr(texts, f"{name}_risk")
    assert distance(full, full) == 0.0
    assert risk(full, [other, full]) == 0.0
    assert 0.0 <= distance(early, full) <= 1.0
    assert distance(early, full) == pytest.approx(1.0 - MEASURES[name](early, full), abs=1e-15)
    assert risk(early, [full, other]) == min(risk(early, full), risk(early, (other,)))


@pytest.mark.parametrize("name", MEASURES)
def test_an_empty_output_is_as_far_as_can_be(name):
    distance = getattr(texts, f"{name}_distance")
    assert distance("", "word") == distance("word", "") == 1.0
    assert distance("", "") == 0.0


@pytest.mark.parametrize(
    ("one", "other", "words", "characters"),
    [
        ("café", "cafè", 0.0, 0.75),
        ("été", "âtâ", 0.0, 1 / 3),
        ("हिन्दी भाषा", "हिन्दी कविता", 0.5, None),  # vowel signs are marks, and part of their words
        ("这是一本书", "这是一支笔", 0.0, 0.6),  # no spaces: one word
        ("caf\u00e9 noir", "cafe\u0301 noir", 1.0, 1.0),  # the same letters, composed and not
    ],
)
def test_rouge_l_of_other_scripts(one, other, words, characters):
    assert texts.rouge_l(one, other) == pytest.approx(words)
    if characters is not None:
        assert texts.rouge_l(one, other, tokens="characters") == pytest.approx(characters)


def test_rouge_scores_own_tokens_lose_letters_outside_ascii():
    assert texts.rouge_l("mañana sí", "ma ana s", tokens="ascii") == 1.0
    assert texts.rouge_l("mañana sí", "ma ana s") == 0.0
    # no token is left: as far as can be
    assert texts.rouge_l("слово", "слава", tokens="ascii") == 0.0
    assert texts.rouge_l("ɹ æ t", "r æ t", tokens="whitespace") == pytest.approx(2 / 3)


def test_chrf_of_phonemes_needs_whitespace_to_see_where_they_end():
    assert texts.chrf("AA H", "A AH") == 1.0
    assert texts.chrf("AA H", "A AH", whitespace=True) < 1.0


# ---- What `record` needs

meaning = texts.Learned(text_scores.ratio, (2.0,))
PICKLABLE = {
    "rouge-l": texts.rouge_l_distance,
    "of options": texts.Distance(functools.partial(texts.rouge_l, tokens="characters")),
    "risk": texts.Risk(texts.chrf),
    "learned": texts.Distance(meaning),
}


def recorded_name(folder, loss):
    """What a recording knows a loss by: it goes on only if this is the same."""
    record(
        ["one"],
        toy_decoder.load,
        [0.5],
        folder,
        dissimilarity=loss,
        max_new_tokens=3,
        progress=False,
    )
    return json.loads((folder / "recording.json").read_text(encoding="utf-8"))["dissimilarity"]


@pytest.mark.parametrize("name", PICKLABLE)
def test_losses_travel_to_other_processes_under_one_name(tmp_path, name):
    loss = PICKLABLE[name]
    copy = pickle.loads(pickle.dumps(loss))
    assert copy("one text", "other text") == loss("one text", "other text")
    known = recorded_name(tmp_path / "loss", loss)
    assert " at 0x" not in known
    assert recorded_name(tmp_path / "copy", copy) == known


def test_different_losses_have_different_names(tmp_path):
    losses = [loss for pair in texts.LOSSES.values() for loss in pair] + [
        PICKLABLE["of options"],
        PICKLABLE["learned"],
    ]
    names = {recorded_name(tmp_path / str(i), loss) for i, loss in enumerate(losses)}
    assert len(names) == len(losses)


def test_a_learned_score_is_loaded_late_once_and_clipped():
    text_scores.LOADED.clear()
    score = texts.Learned(text_scores.ratio, (3.0,))
    copies = [pickle.loads(pickle.dumps(texts.Distance(score))) for _ in range(3)]
    assert text_scores.LOADED == []
    assert [copy("abcd", "abxx") for copy in copies] == [0.0] * 3  # 3 * 0.5, clipped
    assert text_scores.LOADED == [3.0]
    assert texts.Learned(text_scores.constant, (-0.5,))("a", "b") == 0.0
    with pytest.raises(RiskcalError, match="score: is NaN for 'a' against 'b'"):
        texts.Learned(text_scores.constant, (float("nan"),))("a", "b")


@pytest.mark.parametrize("value", [57.3, -0.1, float("nan")])
def test_scores_outside_the_unit_interval_are_refused(value):
    def score(candidate, reference):
        return value

    with pytest.raises(RiskcalError, match=r"score: .* for 'a' against 'b' is outside \[0, 1\]"):
        texts.Distance(score)("a", "b")
    with pytest.raises(RiskcalError, match=r"score: .* is outside \[0, 1\]"):
        texts.Risk(score)("a", ["b"])


def test_rounding_errors_beyond_the_interval_are_clipped():
    assert texts.Distance(lambda candidate, reference: 1.0 + 1e-12)("a", "b") == 0.0
    assert texts.Risk(lambda candidate, reference: -1e-12)("a", "b") == 1.0


def test_unknown_tokens_are_refused():
    with pytest.raises(RiskcalError, match="tokens: 'unicode' is unknown"):
        texts.rouge_l("a", "b", tokens="unicode")


@pytest.mark.parametrize(
    ("module", "loss", "message"),
    [
        (
            "rouge_score.rouge_scorer",
            texts.rouge_l,
            r"needs rouge-score: pip install 'riskcal-ltt\[text\]'",
        ),
        (
            "sacrebleu.metrics",
            texts.sentence_bleu,
            r"needs sacrebleu: pip install 'riskcal-ltt\[text\]'",
        ),
        ("sacrebleu.metrics", texts.chrf, r"needs sacrebleu"),
        (
            "rapidfuzz.distance.Levenshtein",
            texts.token_distance,
            r"needs rapidfuzz: pip install 'riskcal-ltt\[torch\]' or pip install 'riskcal-ltt\[text\]'",
        ),
    ],
)
def test_without_its_library_a_measure_names_the_extra(monkeypatch, module, loss, message):
    texts._rouge.cache_clear()
    texts._sacrebleu_metric.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        loss("a", "b")


# ---- Token edit distance


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


@pytest.mark.parametrize("risk", [texts.Risk(texts.token_f1), texts.token_error_rate])
def test_no_reference_is_refused(risk):
    with pytest.raises(RiskcalError, match="references: there is none"):
        risk("a", [])


def test_a_tokenizer_that_sacrebleu_does_not_know_is_refused():
    with pytest.raises(RiskcalError, match="tokenize: 'foo' is unknown"):
        texts.sentence_bleu("a", "b", tokenize="foo")
