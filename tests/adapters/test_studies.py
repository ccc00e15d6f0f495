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
    assert (BENCHMARKS / "studies" / f"{path.stem.partition('-')[0]}.py").exists()
    assert (BENCHMARKS.parent / "docs" / "images" / "studies" / f"{path.stem}.png").exists()


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_result_is_on_the_page(path):
    page = (BENCHMARKS.parent / "docs" / "studies.md").read_text()
    assert f"images/studies/{path.stem}.png" in page


@pytest.mark.parametrize("label", ["g2p", "numbers"])
def test_row_18_a_wrong_token_hurts_more_the_earlier_it_stands(label):
    rows = [row for row in result(f"perturbation-{label}")["rows"] if row["kind"] == "sampling-based"]
    rows = [row for row in rows if row["outputs"] >= 100]
    rows.sort(key=lambda row: row["position"])
    similarity = np.array([row["similarity"] for row in rows])
    assert len(similarity) >= 4
    assert np.corrcoef(np.arange(len(similarity)), similarity)[0, 1] > 0.5
    first, last = rows[0], rows[-1]
    assert last["similarity"] - first["similarity"] > 2 * np.hypot(first["error"], last["error"])


@pytest.mark.parametrize(
    "path", [path for path in RESULTS if path.stem.startswith("ranks")], ids=lambda path: path.stem
)
def test_row_23_the_final_token_ranks_first_at_the_last_layer(path):
    for model in result(path.stem)["models"].values():
        last = model["layers"][-1]
        assert last["rank"] == [1.0] * 5
        assert last["mean_rank"] == last["agreement"] == 1.0
        agreement = [layer["agreement"] for layer in model["layers"]]
        assert agreement[0] < agreement[-2] <= 1.0
        for layer in model["layers"]:  # accuracy over confidence: all tokens fall into some bin
            assert sum(layer["bin_counts"]) == model["tokens"]


@pytest.mark.parametrize("label", ["g2p", "numbers"])
def test_fig_3_the_margin_beats_static_exits_of_its_depth_in_distance(label):
    rows = result(f"measures-{label}")["rows"]
    static = sorted((row["layers"], row["distance"]) for row in rows if row["series"] == "static")
    for row in rows:
        if row["series"] == "softmax" and 2 <= row["layers"] <= 4:
            at_its_depth = np.interp(row["layers"], *np.transpose(static))
            assert at_its_depth - row["distance"] > 2 * row["distance_se"]
