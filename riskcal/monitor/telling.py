"""What a `RiskMonitor` says of itself, in a sentence and a picture."""

import html as _html
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from riskcal import plots
from riskcal._validate import Floats

if TYPE_CHECKING:
    from riskcal.monitor.watching import RiskMonitor

_LARGEST = 700.0  # exp of this is a float


def sentence(monitor: "RiskMonitor") -> str:
    """The state, the evidence, and how often it errs."""
    if monitor.n == 0:
        return f"no losses yet, so that nothing is known; tolerated {monitor.delta:g}; {_claim(monitor)}."
    state = f"ALARM, raised after {monitor.alarm_at:,} losses" if monitor.alarm else "no alarm"
    seen = f"{monitor.n:,} losses seen"
    if monitor.sampling_rate < 1:
        seen += f" (about {monitor.requests:,.0f} requests)"
    seen += f", mean {monitor.mean_loss:.4g}"
    evidence = f"evidence {monitor.evalue:.4g} of {monitor.limit:g}"
    return f"{state}; {seen}; tolerated {monitor.delta:g}; {evidence}; {_claim(monitor)}."


def html(monitor: "RiskMonitor") -> str:
    """The sentence for a notebook; an alarm is seen at once."""
    style = ' style="color: #b3261e; font-weight: bold"' if monitor.alarm else ""
    return f"<p{style}>{_html.escape(sentence(monitor))}</p>"


def picture(monitor: "RiskMonitor", shares: Floats, growth: Floats, ax: Any) -> Any:
    """Each bet's capital, whose mean is the monitor's ``evalue``, beside its ``limit``."""
    capital = np.exp if monitor.average_run_length is None else np.expm1
    table = pd.DataFrame({"share": shares, "capital": capital(np.minimum(growth, _LARGEST))})
    axes = plots.bets(table, limit=monitor.limit, ax=ax)
    said = f"{monitor.n:,} losses" + (", alarm" if monitor.alarm else "")
    axes.set_title(said, loc="right", fontsize="small")
    return axes


def _claim(monitor: "RiskMonitor") -> str:
    if monitor.average_run_length is None:
        return f"a false alarm is ever raised with probability at most {monitor.epsilon:g}"
    length = f"{monitor.average_run_length:,.0f} losses"
    if monitor.sampling_rate < 1:
        length += f" ({monitor.average_run_length / monitor.sampling_rate:,.0f} requests)"
    return f"a false alarm comes after {length} or more on average"
