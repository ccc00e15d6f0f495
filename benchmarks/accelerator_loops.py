"""What `accelerator.py` checks and measures of two decoding loops: the host's asks after each layer, the device's does not."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from accelerator import LIMIT, Report, differing, emitted, moved
from riskcal import ExitPolicy
from riskcal_adapters.torch import device_loop, load_example


@contextmanager
def hosts_loop() -> Iterator[None]:
    """The host decides after each layer."""
    with mock.patch.object(device_loop, "apart", return_value=False):
        yield


@contextmanager
def devices_loop(lag: int = device_loop.LAG) -> Iterator[None]:
    """The device decides, also for a single row; the host looks at what it said so many layers later."""
    with (
        mock.patch.object(device_loop, "apart", return_value=True),
        mock.patch.object(device_loop, "takes", return_value=True),
        mock.patch.object(device_loop, "LAG", lag),
    ):
        yield


def loops(
    decoder: Any, prompt: Any, policy: Any, limit: int, name: str
) -> dict[str, Callable[[], int]]:
    """A policy, called ``name``, by either loop whatever the device; one that exits also by the device's without a lag."""

    def by(loop: Callable[[], Any]) -> int:
        with loop():
            return emitted(decoder, prompt, policy, limit)

    ways = {
        f"{name}, host's loop": lambda: by(hosts_loop),
        f"{name}, device's loop": lambda: by(devices_loop),
    }
    if isinstance(policy, ExitPolicy) and policy.is_full_model:
        return ways
    return ways | {f"{name}, device's loop without lag": lambda: by(lambda: devices_loop(0))}


def waits(run: Callable[[], Any]) -> int:
    """How often the host waited for a CUDA device in a call, by PyTorch's own count; looks at notes are not in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def check_loops(
    report: Report, device: torch.device, words: list[str], certified: ExitPolicy
) -> None:
    """The shipped model: exits are those of the host's loop, and on a GPU nobody waits for a token."""
    decoder = moved(load_example("g2p"), device, torch.float32)
    prompt = decoder.encode(words)
    settings: dict[str, dict[str, Any]] = {
        "certified": {},
        "entropy": {"measure": "entropy", "threshold": -0.5},
        "state": {"measure": "state", "threshold": 0.9, "min_layer": 2},
        "deferred": {"cache": "deferred"},
        "deepest": {"batching": "deepest"},
    }
    for name, fields in settings.items():
        policy = ExitPolicy(**{"threshold": certified.threshold, "measure": "softmax"} | fields)
        with hosts_loop():
            expected = decoder.generate(*prompt, policy=policy, max_new_tokens=LIMIT)
        with devices_loop():
            found = decoder.generate(*prompt, policy=policy, max_new_tokens=LIMIT)
        wrong = differing(found.exit_layers, expected.exit_layers, 0)
        report.check(
            f"the device's loop exits where the host's does, {name}",
            wrong <= len(words) // 100,
            f"{wrong} of {len(words)} rows differ",
        )
    if device.type == "cuda":
        some, policy = decoder.encode(words[:16]), ExitPolicy(threshold=certified.threshold)
        counts = [
            waits(lambda n=n: decoder.generate(*some, policy=policy, max_new_tokens=n))
            for n in (4, LIMIT)
        ]
        report.check(
            f"the device's loop waits as often for {LIMIT} tokens as for 4",
            counts[0] == counts[1],
            f"{counts} waits",
        )
