"""Rows 18 and 23 of the acceptance table: what the committed studies must show, and that their measurements are right."""

import json
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results" / "studies").glob("*.json"))


def result(name: str) -> dict:
    return json.loads((BENCHMARKS / "results" / "studies" / f"{name}.json").read_text())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_says_how_it_was_measured(path):
    conditions = json.loads(path.read_text())["conditions"]
    assert {"command", "commit", "model", "weights", "prompts", "seed"} <= set(conditions)
    assert (BENCHMARKS / "studies" / f"{path.stem.rpartition('-')[0]}.py").exists()
    assert (BENCHMARKS.parent / "docs" / "images" / "studies" / f"{path.stem}.png").exists()


def test_row_18_a_wrong_token_hurts_more_the_earlier_it_stands():
    rows = [
        row for row in result("perturbation-g2p")["rows"] if row["kind"] == "sampling-based" and row["outputs"] >= 100
    ]
    rows.sort(key=lambda row: row["position"])
    similarity = np.array([row["similarity"] for row in rows])
    assert len(similarity) >= 4
    assert np.corrcoef(np.arange(len(similarity)), similarity)[0, 1] > 0.5
    assert similarity[0] < similarity[-1]


def test_row_23_the_final_token_ranks_first_at_the_last_layer():
    for model in result("ranks-g2p")["models"].values():
        last = model["layers"][-1]
        assert last["rank"] == [1.0] * 5
        assert last["mean_rank"] == last["agreement"] == 1.0
        agreement = [layer["agreement"] for layer in model["layers"]]
        assert agreement[0] < agreement[-2] <= 1.0
        for layer in model["layers"]:  # accuracy over confidence: all tokens fall into some bin
            assert sum(layer["bin_counts"]) == model["tokens"]
