"""Tiny random causal language models of every kind that the decoder reads, and what it is compared with."""

import functools

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from riskcal_adapters.torch import EarlyExitCausalLM

VOCABULARY, LENGTH, END = 41, 12, 1
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 5, "head_dim": 8,
    "num_attention_heads": 6, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END,
}  # fmt: skip
KINDS = {
    "llama-grouped": (LlamaForCausalLM, LlamaConfig, _SIZES | {"num_key_value_heads": 2}),
    "llama-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        _SIZES | {"num_key_value_heads": 6, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig,
        _SIZES | {"num_key_value_heads": 3, "sliding_window": None},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _SIZES | {"num_key_value_heads": 2}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _SIZES | {"num_key_value_heads": 2}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64,
            "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END,
        },
    ),
}  # fmt: skip


@functools.cache
def model(kind):
    """Random weights whose tokens vary; norms and biases are not what they begin as, so that none can be forgotten unseen."""
    torch.set_num_threads(1)
    torch.manual_seed(11)
    of, config, sizes = KINDS[kind]
    made = of(config(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                norm = "weight" in name
                parameter.uniform_(0.5, 1.5) if norm else parameter.normal_(std=0.3)
            elif "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name:
                parameter.normal_(std=0.6)
            else:
                parameter.normal_(std=0.25)
    return made


@functools.cache
def decoder(kind):
    return EarlyExitCausalLM(model(kind))


def prompts(batch, side="left", seed=0):
    """Random prompts of 1 to 9 tokens, padded on either side, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, *torch.randint(1, 10, (batch - 1,), generator=generator).tolist()]
    tokens, mask = torch.zeros(2, batch, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        tokens[row, place] = torch.randint(2, VOCABULARY, (length,), generator=generator)
        mask[row, place] = 1
    return tokens, mask


def hugging_face(of, input_ids, attention_mask, max_new_tokens=LENGTH):
    """Its own greedy tokens after the prompts, which must be padded on the left."""
    generated = of.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
    )
    return generated[:, input_ids.shape[1] :]


def assert_rows_as_alone(own, policy, batch):
    """Tokens, exits and confidences of a padded batch are those of each prompt alone."""
    input_ids, mask = prompts(batch)
    together = own.generate(input_ids, mask, policy=policy, max_new_tokens=LENGTH)
    for row, real in enumerate(mask.bool()):
        alone = own.generate(input_ids[row : row + 1, real], policy=policy, max_new_tokens=LENGTH)
        size = alone.tokens.shape[1]
        assert together.tokens[row, :size].tolist() == alone.tokens[0].tolist()
        assert together.exit_layers[row, :size].tolist() == alone.exit_layers[0].tolist()
        assert (together.exit_layers[row, size:] == 0).all()
        for name in ("confidence", "refused"):
            torch.testing.assert_close(
                getattr(together, name)[row, :size],
                getattr(alone, name)[0],
                rtol=0,
                atol=2e-5,
                equal_nan=True,
            )
    return together
