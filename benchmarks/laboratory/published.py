"""What others do: published rules, written down from their papers, and packages that are run where they are installed.

Formulas take losses (n, k) with candidates from the safest to the boldest. Nothing here is offered to users; `riskcal` has its
own tests. Each function names its source.
"""

import contextlib
import math
import warnings
from importlib import metadata
from typing import Any

import numpy as np
from scipy import special, stats

from laboratory.refereed import Candidates, Flags, Sample
from riskcal.internal import Floats

with contextlib.suppress(ImportError):
    from riskgate import conformal, multirisk
with contextlib.suppress(ImportError):
    from mapie.risk_control import BinaryClassificationController
    from mapie.risk_control import methods as mapie_methods
    from mapie.risk_control._base_controller import ltt_procedure

PEERS = ("mapie", "riskgate")


def versions() -> dict[str, str | None]:
    """Of each package that can be run, None where it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PEERS)
    for name in PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# Tests -------------------------------------------------------------------------------------------------------------


def hoeffding(mean: Floats, n: int, delta: float) -> Floats:
    """CALM (Schuster et al. 2022), Eq. 9."""
    return np.asarray(np.exp(-2 * n * np.maximum(0, delta - mean) ** 2))


def hoeffding_bentkus(mean: Floats, n: int, delta: float) -> Floats:
    """CALM's own test, after Bates et al. (2021): all columns at once."""
    r = np.minimum(mean, delta)
    entropy = special.xlogy(r, r / delta) + special.xlogy(1 - r, (1 - r) / (1 - delta))
    tail = math.e * stats.binom.cdf(np.ceil(n * mean), n, delta)
    return np.asarray(np.minimum(1, np.minimum(np.exp(-n * entropy), tail)))


def adaptive_bets(losses: Floats, delta: float, level: float) -> Floats:
    """The betting test of Waudby-Smith and Ramdas (2023), one-sided: predictable plug-in stakes, rows in their order."""
    n = len(losses)
    steps = np.arange(1, n + 1)[:, None]
    mean = (0.5 + np.cumsum(losses, axis=0)) / (steps + 1)
    variance = (0.25 + np.cumsum((losses - mean) ** 2, axis=0)) / (steps + 1)
    before = np.concatenate([np.full((1, losses.shape[1]), 0.25), variance[:-1]])
    bet = np.minimum(np.sqrt(2 * math.log(1 / level) / (n * before)), 0.75 / (1 - delta))
    capital = np.cumsum(np.log1p(bet * (delta - losses)), axis=0)
    return np.asarray(np.minimum(1.0, np.exp(-capital.max(0))))


# Rules for a list of candidates -------------------------------------------------------------------------------------


def until_first_failure(pvalues: Floats, level: float) -> Flags:
    """Fixed sequence testing, from the first column on."""
    return np.logical_and.accumulate(pvalues <= level)


def boldest(fine: Flags) -> Flags:
    """The last candidate of which this is true, alone; none where it is true of none."""
    chosen = np.zeros(fine.shape, dtype=bool)
    if fine.any():
        chosen[np.flatnonzero(fine)[-1]] = True
    return chosen


def number_of_thresholds(losses: Floats, delta: float, level: float) -> Flags:
    """The threshold finder that was released for models that stop thinking, as we understand it.

    Conformal Thinking (Wang et al. 2026) controls risk by an upper bound on validation questions; the finder of its released
    code takes the number of thresholds for the number of questions. Written anew, with the Hoeffding-Bentkus test.
    """
    return until_first_failure(hoeffding_bentkus(losses.mean(0), losses.shape[1], delta), level)


