"""A calibration helped by a proxy: what is known of unlabelled requests is dealt out to the labelled ones."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.calibration.problem import Problem
from riskcal.pvalues import Betting, Method
from riskcal.pvalues.proxies import broadcast, paired, variance_left
from riskcal.records import Runs, alignment
from riskcal.records import columns as table_columns
from riskcal.records.order import content_prints, numbered_order, order_by_prints

#: Of the variance; a proxy that leaves more has saved nothing worth a word.
_IDLE = 0.98
#: Standard errors that two samples of one population are hardly ever apart.
_CHANCE = 6.0


def with_proxy(
    problem: Problem,
    runs: Any,
    proxy: Any,
    unlabelled: Any,
    method: Method,
    *,
    thresholds: Any = None,
    prompts: Any = None,
) -> Problem:
    """The same problem, each of its labelled units beside unlabelled ones; where neither is given, as it is."""
    if proxy is None and unlabelled is None:
        return problem
    if proxy is None or unlabelled is None:
        missing = "proxy" if proxy is None else "unlabelled"
        raise RiskcalError(
            f"{missing}: a proxy is of use where it is known of labelled and of unlabelled requests; give proxy= and "
            "unlabelled=, or neither."
        )
    if not isinstance(method, Betting):
        raise RiskcalError(
            f"proxy: test {method.name!r} would not use it; take test='betting', or leave the proxy out."
        )
    if isinstance(runs, Runs):
        given = runs.candidates["threshold"].to_numpy(dtype=np.float64)
        # the problem's candidates are turned round where calibrate was told the direction
        as_given = pd.MultiIndex.from_frame(runs.candidates)
        strict_first = as_given.get_indexer(pd.MultiIndex.from_frame(problem.candidates))
        known = _of_runs(problem, runs, proxy)[:, strict_first]
    else:
        given = _validate.threshold_grid(thresholds, allow_full=False)
        strict_first = np.argsort(given if problem.lower_is_stricter else -given, kind="stable")
        known = _of_array(problem, _arrayed(proxy, "proxy", given), prompts)[:, strict_first]
    others = broadcast(_arrayed(unlabelled, "unlabelled", given), "unlabelled", problem.k)
    known, others = _on_unit(known, others[:, strict_first])
    content = [(risk.losses - risk.lower) / risk.width for risk in problem.risks]
    prints, others_prints = content_prints(*content, known), content_prints(others)
    _refuse_the_labelled(prints=content_prints(known), among=others_prints)
    if problem.nameless:  # rows of equal losses may have been sorted by their proxies
        order = numbered_order(problem.units, prints)
        problem, known = problem.rows(order), known[order]
    drawn = order_by_prints(np.concatenate([others_prints, prints]))
    pairs = paired(known, others[drawn[drawn < len(others)]])
    _refuse_strangers(problem, known, others)
    return replace(
        problem,
        risks=tuple(risk if risk.is_cost else risk._replace(pairs=pairs) for risk in problem.risks),
    )


def variance_column(problem: Problem) -> dict[str, Floats]:
    """The column of a calibration's table that says what the proxy leaves of the loss's variance; none without a proxy."""
    for risk in problem.risks:
        if risk.pairs is not None:
            return {"variance_left": variance_left(risk.losses, risk.pairs)}
    return {}


def labels_saved(problem: Problem, chosen: pd.Series | None) -> str:
    """How many labels a proxy saved, in words; nothing without a proxy."""
    if not problem.helped:
        return ""
    if chosen is None:
        return " What would help was found without the proxy."
    share = float(chosen["variance_left"])
    return (
        " The proxy saved no labels: it says nothing of the loss there."
        if share > _IDLE
        else f" The proxy leaves {share:.2g} of the loss's variance there: in a large sample that is worth "
        f"{problem.n * (1.0 / max(share, 1e-3) - 1.0):,.0f} labels beside these {problem.n:,}."
    )


def _of_runs(problem: Problem, runs: Runs, proxy: Any) -> Floats:
    """The proxies of a problem's units, by a column's name or as an array in the order of ``runs.prompts``."""
    if "cluster" in runs.labels:
        raise RiskcalError(
            "proxy: is for requests that are independent one by one, and these runs have clusters; leave it out, or give means "
            "over clusters, of unlabelled requests too: calibrate(runs.losses(), thresholds=runs.thresholds, prompts=runs.units, "
            "proxy=runs.unit_means(...), unlabelled=...)."
        )
    if isinstance(proxy, str):
        if proxy not in runs.costs:
            raise RiskcalError(
                f"proxy: {proxy!r} is no recorded cost; there is {', '.join(runs.costs) or 'none'}. Read it with "
                f"costs=[{proxy!r}], or give an array in the order of runs.prompts and runs.candidates."
            )
        proxy = runs.values[proxy]
    proxy = _arrayed(proxy, "proxy", runs.candidates["threshold"])
    known = _one_a_row(broadcast(proxy, "proxy", problem.k), runs.n)
    rows: Floats = known[pd.Index(runs.prompts).get_indexer(problem.units)]
    return rows


def _of_array(problem: Problem, proxy: Any, prompts: Any) -> Floats:
    """The proxies of a problem's units, in rows that stand as those of the losses that were given."""
    if isinstance(proxy, str):
        raise RiskcalError(
            f"proxy: {proxy!r} names a column, and an array of losses has none; give an array of its shape."
        )
    known = broadcast(proxy, "proxy", problem.k)
    if prompts is None:
        return _one_a_row(known, problem.n)[problem.units.astype(np.intp)]
    ids = table_columns.identifiers(table_columns.series(prompts, "prompts"), "prompts")
    if len(ids) != problem.n:
        raise RiskcalError(
            f"proxy: {len(ids)} rows of {problem.n} prompts; average losses and proxies within prompts first, as the "
            "unlabelled rows are."
        )
    rows: Floats = _one_a_row(known, problem.n)[pd.Index(ids).get_indexer(problem.units)]
    return rows


