"""A monitor that sees a proxy of every request, and the losses of those that a coin chose."""

import math

import numpy as np
import pytest

from riskcal import RiskcalError, RiskMonitor
from riskcal.serving import EventWatch


def traffic(n, rng, *, mean=0.1, rate=0.2, kind="good"):
    """Losses, NaN where the coin left them out, and proxies of all requests."""
    losses = (rng.random(n) < mean).astype(float)
    proxies = {
        "good": lambda: losses + 0.2 * rng.standard_normal(n),
        "idle": lambda: rng.random(n),
        "lying": lambda: 1 - losses + 0.2 * rng.standard_normal(n),
        # right at first, then the opposite, and rising as if all were getting worse
        "turning": lambda: np.where(np.arange(n) < n // 2, losses, 1 - losses) + np.arange(n) / n,
        "the loss": lambda: losses,
    }[kind]()
    return np.where(rng.random(n) < rate, losses, np.nan), proxies


def watched(losses, proxies, rate=0.2, **options):
    return RiskMonitor(0.1, sampling_rate=rate, proxy=(0, 1), **options).update(
        losses, proxies=proxies
    )


@pytest.mark.parametrize("kind", ["good", "idle", "lying", "turning", "the loss"])
def test_false_alarms_at_the_boundary(kind):
    """400 streams of 2,000 requests at exactly delta: at most .2 and three standard errors (.06)."""
    rng = np.random.default_rng(1)
    alarms = sum(watched(*traffic(2000, rng, kind=kind), epsilon=0.2).alarm for _ in range(400))
    assert alarms / 400 <= 0.26


@pytest.mark.parametrize("kind", ["good", "turning"])
def test_the_average_run_length_is_kept(kind):
    """200 streams at delta: 100 losses or more to the alarm or the end on average, but for three standard errors."""
    rng, lengths = np.random.default_rng(2), []
    for _ in range(200):
        monitor = watched(*traffic(3000, rng, kind=kind), average_run_length=100)
        lengths.append(monitor.alarm_at or monitor.n)
    assert np.mean(lengths) + 3 * np.std(lengths) / np.sqrt(200) >= 100


def test_a_good_proxy_brings_the_alarm_sooner_and_an_idle_one_changes_little():
    """60 paired streams: the mean share of losses needed has a standard error of about .04."""
    rng, seen = np.random.default_rng(3), {"good": [], "idle": []}
    for kind, shares in seen.items():
        for _ in range(60):
            losses, proxies = traffic(8000, rng, mean=0.16, kind=kind)
            plain = RiskMonitor(0.1, sampling_rate=0.2).update(losses[~np.isnan(losses)])
            shares.append(watched(losses, proxies).alarm_at / plain.alarm_at)
    assert np.median(seen["good"]) < 0.8
    assert abs(np.mean(seen["idle"]) - 1) < 0.03


def test_one_by_one_through_json_and_merged_it_is_the_same():
    losses, proxies = traffic(300, np.random.default_rng(4))
    whole = watched(losses, proxies)
    monitor = watched([], [])
    for loss, proxy in zip(losses, proxies, strict=True):
        monitor = RiskMonitor.from_json(monitor.update(loss, proxies=proxy).to_json())
    assert monitor.to_json() == whole.to_json()
    assert monitor.n == np.isfinite(losses).sum()
    parts = [watched(losses[:150], proxies[:150]), watched(losses[150:], proxies[150:])]
    merged = RiskMonitor.merge(parts)
    assert merged.evalue > 0
    assert merged.update([0.5], proxies=[0.5]).n == whole.n + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RiskMonitor(0.1, proxy=(1, 0)), "proxy: .* is no range"),
        (lambda: RiskMonitor(0.1).update([0.1], proxies=[0.1]), "proxies: construct the monitor"),
        (lambda: RiskMonitor(0.1, proxy=(0, 1)).update([0.1]), "proxies: this monitor has"),
        (lambda: watched([0.1, np.nan], [0.1]), "proxies: 1 given for 2 requests"),
        (lambda: watched([0.1], [np.nan]), "proxies: nan at index 0"),
        (lambda: watched([np.inf], [0.1]), "losses: inf at index 0"),
        (lambda: RiskMonitor(0.1).update([np.nan]), "losses: nan at index 0"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(RiskcalError, match=message):
        call()


def test_a_request_that_no_coin_can_have_left_out_is_refused():
    losses, proxies = [0.1, math.nan, 0.2], [0.5, 0.5, 0.5]
    with pytest.raises(RiskcalError, match=r"nan at index 1, a request that is sampled with prob"):
        RiskMonitor(0.1, proxy=(0, 1)).update(losses, proxies=proxies)
    with pytest.raises(RiskcalError, match=r"nan at index 1"):
        RiskMonitor(0.1, proxy=(0, 1), sampling_rate=0.1).update(
            losses, proxies=proxies, rates=[0.5, 1.0, 0.1]
        )
    assert RiskMonitor(0.1, proxy=(0, 1), sampling_rate=0.1).update(losses, proxies=proxies).n == 2


def test_a_log_has_no_proxies_for_a_monitor_that_wants_them():
    with pytest.raises(RiskcalError, match="give one without proxy="):
        EventWatch(RiskMonitor(0.1, proxy=(0, 1)))
