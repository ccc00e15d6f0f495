"""How good every exit of a grapheme-to-phoneme model is, by real early-exit decoding."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from rapidfuzz.distance import Levenshtein

from recipes.decoding_study import decode_policies, static_and_adaptive
from riskcal import ExitPolicy

if TYPE_CHECKING:
    from recipes.g2p.data import Split
    from riskcal_adapters.recording import Decoder

#: The longest listed pronunciation has 19 phonemes and an end; a decoder that loops is stopped soon after.
MAX_NEW_TOKENS = 24


def evaluate(
    decoder: "Decoder", words: "Split", policies: Mapping[str, ExitPolicy] | None = None
) -> pd.DataFrame:
    """Phoneme error, word accuracy, distance to the full model's output, and depth of each policy (see `decode_policies`).

    Without ``policies``: the full model, every static exit and a range of thresholds. The first one must be the full model.
    """
    return decode_policies(
        decoder,
        words.words,
        policies or static_and_adaptive(decoder.n_layers),
        lambda outputs: errors(outputs, words.pronunciations),
        MAX_NEW_TOKENS,
        split=str.split,
    )


def errors(outputs: Sequence[str], pronunciations: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus phoneme error and word accuracy.

    ``phoneme_error``: edits over reference phonemes, summed over words, each against the listed pronunciation that suits it
    best.
    """
    edits = length = 0
    for output, listed in zip(outputs, pronunciations, strict=True):
        best_edits, best_length = math.inf, 1
        for pronunciation in listed:
            spoken = pronunciation.split()
            distance = Levenshtein.distance(output.split(), spoken)
            if distance * best_length < best_edits * len(spoken):
                best_edits, best_length = distance, len(spoken)
        edits, length = edits + int(best_edits), length + best_length
    exact = [output in listed for output, listed in zip(outputs, pronunciations, strict=True)]
    return {"phoneme_error": edits / length, "word_accuracy": sum(exact) / len(exact)}
