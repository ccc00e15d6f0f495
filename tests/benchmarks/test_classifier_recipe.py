"""The shipped classifier's network: what its exits cost, counted twice, and that stopping early computes what it says."""

import numpy as np
import pytest
import torch
from torch import nn

from recipes.classifier import data
from recipes.classifier.network import MultiExit
from riskcal import Traces, load_example, replay_traces


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return MultiExit(data.COMMON + 1).eval()


def words(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        "".join(rng.choice(list(data.LETTERS), rng.integers(2, data.LONGEST + 1))) for _ in range(n)
    ]


class Counted:
    """FLOPs of every convolution and linear layer that really runs, from the shapes of what goes in and comes out."""

    def __init__(self, network):
        self.total = 0
        self.hooks = [
            module.register_forward_hook(self.count)
            for module in network.modules()
            if isinstance(module, nn.Conv1d | nn.Linear)
        ]

    def count(self, module, inputs, output):
        each = (
            module.weight[0].numel()
            if isinstance(module, nn.Linear)
            else module.in_channels * module.kernel_size[0] // module.groups
        )
        self.total += 2 * output[0].numel() * each


def test_flops_from_shapes_are_those_of_what_runs(network):
    letters = torch.as_tensor(data.letters(["calibrate"]))
    counted = Counted(network)
    seen = []
    with torch.no_grad():
        for _ in network.exits(letters):
            seen.append(counted.total)
    for hook in counted.hooks:
        hook.remove()
    assert seen == network.flops().tolist()
    assert load_example("stress").costs["flops"].reshape(-1, 5)[0].tolist() == seen


def test_a_request_that_stops_early_pays_for_what_ran_and_is_what_the_replay_says(network):
    """Thirty requests through the loop of serving, hooks counting, beside the replay of their traces."""
    letters = torch.as_tensor(data.letters(words(30)))
    with torch.no_grad():
        probability = torch.stack(network(letters), 1).softmax(-1)
    confidence, label = (part.numpy() for part in probability.max(-1))
    threshold = float(np.quantile(confidence[:, :-1], 0.8)) + 1e-6
    counted, answers, spent = Counted(network), [], []
    for row in letters:
        before = counted.total
        answers.append(network.answer(row, threshold))
        spent.append(counted.total - before)
    for hook in counted.hooks:
        hook.remove()
    traces = Traces.from_arrays(
        prompt=np.arange(30) + 100,
        position=np.zeros(30, dtype=int),
        confidence=confidence,
        agrees=label == label[:, -1:],
        cost={"flops": network.flops()},
    )
    runs = replay_traces(traces, [threshold], exact=True)
    place = runs.prompts.astype(int) - 100
    assert runs.values["layers"][:, 0].tolist() == [answers[i].exit for i in place]
    assert runs.values["flops"][:, 0].tolist() == [spent[i] for i in place]
    assert runs.values["flops"].mean() == pytest.approx(np.mean(spent))
    assert len({answer.exit for answer in answers}) > 1


def test_words_are_read_from_their_ends_and_patterns_by_their_digits(tmp_path):
    path = tmp_path / "cmudict.dict"
    path.write_text(
        "record R AH0 K AO1 R D\nrecord(2) R EH1 K ER0 D\nrecord(3) R IH0 K AO1 R D\nhm HH M\nx' EH1 K S\n"
    )
    entries = data.read_patterns(path)
    assert entries == {"record": ["01", "10"], "x'": ["1"]}
    assert data.classes(entries["record"], ["10", "1"]) == [2, 0]
    assert data.letters(["ab"])[0].tolist() == [0] * 18 + [1, 2]
