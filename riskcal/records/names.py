"""Columns that mean something by their names, in records and in a calibration's table."""

#: What is known of a prompt beside its id.
LABELS = ("cluster", "group", "text")

#: What came of a generation, or of the full model's.
OUTCOMES = ("dissimilarity", "risk", "full_risk", "failed")

#: What is said once of all rows.
THROUGHOUT = ("source", "exact", "stopped", "lower_is_stricter")

#: Columns of runs that are no setting of a decoder.
NO_SETTINGS = ("prompt", *LABELS, *OUTCOMES, *THROUGHOUT)

#: Columns of traces alone.
OF_TRACES = ("position", "confidence", "agrees", "loss", "lengths")

#: Columns of a calibration's table in which results stand, beside those that begin with ``loss_``.
RESULTS = ("n", "loss", "pvalue", "bound", "variance_left", "certified", "chosen")
