"""`record`: run an early-exit decoder over prompts and thresholds, and write down what it lost and what it cost.

Knows no framework: whatever offers `Decoder` can be recorded.
"""

import functools
import hashlib
import json
import os
import re
import threading
import time
import types
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from riskcal import _tables, _validate
from riskcal._validate import RiskcalError
from riskcal.policy import ExitPolicy
from riskcal.records import Traces
from riskcal.schedules import Decaying
from riskcal_adapters import texts

SETTINGS_FILE = "recording.json"


class Generation(Protocol):
    """What a decoder generated for a batch of B prompts; arrays of any framework that numpy can read."""

    @property
    def tokens(self) -> Any:
        """(B, T) ids, padded after the end."""

    @property
    def exit_layers(self) -> Any:
        """(B, T) layer at which each token left the decoder, 1..L; 0 where padded."""


class Decoder(Protocol):
    """What `record` asks of a decoder. It must be deterministic, and a row must not depend on its batch."""

    @property
    def n_layers(self) -> int:
        """Exit layers L; L is the full model."""

    def encode(self, texts: list[str]) -> tuple[Any, Any]:
        """``input_ids`` and ``attention_mask`` of a batch, padded."""

    def generate(self, input_ids: Any, attention_mask: Any, *, policy: ExitPolicy, max_new_tokens: int) -> Generation:
        """Greedy generation under one policy."""

    def decode(self, tokens: Any) -> list[str]:
        """One text per row, without special tokens."""

    def trace(self, input_ids: Any, attention_mask: Any, *, max_new_tokens: int, prompts: list[Any]) -> Traces:
        """Confidence and agreement of every layer along the full model's path. Only needed for ``traces=True``."""


class Pool(Protocol):
    """Anything that maps: process and thread pools, executors, ``ray.util.multiprocessing.Pool``."""

    def map(self, function: Callable[[Any], Any], iterable: Iterable[Any], /) -> Iterable[Any]:
        """Results, not futures."""


class Prompt(NamedTuple):
    """One prompt, checked."""

    text: str
    prompt: int | str
    references: tuple[str, ...] = ()
    cluster: int | str | None = None
    group: int | str | None = None


@dataclass(frozen=True)
class Plan:
    """What all shards of a recording share. Travels to the workers."""

    out: Path
    load: Callable[[], Decoder]
    session: str
    policies: tuple[ExitPolicy, ...]
    max_new_tokens: int
    batch_size: int
    dissimilarity: Callable[[str, str], float]
    risk: Callable[[str, Sequence[str]], float] | None
    traces: bool


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

    @property
    def finished(self) -> bool:
        """Whether all its files are there."""
        return self.runs_path.exists() and (not self.plan.traces or self.traces_path.exists())


