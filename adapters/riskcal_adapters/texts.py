"""Losses of one output text, in [0, 1]. Any function of the same arguments serves `riskcal_adapters.record` as well."""

import types
from collections.abc import Sequence


def token_distance(early: str, full: str) -> float:
    """Dissimilarity of two outputs: edit distance between their tokens over the longer one's length.

    Parameters
    ----------
    early, full : str
        Tokens are what stands between white space: words, or phonemes.

    Returns
    -------
    float
        In [0, 1]; 0 if the tokens are the same (also if there are none), 1 if they share none.

    Raises
    ------
    ImportError
        If rapidfuzz is not installed.
    """
    distance: float = _levenshtein().normalized_distance(early.split(), full.split())
    return distance


def token_error_rate(output: str, references: str | Sequence[str]) -> float:
    """Risk of an output: edit distance to a reference over the reference's length, clipped to 1.

    Parameters
    ----------
    output : str
        Tokens are what stands between white space.
    references : str or sequence of str
        At least one; of several the most favourable counts. Against a reference without tokens, the rate is 0 for an
        output without tokens and 1 for any other.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ImportError
        If rapidfuzz is not installed.
    """
    levenshtein = _levenshtein()
    said = output.split()
    wanted = [reference.split() for reference in ([references] if isinstance(references, str) else references)]
    rates: list[float] = [levenshtein.distance(said, tokens) / max(1, len(tokens)) for tokens in wanted]
    return min(1.0, min(rates))


def _levenshtein() -> types.ModuleType:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        extras = "pip install 'riskcal-ltt[torch]' or 'riskcal-ltt[text]'"
        raise ImportError(f"text losses need rapidfuzz: {extras}") from None
    return Levenshtein
