"""Outputs of vLLM: its ``RequestOutput`` objects as JSON lines, one file per setting, with what each request cost."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records.formats import settings as settings_
from riskcal.records.runs import Runs

#: Reasons of an output that nobody would have got.
_LOST = ("abort", "error")


def read(
    settings: settings_.Settings,
    *,
    full: str | os.PathLike[str],
    distance: Callable[[str, str], float],
    key: str = "request_id",
    coordinates: Sequence[str] = ("threshold",),
) -> Runs:
    """Runs of vLLM's outputs, each compared with the full model's output of the same request.

    A line is the attributes of a ``RequestOutput``: ``request_id``, ``prompt``, ``outputs`` with ``text``, ``token_ids`` and
    ``finish_reason`` of each, ``finished``, and ``metrics`` where they were on.

    Parameters
    ----------
    settings : mapping of threshold to file
        The outputs with each threshold; with several ``coordinates`` a tuple of them instead of a threshold.
    full : path
        The full model's outputs.
    distance : callable
        ``distance(output, full_output)`` of two texts, in [0, 1]: ``riskcal_adapters.texts.token_distance``, for instance.
    key : str
        By what requests are joined: ``request_id`` if the client said it, ``prompt`` if vLLM counted it, as offline.
    coordinates : sequence of str
        What tells settings apart, ``threshold`` among them.

    Returns
    -------
    Runs
        ``dissimilarity``; ``tokens`` generated, if every output has ``token_ids``; ``seconds`` from when the request was
        scheduled to its last token, if every line has metrics (its time in the queue is that of the load, not of the setting);
        ``failed`` where it was aborted, never finished, or has no output. Several samples of a request (``n``) are prompts
        ``id#0``, ``id#1`` and so on of one cluster; a prompt that was sent under several ids is told by its ``text``.

    Examples
    --------
    >>> import pandas as pd
    >>> from riskcal.records.formats import vllm
    >>> def log(path, *texts):
    ...     outputs = [[{"index": 0, "text": text, "token_ids": [7], "finish_reason": "stop"}] for text in texts]
    ...     table = pd.DataFrame({"request_id": ["r0", "r1"], "finished": True, "outputs": outputs})
    ...     table.to_json(path, orient="records", lines=True)
    >>> log("full.jsonl", "yes", "no")
    >>> log("0.5.jsonl", "yes", "yes")
    >>> runs = vllm.read({0.5: "0.5.jsonl"}, full="full.jsonl", distance=lambda early, full: float(early != full))
    >>> runs.losses("textual").mean().item()
    0.5
    """
    settings_.name_of(key, "key")
    if not callable(distance):
        raise RiskcalError(
            f"distance: {_validate.shown(distance)} is no function of two texts; give riskcal_adapters.texts.token_distance, "
            "for instance."
        )
    frame = pd.concat(
        [
            _outputs(path, key).assign(**setting, setting=number)
            for number, (setting, path) in enumerate(
                settings_.candidates(settings, coordinates, full)
            )
        ],
        ignore_index=True,
    )
    frame = _with_samples(frame)
    _refuse_other_questions(frame, key)
    reference = frame[frame["setting"] == 0].set_index("prompt")
    unknown = ~frame["prompt"].isin(reference.index)
    if unknown.any():
        first = frame[unknown].iloc[0]
        raise RiskcalError(
            f"{first['place']}: the full model has no output for {first['prompt']!r} ({int(unknown.sum())} such rows). If vLLM "
            "counted the requests, join them with key='prompt'; if settings ran with different numbers of samples (n), run all "
            "of them with the same."
        )
    settings_.refuse_gaps(
        frame, 'write its line, as {"' + key + '": ..., "finished": false, "outputs": []}'
    )
    frame["dissimilarity"] = _distances(frame, reference, distance)
    names = ["prompt", *coordinates, "dissimilarity", "failed"]
    names += [name for name in ("tokens", "seconds") if frame[name].notna().all()]
    names += ["cluster"] if (frame["cluster"] != frame["prompt"]).any() else []
    frame["text"] = frame.groupby("cluster")["asked"].transform("first")
    names += ["text"] if _are_repeated(frame) else []
    return settings_.runs(frame, names, coordinates)


def _outputs(path: Path, key: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for row, request in settings_.objects(path):
        rows += _of_request(request, key, f"{path}: row {row}")
    if not rows:
        raise RiskcalError(f"{path}: holds no output.")
    frame = pd.DataFrame(rows)
    if frame["number"].isna().all():
        raise RiskcalError(
            f"{frame['place'].iloc[0]} has no outputs, nor has any other; write the attributes of vLLM's RequestOutput, one "
            "object a line."
        )
    again = frame["prompt"].duplicated()
    if again.any():
        first = frame[again].iloc[0]
        raise RiskcalError(
            f"{first['place']}: {key} {first['prompt']!r} stands twice ({int(again.sum())} such outputs). If it was sent again, "
            "keep the line that was served, by when it was sent and not by what came of it; if two requests are alike, "
            "join them by another key=."
        )
    return frame


def _of_request(request: Mapping[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    """A row for each output of a request, and one without a number for a request that has none."""
    name, outputs = request.get(key), request.get("outputs")
    if not isinstance(name, str | int) or name == "":
        raise RiskcalError(
            f"{place} has no {key}, by which requests are joined; name another key=."
        )
    if not isinstance(outputs, list):
        raise RiskcalError(
            f"{place} has no outputs; write the attributes of vLLM's RequestOutput, one object a line."
        )
    asked, ids = request.get("prompt"), request.get("prompt_token_ids")
    common = {
        "cluster": str(name),
        "asked": asked if isinstance(asked, str) else None,
        "asked_ids": str(ids) if isinstance(ids, list) else None,
        "seconds": _seconds(request.get("metrics"), place),
        "place": place,
    }
    if not outputs:  # nobody got anything
        return [
            common
            | {"prompt": str(name), "number": None, "output": "", "tokens": 0.0, "failed": True}
        ]
    rows = []
    for number, output in enumerate(outputs):
        held = output if isinstance(output, Mapping) else {}
        reason, text, tokens = (held.get(of) for of in ("finish_reason", "text", "token_ids"))
        lost = reason is None or reason in _LOST or request.get("finished") is False
        if not held or not (isinstance(text, str) or (text is None and lost and "text" in held)):
            raise RiskcalError(
                f'{place} has no text in its output {number}; write what it gave. Where it was aborted, "finish_reason": '
                '"abort" and "text": "" say so.'
            )
        if tokens is not None and not isinstance(tokens, list):
            raise RiskcalError(f"{place}: token_ids of output {number} is no list.")
        several = len(outputs) > 1
        rows.append(
            common
            | {
                "prompt": f"{name}#{held.get('index', number)}" if several else str(name),
                "number": number,
                "output": text or "",
                "tokens": None if tokens is None else float(len(tokens)),
                "failed": lost,
            }
        )
    return rows


def _with_samples(frame: pd.DataFrame) -> pd.DataFrame:
    """A request without outputs failed as often as it has samples with other settings."""
    lost = frame["number"].isna()
    samples = frame[~lost].groupby("cluster", sort=False)["prompt"].unique()
    of_each = [
        list(samples.get(cluster, [prompt])) if without else [prompt]
        for cluster, prompt, without in zip(frame["cluster"], frame["prompt"], lost, strict=True)
    ]
    return frame.assign(prompt=pd.Series(of_each, dtype=object)).explode(
        "prompt", ignore_index=True
    )


def _refuse_other_questions(frame: pd.DataFrame, key: str) -> None:
    """Refuse one id of two prompts, as where vLLM counted the requests of each setting from 0."""
    for name in ("asked", "asked_ids"):
        other = frame.groupby("cluster")[name].transform("nunique") > 1
        if not other.any():
            continue
        own = frame[other & (frame["cluster"] == frame["cluster"][other].iloc[0])]
        first, second = own.drop_duplicates(name).dropna(subset=name).iloc[:2].to_dict("records")
        raise RiskcalError(
            f"{second['place']}: {key} {second['cluster']!r} asks {_validate.shown(second[name])}, and "
            f"{_validate.shown(first[name])} in {first['place']} ({frame['cluster'][other].nunique()} such requests), so that "
            "their outputs cannot be compared. If vLLM counted the requests, join them with key='prompt'; else give all "
            "settings the same prompts under the same ids."
        )


def _distances(
    frame: pd.DataFrame, reference: pd.DataFrame, distance: Callable[[str, str], float]
) -> list[float]:
    """How far each output is from the full model's; what failed is far from all, and all from a full model's that failed."""
    outputs, failed = reference["output"].to_dict(), reference["failed"].to_dict()
    found = []
    names = ("prompt", "output", "failed", "setting", "place")
    for prompt, output, lost, setting, place in zip(*(frame[name] for name in names), strict=True):
        if lost or failed[prompt]:
            found.append(1.0)
            continue
        given = distance(output, outputs[prompt])
        number = settings_.finite(given)
        if number is None or not -_validate.TOLERANCE <= number <= 1 + _validate.TOLERANCE:
            raise RiskcalError(
                f"distance: gives {_validate.shown(given)} for {place}, of {_validate.shown(output)} and the full model's "
                f"{_validate.shown(outputs[prompt])}; it has to be a plain number in [0, 1], 0 of equal texts. Divide counts by "
                "the most that they can be."
            )
        if setting == 0 and number > _validate.TOLERANCE:
            raise RiskcalError(
                f"distance: gives {number:g} for {place}, of the full model's {_validate.shown(output)} and itself, where it has "
                "to be 0. Of a similarity give what it lacks: distance=lambda a, b: 1 - similarity(a, b)."
            )
        found.append(number)
    return found


def _are_repeated(frame: pd.DataFrame) -> bool:
    """Whether one prompt was sent under several ids, all prompts being known."""
    each = frame.drop_duplicates("cluster")["text"]
    return bool(each.notna().all() and each.duplicated().any())


def _seconds(metrics: Any, place: str) -> float | None:
    """From when a request was scheduled to its last token: of the server's per-request metrics, or of the engine's own clock."""
    if not isinstance(metrics, Mapping):
        return None
    found = {name: settings_.finite(value) for name, value in metrics.items()}
    values = {name: value for name, value in found.items() if value is not None}
    if {"time_to_first_token_ms", "generation_time_ms"} <= values.keys():
        seconds = float(values["time_to_first_token_ms"] + values["generation_time_ms"]) / 1000
    elif {"scheduled_ts", "last_token_ts"} <= values.keys():
        seconds = float(values["last_token_ts"] - values["scheduled_ts"])
    else:
        return None
    if seconds < 0:
        raise RiskcalError(
            f"{place}: by its metrics it took {seconds:g} seconds; repair them, or write null for the metrics of all lines."
        )
    return seconds
