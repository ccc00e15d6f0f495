"""`alarm_delays`: how long a monitor takes to notice, by simulation."""

import math

import numpy as np
from numpy.typing import ArrayLike

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.monitor.watching import RiskMonitor

#: Losses that are drawn at once.
_BLOCK = 256


def alarm_delays(
    monitor: RiskMonitor,
    losses: ArrayLike,
    *,
    rate: float = 1.0,
    draws: int = 1000,
    most: int = 100_000,
    seed: int = 0,
) -> Floats:
    """Requests from now until a monitor's alarm, if losses are henceforth drawn from these.

    Parameters
    ----------
    monitor : RiskMonitor
        As it stands: a new one, or one that has seen good losses, after which Ville's alarm takes longer. It is left as it is.
    losses : (n,) array_like
        What a bad day's losses may be: recorded ones of another kind of prompts, or ``[1] * bad + [0] * good``.
    rate : float
        Share of requests whose loss is measured, by an independent coin.
    draws : int
        Simulated days.
    most : int
        Losses after which a day without an alarm is given up.
    seed : int
        Of the draws.

    Returns
    -------
    (draws,) float
        Requests to the alarm, the one that raised it included; inf where there was none.

    Raises
    ------
    RiskcalError
        For a monitor that has alarmed already or takes proxies, losses out of its bounds, and a rate outside (0, 1].

    Examples
    --------
    >>> monitor = riskcal.RiskMonitor(0.05, average_run_length=5000)
    >>> delays = riskcal.serving.alarm_delays(monitor, [1.0] * 15 + [0.0] * 85, rate=0.02)
    >>> bool(3000 < np.median(delays) < 5000)
    True
    """
    if not isinstance(monitor, RiskMonitor):
        raise RiskcalError(
            f"monitor: {_validate.shown(monitor)} is none; give a riskcal.RiskMonitor."
        )
    if monitor.alarm or monitor.proxy is not None:
        why = (
            "has alarmed already"
            if monitor.alarm
            else "takes proxies, which losses alone do not tell"
        )
        raise RiskcalError(f"monitor: {why}; give another.")
    given = _validate.array(losses, "losses", ndim=(1,))
    share = _validate.number(rate, "rate")
    if not 0.0 < share <= 1.0:
        raise RiskcalError(
            f"rate: {share:g} is outside (0, 1]; give the share of requests that are shadowed."
        )
    _validate.count(draws, "draws", least=1)
    _validate.count(most, "most", least=1)
    rng = np.random.default_rng(seed)
    state = monitor.to_json()
    needed = np.full(draws, math.inf)
    for draw in range(draws):
        day = RiskMonitor.from_json(state)
        while not day.alarm and day.n - monitor.n < most:
            day.update(rng.choice(given, min(_BLOCK, most - (day.n - monitor.n))))
        if day.alarm_at is not None:
            seen = day.alarm_at - monitor.n
            needed[draw] = seen + (rng.negative_binomial(seen, share) if share < 1.0 else 0)
    return needed
