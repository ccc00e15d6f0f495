"""What traces say of a prompt beside its decisions: its cluster and text, and whether its output failed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal._validate import RiskcalError
from riskcal.records import columns, reading, truths

#: The columns that the runs of a replay have, too; ``group`` is a token's class there.
NAMES = ("cluster", "text", "failed")


def of_rows(
    given: Mapping[str, Any], ids: NDArray[Any], code: NDArray[np.intp]
) -> dict[str, NDArray[Any]]:
    """Labels of each row, (N,), as far as given; of prompts that ``code`` numbers, in whose rows they may not change."""
    found = {
        name: columns.series(value, name) for name, value in given.items() if value is not None
    }
    if not found:
        return {}
    for name, column in found.items():
        if len(column) != len(ids):
            raise RiskcalError(
                f"{name}: has shape ({len(column)},); expected ({len(ids)},), one entry per token."
            )
    frame = pd.DataFrame({"prompt": ids, **found})
    failed = {"failed": truths.of(found.pop("failed"), "failed")} if "failed" in found else {}
    labels = {
        name: reading.label_of(frame, name, code, int(code.max()) + 1)[code] for name in found
    }
    return labels | failed


def of_prompts(
    labels: Mapping[str, NDArray[Any]], start: NDArray[np.intp]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
    """Cluster and text of each prompt, (n,), whose rows begin at ``start`` (n + 1,), and where any row's output failed."""
    first = start[:-1]
    own = {name: label[first] for name, label in labels.items() if name != "failed"}
    if "failed" not in labels:
        return own, np.zeros(len(first), dtype=bool)
    return own, np.logical_or.reduceat(labels["failed"], first)
