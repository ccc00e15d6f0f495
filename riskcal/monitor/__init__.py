"""Watching a deployed policy."""

from riskcal.monitor.delays import alarm_delays as alarm_delays
from riskcal.monitor.watching import RiskMonitor as RiskMonitor
