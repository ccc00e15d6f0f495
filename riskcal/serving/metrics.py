"""`MetricsCollector`: an engine's figures and an event log's, as Prometheus reads them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from riskcal.serving.watch import EventWatch

#: Of an engine's figures: what is counted up, what goes up and down, and pairs of median and 99th percentile.
_COUNTED = {
    "requests": "Requests answered with an output",
    "failed": "Requests answered with an error",
    "tokens": "Tokens generated",
    "shadows": "Requests that also ran on the full model",
    "shadows_dropped": "Shadows for which no slot was ever free",
    "shadows_missing": "Requests of shadows that ended without an output",
    "shadows_at_full_depth": "Requests of shadows that were served at full depth, so that there is nothing to compare",
    "losses_failed": "Shadows of which the loss failed",
    "events_lost": "Events that could not be written",
    "calls": "Calls of a layer",
}
_GAUGES = {
    "rows_per_call": "Rows that a layer call serves on average",
    "occupancy": "The same as a share of the slots",
}
_QUANTILES = {
    "seconds": "Seconds of a request",
    "first_token_seconds": "Seconds to the first token",
    "token_seconds": "Seconds of a token after the first",
}


@dataclass(frozen=True)
class MetricsCollector:
    """A collector for ``prometheus_client`` (extra ``prometheus``): ``REGISTRY.register(MetricsCollector(...))``.

    Everything is read when Prometheus asks; between times it costs nothing.

    Parameters
    ----------
    stats : callable, optional
        Returns an engine's figures: ``lambda: engine.stats``.
    watch : callable, optional
        Returns an `EventWatch`: ``lambda: watch.read("events.jsonl")`` reads what is new in the log first.

    Examples
    --------
    >>> log = riskcal.serving.EventLog("events.jsonl")
    >>> log.write("riskcal.shadow.evaluated", {"gen_ai.response.id": "r1", "riskcal.loss": 0.25})
    >>> watch = riskcal.serving.EventWatch(riskcal.RiskMonitor(delta=0.1))
    >>> from prometheus_client import CollectorRegistry, generate_latest
    >>> registry = CollectorRegistry()
    >>> registry.register(riskcal.serving.MetricsCollector(watch=lambda: watch.read("events.jsonl")))
    >>> b"riskcal" in generate_latest(registry)
    True
    """

    stats: Callable[[], Any] | None = None
    watch: Callable[[], EventWatch] | None = None

    def __post_init__(self) -> None:
        _families()

    def collect(self) -> Iterator[Any]:
        """Prometheus's families of metrics, as they are now."""
        if self.stats is not None:
            yield from _of_engine(self.stats())
        if self.watch is not None:
            yield from _of_watch(self.watch())

    def describe(self) -> list[Any]:
        """Nothing: registering must not read a log."""
        return []


def _of_engine(stats: Any) -> Iterator[Any]:
    families = _families()
    for name, said in _COUNTED.items():
        yield families.CounterMetricFamily(
            f"riskcal_engine_{name}", said, value=getattr(stats, name)
        )
    for name, said in _GAUGES.items():
        yield families.GaugeMetricFamily(f"riskcal_engine_{name}", said, value=getattr(stats, name))
    for name, said in _QUANTILES.items():
        family = families.GaugeMetricFamily(
            f"riskcal_engine_{name}", f"{said}, of the latest requests", labels=["quantile"]
        )
        for quantile, value in zip(("0.5", "0.99"), getattr(stats, name), strict=True):
            family.add_metric([quantile], value)
        yield family


def _of_watch(watch: EventWatch) -> Iterator[Any]:
    monitor, families = watch.monitor, _families()
    yield families.GaugeMetricFamily(
        "riskcal_monitor_alarm", "1 once losses exceed what was certified", value=monitor.alarm
    )
    yield families.GaugeMetricFamily(
        "riskcal_monitor_delta", "The tolerated mean loss", value=monitor.delta
    )
    tasks = sorted(watch.losses)
    losses = {task: watch.losses[task] for task in tasks}
    yield _by("task", "Shadowed requests", "riskcal_losses", {t: n for t, (n, _) in losses.items()})
    mean = families.GaugeMetricFamily(
        "riskcal_mean_loss",
        "Mean loss of shadowed requests, and where it is with 95% confidence at all times",
        labels=["task", "bound"],
    )
    for task, (n, total) in losses.items():
        low, high = watch.interval(task)
        for bound, value in (("low", low), ("estimate", total / n), ("high", high)):
            mean.add_metric([task, bound], value)
    yield mean
    exits = families.CounterMetricFamily(
        "riskcal_exit_tokens", "Tokens by the layer they left at", labels=["task", "layer"]
    )
    for task, layers in sorted(watch.layers.items()):
        for layer, count in sorted(layers.items()):
            exits.add_metric([task, layer], count)
    yield exits
    yield _by("event", "Events of the log", "riskcal_events", watch.events)
    yield _by("what", "What was odd in the log", "riskcal_log_odd", watch.counts)


def _by(label: str, said: str, name: str, counts: Mapping[str, int]) -> Any:
    family = _families().CounterMetricFamily(name, said, labels=[label])
    for key, count in sorted(counts.items()):
        family.add_metric([key], count)
    return family


def _families() -> Any:
    try:
        return import_module("prometheus_client.core")
    except ImportError:
        raise ImportError(
            "metrics need prometheus-client: pip install 'riskcal-ltt[prometheus]'"
        ) from None
