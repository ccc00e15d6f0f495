"""What a served output lost against the full model's, as an event tells it."""

from collections.abc import Callable
from typing import Any

from riskcal import RiskcalError, internal
from riskcal_adapters.torch.engine.requests import Done

#: Of the served and the full model's text, or lists of ids where there is no tokenizer.
Loss = Callable[[Any, Any], float]


def differ(served: Any, full: Any) -> float:
    """1 where the outputs differ, else 0."""
    return float(served != full)


def compared(
    served: Done, full: Done, loss: Loss, bounds: tuple[float, float], *, has_text: bool
) -> dict[str, Any]:
    """The attributes of ``riskcal.shadow.evaluated``; a loss that fails is None, which monitors count as worst."""
    outputs = (
        (served.text, full.text) if has_text else (served.tokens.tolist(), full.tokens.tolist())
    )
    pairs = list(zip(served.tokens.tolist(), full.tokens.tolist(), strict=False))
    told: dict[str, Any] = {
        "riskcal.token.disagreement": 1
        - sum(one == other for one, other in pairs) / max(len(served.tokens), len(full.tokens)),
    }
    try:
        if full.error is not None:
            raise RiskcalError(full.error)
        told["riskcal.loss"] = _within(loss(*outputs), bounds)
    except Exception as error:  # the user's own function; the service goes on
        told |= {"riskcal.loss": None, "riskcal.error": f"{type(error).__name__}: {error}"}
    return told


def _within(value: Any, bounds: tuple[float, float]) -> float:
    """A loss within the bounds that are certified, up to rounding."""
    lower, upper = bounds
    loss = internal.number(value, "loss")
    if not lower - internal.TOLERANCE <= loss <= upper + internal.TOLERANCE:
        raise RiskcalError(f"loss: {loss:g} is outside [{lower:g}, {upper:g}]; scale or clip it.")
    return min(max(loss, lower), upper)
