"""At which layers tokens leave, by group; and what each layer's confidence is worth."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal._validate import Floats
from riskcal.policy import ExitPolicy
from riskcal.records import Runs, Traces
from riskcal.report import charts
from riskcal.report.html import Html, details, joined, shown, table, tag
from riskcal.report.sections import Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Groups and heads that are drawn, and groups in the table; with more of them a page would be no picture of anything.
MOST, LISTED = 12, 200
BINS = 10


def layers_of(traces: Traces, policy: ExitPolicy) -> NDArray[np.intp]:
    """(N,) the layer, from 1, at which each token of the full model's path would leave."""
    length = int(traces.position.max()) + 1
    lower = policy.lower_is_stricter  # which is for the comparison below, not for the thresholds
    policy = policy.model_copy(update={"lower_is_stricter": False})
    needed = policy.exit_thresholds(traces.n_layers, length)[traces.position]
    seen = _padded(traces, traces.confidence)
    leaves = (seen <= needed) & np.isfinite(needed) if lower else seen >= needed
    leaves[np.arange(len(leaves)), traces.counts - 1] = True
    first: NDArray[np.intp] = leaves.argmax(1) + 1
    return first


def _padded(traces: Traces, values: NDArray[Any]) -> Floats:
    """(N, L) of what stands at each exit; NaN where a row has fewer."""
    if traces.lengths is None:
        return np.array(values, dtype=np.float64)
    padded = np.full((len(traces.lengths), traces.n_layers), np.nan)
    padded[np.arange(traces.n_layers) < traces.lengths[:, None]] = values
    return padded


class Kind(NamedTuple):
    """What leaves, and where: tokens at layers, or requests, each a prompt of its own, at exits."""

    what: str = "tokens"
    place: str = "layer"


def kind(traces: Traces) -> Kind:
    """Requests where each prompt has one row, as a classifier's or a cascade's have."""
    alone = len(np.unique(traces.prompt)) == len(traces.prompt)
    return Kind("requests", "exit") if alone else Kind()


def histograms(
    counts: Mapping[str, Floats],
    note: str,
    *,
    of: Kind = Kind(),  # noqa: B008 -- a tuple of texts
    title: str | None = None,
    means: Mapping[str, float] | None = None,
) -> Section:
    """How many tokens leave at each layer, by group: bars, and a table; ``means`` are those of what was rounded to layers."""
    size = charts.WIDE if len(counts) == 1 else charts.SMALL
    figures = []
    for name, of_layer in list(counts.items())[:MOST]:
        mean = (of_layer * np.arange(1, len(of_layer) + 1)).sum() / max(of_layer.sum(), 1)
        if means is not None:
            mean = means[name]
        label = f"Chart: exits of {name}; on average at {of.place} {mean:.2f}."

        def draw(ax: "Axes", of_layer: Floats = of_layer) -> None:
            charts.bars(ax, of_layer)
            ax.set_xlabel(of.place)
            ax.set_ylabel("%")

        caption = tag("figcaption", name, " ", tag("small", f"mean {of.place} {mean:.2f}"))
        figures.append(tag("figure", caption, charts.chart(draw, label, size=size)))
    layers = max(len(of_layer) for of_layer in counts.values())
    frame = pd.DataFrame(
        [
            {"group": name} | {f"{of.place} {i + 1}": int(n) for i, n in enumerate(of_layer)}
            for name, of_layer in list(counts.items())[:LISTED]
        ]
    )
    more = f" Of {len(counts)} groups {MOST} are drawn" if len(counts) > MOST else ""
    more += f" and {LISTED} listed" * (len(counts) > LISTED) + "." * bool(more)
    body = [
        tag("p", note + more),
        tag("div", *figures, class_=f"charts{' small' * (len(counts) > 1)}"),
    ]
    counted = f"Counts by {of.place}, 1 to {layers}"
    body.append(details("Exits, as a table", table(frame, counted)))
    return Section("exits", title or f"Where {of.what} leave", joined(body))


