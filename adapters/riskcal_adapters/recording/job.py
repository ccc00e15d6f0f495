"""What is recorded, as all workers know it: one `Recording` for all, and a `Shard` of its prompts for each job."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from riskcal import RiskcalError, internal
from riskcal.calibration import TESTS
from riskcal.policy import ExitPolicy, Stop
from riskcal_adapters import request_checks
from riskcal_adapters.fingerprint import BINDING, binding
from riskcal_adapters.generation_config import DEFAULT_LENGTH
from riskcal_adapters.recording.prompts import Prompt
from riskcal_adapters.recording.protocol import Decoder

#: What to do about a policy that cannot be recorded depth-wise.
WITHOUT_ENGINE = "record without engine=True (--engine)"


@dataclass(frozen=True)
class Recording:
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
    engine: bool = False  # whether batches decode depth-wise: the same rows, sooner
    patience: float | None = None  # seconds; None where no pool has to be watched
    length_given: bool = True  # whether the caller named the length limit

    @property
    def pulse(self) -> Path:
        """A file that workers touch whenever a batch is done."""
        return self.out / ".pulse"

    def beat(self) -> None:
        """Tell who waits that this process goes on."""
        if self.patience is not None:
            with suppress(OSError):  # what is written next will say why
                self.pulse.touch()

    def model(self, decoder: Decoder) -> dict[str, Any]:
        """What a policy says of the model that it is for, where the decoder offers it."""
        read = [
            name
            for name in BINDING
            if name != "classifier_weights" or self.template.measure == "classifier"
        ]
        return {
            "n_layers": int(decoder.n_layers),
            **{name: binding(decoder, name) for name in read},
        }

    def policies(self, decoder: Decoder) -> list[ExitPolicy]:
        """The full model, then the candidates from the highest threshold down, bound to the decoder and the length limit."""
        bound = {"max_new_tokens": self.max_new_tokens, **self.model(decoder)}
        candidate = self.template.model_copy(update=bound)
        full = ExitPolicy(
            sampling=self.template.sampling,
            **bound | {"classifier_weights": None, "head_weights": None},
        ).named()
        return [
            full,
            *(candidate.model_copy(update={"threshold": value}) for value in self.thresholds),
        ]


@dataclass(frozen=True)
class Shard:
    """One job: consecutive prompts that share a file."""

    plan: Recording
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


def length(given: int | None, policy: ExitPolicy | None) -> int:
    """The length limit: the caller's, else the policy's, else the decoders' default."""
    if given is not None:
        return internal.count(given, "max_new_tokens", least=1)
    return (
        DEFAULT_LENGTH if policy is None or policy.max_new_tokens is None else policy.max_new_tokens
    )


def template(given: ExitPolicy | None, max_new_tokens: int) -> ExitPolicy:
    """The policy that all candidates share but for the threshold."""
    policy = ExitPolicy() if given is None else given
    if policy.thresholds is not None:
        raise RiskcalError(
            "policy: has thresholds per layer; give a template without, for thresholds= to fill in."
        )
    if policy.max_new_tokens not in (None, max_new_tokens):
        raise RiskcalError(
            f"max_new_tokens: {max_new_tokens}, but {policy.max_new_tokens} in the policy; give the same to both."
        )
    shared = policy.model_copy(
        update={"certificate": None, "threshold": np.inf, "max_new_tokens": max_new_tokens}
    )
    return shared.named()


def descending(thresholds: ArrayLike) -> tuple[float, ...]:
    """A grid of distinct finite thresholds, from the highest down."""
    try:
        grid = internal.threshold_grid(thresholds, allow_full=True)
    except RiskcalError as error:
        raise RiskcalError(
            f"{error} The full model is recorded beside them for every prompt."
        ) from None
    if np.isposinf(grid).any():
        raise RiskcalError(
            f"thresholds: inf at index {internal.first(np.isposinf(grid))}; the full model is recorded for every "
            "prompt anyway: leave it out."
        )
    return tuple(np.sort(grid)[::-1].tolist())


def check_stop(plan: Recording, prompts: Sequence[Prompt]) -> None:
    """Refuse now what `riskcal.calibrate` would refuse after hours of generating."""
    stop = plan.stop
    if stop is None:
        return
    internal.choice(stop.test, "test", TESTS)
    if stop.objective != "textual" and plan.risk is None:
        raise RiskcalError(
            f"stop: objective {stop.objective!r} is about a risk; give risk= as well."
        )
    if len({row.prompt if row.cluster is None else row.cluster for row in prompts}) < 2:
        raise RiskcalError("stop: a test needs at least two prompts (or clusters of them).")


def check_engine(plan: Recording) -> None:
    """Refuse, before anything is loaded or written, a policy whose rows an engine would decode otherwise or not at all."""
    if plan.engine:
        request_checks.fit_for_engine(plan.template, "policy", WITHOUT_ENGINE)
