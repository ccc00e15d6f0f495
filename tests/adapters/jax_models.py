"""Small random T5s for JAX, made without PyTorch."""

from types import SimpleNamespace

import numpy as np

from riskcal_adapters.jax import T5
from riskcal_adapters.jax.weights import expected_shapes, read_shape

CONFIG = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_heads": 4,
    "num_layers": 1,
    "num_decoder_layers": 3,
    "vocab_size": 29,
    "feed_forward_proj": "gated-gelu",
    "scale_decoder_outputs": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def random_weights(seed=0, config=CONFIG):
    """By Hugging Face's names, float32, with a head of its own."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(read_shape(config, "config"))
    shapes["lm_head.weight"] = shapes["shared.weight"]
    weights = {}
    for name, shape in shapes.items():
        values = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(size=shape) * 0.3
        weights[name] = values.astype(np.float32)
    weights["shared.weight"] *= 3
    weights["lm_head.weight"][1] = 0.0  # the end is not said: generations run to the limit
    return weights


def random_t5(seed=0):
    return T5(read_shape(CONFIG, "config"), random_weights(seed), SimpleNamespace(**CONFIG))


def prompts(rows, seed=0, width=9):
    """Random prompts (rows, width) of 2 to ``width`` tokens, padded on the right, and their mask."""
    rng = np.random.default_rng(seed)
    lengths = np.array([width, *rng.integers(2, width + 1, rows - 1)])
    mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
    return rng.integers(2, CONFIG["vocab_size"], (rows, width)) * mask, mask
