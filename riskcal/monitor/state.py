"""The state of a `RiskMonitor` as JSON."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from riskcal import policy
from riskcal._validate import RiskcalError

#: How many bettors there are.
BETS = 6
#: How many sums are kept of proxies.
SUMS = 8


class Parameters(BaseModel):
    """The constructor's arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    delta: float
    epsilon: float
    average_run_length: float | None
    lower: float
    upper: float
    sampling_rate: float
    proxy: tuple[float, float] | None = Field(default=None, strict=False)


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
    sums: list[float] | None = Field(default=None, min_length=SUMS, max_length=SUMS)

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
        if (state.sums is None) != (state.parameters.proxy is None):
            raise RiskcalError("sums: are there if and only if a proxy is; the state was edited.")
        return state

    def written(self) -> str:
        """As JSON; of proxies only where there is one."""
        without = {"sums": True, "parameters": {"proxy"}} if self.sums is None else None
        return self.model_dump_json(exclude=without)  # type: ignore[arg-type]
