"""What is recorded, as all workers know it, and the folder that holds it: which files, and the settings they were made with."""

import functools
import hashlib
import json
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.calibration import TESTS
from riskcal.policy import ExitPolicy, Stop
from riskcal.records import OBJECTIVES
from riskcal_adapters._prompts import Prompt
from riskcal_adapters.protocol import BINDING, Decoder, binding

SETTINGS_FILE = "recording.json"


@dataclass(frozen=True)
class Plan:
    """What all shards of a recording share. Travels to the workers."""

    out: Path
    load: Callable[[], Decoder]
    session: str
    template: ExitPolicy
    thresholds: tuple[float, ...]  # descending
    max_new_tokens: int
    batch_size: int
    dissimilarity: Callable[[str, str], float]
    risk: Callable[[str, Sequence[str]], float] | None
    traces: bool
    stop: Stop | None

    def model(self, decoder: Decoder) -> dict[str, Any]:
        """What a policy says of the model that it is for, where the decoder offers it."""
        read = [name for name in BINDING if name != "classifier_weights" or self.template.measure == "classifier"]
        return {"n_layers": int(decoder.n_layers), **{name: binding(decoder, name) for name in read}}

    def policies(self, decoder: Decoder) -> list[ExitPolicy]:
        """The full model, then the candidates from the highest threshold down, bound to the decoder and the length limit."""
        bound = {"max_new_tokens": self.max_new_tokens, **self.model(decoder)}
        candidate = self.template.model_copy(update=bound)
        full = ExitPolicy(sampling=self.template.sampling, **bound | {"classifier_weights": None})
        return [full, *(candidate.model_copy(update={"threshold": value}) for value in self.thresholds)]


@dataclass(frozen=True)
class Shard:
    """One job: consecutive prompts that share a file."""

    plan: Plan
    index: int
    prompts: tuple[Prompt, ...]

    @property
    def runs_path(self) -> Path:
        """Where its rows go."""
        return self.plan.out / f"runs-{self.index:05d}.parquet"

    @property
    def traces_path(self) -> Path:
        """Where its traces go."""
        return self.plan.out / "traces" / f"traces-{self.index:05d}.parquet"

    def column_path(self, candidate: int) -> Path:
        """Where its rows of one candidate wait until it is known which candidates there will be."""
        return self.plan.out / "unfinished" / f"runs-{self.index:05d}-{candidate:05d}.parquet"

    @property
    def finished(self) -> bool:
        """Whether all its files are there."""
        return self.runs_path.exists() and (not self.plan.traces or self.traces_path.exists())


def template(given: ExitPolicy | None, max_new_tokens: int) -> ExitPolicy:
    """The policy that all candidates share but for the threshold."""
    policy = ExitPolicy() if given is None else given
    if policy.thresholds is not None:
        raise RiskcalError("policy: has thresholds per layer; give a template without, for thresholds= to fill in.")
    if policy.max_new_tokens not in (None, max_new_tokens):
        raise RiskcalError(
            f"max_new_tokens: {max_new_tokens}, but {policy.max_new_tokens} in the policy; give the same to both."
        )
    return policy.model_copy(update={"certificate": None, "threshold": np.inf, "max_new_tokens": max_new_tokens})


def descending(thresholds: ArrayLike) -> tuple[float, ...]:
    """A grid of distinct finite thresholds, from the highest down."""
    try:
        grid = _validate.threshold_grid(thresholds, allow_full=True)
    except RiskcalError as error:
        raise RiskcalError(f"{error} The full model is recorded beside them for every prompt.") from None
    if np.isposinf(grid).any():
        raise RiskcalError(
            f"thresholds: inf at index {_validate.first(np.isposinf(grid))}; the full model is recorded for every "
            "prompt anyway: leave it out."
        )
    return tuple(np.sort(grid)[::-1].tolist())


def check_stop(plan: Plan, prompts: Sequence[Prompt]) -> None:
    """Refuse now what `riskcal.calibrate` would refuse after hours of generating."""
    stop = plan.stop
    if stop is None:
        return
    _validate.tolerance(stop.delta, *OBJECTIVES[stop.objective])
    _validate.choice(stop.test, "test", TESTS)
    if stop.objective != "textual" and plan.risk is None:
        raise RiskcalError(f"stop: objective {stop.objective!r} is about a risk; give risk= as well.")
    if len({row.prompt if row.cluster is None else row.cluster for row in prompts}) < 2:
        raise RiskcalError("stop: a test needs at least two prompts (or clusters of them).")


