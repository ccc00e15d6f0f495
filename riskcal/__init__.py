"""Calibrated early exit, with a finite-sample guarantee.

>>> import riskcal
>>> calibration = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1)
>>> calibration.policy().save("policy.json")
"""

from riskcal import bounds as bounds
from riskcal import efficiency as efficiency
from riskcal import fwer as fwer
from riskcal import heads as heads
from riskcal import monotone as monotone
from riskcal import pvalues as pvalues
from riskcal import report as report
from riskcal import serving as serving
from riskcal._validate import RiskcalError as RiskcalError
from riskcal.adaptive import AdaptiveCalibration as AdaptiveCalibration
from riskcal.calibration import Calibration as Calibration
from riskcal.calibration import ClassCalibration as ClassCalibration
from riskcal.calibration import calibrate as calibrate
from riskcal.calibration import calibrate_classes as calibrate_classes
from riskcal.calibration import calibrate_groups as calibrate_groups
from riskcal.calibration.planning import plan as plan
from riskcal.calibration.verifying import verify as verify
from riskcal.examples import load_example as load_example
from riskcal.monitor import RiskMonitor as RiskMonitor
from riskcal.policy import Certificate as Certificate
from riskcal.policy import Contrast as Contrast
from riskcal.policy import ExitPolicy as ExitPolicy
from riskcal.policy import Sampling as Sampling
from riskcal.policy import Stop as Stop
from riskcal.policy.pruning import Pruning as Pruning
from riskcal.policy.schedules import Constant as Constant
from riskcal.policy.schedules import Decaying as Decaying
from riskcal.records import Runs as Runs
from riskcal.records import Traces as Traces
from riskcal.replay import replay_arrays as replay_arrays
from riskcal.replay import replay_traces as replay_traces
from riskcal.trials import compare as compare
from riskcal.trials import run_trials as run_trials
from riskcal.trials import split_pilot as split_pilot

#: The only place where the version stands; the metadata are built from it.
__version__ = "0.2.0"
