"""The referee: riskcal, its peers and the published rules on the same samples of populations whose truth is known.

Fourteen cases (``laboratory/refereed.py``), and in each the methods that can take it (``laboratory/published.py``): how often a
method called something good enough that is not, beside the epsilon that was promised; how much of what is good it hands over;
what it saves, as a share of the most that keeps the promise; its CPU time. Every method sees the same draws. Peers run for real
where they are installed, ``pip install -r benchmarks/referee.txt``; what cannot be installed is written down from its paper and
says so. ``--quick`` is the run of the tests: few draws.
"""

import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import command
import riskcal
from laboratory import published, refereed
from laboratory.refereed import Case, Flags, Sample
from riskcal import pvalues
from riskcal.internal import Floats

EPSILON = 0.05
DRAWS, QUICK = 1000, 20
SEED = 2026


@dataclass(frozen=True)
class Method:
    """One row of every case.

    Attributes
    ----------
    source : str
        ``riskcal``, ``package`` (run as installed), ``paper`` (written down from it) or ``habit``.
    promise : str
        ``epsilon``, ``mean`` (the loss averaged over samples too) or ``none``: what a violation is to be measured by.
    decide : callable
        From a case and a sample to a decision.
    refuses : callable
        Why a case is not for it; empty where it is.
    most : int
        Draws at most, where one takes long.
    """

    name: str
    source: str
    promise: str
    decide: Callable[[Any, Sample], Any]
    refuses: Callable[[Case], str]
    most: int = DRAWS


# Which cases are for whom --------------------------------------------------------------------------------------------


def refusing(**reasons: str) -> Callable[[Case], str]:
    """Refuses cases with one of these traits; ``not_x`` those without ``x``."""

    def refuses(case: Case) -> str:
        for trait, reason in reasons.items():
            missing = trait.startswith("not_") and trait[4:] not in case.traits
            if missing or trait in case.traits:
                return reason
        return ""

    return refuses


LISTS = {"heads": "certifies a list of settings, not heads"}
UNIT = {"signed": "takes losses in [0, 1]"}
ONE = {"several": "needs one order from safe to bold"}
NOT_CLUSTERED = {"not_clusters": "what CALM does, where prompts are independent"}
PARETO = {"not_several": "made for several coordinates"}
MONOTONE = {"not_monotone": "needs a risk that rises along the candidates"}


# riskcal ------------------------------------------------------------------------------------------------------------


def calibrated(**options: Any) -> Callable[[Any, Sample], Flags]:
    """`riskcal.calibrate`, as a user calls it."""

    def decide(case: refereed.Candidates, sample: Sample) -> Flags:
        if "several" in case.traits:
            return _of_pairs(case, sample, options)
        found = riskcal.calibrate(
            sample.losses,
            thresholds=case.candidates,
            delta=case.delta,
            epsilon=EPSILON,
            prompts=sample.prompts,
            lower=-1.0 if "signed" in case.traits else 0.0,
            **options,
        )
        certified = found.table.set_index("threshold")["certified"]
        return np.asarray(certified.reindex(case.candidates, fill_value=False), dtype=bool)

    return decide


def _of_pairs(case: refereed.Candidates, sample: Sample, options: dict[str, Any]) -> Flags:
    """Through a table of runs, which says which thresholds a candidate has."""
    n, k = sample.losses.shape
    assert sample.prompts is not None
    assert sample.costs is not None
    frame = pd.DataFrame(
        {
            "prompt": np.repeat(sample.prompts, k),
            "threshold": np.tile(case.candidates[:, 0], n),
            "threshold_2": np.tile(case.candidates[:, 1], n),
            "dissimilarity": sample.losses.ravel(),
            "price": sample.costs.ravel(),
        }
    )
    runs = riskcal.Runs.from_frame(frame, candidate_columns=["threshold_2"], costs=["price"])
    found = riskcal.calibrate(runs, delta=case.delta, epsilon=EPSILON, cost="price", **options)
    certified = found.table.set_index(["threshold", "threshold_2"])["certified"]
    index = pd.MultiIndex.from_arrays(case.candidates.T)
    return np.asarray(certified.reindex(index, fill_value=False), dtype=bool)


