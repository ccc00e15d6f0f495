"""Pictures of tables. Takes DataFrames, imports nothing of riskcal but its checks, and matplotlib only when called."""

from riskcal.plots.curves import cost_curve, risk_curve, trade_off, trials_curve
from riskcal.plots.exits import agreement_curve, bets, heads_curve, needed_confidence
from riskcal.plots.styles import Style, style

__all__ = [
    "Style",
    "agreement_curve",
    "bets",
    "cost_curve",
    "heads_curve",
    "needed_confidence",
    "risk_curve",
    "style",
    "trade_off",
    "trials_curve",
]
