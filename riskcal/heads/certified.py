"""`certified`: thresholds at which the pooled agreement of a cascade of heads is certified."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _validate, fwer
from riskcal._validate import Floats
from riskcal.heads.decisions import _in_turn
from riskcal.heads.inputs import (
    Bools,
    _agreement,
    _digest,
    _layers,
    _most,
    _Records,
    _records,
    _tokens,
)
from riskcal.heads.outlook import _certified_message, _failure_message, _pvalue, _share
from riskcal.heads.path import _count, _Counts, _Goal, _path, _spared
from riskcal.heads.result import HeadCalibration
from riskcal.records.alignment import numbers_of, refuse_other_rows


def certified(
    confidence: ArrayLike,
    agrees: ArrayLike,
    *,
    prompts: ArrayLike,
    max_tokens: int,
    agreement: float = 0.9,
    epsilon: float = 0.05,
    pilot_fraction: float = 0.2,
    layers: Sequence[int] | None = None,
) -> HeadCalibration:
    """Thresholds at which every head's exited tokens agree often enough, with probability at least 1 - epsilon.

    Parameters
    ----------
    confidence : (N, K)
        Of each token at each head, shallowest head first; NaN never exits. Leave out the last layer: it is the full model.
    agrees : (N, K)
        Whether that head's token is the full model's: booleans, or 0 and 1.
    prompts : (N,)
        The prompt of each token, integers or strings, in any order. Prompts are the independent units; where they share a
        source, give the source instead.
    max_tokens : int
        The most tokens that a prompt can have (the decoder's length limit), fixed before the data were seen. The closer
        to the usual length, the fewer prompts are needed.
    agreement : float
        The pooled agreement to certify, in (0, 1).
    epsilon : float
        Probability, over the draw of the calibration prompts, that a false certificate is issued.
    pilot_fraction : float
        Share of the prompts that choose which thresholds are tested, and are not tested themselves.
    layers : (K,) ints
        The layers after which the heads stand, ascending, from 1: ``layers=[2, 4, 6]`` for columns of heads after layers 2, 4
        and 6. Without it the columns are taken for layers 1 to K, which is right only if every layer from the first on has a
        head; the policy warns of it.

    Returns
    -------
    HeadCalibration
        Its thresholds are such that, in the cascade they form (a token leaves at the first head whose threshold it
        reaches), the pooled agreement is at least ``agreement`` at every head that is used, and therefore of all exited
        tokens together.

    Raises
    ------
    RiskcalError
        For arrays of different or wrong shape, infinite confidences, ``agrees`` other than 0 and 1, prompts without id, a
        prompt of more than ``max_tokens`` tokens, a pilot or a rest of fewer than two prompts, levels outside (0, 1), and
        layers that do not ascend.

    Notes
    -----
    Assumes i.i.d. prompts from the population that will be served, one look, and that the recorded tokens are those that
    will be decoded. Tokens recorded on the full model's own path are not quite that for a decoder with memory: after its
    first early exit its states differ. Certify such a policy by `riskcal.calibrate` on real generations.

    The pilot, the first prompts in `riskcal.records.tested_order` (of prompts that are only numbered, in an order drawn from
    the content of all tokens: see `riskcal.records.content_order`), fixes which thresholds the others test.

    *Prompts of several tokens*: a path of threshold vectors, from cautious to bold, by a fixed sequence at level epsilon. At
    each step the hypothesis of a head is that its
    ``loss = 1 - agreement + (errors - (1 - agreement) exits) / max_tokens`` has an expectation above ``1 - agreement``,
    counting per prompt the tokens that exit there *in the cascade*; it lies in [0, 1], and both ends are possible. The
    p-value of a step is the largest of its heads' (`riskcal.pvalues.betting`), which needs no correction: the step is
    wrong only if one head's true hypothesis is rejected. The cascade needs no test, its loss being the sum of the heads'.
    Heads at ``inf`` cannot exit, and have nothing to show.

    *Prompts of one token* (``max_tokens=1``; classifiers, cascades of models): head after head, each at its share of epsilon,
    which the pilot fixes together with the head's fixed sequence of thresholds, from one that is likely to pass on downwards
    in steps of less than a token. Of the tokens that reach a threshold the errors are binomial given their number, so the
    exact binomial p-value serves. A head that others may follow is left at the first threshold where one error more would
    fail. Whether it is left there is decided by tokens at or above the threshold alone: given these, the tokens below are
    still independent draws from the law of those that reach the next head, whose tests are thus valid at its share wherever
    the one before was left. So no p-value pays for another head's threshold, and no head waits for another. Where a head
    fails at a threshold first (its first, or one that many tokens share), tokens below the last that passed were looked at;
    the heads after it then go on with a share of their level that was set aside for just this threshold, and a union bound.
    The probabilities of a false certificate at the heads add up to at most epsilon.

    Sources: Learn then Test (Angelopoulos et al. 2021) for the fixed sequence, Berger (1982) for the largest p-value.

    Examples
    --------
    >>> traces = riskcal.load_example("g2p-traces")
    >>> early = slice(0, 7)  # the last of 8 layers is the full model
    >>> calibration = riskcal.heads.certified(
    ...     traces.confidence[:, early], traces.agrees[:, early], prompts=traces.prompt, max_tokens=24, agreement=0.95
    ... )
    >>> calibration.certified, (calibration.thresholds < np.inf).any().item()  # some head may be used
    (True, True)
    >>> calibration.policy(n_layers=8).save("policy.json")
    """
    goal = _Goal(_agreement(agreement), _validate.level(epsilon, "epsilon"), _most(max_tokens))
    refuse_other_rows({"confidence": confidence, "agrees": agrees, "prompts": prompts})
    recorded = _records(*_tokens(confidence, agrees), prompts, goal.max_tokens, pilot_fraction)
    numbers = _layers(layers, recorded.confidence.shape[1], numbers_of(confidence))
    walked = (_one_token if goal.max_tokens == 1 else _many_tokens)(recorded, numbers, goal)
    tokens = int(np.sum(recorded.prompt >= recorded.n_pilot))
    table = _table(*walked, numbers, tokens=tokens)
    steps, rejected = walked.thresholds, walked.rejected
    last = int(np.flatnonzero(rejected)[-1]) if rejected.any() else -1
    if last >= 0:
        told = partial(_certified_message, recorded, table, numbers, goal, last)
    else:
        told = partial(
            _failure_message,
            recorded,
            numbers,
            goal,
            _validate.level(pilot_fraction, "pilot_fraction"),
        )
    return HeadCalibration(
        thresholds=steps[last] if last >= 0 else np.full(len(numbers), math.inf),
        layers=numbers,
        certified=last >= 0,
        table=table,
        pilot=tuple(recorded.ids[: recorded.n_pilot].tolist()),
        n=recorded.n,
        agreement=goal.agreement,
        epsilon=goal.level,
        max_tokens=goal.max_tokens,
        test="binomial" if goal.max_tokens == 1 else "betting",
        layers_given=layers is not None,
        records_digest=_digest(recorded, numbers),
        _told=told,
    )


class _Walked(NamedTuple):
    """What was tested, in order."""

    thresholds: list[Floats]
    counts: list[_Counts]
    pvalues: list[float]
    rejected: Bools


def _one_token(recorded: _Records, layers: NDArray[np.int64], goal: _Goal) -> _Walked:
    turns = _in_turn(recorded, _spared(layers), goal)
    return _Walked(
        [turn.thresholds for turn in turns],
        [_count(recorded, turn.thresholds) for turn in turns],
        [turn.pvalue for turn in turns],
        np.array([turn.certified for turn in turns], dtype=bool),
    )


def _many_tokens(recorded: _Records, layers: NDArray[np.int64], goal: _Goal) -> _Walked:
    steps: list[Floats] = []
    counts: list[_Counts] = []
    tested: list[float] = []
    for thresholds in _path(recorded, layers, goal):
        steps.append(thresholds)
        counts.append(_count(recorded, thresholds))
        tested.append(_pvalue(counts[-1], thresholds, goal))
        if tested[-1] > goal.level:
            break
    rejected = fwer.fixed_sequence(tested, goal.level) if tested else np.zeros(0, dtype=bool)
    return _Walked(steps, counts, tested, rejected)


def _table(
    steps: list[Floats],
    counts: list[_Counts],
    tested: list[float],
    rejected: Bools,
    layers: NDArray[np.int64],
    *,
    tokens: int,
) -> pd.DataFrame:
    heads = [int(layer) for layer in layers]
    names = ["exits", "agreement"]
    names += [f"{name}_{layer}" for layer in heads for name in ("threshold", "exits", "agreement")]
    rows = []
    for thresholds, count in zip(steps, counts, strict=True):
        exits, errors = count.exits.sum(0), count.errors.sum(0)
        row = {
            "exits": exits.sum() / tokens,
            "agreement": _share(exits.sum() - errors.sum(), exits.sum()),
        }
        for k, layer in enumerate(heads):
            row[f"threshold_{layer}"] = thresholds[k]
            row[f"exits_{layer}"] = exits[k] / tokens
            row[f"agreement_{layer}"] = _share(exits[k] - errors[k], exits[k])
        rows.append(row)
    return pd.DataFrame(rows, columns=names, dtype=np.float64).assign(
        pvalue=np.array(tested, dtype=np.float64), certified=rejected
    )