def default(case: Any, sample: Sample) -> Any:
    """Whatever riskcal does if nothing is chosen."""
    if "heads" not in case.traits:
        return calibrated()(case, sample)
    return riskcal.heads.certified(
        sample.confidence,
        sample.agrees,
        prompts=sample.prompts,
        max_tokens=1,
        agreement=1 - case.delta,
        epsilon=EPSILON,
        layers=range(1, sample.confidence.shape[1] + 1) if sample.confidence is not None else None,
    ).thresholds


# Published rules -----------------------------------------------------------------------------------------------------


def path(case: Any, sample: Sample) -> tuple[Floats, Flags]:
    """Losses of the candidates of one order, and which they are: of pairs, those with both thresholds alike."""
    if "several" not in case.traits:
        return sample.losses, np.ones(sample.losses.shape[1], dtype=bool)
    alike = case.candidates[:, 0] == case.candidates[:, 1]
    return sample.losses[:, alike], alike


def sequence(test: Callable[[Floats, float], Floats]) -> Callable[[Any, Sample], Flags]:
    """A fixed sequence of a test, on rows as they stand."""

    def decide(case: Any, sample: Sample) -> Flags:
        losses, which = path(case, sample)
        certified = np.zeros(which.shape, dtype=bool)
        certified[which] = published.until_first_failure(test(losses, case.delta), EPSILON)
        return certified

    return decide


def calm_test(losses: Floats, delta: float) -> Floats:
    """Clipped at 0, as its Eq. 11 does with a rise in risk."""
    return published.hoeffding_bentkus(np.maximum(losses, 0).mean(0), len(losses), delta)


def of_means(case: Any, sample: Sample) -> Flags:
    """CALM's procedure on the means of the clusters."""
    _, unit = np.unique(np.asarray(sample.prompts), return_inverse=True)
    sums = np.zeros((int(unit.max()) + 1, sample.losses.shape[1]))
    np.add.at(sums, unit, sample.losses)
    return sequence(calm_test)(case, Sample(sums / np.bincount(unit)[:, None]))


def bonferroni(case: Any, sample: Sample) -> Flags:
    n, k = sample.losses.shape
    p = published.hoeffding_bentkus(np.maximum(sample.losses, 0).mean(0), n, case.delta)
    return np.asarray(p <= EPSILON / k)


def naive(case: Any, sample: Sample) -> Flags:
    """The cheapest whose mean loss is at most delta."""
    fine = sample.losses.mean(0) <= case.delta
    order = np.argsort(case.saving, kind="stable")
    chosen = np.zeros(fine.shape, dtype=bool)
    chosen[order] = published.boldest(fine[order])
    return chosen


def heads_alone(case: Any, sample: Sample) -> Floats:
    """Learn then Test for each head by itself at epsilon / K: exact tests down a fixed grid, on all tokens, not the cascade."""
    assert sample.confidence is not None
    assert sample.agrees is not None
    grid, n_heads = np.linspace(0.8, 0.02, 40), sample.confidence.shape[1]
    found = np.full(n_heads, np.inf)
    for j in range(n_heads):
        for threshold in grid:
            wrong = ~sample.agrees[sample.confidence[:, j] >= threshold, j]
            if pvalues.binomial(wrong.astype(float), case.delta) > EPSILON / n_heads:
                break
            found[j] = threshold
    return found


def riskgate(decide: Callable[..., Flags], *more: float) -> Callable[[Any, Sample], Flags]:
    return lambda case, sample: decide(case, sample.losses, *more)


def mapie(procedure: str) -> Callable[[Any, Sample], Flags]:
    return lambda case, sample: published.mapie_controller(case, sample, EPSILON, procedure)


def mapie_rcps(case: Any, sample: Sample) -> Flags:
    return published.until_first_failure(published.mapie_bounds(sample.losses, EPSILON), case.delta)


def pareto(case: Any, sample: Sample) -> Flags:
    assert sample.costs is not None
    return published.pareto_testing(sample.losses, sample.costs, case.delta, EPSILON)


