"""What a calibration of heads says of itself, and how many prompts would do."""

import math
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from riskcal import _simulation, pvalues
from riskcal._validate import Floats
from riskcal.heads.decisions import _in_turn
from riskcal.heads.inputs import _Records
from riskcal.heads.path import _ROUNDING, _count, _Counts, _Goal, _path, _Pilot, _pilot, _spared
from riskcal.policy.sentences import OF_RECORDED_TOKENS, at_least

#: In how many draws the sample that a message names certifies, and how many tokens it may have to be simulated.
_POWER, _TOKENS = 0.8, 100_000


def _share(part: np.int64, whole: np.int64) -> float:
    return float(part / whole) if whole else math.nan


def _certified_message(
    recorded: _Records, table: pd.DataFrame, layers: NDArray[np.int64], goal: _Goal, last: int
) -> str:
    row = table.iloc[last]
    used = [
        f"layer {layer} at {row[f'threshold_{layer}']:.6g}"
        for layer in layers
        if math.isfinite(row[f"threshold_{layer}"])
    ]
    return (
        f"Certified: with probability at least {at_least(goal.level)} over the draw of the {recorded.n} calibration prompts, at "
        f"least {goal.agreement:.6g} of the tokens that exit at a head agree with the full model, for every head that is used "
        f"({', '.join(used)}). Of the calibration tokens {row['exits']:.1%} exit, and {row['agreement']:.1%} of those agree."
        + (f" {OF_RECORDED_TOKENS}" if goal.max_tokens > 1 else "")
    )


def _failure_message(
    recorded: _Records, layers: NDArray[np.int64], goal: _Goal, pilot_fraction: float
) -> str:
    opening = f"Nothing was certified at agreement {goal.agreement:g}: run the full model. "
    # planning may look at all of them
    everyone = _pilot(recorded._replace(n_pilot=len(recorded.ids)), layers)
    size = min(_prompts_needed(_losses_alone(everyone, k, goal), goal) for k in range(len(layers)))
    if math.isinf(size):
        return opening + (
            "At no head do the exits clearly agree often enough, whatever the threshold, so more prompts alone may not help: "
            "lower the agreement, or train the heads."
        )
    largest = max(2 * len(recorded.ids), _TOKENS * len(recorded.ids) // len(recorded.prompt))
    share = partial(_share_certified, recorded, layers, goal, pilot_fraction)
    total = _simulation.smallest_fitted(
        share, _POWER, size * len(recorded.ids) / recorded.n, largest
    )
    condition = "if confidences and agreement are distributed as those observed"
    if total is None:
        return opening + (
            f"More than {largest} fresh prompts would be needed, {condition}: lower the agreement, or train the heads."
        )
    return opening + (
        f"A fresh sample of about {total} prompts, pilot included, certifies some exits in four draws of five, {condition}. "
        "Testing these data again, or more of the same pool, is a new attempt that this epsilon does not cover."
        + (
            " A max_tokens nearer to the usual length also helps, if it is fixed beforehand."
            if goal.max_tokens > 1
            else ""
        )
    )


def _share_certified(
    recorded: _Records,
    layers: NDArray[np.int64],
    goal: _Goal,
    pilot_fraction: float,
    n: int,
    draws: int,
    seed: int,
) -> float:
    """Of samples of n prompts, drawn whole from those recorded, the share in which some exits are certified."""
    n_pilot = math.ceil(pilot_fraction * n)
    if n_pilot < 2 or n - n_pilot < 2:
        return 0.0
    by_prompt, tokens = np.argsort(recorded.prompt, kind="stable"), np.bincount(recorded.prompt)
    start, certified = np.cumsum(tokens) - tokens, 0
    for of in np.random.default_rng(seed).integers(0, len(tokens), (draws, n)):
        length = tokens[of]
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        rows = by_prompt[np.repeat(start[of], length) + within]
        drawn = _Records(
            recorded.confidence[rows],
            recorded.agrees[rows],
            np.repeat(np.arange(n), length),
            np.arange(n),
            n_pilot,
        )
        if goal.max_tokens == 1:
            certified += any(turn.certified for turn in _in_turn(drawn, _spared(layers), goal))
            continue
        first = next(_path(drawn, layers, goal), None)
        certified += first is not None and _pvalue(_count(drawn, first), first, goal) <= goal.level
    return certified / draws


def _pvalue(count: _Counts, thresholds: Floats, goal: _Goal) -> float:
    """Of a step of the path: the largest of the used heads'."""
    losses = count.losses(goal)[:, np.isfinite(thresholds)]
    return float(np.max(pvalues.betting(losses, 1.0 - goal.agreement, level=goal.level)))


def _prompts_needed(losses: Floats, goal: _Goal) -> float:
    """Roughly how many calibration prompts let one column of losses (n, k) pass, the easiest; ``inf`` if none can.

    The simulation begins there. Enough for the noise in four draws of five, and for the largest bet, which it takes the
    bettor a fifth of the way to dare, to reach the level. As the column is the best of many, its surplus is taken for a
    standard error less than observed.
    """
    from riskcal.pvalues import bettor_kernels

    deviation = losses.std(0)
    surplus = 1.0 - goal.agreement - losses.mean(0) - deviation / math.sqrt(len(losses))
    positive = np.maximum(surplus, _ROUNDING)
    noise = (special.ndtri(1.0 - goal.level) + special.ndtri(0.8)) * deviation / positive
    growth = -1.25 * math.log(goal.level) / np.log1p(bettor_kernels.CAP / goal.agreement * positive)
    return float(
        np.where(surplus > _ROUNDING, np.maximum(noise**2, growth), math.inf).min(initial=math.inf)
    )


def _losses_alone(pilot: _Pilot, head: int, goal: _Goal) -> Floats:
    """Losses (n_pilot, levels) of one head used alone, at each threshold of its grid."""
    levels, n_pilot = len(pilot.grids[head]), len(pilot.start) - 1
    prompt = np.repeat(np.arange(n_pilot), np.diff(pilot.start))
    cell = prompt * (levels + 1) + pilot.level[head]
    exits, errors = (
        np.bincount(cell, weights, minlength=n_pilot * (levels + 1))
        .reshape(n_pilot, -1)[:, :levels]
        .cumsum(1)
        for weights in (None, ~pilot.agrees[head])
    )
    return _Counts(exits, errors).losses(goal)
