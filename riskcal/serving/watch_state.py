"""The state of an `EventWatch` as JSON holds it: what may stand where."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from riskcal import policy
from riskcal._validate import RiskcalError

Count = Annotated[int, Field(ge=0, lt=2**63)]
#: JSON has no tuples.
Seen = Annotated[tuple[Count, float], Field(strict=False)]
Whole = dict[str, int]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Past(_Part):
    """Values of a feature, ascending, and how often each was seen."""

    values: list[float] = Field(min_length=1)
    counts: list[Count]

    @model_validator(mode="before")
    @classmethod
    def _named(cls, pair: Any) -> Any:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("must be two lists")
        return {"values": pair[0], "counts": pair[1]}

    @model_validator(mode="after")
    def _alike(self) -> "Past":
        ascending = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        if len(self.values) != len(self.counts) or not ascending:
            raise ValueError("must be ascending values and a count of each")
        return self


class Feature(_Part):
    """A feature that is watched for drift."""

    past: Past
    monitors: dict[str, str]


class DriftState(_Part):
    """Of a `Drift`."""

    salt: str
    epsilon: float
    average_run_length: float | None
    features: dict[str, Feature]


class StrataState(_Part):
    """Of `Strata`; an earlier state says less."""

    difficulties: dict[str, dict[str, Seen]] = {}
    classes: dict[str, dict[str, Seen]] = {}
    layers: dict[str, dict[str, Whole]] = {}
    drafts: dict[str, Annotated[tuple[int, int], Field(strict=False)]] = {}
    weights: Whole = {}
    temperatures: Whole = {}


class State(_Part):
    """All that the next event needs; an earlier state says less."""

    kind: Literal["riskcal.EventWatch"]
    schema_version: Literal[1]
    monitor: str
    counts: Whole
    losses: dict[str, Seen]
    disagreements: dict[str, Seen] = {}
    events: Whole = {}
    layers: dict[str, Whole]
    strata: StrataState = StrataState()
    drift: DriftState | None = None
    served: list[str] = []
    seen: list[str]
    absent: dict[str, str] = {}
    place: Annotated[tuple[Count, Count], Field(strict=False)] | None
    known_by: str = ""
    clock: int


def refuse_others(state: Any) -> None:
    """Refuse what is no state, by the field that says so."""
    try:
        State.model_validate(state)
    except ValidationError as error:
        raise RiskcalError(policy.refusal("state", error)) from None
