"""Recording with the shipped model, and with one that was never trained."""

import copy
import warnings

import pandas as pd
import pytest

pytest.importorskip("torch")

import torch

from riskcal.policy import ExitPolicy, Sampling
from riskcal_adapters import record
from riskcal_adapters.torch import EarlyExitT5, load_example

WORDS = "calm early exit model token layer risk prompt noise batch depth grid cache state head word loss test fast slow".split()
COLUMNS = ["prompt", "threshold", "dissimilarity", "layers", "tokens"]
TEMPLATES = {
    "default": ExitPolicy(),
    "regrouped": ExitPolicy(batching="regroup"),
    "exact cache": ExitPolicy(cache="deferred", max_pending=2),
    "sampled": ExitPolicy(sampling=Sampling(seed=3)),
    "saturation": ExitPolicy(measure="state", min_layer=2),
}


@pytest.fixture(scope="module")
def decoder():
    return load_example("g2p")


class Closed:
    """The same decoder, which does not say what it refused."""

    def __init__(self, decoder):
        self.decoder, self.n_layers, self.weights = decoder, decoder.n_layers, decoder.weights
        self.encode, self.decode = decoder.encode, decoder.decode

    def generate(self, *encoded, **settings):
        whole = self.decoder.generate(*encoded, **settings)
        return type("Generation", (), {"tokens": whole.tokens, "exit_layers": whole.exit_layers})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_grid_recorded_cheaply_is_the_grid_run_one_by_one(tmp_path, decoder, name):
    settings = {"policy": TEMPLATES[name], "max_new_tokens": 12, "progress": False}
    grid = [0.9, 0.8, 0.5, 0.3, 0.2, 0.0]
    cheap = record(WORDS[:10], lambda: decoder, grid, tmp_path / "cheap", batch_size=6, **settings)
    plain = record(WORDS[:10], lambda: Closed(decoder), grid, tmp_path / "plain", **settings)
    tables = [pd.read_parquet(out / "runs-00000.parquet")[COLUMNS] for out in (cheap, plain)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0]["layers"].nunique() > 5


def test_random_weights_are_warned_of_and_the_shipped_ones_are_not(tmp_path, decoder):
    settings = {"max_new_tokens": 12, "batch_size": 20, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(WORDS, lambda: decoder, [0.9, 0.5, 0.0], tmp_path / "trained", **settings)
    shuffled = copy.deepcopy(decoder.model)  # fresh weights would say the same to every prompt
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in shuffled.parameters():
            weight.copy_(
                weight.flatten()[torch.randperm(weight.numel(), generator=generator)].view_as(
                    weight
                )
            )
    random = EarlyExitT5(shuffled, decoder.tokenizer)
    with pytest.warns(UserWarning, match=r"chance level.*train its early exits"):
        record(WORDS, lambda: random, [0.9, 0.5, 0.0], tmp_path / "random", **settings)
