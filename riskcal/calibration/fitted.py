"""Prompts on which a learned risk was fitted: what was learned on them cannot be calibrated on them."""

from riskcal._validate import RiskcalError
from riskcal.policy.columns import recorded_limit
from riskcal.records import Runs, fitted_on
from riskcal.records.columns import plain


def refuse_fitted(runs: Runs) -> None:
    """Refuse runs of a learned risk's candidates that hold prompts which it was fitted on."""
    if "learned" not in runs.candidates.columns:
        return
    if "cluster" in runs.labels:
        raise RiskcalError(
            "cluster: a learned risk is fitted on a share of the prompts by their own ids, so that prompts of one cluster stand "
            "on both sides; learn and calibrate on one prompt of each cluster, with the cluster's id as its own."
        )
    shares = {recorded_limit(text).fit_fraction for text in runs.candidates["learned"]}
    inside = fitted_on(runs.prompts, max(shares))
    if inside.any():
        first = plain(runs.prompts[int(inside.argmax())])
        raise RiskcalError(
            f"prompt: {first!r} belongs to the share of {max(shares):g} that the risk was fitted on ({int(inside.sum())} such "
            "prompts); a risk is certified on others. LearnedRisk.rest leaves them out of traces, LearnedRisk.fitted_on tells "
            "which they are."
        )
