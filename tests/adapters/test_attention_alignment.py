"""Attention's kernels on a GPU need biases that begin at whole pieces of 16 bytes: "misaligned address" otherwise (seen on an
H200, float32, any policy). The CPU does not mind, so that its twin looks at what attention is given."""

import pytest
import torch
from causal_models import decoder
from transformers import T5Config, T5ForConditionalGeneration

from riskcal import ExitPolicy
from riskcal_adapters.torch import (
    EarlyExitCausalLM,
    EarlyExitT5,
    Engine,
    Request,
    backbone,
    causal_backbone,
    kernels,
    t5_backbone,
)


def tiny(heads: int) -> EarlyExitT5:
    torch.manual_seed(heads)
    shape = {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 16,
        "num_layers": 2,
        "num_heads": heads,
    }
    return EarlyExitT5(
        T5ForConditionalGeneration(
            T5Config(**shape, num_decoder_layers=4, decoder_start_token_id=0)
        ).eval()
    )


Bias = tuple[int, tuple[int, ...], tuple[int, ...]]


def biases(monkeypatch: pytest.MonkeyPatch) -> list[Bias]:
    """Where each bias begins, its strides and its shape, as attention is asked for."""
    seen, attend = [], backbone.scaled_dot_product_attention

    def watched(
        *arguments: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: float
    ) -> torch.Tensor:
        if attn_mask is not None:
            seen.append((attn_mask.data_ptr() % 16, attn_mask.stride(), tuple(attn_mask.shape)))
        return attend(*arguments, attn_mask=attn_mask, **options)

    for module in (backbone, t5_backbone, causal_backbone):
        monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
    # as on a GPU: loops of the CPU read keys where they are, without a bias
    monkeypatch.setattr(kernels, "take", lambda values: False)
    monkeypatch.setattr(backbone.Backbone, "lean", property(lambda self: False))
    return seen


def generate_and_serve(decoder: EarlyExitT5 | EarlyExitCausalLM, policy: ExitPolicy) -> None:
    for width, length in ((9, 23), (5, 11)):  # the second asks for parts of what the first made
        ids = torch.randint(2, 40, (3, width), generator=torch.Generator().manual_seed(width))
        mask = torch.ones_like(ids)
        mask[1, 3:] = 0
        decoder.generate(ids, mask, policy=policy, max_new_tokens=length)
        if policy.cache == "project":
            engine = Engine(decoder, policy, slots=3, max_prompt=width, max_new_tokens=length)
            requests = [
                Request(input_ids=row[:size]) for row, size in zip(ids, (9, 3, 4), strict=True)
            ]
            list(engine.run(requests))


def assert_whole_pieces(seen: list[Bias], *, more_than: int = 50) -> None:
    assert len(seen) > more_than
    for remainder, stride, shape in seen:
        assert remainder == 0, (shape, stride)
        # a width of whole pieces is read as it stands; any other is copied into one by torch itself
        if shape[-1] % 8 == 0:
            assert all(
                s % 8 == 0 for s, size in zip(stride[:-1], shape[:-1], strict=True) if size > 1
            ), (shape, stride)


@pytest.mark.parametrize("kind", ["llama-grouped", "gpt2"])
@pytest.mark.parametrize("cache", ["project", "deferred"])
def test_every_bias_of_a_causal_model_begins_at_a_whole_piece(
    monkeypatch: pytest.MonkeyPatch, kind: str, cache: str
) -> None:
    seen = biases(monkeypatch)
    generate_and_serve(decoder(kind), ExitPolicy(threshold=0.1, cache=cache))
    # no layer of these attends to a prompt apart, and without padding there is no bias but of several positions
    assert_whole_pieces(seen, more_than=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("cache", ["project", "deferred", "recompute"])
def test_every_bias_begins_at_a_whole_piece(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, heads: int, cache: str
) -> None:
    seen = biases(monkeypatch)
    decoder = EarlyExitT5(tiny(heads).model.to(dtype))
    policy = ExitPolicy(threshold=0.02, measure="softmax", cache=cache)
    generate_and_serve(decoder, policy)
    assert_whole_pieces(seen)
    rows = decoder._backbone._decoder_bias.rows(11)
    expected = decoder._backbone._decoder_bias.square(11)
    for n, row in enumerate(rows[:11], start=1):
        torch.testing.assert_close(row[0, :, 0], expected[0, :, n - 1, :n])