def pareto_testing(losses: Floats, costs: Floats, delta: float, level: float) -> Flags:
    """Pareto Testing (Laufer-Goldshtein et al. 2023).

    Half of the prompts find the candidates that none beats in mean loss and cost, and order them by their p-values; the other
    half tests them in this order.
    """
    half = len(losses) // 2
    risk, cost = losses[:half].mean(0), costs[:half].mean(0)
    beaten = (
        (risk[:, None] <= risk)
        & (cost[:, None] <= cost)
        & ((risk[:, None] < risk) | (cost[:, None] < cost))
    ).any(0)
    order = np.flatnonzero(~beaten)
    order = order[np.argsort(hoeffding_bentkus(risk[order], half, delta), kind="stable")]
    tested = hoeffding_bentkus(losses[half:, order].mean(0), len(losses) - half, delta)
    certified = np.zeros(losses.shape[1], dtype=bool)
    certified[order[until_first_failure(tested, level)]] = True
    return certified


# Packages ----------------------------------------------------------------------------------------------------------


def mapie_bounds(losses: Floats, level: float) -> Floats:
    """MAPIE's betting bound (``rcps``, ``wsr``) of all columns, on a grid of steps of at most .01.

    Its grid of thresholds is its grid of risks too, so that columns are repeated until there are a hundred.
    """
    k = losses.shape[1]
    times = math.ceil(100 / k)
    wide = np.repeat(losses, times, axis=1)
    grid = np.arange(1, k * times + 1) / (k * times)
    return np.asarray(mapie_methods.get_r_hat_plus(wide, grid, "rcps", "wsr", level, 0.25)[1])[
        ::times
    ]


def mapie_controller(case: Candidates, sample: Sample, level: float, procedure: str) -> Flags:
    """MAPIE's `BinaryClassificationController`, asked for answers that are right in 1 - delta of the cases.

    With a fixed sequence its parameters are thresholds of one score, here the share of the candidates at which a prompt is
    still right; otherwise any parameters. What it has no words for (losses other than 0 and 1, a sequence that is no threshold
    of one score) goes into `ltt_procedure`, which all its controllers call.
    """
    losses, n, k = sample.losses, *sample.losses.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not case.traits >= (
            {"binary", "nested"} if procedure == "fixed_sequence" else {"binary"}
        ):
            valid, _ = ltt_procedure(
                losses.mean(0)[None],
                np.array([[case.delta]]),
                level,
                np.full((1, k), float(n)),
                binary="binary" in case.traits,
                fwer_method=procedure,
            )
            return np.isin(np.arange(k), valid[0])
        options: dict[str, Any] = {"risk": "accuracy", "target_level": 1 - case.delta}
        options |= {"confidence_level": 1 - level, "fwer_method": procedure}
        right = np.ones(n, dtype=int)
        if procedure == "fixed_sequence":
            score = 1 - losses.mean(1)
            params = (np.arange(k) + 1) / k - 0.5 / k
            controller = BinaryClassificationController(
                lambda x: np.stack([1 - x, x], axis=1), list_predict_params=params, **options
            )
            found = controller.calibrate(score, right).valid_predict_params
            return np.isin(params, found)
        columns = np.stack([np.arange(k), np.arange(k)], axis=1)
        controller = BinaryClassificationController(
            lambda x, j, _: (x[:, int(j)] == 0).astype(int), list_predict_params=columns, **options
        )
        if procedure == "split_fixed_sequence":
            half = n // 2
            controller.learn_fixed_sequence_order(losses[:half], right[:half])
            losses, right = losses[half:], right[half:]
        found = controller.calibrate(losses, right).valid_predict_params
        certified = np.zeros(k, dtype=bool)
        certified[np.array([int(row[0]) for row in found], dtype=int)] = True
        return certified


def riskgate_threshold(case: Candidates, losses: Floats, level: float) -> Flags:
    """Learn then Test by riskgate: one threshold, found from the highest down; exact for losses of 0 or 1."""
    test = "binomial" if "binary" in case.traits else "hb"
    ascending = case.candidates[::-1]
    found = multirisk.ltt_threshold([losses[:, ::-1]], ascending, [case.delta], level, test)
    return np.asarray(case.candidates >= found)


def riskgate_crc(case: Candidates, losses: Floats) -> Flags:
    """Conformal risk control by riskgate: one threshold, of which the *mean* loss over samples is at most delta."""
    found = conformal.crc_threshold(losses[:, ::-1], case.candidates[::-1], case.delta)
    return np.asarray(case.candidates == found)
