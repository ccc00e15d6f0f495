"""How often the host waits for the device: reads of tensors, counted on a CPU as an accelerator would be asked.

What loops of `kernels` do on a CPU is switched off, as it is where tensors are elsewhere. A read is what makes numbers of a
tensor, one inside another counts once, or an operation whose result has a size that depends on numbers. What is brought to the
device does not wait (`Backbone.tensor`), but each takes its time; and of notes that the host looks at later
`test_device_loop` says how late.
"""

import contextlib

import numpy as np
import pytest
import torch
from causal_models import VOCABULARY, prompts
from causal_models import decoder as causal
from t5_reference import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from riskcal import ExitPolicy
from riskcal.pruning import Pruning
from riskcal_adapters.torch import EarlyExitT5, Engine, Request, device_loop, kernels
from riskcal_adapters.torch.backbone import Backbone

LENGTH = 8
SIZED = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
    torch.ops.aten._unique2,
)
READS = ("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def reads(monkeypatch):
    """A list that grows by one with each read."""
    monkeypatch.setattr(Backbone, "lean", False)
    monkeypatch.setattr(kernels, "take", lambda values: False)
    found: list[str] = []
    reading = False

    def counting(name, read):
        def counted(*given, **named):
            nonlocal reading
            if reading:
                return read(*given, **named)
            reading = True
            try:
                found.append(name)
                return read(*given, **named)
            finally:
                reading = False

        return counted

    def chained(read):
        # .cpu().numpy() is one wait
        def counted(*given, **named):
            if found and found[-1] == "cpu":
                found[-1] = "cpu, numpy"
                return read(*given, **named)
            return counting("numpy", read)(*given, **named)

        return counted

    class Sized(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            by_mask = func is torch.ops.aten.index.Tensor and any(
                one is not None and one.dtype is torch.bool for one in args[1]
            )
            if not reading and (by_mask or func.overloadpacket in SIZED):
                found.append(f"{func}")
            return func(*args, **(kwargs or {}))

    for name in READS:
        own = getattr(torch.Tensor, name)
        changed = chained(own) if name == "numpy" else counting(name, own)
        monkeypatch.setattr(torch.Tensor, name, changed)
    with Sized():
        yield found


@contextlib.contextmanager
def at_most(reads, number, beside):
    """So many reads per position or call, and ``beside`` these of the request as a whole."""
    reads.clear()
    yield
    assert len(reads) <= number + beside, reads


def ids(count=4):
    return torch.from_numpy(np.random.default_rng(0).integers(2, VOCABULARY, (count, 6)))


@pytest.fixture(params=["v1.0", "v1.1", "llama-grouped"])
def own(request, reads, monkeypatch):
    kind = request.param
    found = causal(kind) if kind == "llama-grouped" else EarlyExitT5(tiny(gated=kind == "v1.1"))
    monkeypatch.setitem(vars(found._backbone), "lean", False)  # others may have asked already
    return found


@pytest.fixture
def uploads(monkeypatch):
    """A list that grows by one with each array that is brought to the device; there is no other way in."""
    found, bring = [], Backbone.tensor
    monkeypatch.setattr(
        Backbone, "tensor", lambda self, values: found.append(values.shape) or bring(self, values)
    )
    return found


def test_the_full_model_reads_once_a_token(own, reads):
    with at_most(reads, LENGTH, beside=8):
        own.generate(ids(), max_new_tokens=LENGTH)


@pytest.mark.parametrize("batching", ["diverge", "regroup"])
def test_exits_of_the_hosts_loop_read_once_a_layer(own, reads, batching):
    policy = ExitPolicy(threshold=0.999, batching=batching)
    with at_most(reads, LENGTH * own.n_layers, beside=8):
        own.generate(ids(1), policy=policy, max_new_tokens=LENGTH)


def assert_as_often(counted):
    """Reads and arrays, at every length; rows that ended are dropped at most twice where there were four."""
    (first, brought), *others = counted
    assert first <= 12
    assert {read for read, _ in others} == {first}, counted
    assert all(brought <= arrays <= brought + 2 * 2 for _, arrays in others), counted


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"measure": "max"},
        {"measure": "entropy"},
        {"measure": "state"},
        {"measure": "jsd"},
        {"measure": "oracle"},
        {"cache": "deferred", "max_pending": 2},
        {"cache": "recompute"},
        {"batching": "deepest"},
        {"pruning": Pruning("decaying", 20, 5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "whole"])
def test_a_device_decides_for_itself(own, reads, uploads, monkeypatch, fields, side):
    """As many reads and arrays brought there whatever the length: none per token, and so none per layer."""
    monkeypatch.setattr(device_loop, "apart", lambda device: True)
    threshold = {"max": 0.3, "entropy": -2.0, "state": 0.9}.get(fields.get("measure"), 0.1)
    policy = ExitPolicy(threshold=threshold, **fields)
    asked = prompts(4) if side == "left" else (ids(),)
    counted = []
    for length in (2, LENGTH, 3 * LENGTH):
        reads.clear(), uploads.clear()
        found = own.generate(*asked, policy=policy, max_new_tokens=length)
        counted.append((len(reads), len(uploads)))
        assert found.tokens.shape[1] == length
    assert len(set(found.exit_layers.unique().tolist())) > 1
    assert_as_often(counted)


@pytest.mark.parametrize("count", [1, 4])
def test_the_full_model_of_a_device_is_read_once_in_all(own, reads, uploads, monkeypatch, count):
    monkeypatch.setattr(device_loop, "apart", lambda device: True)
    counted = []
    for length in (2, 3 * LENGTH):
        reads.clear(), uploads.clear()
        own.generate(ids(count), max_new_tokens=length)
        counted.append((len(reads), len(uploads)))
    assert_as_often(counted)


@pytest.mark.parametrize(
    ("measure", "threshold", "a_call"),
    [("softmax", 0.0, 1), ("max", 0.1, 1), ("entropy", -2.0, 1), ("state", 0.5, 2)],
)
def test_the_engine_reads_confidences_and_tokens_together(own, reads, measure, threshold, a_call):
    """Measures of states look at the head where rows leave, and then read a second time."""
    policy = ExitPolicy(threshold=threshold, measure=measure)
    engine = Engine(own, policy, slots=4, max_prompt=8, max_new_tokens=LENGTH)
    requests = [Request(input_ids=row) for row in ids(6).numpy()]
    reads.clear()
    list(engine.run(requests))
    assert engine.stats.calls > LENGTH
    assert len(reads) <= a_call * engine.stats.calls + 4 * len(requests), reads
