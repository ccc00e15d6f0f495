"""One self-contained HTML page of what was calibrated: `riskcal report`, and `Calibration.report`."""

from riskcal.report.write import write as write
