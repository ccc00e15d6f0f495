"""Losses of one output text, in [0, 1]: for each measure a distance between two outputs, and a risk against references.

A *score* is a function of a candidate and a reference, from 0 to 1, 1 being best. ``Distance(score)`` makes it a
dissimilarity and ``Risk(score)`` a risk, as `riskcal_adapters.record` takes them; both are ready-made for the scores here.
"""

import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

from riskcal import RiskcalError, internal
from riskcal_adapters import text_tokens

Score = Callable[[str, str], float]


@dataclass(frozen=True)
class Distance:
    """Dissimilarity of two outputs: 1 - score of the early one against the full model's; 0 for equal texts, whatever the score.

    Parameters
    ----------
    score : callable
        ``score(candidate, reference)`` in [0, 1]. For a pool of processes it must be picklable: a function of a module, a
        `functools.partial` of one, or a `Learned`.

    Raises
    ------
    RiskcalError
        When called, if the score is not in [0, 1].

    Examples
    --------
    >>> from riskcal_adapters.texts import Distance, rouge_l
    >>> distance = Distance(rouge_l)
    >>> round(distance("the cat sat", "the cat sat down"), 3), distance("same", "same")
    (0.143, 0.0)
    """

    score: Score

    def __call__(self, early: str, full: str) -> float:
        return 0.0 if early == full else 1.0 - _checked(self.score, early, full)


@dataclass(frozen=True)
class Risk:
    """Risk of an output: 1 - its best score against any of the references.

    Parameters
    ----------
    score : callable
        As for `Distance`.

    Raises
    ------
    RiskcalError
        When called, if the score is not in [0, 1] or there is no reference.

    Examples
    --------
    >>> from riskcal_adapters.texts import Risk, exact_match
    >>> Risk(exact_match)("Paris.", ["Paris", "the city of Paris"])
    0.0
    """

    score: Score

    def __call__(self, output: str, references: str | Sequence[str]) -> float:
        return 1.0 - max(
            _checked(self.score, output, reference) for reference in _several(references)
        )


@dataclass(frozen=True)
class Learned:
    """A score by a model, which each process loads when it first needs it; clipped to [0, 1].

    Parameters
    ----------
    load : callable
        ``load(*arguments)`` returns ``score(candidate, reference) -> float``. A function of a module, so that processes
        find it; only its name and the arguments travel, never the model.
    arguments : tuple
        Hashable: names of checkpoints and the like.

    Examples
    --------
    >>> from riskcal_adapters.texts import Distance, Learned
    >>> def cosine(checkpoint):
    ...     from sentence_transformers import SentenceTransformer
    ...     model = SentenceTransformer(checkpoint)
    ...     return lambda candidate, reference: float(model.similarity(*model.encode([candidate, reference])))
    >>> distance = Distance(Learned(cosine, ("all-MiniLM-L6-v2",)))  # record(..., dissimilarity=distance) loads the model
    """

    load: Callable[..., Score]
    arguments: tuple[Any, ...] = ()

    def __call__(self, candidate: str, reference: str) -> float:
        value = float(_loaded(self)(candidate, reference))
        if value != value:
            raise RiskcalError(
                f"score: is NaN for {candidate!r} against {reference!r}; give a number."
            )
        return min(1.0, max(0.0, value))


@lru_cache(maxsize=4)
def _loaded(learned: Learned) -> Score:
    """By value: every shard of a recording unpickles a `Learned` of its own."""
    return learned.load(*learned.arguments)


def _checked(score: Score, candidate: str, reference: str) -> float:
    value = float(score(candidate, reference))
    if not -internal.TOLERANCE <= value <= 1.0 + internal.TOLERANCE:
        raise RiskcalError(
            f"score: {value:g} for {candidate!r} against {reference!r} is outside [0, 1]; rescale it, 1 being best."
        )
    return min(1.0, max(0.0, value))


# ---- Scores


