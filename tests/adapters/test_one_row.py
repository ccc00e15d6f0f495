"""One row decoded by compiled loops, against the loop that decodes every other batch."""

import copy
import math

import numpy as np
import pytest
import torch
from t5_reference import DECAYING, FULL, family, hugging_face, prompts

from riskcal import ExitPolicy
from riskcal.policy import Pruning, Sampling
from riskcal.serving import Tokens
from riskcal_adapters.torch import EarlyExitT5, one_row, t5_kernels


def gated(kind="t5", **changes):
    return family(kind, feed_forward_proj="gated-gelu", **changes)


@pytest.fixture(scope="module", params=["t5", "umt5"])
def decoder(request):
    """Biases that layers share, and of each layer."""
    return EarlyExitT5(gated(request.param))


def both(decoder, policy, ids, mask=None, length=12):
    """By the compiled loops, and by the other; the first must have been asked once."""
    asked, generate = [], one_row.generate
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(one_row, "generate", lambda *given: asked.append(0) or generate(*given))
        ours = decoder.generate(ids, mask, policy=policy, max_new_tokens=length)
        assert len(asked) == 1
        patched.setattr(one_row, "takes", lambda *_: False)
        return ours, decoder.generate(ids, mask, policy=policy, max_new_tokens=length)


def assert_same(ours, other):
    assert ours.tokens.equal(other.tokens)
    assert ours.exit_layers.equal(other.exit_layers)
    for mine, its in ((ours.confidence, other.confidence), (ours.refused, other.refused)):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6, equal_nan=True)
    parts = (ours.tokens, ours.exit_layers, ours.confidence, ours.refused)
    assert all(part.is_contiguous() for part in parts)


def policies(decoder):
    """None exits, some do, all do, by each measure."""
    margins = decoder.trace(*prompts(3), max_new_tokens=8).confidence
    cuts = [float(np.nanquantile(margins[:, :-1], q)) for q in (0.3, 0.6, 0.9)]
    yield FULL
    yield from (ExitPolicy(threshold=cut) for cut in cuts)
    yield ExitPolicy(threshold=cuts[1], min_layer=2, batching="deepest")
    yield ExitPolicy(threshold=cuts[1], schedule=DECAYING, batching="regroup")
    yield ExitPolicy(thresholds={2: -9.0})
    for measure in ("max", "entropy"):
        trace = decoder.trace(*prompts(3), policy=ExitPolicy(measure=measure), max_new_tokens=8)
        confidence = trace.confidence[:, :-1]
        for q in (0.3, 0.7):
            yield ExitPolicy(measure=measure, threshold=float(np.nanquantile(confidence, q)))


@pytest.mark.parametrize("seed", range(3))
def test_tokens_exits_and_confidences_are_those_of_the_other_loop(decoder, seed):
    depths = set()
    for policy in policies(decoder):
        ids, mask = prompts(3, seed=seed)
        real = mask[seed].bool()
        ours, other = both(decoder, policy, ids[seed : seed + 1, real])
        assert_same(ours, other)
        depths.update(ours.exit_layers.flatten().tolist())
    assert len(depths) > 3


@pytest.mark.parametrize(
    "mask", [[1] * 9, [0, 0] + [1] * 7, [1] * 5 + [0] * 4, [1, 1, 0, 1, 1, 0, 0, 1, 1]]
)
def test_padding_and_holes_are_read_as_by_the_other_loop(decoder, mask):
    ids, _ = prompts(1)
    assert_same(*both(decoder, ExitPolicy(threshold=0.2), ids, torch.tensor([mask])))


@pytest.mark.parametrize(("prompt", "length"), [(1, 1), (100, 3), (5, 150)])
def test_lengths_of_prompt_and_output_do_not_matter(decoder, prompt, length):
    ids = torch.randint(2, 41, (1, prompt), generator=torch.Generator().manual_seed(1))
    ours, other = both(decoder, ExitPolicy(threshold=0.2), ids, length=length)
    assert_same(ours, other)


def test_the_full_models_tokens_are_those_of_hugging_face(gated_t5):
    decoder, (ids, mask) = EarlyExitT5(gated_t5), prompts(1)
    ours, _ = both(decoder, FULL, ids, mask)
    assert ours.tokens.equal(hugging_face(gated_t5, ids, mask))


def test_it_ends_where_an_end_token_is_said_and_nowhere_else(decoder, monkeypatch):
    ids, _ = prompts(1)
    free = decoder.generate(ids, max_new_tokens=40).tokens[0].tolist()
    assert len(free) == 40
    for at in (0, 15, 16, 30):
        ends = frozenset({free[at]})
        monkeypatch.setattr(
            decoder.loop, "special", decoder.loop.special._replace(ends=tuple(ends))
        )
        ours, other = both(decoder, FULL, ids, length=40)
        assert_same(ours, other)
        assert ours.tokens[0].tolist() == free[: free.index(free[at]) + 1]


def test_a_nan_does_not_exit_and_was_not_refused():
    model = gated()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    ids, _ = prompts(1)
    ours, other = both(EarlyExitT5(broken), ExitPolicy(threshold=0.1), ids, length=4)
    assert_same(ours, other)
    assert ours.exit_layers.unique().tolist() == [broken.config.num_decoder_layers]
    assert ours.refused.isneginf().all()


def test_layers_that_nothing_reached_do_not_read_the_prompt(gated_t5, monkeypatch):
    rooms, make = [], t5_kernels.room
    monkeypatch.setattr(t5_kernels, "room", lambda *given: rooms.append(make(*given)) or rooms[-1])
    EarlyExitT5(gated_t5).generate(prompts(1)[0], policy=ExitPolicy.static(2), max_new_tokens=5)
    assert rooms[0].filled[:, 0].tolist() == [5, 5, 0, 0, 0]


@pytest.mark.parametrize(
    "other",
    [
        {"measure": "state"},
        {"cache": "deferred"},
        {"emits": "last"},
        {"pruning": Pruning("fixed", 20, 3)},
        {"sampling": Sampling()},
        {"max_pending": 2},
        {"forbidden": (Tokens([5]),)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_it_takes_no_policy_of_another_kind(gated_t5, other):
    backbone = EarlyExitT5(gated_t5)._backbone
    plain = ExitPolicy(threshold=0.5)
    assert one_row.takes(backbone, plain.named(), 1)
    assert not one_row.takes(backbone, plain.named(), 2)
    assert not one_row.takes(backbone, plain.model_copy(update=other).named(), 1)


def test_it_takes_no_model_whose_layers_are_not_compiled(tiny_t5):
    backbone = EarlyExitT5(tiny_t5)._backbone
    assert one_row.takes(backbone, FULL.named(), 1) == tiny_t5.config.is_gated_act
    half = EarlyExitT5(copy.deepcopy(tiny_t5).bfloat16())._backbone
    assert not one_row.takes(half, FULL.named(), 1)
