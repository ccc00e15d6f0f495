"""Between a policy and the columns of a table: the one place where its fields become columns and come back."""

#: Columns of a decaying schedule; empty where nothing decays.
SCHEDULE_COLUMNS = ("temperature", "max_length", "form")

#: All columns of a candidate beside its threshold that an `ExitPolicy` has fields for.
CANDIDATE_COLUMNS = (*SCHEDULE_COLUMNS, "min_layer", "measure", "policy")
