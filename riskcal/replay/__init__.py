"""What would have exited where, read off one recorded path."""

from riskcal.records.tokens import TokenLosses as TokenLosses
from riskcal.replay.replay import replay_arrays as replay_arrays
from riskcal.replay.replay import replay_traces as replay_traces