def _arrayed(values: Any, name: str, thresholds: Any) -> Any:
    """A table's columns in the order of the thresholds that name them; anything else as it is."""
    if not isinstance(values, pd.DataFrame) or isinstance(values.columns, pd.RangeIndex):
        return values
    wanted = [float(threshold) for threshold in thresholds]
    labels = alignment.column_numbers(values)
    if labels is None or sorted(labels) != sorted(wanted) or len(set(labels)) < len(labels):
        raise RiskcalError(
            f"{name}: the table's columns are {', '.join(map(str, values.columns))}, not the thresholds, one each; name them so, "
            "or give an array in the order of the candidates."
        )
    return values.iloc[:, [labels.index(threshold) for threshold in wanted]].to_numpy()


def _one_a_row(known: Floats, n: int) -> Floats:
    if len(known) != n:
        raise RiskcalError(f"proxy: {len(known)} rows for {n} labelled ones; give one for each.")
    return known


def _on_unit(known: Floats, others: Floats) -> tuple[Floats, Floats]:
    """Both, mapped to [0, 1] by their common range."""
    low = 0.5 * np.minimum(known.min(0), others.min(0))  # halves: a difference may overflow
    high = 0.5 * np.maximum(known.max(0), others.max(0))
    reach = np.where(high > low, high - low, 1.0)
    return (0.5 * known - low) / reach, (0.5 * others - low) / reach


def _refuse_strangers(problem: Problem, known: Floats, others: Floats) -> None:
    """Refuse unlabelled requests whose proxies are of another kind than those of the labelled ones."""
    error = np.concatenate([known, others]).std(0) * math.sqrt(1 / len(known) + 1 / len(others))
    here, there = known.mean(0), others.mean(0)
    strange = np.abs(here - there) > _CHANCE * error
    if strange.any():
        first = int(strange.argmax())
        raise RiskcalError(
            f"unlabelled: at {problem.name(first)} the mean of their proxies and that of the labelled requests are "
            f"{abs(here[first] - there[first]) / error[first]:.0f} standard errors apart ({int(strange.sum())} candidates so); "
            "give requests of the same population, the same proxy, and its columns in one order."
        )


def _refuse_the_labelled(*, prints: NDArray[np.uint64], among: NDArray[np.uint64]) -> None:
    """Refuse unlabelled rows that hold all of the labelled ones, where that is no coincidence."""
    distinct = len(np.unique(among))
    if distinct > math.ceil(0.9 * len(among)) and np.isin(prints, among).all():
        raise RiskcalError(
            f"unlabelled: all {len(prints)} labelled requests are among these {len(among)}; leave them out there, the two must "
            "have no request in common."
        )
