"""Calibration prompt by prompt, which may stop at any time."""

from riskcal.adaptive.calibration import AdaptiveCalibration as AdaptiveCalibration