def methods() -> Iterator[Method]:
    """All of them, in the order of the table."""
    yield Method("riskcal", "riskcal", "epsilon", default, refusing())
    for name, options, reasons in (
        ("riskcal, Holm", {"procedure": "holm"}, {"several": "is the default here"}),
        ("riskcal, pilot order", {"procedure": "pilot_order"}, {}),
        ("riskcal, convex order", {"test": "convex_order"}, {}),
        (
            "riskcal, binomial",
            {"test": "binomial"},
            {"not_binary": "for losses of 0 or 1"}
            | {"clusters": "means of clusters are not 0 or 1"},
        ),
    ):
        yield Method(
            name, "riskcal", "epsilon", calibrated(**options), refusing(**LISTS, **reasons), 250
        )
    yield Method(
        "CALM: Hoeffding-Bentkus, fixed sequence",
        "paper",
        "epsilon",
        sequence(calm_test),
        refusing(**LISTS),
    )
    yield Method(
        "CALM, on means of clusters",
        "paper",
        "epsilon",
        of_means,
        refusing(**LISTS, **NOT_CLUSTERED),
    )
    yield Method(
        "Learn then Test: Hoeffding-Bentkus, Bonferroni",
        "paper",
        "epsilon",
        bonferroni,
        refusing(**LISTS),
    )
    yield Method(
        "WSR betting, fixed sequence",
        "paper",
        "epsilon",
        sequence(lambda losses, delta: published.adaptive_bets(losses, delta, EPSILON)),
        refusing(**LISTS, **UNIT),
    )
    yield Method(
        "Pareto Testing, half and half", "paper", "epsilon", pareto, refusing(**LISTS, **PARETO)
    )
    yield Method(
        "reasoning: the number of thresholds for n",
        "paper",
        "epsilon",
        lambda case, sample: published.number_of_thresholds(sample.losses, case.delta, EPSILON),
        refusing(**LISTS, **UNIT, **ONE),
    )
    yield Method(
        "Valade: observed agreement",
        "paper",
        "none",
        lambda case, sample: riskcal.heads.self_supervised(
            sample.confidence, sample.agrees, 1 - case.delta
        ),
        refusing(not_heads="a rule for heads"),
    )
    yield Method(
        "Learn then Test, each head alone",
        "paper",
        "epsilon",
        heads_alone,
        refusing(not_heads="a rule for heads"),
        300,
    )
    yield Method(
        "MAPIE, Holm (its default)",
        "package",
        "epsilon",
        mapie("bonferroni_holm"),
        refusing(**LISTS, **UNIT),
        250,
    )
    yield Method(
        "MAPIE, fixed sequence",
        "package",
        "epsilon",
        mapie("fixed_sequence"),
        refusing(**LISTS, **UNIT, several="refuses more than one coordinate"),
        500,
    )
    yield Method(
        "MAPIE, learned order, half and half",
        "package",
        "epsilon",
        mapie("split_fixed_sequence"),
        refusing(**LISTS, **PARETO),
        80,
    )
    yield Method(
        "MAPIE, RCPS with its betting bound",
        "package",
        "epsilon",
        mapie_rcps,
        refusing(
            **LISTS,
            **UNIT,
            **ONE,
            **MONOTONE,
            fine="its memory grows with the square of the candidates",
        ),
        80,
    )
    yield Method(
        "riskgate, Learn then Test",
        "package",
        "epsilon",
        riskgate(published.riskgate_threshold, EPSILON),
        refusing(**LISTS, **UNIT, **ONE),
    )
    yield Method(
        "riskgate, conformal risk control",
        "package",
        "mean",
        riskgate(published.riskgate_crc),
        refusing(**LISTS, **UNIT, **ONE, **MONOTONE),
    )
    yield Method(
        "normal approximation, fixed sequence",
        "habit",
        "epsilon",
        sequence(lambda losses, delta: pvalues.clt(losses, delta, lower=-1.0)),
        refusing(**LISTS),
    )
    yield Method(
        "the cheapest whose mean is at most delta", "habit", "none", naive, refusing(**LISTS)
    )


# The table -----------------------------------------------------------------------------------------------------------


def bar(draws: int) -> float:
    """Three standard errors above epsilon: what a method that keeps its word stays under."""
    return EPSILON + 3 * math.sqrt(EPSILON * (1 - EPSILON) / draws)


