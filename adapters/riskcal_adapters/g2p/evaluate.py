"""How good every exit of a grapheme-to-phoneme model is, by real early-exit decoding."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
from rapidfuzz.distance import Levenshtein

from riskcal import ExitPolicy

if TYPE_CHECKING:
    from riskcal_adapters.g2p.data import Split
    from riskcal_adapters.recording import Decoder

THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
#: The longest listed pronunciation has 19 phonemes and an end; a decoder that loops is stopped soon after.
MAX_NEW_TOKENS = 24


def policies(n_layers: int) -> dict[str, ExitPolicy]:
    """The full model, every static exit, and a range of thresholds, by name."""
    static = {f"static {k}": ExitPolicy(thresholds={k: 0.0}) for k in range(1, n_layers)}
    adaptive = {f"threshold {value:g}": ExitPolicy(threshold=value) for value in THRESHOLDS}
    return {"full model": ExitPolicy.full_model()} | static | adaptive


def evaluate(decoder: "Decoder", words: "Split", *, batch_size: int = 128) -> pd.DataFrame:
    """Phoneme error, word accuracy and depth of each policy.

    Returns
    -------
    DataFrame
        ``phoneme_error``: edits over reference phonemes, summed over words, each against the listed pronunciation that
        suits it best; ``word_accuracy``; ``distance``: mean normalised edit distance to the full model's output;
        ``layers``: mean exit layer over generated tokens.
    """
    rows = []
    reference: list[str] | None = None
    for name, policy in policies(decoder.n_layers).items():
        outputs: list[str] = []
        depth = tokens = 0
        for start in range(0, len(words.words), batch_size):
            encoded = decoder.encode(words.words[start : start + batch_size])
            generation = decoder.generate(*encoded, policy=policy, max_new_tokens=MAX_NEW_TOKENS)
            outputs += decoder.decode(generation.tokens)
            depth += int(generation.exit_layers.sum())
            tokens += int((generation.exit_layers > 0).sum())
        reference = outputs if reference is None else reference
        rows.append({"policy": name, **errors(outputs, words.pronunciations, reference), "layers": depth / tokens})
    return pd.DataFrame(rows)


def errors(outputs: Sequence[str], pronunciations: Sequence[Sequence[str]], full: Sequence[str]) -> dict[str, float]:
    """Corpus phoneme error, word accuracy, and mean distance to the full model's outputs."""
    edits = length = 0
    for output, listed in zip(outputs, pronunciations, strict=True):
        best_edits, best_length = math.inf, 1
        for pronunciation in listed:
            spoken = pronunciation.split()
            distance = Levenshtein.distance(output.split(), spoken)
            if distance * best_length < best_edits * len(spoken):
                best_edits, best_length = distance, len(spoken)
        edits, length = edits + int(best_edits), length + best_length
    distances = [
        Levenshtein.normalized_distance(output.split(), whole.split())
        for output, whole in zip(outputs, full, strict=True)
    ]
    exact = [output in listed for output, listed in zip(outputs, pronunciations, strict=True)]
    return {
        "phoneme_error": edits / length,
        "word_accuracy": sum(exact) / len(exact),
        "distance": sum(distances) / len(distances),
    }
