"""Rows 18 and 23 of the acceptance table: what the committed studies must show, and their measurements on a few words."""

import json
from pathlib import Path

import common
import numpy as np
import perturbation
import pytest
import ranks
import torch
from transformers import DynamicCache, EncoderDecoderCache

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
    rows = [
        row for row in result(f"perturbation-{label}")["rows"] if row["kind"] == "sampling-based"
    ]
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


# -- the measurements, on a few words, against Hugging Face's modules ---------------------------------------------------------


@pytest.fixture(scope="module")
def few_words():
    """Five words for the shipped model."""
    return common.load(common.parser(None).parse_args(["--words", "5"]))


@torch.inference_mode()
def layers_logits(model, ids, mask, inputs):
    """(L, B, T, V) by Hugging Face's forward pass; its last hidden state is normed already."""
    run = model(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=inputs,
        output_hidden_states=True,
        use_cache=False,
    )
    early = [model.decoder.final_layer_norm(state) for state in run.decoder_hidden_states[1:-1]]
    scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0
    return torch.stack([model.lm_head(state * scale) for state in early] + [run.logits])


def generated(model, ids, mask, prefix, limit):
    """(B, T) by Hugging Face's generate, after a prefix of chosen tokens."""
    start = torch.full((len(ids), 1), model.config.decoder_start_token_id)
    said = model.generate(
        input_ids=ids,
        attention_mask=mask,
        decoder_input_ids=torch.cat([start, prefix], 1),
        do_sample=False,
        num_beams=1,
        max_new_tokens=limit - prefix.shape[1],
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )
    return said[:, 1:]


def along_outputs(decoder, task):
    """Prompts and their mask, the full model's outputs (B, T), and all layers' logits along them."""
    ids, mask = decoder.encode(task.prompts)
    tokens = generated(decoder.model, ids, mask, ids[:, :0], task.max_new_tokens)
    start = torch.full((len(ids), 1), decoder.model.config.decoder_start_token_id)
    logits = layers_logits(decoder.model, ids, mask, torch.cat([start, tokens[:, :-1]], 1))
    return ids, mask, tokens, logits


def test_row_23_ranks_are_those_of_all_layers_logits(few_words):
    task, decoder = few_words
    found = ranks.of_model(decoder, task)
    *_, tokens, logits = along_outputs(decoder, task)
    real = tokens != 0
    assert found["tokens"] == real.sum()
    for layer, of_layer in zip(found["layers"], logits, strict=True):
        order = of_layer[real].argsort(-1, descending=True)
        rank = 1 + (order == tokens[real][:, None]).int().argmax(-1).numpy()
        assert layer["mean_rank"] == pytest.approx(rank.mean())
        assert layer["agreement"] == pytest.approx((rank == 1).mean())
        assert list(layer["rank"]) == np.quantile(rank, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()
        top = of_layer[real].softmax(-1).topk(2).values
        assert layer["margin"] == pytest.approx(float((top[:, 0] - top[:, 1]).mean()), abs=1e-5)


def test_row_18_a_disturbed_output_is_what_generate_says_after_the_wrong_token(few_words):
    task, decoder = few_words
    rows = perturbation.disturbed(decoder, task)
    ids, mask, tokens, logits = along_outputs(decoder, task)
    wrong = {
        "sampling-based": logits[-1].argsort(-1, descending=True)[..., 9],
        "layer-based": logits[0].argmax(-1),
    }
    full = decoder.decode(tokens)
    assert {row["kind"] for row in rows} == set(wrong)
    for row in rows:
        t, away = row["position"], []
        for i in torch.nonzero((tokens != 0).sum(1) > t).flatten().tolist():
            prefix = torch.cat([tokens[i : i + 1, :t], wrong[row["kind"]][i : i + 1, t : t + 1]], 1)
            if prefix[0, -1] == decoder.model.generation_config.eos_token_id:
                said = prefix
            else:
                said = generated(
                    decoder.model, ids[i : i + 1], mask[i : i + 1], prefix, task.max_new_tokens
                )
            away.append(task.distance(decoder.decode(said)[0], full[i]))
        assert row["outputs"] == len(away)
        assert row["similarity"] == pytest.approx(1 - np.mean(away))
