"""`kernels`: loops in place of tensors' operations give what these give, for every row whatever is beside it."""

import copy
import math

import numpy as np
import pytest
import torch
from causal_models import VOCABULARY
from causal_models import decoder as causal
from causal_models import model as causal_model
from hypothesis import given, settings
from hypothesis import strategies as st

from riskcal import ExitPolicy
from riskcal_adapters.torch import (
    EarlyExitCausalLM,
    EarlyExitT5,
    Engine,
    Request,
    kernels,
    load_example,
    measures,
)
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.weights import rms_norm

LENGTH = 10


@given(seed=st.integers(0, 2**32 - 1), group=st.sampled_from([1, 3]), biased=st.booleans())
@settings(max_examples=25, deadline=None)
def test_attention_is_that_of_float64(seed, group, biased):
    rng = np.random.default_rng(seed)
    queries_of, keys_of, width, asked, room = 2 * group, 2, int(rng.integers(1, 40)), 5, 11
    rows = rng.normal(size=(60, 3 + 2 * keys_of * width)).astype(np.float32)
    queries = rng.normal(size=(asked, queries_of * width)).astype(np.float32)
    counts, step = rng.integers(1, room + 1, asked), int(rng.integers(1, 4))
    starts = np.array([rng.integers(0, 60 - (n - 1) * step) for n in counts])
    bias = rng.normal(size=(queries_of, room if biased else 0)).astype(np.float32)
    parts, columns = (3, 3 + keys_of * width, group), queries.shape[1]
    out = kernels.attend(
        queries, rows, starts, step, counts, bias, bias.shape[1] - counts, parts, columns, width,
        np.float32(0.3),
    )  # fmt: skip
    for a, (start, n) in enumerate(zip(starts, counts, strict=True)):
        own = rows[start : start + (n - 1) * step + 1 : step, 3:].astype(np.float64)
        keys, values = own.reshape(n, 2, keys_of, width).transpose(1, 2, 0, 3)
        for h in range(queries_of):
            query = queries[a, h * width : (h + 1) * width]
            products = 0.3 * keys[h // group] @ query + (bias[h, room - n :] if biased else 0)
            weights = np.exp(products - products.max())
            expected = weights @ values[h // group] / weights.sum()
            np.testing.assert_allclose(out[a, h * width : (h + 1) * width], expected, atol=3e-6)


@pytest.mark.parametrize("name", kernels.OF_LOGITS)
@pytest.mark.parametrize("vocabulary", [2, 70, 4000])
def test_confidences_and_best_tokens_are_those_of_softmax(name, vocabulary):
    logits = torch.randn(9, vocabulary, generator=torch.manual_seed(0)) * 5
    logits[1, 1] = logits[1, 0] = 40.0  # a tie has margin 0, and the lowest id
    logits[2, 1], logits[3, 0], logits[4, :] = math.nan, math.inf, -math.inf
    logits[5, 1:] = -math.inf
    logits[6] *= 200  # differences beyond what an exponential holds
    confidence, best = measures.surest(name, logits)
    probabilities = torch.softmax(logits.double(), -1)
    top = probabilities.topk(2).values
    expected = {
        "softmax": top[:, 0] - top[:, 1],
        "max": top[:, 0],
        "entropy": torch.special.entr(probabilities).sum(-1).neg(),
    }
    np.testing.assert_allclose(confidence, expected[name], rtol=1e-6, atol=1e-6)
    assert best.tolist() == logits.argmax(-1).tolist()
    assert best[1] == 0
    if name == "softmax":
        assert confidence[1] == 0
    alone = [measures.surest(name, row[None])[0][0] for row in logits]
    np.testing.assert_array_equal(confidence, alone)


def test_norm_and_gate_are_those_of_torch():
    values = torch.randn(7, 48, generator=torch.manual_seed(0)) * 30
    values[0] = 0.0
    offset = np.float32(0.02)
    normed = kernels.rms_norm(values.numpy(), offset)
    expected = rms_norm(values, torch.tensor(offset))
    np.testing.assert_allclose(normed, expected, rtol=2e-6, atol=1e-9)
    gated = kernels.gated_gelu(values.numpy())
    exact = values.double()
    expected = torch.nn.functional.gelu(exact[:, :24], approximate="tanh") * exact[:, 24:]
    np.testing.assert_allclose(gated, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "llama-grouped"])
@pytest.mark.parametrize("batching", ["diverge", "regroup"])
def test_a_decoder_without_them_decodes_the_same(kind, batching, tiny_t5, monkeypatch):
    def made():
        return EarlyExitT5(tiny_t5) if kind == "t5" else causal(kind)

    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(2, VOCABULARY, (5, 7)))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :1] = 0
    lean = made()
    traces = lean.trace(ids, mask, max_new_tokens=LENGTH)
    middle = float(np.nanquantile(traces.confidence[:, :-1], 0.6))
    policies = [ExitPolicy(threshold=middle, batching=batching)]
    policies += [ExitPolicy(threshold=middle, cache="deferred")] if batching == "diverge" else []
    requests = [Request(input_ids=row[real.bool()]) for row, real in zip(ids, mask, strict=True)]

    def everything(own):
        found = [own.generate(ids, mask, policy=one, max_new_tokens=LENGTH) for one in policies]
        engine = Engine(own, policies[0], slots=2, max_prompt=8, max_new_tokens=LENGTH)
        done = sorted(engine.run(requests), key=lambda one: int(one.id))
        return found, done

    ours, ours_done = everything(lean)
    monkeypatch.setattr(Backbone, "lean", False)
    monkeypatch.setattr(kernels, "take", lambda values: False)
    other = made()
    monkeypatch.setitem(vars(other._backbone), "lean", False)  # it may have been asked already
    plain, plain_done = everything(other)
    for mine, its in zip(ours, plain, strict=True):
        assert mine.tokens.tolist() == its.tokens.tolist()
        assert mine.exit_layers.tolist() == its.exit_layers.tolist()
        np.testing.assert_allclose(mine.confidence, its.confidence, atol=2e-5)
    for mine, its in zip(ours_done, plain_done, strict=True):
        assert mine.tokens.tolist() == its.tokens.tolist()
        assert mine.exit_layers.tolist() == its.exit_layers.tolist()


