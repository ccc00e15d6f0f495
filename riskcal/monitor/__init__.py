"""Watching a deployed policy."""

from riskcal.monitor.watching import RiskMonitor as RiskMonitor
