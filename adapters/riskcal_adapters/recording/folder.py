"""The folder that holds a recording: which files, the settings they were made with, and what is refused in it."""

import functools
import hashlib
import json
import math
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from riskcal import RiskcalError, internal
from riskcal_adapters import json_objects
from riskcal_adapters.recording.job import Recording, Shard
from riskcal_adapters.recording.prompts import Prompt
from riskcal_adapters.recording.protocol import Decoder

SETTINGS_FILE = "recording.json"
#: Seconds after which a half-written file of another process is thought to be left behind.
_STALE = 3600


def open_folder(plan: Recording, prompts: Sequence[Prompt], shard_prompts: int) -> list[Path]:
    """Make sure that ``out`` holds this recording, new or begun, and nothing else; gives the folders that had to be made."""
    out, file, settings = (
        plan.out,
        plan.out / SETTINGS_FILE,
        _settings(plan, prompts, shard_prompts),
    )
    with writing(out):
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            found = read_settings(file) if file.exists() else None
            if found is None and any(not entry.name.startswith(".") for entry in out.iterdir()):
                raise RiskcalError(
                    f"{out}: is not empty and holds no recording (no {SETTINGS_FILE}); give a new folder."
                )
            remove_leftovers(plan, older_than=_STALE)
            if found is not None and _begun(out):
                _refuse_other_settings(out, found, settings)
            else:  # a first try that recorded nothing must not block the next
                json_objects.write(file, settings)
            if plan.traces:
                (out / "traces").mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RiskcalError(
                f"{out}: cannot be used as a folder ({error.strerror}); give another path."
            ) from None
        except BaseException:
            _remove_empty(made)
            raise
    return made


