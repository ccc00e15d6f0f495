"""How texts become tokens: words of any script, rouge-score's own, what stands between white space, characters, SQuAD's."""

import re
import string
import unicodedata
from collections.abc import Callable


def words(text: str) -> list[str]:
    composed = unicodedata.normalize("NFC", text.lower())
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in composed).split()


def ascii_words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def characters(text: str) -> list[str]:
    return [c for c in unicodedata.normalize("NFC", text.lower()) if not c.isspace()]


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "words": words,
    "ascii": ascii_words,
    "whitespace": str.split,
    "characters": characters,
}


def answer(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
