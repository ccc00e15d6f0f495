"""`calibrate` and what it is made of: problem -> p-values -> selection -> result."""

from riskcal import fwer, pvalues
from riskcal.calibration.calibrate import calibrate as calibrate
from riskcal.calibration.class_result import ClassCalibration as ClassCalibration
from riskcal.calibration.classes import calibrate_classes as calibrate_classes
from riskcal.calibration.groups import calibrate_groups as calibrate_groups
from riskcal.calibration.result import Calibration as Calibration

#: The names of tests and of procedures that `calibrate` knows.
TESTS = tuple(pvalues.BY_NAME)
PROCEDURES = tuple(fwer.BY_NAME)
