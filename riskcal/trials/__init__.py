"""How large and how stable savings are: `run_trials` over repeated splits, `compare` over tests and procedures.

Neither issues a certificate. What is to be deployed comes from `riskcal.calibrate`, on data that were not used to choose it.
"""

from riskcal.trials.compare import compare as compare
from riskcal.trials.compare import split_pilot as split_pilot
from riskcal.trials.run import run_trials as run_trials
from riskcal.trials.run import summary as summary
