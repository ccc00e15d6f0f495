"""Every public name of the adapters has an example, in the form of numpydoc, and it gives what stands there."""

import functools
import importlib
import importlib.util

import pytest

from helpers import api_names, run_examples

#: Names whose examples do not run here, and why.
WITHOUT = dict.fromkeys(
    ["riskcal_adapters.torch.load_smollm2", "riskcal_adapters.torch.smollm2_parts"],
    "they need a package of 100 MB, and write 540 MB when first called",
)
#: What has to be installed, by the beginning of a name.
NEEDED = {
    "riskcal_adapters.record": "torch",
    "riskcal_adapters.generations": "torch",
    "riskcal_adapters.Decoder": "torch",
    "riskcal_adapters.torch.": "torch",
    "riskcal_adapters.jax.": "jax",
    "riskcal_adapters.jax.from_torch": "torch",
    "riskcal_adapters.texts.Distance": "rouge_score",
    "riskcal_adapters.texts.rouge_l": "rouge_score",
    "riskcal_adapters.texts.token_distance": "rapidfuzz",
    "riskcal_adapters.texts.token_error_rate": "rapidfuzz",
    "riskcal_adapters.texts.sentence_bleu": "sacrebleu",
    "riskcal_adapters.texts.chrf": "sacrebleu",
    "riskcal_adapters.validators.JsonSchema": "jsonschema",
}


@functools.cache
def loading_once(framework):
    """A framework's module, and its `load_example` that loads, and compiles, once for all examples."""
    module = importlib.import_module(f"riskcal_adapters.{framework}")
    return module, functools.cache(module.load_example)


@pytest.fixture(autouse=True)
def a_folder_of_its_own(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for framework in ("torch", "jax"):
        if importlib.util.find_spec(framework):
            module, load = loading_once(framework)
            monkeypatch.setattr(module, "load_example", load)
    if importlib.util.find_spec("jax"):
        request.getfixturevalue("barely_optimized")


@pytest.mark.parametrize("name", api_names("riskcal_adapters"))
def test_the_example_runs(name):
    for package in [needed for start, needed in NEEDED.items() if name.startswith(start)]:
        pytest.importorskip(package)
    assert run_examples(name) or name in WITHOUT


def test_what_runs_no_example_is_still_public():
    assert set(WITHOUT) <= set(api_names("riskcal_adapters"))
