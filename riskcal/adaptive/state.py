"""The state of an `AdaptiveCalibration` as JSON."""

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from riskcal import policy
from riskcal._validate import Floats, RiskcalError
from riskcal.adaptive.capital import CONSTANT, Capital


class Parameters(BaseModel):
    """The constructor's arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    thresholds: list[float]
    delta: float
    epsilon: float
    bets: str
    target: float | None
    lower: float
    upper: float
    objective: str
    attempt: int | None


class State(BaseModel):
    """All that the next row needs, as it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    kind: Literal["riskcal.AdaptiveCalibration"]
    schema_version: Literal[1]
    parameters: Parameters
    prompts: list[int | str]
    used: int = Field(ge=0)
    accounts: list[list[float]]
    spread: list[Annotated[float, Field(gt=0)]]
    total: list[float] | None = None  # None: written before the hedger looked at it
    best: list[Annotated[float, Field(ge=0)]]
    loss_sum: list[float]
    rows: list[Annotated[int, Field(ge=0)]]
    digest: str = Field(pattern="^[0-9a-f]{32}$")

    @classmethod
    def read(cls, text: str | bytes) -> Self:
        """Any text that is no state is refused."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RiskcalError(f"state: {policy.refusal('state', error)}") from None

    def refuse_edited(self, prompts: list[int | str], k: int) -> None:
        """Refuse a state that no calibration of k thresholds on these prompts, in tested order, can have."""
        if prompts != self.prompts:
            raise RiskcalError("prompts: they do not stand in tested order; the state was edited.")
        shapes = {
            "accounts": (len(CONSTANT) + 1, k),
            "spread": (k,),
            "best": (k,),
            "loss_sum": (k,),
            "rows": (k,),
        }
        shapes |= {} if self.total is None else {"total": (k,)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if len(value) != shape[0] or (
                name == "accounts" and any(len(row) != k for row in value)
            ):
                raise RiskcalError(f"{name}: does not have shape {shape}; the state was edited.")
        if self.used > len(prompts) or max(self.rows) > self.used:
            raise RiskcalError(
                "used: more prompts are counted than there are; the state was edited."
            )

    def capital(self) -> Capital:
        """What the bettors own."""
        total = self._total_of_old_state() if self.total is None else np.array(self.total)
        return Capital(np.array(self.accounts), np.array(self.spread), total, np.array(self.best))

    def _total_of_old_state(self) -> Floats:
        """Sum of losses on the unit interval, those of rows that a candidate did not need at delta."""
        lower, width = self.parameters.lower, self.parameters.upper - self.parameters.lower
        rows = np.array(self.rows, dtype=np.int64)
        seen = (np.array(self.loss_sum) - rows * lower) / width
        total: Floats = seen + (self.used - rows) * ((self.parameters.delta - lower) / width)
        return total
