"""Arguments of serving and calibration that are of another kind altogether are refused by name; nothing else escapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from riskcal import RiskcalError, Runs, calibrate
from riskcal.serving import EventLog, KillSwitch, PolicyBook

RUNS = Runs.from_arrays(
    thresholds=[0.9, 0.5], dissimilarity=np.zeros((9, 2)), costs={"price": [2.0, 1.0]}
)

CALLS: dict[str, Callable[[Any], Any]] = {
    "policies": PolicyBook,
    "path": EventLog,
    "path of a switch": lambda value: KillSwitch(path=value),
    "budget": lambda value: calibrate(RUNS, delta=0.5, budget=value),
    "cost": lambda value: calibrate(RUNS, delta=0.5, cost=value),
}


@pytest.mark.parametrize("value", [3, ["price"], [("price", 0.5)]], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_they_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RiskcalError, match=rf"^{name.split()[0]}: "):
        CALLS[name](value)
