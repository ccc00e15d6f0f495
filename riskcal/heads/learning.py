"""`learn_risk`: maps from confidence to risk, one for each exit, fitted on prompts that are then set aside."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from riskcal import _validate, records
from riskcal._validate import Floats, RiskcalError
from riskcal.heads.inputs import _layers
from riskcal.heads.learned import LearnedRisk, RiskMap
from riskcal.policy import ids_digest
from riskcal.records import Traces
from riskcal.records.columns import plain


def learn_risk(
    traces: Traces,
    *,
    fit_fraction: float = 0.3,
    layers: Sequence[int] | None = None,
    measure: str | None = None,
) -> LearnedRisk:
    """Learn from traces how likely it is that leaving at an exit is wrong, given the confidence there.

    Parameters
    ----------
    traces : Traces
        Of one task; for several tasks learn a risk of each, and route with a `riskcal.serving.PolicyBook`. Every row with
        the same exits.
    fit_fraction : float
        The share of all prompts, in (0, 1), that the maps are fitted on: those whose ids' hash is below it. The others are
        not looked at, and only they can be calibrated on.
    layers : (L - 1,) ints, optional
        The layers after which the exits before the last stand, ascending. Default: 1 to L - 1.
    measure : str, optional
        What the confidences are, ``"softmax"`` for instance: policies name it.

    Returns
    -------
    LearnedRisk

    Raises
    ------
    RiskcalError
        For rows of unequal numbers of exits or a single one, infinite confidences, fewer than two prompts on either side, and
        prompts that are only numbered: nothing would tell afterwards which of them were fitted on.

    Notes
    -----
    Each map is the antitonic least-squares fit of the loss (1 where the exit's token is not the last one's, or the recorded
    ``loss``) on the confidence, by pooling adjacent violators (Ayer et al. 1955, `scipy.optimize.isotonic_regression`), of
    all tokens alike, those that an earlier exit would have taken among them. So that a few tokens that happen to agree do not
    make a risk of 0, the highest confidence counts one token more than was seen, which is wrong; no risk is then below
    1 / (tokens + 1). Steps begin halfway between two confidences that were seen. The maps need not be right: whatever they
    are, `riskcal.calibrate` certifies what comes of them. Better maps only save more.

    Examples
    --------
    >>> learned = riskcal.heads.learn_risk(riskcal.load_example("g2p-traces"), measure="softmax")
    >>> policy = learned.policy(0.05)  # to be calibrated: the maps may be wrong
    >>> sorted(policy.thresholds), policy.measure
    ([1, 2, 3, 4, 5, 6, 7], 'softmax')
    """
    share = _validate.level(fit_fraction, "fit_fraction")
    if traces.lengths is not None or traces.n_layers < 2:
        raise RiskcalError(
            "traces: a map for each exit needs the same exits, two at least, in every row; for decisions of any length certify "
            "one threshold: calibrate(replay_traces(traces, thresholds, exact=True), ...)."
        )
    prompts = np.unique(traces.prompt)
    if records.numbered(prompts):
        raise RiskcalError(
            f"prompt: {plain(prompts[0])!r} and so on only number the prompts, so that nothing tells afterwards which of them "
            "the risk was fitted on; give ids that stay with the prompt, of the request or a hash of its text."
        )
    chosen = records.fitted_on(prompts, share)
    if chosen.sum() < 2 or (~chosen).sum() < 2:
        raise RiskcalError(
            f"fit_fraction: {share:g} of {len(prompts)} prompts sets {int(chosen.sum())} aside to fit on and leaves "
            f"{int((~chosen).sum())}; each needs at least two."
        )
    rows = records.fitted_on(prompts, share)[np.searchsorted(prompts, traces.prompt)]
    confidence = traces.confidence[rows, :-1].astype(np.float64)
    _refuse_infinite(traces.confidence[:, :-1])
    outcome = traces.agrees if traces.loss is None else traces.loss
    assert outcome is not None
    wrong = outcome[rows, :-1].astype(np.float64)
    wrong = 1.0 - wrong if traces.loss is None else wrong
    return LearnedRisk(
        maps=tuple(_map(confidence[:, j], wrong[:, j]) for j in range(confidence.shape[1])),
        layers=tuple(_layers(layers, confidence.shape[1]).tolist()),
        measure=measure,
        fit_fraction=share,
        fit_n=int(chosen.sum()),
        fit_tokens=int(rows.sum()),
        fit_digest=ids_digest(prompts[chosen].tolist()),
    )


def _map(confidence: Floats, wrong: Floats) -> RiskMap:
    """One exit's staircase; none where no confidence is known."""
    from scipy.optimize import isotonic_regression

    known = ~np.isnan(confidence)
    if not known.any():
        return RiskMap(confidence=(), risk=())
    values, code = np.unique(confidence[known], return_inverse=True)
    tokens = np.bincount(code).astype(np.float64)
    errors = np.bincount(code, wrong[known])
    tokens[-1] += 1.0  # one more than was seen, and wrong
    errors[-1] += 1.0
    fitted = isotonic_regression(errors / tokens, weights=tokens, increasing=False)
    begin = fitted.blocks[:-1]
    risk = np.clip(fitted.x[begin], 0.0, 1.0)
    own = np.r_[True, np.diff(risk) < 0]  # rounding may leave neighbours alike
    begin, risk = begin[own], risk[own]
    edges = values[begin]
    edges[1:] = 0.5 * (values[begin[1:] - 1] + values[begin[1:]])
    between = edges[1:] > values[begin[1:] - 1]
    edges[1:] = np.where(between, edges[1:], values[begin[1:]])
    return RiskMap(confidence=tuple(edges.tolist()), risk=tuple(risk.tolist()))


def _refuse_infinite(confidence: NDArray[Any]) -> None:
    infinite = np.isinf(confidence)
    if infinite.any():
        raise RiskcalError(
            f"confidence: {confidence[infinite][0]} at index {_validate.first(infinite)}; give finite confidences, or NaN for a "
            "token that must not exit there."
        )