def rouge_l(candidate: str, reference: str, *, tokens: str = "words") -> float:
    """ROUGE-L: F1 of the longest common subsequence of tokens, as rouge-score computes it (no stemming).

    Parameters
    ----------
    candidate, reference : str
    tokens : {"words", "ascii", "whitespace", "characters"}
        ``"words"``: lower-case runs of letters, marks and digits of any script; for ASCII texts these are rouge-score's own
        tokens. ``"ascii"``: rouge-score's own tokens for any text: runs of a-z and 0-9. Letters with accents and other
        scripts *vanish*, so that different texts can count as equal; only for comparison with published figures.
        ``"whitespace"``: what stands between white space, as it is: phonemes, codes. ``"characters"``: each lower-case
        character but white space, for scripts that put no spaces between words.

    Returns
    -------
    float
        In [0, 1]; 1 for equal texts, else 0 if either has no token.

    Raises
    ------
    RiskcalError
        For an unknown ``tokens``.
    ImportError
        If rouge-score is not installed.

    Examples
    --------
    >>> from riskcal_adapters.texts import rouge_l
    >>> round(rouge_l("the cat sat", "the cat sat down"), 3)
    0.857
    """
    scorer = _rouge(internal.choice(tokens, "tokens", tuple(text_tokens.TOKENIZERS)))
    return (
        1.0
        if candidate == reference
        else float(scorer.score(reference, candidate)["rougeL"].fmeasure)
    )


def token_f1(candidate: str, reference: str) -> float:
    """F1 of the tokens that two answers share, as SQuAD defines it.

    Parameters
    ----------
    candidate, reference : str
        Compared in lower case, without ASCII punctuation and the articles a, an and the; tokens are what stands between
        white space, so this is no measure for scripts that put none between words.

    Returns
    -------
    float
        In [0, 1]. If either has no token, 1 if both have none, else 0 (SQuAD 2.0).

    Examples
    --------
    >>> from riskcal_adapters.texts import token_f1
    >>> round(token_f1("The Eiffel Tower, Paris", "Eiffel tower"), 3)
    0.8
    """
    said, wanted = text_tokens.answer(candidate), text_tokens.answer(reference)
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2.0 * shared / (len(said) + len(wanted))


def exact_match(candidate: str, reference: str) -> float:
    """1 if two answers are equal after SQuAD's normalisation (`token_f1`), else 0.

    Examples
    --------
    >>> from riskcal_adapters.texts import exact_match
    >>> exact_match("The Eiffel Tower.", "eiffel tower"), exact_match("a tower", "two towers")
    (1.0, 0.0)
    """
    return float(text_tokens.answer(candidate) == text_tokens.answer(reference))


def sentence_bleu(candidate: str, reference: str, *, tokenize: str = "13a") -> float:
    """Sentence BLEU of up to four words, by sacrebleu: exponential smoothing, short texts by their own longest n-grams.

    Parameters
    ----------
    candidate, reference : str
        The order matters: BLEU is a precision, with a penalty for a candidate that is shorter than its reference.
    tokenize : str
        sacrebleu's name of a tokenizer: ``"13a"``, ``"intl"``, ``"char"``, ``"zh"``, ``"none"`` (white space), ...

    Returns
    -------
    float
        In [0, 1]; 1 for equal texts, else 0 if either has no token.

    Raises
    ------
    RiskcalError
        If sacrebleu has no such tokenizer.
    ImportError
        If sacrebleu is not installed.

    Examples
    --------
    >>> from riskcal_adapters.texts import sentence_bleu
    >>> sentence_bleu("the cat sat", "the cat sat"), sentence_bleu("the cat sat", "the cat sat on it") < 0.6
    (1.0, True)
    """
    names = _library("sacrebleu.metrics", "sacrebleu").BLEU.TOKENIZERS
    internal.choice(tokenize, "tokenize", [name for name in names if name])
    return _sacrebleu("BLEU", candidate, reference, tokenize=tokenize, effective_order=True)


