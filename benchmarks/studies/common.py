"""What the studies share: the two tasks, decoding in batches, and where results and figures go.

Every study is one command,
``PYTHONPATH=benchmarks python benchmarks/studies/NAME.py``, that decodes development prompts for real, writes
``benchmarks/results/studies/NAME-LABEL.json`` and draws ``docs/images/studies/NAME-LABEL.png`` from it.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import riskcal
from riskcal import ExitPolicy, efficiency
from riskcal.internal import replacing
from riskcal_adapters.torch import EarlyExitT5, load_t5

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "studies"
IMAGES = ROOT / "docs" / "images" / "studies"
#: What deciding on an exit costs in FLOPs; contrastive measures of one exit from the first layer on reuse earlier heads.
PREDICTOR = {"state": "none", "oracle": "none", "static": "none", "classifier": "classifier"}
#: Thresholds of measures whose confidences spread over [0, 1], denser near 1; others get quantiles of training prompts.
PROBABILITIES = ("softmax", "max")
GRID = (1.0, 0.9999, 0.999, 0.99, 0.97, 0.95, *(round(0.9 - 0.05 * i, 2) for i in range(18)))


@dataclass(frozen=True)
class Task:
    """Prompts with references; distances count ``units`` of an output."""

    prompts: list[str]
    references: list[list[str]]
    pilot: list[str]  #: training prompts, to choose thresholds on
    units: Callable[[str], Sequence[str]]
    unit: str
    max_new_tokens: int

    def distance(self, early: str, full: str) -> float:
        """Edit distance over the longer output's length."""
        return float(Levenshtein.normalized_distance(self.units(early), self.units(full)))

    def edits(self, output: str, references: Sequence[str]) -> tuple[int, int]:
        """Edits to the reference that suits the output best, and that reference's length."""
        said = self.units(output)
        both = [
            (Levenshtein.distance(said, self.units(text)), len(self.units(text)))
            for text in references
        ]
        return min(both, key=lambda pair: pair[0] / pair[1])


def g2p(n: int | None) -> Task:
    """Development words of the pronouncing dictionary, 750 by default."""
    from recipes.g2p import data
    from recipes.g2p.evaluate import MAX_NEW_TOKENS

    parts = data.splits(data.read_dictionary(data.dictionary_path()))
    some = slice(n or 750)
    words = parts["development"]
    pilot = parts["train"].words[:200]
    return Task(
        words.words[some], words.pronunciations[some], pilot, str.split, "phoneme", MAX_NEW_TOKENS
    )


def numbers(n: int | None) -> Task:
    """Names of development numbers in three languages, letter by letter, 200 by default."""
    from recipes.numbers import data
    from recipes.numbers.train import MAX_NEW_TOKENS

    drawn = data.draw("development", n or 200)
    pilot = data.draw("train", 50, seed=1).prompts
    return Task(
        drawn.prompts, [[name] for name in drawn.names], pilot, list, "letter", MAX_NEW_TOKENS
    )


TASKS = {"g2p": g2p, "numbers": numbers}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that studies share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", choices=TASKS, default="g2p")
    made.add_argument(
        "--checkpoint", type=Path, help="default: the one that ships with the package"
    )
    made.add_argument(
        "--classifier",
        type=Path,
        help="exit classifier; default: the one beside the checkpoint, if any",
    )
    made.add_argument(
        "--label", help="name of the result, if the checkpoint is not the task's usual one"
    )
    made.add_argument("--words", type=int, help="prompts; default: 750 words, 200 numbers")
    return made


def load(options: argparse.Namespace) -> tuple[Task, EarlyExitT5]:
    """The task and its decoder, with the exit classifier that stands beside its weights, if one does."""
    torch.set_num_threads(1)
    task = TASKS[options.model](options.words)
    with resources.as_file(
        resources.files("riskcal_adapters") / options.model / "checkpoint"
    ) as shipped:
        if options.checkpoint is None and not shipped.exists():
            sys.exit(
                f"--checkpoint: no {options.model} model ships with this version; train one and give its folder"
            )
        return task, decoder_of(options.checkpoint or shipped, options.classifier)


def decoder_of(folder: Path, classifier_file: Path | None = None) -> EarlyExitT5:
    """A decoder from a folder."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    saved = classifier_file or folder / "classifier-independent.safetensors"
    classifier = argparse.Namespace(**load_file(saved)) if saved.exists() else None
    return EarlyExitT5(load_t5(folder), tokenizer, classifier=classifier)


@dataclass(frozen=True)
class Decoded:
    """Outputs of all prompts under one policy."""

    texts: list[str]
    exits: NDArray[np.int64]  #: (n, T), 0 after the end
    cpu_seconds: float

    @property
    def layers(self) -> float:
        """Mean over tokens."""
        return efficiency.layers_per_token(self.exits)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(n,) lengths, the end token included."""
        return np.count_nonzero(self.exits, axis=1)


