"""Odd types under names of a log's own, in the column that orders retries, and before `riskcal check`: a result or a refusal."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from riskcal import RiskcalError, Runs, Traces
from riskcal.records.check import findings
from test_types_fuzz import N, containers, fine, kinds, runs_table

FORMULA = ("odd", "1 - x / 2")

#: What may be asked of a table with an odd column of that name.
ASKED: list[dict[str, Any]] = [
    {"columns": {"prompt": "odd", "first": "prompt"}},
    {"columns": {"threshold": "odd", "first": "threshold"}},
    {"columns": {"threshold": FORMULA, "first": "threshold"}},
    {"columns": {"dissimilarity": FORMULA, "first": "dissimilarity"}},
    {"columns": {"seconds": FORMULA, "first": "seconds"}, "keep": ("last", "layers_")},
    {"keep": ("last", "odd")},
    {"keep": ("first", "odd"), "columns": {"layers": "odd", "first": "layers"}},
    {"candidate_columns": ["odd"], "keep": ("last", "layers_")},
]


def test_odd_columns_give_runs_or_a_refusal_and_findings_where_they_are_refused() -> None:
    read = cases = 0
    for number, (kind, values) in enumerate(kinds(np.random.default_rng(0), N)):
        frame = runs_table().assign(layers_=range(N))
        frame["odd"] = values
        asked = ASKED[number % len(ASKED)]
        for container, table in list(containers(frame, number))[:1]:
            cases += 1
            try:
                accepted = fine(lambda t=table, a=asked: Runs.from_frame(t, **a))
            except Exception as error:
                pytest.fail(f"{kind} in {container}, {asked}: {type(error).__name__}: {error}")
            try:
                found = findings(table, **asked)
            except RiskcalError:
                assert not accepted
                continue
            except Exception as error:
                pytest.fail(f"check {kind}, {container}, {asked}: {type(error).__name__}: {error}")
            assert accepted == (found == []), f"{kind} in {container}, {asked}: {found}"
            read += accepted
    assert cases > 40
    assert 0.05 < read / cases < 0.95


def test_odd_columns_that_are_guessed_at_give_findings() -> None:
    """Names that `check` takes for riskcal's, whatever stands below them."""
    for kind, values in kinds(np.random.default_rng(1), N):
        frame = runs_table().rename(columns={"prompt": "request_id", "dissimilarity": "rougeL"})
        name = ["request_id", "rougeL", "threshold", "attempt"][len(kind) % 4]
        frame = frame.assign(attempt=0)
        frame[name] = values
        try:
            assert findings(frame)
        except RiskcalError:
            continue
        except Exception as error:
            pytest.fail(f"{kind} as {name}: {type(error).__name__}: {error}")


def test_odd_columns_give_traces_or_a_refusal() -> None:
    columns = {"prompt": "odd", "first": "prompt"}
    formula = {"confidence": FORMULA}
    for number, (kind, values) in enumerate(kinds(np.random.default_rng(2), N)):
        frame = pd.DataFrame({"prompt": [f"p{i}" for i in range(N)], "position": 0})
        frame["confidence_1"], frame["agrees_1"] = 0.5, True
        if number % 2:
            frame["odd_1"] = values
            frame = frame.drop(columns="confidence_1")
        else:
            frame["odd"] = values
        try:
            fine(
                lambda f=frame, n=number: Traces.from_frame(
                    f, columns=formula if n % 2 else columns
                )
            )
        except Exception as error:
            pytest.fail(f"{kind}: {type(error).__name__}: {error}")