def chrf(candidate: str, reference: str, *, word_order: int = 0, whitespace: bool = False) -> float:
    """chrF2, the F-score of n-grams of up to six characters, by sacrebleu; needs no tokens and works for any script.

    Parameters
    ----------
    candidate, reference : str
        Case and accents count.
    word_order : int
        2 for chrF++, which also compares words and pairs of words.
    whitespace : bool
        Count spaces as characters. Without them chrF does not see where tokens end: for phonemes, "AA H" equals "A AH".

    Returns
    -------
    float
        In [0, 1]; 1 for equal texts, else 0 if either is empty.

    Raises
    ------
    ImportError
        If sacrebleu is not installed.

    Examples
    --------
    >>> from riskcal_adapters.texts import chrf
    >>> chrf("colour", "colour"), 0.3 < chrf("color", "colour") < 0.9
    (1.0, True)
    """
    return _sacrebleu("CHRF", candidate, reference, word_order=word_order, whitespace=whitespace)


@lru_cache
def _rouge(tokens: str) -> Any:
    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer
    return scorer(
        ["rougeL"], tokenizer=types.SimpleNamespace(tokenize=text_tokens.TOKENIZERS[tokens])
    )


def _sacrebleu(metric: str, candidate: str, reference: str, **options: Any) -> float:
    scorer = _sacrebleu_metric(metric, **options)
    return (
        1.0
        if candidate == reference
        else min(1.0, scorer.sentence_score(candidate, [reference]).score / 100.0)
    )


@lru_cache
def _sacrebleu_metric(metric: str, **options: Any) -> Any:
    return getattr(_library("sacrebleu.metrics", "sacrebleu"), metric)(**options)


# ---- Token edit distance


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

    Examples
    --------
    >>> from riskcal_adapters.texts import token_distance
    >>> token_distance("K AA M", "K AA L M")
    0.25
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
    RiskcalError
        If there is no reference.
    ImportError
        If rapidfuzz is not installed.

    Examples
    --------
    >>> from riskcal_adapters.texts import token_error_rate
    >>> token_error_rate("K AA M", ["K AO M", "K AA L M"])  # to the nearest reference
    0.25
    """
    levenshtein = _levenshtein()
    said = output.split()
    wanted = [reference.split() for reference in _several(references)]
    rates: list[float] = [
        levenshtein.distance(said, tokens) / max(1, len(tokens)) for tokens in wanted
    ]
    return min(1.0, min(rates))


def _several(references: str | Sequence[str]) -> Sequence[str]:
    if not references and not isinstance(references, str):
        raise RiskcalError("references: there is none; give at least one text to compare with.")
    return [references] if isinstance(references, str) else references


def _levenshtein() -> types.ModuleType:
    return _library("rapidfuzz.distance.Levenshtein", "rapidfuzz", extras=("torch", "text"))


def _library(module: str, name: str, extras: Sequence[str] = ("text",)) -> types.ModuleType:
    try:
        return import_module(module)
    except ImportError:
        install = " or ".join(f"pip install 'riskcal-ltt[{extra}]'" for extra in extras)
        raise ImportError(f"this text loss needs {name}: {install}") from None


# ---- Ready-made

rouge_l_distance, rouge_l_risk = Distance(rouge_l), Risk(rouge_l)
token_f1_distance, token_f1_risk = Distance(token_f1), Risk(token_f1)
exact_match_distance, exact_match_risk = Distance(exact_match), Risk(exact_match)
sentence_bleu_distance, sentence_bleu_risk = Distance(sentence_bleu), Risk(sentence_bleu)
chrf_distance, chrf_risk = Distance(chrf), Risk(chrf)

#: By the names that the command line knows them by: distance, and risk.
LOSSES: dict[str, tuple[Callable[[str, str], float], Callable[[str, Sequence[str]], float]]] = {
    "token-errors": (token_distance, token_error_rate),
    "rouge-l": (rouge_l_distance, rouge_l_risk),
    "token-f1": (token_f1_distance, token_f1_risk),
    "exact-match": (exact_match_distance, exact_match_risk),
    "bleu": (sentence_bleu_distance, sentence_bleu_risk),
    "chrf": (chrf_distance, chrf_risk),
}
