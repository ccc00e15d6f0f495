"""The fields of an `ExitPolicy` that a calibrated candidate's row of records holds."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd

from riskcal._validate import RiskcalError
from riskcal.policy import CANDIDATE_COLUMNS, COLUMNS, DEFAULTS, ExitPolicy
from riskcal.policy.schedules import Decaying

#: Fields of `ExitPolicy` that a column of their name fills; the other fields have a structure, or are what calibration finds.
_OF_EXITS = ("cache", "max_pending", "emits", "batching")
_OF_MODELS = ("max_new_tokens", "n_layers", "weights", "classifier_weights", "dtype", "tokenizer")


def recorded_policy(table: pd.DataFrame, chosen: pd.Series | None, schedule: Any) -> dict[str, Any]:
    """The fields of `ExitPolicy` that a calibrated candidate's row of records holds, every coordinate in one of them."""
    row = table.iloc[0] if chosen is None else chosen
    columns = [str(name) for name in table.columns[: table.columns.get_loc("n")]]
    given: dict[str, Any] = {"threshold": math.inf if chosen is None else float(row["threshold"])}
    if "measure" in columns:
        given["measure"] = str(row["measure"])
    if "min_layer" in columns:
        given["min_layer"] = int(row["min_layer"])
    if chosen is not None and not pd.isna(row.get("temperature", math.nan)):
        given["schedule"] = _recorded_schedule(row, schedule)
    if "policy" in columns:
        vectors = table["policy"].nunique() == table["threshold"].nunique()
        given |= _recorded_fields(str(row["policy"]), vectors=vectors, tested=chosen is not None)
    others = [name for name in columns if name not in ("threshold", *CANDIDATE_COLUMNS)]
    own = [name for name in others if name in ExitPolicy.model_fields]
    written = json.loads(str(row["policy"])) if "policy" in columns else {}
    if chosen is None:  # the full model has no setting of exits, and is told from no candidate
        own = [name for name in own if name in _OF_MODELS and table[name].nunique() == 1]
    for name in own:
        value = _filling(name, row[name])
        if name in written and written[name] != value:
            raise RiskcalError(
                f"{name}: {value!r} in its column, but {written[name]!r} in the column policy; record one of the two."
            )
        given[name] = value
    free = [name for name in others if name not in ExitPolicy.model_fields]
    if chosen is not None and free:
        given["coordinates"] = {name: _held(row[name]) for name in free}
    return given


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
            f"schedule: the records decay with temperature {temperature:g} but do not say over what length; give "
            f"schedule=Decaying({temperature:g}, max_length=...) as it was recorded."
        )
    return given


def _filling(name: str, value: Any) -> Any:
    """What a column of the name of an `ExitPolicy` field puts into it."""
    held = _held(value)
    if name not in (*_OF_EXITS, *_OF_MODELS):
        raise RiskcalError(
            f"{name}: {held!r} cannot stand in the policy's field of that name, which is no single number or text. Rename the "
            "column, to have it among the policy's coordinates, or record the field as JSON in a column policy."
        )
    return int(held) if isinstance(held, float) and held.is_integer() else held


def _held(value: Any) -> Any:
    """A coordinate as JSON holds it."""
    plain = value.item() if isinstance(value, np.generic) else value
    return "full" if isinstance(plain, float) and math.isinf(plain) else plain


def _recorded_fields(text: str, *, vectors: bool, tested: bool) -> dict[str, Any]:
    """The fields of a policy that a candidate ran with, beyond those that records have columns for.

    Whoever writes that column names everything: what it leaves out had its default. Where each threshold has a text of its own
    (``vectors``), thresholds per exit layer may stand there, of which ``threshold`` is then but the name; the full model (not
    ``tested``) has none.
    """
    try:
        fields = json.loads(text)
        recorded = ExitPolicy(**fields)
    except (TypeError, ValueError) as error:
        raise RiskcalError(
            f"policy: the records hold {text!r}, which is not an object of policy fields ({error})."
        ) from None
    own = [name for name in fields if name in COLUMNS and not (vectors and name == "thresholds")]
    if own:
        raise RiskcalError(
            f"policy: the records' column holds {own[0]!r}, which has a column of its own or is what calibration finds; "
            "leave it out there."
        )
    named = {name: getattr(recorded, name) or DEFAULTS[name] for name in ("cache", "batching")}
    given = named | {name: getattr(recorded, name) for name in fields}
    if "thresholds" in given:
        return (
            given | {"threshold": math.inf}
            if tested
            else {n: v for n, v in given.items() if n != "thresholds"}
        )
    return given
