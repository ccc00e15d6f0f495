"""What each split of a trial would choose: the procedures themselves where need be, all splits at once where that is possible."""

import math

import numpy as np
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import Floats
from riskcal.calibration.calibrate import prove, with_candidates_in_order
from riskcal.calibration.counts import two_values
from riskcal.calibration.problem import Problem, minimised
from riskcal.calibration.settling import cheapest
from riskcal.fwer import FixedSequence, PilotOrder, Procedure
from riskcal.pvalues import Betting, Method
from riskcal.pvalues.bettor import count_certified
from riskcal.pvalues.methods import OfSum


def decide(
    problem: Problem,
    deltas: list[float],
    heldout: NDArray[np.intp],
    method: Method,
    procedure: Procedure,
    epsilon: float,
    cost: str | None,
) -> tuple[NDArray[np.intp], Floats]:
    """Chosen candidate (D, T), -1 if none, and its mean loss on the calibration units, without building calibrations."""
    own = not method.bounded  # and may have p-values of its own, whatever class it comes of
    if isinstance(method, OfSum) and not own and not isinstance(procedure, PilotOrder):
        return _decide_by_sums(problem, deltas, heldout, method, procedure, epsilon, cost)
    if type(method) is Betting and _walks_down(problem, procedure, cost):
        return _decide_by_walking(problem, deltas, heldout, epsilon)
    chosen = np.full((len(deltas), len(heldout)), -1, dtype=np.intp)
    loss = np.zeros(chosen.shape)
    for t, units in enumerate(kept_rows(heldout, problem.n)):
        split = problem.rows(units)
        for d, delta in enumerate(deltas):
            tested = with_candidates_in_order(split.at(delta), procedure, cost)
            certified = prove(tested.problem, method, procedure, epsilon).certified
            best = cheapest(tested.problem, certified, cost)
            if best is not None:
                chosen[d, t] = tested.order[best]
                loss[d, t] = tested.problem.risks[0].losses[:, best].mean()
    return chosen, loss


def _walks_down(problem: Problem, procedure: Procedure, cost: str | None) -> bool:
    """Whether candidates are tested one after the other from the highest threshold down, and the last one is chosen."""
    one = (
        isinstance(procedure, FixedSequence)
        and procedure.starts == 1
        and not problem.several_coordinates
        and cost is None
    )
    grid = problem.strictness
    counted = problem.nameless and any(two_values(c) for c in problem.risks[0].losses.T)
    return one and bool((np.diff(grid) < 0).all()) and not counted


def _decide_by_walking(
    problem: Problem, deltas: list[float], heldout: NDArray[np.intp], epsilon: float
) -> tuple[NDArray[np.intp], Floats]:
    """`_decide` for betting down a sequence: each split's walk ends at its first failure."""
    risk, kept = problem.risks[0], kept_rows(heldout, problem.n)
    count = count_certified(
        np.ascontiguousarray(risk.losses.T),
        kept,
        np.array(deltas),
        lower=risk.lower,
        upper=risk.upper,
        level=epsilon,
    )
    chosen = np.asarray(count, dtype=np.intp) - 1
    return chosen, _kept_means(risk.losses, heldout, chosen)


def _decide_by_sums(
    problem: Problem,
    deltas: list[float],
    heldout: NDArray[np.intp],
    method: OfSum,
    procedure: Procedure,
    epsilon: float,
    cost: str | None,
) -> tuple[NDArray[np.intp], Floats]:
    """`_decide` for tests that see sums alone: those of all trials and candidates at once."""
    risk, m = problem.risks[0], problem.n - heldout.shape[1]
    if method.name == "binomial" and (risk.lower, risk.upper) == (0.0, 1.0):
        _validate.binary(risk.losses)
    totals = _kept_totals(risk.losses, heldout)
    name = minimised(problem, cost)
    spent = (
        np.broadcast_to(problem.strictness, totals.shape)
        if name is None
        else _kept_totals(problem.costs[name], heldout)
    )
    chosen = np.full((len(deltas), len(heldout)), -1, dtype=np.intp)
    for d, delta in enumerate(deltas):
        p = method.of_totals(totals, m, delta, lower=risk.lower, upper=risk.upper)
        for t, row in enumerate(p):
            certified = procedure.rejected(row, epsilon)
            if certified.any():
                chosen[d, t] = np.where(certified, spent[t], math.inf).argmin()
    return chosen, np.where(chosen < 0, 0.0, totals[np.arange(len(heldout)), chosen] / m)


def _kept_means(values: Floats, heldout: NDArray[np.intp], chosen: NDArray[np.intp]) -> Floats:
    """Mean over each trial's calibration units at its chosen candidate (D, T); 0 where there is none."""
    totals, n = _kept_totals(values, heldout), len(values) - heldout.shape[1]
    return np.where(chosen < 0, 0.0, totals[np.arange(len(heldout)), chosen] / n)


def kept_rows(heldout: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """Row numbers to calibrate on, (n_trials, m), ascending: in tested order."""
    mask = np.ones((len(heldout), n), dtype=bool)
    np.put_along_axis(mask, heldout, False, axis=1)
    return np.nonzero(mask)[1].reshape(len(heldout), -1)


def _kept_totals(values: Floats, heldout: NDArray[np.intp]) -> Floats:
    """Sum of each column over each trial's calibration units, (T, k): all trials in one matrix product."""
    mask = np.zeros((len(heldout), len(values)), dtype=exact_type(values))
    np.put_along_axis(mask, heldout, 1.0, axis=1)
    left_out = mask @ values.astype(mask.dtype, copy=False)
    totals: Floats = values.sum(0) - left_out.astype(np.float64, copy=False)
    return totals


def exact_type(losses: Floats) -> type[np.float32 | np.float64]:
    """Single precision where it sums exactly: whole losses, fewer than 2^24 of them."""
    whole = (
        len(losses) < 2**24
        and bool((np.abs(losses) <= 1.0).all())
        and bool((losses == np.rint(losses)).all())
    )
    return np.float32 if whole else np.float64
