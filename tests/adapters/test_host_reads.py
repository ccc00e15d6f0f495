"""How often the host waits for the device: reads of tensors, counted on a CPU as an accelerator would be asked.

What loops of `kernels` do on a CPU is switched off, as it is where tensors are elsewhere. A read is what makes numbers of a
tensor; one inside another counts once.
"""

import contextlib

import numpy as np
import pytest
import torch
from causal_models import VOCABULARY
from causal_models import decoder as causal

from riskcal import ExitPolicy
from riskcal_adapters.torch import EarlyExitT5, Engine, Request, kernels
from riskcal_adapters.torch.backbone import Backbone

LENGTH = 8
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

    for name in READS:
        own = getattr(torch.Tensor, name)
        changed = chained(own) if name == "numpy" else counting(name, own)
        monkeypatch.setattr(torch.Tensor, name, changed)
    return found


@contextlib.contextmanager
def at_most(reads, number, beside):
    """So many reads per position or call, and ``beside`` these of the request as a whole."""
    reads.clear()
    yield
    assert len(reads) <= number + beside, reads


def ids(count=4):
    return torch.from_numpy(np.random.default_rng(0).integers(2, VOCABULARY, (count, 6)))


@pytest.fixture(params=["t5", "llama-grouped"])
def own(request, reads, tiny_t5, monkeypatch):
    found = EarlyExitT5(tiny_t5) if request.param == "t5" else causal(request.param)
    monkeypatch.setitem(vars(found._backbone), "lean", False)  # others may have asked already
    return found


def test_the_full_model_reads_once_a_token(own, reads):
    with at_most(reads, LENGTH, beside=8):
        own.generate(ids(), max_new_tokens=LENGTH)


@pytest.mark.parametrize("batching", ["diverge", "regroup"])
def test_exits_read_once_a_layer(own, reads, batching):
    policy = ExitPolicy(threshold=0.999, batching=batching)
    with at_most(reads, LENGTH * own.n_layers, beside=8):
        own.generate(ids(1), policy=policy, max_new_tokens=LENGTH)


@pytest.mark.parametrize("measure", ["softmax", "entropy"])
def test_the_engine_reads_confidences_and_tokens_together(own, reads, measure):
    policy = ExitPolicy(threshold=0.0 if measure == "softmax" else -2.0, measure=measure)
    engine = Engine(own, policy, slots=4, max_prompt=8, max_new_tokens=LENGTH)
    requests = [Request(input_ids=row) for row in ids(6).numpy()]
    a_call = 1 if measure == "softmax" else 2  # of other measures the token is read where it leaves
    reads.clear()
    list(engine.run(requests))
    assert engine.stats.calls > LENGTH
    assert len(reads) <= a_call * engine.stats.calls + 4 * len(requests), reads