def record(
    prompts: Any,
    load: Callable[[], Decoder],
    thresholds: ArrayLike,
    out: str | os.PathLike[str],
    *,
    pool: Pool | None = None,
    policy: ExitPolicy | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    shard_prompts: int = 64,
    dissimilarity: Callable[[str, str], float] = texts.token_distance,
    risk: Callable[[str, Sequence[str]], float] | None = None,
    traces: bool = False,
    progress: bool = True,
) -> Path:
    """Generate every prompt with the full model and at each threshold, and write the losses and costs to a folder.

    The folder holds ``runs-00000.parquet``, ``runs-00001.parquet``, ... with one row per prompt and candidate: the full
    model's first in each prompt, then the thresholds from the highest down. ``riskcal.Runs.read(out)`` reads them.
    Shards appear whole or not at all. A recording that was interrupted, in whatever way, goes on where it stopped when
    the same call is made again, and ends in the same tables but for the column ``seconds``. One call per folder at a
    time.

    Parameters
    ----------
    prompts : sequence of str, or table
        A table (DataFrame, dict of columns, any object with the Arrow PyCapsule interface) has a column ``text`` and
        optionally ``prompt`` (ids, integers or strings; default 0 to n - 1), ``references`` (a string or a list of
        strings per prompt), ``cluster`` (the independent unit, where prompts share a source) and ``group``.
    load : callable
        Returns a `Decoder`; called once in each worker process (once in all with threads, which share the decoder), and
        not at all if nothing is left to do. For a pool of processes it must be importable: a function of a module, or
        a `functools.partial` of one.
    thresholds : (k,) array_like
        Distinct finite numbers in any order, fixed before looking at these prompts. The full model is recorded anyway.
    out : path
        A new or empty folder, or one that holds a recording with the same settings.
    pool : optional
        Anything with ``.map(function, iterable)`` that returns results: ``multiprocessing.Pool``, the executors of
        ``concurrent.futures``, ``ray.util.multiprocessing.Pool``. Shards are its jobs. Default: this process.
    policy : ExitPolicy, optional
        Template: its measure, schedule and ``min_layer`` are used; each threshold in turn replaces its own.
    max_new_tokens : int
        Length limit of every generation.
    batch_size : int
        Prompts generated together, at one threshold, within a shard.
    shard_prompts : int
        Prompts per file: what an interruption costs each worker at most.
    dissimilarity : callable
        ``dissimilarity(early, full)`` in [0, 1] of two output texts; 0 by definition for the full model itself.
    risk : callable, optional
        ``risk(output, references)`` in [0, 1], `riskcal_adapters.texts.token_error_rate` for instance; ``references``
        is a tuple of strings.
    traces : bool
        Also write each exit's confidence and agreement along the full model's path, one file per shard in
        ``out/traces``, which ``riskcal.Traces.read`` reads.
    progress : bool
        Show a bar: prompts, or shards with a pool.

    Returns
    -------
    pathlib.Path
        ``out``.

    Raises
    ------
    RiskcalError
        Naming the column, the first offending row (from 0) and the remedy, for prompts that are missing, empty or not
        text, ids that repeat, a ``risk`` without references, thresholds that are none, not finite or not distinct, and
        a folder that holds something else or a recording with other settings; later, for a loss outside [0, 1] and a
        decoder that does not keep to the protocol.

    Warns
    -----
    UserWarning
        If one text stands under two ids of different clusters: such prompts are not independent.

    Notes
    -----
    Columns: ``prompt``; ``cluster`` and ``group`` where given; ``threshold`` (``inf`` is the full model);
    ``temperature``, ``max_length`` and ``form`` of a decaying schedule; ``min_layer``; ``measure``;
    ``dissimilarity``; ``risk`` where asked for; ``layers`` (mean exit layer over the generated tokens, the end token
    included); ``tokens``; ``seconds`` (wall-clock of ``generate``, a batch's divided by its rows); ``source``. Each
    worker generates its first batch twice before the clock counts, as first calls are slow.

    ``load``, ``dissimilarity`` and ``risk`` are known to a later call by their names only: after changing what stands
    behind a name, record to another folder.

    Examples
    --------
    >>> from functools import partial
    >>> from riskcal_adapters import record, torch
    >>> load = partial(torch.load_example, "g2p")
    >>> record(["calm", "early", "exit"], load, [0.5, 0.7, 0.9], "runs")  # doctest: +SKIP
    """
    rows = check_prompts(prompts, references=risk is not None)
    template = ExitPolicy() if policy is None else policy
    max_new_tokens = _validate.count(max_new_tokens, "max_new_tokens", least=1)
    shard_prompts = _validate.count(shard_prompts, "shard_prompts", least=1)
    plan = Plan(
        out=Path(out),
        load=load,
        session=uuid.uuid4().hex,
        policies=_candidates(template, thresholds, max_new_tokens),
        max_new_tokens=max_new_tokens,
        batch_size=_validate.count(batch_size, "batch_size", least=1),
        dissimilarity=dissimilarity,
        risk=risk,
        traces=traces,
    )
    _warn_of_repeated_texts(rows)
    _open_folder(plan, _settings(plan, rows, shard_prompts))
    shards = [Shard(plan, i, chunk) for i, chunk in enumerate(_chunks(rows, shard_prompts))]
    pending = [shard for shard in shards if not shard.finished]
    try:
        if pool is None:
            _record_serially(pending, total=len(rows), progress=progress)
        else:
            _record_with(pool, pending, total=len(shards), progress=progress)
    finally:
        _release(plan.session)
    return plan.out


