"""Running prompts down a grid of thresholds without generating anything twice, and the table that comes of it.

At one threshold prompts run in batches, those alike in length and depth together. A prompt is left out where its last run,
at a higher threshold, is known to be what this threshold gives as well: where no confidence that was too low then is high
enough now. The run would be the same computation, so it is the same row.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy
from riskcal_adapters.recording.prompts import Prompt
from riskcal_adapters.recording.protocol import Decoder, Generation

#: Columns of `table` that a recording needs while it goes on, and leaves out of its files.
WORKING = ("output", "same_above")


class Run(NamedTuple):
    """One prompt's generation under one policy."""

    output: str
    layers: float  # mean over its tokens
    tokens: int
    seconds: float
    same_above: float  # every threshold above this one, up to the run's own, gives this very run
    failed: bool | None = (
        None  # whether it is no output at all; None where the decoder does not say
    )


class Warmed:
    """A decoder that generates the first batch of each kind before a clock counts: it may compile for it.

    Kinds differ where a decoder may take another path or compile anew: one row or several, other shapes. Shapes are told apart as
    `riskcal_adapters.jax` rounds them: rows up to 1, 2, 4, 8 and multiples of 8, prompts up to powers of two from 16 tokens.

    Parameters
    ----------
    decoder : Decoder
    policies : sequence of ExitPolicy
        Each is generated once for each kind: the full model's and the lowest threshold's take all paths that there are.
    """

    def __init__(self, decoder: Decoder, policies: Sequence[ExitPolicy]) -> None:
        self.decoder, self._policies = decoder, policies
        self._kinds: set[tuple[int, ...]] = set()

    def up(self, encoded: tuple[Any, Any], batch: Sequence[Prompt]) -> bool:
        """Generate a batch if none of its kind was, and say whether it had to."""
        kind = _kind(encoded[0], len(batch))
        if kind in self._kinds:
            return False
        for policy in self._policies:
            assert policy.max_new_tokens is not None  # `Recording.policies` bound it
            with noting(batch, policy):
                generation = self.decoder.generate(
                    *encoded, policy=policy, max_new_tokens=policy.max_new_tokens
                )
                _numpy(generation.exit_layers)  # an accelerator would go on into the clock
        # last: a thread that shares the decoder must not count what still compiles
        self._kinds.add(kind)
        return True


def _kind(input_ids: Any, rows: int) -> tuple[int, ...]:
    room = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    width = getattr(input_ids, "shape", ())[-1:]
    return room, *(max(16, 1 << (tokens - 1).bit_length()) for tokens in width)


def next_runs(
    warmed: Warmed,
    policy: ExitPolicy,
    prompts: Sequence[Prompt],
    last: Sequence[Run] | None,
    batch_size: int,
    batch_done: Callable[[], object] = lambda: None,
) -> list[Run]:
    """Each prompt's run under a policy.

    ``last`` are the runs at the next higher threshold, before the first threshold the full model's; None for these.
    """
    if last is None:
        changed = sorted(range(len(prompts)), key=lambda i: len(prompts[i].text))
    else:
        changed = [i for i, run in enumerate(last) if run.same_above >= policy.threshold]
        # there a row depends on its batch: always all, in the order given
        if policy.batching != "deepest":
            changed.sort(key=lambda i: (last[i].tokens, last[i].layers))
    runs = dict(enumerate(last or ()))
    for start in range(0, len(changed), batch_size):
        batch = changed[start : start + batch_size]
        rows = [prompts[i] for i in batch]
        runs |= zip(batch, _generate(warmed, policy, rows, batch_done), strict=True)
        batch_done()
    return [runs[i] for i in range(len(prompts))]


def _generate(
    warmed: Warmed, policy: ExitPolicy, batch: Sequence[Prompt], beat: Callable[[], object]
) -> list[Run]:
    assert policy.max_new_tokens is not None  # `Recording.policies` bound it
    decoder = warmed.decoder
    with noting(batch, policy):
        encoded = decoder.encode([row.text for row in batch])
    if warmed.up(encoded, batch):
        beat()
    with noting(batch, policy):
        started = time.perf_counter()
        generation = decoder.generate(*encoded, policy=policy, max_new_tokens=policy.max_new_tokens)
        # inside the clock: an accelerator works on until its result is asked for
        exits = _numpy(generation.exit_layers)
        seconds = (time.perf_counter() - started) / len(batch)
        outputs = decoder.decode(generation.tokens)
    if exits.ndim != 2 or not len(exits) == len(outputs) == len(batch):
        raise RiskcalError(
            f"decoder: gave exit_layers of shape {exits.shape} and {len(outputs)} texts for {len(batch)} prompts; "
            "each needs one row."
        )
    generated = exits > 0
    tokens = generated.sum(1)
    failed = _failed(generation, len(batch))
    empty = (tokens == 0) & ~np.array([bool(one) for one in failed])
    if empty.any():
        prompt = batch[int(empty.argmax())].prompt
        raise RiskcalError(
            f"decoder: gave no token for prompt {prompt!r}; the end token counts as one. If its output failed, say so in the "
            "generation's `failed`."
        )
    if policy.is_full_model and (exits[generated] != decoder.n_layers).any():
        raise RiskcalError(
            f"decoder: left at layer {exits[generated].min()} of {decoder.n_layers} under the full model's policy; "
            "without a full model's output there is nothing to compare with."
        )
    # no token: nothing was saved
    layers = np.where(tokens > 0, exits.sum(1) / np.maximum(tokens, 1), decoder.n_layers)
    same_above = _same_above(generation, policy, exits.shape)
    return [
        # a time-out may not come again
        Run(output, depth, count, seconds, policy.threshold if lost else bound, lost)
        for output, depth, count, bound, lost in zip(
            outputs, layers.tolist(), tokens.tolist(), same_above.tolist(), failed, strict=True
        )
    ]