def _remove_empty(folders: Iterable[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _begun(out: Path) -> bool:
    return any(
        next(out.glob(pattern), None)
        for pattern in ("runs-*", "traces/traces-*", "unfinished/runs-*")
    )


def close_folder(plan: Recording, made: Sequence[Path]) -> None:
    """After a call that failed: a folder in which nothing was recorded is left as it was found."""
    with suppress(OSError):
        if _begun(plan.out):
            plan.pulse.unlink(missing_ok=True)
            return
        remove_leftovers(plan)
        (plan.out / SETTINGS_FILE).unlink(missing_ok=True)
    _remove_empty(
        folder
        for folder in (plan.out / "traces", plan.out / "unfinished", *made)
        if folder.exists()
    )


def remove_leftovers(plan: Recording, older_than: float = -math.inf) -> None:
    """Remove half-written files, which a process that was killed left behind, of some age in seconds."""
    for folder in (plan.out, plan.out / "traces", plan.out / "unfinished"):
        with suppress(
            FileNotFoundError
        ):  # as `glob` says of a folder that another process removes meanwhile
            for path in list(folder.glob(".*.partial")):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > older_than:
                        path.unlink()
    plan.pulse.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses there is a `RiskcalError` that names it."""
    try:
        yield
    except OSError as error:
        raise RiskcalError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); make room, or give a folder that can be."
        ) from None


def read_shard(path: Path) -> pd.DataFrame:
    """A file of the recording; one that was damaged since is refused with what to do."""
    try:
        return internal.read_table(path)
    except RiskcalError as error:
        raise RiskcalError(f"{error} {_AGAIN}") from None


_AGAIN = (
    "To record it again, delete it and make the same call: only its prompts are generated anew."
)


def refuse_damaged(shards: Sequence[Shard]) -> None:
    """Read what is there already: existence does not say that it is whole, nor that it is of these prompts."""
    for shard in shards:
        ids = [row.prompt for row in shard.prompts]
        if shard.runs_path.exists():
            rows = read_shard(shard.runs_path)
            grid = [np.inf, *shard.plan.thresholds]
            if "stopped" in rows:
                grid = grid[: max(1, len(rows) // len(ids))]
            wanted = {
                "prompt": np.repeat(np.array(ids, dtype=object), len(grid)),
                "threshold": grid * len(ids),
            }
            _refuse_other_rows(shard.runs_path, rows, wanted)
        if shard.plan.traces and shard.traces_path.exists():
            rows = read_shard(shard.traces_path)
            if "prompt" in rows:
                rows = rows.drop_duplicates("prompt")
            _refuse_other_rows(shard.traces_path, rows, {"prompt": ids})


def _refuse_other_rows(path: Path, rows: pd.DataFrame, wanted: dict[str, Any]) -> None:
    for name, values in wanted.items():
        if name not in rows or rows[name].tolist() != list(values):
            raise RiskcalError(
                f"{path}: holds other rows than were recorded there (column {name}). {_AGAIN}"
            )


def bind(plan: Recording, decoder: Decoder) -> None:
    """Note in the settings which model records, and refuse another one than began."""
    loaded = plan.model(decoder)
    for name, value in loaded.items():
        asked = getattr(plan.template, name)
        if asked not in (None, value):
            raise RiskcalError(
                f"{name}: {asked!r} in the policy, but the decoder has {value!r}; load the model that the policy is for, or "
                f"leave {name} out of it."
            )
    own = getattr(decoder, "default_length", None)
    if not plan.length_given and isinstance(own, int) and own != plan.max_new_tokens:
        raise RiskcalError(
            f"max_new_tokens: none is given, and {plan.max_new_tokens} would be taken, but the model's generation config says "
            f"{own}; give max_new_tokens={own}, or the limit that you mean."
        )
    file = plan.out / SETTINGS_FILE
    found = read_settings(file)
    _refuse_other_settings(
        plan.out, found, {name: value for name, value in loaded.items() if name in found}
    )
    if not loaded.keys() <= found.keys():
        json_objects.write(file, found | loaded)


def _settings(plan: Recording, prompts: Sequence[Prompt], shard_prompts: int) -> dict[str, Any]:
    """What decides the recorded tables: a folder holds one recording, with one set of these."""
    elsewhere = {"threshold", "thresholds", "coordinates", "certificate", "max_new_tokens"}
    return {
        "format": 3,
        "decoder": name_of(plan.load),
        "policy": plan.template.model_dump(mode="json", exclude=elsewhere),
        "thresholds": list(plan.thresholds),
        "max_new_tokens": plan.max_new_tokens,
        "batch_size": plan.batch_size,
        "shard_prompts": shard_prompts,
        "dissimilarity": name_of(plan.dissimilarity),
        "risk": None if plan.risk is None else name_of(plan.risk),
        "traces": plan.traces,
        "stop": None if plan.stop is None else plan.stop.model_dump(mode="json"),
        "n_prompts": len(prompts),
        "prompts": hashlib.blake2b(json.dumps(prompts).encode(), digest_size=16).hexdigest(),
    }


def name_of(function: Callable[..., Any]) -> str:
    """A name that is the same in the next process."""
    if isinstance(function, types.FunctionType | types.BuiltinFunctionType | type):
        return f"{function.__module__}.{function.__qualname__}"
    if isinstance(function, functools.partial):
        arguments = [repr(value) for value in function.args] + [
            f"{k}={v!r}" for k, v in function.keywords.items()
        ]
        return _without_addresses(f"{name_of(function.func)}({', '.join(arguments)})")
    return _without_addresses(repr(function))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def read_settings(file: Path) -> dict[str, Any]:
    """What was noted when a recording began."""
    return json_objects.read(file, "does not describe a recording", "give another folder")


def _refuse_other_settings(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            held, wants = found.get(name), value
            # say what differs in them, and no more
            if name == "config" and isinstance(held, dict) and isinstance(wants, dict):
                keys = [key for key in (*held, *wants) if held.get(key, ...) != wants.get(key, ...)]
                held, wants = (
                    {key: one[key] for key in keys if key in one} for one in (held, wants)
                )
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
