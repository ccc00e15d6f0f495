"""What Prometheus reads of an engine and of an event log is what they count."""

import sys
from types import SimpleNamespace

import pytest

from riskcal import RiskMonitor
from riskcal.serving import EventLog, EventWatch, MetricsCollector

STATS = SimpleNamespace(
    requests=7,
    failed=1,
    tokens=90,
    shadows=2,
    shadows_dropped=0,
    shadows_missing=1,
    shadows_at_full_depth=1,
    losses_failed=0,
    events_lost=0,
    calls=40,
    rows_per_call=3.5,
    occupancy=0.875,
    seconds=(0.2, 0.9),
    first_token_seconds=(0.1, 0.3),
    token_seconds=(0.01, 0.02),
)


def test_a_scrape_tells_the_engine_and_the_log_as_they_are_now(tmp_path):
    client = pytest.importorskip("prometheus_client")
    log, registry = EventLog(tmp_path / "events.jsonl"), client.CollectorRegistry()
    watch = EventWatch(RiskMonitor(0.2))
    registry.register(MetricsCollector(lambda: STATS, lambda: watch.read(log.path)))
    for i, loss in enumerate([0.0, 1.0, 0.0, 0.0]):
        told = {"gen_ai.response.id": f"r{i}", "riskcal.task": "chat"}
        log.write("riskcal.request.served", told | {"riskcal.exit.layers": {"2": 3, "6": 1}})
        log.write("riskcal.shadow.evaluated", told | {"riskcal.loss": loss})
    read = registry.get_sample_value
    assert read("riskcal_engine_requests_total") == 7
    assert read("riskcal_engine_seconds", {"quantile": "0.99"}) == 0.9
    assert read("riskcal_monitor_alarm") == 0
    assert read("riskcal_losses_total", {"task": "chat"}) == 4
    assert read("riskcal_exit_tokens_total", {"task": "chat", "layer": "2"}) == 12
    assert read("riskcal_events_total", {"event": "riskcal.request.served"}) == 4
    bounds = [
        read("riskcal_mean_loss", {"task": "chat", "bound": bound})
        for bound in ("low", "estimate", "high")
    ]
    assert bounds[1] == 0.25
    assert (bounds[0], bounds[2]) == watch.interval("chat")
    for i in range(40):
        log.write("riskcal.shadow.evaluated", {"riskcal.loss": 1.0, "riskcal.task": f"{i % 2}"})
    assert read("riskcal_monitor_alarm") == 1
    assert read("riskcal_losses_total", {"task": "1"}) == 20
    assert b'riskcal_losses_total{task="0"} 20.0' in client.generate_latest(registry)


def test_without_the_client_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    with pytest.raises(ImportError, match=r"pip install 'riskcal-ltt\[prometheus\]'"):
        MetricsCollector()