def open_folder(plan: Plan, prompts: Sequence[Prompt], shard_prompts: int) -> None:
    """Make sure that ``out`` holds this recording, new or begun, and nothing else."""
    out, file, settings = plan.out, plan.out / SETTINGS_FILE, _settings(plan, prompts, shard_prompts)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RiskcalError(f"{out}: cannot be used as a folder ({error.strerror}); give another path.") from None
    found = _read_settings(file) if file.exists() else None
    if found is None and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise RiskcalError(f"{out}: is not empty and holds no recording (no {SETTINGS_FILE}); give a new folder.")
    for folder in (out, out / "traces", out / "unfinished"):
        for left_behind in folder.glob(".*.partial"):
            left_behind.unlink(missing_ok=True)
    begun = any(next(out.glob(pattern), None) for pattern in ("runs-*", "traces/traces-*", "unfinished/runs-*"))
    if found is not None and begun:
        _refuse_other_settings(out, found, settings)
    else:  # a first try that recorded nothing must not block the next
        _write_settings(file, settings)
    if plan.traces:
        (out / "traces").mkdir(exist_ok=True)


def bind(plan: Plan, decoder: Decoder) -> None:
    """Note in the settings which model records, and refuse another one than began."""
    loaded = plan.model(decoder)
    for name, value in loaded.items():
        asked = getattr(plan.template, name)
        if asked not in (None, value):
            raise RiskcalError(
                f"{name}: {asked!r} in the policy, but the decoder has {value!r}; load the model that the policy is for, or "
                f"leave {name} out of it."
            )
    file = plan.out / SETTINGS_FILE
    found = _read_settings(file)
    _refuse_other_settings(plan.out, found, {name: value for name, value in loaded.items() if name in found})
    if not loaded.keys() <= found.keys():
        _write_settings(file, found | loaded)


def _settings(plan: Plan, prompts: Sequence[Prompt], shard_prompts: int) -> dict[str, Any]:
    """What decides the recorded tables: a folder holds one recording, with one set of these."""
    elsewhere = {"threshold", "thresholds", "certificate", "max_new_tokens"}
    return {
        "format": 3,
        "decoder": _name(plan.load),
        "policy": plan.template.model_dump(mode="json", exclude=elsewhere),
        "thresholds": list(plan.thresholds),
        "max_new_tokens": plan.max_new_tokens,
        "batch_size": plan.batch_size,
        "shard_prompts": shard_prompts,
        "dissimilarity": _name(plan.dissimilarity),
        "risk": None if plan.risk is None else _name(plan.risk),
        "traces": plan.traces,
        "stop": None if plan.stop is None else plan.stop.model_dump(mode="json"),
        "n_prompts": len(prompts),
        "prompts": hashlib.blake2b(json.dumps(prompts).encode(), digest_size=16).hexdigest(),
    }


def _name(function: Callable[..., Any]) -> str:
    """A name that is the same in the next process."""
    if isinstance(function, types.FunctionType | types.BuiltinFunctionType | type):
        return f"{function.__module__}.{function.__qualname__}"
    if isinstance(function, functools.partial):
        arguments = [repr(value) for value in function.args] + [f"{k}={v!r}" for k, v in function.keywords.items()]
        return _without_addresses(f"{_name(function.func)}({', '.join(arguments)})")
    return _without_addresses(repr(function))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RiskcalError(f"{file}: cannot be read ({error}); give another folder.") from None
    if not isinstance(found, dict):
        raise RiskcalError(f"{file}: does not describe a recording; give another folder.")
    return found


def _write_settings(file: Path, settings: dict[str, Any]) -> None:
    with _validate.replacing(file) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _refuse_other_settings(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            held, wants = found.get(name), value
            if (
                name == "config" and isinstance(held, dict) and isinstance(wants, dict)
            ):  # say what differs in them, and no more
                keys = [key for key in (*held, *wants) if held.get(key, ...) != wants.get(key, ...)]
                held, wants = ({key: one[key] for key in keys if key in one} for one in (held, wants))
            there, here = json.dumps(held), json.dumps(wants)
            if name == "format":
                raise RiskcalError(
                    f"{out}: holds a recording that another version of riskcal began (format {there}, now {here}); read it, or "
                    "finish it with that version, and record to another folder with this one."
                )
            if name == "prompts":
                there, here = "other texts, ids, references, clusters or groups", "these"
            raise RiskcalError(
                f"{name}: {there} in the recording that {out} holds, {here} now. Give the same to go on with it, or "
                "another folder."
            )