@contextmanager
def noting(batch: Sequence[Prompt], policy: ExitPolicy) -> Iterator[None]:
    """Where a decoder raises, say at which prompts, and what is no way out."""
    try:
        yield
    except RiskcalError:
        raise
    except Exception as error:
        ids = ", ".join(repr(row.prompt) for row in batch[:5]) + (", ..." if len(batch) > 5 else "")
        error.add_note(
            f"while recording prompt {ids} at threshold {policy.threshold:g}. Do not drop prompts that fail: the losses of what "
            "is left say nothing of new prompts. Let the decoder say `failed` of such a row, which counts as the worst loss."
        )
        raise


def _failed(generation: Generation, rows: int) -> list[bool | None]:
    if not hasattr(generation, "failed"):
        return [None] * rows
    failed = _numpy(generation.failed)
    if failed.shape != (rows,) or failed.dtype.kind != "b":
        raise RiskcalError(
            f"decoder: gave failed of shape {failed.shape} and type {failed.dtype} for {rows} prompts; each needs one true or "
            "false."
        )
    return list(map(bool, failed))


def _same_above(
    generation: Generation, policy: ExitPolicy, shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """The largest threshold below the policy's own at which a row would differ; its own where that is not known.

    At one position what a token of some confidence needs is monotone in the threshold, so that the largest refused confidence
    of each token decides. The full model looks at none.
    """
    unknown = np.full(shape[0], policy.threshold)
    if policy.is_full_model or policy.batching == "deepest" or not hasattr(generation, "refused"):
        return unknown
    refused = _numpy(generation.refused).astype(np.float64)
    if refused.shape != shape:
        raise RiskcalError(
            f"decoder: gave refused of shape {refused.shape}, but exit_layers of shape {shape}."
        )
    critical = policy.schedule.critical_threshold(refused, np.arange(shape[1]))
    same_above: NDArray[np.float64] = np.minimum(critical.max(axis=1), unknown)
    return same_above


def _numpy(values: Any) -> NDArray[Any]:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def table(
    prompts: Sequence[Prompt],
    policies: Sequence[ExitPolicy],
    runs: Sequence[Sequence[Run]],
    full: Sequence[Run],
    *,
    template: ExitPolicy,
    dissimilarity: Callable[[str, str], float],
    risk: Callable[[str, Sequence[str]], float] | None,
) -> pd.DataFrame:
    """One row per prompt and policy, prompt by prompt; ``runs`` (policies, prompts), ``full`` the full model's.

    ``template`` is any candidate: they differ in their thresholds alone, and the full model's coordinates mean nothing. The
    columns are those of `record`, and `WORKING`.
    """
    coordinates = template.to_columns()
    rows = []
    for i, prompt in enumerate(prompts):
        labels = {
            name: getattr(prompt, name)
            for name in ("cluster", "group")
            if getattr(prompt, name) is not None
        }
        known: dict[
            tuple[str, bool, bool], dict[str, float]
        ] = {}  # most outputs of a prompt are the same
        for policy, column in zip(policies, runs, strict=True):
            run, threshold, is_full = column[i], policy.threshold, policy.is_full_model
            lost = bool(run.failed)
            losses = known.get((run.output, is_full, lost))
            if losses is None:
                # the worst, if it or what it is compared with failed
                losses = {"dissimilarity": 0.0 if is_full else 1.0}
                if not (is_full or lost or full[i].failed):
                    distance = dissimilarity(run.output, full[i].output)
                    losses["dissimilarity"] = _in_unit(distance, "dissimilarity", prompt, threshold)
                if risk is not None:
                    value = 1.0 if lost else risk(run.output, prompt.references)
                    losses["risk"] = _in_unit(value, "risk", prompt, threshold)
                known[run.output, is_full, lost] = losses
            marks = {} if run.failed is None else {"failed": run.failed}
            costs = {
                "layers": run.layers,
                "tokens": run.tokens,
                "seconds": run.seconds,
                "source": "generated",
            }
            working = {"output": run.output, "same_above": run.same_above}
            rows.append(
                {
                    "prompt": prompt.prompt,
                    **labels,
                    **(coordinates | {"threshold": threshold}),
                    **losses,
                    **marks,
                    **costs,
                    **working,
                }
            )
    return pd.DataFrame(rows)


def _in_unit(value: Any, name: str, prompt: Prompt, threshold: float) -> float:
    loss = internal.number(value, f"{name}: prompt {prompt.prompt!r}, threshold {threshold:g}")
    if not -internal.TOLERANCE <= loss <= 1 + internal.TOLERANCE:
        raise RiskcalError(
            f"{name}: {loss:g} for prompt {prompt.prompt!r} at threshold {threshold:g} is outside [0, 1]; scale or clip it."
        )
    return min(max(loss, 0.0), 1.0)


def runs_of(rows: pd.DataFrame) -> list[Run]:
    """The runs of one policy as `table` wrote them, prompts in its order."""
    rows = rows if "failed" in rows else rows.assign(failed=None)
    return [Run(*values) for values in rows[list(Run._fields)].itertuples(index=False)]