def decode(decoder: EarlyExitT5, task: Task, policy: ExitPolicy, batch_size: int = 250) -> Decoded:
    """Real early-exit generation; rows are as if alone (CPU time is therefore that of a batch, not of a request)."""
    policy = policy.named()
    if policy.cache == "project" and policy.measure != "oracle" and policy.emits == "exit":
        policy = policy.model_copy(update={"batching": "regroup"})  # the same tokens, sooner
    texts: list[str] = []
    exits = []
    began = time.process_time()
    for start in range(0, len(task.prompts), batch_size):
        encoded = decoder.encode(task.prompts[start : start + batch_size])
        generation = decoder.generate(*encoded, policy=policy, max_new_tokens=task.max_new_tokens)
        texts += decoder.decode(generation.tokens)
        exits.append(generation.exit_layers.numpy())
    seconds = time.process_time() - began
    width = max(part.shape[1] for part in exits)
    padded = np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in exits])
    return Decoded(texts, padded, seconds)


def flops(
    decoder: EarlyExitT5, task: Task, decoded: Decoded, measure: str = "softmax", **settings: Any
) -> efficiency.Flops:
    """Decoder FLOPs, after the paper's formula."""
    _, mask = decoder.encode(task.prompts)
    return efficiency.decoder_flops(
        decoded.exits,
        efficiency.DecoderDimensions.from_config(decoder.model.config),
        mask.sum(1).numpy(),
        predictor=PREDICTOR.get(measure, "head"),
        **settings,
    )


def quality(task: Task, decoded: Decoded, full: Decoded) -> dict[str, float]:
    """Against the references: corpus error, mean error of prompts (at most 1 each), exact outputs; distance to the full model.

    Standard errors are over prompts: of the corpus error (a ratio, by its residuals), of the distance, and of the
    difference between the mean error and the full model's, prompt by prompt.
    """
    edits, whole = (
        np.array([task.edits(*pair) for pair in zip(of.texts, task.references, strict=True)])
        for of in (decoded, full)
    )
    distances = np.array(
        [task.distance(*pair) for pair in zip(decoded.texts, full.texts, strict=True)]
    )
    error = edits[:, 0].sum() / edits[:, 1].sum()
    risks, risks_full = (np.minimum(of[:, 0] / of[:, 1], 1) for of in (edits, whole))
    root = len(edits) ** 0.5
    return {
        "error": error,
        "error_se": root * (edits[:, 0] - error * edits[:, 1]).std() / edits[:, 1].sum(),
        "risk": risks.mean(),
        "excess_se": (risks - risks_full).std() / root,
        "exact": float((edits[:, 0] == 0).mean()),
        "distance": distances.mean(),
        "distance_se": distances.std() / root,
        "layers": decoded.layers,
        "tokens": float(decoded.tokens.mean()),
    }


def thresholds(
    decoder: EarlyExitT5, task: Task, measure: str, size: int = len(GRID)
) -> list[float]:
    """The grid of a measure, highest first, fixed before the development prompts are looked at."""
    if measure in PROBABILITIES:
        return [GRID[round(i)] for i in np.linspace(0, len(GRID) - 1, size)]
    confidence = pilot_confidences(decoder, task, measure)
    values = np.quantile(confidence, np.linspace(0.99, 0.02, size))
    return [float(value) for value in np.unique(np.round(values, 6))[::-1]]


def pilot_confidences(
    decoder: EarlyExitT5, task: Task, measure: str, **settings: Any
) -> NDArray[np.float64]:
    """Confidences at all exits below the last, on training prompts along the full model's path."""
    traces = decoder.trace(
        *decoder.encode(task.pilot),
        task.max_new_tokens,
        policy=ExitPolicy(measure=measure, **settings),
    )
    values = np.asarray(traces.confidence, dtype=np.float64)[:, :-1]
    return values[~np.isnan(values)]


def available(decoder: EarlyExitT5, measures: Sequence[str]) -> list[str]:
    """Those that this decoder has."""
    return [name for name in measures if name != "classifier" or decoder._classifier is not None]


def label(options: argparse.Namespace) -> str:
    """What a result is called after its study's name."""
    return str(options.label or options.model)


def save(
    study: str, options: argparse.Namespace, decoder: EarlyExitT5, task: Task, found: dict[str, Any]
) -> Path:
    """Write a study's numbers with the conditions they were measured under."""
    code = Path(riskcal.__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=code, capture_output=True, text=True, check=False
    ).stdout
    # files and folders by their names
    arguments = [re.sub("[^=]*/", "", given) for given in sys.argv[1:]]
    conditions = {
        "command": f"PYTHONPATH=benchmarks python benchmarks/studies/{study}.py {shlex.join(arguments)}".strip(),
        "commit": commit.strip(),
        "model": options.model,
        "label": label(options),
        "checkpoint": "shipped" if options.checkpoint is None else options.checkpoint.name,
        "weights": decoder.weights,
        "layers": decoder.n_layers,
        "prompts": len(task.prompts),
        "unit": task.unit,
        "seed": 0,
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{study}-{label(options)}.json"
    with replacing(path) as partial:
        partial.write_text(
            json.dumps({"conditions": conditions, **_rounded(found)}, indent=1) + "\n"
        )
    print(path.relative_to(ROOT), flush=True)
    return path


def _rounded(value: Any) -> Any:
    """Five significant digits, plain Python types."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_rounded(item) for item in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}")
    return value
