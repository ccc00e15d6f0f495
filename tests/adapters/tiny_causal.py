"""Tiny random causal language models, Llama's and GPT-2's way."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, LAYERS = 60, 16, 4


def llama(*, tied=True, seed=3, **others):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(
        **shape | others,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return _drawn(LlamaForCausalLM, config, seed)


def gpt2(*, seed=4):
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _drawn(GPT2LMHeadModel, config, seed)


def _drawn(kind, config, seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = kind(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_" in name:  # fresh norms are ones: what forgot them would pass
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=0.3)
    return model
