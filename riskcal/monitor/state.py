"""The state of a `RiskMonitor` as JSON."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from riskcal import policy
from riskcal._validate import RiskcalError

#: How many bettors there are.
BETS = 6


class Parameters(BaseModel):
    """The constructor's arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    delta: float
    epsilon: float
    average_run_length: float | None
    lower: float
    upper: float
    sampling_rate: float


class State(BaseModel):
    """All that the next row needs, as it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    kind: Literal["riskcal.RiskMonitor"]
    schema_version: Literal[1]
    parameters: Parameters
    n: int = Field(ge=0)
    alarm_at: int | None = Field(ge=0)
    growth: list[float] = Field(min_length=BETS, max_length=BETS)
    totals: list[Annotated[float, Field(ge=0)]] = Field(min_length=2, max_length=2)

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """Any text that is no state, and a state that cannot be, are refused."""
        try:
            state = cls.model_validate_json(text)
        except ValidationError as error:
            raise RiskcalError(f"state: {policy.refusal('state', error)}") from None
        if state.alarm_at is not None and state.alarm_at > state.n:
            raise RiskcalError(
                f"alarm_at: {state.alarm_at} exceeds the {state.n} losses seen; the state was edited."
            )
        return state