def judged(case: Case, entrants: list[Method], number: int, draws: int) -> list[dict[str, Any]]:
    """One row per method; those that take the case see the same samples."""
    warm = case.sample(np.random.default_rng(SEED))
    for method in entrants:
        method.decide(case, warm)  # compiles, and fills caches
    verdicts: dict[str, list[refereed.Verdict]] = {method.name: [] for method in entrants}
    seconds = dict.fromkeys(verdicts, 0.0)
    for draw in range(draws):
        sample = case.sample(np.random.default_rng([SEED, number, draw]))
        for method in entrants:
            if draw < (method.most // 4 if "slow" in case.traits else method.most):
                start = time.process_time()
                decision = method.decide(case, sample)
                seconds[method.name] += time.process_time() - start
                verdicts[method.name].append(case.judge(decision))
    return [row(case, method, verdicts[method.name], seconds[method.name]) for method in entrants]


def row(
    case: Case, method: Method, verdicts: list[refereed.Verdict], spent: float
) -> dict[str, Any]:
    wrong, reached, saving, risk = (
        np.array(part, dtype=float) for part in zip(*verdicts, strict=True)
    )
    draws, rate = len(wrong), float(wrong.mean())
    return {
        "case": case.name,
        "method": method.name,
        "source": method.source,
        "promise": method.promise,
        "draws": draws,
        "violations": round(rate, 5),
        "violations_se": round(math.sqrt(rate * (1 - rate) / draws), 5),
        "above": rate > bar(draws),
        "power": rounded(reached),
        "saving": rounded(saving),
        "saving_se": rounded(saving, lambda a: a.std(ddof=1) / math.sqrt(draws)),
        "mean_risk": round(float(risk.mean()), 5),
        "milliseconds": round(1000 * spent / draws, 3),
    }


def rounded(values: Floats, of: Callable[[Floats], Any] = np.mean) -> float | None:
    """None where a case has nothing to find."""
    return None if np.isnan(values).any() else round(float(of(values)), 4)


def referee(draws: int, names: list[str] | None = None) -> dict[str, Any]:
    """All figures of the table."""
    versions = published.versions()
    rows: list[dict[str, Any]] = []
    described = []
    for number, case in enumerate(tqdm(list(refereed.cases()), desc="cases")):
        if names and case.name not in names:
            continue
        described.append({"case": case.name, "about": case.about, "n": case.n, "delta": case.delta})
        entrants = []
        for method in methods():
            reason = method.refuses(case)
            package = method.name.split(",")[0].lower()
            if not reason and method.source == "package" and versions[package] is None:
                reason = "not installed"
            if reason:
                rows.append(
                    {
                        "case": case.name,
                        "method": method.name,
                        "source": method.source,
                        "refused": reason,
                    }
                )
            else:
                entrants.append(method)
        rows += judged(case, entrants, number, draws)
    return {
        "command": "python benchmarks/referee.py" + (f" --draws {draws}" if draws != DRAWS else ""),
        "epsilon": EPSILON,
        "python": platform.python_version(),
        "versions": versions | {"numpy": np.__version__, "riskcal": riskcal.__version__},
        "cases": described,
        "rows": rows,
    }


def printed(figures: dict[str, Any]) -> str:
    """The table as text; a star is a rate above epsilon by more than three standard errors."""
    lines = []
    for case in figures["cases"]:
        lines += [
            "",
            f"{case['case']}: {case['about']}; n = {case['n']}, delta {case['delta']:g}",
            "",
        ]
        table = pd.DataFrame(
            [r for r in figures["rows"] if r["case"] == case["case"] and "refused" not in r]
        )
        table["violations"] = [
            f"{r.violations:.3f} +- {r.violations_se:.3f}{'*' if r.above else ''}"
            for r in table.itertuples()
        ]
        shown = table[
            ["method", "draws", "violations", "power", "saving", "mean_risk", "milliseconds"]
        ]
        lines.append(shown.to_string(index=False, float_format="%.3f", na_rep="-"))
    return "\n".join(lines)


def main() -> None:
    """Run, print, and write the figures if asked to."""
    parser = command.parser(__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help="samples of a case")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} samples of each case")
    parser.add_argument("--case", action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    figures = referee(QUICK if options.quick else options.draws, options.case)
    print(printed(figures))
    command.keep(figures, options.json)


if __name__ == "__main__":
    main()
