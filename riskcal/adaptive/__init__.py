"""Calibration prompt by prompt, which may stop at any time."""

from riskcal.adaptive.calibration import AdaptiveCalibration as AdaptiveCalibration
from riskcal.adaptive.capital import rows_to_certify as rows_to_certify
