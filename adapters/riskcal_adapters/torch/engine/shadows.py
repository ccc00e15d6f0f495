"""What a served output lost against the full model's, as an event tells it."""

from collections.abc import Callable
from typing import Any

from riskcal_adapters.torch.engine.requests import Done

#: Of the served and the full model's text, or lists of ids where there is no tokenizer.
Loss = Callable[[Any, Any], float]


def differ(served: Any, full: Any) -> float:
    """1 where the outputs differ, else 0."""
    return float(served != full)


def compared(served: Done, full: Done, loss: Loss, *, has_text: bool) -> dict[str, Any]:
    """The attributes of ``riskcal.shadow.evaluated``; a loss that fails is None, which monitors count as worst."""
    outputs = (
        (served.text, full.text) if has_text else (served.tokens.tolist(), full.tokens.tolist())
    )
    pairs = list(zip(served.tokens.tolist(), full.tokens.tolist(), strict=False))
    told: dict[str, Any] = {
        "gen_ai.response.id": served.id,
        "riskcal.task": served.task or "",
        "riskcal.token.disagreement": 1
        - sum(one == other for one, other in pairs) / max(len(served.tokens), len(full.tokens)),
    }
    try:
        told["riskcal.loss"] = float(loss(*outputs))
    except Exception as error:  # the user's own function; the service goes on
        told |= {"riskcal.loss": None, "riskcal.error": f"{type(error).__name__}: {error}"}
    return told