def check_prompts(prompts: Any, *, references: bool = False) -> tuple[Prompt, ...]:
    """The prompts of `record` as rows, or a `RiskcalError` that names the column, the row (from 0) and the remedy.

    Parameters
    ----------
    prompts : sequence of str, or table
        As in `record`.
    references : bool
        Whether references are needed; if not, they are left out.
    """
    if isinstance(prompts, str):
        raise RiskcalError("prompts: a single string; give a list of strings, or a table with a column 'text'.")
    frame = _tables.from_object(prompts if _is_table(prompts) else _column(prompts))
    _tables.require(frame, ["text", "references"] if references else ["text"])
    for row, text in enumerate(frame["text"]):
        if not isinstance(text, str) or not text.strip():
            what = "is empty" if isinstance(text, str) else f"is {text!r}, not a string"
            raise RiskcalError(f"text: row {row} {what}; give every prompt a text, or drop the row.")
    columns: dict[str, list[Any]] = {"text": frame["text"].tolist(), "prompt": list(range(len(frame)))}
    for name in ("prompt", "cluster", "group"):
        if name in frame.columns:
            columns[name] = _tables.identifiers(frame[name], name).tolist()
    again = pd.Series(columns["prompt"]).duplicated().to_numpy()
    if again.any():
        row = int(again.argmax())
        raise RiskcalError(
            f"prompt: id {columns['prompt'][row]!r} stands twice, again at row {row}; give each prompt its own."
        )
    if references:
        columns["references"] = [_references(value, row) for row, value in enumerate(frame["references"])]
    return tuple(Prompt(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))


def _is_table(prompts: Any) -> bool:
    return isinstance(prompts, pd.DataFrame | Mapping) or hasattr(prompts, "__arrow_c_stream__")


def _column(prompts: Any) -> pd.DataFrame:
    if not np.iterable(prompts):
        kind = type(prompts).__name__
        raise RiskcalError(f"prompts: a {kind}; give a list of strings, or a table with a column 'text'.")
    return pd.DataFrame({"text": pd.Series(list(prompts), dtype=object)})


def _references(value: Any, row: int) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else list(value) if np.iterable(value) else []
    if not given:
        raise RiskcalError(f"references: row {row} has none; risk needs at least one for every prompt.")
    for reference in given:
        if not isinstance(reference, str) or not reference.strip():
            raise RiskcalError(f"references: row {row} holds {reference!r}; give strings that are not empty.")
    return tuple(given)


def _warn_of_repeated_texts(prompts: Sequence[Prompt]) -> None:
    seen: dict[str, Prompt] = {}
    repeated = []
    for row in prompts:
        earlier = seen.setdefault(row.text, row)
        if earlier is not row and (row.cluster is None or row.cluster != earlier.cluster):
            repeated.append((earlier, row))
    if repeated:
        earlier, row = repeated[0]
        warnings.warn(
            f"text: prompt {row.prompt!r} repeats the text of prompt {earlier.prompt!r} (repeats: {len(repeated)}); "
            "identical prompts under two ids are not independent. Drop one, or give both the same cluster.",
            stacklevel=3,
        )


def _candidates(template: ExitPolicy, thresholds: ArrayLike, max_new_tokens: int) -> tuple[ExitPolicy, ...]:
    """The full model, then the thresholds from the highest down."""
    if template.thresholds is not None:
        raise RiskcalError("policy: has thresholds per layer; give a template without, for thresholds= to fill in.")
    if template.max_new_tokens not in (None, max_new_tokens):
        raise RiskcalError(
            f"max_new_tokens: {max_new_tokens}, but {template.max_new_tokens} in the policy; give the same to both."
        )
    try:
        grid = _validate.threshold_grid(thresholds, allow_full=True)
    except RiskcalError as error:
        raise RiskcalError(f"{error} The full model is recorded beside them for every prompt.") from None
    if np.isposinf(grid).any():
        raise RiskcalError(
            f"thresholds: inf at index {_validate.first(np.isposinf(grid))}; the full model is recorded for every "
            "prompt anyway: leave it out."
        )
    ordered = [np.inf, *np.sort(grid)[::-1].tolist()]
    return tuple(template.model_copy(update={"threshold": value, "certificate": None}) for value in ordered)


