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
        ``dissimilarity``; ``tokens`` generated; ``seconds`` from when the request was scheduled to its last token, if every line
        has metrics (its time in the queue is that of the load, not of the setting); ``failed`` where it was aborted or never
        finished. Several samples of a request (``n``) are prompts ``id#0``, ``id#1`` and so on of one cluster.

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
    parts = [
        _outputs(path, key).assign(**setting)
        for setting, path in settings_.candidates(settings, coordinates, full)
    ]
    reference = parts[0].drop_duplicates("prompt").set_index("prompt")["text"]
    frame = pd.concat(parts, ignore_index=True)
    unknown = ~frame["prompt"].isin(reference.index)
    if unknown.any():
        first = frame[unknown].iloc[0]
        raise RiskcalError(
            f"{first['place']}: the full model has no output for {first['prompt']!r} ({int(unknown.sum())} such rows). If vLLM "
            "counted the requests, join them with key='prompt'; if settings ran with different numbers of samples (n), run all "
            "of them with the same."
        )
    frame["dissimilarity"] = [
        distance(text, reference[prompt])
        for text, prompt in zip(frame["text"], frame["prompt"], strict=True)
    ]
    names = ["prompt", *coordinates, "dissimilarity", "tokens", "failed"]
    names += ["seconds"] if frame["seconds"].notna().all() else []
    names += ["cluster"] if (frame["cluster"] != frame["prompt"]).any() else []
    return Runs.from_frame(
        frame[names], candidate_columns=[name for name in coordinates if name != "threshold"]
    )


def _outputs(path: Path, key: str) -> pd.DataFrame:
    rows = []
    for row, request in settings_.objects(path):
        place = f"{path}: row {row}"
        name, outputs = request.get(key), request.get("outputs")
        if not isinstance(name, str | int) or name == "":
            raise RiskcalError(
                f"{place} has no {key}, by which requests are joined; name another key=."
            )
        if not isinstance(outputs, list) or not outputs:
            raise RiskcalError(
                f"{place} has no outputs; write the attributes of vLLM's RequestOutput, one object a line."
            )
        seconds = _seconds(request.get("metrics"))
        for number, output in enumerate(outputs):
            if not isinstance(output, Mapping) or not isinstance(output.get("text"), str):
                raise RiskcalError(f"{place} has no text in its output {number}.")
            reason, ids = output.get("finish_reason"), output.get("token_ids") or []
            if not isinstance(ids, list):
                raise RiskcalError(f"{place}: token_ids of output {number} is no list.")
            rows.append(
                {
                    "prompt": str(name)
                    if len(outputs) == 1
                    else f"{name}#{output.get('index', number)}",
                    "cluster": str(name),
                    "text": output["text"],
                    "tokens": len(ids),
                    "seconds": seconds,
                    "failed": reason is None or reason in _LOST or request.get("finished") is False,
                    "place": place,
                }
            )
    if not rows:
        raise RiskcalError(f"{path}: holds no output.")
    frame = pd.DataFrame(rows)
    again = frame["prompt"].duplicated()
    if again.any():
        first = frame[again].iloc[0]
        raise RiskcalError(
            f"{first['place']}: {key} {first['prompt']!r} stands twice ({int(again.sum())} such outputs). If it was sent again, "
            "keep the line that was served, by when it was sent and not by what came of it; if two requests are alike, "
            "join them by another key=."
        )
    return frame


def _seconds(metrics: Any) -> float | None:
    """From when a request was scheduled to its last token: of the server's per-request metrics, or of the engine's own clock."""
    if not isinstance(metrics, Mapping):
        return None
    found = {name: settings_.finite(value) for name, value in metrics.items()}
    values = {name: value for name, value in found.items() if value is not None}
    if {"time_to_first_token_ms", "generation_time_ms"} <= values.keys():
        return float(values["time_to_first_token_ms"] + values["generation_time_ms"]) / 1000
    if {"scheduled_ts", "last_token_ts"} <= values.keys():
        return float(values["last_token_ts"] - values["scheduled_ts"])
    return None