@pytest.mark.parametrize("policy", [ExitPolicy(), ExitPolicy(threshold=0.5, cache="deferred")])
def test_rows_that_end_leave_a_batch_without_them_too(policy, monkeypatch):
    words = ["a", "ox", "it", "up", "calibration", "be", "extraordinary", "go"]  # most end early
    decoder = load_example("g2p")
    ids, mask = decoder.encode(words)
    lean = decoder.generate(ids, mask, policy=policy, max_new_tokens=24)
    monkeypatch.setattr(Backbone, "lean", False)
    monkeypatch.setattr(kernels, "take", lambda values: False)
    other = load_example("g2p")
    plain = other.generate(ids, mask, policy=policy, max_new_tokens=24)
    assert plain.tokens.tolist() == lean.tokens.tolist()
    assert plain.exit_layers.tolist() == lean.exit_layers.tolist()
    half = load_example("g2p").model.to(torch.bfloat16)
    EarlyExitT5(half, decoder.tokenizer).generate(ids, mask, policy=policy, max_new_tokens=24)


@pytest.mark.parametrize("kind", ["t5", "llama-grouped"])
def test_numbers_that_overflowed_in_a_slot_do_not_reach_its_next_request(
    kind, gated_t5, monkeypatch
):
    """Masked or not: a NaN that is added to minus infinity, or multiplied with 0, stays one."""
    monkeypatch.setattr(Backbone, "lean", False)
    monkeypatch.setattr(kernels, "take", lambda values: False)
    broken, model = VOCABULARY - 1, copy.deepcopy(gated_t5 if kind == "t5" else causal_model(kind))
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = math.nan
    own = EarlyExitT5(model) if kind == "t5" else EarlyExitCausalLM(model)
    assert not own._backbone.lean
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, broken, size) for size in (7, 2, 3, 6)]
    # beside one that goes on, each slot's next request is shorter than what overflowed there
    asked = [Request(input_ids=np.r_[broken, prompts[3]], max_new_tokens=2)]
    asked += [Request(input_ids=prompt) for prompt in prompts]
    policy = ExitPolicy(threshold=0.9)
    engine = Engine(own, policy, slots=2, max_prompt=8, max_new_tokens=LENGTH)
    bad, *done = sorted(engine.run(asked), key=lambda one: int(one.id))
    assert np.isnan(bad.confidence).all()
    for one, prompt in zip(done, prompts, strict=True):
        alone = own.generate(torch.from_numpy(prompt[None]), policy=policy, max_new_tokens=LENGTH)
        assert one.tokens.tolist() == alone.tokens[0].tolist()
        np.testing.assert_allclose(one.confidence, alone.confidence[0], atol=2e-5)
