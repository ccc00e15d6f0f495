"""The stress patterns of the CMU Pronouncing Dictionary: spelling in, one class out.

A pattern has a digit for each syllable: 1 where the main stress is, 2 where a lesser one is, 0 where none is, so that
"calibrate" is ``102``. The data file is that of `recipes.g2p.data`, under the licence that is named there.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
LONGEST = 20
#: Patterns with a class of their own; one more class is for all the others.
COMMON = 40
#: Words that the network is never trained on, and that are recorded.
HELD_OUT = 6000


class Words(NamedTuple):
    """Words, and the listed patterns of each, the dictionary's first one first."""

    words: list[str]
    patterns: list[list[str]]


def read_patterns(path: Path) -> dict[str, list[str]]:
    """Map each word of 2 to 20 letters or apostrophes to its distinct stress patterns."""
    entries: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        headword, _, phonemes = line.split("#")[0].strip().partition(" ")
        word = re.sub(r"\(\d+\)$", "", headword)
        pattern = re.sub(r"\D", "", phonemes)
        if not pattern or not re.fullmatch(rf"[a-z']{{2,{LONGEST}}}", word):
            continue
        if pattern not in entries.setdefault(word, []):
            entries[word].append(pattern)
    return entries


def split(entries: dict[str, list[str]], *, seed: int = 0) -> tuple[Words, Words]:
    """Words to train on and words held out, by a permutation of ``seed``; inflections of a stem can fall on both sides."""
    words = sorted(entries)
    shuffled = [words[i] for i in np.random.default_rng(seed).permutation(len(words))]
    parts = shuffled[HELD_OUT:], shuffled[:HELD_OUT]
    held_in, held_out = (Words(part, [entries[word] for word in part]) for part in parts)
    return held_in, held_out


def common_patterns(trained_on: Words) -> list[str]:
    """The most frequent patterns of the training words, whose places are their classes."""
    counted = Counter(listed[0] for listed in trained_on.patterns)
    return sorted(counted, key=lambda pattern: (-counted[pattern], pattern))[:COMMON]


def classes(listed: Sequence[str], common: Sequence[str]) -> list[int]:
    """The classes of a word's patterns; all that are not common are the last class."""
    return [common.index(pattern) if pattern in common else len(common) for pattern in listed]


def letters(words: Sequence[str]) -> NDArray[np.int64]:
    """Letters as numbers (n, 20), from 1; 0 fills up on the left, since English counts syllables from a word's end."""
    table = np.zeros((len(words), LONGEST), dtype=np.int64)
    for row, word in zip(table, words, strict=True):
        row[LONGEST - len(word) :] = [LETTERS.index(letter) + 1 for letter in word]
    return table
