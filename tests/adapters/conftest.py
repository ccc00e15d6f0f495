"""Models that the adapters' tests share: tiny random T5s of both versions, deeper in the decoder than in the encoder."""

import pytest


@pytest.fixture(scope="session", params=["v1.0", "v1.1"])
def tiny_t5(request):
    """A random T5: v1.0 (relu, head tied and scaled) with 4 decoder layers, or v1.1 (gated-gelu, own head) with 5."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(7)
    gated = request.param == "v1.1"
    config = T5Config(
        vocab_size=41,
        d_model=32,
        d_kv=12,
        d_ff=48,
        num_heads=3,
        num_layers=2,
        num_decoder_layers=5 if gated else 4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # fresh norms are all ones: a decoder that forgot them would pass
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    torch.nn.init.normal_(
        model.decoder.final_layer_norm.weight, std=1.5
    )  # else a tied head repeats the last token
    if gated:
        model.lm_head.weight = torch.nn.Parameter(
            torch.randn(config.vocab_size, config.d_model) * 0.5
        )
        torch.nn.init.zeros_(
            model.lm_head.weight[:2]
        )  # padding and end are not said: generations run to the limit
    return model
