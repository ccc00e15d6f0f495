"""Small sums, products and greatest common divisors of `reasoning-gym`, drawn independently, as lines that a model goes on."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Families of questions: a data set of `reasoning-gym`, and what it is drawn with.
FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    "sums": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "tables": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "products": ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "gcd": ("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 60}),
}
#: Entry i of a data set has the set's seed plus i, so the sets are a million apart: else two families would share their draws.
QUESTIONS, APART = 0, 10**6


@dataclass(frozen=True)
class Question:
    """``23 * 7``, its answer, and the family that it is of."""

    family: str
    text: str
    answer: str


def drawn(family: str, count: int, number: int = QUESTIONS) -> list[Question]:
    """The first questions of a family in the data set of this number; number 0 is asked, the others are shown solved."""
    import reasoning_gym

    seed = APART * (len(FAMILIES) * number + list(FAMILIES).index(family))
    name, options = FAMILIES[family]
    entries = reasoning_gym.create_dataset(name, size=count, seed=seed, **options)
    return [Question(family, _short(family, entry), entry["answer"]) for entry in entries]


def mixed(count: int) -> list[Question]:
    """Questions of families drawn at random, each alike."""
    of = np.random.default_rng(QUESTIONS).choice(list(FAMILIES), count).tolist()
    waiting = {family: iter(drawn(family, of.count(family))) for family in FAMILIES}
    return [next(waiting[family]) for family in of]


def numbers(text: str) -> list[int]:
    """The numbers of a question, or those that an answer ends with."""
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _short(family: str, entry: dict[str, Any]) -> str:
    question = str(entry["question"])
    if family == "gcd":
        return "gcd({}, {})".format(*numbers(question))
    found = re.search(r"\d+ [*+-] \d+", question)
    assert found is not None, question
    return found[0]
