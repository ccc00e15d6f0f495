"""Contexts that forbid early exits, told token by token, against parsers that see the whole text at once."""

import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from riskcal.forbidden import Guard
from riskcal.serving import Inside

#: Text in which contexts begin and end often: quotes, escapes, fences, digits, letters of one byte and of several, marks.
TEXT = st.text(st.sampled_from('ab_19"\\`\n =.é語٣²·🙂'), max_size=24)
CODE = st.lists(TEXT | st.just("```"), max_size=6).map("".join)
CONTEXTS = ("json_string", "identifier", "code_identifier", "code_block", "number")


def strings(text):
    """Marks characters in strings and the opening quotes, by one expression over the whole text."""
    marks = [False] * len(text)
    for found in re.finditer(r'"(?:\\.|[^"\\])*("|\Z|\\\Z)', text, re.DOTALL):
        closed = found[1] == '"'
        marks[found.start() : found.end() - closed] = [True] * (len(found[0]) - closed)
    return marks


def names(text):
    marks = []
    for run in re.findall(r"[\s\S]", text):
        marks.append(f"a{run}".isidentifier())
    at = 0
    while at < len(text):
        end = at
        while end < len(text) and marks[end]:
            end += 1
        if end > at and not text[at].isidentifier():
            marks[at:end] = [False] * (end - at)
        at = end + 1
    return marks


def blocks(text):
    """Marks characters between fences, the last backtick of a fence that opens among them."""
    marks, inside = [], False
    for part in re.split("(```)", text):
        if part == "```":
            inside = not inside
            marks += [not inside, not inside, inside]
        else:
            marks += [inside] * len(part)
    return marks


def names_in_blocks(text):
    parts = re.split("(```)", text)
    return [
        mark
        for i, part in enumerate(parts)
        for mark in (names(part) if i % 4 == 2 else [False] * len(part))
    ]


PARSERS = {
    "json_string": strings,
    "identifier": names,
    "code_identifier": names_in_blocks,
    "code_block": blocks,
    "number": lambda text: [character.isdigit() for character in text],
}


def judged(rule, tokens):
    """Of each token, whether it may not leave early."""
    state, held = rule.start(), []
    for text in tokens:
        held.append(rule.forbids(state, 0, text))
        state = rule.after(state, text)
    return held


def touched(marks, spans):
    """Of each span, whether it holds a marked character, or directly follows one."""
    return [any(marks[max(begin - 1, 0) : end]) for begin, end in spans]


@given(CODE, st.data(), st.sampled_from(CONTEXTS))
def test_tokens_are_held_where_a_parser_of_the_whole_text_has_them_inside(text, data, context):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    bounds = [0, *sorted(cuts), len(text)]
    spans = list(itertools.pairwise(bounds))
    held = judged(Inside(context), [text[begin:end] for begin, end in spans])
    assert held == touched(PARSERS[context](text), spans)


@given(st.dictionaries(TEXT, TEXT | st.integers(), max_size=3))
def test_strings_of_a_document_are_all_held_and_nothing_else_of_it(document):
    text = json.dumps(document, ensure_ascii=False)
    held = judged(Inside("json_string"), text)
    for found in re.finditer(r'"(?:\\.|[^"\\])*"', text):
        assert all(held[found.start() : found.end()])
    outside = re.sub(r'"(?:\\.|[^"\\])*"', lambda found: "\0" * len(found[0]), text)
    assert not any(one for one, kept in zip(held, outside, strict=True) if kept != "\0")


def byte_by_byte():
    """A tokenizer in which every byte is a token, so that characters fall into several."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<0x00>"))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


@pytest.mark.parametrize("context", CONTEXTS)
def test_pieces_of_characters_are_never_free_where_the_character_is_not(context):
    made = byte_by_byte()
    guard = Guard((Inside(context),), lambda token: made.decode([token]))
    assert guard.text(0xC3) == "\ufffd"

    @given(CODE)
    def compare(text):
        spans = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode("utf-8")]
        inside = touched(PARSERS[context](text), spans)
        states, held = guard.start([]), []
        for token in text.encode("utf-8"):
            held.append(guard.forbids(states, token))
            states = guard.after(states, token)
        assert all(one for one, is_inside in zip(held, inside, strict=True) if is_inside)
        if context in ("json_string", "code_block") or text.isascii():
            assert held == inside

    compare()