def of_traces(traces: Traces, policy: ExitPolicy | None, groups: Mapping[Any, Any]) -> Section:
    """Histograms of a policy on the full model's path, by class of token or by the prompt's group.

    Without a policy, of all tokens at three thresholds in the midst of the confidences.
    """
    of = kind(traces)
    note = (
        f"Share of the tokens that leave at each layer{_at(policy)}, read off the full model's own path ({len(traces.prompt):,} "
        "tokens). After a first early exit a real decoder's states differ a little, so that this shows and proves nothing."
        if of.what == "tokens"
        else f"Share of the {len(traces.prompt):,} requests that leave at each exit{_at(policy)}; no guarantee speaks of it."
    )
    if policy is None:
        note += " They leave where a confidence is at least the threshold."
        finite = traces.confidence[np.isfinite(traces.confidence)]
        middle = np.unique(np.quantile(finite, [0.25, 0.5, 0.75])) if finite.size else np.ones(1)
        counts = {
            f"threshold {one:.3g}": _counts(traces, layers_of(traces, ExitPolicy(threshold=one)))
            for one in middle.tolist()
        }
        return histograms(counts, note, of=of)
    exits = layers_of(traces, policy)
    labels: NDArray[Any] = np.full(len(exits), f"all {of.what}")
    if traces.group is not None:
        labels = np.asarray(traces.group).astype(str)
    elif groups:
        labels = np.array([str(groups.get(one, "(no group)")) for one in traces.prompt.tolist()])
    names = np.unique(labels).tolist()
    counted = {one: _counts(traces, exits[labels == one]) for one in names}
    return histograms(counted, note, of=of)


def _at(policy: ExitPolicy | None) -> str:
    if policy is None or policy.thresholds is not None:
        return "" if policy is None else " under the policy's thresholds"
    return f" at threshold {shown(policy.threshold)}"


def _counts(traces: Traces, exits: NDArray[np.intp]) -> Floats:
    return np.bincount(exits, minlength=traces.n_layers + 1)[1:].astype(np.float64)


def of_runs(runs: Runs, candidate: int) -> list[Section]:
    """Histograms of the prompts' mean depth at one candidate, by group, where no exits of tokens were recorded."""
    if "layers" not in runs.values:
        return []
    depth = runs.values["layers"][:, candidate]
    whole = runs.full.get("layers", depth)  # a chart of 13 layers would hide the other 19
    deepest = max(int(np.ceil(max(depth.max(), whole.max()))), 1)
    if deepest > 200:
        return []
    labels = runs.labels.get("group", np.full(len(depth), "all prompts", dtype=object)).astype(str)
    edges = np.arange(0.5, deepest + 1.5)
    inside = {str(name): depth[labels == name] for name in np.unique(labels)}
    counts = {name: np.histogram(own, edges)[0].astype(float) for name, own in inside.items()}
    at = runs.candidates["threshold"].iloc[candidate]
    note = (
        f"Share of the prompts by their mean layers per token at threshold {shown(float(at))}, rounded. "
        "What a group loses is not certified, only the mean over all."
    )
    means = {name: float(own.mean()) for name, own in inside.items()}
    return [histograms(counts, note, title="How deep prompts go", means=means)]