def _settings(plan: Plan, prompts: Sequence[Prompt], shard_prompts: int) -> dict[str, Any]:
    """What decides the recorded tables: a folder holds one recording, with one set of these."""
    varying = {"threshold", "thresholds", "certificate", "max_new_tokens"}
    return {
        "format": 1,
        "decoder": _name(plan.load),
        "policy": plan.policies[0].model_dump(mode="json", exclude=varying),
        "thresholds": [candidate.threshold for candidate in plan.policies[1:]],
        "max_new_tokens": plan.max_new_tokens,
        "batch_size": plan.batch_size,
        "shard_prompts": shard_prompts,
        "dissimilarity": _name(plan.dissimilarity),
        "risk": None if plan.risk is None else _name(plan.risk),
        "traces": plan.traces,
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


def _open_folder(plan: Plan, settings: dict[str, Any]) -> None:
    """Make sure that ``out`` holds this recording, new or begun, and nothing else."""
    out, file = plan.out, plan.out / SETTINGS_FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RiskcalError(f"{out}: cannot be used as a folder ({error.strerror}); give another path.") from None
    found = _read_settings(file) if file.exists() else None
    if found is not None:
        _refuse_other_settings(out, found, settings)
    elif any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise RiskcalError(f"{out}: is not empty and holds no recording (no {SETTINGS_FILE}); give a new folder.")
    for folder in (out, out / "traces"):
        for left_behind in folder.glob(".*.partial"):
            left_behind.unlink(missing_ok=True)
    if plan.traces:
        (out / "traces").mkdir(exist_ok=True)
    if found == settings:
        return
    with _validate.replacing(file) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RiskcalError(f"{file}: cannot be read ({error}); give another folder.") from None
    if not isinstance(found, dict):
        raise RiskcalError(f"{file}: does not describe a recording; give another folder.")
    return found


def _refuse_other_settings(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if not any(out.glob("runs-*.parquet")) and not any(out.glob("traces/traces-*.parquet")):
        return  # nothing was recorded with them: a first try that failed must not block the next
    for name, value in wanted.items():
        if found.get(name) != value:
            there, here = json.dumps(found.get(name)), json.dumps(value)
            if name == "prompts":
                there, here = "other texts, ids, references, clusters or groups", "these"
            raise RiskcalError(
                f"{name}: {there} in the recording that {out} holds, {here} now. Give the same to go on with it, or "
                "another folder."
            )


def _record_serially(pending: Sequence[Shard], *, total: int, progress: bool) -> None:
    left = sum(len(shard.prompts) for shard in pending)
    with tqdm(total=total, initial=total - left, desc="record", unit="prompt", disable=not progress) as bar:
        for shard in pending:
            _record_shard(shard, bar.update)


def _record_with(pool: Any, pending: Sequence[Shard], *, total: int, progress: bool) -> None:
    # multiprocessing's own map returns only when all is done; results are needed as they come, for the bar
    results = getattr(pool, "imap_unordered", pool.map)(_record_shard, pending) if pending else ()
    with tqdm(total=total, initial=total - len(pending), desc="record", unit="shard", disable=not progress) as bar:
        for _ in results:
            bar.update()
    lacking = [shard for shard in pending if not shard.finished]
    if lacking:
        name = lacking[0].runs_path.name
        raise RiskcalError(f"pool: returned before {name} was written; its map must give results, not futures.")


def _record_shard(shard: Shard, advance: Callable[[int], Any] = lambda n: None) -> None:
    """The job of a worker: generate one shard's prompts and write its files."""
    plan = shard.plan
    decoder = _decoder(plan, shard.prompts[: plan.batch_size])
    rows: list[dict[str, Any]] = []
    paths: list[pd.DataFrame] = []
    for batch in _chunks(shard.prompts, plan.batch_size):
        encoded = decoder.encode([row.text for row in batch])
        rows.extend(_runs(plan, batch, [_outcome(plan, decoder, encoded, policy, batch) for policy in plan.policies]))
        if plan.traces:
            ids: Any = [row.prompt for row in batch]
            traced = decoder.trace(*encoded, max_new_tokens=plan.max_new_tokens, prompts=ids)
            paths.append(traced.to_frame())
        advance(len(batch))
    if plan.traces:
        place = {row.prompt: i for i, row in enumerate(shard.prompts)}  # Traces sorts within each batch: undo that
        whole = pd.concat(paths).sort_values("prompt", key=lambda ids: ids.map(place), kind="stable", ignore_index=True)
        _tables.write(whole, shard.traces_path)
    _tables.write(pd.DataFrame(rows), shard.runs_path)


class Outcome(NamedTuple):
    """A batch's generation under one policy, per row."""

    texts: list[str]
    layers: list[float]
    tokens: list[int]
    seconds: float


def _outcome(
    plan: Plan, decoder: Decoder, encoded: tuple[Any, Any], policy: ExitPolicy, batch: Sequence[Prompt]
) -> Outcome:
    started = time.perf_counter()
    generation = decoder.generate(*encoded, policy=policy, max_new_tokens=plan.max_new_tokens)
    exits = _numpy(generation.exit_layers)  # inside the clock: an accelerator works on until its result is asked for
    seconds = (time.perf_counter() - started) / len(batch)
    outputs = decoder.decode(generation.tokens)
    if exits.ndim != 2 or not len(exits) == len(outputs) == len(batch):
        raise RiskcalError(
            f"decoder: gave exit_layers of shape {exits.shape} and {len(outputs)} texts for {len(batch)} prompts; "
            "each needs one row."
        )
    generated = exits > 0
    tokens = generated.sum(1)
    if not tokens.all():
        prompt = batch[int(tokens.argmin())].prompt
        raise RiskcalError(f"decoder: gave no token for prompt {prompt!r}; the end token counts as one.")
    if policy.is_full_model and (exits[generated] != decoder.n_layers).any():
        raise RiskcalError(
            f"decoder: left at layer {exits[generated].min()} of {decoder.n_layers} under the full model's policy; "
            "without a full model's output there is nothing to compare with."
        )
    return Outcome(outputs, (exits.sum(1) / tokens).tolist(), tokens.tolist(), seconds)


def _runs(plan: Plan, batch: Sequence[Prompt], outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Rows of the table: prompt by prompt, the full model first."""
    for i, prompt in enumerate(batch):
        reference = outcomes[0].texts[i]
        for policy, outcome in zip(plan.policies, outcomes, strict=True):
            output = outcome.texts[i]
            row: dict[str, Any] = {"prompt": prompt.prompt}
            row |= {name: getattr(prompt, name) for name in ("cluster", "group") if getattr(prompt, name) is not None}
            row["threshold"] = policy.threshold
            if isinstance(policy.schedule, Decaying):
                schedule = policy.schedule
                row["temperature"] = float(schedule.temperature)
                row |= {"max_length": schedule.max_length, "form": schedule.form}
            row |= {"min_layer": policy.min_layer, "measure": policy.measure}
            distance = 0.0 if policy.is_full_model else plan.dissimilarity(output, reference)
            row["dissimilarity"] = _in_unit(distance, "dissimilarity", prompt, policy)
            if plan.risk is not None:
                row["risk"] = _in_unit(plan.risk(output, prompt.references), "risk", prompt, policy)
            row |= {"layers": outcome.layers[i], "tokens": outcome.tokens[i], "seconds": outcome.seconds}
            yield row | {"source": "generated"}


def _in_unit(value: Any, name: str, prompt: Prompt, policy: ExitPolicy) -> float:
    loss = _validate.number(value, f"{name}: prompt {prompt.prompt!r}, threshold {policy.threshold:g}")
    if not -_validate.TOLERANCE <= loss <= 1 + _validate.TOLERANCE:
        raise RiskcalError(
            f"{name}: {loss:g} for prompt {prompt.prompt!r} at threshold {policy.threshold:g} is outside [0, 1]; "
            "scale or clip it."
        )
    return min(max(loss, 0.0), 1.0)


def _numpy(values: Any) -> NDArray[np.int64]:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values).astype(np.int64)


_slot: tuple[tuple[int, str], Decoder] | None = None
_slot_lock = threading.Lock()


def _decoder(plan: Plan, batch: Sequence[Prompt]) -> Decoder:
    """Load the process's decoder, or find it loaded.

    Kept by process and call of `record`, not by ``load``: a partial is another object each time that a job brings it.
    One at a time, so that a second recording does not hold two models in memory.
    """
    global _slot
    key = (os.getpid(), plan.session)
    with _slot_lock:
        if _slot is None or _slot[0] != key:
            _slot = None
            decoder = plan.load()
            _refuse_incomplete(decoder, plan)
            encoded = decoder.encode([row.text for row in batch])
            for policy in (plan.policies[0], plan.policies[-1]):
                decoder.generate(*encoded, policy=policy, max_new_tokens=plan.max_new_tokens)
            _slot = key, decoder
        return _slot[1]


def _refuse_incomplete(decoder: Any, plan: Plan) -> None:
    needed = ["n_layers", "encode", "generate", "decode"] + ["trace"] * plan.traces
    lacking = [name for name in needed if not hasattr(decoder, name)]
    if lacking:
        kind = type(decoder).__name__
        raise RiskcalError(f"load: returned a {kind} without .{lacking[0]}; it must return a decoder.")


def _release(session: str) -> None:
    global _slot
    with _slot_lock:
        if _slot is not None and _slot[0] == (os.getpid(), session):
            _slot = None


def _chunks(rows: tuple[Prompt, ...], size: int) -> list[tuple[Prompt, ...]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
