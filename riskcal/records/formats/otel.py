"""Evaluations in OpenTelemetry's exports: events ``gen_ai.evaluation.result``, as losses for `riskcal.RiskMonitor`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records.formats import settings as settings_

_EVENT = "gen_ai.evaluation.result"

#: Where an exporter's JSON has what, from a batch down to its records.
_BATCHES = (("resourceLogs", "scopeLogs", "logRecords"), ("resourceSpans", "scopeSpans", "spans"))


def read(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    loss: str = "1 - x",
    labels: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The losses in an export, in its order: ``monitor.update(read("events.jsonl", name="correctness")["loss"])``.

    Parameters
    ----------
    path : path
        JSON lines: an exporter's batches of logs or spans (``resourceLogs``, ``resourceSpans``), or one event a line with its
        name in ``name``, ``eventName``, ``event_name`` or ``event.name`` and its ``attributes``.
    name : str, optional
        Which evaluation, ``gen_ai.evaluation.name``; may be left out where there is but one.
    loss : str
        What the score, ``gen_ai.evaluation.score.value``, becomes.
    labels : mapping of str to float, optional
        Losses of ``gen_ai.evaluation.score.label``, where an evaluation has no score: ``{"pass": 0, "fail": 1}``.

    Returns
    -------
    DataFrame
        ``request`` (``gen_ai.response.id``), ``loss`` in [0, 1] and ``failed``. An evaluation without a score and a known label
        failed, and has the worst loss, 1: what failed must not hide. A request that comes again is left out.

    Raises
    ------
    RiskcalError
        For several evaluations and none chosen, none at all, a loss outside [0, 1], or labels without a loss where no
        evaluation has a score: all of them would seem to have failed.

    Examples
    --------
    >>> import pandas as pd
    >>> from riskcal.records.formats import otel
    >>> judged = {"gen_ai.evaluation.name": "correctness", "gen_ai.evaluation.score.value": 0.75}
    >>> events = pd.DataFrame({"name": ["gen_ai.evaluation.result"], "attributes": [judged | {"gen_ai.response.id": "r1"}]})
    >>> events.to_json("events.jsonl", orient="records", lines=True)
    >>> otel.read("events.jsonl", name="correctness")["loss"].tolist()
    [0.25]
    """
    formula = settings_.formula(loss)
    source = settings_.path_of(path)
    losses = _labelled(labels)
    events = [
        (row, attributes)
        for row, line in settings_.objects(source)
        for found, attributes in _events(line)
        if found == _EVENT
    ]
    if not events:
        raise RiskcalError(f"{path}: holds no event {_EVENT}.")
    names = {str(attributes.get("gen_ai.evaluation.name")) for _, attributes in events}
    chosen = settings_.only(names, name, "name", str(path))
    rows = []
    unknown: set[str] = set()
    for row, attributes in events:
        if str(attributes.get("gen_ai.evaluation.name")) != chosen:
            continue
        given: Any = attributes.get("gen_ai.evaluation.score.value")
        label: Any = attributes.get("gen_ai.evaluation.score.label")
        value = _score(given)
        scored, known = value is not None, isinstance(label, str) and label in losses
        unknown |= {label} if isinstance(label, str) and not (scored or known) else set()
        found = losses[label] if not scored and known else 1.0 if not scored else formula(value)
        if not -_validate.TOLERANCE <= found <= 1 + _validate.TOLERANCE:
            raise RiskcalError(
                f"{path}: row {row}: the score {_validate.shown(given)} makes a loss of {found:g}, outside [0, 1]; give loss= as "
                "what the score is: '1 - x', 'x', '1 - x / 100'."
            )
        rows.append((_request(attributes), float(found), not (scored or known)))
    if unknown and all(failed for _, _, failed in rows):
        raise RiskcalError(
            f"{path}: no evaluation {chosen!r} has a score, but labels: {', '.join(map(repr, sorted(unknown)[:10]))}. Say what "
            "loss each is, with labels={'pass': 0, 'fail': 1}; without it all would count as failed."
        )
    frame = pd.DataFrame(rows, columns=["request", "loss", "failed"])
    again = frame["request"].notna() & frame["request"].duplicated()
    return frame[~again].reset_index(drop=True)


def _labelled(labels: Any) -> dict[str, float]:
    given = {} if labels is None else labels
    if not isinstance(given, Mapping):
        raise RiskcalError(
            f"labels: {_validate.shown(labels)} is no dictionary; give {{'pass': 0, 'fail': 1}}."
        )
    losses = {name: _validate.number(value, f"labels: {name}") for name, value in given.items()}
    for name, loss in losses.items():
        if not 0.0 <= loss <= 1.0:
            raise RiskcalError(f"labels: {name} has the loss {loss:g}, outside [0, 1].")
    return losses


def _score(value: Any) -> float | None:
    """A score that is a finite number, or the text of one, as JSON of protocol buffers may write it."""
    if isinstance(value, str):
        with suppress(ValueError):
            return settings_.finite(float(value))
    return settings_.finite(value)


def _request(attributes: Mapping[str, Any]) -> str | None:
    value = attributes.get("gen_ai.response.id")
    return None if value is None or value == "" else str(value)  # protocol buffers' default


def _events(line: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The events of a line with their attributes, whatever wraps them."""
    batches = [path for path in _BATCHES if path[0] in line]
    for outer, middle, inner in batches:
        for record in (
            record
            for resource in _list(line, outer)
            for scope in _list(resource, middle)
            for record in _list(scope, inner)
        ):
            for event in [record, *_list(record, "events")]:
                yield _name(event), _attributes(event)
    if not batches:
        yield _name(line), _attributes(line)


def _list(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = record.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _name(event: Mapping[str, Any]) -> Any:
    names = (event.get(key) for key in ("eventName", "event_name", "name", "event.name"))
    return next((name for name in names if name is not None), _attributes(event).get("event.name"))


def _attributes(event: Mapping[str, Any]) -> dict[str, Any]:
    given = event.get("attributes")
    if isinstance(given, Mapping):
        return dict(given)
    return {str(one.get("key")): _value(one.get("value")) for one in _list(event, "attributes")}


def _value(wrapped: Any) -> Any:
    """A value as OTLP's JSON writes it: ``{"doubleValue": 0.5}``, and whole numbers as texts."""
    if not isinstance(wrapped, Mapping):
        return wrapped
    for kind, value in wrapped.items():
        if kind == "intValue" and isinstance(value, str):
            return int(value) if value.lstrip("-").isdecimal() else value
        return value
    return None