def reliability(traces: Traces) -> Section:
    """How often each layer's token is the full model's (or its mean loss), by its confidence."""
    if traces.agrees is not None:
        good, what = _padded(traces, traces.agrees), "agrees with the full model"
    else:
        good, what = 1.0 - _padded(traces, np.asarray(traces.loss)), "1 - mean loss"
    seen = _padded(traces, traces.confidence)
    last = np.arange(len(seen)), traces.counts - 1
    seen[last] = good[last] = np.nan  # the full model's own, which is no exit
    finite = traces.confidence[np.isfinite(traces.confidence)].astype(np.float64)
    low, high = float(finite.min(initial=0.0)), float(finite.max(initial=1.0))
    is_share = (low, high) == (0.0, 1.0)  # other measures, entropies say, have no diagonal
    edges = np.linspace(low, high, BINS + 1)
    heads = list(range(max(traces.n_layers - 1, 1)))
    drawn = np.unique(np.linspace(0, len(heads) - 1, min(MOST, len(heads))).astype(int))
    figures, rows, of = [], [], kind(traces)
    for head in heads:
        confidence, outcome = seen[:, head], good[:, head]
        bins = _bins(confidence, outcome, edges)
        row = {of.place: head + 1, "confidences": int(bins.n.sum()), what: _mean(outcome)}
        gap = float((np.abs(bins.seen - bins.right) * bins.n).sum() / max(bins.n.sum(), 1))
        rows.append(row | ({"gap": gap} if is_share else {}))
        if head in drawn and bins.n.size:
            name = f"{of.place.capitalize()} {head + 1}"
            figures.append(_diagram(name, bins, (low, high), gap if is_share else None, what))
    said = f"how often its {of.what[:-1]} {what}" if traces.agrees is not None else what
    note = (
        f"For each exit but the last: {said}, by its confidence in {BINS} bins; a larger dot has more {of.what}. "
        "Thresholds need a curve that rises (or falls, where low values are the strict ones): a flat one cannot tell good "
        f"{of.what} from bad. "
    )
    if is_share:
        note += (
            "On the diagonal confidence means what it says, which calibrated thresholds do not need; the gap is the mean "
            "distance from it."
        )
    word = "exit" if of.place == "exit" else "head"
    body = [tag("p", note), tag("div", *figures, class_="charts small")]
    body.append(
        details(
            "Confidences, as a table" if word == "exit" else "Heads, as a table",
            table(pd.DataFrame(rows), f"Every exit but the last, by {of.place}"),
        )
    )
    return Section("heads", f"What each {word}'s confidence is worth", joined(body))


def _mean(outcome: Floats) -> float:
    """Of rows that have the exit."""
    there = outcome[~np.isnan(outcome)]
    return float(there.mean()) if there.size else math.nan


class _Bins(NamedTuple):
    """Of each bin that holds any: the mean confidence, the mean outcome, how many."""

    seen: Floats
    right: Floats
    n: NDArray[np.intp]


def _bins(confidence: Floats, outcome: Floats, edges: Floats) -> _Bins:
    held = np.isfinite(confidence)
    which = np.clip(np.searchsorted(edges, confidence[held], side="right") - 1, 0, BINS - 1)
    n = np.bincount(which, minlength=BINS)
    some = n > 0
    means = [
        np.bincount(which, x[held], minlength=BINS)[some] / n[some] for x in (confidence, outcome)
    ]
    return _Bins(means[0], means[1], n[some])


def _diagram(
    name: str, bins: _Bins, span: tuple[float, float], gap: float | None, what: str
) -> Html:
    def draw(ax: "Axes") -> None:
        if gap is not None:
            ax.plot([0, 1], [0, 1], color=charts.QUIET, linewidth=1, linestyle=":")
        ax.plot(bins.seen, bins.right, "-", color=charts.LOSS, linewidth=1)
        sizes = 8 + 60 * bins.n / bins.n.max()
        ax.scatter(bins.seen, bins.right, s=sizes, color=charts.LOSS, linewidths=0)
        margin = 0.05 * (span[1] - span[0])
        ax.set_xlim(span[0] - margin, span[1] + margin)
        ax.set_ylim(-0.05, 1.05)
        ax.set_xlabel("confidence")
        ax.set_ylabel("agreement" if what.startswith("agrees") else "1 - loss")

    said = "" if gap is None else f"gap {gap:.3f}"
    label = f"Chart: {name.lower()}, outcome by confidence; {said or 'table below'}."
    caption = tag("figcaption", name, " ", tag("small", said))
    return tag("figure", caption, charts.chart(draw, label, size=charts.SMALL))
