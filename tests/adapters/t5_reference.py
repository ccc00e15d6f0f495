"""What the PyTorch decoder is compared with: Hugging Face's own greedy decoding, and a naive early-exit decoder."""

import copy

import numpy as np
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from riskcal import Decaying, ExitPolicy

LENGTH = 12
SHAPE = {
    "vocab_size": 41,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_heads": 3,
    "num_layers": 3,
    "num_decoder_layers": 5,
}
FULL = ExitPolicy.full_model()
DECAYING = Decaying(temperature=4.0, max_length=LENGTH)


def prompts(batch: int, side: str = "right", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of 2 to 9 tokens, padded on either side, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, *torch.randint(2, 10, (batch - 1,), generator=generator).tolist()]
    tokens, mask = torch.zeros(2, batch, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        tokens[row, place] = torch.randint(2, 41, (length,), generator=generator)
        mask[row, place] = 1
    return tokens, mask


def tiny(*, gated: bool) -> T5ForConditionalGeneration:
    """A random T5 with 4 decoder layers, tied and scaled, or 5 and a head of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
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
    # else a tied head repeats the last token
    torch.nn.init.normal_(model.decoder.final_layer_norm.weight, std=1.5)
    if gated:
        model.lm_head.weight = torch.nn.Parameter(
            torch.randn(config.vocab_size, config.d_model) * 0.5
        )
        # padding and end are not said: generations run to the limit
        torch.nn.init.zeros_(model.lm_head.weight[:2])
    return model


def family(kind, **changes):
    """A random model with biases that are not the same in any two layers."""
    kinds = {
        "t5": (T5ForConditionalGeneration, T5Config),
        "mt5": (MT5ForConditionalGeneration, MT5Config),
        "umt5": (UMT5ForConditionalGeneration, UMT5Config),
    }
    model_class, config_class = kinds[kind]
    torch.manual_seed(5)
    short = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    config = config_class(
        **SHAPE
        | short
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        | changes
    )
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=2.0)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.nn.init.normal_(model.decoder.final_layer_norm.weight, std=1.5)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(41, 32) * 0.5)
    torch.nn.init.zeros_(model.lm_head.weight[:2])
    return model


def hugging_face(model, input_ids, attention_mask=None, max_new_tokens=LENGTH) -> torch.Tensor:
    """Its own greedy tokens, without the start token."""
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        # the default cache is sized by the encoder's depth
        past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )
    return generated[:, 1:]


def ending_early(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """The same model with an end token that it does say, in some rows and not at once."""
    said = hugging_face(model, *prompts(7))
    candidates = [
        t
        for t in said[:, 2:].unique().tolist()
        if 0 < (said == t).any(1).sum() < 7 and t not in said[:, 0]
    ]
    ending = copy.deepcopy(model)
    ending.generation_config.eos_token_id = candidates[0]
    return ending


@torch.inference_mode()
def naive(model, input_ids, policy, length=LENGTH):
    """One prompt (1, S) by the definition: Hugging Face's modules, every skipped layer filled in at once, float64 margins."""
    decoder, config = model.decoder, model.config
    n_layers = config.num_decoder_layers
    memory = model.encoder(input_ids=input_ids).last_hidden_state
    thresholds = policy.exit_thresholds(n_layers, length)
    keys, values = [[[] for _ in range(n_layers)] for _ in range(2)]
    token, tokens, exits, confidences = config.decoder_start_token_id, [], [], []
    for position in range(length):
        state = decoder.embed_tokens(torch.tensor([[token]]))
        bias = (
            decoder.block[0]
            .layer[0]
            .SelfAttention.compute_bias(position + 1, position + 1)[:, :, -1:]
        )
        exited = None
        for i, block in enumerate(decoder.block):
            own, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
            normed = block.layer[0].layer_norm(state)
            keys[i].append(heads(own.k(normed), config))
            values[i].append(heads(own.v(normed), config))
            if exited is not None:
                continue
            attended = attention(
                heads(own.q(normed), config), torch.cat(keys[i], 2), torch.cat(values[i], 2), bias
            )
            state = state + own.o(attended)
            query = heads(cross.q(block.layer[1].layer_norm(state)), config)
            attended = attention(
                query, heads(cross.k(memory), config), heads(cross.v(memory), config), 0.0
            )
            state = block.layer[2](state + cross.o(attended))
            normed = decoder.final_layer_norm(state)[0, 0]
            logits = model.lm_head(
                normed * config.d_model**-0.5 if config.scale_decoder_outputs else normed
            )
            margin = margin64(logits)
            if i == n_layers - 1 or margin >= thresholds[position, i]:
                exited = i + 1
                token = int(logits.argmax())
        tokens.append(token)
        exits.append(exited)
        confidences.append(margin)
        if token == model.generation_config.eos_token_id:
            break
    return tokens, exits, confidences


def heads(projected, config):
    return projected.view(1, -1, config.num_heads, config.d_kv).transpose(1, 2)


def attention(query, keys, values, bias):
    weights = (query @ keys.transpose(2, 3) + bias).softmax(-1)
    return (weights @ values).transpose(1, 2).flatten(2)


def margin64(logits) -> float:
    exact = np.sort(np.exp(np.float64(logits) - np.float64(logits).max()))
    return float((exact[-1] - exact[-2]) / exact.sum())


def assert_row(generation, row, alone, tolerance=1e-5):
    """Row of a batch's generation equals a generation of its own; products of other sizes round differently."""
    length = alone.tokens.shape[1]
    assert generation.tokens[row, :length].equal(alone.tokens[0])
    assert generation.exit_layers[row, :length].equal(alone.exit_layers[0])
    torch.testing.assert_close(
        generation.confidence[row, :length], alone.confidence[0], rtol=0, atol=tolerance
    )
    assert not generation.exit_layers[row, length:].any()
    assert generation.confidence[row, length:].isnan().all()
