"""Between a policy and the columns of a table: the one place where its fields become columns and come back."""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.policy.fields import RiskLimit
from riskcal.policy.schedules import Constant, Decaying, Schedule

if TYPE_CHECKING:
    from riskcal.policy.exit_policy import ExitPolicy

#: Columns of a decaying schedule; empty where nothing decays.
SCHEDULE_COLUMNS = ("temperature", "max_length", "form")

#: Columns of a candidate beside its threshold that are known without being named; an `ExitPolicy` holds what they say.
CANDIDATE_COLUMNS = (*SCHEDULE_COLUMNS, "thresholds", "learned", "min_layer", "measure", "policy")
#: Fields of `ExitPolicy` that the column ``policy`` does not hold: they have columns of their own, or calibration finds them.
FIELDS_ELSEWHERE = {
    "schema_version",
    "threshold",
    "thresholds",
    "learned",
    "measure",
    "schedule",
    "min_layer",
    "lower_is_stricter",
    "coordinates",
    "certificate",
}
#: What a decoder takes where a policy that no certificate vouches for leaves it open; digests have left them out from the start.
DEFAULTS = {"measure": "softmax", "cache": "project", "batching": "diverge"}
#: Fields of `ExitPolicy` that a column of their name fills; the other fields have a structure, or are what calibration finds.
_OF_EXITS = ("cache", "max_pending", "emits", "batching")
_OF_MODELS = (
    "max_new_tokens",
    "n_layers",
    "weights",
    "classifier_weights",
    "head_weights",
    "dtype",
    "tokenizer",
)


def schedule_columns(schedule: Schedule) -> dict[str, Any]:
    """A decaying schedule as columns; a constant one has none."""
    if not isinstance(schedule, Decaying):
        return {}
    return {
        "temperature": float(schedule.temperature),
        "max_length": schedule.max_length,
        "form": schedule.form,
    }


def to_columns(policy: "ExitPolicy") -> dict[str, Any]:
    """A candidate's columns, by which `from_columns` finds its settings again; see `ExitPolicy.to_columns`."""
    vector: dict[str, Any] = {"threshold": policy.threshold}
    if policy.learned is not None:
        vector = learned_columns(policy)
    elif policy.thresholds is not None:
        raise RiskcalError(
            "thresholds: a column holds one threshold; number such candidates in the column threshold, and write their "
            "thresholds as JSON in a column thresholds."
        )
    return {
        **vector,
        **schedule_columns(policy.schedule),
        "min_layer": policy.min_layer,
        **({} if policy.measure is None else {"measure": policy.measure}),
        "policy": policy.other_fields(),
        **({"lower_is_stricter": True} if policy.lower_is_stricter else {}),
        **(policy.coordinates or {}),
    }


def learned_columns(policy: "ExitPolicy") -> dict[str, Any]:
    """A vector of thresholds that stands for a learned risk as columns, named by how likely a token must be right."""
    assert policy.thresholds is not None
    assert policy.learned is not None
    vector = {str(layer): value for layer, value in policy.thresholds.items() if value < math.inf}
    return {
        "threshold": 1.0 - policy.learned.max_risk,
        "thresholds": json.dumps(vector),
        "learned": policy.learned.model_dump_json(),
    }


def _once(text: str) -> Any:
    """What JSON holds in which no object has a name twice."""
    return _validate.of_one_meaning(_validate.from_json(text, each_name_once=True))


def recorded_limit(text: str) -> RiskLimit:
    """What a cell of the column ``learned`` holds."""
    try:
        return RiskLimit(**_once(text))
    except (TypeError, ValueError) as error:
        raise RiskcalError(
            f"learned: the records hold {text!r}, which is not an object with max_risk, risk and fit_fraction ({error})."
        ) from None


def from_columns(
    kind: "type[ExitPolicy]", table: pd.DataFrame, chosen: pd.Series | None, schedule: Any
) -> dict[str, Any]:
    """The fields of a policy that a candidate's row of a table holds, every column in one of them.

    Parameters
    ----------
    kind : type
        `ExitPolicy`, whose fields these are.
    table : DataFrame
        The columns of all candidates, ``threshold`` among them, and no others.
    chosen : Series or None
        The candidate's row; None for the full model, for which that of the first candidate is read.
    schedule : Constant, Decaying or None
        What the table leaves open of a schedule that decays.
    """
    row = table.iloc[0] if chosen is None else chosen
    columns = [str(name) for name in table.columns]
    given: dict[str, Any] = {"threshold": math.inf if chosen is None else float(row["threshold"])}
    if "measure" in columns and not pd.isna(row["measure"]):
        given["measure"] = str(row["measure"])
    if "min_layer" in columns:
        given["min_layer"] = int(row["min_layer"])
    if chosen is not None and not pd.isna(row.get("temperature", math.nan)):
        given["schedule"] = _recorded_schedule(row, schedule)
    elif chosen is not None and ("temperature" in columns or "policy" in columns):
        given["schedule"] = Constant()
    written: dict[str, Any] = {}
    if "policy" in columns:
        fields, written = _recorded_fields(kind, str(row["policy"]))
        given |= fields
    vector = given.pop("thresholds", None)
    others = [name for name in columns if name not in ("threshold", *CANDIDATE_COLUMNS)]
    own = [name for name in others if name in kind.model_fields]
    if chosen is None:  # the full model has no setting of exits, and is told from no candidate
        own = [name for name in own if name in _OF_MODELS and table[name].nunique() == 1]
        return given | {name: _filling(name, row[name], written) for name in own}
    if (vector := _vector(table, row, vector)) is not None:
        given |= {"threshold": math.inf, "thresholds": vector}  # the column is but its number
    if "learned" in columns:
        given["learned"] = recorded_limit(str(row["learned"]))
    given |= {name: _filling(name, row[name], written) for name in own}
    if free := [name for name in others if name not in own]:
        given["coordinates"] = {name: _held(row[name]) for name in free}
    return given


