"""What the PyTorch decoder is compared with: Hugging Face's own greedy decoding, and a naive early-exit decoder."""

import copy

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache, T5ForConditionalGeneration

from riskcal import Decaying, ExitPolicy

LENGTH = 12
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