def _vector(table: pd.DataFrame, row: pd.Series, in_policy: Any) -> Any:
    """A candidate's thresholds by layer, of the column policy or their own; None where it has but one."""
    if in_policy is None:
        if "thresholds" not in table:
            return None
        cells = _validate.from_json(str(row["thresholds"]))
        return {int(layer): value for layer, value in cells.items()}
    alike = table.loc[table["policy"] == row["policy"], "threshold"]
    if alike.nunique() > 1:
        raise RiskcalError(
            f"thresholds: the column policy holds the same where threshold is {alike.min():g} and where it is "
            f"{alike.max():g}; leave them out there, or number the vectors in the column threshold, one number each."
        )
    if "thresholds" in table:
        raise RiskcalError(
            "thresholds: in its column and in the column policy; record one of the two."
        )
    return in_policy


def refuse_unrecorded_schedule(given: Any) -> None:
    """Refuse a schedule for a candidate that was replayed without one, as far as its columns say."""
    if given is None or given == Constant():
        return
    raise RiskcalError(
        f"schedule: {given} was given, but these runs were replayed without one as far as their columns say, so that another "
        "rule would be certified than was replayed: leave it out, or replay with it, replay_traces(..., schedule=...). If it was "
        "replayed with, by a program of yours, the records must say so: put it into the columns temperature, max_length and form "
        "(runs.to_frame().assign(...)), and read them with Runs.from_frame."
    )


def _recorded_schedule(row: pd.Series, given: Any) -> Decaying:
    """The decaying schedule that a candidate ran with; what the records leave open must be given, and fit."""
    temperature = float(row["temperature"])
    if "max_length" in row and "form" in row:
        recorded = Decaying(temperature, int(row["max_length"]), row["form"])
        if given not in (None, recorded):
            raise RiskcalError(f"schedule: {given} is not the recorded {recorded}; leave it out.")
        return recorded
    if not isinstance(given, Decaying) or given.temperature != temperature:
        raise RiskcalError(
            f"schedule: the records decay with temperature {temperature:g} but do not say over what length and in which form; "
            f"give schedule=Decaying({temperature:g}, max_length=...) as it was recorded. If it is the temperature of sampling, "
            "nothing decayed: read them with columns={'temperature_logged': 'temperature'} (on the shell --columns "
            "temperature_logged=temperature)."
        )
    return given


def _filling(name: str, value: Any, written: Mapping[str, Any]) -> Any:
    """What a column of the name of an `ExitPolicy` field puts into it; nothing else than what the column policy says."""
    held = _held(value)
    if name not in (*_OF_EXITS, *_OF_MODELS):
        raise RiskcalError(
            f"{name}: {held!r} cannot stand in the policy's field of that name, which is no single number or text. Rename the "
            "column, to have it among the policy's coordinates, or record the field as JSON in a column policy."
        )
    filling = int(held) if isinstance(held, float) and held.is_integer() else held
    if name in written and written[name] != filling:
        raise RiskcalError(
            f"{name}: {filling!r} in its column, but {written[name]!r} in the column policy; record one of the two."
        )
    return filling


def _held(value: Any) -> Any:
    """A coordinate as JSON holds it."""
    plain = value.item() if isinstance(value, np.generic) else value
    return "full" if isinstance(plain, float) and math.isinf(plain) else plain


def _recorded_fields(kind: "type[ExitPolicy]", text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that a cell of the column ``policy`` holds: those without a column of their own, thresholds per exit perhaps.

    Whoever writes that column names everything: what it leaves out had its default. Beside them, what it does not leave out.
    """
    try:
        fields = _once(text)
        recorded = kind(**fields)
    except (TypeError, ValueError) as error:
        raise RiskcalError(
            f"policy: the records hold {text!r}, which is not an object of policy fields ({error})."
        ) from None
    own = [name for name in fields if name in FIELDS_ELSEWHERE - {"thresholds"}]
    if own:
        raise RiskcalError(
            f"policy: the records' column holds {own[0]!r}, which has a column of its own or is what calibration finds; "
            "leave it out there."
        )
    said = [
        name for name in kind.model_fields if name not in (*FIELDS_ELSEWHERE, *_OF_MODELS, "config")
    ]
    given = {name: getattr(recorded, name) for name in (*said, *fields)}
    given |= {name: given[name] or DEFAULTS[name] for name in ("cache", "batching")}
    return given, fields
